"""From a function that may differentiate inside to one graph of core ATen operations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import decompositions
from .errors import ExportError, NodeError

aten = torch.ops.aten
BATCHES = (4, 7)  # traced at both; coprime, so that halves and squares of the batch are told from multiples
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
FOLD_LIMIT = 1 << 10  # elements of a constant that is made from nothing (zeros, ranges)


@dataclass(frozen=True)
class Size:
    """A size of the form scale * batch + offset."""

    scale: int
    offset: int


Shape = tuple[int | Size, ...]


def trace(
    fn: Callable[..., Any],
    example_inputs: Sequence[Tensor],
    *,
    dynamic_batch: bool = True,
) -> GraphModule:
    """Trace `fn` into a flat graph of core ATen operations: no autograd, no backward operator, no mutation.

    With `dynamic_batch` the batch is the first size of the first input; every input with the same first size shares it.
    The function is traced at two batch sizes and the two graphs are unified: numbers in which they differ are functions
    of the batch. Every tensor of the graph has its shape in `node.meta["shape"]`, batch-dependent sizes as `Size`.

    Args:
        fn: a module or function of tensors; it may call `torch.func.vjp`, `grad`, `jacrev` or `vmap` inside.
        example_inputs: tensors of the right shapes and dtypes; their values do not matter.
        dynamic_batch: otherwise the shapes of the examples are the only ones.

    Returns:
        A GraphModule that can be called like `fn`; parameters and constants are its attributes.

    Raises:
        ExportError: control flow depends on values, an input is mutated, a dtype is not supported, or the graph's
            structure depends on the batch; the message holds the source line.
    """
    examples = list(example_inputs)
    for i, x in enumerate(examples):
        if not isinstance(x, Tensor):
            raise ExportError(f"example_inputs[{i}]: expected a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise ExportError(f"example_inputs[{i}]: {x.dtype} is not supported; use one of {_names(DTYPES)}")
    try:
        graph = _trace(fn, examples, dynamic_batch)
        _check(graph)
        _simplify(graph)
    except NodeError as error:
        raise located(error, fn, examples) from None
    return graph


def _trace(fn: Callable[..., Any], examples: list[Tensor], dynamic_batch: bool) -> GraphModule:
    if not dynamic_batch:
        graph = _trace_once(fn, examples)
        for node in graph.graph.nodes:
            node.meta["shape"] = _shape(node)
        return graph
    batched = batched_inputs(examples)
    graph, other = (_trace_once(fn, _at_batch(examples, batched, b)) for b in BATCHES)
    _unify(graph, other, batched)
    return graph


def located(error: NodeError, fn: Callable[..., Any], examples: Sequence[Tensor]) -> ExportError:
    """The error with the line of code that made its node, found by tracing once more with every call recorded."""
    batch = _at_batch(examples, batched_inputs(examples), BATCHES[0]) if examples and examples[0].ndim else examples
    graph = _trace_once(fn, batch, record=True)
    node = next((n for n in graph.graph.nodes if n.name == error.node), None)
    return ExportError(error.message.replace("{where}", _source_of(node) if node else f"node {error.node}"))


def batched_inputs(examples: Sequence[Tensor]) -> list[int]:
    """Indices of the inputs that share the batch: those with the first input's first size. ExportError without one."""
    if not examples or examples[0].ndim == 0:
        raise ExportError("dynamic_batch: the first input has no batch dimension; pass dynamic_batch=False")
    batch = examples[0].shape[0]
    return [i for i, x in enumerate(examples) if x.ndim and x.shape[0] == batch]


def _at_batch(examples: Sequence[Tensor], batched: list[int], batch: int) -> list[Tensor]:
    return [
        x[torch.arange(batch, device=x.device) % max(1, x.shape[0])] if i in batched else x
        for i, x in enumerate(examples)
    ]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _trace_once(fn: Callable[..., Any], examples: Sequence[Tensor], record: bool = False) -> GraphModule:
    """Trace at the shapes of the examples; `record` notes where each node was made, which takes twice the time."""

    def call(*inputs: Tensor) -> Any:  # whatever fn is, make_fx counts these arguments
        return fn(*inputs)

    tracer = make_fx(
        torch.func.functionalize(call, remove="mutations"),
        decomposition_table=decompositions.table(),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
        record_stack_traces=record,
    )
    # By default make_fx keeps lines in functions called "forward" only.
    keep = patch.object(PythonKeyTracer, "_filter_traceback_frames", lambda self, frames: frames)
    try:
        # Fused attention has no backward that other runtimes know; plain matrix products do.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), keep if record else nullcontext():
            graph = tracer(*examples)
    except (RuntimeError, NotImplementedError, TypeError, GuardOnDataDependentSymNode) as error:
        raise ExportError(_explain(error)) from error
    graph.graph.eliminate_dead_code()  # what nobody reads may depend on the batch as it likes
    return graph


