"""Operations that move, cut and make tensors as ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from counterlens.export.builder import FAR, Builder, Value, axes_of, lowers, meta, scalar

aten = torch.ops.aten


# Shapes


@lowers(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def reshape(g: Builder, node: Node, x: Value, size: Sequence[Any]) -> Value:
    unknown = [i for i, n in enumerate(size) if isinstance(n, Value)]
    if len(unknown) == 1 and -1 not in size:
        size = [-1 if i == unknown[0] else n for i, n in enumerate(size)]
    return g.op("Reshape", x, g.shape(size), allowzero=int(0 in size and -1 not in size))


@lowers(aten.unsqueeze.default)
def unsqueeze(g: Builder, node: Node, x: Value, dim: int) -> Value:
    return g.op("Unsqueeze", x, g.constant([dim % meta(node).ndim]))


@lowers(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(g: Builder, node: Node, x: Value, dims: Any = None) -> Value:
    shape = node.args[0].meta["shape"]  # type: ignore[union-attr]
    axes = [d for d in axes_of(node, dims) if shape[d] == 1]
    return g.op("Squeeze", x, g.constant(axes)) if axes else x


@lowers(aten.permute.default)
def permute(g: Builder, node: Node, x: Value, dims: Sequence[int]) -> Value:
    return g.op("Transpose", x, perm=[d % len(dims) for d in dims])


@lowers(aten.transpose.int)
def transpose(g: Builder, node: Node, x: Value, a: int, b: int) -> Value:
    order = list(range(meta(node).ndim))
    order[a], order[b] = order[b], order[a]
    return g.op("Transpose", x, perm=order)


@lowers(aten.t.default)
def t(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Transpose", x, perm=[1, 0]) if meta(node).ndim == 2 else x


@lowers(aten.expand.default)
def expand(g: Builder, node: Node, x: Value, size: Sequence[Any], implicit: bool = False) -> Value:
    return g.op("Expand", x, g.shape([1 if n == -1 else n for n in size]))


@lowers(aten.repeat.default)
def repeat(g: Builder, node: Node, x: Value, repeats: Sequence[Any]) -> Value:
    extra = len(repeats) - meta(node.args[0]).ndim
    if extra:
        x = g.op("Unsqueeze", x, g.constant(list(range(extra))))
    return g.op("Tile", x, g.shape(repeats))


@lowers(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def identity(g: Builder, node: Node, x: Value, **_: Any) -> Value:
    return x


@lowers(aten._to_copy.default)
def to_copy(g: Builder, node: Node, x: Value, **_: Any) -> Value:
    return g.cast(x, meta(node.args[0]).dtype, meta(node).dtype)


@lowers(aten.copy.default)
def copy(g: Builder, node: Node, x: Value, source: Any, non_blocking: bool = False) -> Value:
    value = g.cast(source, meta(node.args[1]).dtype, meta(node).dtype)
    return g.op("Expand", value, g.op("Shape", x))


@lowers(aten.cat.default)
def cat(g: Builder, node: Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    dtype, rank = meta(node).dtype, meta(node).ndim
    kept = [
        g.cast(v, meta(n).dtype, dtype)
        for v, n in zip(tensors, node.args[0], strict=True)  # type: ignore[arg-type]
        if meta(n).ndim == rank
    ]
    return g.op("Concat", *kept, axis=dim % rank) if len(kept) > 1 else kept[0]


@lowers(aten.split_with_sizes.default)
def split_with_sizes(g: Builder, node: Node, x: Value, parts: Sequence[Any], dim: int = 0) -> Any:
    return (x,) if len(parts) == 1 else g.op("Split", x, g.shape(parts), axis=dim, outputs=len(parts))


@lowers(aten.slice.Tensor)
def slice_(g: Builder, node: Node, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    limits = [g.shape([v]) for v in (0 if start is None else start, FAR if end is None else end)]
    return g.op("Slice", x, *limits, g.constant([dim % meta(node).ndim]), g.constant([step]))


@lowers(aten.select.int)
def select(g: Builder, node: Node, x: Value, dim: int, index: Any) -> Value:
    position = index if isinstance(index, Value) else g.constant(index)
    return g.op("Gather", x, position, axis=dim % meta(node.args[0]).ndim)


@lowers(aten.flip.default)
def flip(g: Builder, node: Node, x: Value, dims: Sequence[int]) -> Value:
    axes = [d % meta(node).ndim for d in dims]
    start, end, step = ([v] * len(axes) for v in (-1, -FAR, -1))
    return g.op("Slice", x, g.constant(start), g.constant(end), g.constant(axes), g.constant(step)) if axes else x


@lowers(aten.constant_pad_nd.default)
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


# Making tensors


@lowers(aten.full.default)
def full(g: Builder, node: Node, size: Sequence[Any], value: float, **_: Any) -> Value:
    filled = scalar(g, value, meta(node).dtype)
    return g.op("Expand", filled, g.shape(size)) if size else filled


@lowers(aten.full_like.default)
def full_like(g: Builder, node: Node, x: Value, value: float, **_: Any) -> Value:
    return g.op("Expand", scalar(g, value, meta(node).dtype), g.op("Shape", x))


@lowers(aten.scalar_tensor.default)
def scalar_tensor(g: Builder, node: Node, value: Any, **_: Any) -> Value:
    return scalar(g, value, meta(node).dtype)


@lowers(aten.arange.start_step)
def arange(g: Builder, node: Node, start: Any, end: Any, step: Any = 1, **_: Any) -> Value:
    dtype = meta(node).dtype
    return g.op("Range", *(scalar(g, v, dtype) for v in (start, end, step)))
