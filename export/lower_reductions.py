"""Reductions, scans and orders as ONNX operators."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Node

from counterlens.export.builder import Builder, Value, axes_of, extent, fixed, lowers, meta

aten = torch.ops.aten


# Reductions


def _reduction(kind: str, *operators: Any) -> None:
    @lowers(*operators)
    def lower(g: Builder, node: Node, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        x = g.cast(x, meta(node.args[0]).dtype, meta(node).dtype)
        axes = axes_of(node, dim)
        return g.op(kind, x, g.constant(axes), keepdims=int(keepdim)) if axes else x


@lowers(aten.sum.dim_IntList, aten.sum.default)
def sum_(g: Builder, node: Node, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    source, out = meta(node.args[0]).dtype, meta(node).dtype
    x, axes = g.cast(x, source, out), axes_of(node, dim)
    if not axes:
        return x
    if source != torch.int64 or out != torch.int64:
        return g.op("ReduceSum", x, g.constant(axes), keepdims=int(keepdim))
    for axis in sorted(axes, reverse=True):  # ONNX Runtime's ReduceSum goes through float64, its CumSum does not
        x = g.op("Gather", g.op("CumSum", x, g.constant(axis)), g.constant([-1] if keepdim else -1), axis=axis)
    return x


_reduction("ReduceMean", aten.mean.dim, aten.mean.default)
_reduction("ReduceMax", aten.amax.default)
_reduction("ReduceMin", aten.amin.default)


@lowers(aten.prod.dim_int)
def prod(g: Builder, node: Node, x: Value, dim: int, keepdim: bool = False, dtype: Any = None) -> Value:
    source, out = meta(node.args[0]).dtype, meta(node).dtype
    x, (axis,) = g.cast(x, source, out), axes_of(node, dim)
    if out != torch.int64 or source == torch.bool:
        return g.op("ReduceProd", x, g.constant([axis]), keepdims=int(keepdim))
    (size,) = fixed(node.args[0], axis)
    if not 0 < size <= 64:
        raise NotImplementedError("runtimes round long products of whole numbers")
    factors = [g.op("Gather", x, g.constant([i] if keepdim else i), axis=axis) for i in range(size)]
    return functools.reduce(lambda a, b: g.op("Mul", a, b), factors)


@lowers(aten.any.dim, aten.any.dims, aten.any.default)
def any_(g: Builder, node: Node, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    x = g.cast(g.cast(x, meta(node.args[0]).dtype, torch.bool), torch.bool, torch.int32)
    axes = axes_of(node, dim)
    out = g.op("ReduceMax", x, g.constant(axes), keepdims=int(keepdim)) if axes else x
    return g.cast(out, torch.int32, torch.bool)


def _arg(kind: str, operator: Any) -> None:
    @lowers(operator)
    def lower(g: Builder, node: Node, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        if dim is None:
            x, dim = g.op("Reshape", x, g.constant([-1])), 0
        return g.op(kind, x, axis=dim, keepdims=int(keepdim))


_arg("ArgMax", aten.argmax.default)
_arg("ArgMin", aten.argmin.default)


def _extreme(reduce: str, arg: str, operator: Any) -> None:
    @lowers(operator)
    def lower(g: Builder, node: Node, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        values = g.op(reduce, x, g.constant(axes_of(node, dim)), keepdims=int(keepdim))
        return values, g.op(arg, x, axis=dim, keepdims=int(keepdim))


_extreme("ReduceMax", "ArgMax", aten.max.dim)
_extreme("ReduceMin", "ArgMin", aten.min.dim)


@lowers(aten.cumsum.default)
def cumsum(g: Builder, node: Node, x: Value, dim: int, dtype: Any = None) -> Value:
    return g.op("CumSum", g.cast(x, meta(node.args[0]).dtype, meta(node).dtype), g.constant(dim))


@lowers(aten.topk.default)
def topk(g: Builder, node: Node, x: Value, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return g.op("TopK", x, g.shape([k]), axis=dim, largest=int(largest), sorted=int(sorted), outputs=2)


@lowers(aten.sort.default, aten.sort.stable)
def sort(g: Builder, node: Node, x: Value, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    return g.op("TopK", x, extent(g, node.args[0], x, dim), axis=dim, largest=int(descending), sorted=1, outputs=2)


def _softmax(kind: str, operator: Any) -> None:
    @lowers(operator)
    def lower(g: Builder, node: Node, x: Value, dim: int, half_to_float: bool) -> Value:
        source = meta(node.args[0]).dtype
        wide = source if source == torch.float64 else torch.float32
        return g.cast(g.op(kind, g.cast(x, source, wide), axis=dim), wide, meta(node).dtype)


_softmax("Softmax", aten._softmax.default)
_softmax("LogSoftmax", aten._log_softmax.default)