def _explain(error: Exception) -> str:
    """The error's first line, where in the user's code it came up, and what to do about it."""
    where, step = "", error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not _internal(file):
            where = f"{file}:{step.tb_lineno}"
        step = step.tb_next
    text = str(error).strip().split("\n")[0]
    kind = type(error).__name__
    if (
        "DataDependent" in kind
        or "data-dependent" in text
        or "value out of a tracing tensor" in text
        or "unallocated storage" in text
    ):
        text = f"the function looks at a tensor's value ({text}); a graph has no such branches: use torch.where"
    return f"cannot trace: {text}" + (f", at {where}" if where else "")


def _internal(file: str) -> bool:
    return "/torch/" in file or file.startswith("<") or Path(file).parent == Path(__file__).parent


def _source_of(node: Node) -> str:
    """The line of the user's code that made a recorded node: "file:line: text", or its name."""
    lines = (node.meta.get("stack_trace") or "").strip().split("\n")
    best = ""
    for i, line in enumerate(lines):
        if line.strip().startswith("File "):
            file = line.split('"')[1]
            text = lines[i + 1].strip() if i + 1 < len(lines) else ""
            at = f"{file}:{line.split('line ')[1].split(',')[0]}: {text}"
            if not _internal(file):
                best = at
    return best or f"node {node.name}"


def _shape(node: Node) -> Shape | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    if any(not isinstance(n, int) for n in value.shape):
        raise NodeError("a size depends on a tensor's value, at {where}; use torch.where or a fixed size", node.name)
    return tuple(value.shape)


