"""Indexing as ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from counterlens.export.builder import Builder, Value, extent, lowers, meta, scalar

aten = torch.ops.aten


# Indexing


@lowers(aten.index.Tensor)
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


@lowers(aten.index_put.default)
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


@lowers(aten.embedding.default)
def embedding(g: Builder, node: Node, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    return g.op("Gather", weight, indices, axis=0)


@lowers(aten.index_select.default)
def index_select(g: Builder, node: Node, x: Value, dim: int, indices: Value) -> Value:
    return g.op("Gather", x, indices, axis=dim)


@lowers(aten.gather.default)
def gather(g: Builder, node: Node, x: Value, dim: int, indices: Value, sparse_grad: bool = False) -> Value:
    return g.op("GatherElements", x, indices, axis=dim)


@lowers(aten.scatter.src, aten.scatter_add.default)
def scatter(g: Builder, node: Node, x: Value, dim: int, indices: Value, source: Value) -> Value:
    reduction = "add" if node.target is aten.scatter_add.default else "none"
    return g.op("ScatterElements", x, indices, source, axis=dim, reduction=reduction)


@lowers(aten.scatter.value)
def scatter_value(g: Builder, node: Node, x: Value, dim: int, indices: Value, value: float) -> Value:
    source = g.op("Expand", scalar(g, value, meta(node).dtype), g.op("Shape", indices))
    return g.op("ScatterElements", x, indices, source, axis=dim, reduction="none")


@lowers(aten.scatter_reduce.two)
def scatter_reduce(
    g: Builder, node: Node, x: Value, dim: int, indices: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    kinds = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
    if reduce not in kinds or not include_self:
        raise NotImplementedError(f"reduce={reduce!r}, include_self={include_self}")
    return g.op("ScatterElements", x, indices, source, axis=dim, reduction=kinds[reduce])
