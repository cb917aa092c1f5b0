"""Views and indexing, and their backward operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .decomposing import decomposes

aten = torch.ops.aten


# Indexing


def _pad_along(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    dim = dim % x.ndim
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [before, after]) if before or after else x


@decomposes(aten.select_backward.default)
def select_backward(grad: Tensor, size: Sequence[int], dim: int, index: int) -> Tensor:
    dim, index = dim % len(size), index % size[dim]
    return _pad_along(grad.unsqueeze(dim), dim, index, size[dim] - 1 - index)


@decomposes(aten.slice_backward.default)
def slice_backward(grad: Tensor, size: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    dim = dim % len(size)
    n = size[dim]
    start = min(max(start + n if start < 0 else start, 0), n)
    if step > 1:
        kept = grad.shape[dim]
        wide = _pad_along(grad.unsqueeze(dim + 1), dim + 1, 0, step - 1).flatten(dim, dim + 1)
        grad = wide.narrow(dim, 0, (kept - 1) * step + 1)
    return _pad_along(grad, dim, start, n - start - grad.shape[dim])


@decomposes(aten.slice_scatter.default)
def slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    n = x.shape[dim]
    start, end = (min(max(v + n if v < 0 else v, 0), n) for v in (start or 0, n if end is None else end))
    if step != 1:
        return NotImplemented
    return torch.cat([x.narrow(dim, 0, start), source, x.narrow(dim, end, n - end)], dim)


@decomposes(aten.scatter_add.default)
def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """With the one-hot rows of the index: what gather's backward needs, and no scattering with a sum."""
    dim = dim % x.ndim
    if any(x.shape[i] != index.shape[i] for i in range(x.ndim) if i != dim):
        return NotImplemented
    source = source[tuple(slice(0, n) for n in index.shape)]
    places = torch.arange(x.shape[dim], device=x.device).reshape(-1, *([1] * (x.ndim - 1 - dim)))
    hot = index.unsqueeze(dim + 1) == places  # [..., k, n, ...]
    return x + torch.where(hot, source.unsqueeze(dim + 1), 0).sum(dim).to(x.dtype)


@decomposes(aten.embedding_dense_backward.default)
def embedding_dense_backward(
    grad: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    if scale_grad_by_freq:
        return NotImplemented
    hot = indices.reshape(-1, 1) == torch.arange(rows, device=grad.device)  # [K, rows]
    if padding_idx >= 0:
        hot = hot & (indices.reshape(-1, 1) != padding_idx)
    return hot.to(grad.dtype).T @ grad.reshape(-1, grad.shape[-1])


def _memory_order(sizes: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """The axes from the largest stride to the smallest, if they fill memory densely; None otherwise."""
    # Where an axis of one element stands does not matter; in front it is in nobody's way.
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i] != 1, -strides[i]))
    step = 1
    for i in reversed(order):
        if sizes[i] != 1 and strides[i] != step:
            return None
        step *= sizes[i]
    return order


def _same_elements(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> tuple[list[int], list[int]] | None:
    """Memory orders of x and of a strided view that holds each of its elements once; None for any other view."""
    mine, wanted = _memory_order(x.shape, x.stride()), _memory_order(size, stride)
    whole = math.prod(size) == x.numel() and (offset or 0) == x.storage_offset()
    return (mine, wanted) if whole and mine is not None and wanted is not None else None


def _in_order(x: Tensor, order: list[int], sizes: Sequence[int], target: list[int]) -> Tensor:
    """Read x along `order` and lay its elements out as `sizes`, whose axes are in memory as `target` says."""
    laid = x.permute(order).reshape([sizes[i] for i in target])
    return laid.permute([target.index(i) for i in range(len(sizes))])


@decomposes(aten.as_strided.default)
def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Tensor:
    orders = _same_elements(x, size, stride, offset)
    return _in_order(x, orders[0], size, orders[1]) if orders else NotImplemented


@decomposes(aten.as_strided_scatter.default)
def as_strided_scatter(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    orders = _same_elements(x, size, stride, offset)
    return _in_order(source, orders[1], x.shape, orders[0]) if orders else NotImplemented


@decomposes(aten.roll.default)
def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        return roll(x.flatten(), shifts, (0,)).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % x.shape[dim]
        if cut:
            x = torch.cat([x.narrow(dim, cut, x.shape[dim] - cut), x.narrow(dim, 0, cut)], dim)
    return x