def _unify(graph: GraphModule, other: GraphModule, batched: list[int]) -> None:
    """Make `graph` hold at any batch: numbers that differ from `other`'s become multiples of the batch."""
    nodes, twins = list(graph.graph.nodes), list(other.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    with graph.graph.inserting_after(inputs[-1]):
        batch = graph.graph.call_function(aten.sym_size.int, (inputs[batched[0]], 0))
    batch.meta.update(val=BATCHES[0], shape=None)
    after = [batch]
    symbols: dict[Size, Node] = {Size(1, 0): batch}

    def symbol(size: Size) -> Node:
        if size not in symbols:
            node, value = batch, BATCHES[0]
            for function, number in ((operator.mul, size.scale), (operator.add, size.offset)):
                if number == (1 if function is operator.mul else 0):
                    continue
                with graph.graph.inserting_after(after[-1]):
                    node = graph.graph.call_function(function, (node, number))
                value = function(value, number)
                node.meta.update(val=value, shape=None)
                after.append(node)
            symbols[size] = node
        return symbols[size]

    def size(a: int, b: int, node: Node) -> int | Size:
        if a == b:
            return a
        scale, rest = divmod(b - a, BATCHES[1] - BATCHES[0])
        offset = a - scale * BATCHES[0]
        if rest or scale < 1 or (offset and scale != 1):
            raise NodeError(
                f"dynamic_batch: a number is {a} at batch {BATCHES[0]} and {b} at {BATCHES[1]}, no multiple of the "
                "batch, at {where}; pass dynamic_batch=False or write it per sample",
                node.name,
            )
        return Size(scale, offset)

    same: dict[Node, Node] = {}

    def unify(a: Any, b: Any, node: Node) -> Any:
        if isinstance(a, Node):
            if same.get(a) is not b:
                raise _differs(node)
            return a
        if type(a) is not type(b):
            raise _differs(node)
        if isinstance(a, (list, tuple)):
            if len(a) != len(b):
                raise _differs(node)
            return type(a)(unify(x, y, node) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return {k: unify(v, b[k], node) for k, v in a.items()}
        if isinstance(a, int) and not isinstance(a, bool):
            n = size(a, b, node)
            return symbol(n) if isinstance(n, Size) else n
        if a != b and not (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
            raise _differs(node)
        return a

    if len(nodes) != len(twins):
        raise _differs(next((a for a, b in zip(nodes, twins, strict=False) if a.target != b.target), nodes[-1]))
    for node, twin in zip(nodes, twins, strict=True):
        if node.op != twin.op or (node.op == "call_function" and node.target != twin.target):
            raise _differs(node)
        if node.op == "get_attr" and not _same_constant(getattr(graph, node.target), getattr(other, twin.target)):
            raise _differs(node)
        if node.op in ("call_function", "output"):
            node.args, node.kwargs = (
                unify(node.args, twin.args, node),
                unify(dict(node.kwargs), dict(twin.kwargs), node),
            )
        same[node] = twin
        shapes = _shape(node), _shape(twin)
        both = None not in shapes
        node.meta["shape"] = tuple(size(a, b, node) for a, b in zip(*shapes, strict=True)) if both else None  # type: ignore[arg-type]


def _differs(node: Node) -> NodeError:
    return NodeError(
        f"dynamic_batch: the graph is another at batch {BATCHES[0]} than at {BATCHES[1]}, first at "
        "{where}; pass dynamic_batch=False or write it per sample",
        node.name,
    )


def _same_constant(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _check(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                raise NodeError("an input is changed in place, at {where}; work on a copy", node.name)
            if node.target.namespace != "aten":
                raise NodeError(f"{node.target} is no operation that other runtimes know, at {{where}}", node.name)
        if isinstance(value := node.meta.get("val"), Tensor) and value.dtype not in (*DTYPES, torch.uint8, torch.int8):
            raise NodeError(f"{value.dtype} is not supported, at {{where}}", node.name)


# Simplification

IDENTITIES = (
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default,
)  # fmt: skip
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
FROM_NOTHING = (aten.full.default, aten.arange.start_step, aten.zeros.default, aten.ones.default)
SCALINGS = (
    aten.reshape.default, aten.permute.default, aten.mul.Scalar, aten.mul.Tensor, aten.div.Scalar, aten.div.Tensor,
    aten._to_copy.default,
)  # fmt: skip
RANDOM = (aten.rand.default, aten.randn.default, aten.bernoulli.p, aten.randperm.default)


def _simplify(graph: GraphModule) -> None:
    """Drop what does nothing, compute what is constant, compute what is computed twice once."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and (source := _unchanged(node)) is not None:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # memory layout is the runtime's affair, and clones are gone
    graph.graph.eliminate_dead_code()
    _merge(graph)
    _unmask(graph)
    _share_matrices(graph)
    _fold(graph)
    _straighten(graph)
    _merge(graph)
    _reuse_normalised(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    used = {n.target for n in graph.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in (*graph.named_parameters(), *graph.named_buffers()) if n not in used]:
        delattr(graph, name)
    graph.recompile()


def _unchanged(node: Node) -> Node | None:
    """The node that `node` is equal to, if it does nothing."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    result = node.meta.get("val")
    same_type = isinstance(result, Tensor) and source.meta["val"].dtype == result.dtype
    same = same_type and source.meta["shape"] == node.meta["shape"]
    if node.target in IDENTITIES or (node.target in RESHAPES and same):
        return source
    if node.target is aten._to_copy.default and same and source.meta["val"].device == node.meta["val"].device:
        return source
    if node.target is aten.copy.default and isinstance(value := node.args[1], Node):
        known = value.meta.get("val")
        if (
            known is not None
            and result is not None
            and known.dtype == result.dtype
            and value.meta["shape"] == node.meta["shape"]
        ):
            return value
    return None


def _fold(graph: GraphModule) -> None:
    """Run every operation whose inputs are all constants, and keep its result as a constant."""
    values: dict[Node, Any] = {}
    count = 0
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            values[node] = getattr(graph, node.target)
            continue
        if node.op != "call_function" or node.target in RANDOM or any(n not in values for n in node.all_input_nodes):
            continue
        if node.target is aten.sym_size.int:
            continue
        known = node.meta.get("val")
        if node.target in FROM_NOTHING and isinstance(known, Tensor) and known.numel() > FOLD_LIMIT:
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        values[node] = value
        if not isinstance(value, Tensor) or all(n.op == "output" for n in node.users):
            continue
        name = f"_folded{count}"
        count += 1
        graph.register_buffer(name, value.detach())
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
        constant.meta.update(node.meta)
        values[constant] = value
        node.replace_all_uses_with(constant)
    graph.graph.eliminate_dead_code()


def _straighten(graph: GraphModule) -> None:
    """Write everything that only regroups elements as one reshape, from where the elements come."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _regroups(node):
            continue
        source: Node = node.args[0]
        shape = node.meta["shape"]
        if source.meta["shape"] == shape:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            continue
        if source.target is aten.reshape.default:
            source = source.args[0]  # type: ignore[assignment]
        if source.meta["shape"] == shape:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            continue
        if sum(isinstance(n, Size) for n in shape) < 2 and 0 not in shape:
            node.target = aten.reshape.default
            node.args = (source, [-1 if isinstance(n, Size) else n for n in shape])
            node.kwargs = {}
    graph.graph.eliminate_dead_code()


def _reuse_normalised(graph: GraphModule) -> None:
    """Take what a normalisation returned where its backward pass computes (x - mean) * rstd again."""
    for node in list(graph.graph.nodes):
        if node.target is not aten.mul.Tensor or not all(isinstance(a, Node) for a in node.args):
            continue
        centred, rstd = node.args
        if centred.target is not aten.sub.Tensor or not isinstance(centred.args[1], Node):
            continue
        rows, mean = centred.args
        norm, which = _output_of(mean)
        if which == 1 and _output_of(rstd) == (norm, 2) and norm.args[0] is rows:
            first = next((n for n in norm.users if n.args[1] == 0), None)
            if first is not None and first.meta["shape"] == node.meta["shape"]:
                node.replace_all_uses_with(first)
    graph.graph.eliminate_dead_code()


def _output_of(node: Any) -> tuple[Any, int]:
    """The normalisation that a node is an output of, regrouped or not, and which; (None, -1) for any other."""
    while isinstance(node, Node) and node.target is aten.reshape.default:
        node = node.args[0]
    if isinstance(node, Node) and node.target is operator.getitem:
        source, index = node.args
        if isinstance(source, Node) and source.target is aten.native_group_norm.default:
            return source, index  # type: ignore[return-value]
    return None, -1


def _unmask(graph: GraphModule) -> None:
    """Drop the zeros for rows of nothing but -inf from softmaxes over products, which nothing masked."""
    for node in graph.graph.nodes:
        if node.target is not aten.where.self:
            continue
        nothing, _, soft = node.args
        if not isinstance(soft, Node) or soft.target is not aten._softmax.default:
            continue
        largest = nothing.args[0] if nothing.target is aten.eq.Scalar and nothing.args[1] == -math.inf else None
        if largest is None or largest.target is not aten.amax.default or largest.args[0] is not soft.args[0]:
            continue
        source = soft.args[0]
        while source.target in SCALINGS and not any(isinstance(a, Node) for a in source.args[1:]):
            source = source.args[0]
        if source.target in (aten.bmm.default, aten.mm.default):
            node.replace_all_uses_with(soft)


def _share_matrices(graph: GraphModule) -> None:
    """Write products of a batch with one matrix, repeated for each sample, as one product."""

    def insert(target: Any, args: tuple[Any, ...], shape: Shape) -> Node:
        new = graph.graph.call_function(target, args)
        new.meta.update(val=target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"])), shape=shape)
        return new

    for node in list(graph.graph.nodes):
        if node.target is not aten.bmm.default or node.args[1].target is not aten.expand.default:
            continue
        rows, matrix = node.args[0], node.args[1].args[0]
        batch, count, outer = node.meta["shape"]
        inner = rows.meta["shape"][2]
        if matrix.meta["shape"] not in ((1, inner, outer), (inner, outer)) or isinstance(count, Size):
            continue
        if isinstance(batch, Size) and batch.offset:
            continue
        flat = Size(batch.scale * count, 0) if isinstance(batch, Size) else batch * count
        sizes = [-1 if isinstance(batch, Size) else batch, count, outer]
        with graph.graph.inserting_before(node):
            many = insert(aten.reshape.default, (rows, [-1, inner]), (flat, inner))
            one = insert(aten.reshape.default, (matrix, [inner, outer]), (inner, outer))
            product = insert(aten.mm.default, (many, one), (flat, outer))
            node.replace_all_uses_with(insert(aten.reshape.default, (product, sizes), node.meta["shape"]))
    graph.graph.eliminate_dead_code()


def _regroups(node: Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source.meta.get("shape") is None or node.meta.get("shape") is None:
        return False
    if node.target is aten.select.int:
        return bool(source.meta["shape"][node.args[1]] == 1)
    return node.target in (
        aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    )  # fmt: skip


def _merge(graph: GraphModule) -> None:
    """Give equal operations on equal inputs one node."""
    seen: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            key: Any = ("get_attr", id(getattr(graph, node.target)))
        elif node.op == "call_function" and node.target not in RANDOM:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        else:
            continue
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.graph.erase_node(node)
        else:
            seen[key] = node


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    # 1, 1.0 and True are equal but not the same argument.
    return value if isinstance(value, Node) else (type(value), str(value))
