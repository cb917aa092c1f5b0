"""What every lowering needs: the table, the builder, and what is known of a node at every batch."""

from __future__ import annotations

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


def lowers(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function as the lowering of these operators: (builder, node, *values) to a value of the file."""

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


def operands(g: Builder, node: Node, dtype: torch.dtype, values: Sequence[Any]) -> list[Value]:
    """Arguments of an elementwise operation, all in `dtype`."""
    out = []
    for argument, value in zip(node.args, values, strict=False):
        if isinstance(argument, Node) and isinstance(argument.meta["val"], Tensor):
            out.append(g.cast(value, meta(argument).dtype, dtype))
        else:
            out.append(scalar(g, value, dtype))
    return out


def axes_of(node: Node, dim: Any) -> list[int]:
    """The axes, from 0, that an operator's `dim` means for its first argument: all of them where it names none."""
    rank = meta(node.args[0]).ndim
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    return [d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim)]
