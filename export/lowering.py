"""Core ATen operations as ONNX operators (opset 18), one function each.

A lowering gets the builder, the node and its arguments: names of ONNX values where the graph has nodes, plain Python
values elsewhere. Only operators that TensorRT documents are used (tests/export/test_tensorrt_support.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
LOWERINGS: dict[Any, Callable[..., Any]] = {}
FAR = 1 << 62  # past the end of any axis


class Value(str):
    """The name of an ONNX value."""

    __slots__ = ()


class Builder(Protocol):
    """What a lowering may do."""

    def op(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Append an operator and return its output."""
        ...

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> Value:
        """A constant of the graph, from a number, a list or a tensor."""
        ...

    def cast(self, value: Value, source: torch.dtype, dtype: torch.dtype) -> Value:
        """Cast, unless it is of that dtype."""
        ...

    def shape(self, sizes: Sequence[Any]) -> Value:
        """An int64 vector from whole numbers and values of the graph."""
        ...


def _lowers(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            LOWERINGS[operator] = function
        return function

    return register


class Meta(NamedTuple):
    """What is the same at every batch. Sizes are not: see `sizes`, `fixed` and `extent`."""

    dtype: torch.dtype
    ndim: int


def meta(node: Any) -> Meta:
    """Dtype and rank of a node; whole numbers of the graph are int64 vectors of one element."""
    known = node.meta["val"]
    return Meta(known.dtype, known.ndim) if isinstance(known, Tensor) else Meta(torch.int64, 1)


def sizes(node: Any) -> tuple[Any, ...]:
    """The shape of a node at every batch: whole numbers, and a `Size` where it follows the batch."""
    return tuple(node.meta["shape"])


def fixed(node: Any, *axes: int) -> list[int]:
    """Sizes of these axes (of all without any), refused where one follows the batch."""
    found = [sizes(node)[axis] for axis in axes] if axes else list(sizes(node))
    if any(not isinstance(n, int) for n in found):
        raise NotImplementedError("this form of it takes no size that depends on the batch")
    return found


def extent(g: Builder, node: Any, value: Value, *axes: int) -> Value:
    """Sizes of these axes of a node, whose ONNX value is `value`, as an int64 vector: right at every batch."""
    found = [sizes(node)[axis] for axis in axes]
    if all(isinstance(n, int) for n in found):
        return g.constant(found)
    return g.op("Gather", g.op("Shape", value), g.constant([axis % meta(node).ndim for axis in axes]), axis=0)


def scalar(g: Builder, value: Any, dtype: torch.dtype) -> Value:
    """A tensor without axes from a number, which may follow the batch (a vector of one element in the graph)."""
    if isinstance(value, Value):
        return g.cast(g.op("Squeeze", value, g.constant([0])), torch.int64, dtype)
    return g.constant(value, dtype)


def _operands(g: Builder, node: Node, dtype: torch.dtype, values: Sequence[Any]) -> list[Value]:
    """Arguments of an elementwise operation, all in `dtype`."""
    out = []
    for argument, value in zip(node.args, values, strict=False):
        if isinstance(argument, Node) and isinstance(argument.meta["val"], Tensor):
            out.append(g.cast(value, meta(argument).dtype, dtype))
        else:
            out.append(scalar(g, value, dtype))
    return out


def _elementwise(kind: str, *operators: Any) -> None:
    @_lowers(*operators)
    def lower(g: Builder, node: Node, *values: Any, **_: Any) -> Value:
        return g.op(kind, *_operands(g, node, meta(node).dtype, values))


for _kind, *_operators in (
    ("Mul", aten.mul.Tensor, aten.mul.Scalar),
    ("Neg", aten.neg.default),
    ("Abs", aten.abs.default),
    ("Sign", aten.sign.default, aten.sgn.default),
    ("Sqrt", aten.sqrt.default),
    ("Exp", aten.exp.default),
    ("Log", aten.log.default),
    ("Sin", aten.sin.default),
    ("Cos", aten.cos.default),
    ("Acos", aten.acos.default),
    ("Asin", aten.asin.default),
    ("Atan", aten.atan.default),
    ("Tanh", aten.tanh.default),
    ("Sinh", aten.sinh.default),
    ("Cosh", aten.cosh.default),
    ("Sigmoid", aten.sigmoid.default),
    ("Erf", aten.erf.default),
    ("Relu", aten.relu.default),
    ("Reciprocal", aten.reciprocal.default),
    ("Floor", aten.floor.default),
    ("Ceil", aten.ceil.default),
    ("Round", aten.round.default),
    ("Max", aten.maximum.default),
    ("Min", aten.minimum.default),
    ("Pow", aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar),
    ("And", aten.logical_and.default),
    ("Or", aten.logical_or.default),
    ("Xor", aten.logical_xor.default),
    ("Not", aten.logical_not.default),
):
    _elementwise(_kind, *_operators)


def _bitwise(kind: str, *operators: Any) -> None:
    @_lowers(*operators)
    def lower(g: Builder, node: Node, *values: Any) -> Value:
        if meta(node).dtype != torch.bool:
            raise NotImplementedError("bitwise operations are exported for bool only")
        return g.op(kind, *_operands(g, node, torch.bool, values))


_bitwise("And", aten.bitwise_and.Tensor, aten.bitwise_and.Scalar)
_bitwise("Or", aten.bitwise_or.Tensor, aten.bitwise_or.Scalar)
_bitwise("Xor", aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar)
_bitwise("Not", aten.bitwise_not.default)


def _scaled_sum(kind: str, *operators: Any) -> None:
    @_lowers(*operators)
    def lower(g: Builder, node: Node, a: Any, b: Any, alpha: float = 1) -> Value:
        dtype = meta(node).dtype
        left, right = _operands(g, node, dtype, (a, b))
        if alpha != 1:
            right = g.op("Mul", right, g.constant(alpha, dtype))
        return g.op(kind, left, right)


_scaled_sum("Add", aten.add.Tensor, aten.add.Scalar)
_scaled_sum("Sub", aten.sub.Tensor, aten.sub.Scalar)


@_lowers(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default)
def div(g: Builder, node: Node, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    dtype = meta(node).dtype
    if node.target is aten.floor_divide.default:
        rounding_mode = "floor"
    if rounding_mode is None or dtype.is_floating_point:
        out = g.op("Div", *_operands(g, node, dtype, (a, b)))
        return out if rounding_mode is None else g.op("Floor", out) if rounding_mode == "floor" else _truncate(g, out)
    wide = g.op("Div", *_operands(g, node, torch.float64, (a, b)))
    whole = g.op("Floor", wide) if rounding_mode == "floor" else _truncate(g, wide)
    return g.cast(whole, torch.float64, dtype)


def _truncate(g: Builder, x: Value) -> Value:
    return g.op("Mul", g.op("Sign", x), g.op("Floor", g.op("Abs", x)))


@_lowers(aten.remainder.Scalar, aten.remainder.Tensor)
def remainder(g: Builder, node: Node, a: Any, b: Any) -> Value:
    x, y = _operands(g, node, meta(node).dtype, (a, b))
    if not meta(node).dtype.is_floating_point:
        return g.op("Mod", x, y)
    return g.op("Sub", x, g.op("Mul", y, g.op("Floor", g.op("Div", x, y))))


@_lowers(aten.tan.default)
def tan(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Div", g.op("Sin", x), g.op("Cos", x))  # ONNX Runtime has no Tan for every type


@_lowers(aten.rsqrt.default)
def rsqrt(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Reciprocal", g.op("Sqrt", x))


@_lowers(aten.log1p.default)
def log1p(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Log", g.op("Add", x, g.constant(1, meta(node).dtype)))


@_lowers(aten.expm1.default)
def expm1(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Sub", g.op("Exp", x), g.constant(1, meta(node).dtype))


@_lowers(aten.gelu.default)
def gelu(g: Builder, node: Node, x: Value, approximate: str = "none") -> Value:
    dtype = meta(node).dtype
    half, one = g.constant(0.5, dtype), g.constant(1, dtype)
    if approximate == "none":
        inner = g.op("Erf", g.op("Mul", x, g.constant(math.sqrt(0.5), dtype)))
    else:
        cube = g.op("Mul", g.op("Mul", x, x), x)
        bent = g.op("Add", x, g.op("Mul", cube, g.constant(0.044715, dtype)))
        inner = g.op("Tanh", g.op("Mul", bent, g.constant(math.sqrt(2 / math.pi), dtype)))
    return g.op("Mul", g.op("Mul", x, half), g.op("Add", inner, one))


@_lowers(aten.leaky_relu.default)
def leaky_relu(g: Builder, node: Node, x: Value, slope: float = 0.01) -> Value:
    return g.op("LeakyRelu", x, alpha=float(slope))


@_lowers(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default)
def clamp(g: Builder, node: Node, x: Value, *limits: Any) -> Value:
    # Max and Min, not Clip: like PyTorch they let NaN through.
    dtype = meta(node).dtype
    low, high = (*limits, None, None)[:2]
    if node.target is aten.clamp_max.default:
        low, high = None, low
    if node.target is aten.hardtanh.default:
        low, high = -1 if low is None else low, 1 if high is None else high
    x = g.cast(x, meta(node.args[0]).dtype, dtype)
    for kind, limit, position in (("Max", low, 1), ("Min", high, 2)):
        argument = node.args[position] if position < len(node.args) else None
        if isinstance(argument, Node) and isinstance(argument.meta["val"], Tensor):
            x = g.op(kind, x, g.cast(limit, meta(argument).dtype, dtype))
        elif limit is not None:
            x = g.op(kind, x, scalar(g, limit, dtype))
    return x


def _comparison(kind: str, name: str, negate: bool = False) -> None:
    packet = getattr(aten, name)

    @_lowers(packet.Tensor, packet.Scalar)
    def lower(g: Builder, node: Node, a: Any, b: Any) -> Value:
        known: list[Any] = [n.meta["val"] if isinstance(n, Node) else n for n in node.args[:2]]
        dtype = torch.result_type(*known)
        if dtype == torch.bool and kind != "Equal":
            dtype = torch.int32
        out = g.op(kind, *_operands(g, node, dtype, (a, b)))
        return g.op("Not", out) if negate else out


_comparison("Equal", "eq")
_comparison("Equal", "ne", negate=True)
_comparison("Less", "lt")
_comparison("LessOrEqual", "le")
_comparison("Greater", "gt")
_comparison("GreaterOrEqual", "ge")


@_lowers(aten.isnan.default)
def isnan(g: Builder, node: Node, x: Value) -> Value:
    return g.op("IsNaN", x)


@_lowers(aten.isinf.default)
def isinf(g: Builder, node: Node, x: Value) -> Value:
    return g.op("IsInf", x)


@_lowers(aten.where.self)
def where(g: Builder, node: Node, condition: Value, a: Value, b: Value) -> Value:
    dtype = meta(node).dtype
    values = [g.cast(v, meta(n).dtype, dtype) for v, n in zip((a, b), node.args[1:], strict=True)]
    return g.op("Where", condition, *values)


# Reductions


def _axes(node: Node, dim: Any) -> list[int]:
    rank = meta(node.args[0]).ndim
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    return [d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim)]


def _reduction(kind: str, *operators: Any) -> None:
    @_lowers(*operators)
    def lower(g: Builder, node: Node, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        x = g.cast(x, meta(node.args[0]).dtype, meta(node).dtype)
        axes = _axes(node, dim)
        return g.op(kind, x, g.constant(axes), keepdims=int(keepdim)) if axes else x


_reduction("ReduceSum", aten.sum.dim_IntList, aten.sum.default)
_reduction("ReduceMean", aten.mean.dim, aten.mean.default)
_reduction("ReduceMax", aten.amax.default)
_reduction("ReduceMin", aten.amin.default)


@_lowers(aten.prod.dim_int)
def prod(g: Builder, node: Node, x: Value, dim: int, keepdim: bool = False) -> Value:
    x = g.cast(x, meta(node.args[0]).dtype, meta(node).dtype)
    return g.op("ReduceProd", x, g.constant(_axes(node, dim)), keepdims=int(keepdim))


@_lowers(aten.any.dim, aten.any.dims, aten.any.default)
def any_(g: Builder, node: Node, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    x = g.cast(g.cast(x, meta(node.args[0]).dtype, torch.bool), torch.bool, torch.int32)
    axes = _axes(node, dim)
    out = g.op("ReduceMax", x, g.constant(axes), keepdims=int(keepdim)) if axes else x
    return g.cast(out, torch.int32, torch.bool)


def _arg(kind: str, operator: Any) -> None:
    @_lowers(operator)
    def lower(g: Builder, node: Node, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        if dim is None:
            x, dim = g.op("Reshape", x, g.constant([-1])), 0
        return g.op(kind, x, axis=dim, keepdims=int(keepdim))


_arg("ArgMax", aten.argmax.default)
_arg("ArgMin", aten.argmin.default)


def _extreme(reduce: str, arg: str, operator: Any) -> None:
    @_lowers(operator)
    def lower(g: Builder, node: Node, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        values = g.op(reduce, x, g.constant(_axes(node, dim)), keepdims=int(keepdim))
        return values, g.op(arg, x, axis=dim, keepdims=int(keepdim))


_extreme("ReduceMax", "ArgMax", aten.max.dim)
_extreme("ReduceMin", "ArgMin", aten.min.dim)


@_lowers(aten.cumsum.default)
def cumsum(g: Builder, node: Node, x: Value, dim: int, dtype: Any = None) -> Value:
    return g.op("CumSum", g.cast(x, meta(node.args[0]).dtype, meta(node).dtype), g.constant(dim))


@_lowers(aten.topk.default)
def topk(g: Builder, node: Node, x: Value, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return g.op("TopK", x, g.shape([k]), axis=dim, largest=int(largest), sorted=int(sorted), outputs=2)


@_lowers(aten.sort.default, aten.sort.stable)
def sort(g: Builder, node: Node, x: Value, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    return g.op("TopK", x, extent(g, node.args[0], x, dim), axis=dim, largest=int(descending), sorted=1, outputs=2)


def _softmax(kind: str, operator: Any) -> None:
    @_lowers(operator)
    def lower(g: Builder, node: Node, x: Value, dim: int, half_to_float: bool) -> Value:
        source = meta(node.args[0]).dtype
        wide = source if source == torch.float64 else torch.float32
        return g.cast(g.op(kind, g.cast(x, source, wide), axis=dim), wide, meta(node).dtype)


_softmax("Softmax", aten._softmax.default)
_softmax("LogSoftmax", aten._log_softmax.default)


# Shapes


@_lowers(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def reshape(g: Builder, node: Node, x: Value, size: Sequence[Any]) -> Value:
    unknown = [i for i, n in enumerate(size) if isinstance(n, Value)]
    if len(unknown) == 1 and -1 not in size:
        size = [-1 if i == unknown[0] else n for i, n in enumerate(size)]
    return g.op("Reshape", x, g.shape(size), allowzero=int(0 in size and -1 not in size))


@_lowers(aten.unsqueeze.default)
def unsqueeze(g: Builder, node: Node, x: Value, dim: int) -> Value:
    return g.op("Unsqueeze", x, g.constant([dim % meta(node).ndim]))


@_lowers(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(g: Builder, node: Node, x: Value, dims: Any = None) -> Value:
    shape = node.args[0].meta["shape"]  # type: ignore[union-attr]
    axes = [d for d in _axes(node, dims) if shape[d] == 1]
    return g.op("Squeeze", x, g.constant(axes)) if axes else x


@_lowers(aten.permute.default)
def permute(g: Builder, node: Node, x: Value, dims: Sequence[int]) -> Value:
    return g.op("Transpose", x, perm=[d % len(dims) for d in dims])


@_lowers(aten.transpose.int)
def transpose(g: Builder, node: Node, x: Value, a: int, b: int) -> Value:
    order = list(range(meta(node).ndim))
    order[a], order[b] = order[b], order[a]
    return g.op("Transpose", x, perm=order)


@_lowers(aten.t.default)
def t(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Transpose", x, perm=[1, 0]) if meta(node).ndim == 2 else x


@_lowers(aten.expand.default)
def expand(g: Builder, node: Node, x: Value, size: Sequence[Any], implicit: bool = False) -> Value:
    return g.op("Expand", x, g.shape([1 if n == -1 else n for n in size]))


@_lowers(aten.repeat.default)
def repeat(g: Builder, node: Node, x: Value, repeats: Sequence[Any]) -> Value:
    extra = len(repeats) - meta(node.args[0]).ndim
    if extra:
        x = g.op("Unsqueeze", x, g.constant(list(range(extra))))
    return g.op("Tile", x, g.shape(repeats))


@_lowers(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def identity(g: Builder, node: Node, x: Value, **_: Any) -> Value:
    return x


@_lowers(aten._to_copy.default)
def to_copy(g: Builder, node: Node, x: Value, **_: Any) -> Value:
    return g.cast(x, meta(node.args[0]).dtype, meta(node).dtype)


@_lowers(aten.copy.default)
def copy(g: Builder, node: Node, x: Value, source: Any, non_blocking: bool = False) -> Value:
    value = g.cast(source, meta(node.args[1]).dtype, meta(node).dtype)
    return g.op("Expand", value, g.op("Shape", x))


@_lowers(aten.cat.default)
def cat(g: Builder, node: Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    dtype, rank = meta(node).dtype, meta(node).ndim
    kept = [
        g.cast(v, meta(n).dtype, dtype)
        for v, n in zip(tensors, node.args[0], strict=True)  # type: ignore[arg-type]
        if meta(n).ndim == rank
    ]
    return g.op("Concat", *kept, axis=dim % rank) if len(kept) > 1 else kept[0]


@_lowers(aten.split_with_sizes.default)
def split_with_sizes(g: Builder, node: Node, x: Value, parts: Sequence[Any], dim: int = 0) -> Any:
    return (x,) if len(parts) == 1 else g.op("Split", x, g.shape(parts), axis=dim, outputs=len(parts))


@_lowers(aten.slice.Tensor)
def slice_(g: Builder, node: Node, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    limits = [g.shape([v]) for v in (0 if start is None else start, FAR if end is None else end)]
    return g.op("Slice", x, *limits, g.constant([dim % meta(node).ndim]), g.constant([step]))


@_lowers(aten.select.int)
def select(g: Builder, node: Node, x: Value, dim: int, index: Any) -> Value:
    position = index if isinstance(index, Value) else g.constant(index)
    return g.op("Gather", x, position, axis=dim % meta(node.args[0]).ndim)


@_lowers(aten.flip.default)
def flip(g: Builder, node: Node, x: Value, dims: Sequence[int]) -> Value:
    axes = [d % meta(node).ndim for d in dims]
    start, end, step = ([v] * len(axes) for v in (-1, -FAR, -1))
    return g.op("Slice", x, g.constant(start), g.constant(end), g.constant(axes), g.constant(step)) if axes else x


@_lowers(aten.constant_pad_nd.default)
def constant_pad_nd(g: Builder, node: Node, x: Value, pad: Sequence[int], value: float = 0) -> Value:
    rank = meta(node).ndim
    if any(not isinstance(p, int) for p in pad):
        raise NotImplementedError("padding that depends on the batch")
    begins, ends = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        begins[rank - 1 - i], ends[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    cut = [i for i in range(rank) if begins[i] < 0 or ends[i] < 0]
    if cut:
        starts, stops = [max(0, -begins[i]) for i in cut], [min(0, ends[i]) or FAR for i in cut]
        x = g.op("Slice", x, g.constant(starts), g.constant(stops), g.constant(cut), g.constant([1] * len(cut)))
        begins, ends = [max(0, b) for b in begins], [max(0, e) for e in ends]
    if not any((*begins, *ends)):
        return x
    dtype = meta(node).dtype
    if dtype == torch.bool:
        padded = g.op("Pad", g.cast(x, dtype, torch.int32), g.constant(begins + ends), g.constant(value, torch.int32))
        return g.cast(padded, torch.int32, dtype)
    return g.op("Pad", x, g.constant(begins + ends), g.constant(value, dtype))


# Indexing


@_lowers(aten.index.Tensor)
def index(g: Builder, node: Node, x: Value, indices: Sequence[Any]) -> Value:
    nodes: Any = node.args[1]
    used = [i for i, n in enumerate(nodes) if n is not None]
    if any(meta(nodes[i]).dtype in (torch.bool, torch.uint8) for i in used):
        raise NotImplementedError("indexing with a mask gives a size that depends on values: use torch.where")
    if len(used) == 1:
        return g.op("Gather", x, g.cast(indices[used[0]], meta(nodes[used[0]]).dtype, torch.int64), axis=used[0])
    if used != list(range(len(used))):
        raise NotImplementedError("several index tensors must stand on the first axes")
    return g.op("GatherND", x, _index_rows(g, nodes, indices, used))


def _index_rows(g: Builder, nodes: Any, indices: Sequence[Any], used: Sequence[int]) -> Value:
    """Index tensors side by side, broadcast together: [..., number of them]."""
    columns = [g.cast(indices[i], meta(nodes[i]).dtype, torch.int64) for i in used]
    total = columns[0]
    for column in columns[1:]:
        total = g.op("Add", total, column)
    shape = g.op("Shape", total)
    wide = [g.op("Unsqueeze", g.op("Expand", c, shape), g.constant([-1])) for c in columns]
    return g.op("Concat", *wide, axis=-1) if len(wide) > 1 else wide[0]


@_lowers(aten.index_put.default)
def index_put(
    g: Builder, node: Node, x: Value, indices: Sequence[Any], values: Value, accumulate: bool = False
) -> Value:
    nodes: Any = node.args[1]
    used = [i for i, n in enumerate(nodes) if n is not None]
    if used != list(range(len(used))) or any(meta(nodes[i]).dtype == torch.bool for i in used):
        raise NotImplementedError("index_put takes whole-number index tensors on the first axes")
    rows = _index_rows(g, nodes, indices, used)
    rest = range(len(used), meta(node).ndim)
    lead = g.op("Shape", g.op("Gather", rows, g.constant(0), axis=-1))
    target = g.op("Concat", lead, extent(g, node, x, *rest), axis=0) if rest else lead
    updates = g.op("Expand", g.cast(values, meta(node.args[2]).dtype, meta(node).dtype), target)
    return g.op("ScatterND", x, rows, updates, reduction="add" if accumulate else "none")


@_lowers(aten.embedding.default)
def embedding(g: Builder, node: Node, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    return g.op("Gather", weight, indices, axis=0)


@_lowers(aten.index_select.default)
def index_select(g: Builder, node: Node, x: Value, dim: int, indices: Value) -> Value:
    return g.op("Gather", x, indices, axis=dim)


@_lowers(aten.gather.default)
def gather(g: Builder, node: Node, x: Value, dim: int, indices: Value, sparse_grad: bool = False) -> Value:
    return g.op("GatherElements", x, indices, axis=dim)


@_lowers(aten.scatter.src, aten.scatter_add.default)
def scatter(g: Builder, node: Node, x: Value, dim: int, indices: Value, source: Value) -> Value:
    reduction = "add" if node.target is aten.scatter_add.default else "none"
    return g.op("ScatterElements", x, indices, source, axis=dim, reduction=reduction)


@_lowers(aten.scatter.value)
def scatter_value(g: Builder, node: Node, x: Value, dim: int, indices: Value, value: float) -> Value:
    source = g.op("Expand", scalar(g, value, meta(node).dtype), g.op("Shape", indices))
    return g.op("ScatterElements", x, indices, source, axis=dim, reduction="none")


# Making tensors


@_lowers(aten.full.default)
def full(g: Builder, node: Node, size: Sequence[Any], value: float, **_: Any) -> Value:
    filled = scalar(g, value, meta(node).dtype)
    return g.op("Expand", filled, g.shape(size)) if size else filled


@_lowers(aten.full_like.default)
def full_like(g: Builder, node: Node, x: Value, value: float, **_: Any) -> Value:
    return g.op("Expand", scalar(g, value, meta(node).dtype), g.op("Shape", x))


@_lowers(aten.scalar_tensor.default)
def scalar_tensor(g: Builder, node: Node, value: Any, **_: Any) -> Value:
    return scalar(g, value, meta(node).dtype)


@_lowers(aten.arange.start_step)
def arange(g: Builder, node: Node, start: Any, end: Any, step: Any = 1, **_: Any) -> Value:
    dtype = meta(node).dtype
    return g.op("Range", *(scalar(g, v, dtype) for v in (start, end, step)))


# Products, convolutions, pooling


@_lowers(aten.mm.default, aten.bmm.default)
def matmul(g: Builder, node: Node, a: Value, b: Value) -> Value:
    return g.op("MatMul", a, b)


@_lowers(aten.addmm.default)
def addmm(g: Builder, node: Node, bias: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    return g.op("Gemm", a, b, bias, alpha=float(alpha), beta=float(beta))


@_lowers(aten.baddbmm.default)
def baddbmm(g: Builder, node: Node, bias: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    dtype = meta(node).dtype
    product = g.op("MatMul", a, b)
    if alpha != 1:
        product = g.op("Mul", product, g.constant(alpha, dtype))
    if beta == 0:
        return product
    return g.op("Add", product, bias if beta == 1 else g.op("Mul", bias, g.constant(beta, dtype)))


@_lowers(aten.native_group_norm.default)
def native_group_norm(
    g: Builder, node: Node, x: Value, weight: None, bias: None, n: Any, c: int, inner: int, groups: int, eps: float
) -> tuple[Value, Value | None, Value | None]:
    """Rows [N, G, D] that are normalised each on its own, which is all that our decompositions leave of it."""
    dtype, (size,) = meta(node.args[0]).dtype, fixed(node.args[0], 2)
    used = {user.args[1] for user in node.users}
    if dtype == torch.float64:  # ONNX Runtime normalises in float32 only
        average = g.op("ReduceMean", x, g.constant([2]), keepdims=0)
        centred = g.op("Sub", x, g.op("Unsqueeze", average, g.constant([2])))
        square = g.op("ReduceMean", g.op("Mul", centred, centred), g.constant([2]), keepdims=0)
        rstd = g.op("Reciprocal", g.op("Sqrt", g.op("Add", square, g.constant(eps, dtype))))
        return g.op("Mul", centred, g.op("Unsqueeze", rstd, g.constant([2]))), average, rstd
    mean = g.op("ReduceMean", x, g.constant([2]), keepdims=0) if 1 in used else None
    ones, zeros = g.constant(torch.ones(groups)), g.constant(torch.zeros(groups))
    normed = g.op("InstanceNormalization", x, ones, zeros, epsilon=eps)
    if 2 not in used:
        return normed, mean, None
    # With r = rstd, the mean of x * normed is s = 1/r - eps r; solved for r without cancellation.
    rows, columns = (g.op("Unsqueeze", v, g.constant([2])) for v in (x, normed))
    dots = g.op("MatMul", rows, g.op("Transpose", columns, perm=[0, 1, 3, 2]))
    s = g.op("Div", g.op("Squeeze", dots, g.constant([2, 3])), g.constant(float(size), dtype))
    root = g.op("Sqrt", g.op("Add", g.op("Mul", s, s), g.constant(4 * eps, dtype)))
    return normed, mean, g.op("Div", g.constant(2.0, dtype), g.op("Add", s, root))


@_lowers(aten.convolution.default)
def convolution(
    g: Builder, node: Node, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    dims = meta(node.args[1]).ndim - 2
    stride, padding, dilation = (list(v) * dims if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    inputs = [x, weight] if bias is None else [x, weight, bias]
    attributes = {
        "strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups,
        "kernel_shape": fixed(node.args[1], *range(2, dims + 2)),
    }  # fmt: skip
    if not transposed:
        return g.op("Conv", *inputs, **attributes)
    return g.op("ConvTranspose", *inputs, **attributes, output_padding=list(output_padding))


def _windows(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool) -> dict[str, Any]:
    kernel, stride, padding = (list(v) * 2 if len(v) == 1 else list(v) for v in (kernel, stride or kernel, padding))
    return {"kernel_shape": kernel, "strides": stride, "pads": padding * 2, "ceil_mode": int(ceil_mode)}


@_lowers(aten.avg_pool2d.default)
def avg_pool2d(
    g: Builder, node: Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    windows = _windows(kernel, stride, padding, ceil_mode)
    if divisor_override is None:
        return g.op("AveragePool", x, count_include_pad=int(count_include_pad), **windows)
    mean = g.op("AveragePool", x, count_include_pad=1, **windows)
    return g.op("Mul", mean, g.constant(math.prod(windows["kernel_shape"]) / divisor_override, meta(node).dtype))


@_lowers(aten.max_pool2d_with_indices.default)
def max_pool2d(
    g: Builder, node: Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), ceil_mode: bool = False,
) -> tuple[Value, None]:  # fmt: skip
    dilations = list(dilation) * 2 if len(dilation) == 1 else list(dilation)
    return g.op("MaxPool", x, dilations=dilations, **_windows(kernel, stride, padding, ceil_mode)), None


@_lowers(aten.upsample_nearest2d.default)
def upsample_nearest2d(
    g: Builder, node: Node, x: Value, size: Sequence[int], scale_h: float | None = None, scale_w: float | None = None
) -> Value:
    scales = [1.0, 1.0, *(out / n for out, n in zip(fixed(node, 2, 3), fixed(node.args[0], 2, 3), strict=True))]
    modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.op("Resize", x, Value(""), g.constant(scales, torch.float32), **modes)
