"""Views and indexing, and their backward operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from counterlens.export.decomposing import decomposes

aten = torch.ops.aten
ONE_HOT = 1 << 20  # entries of a table of one-hot rows above which runtimes scatter instead


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


def _placed(x: Tensor, source: Tensor, dim: int, places: Sequence[int]) -> Tensor:
    """x with the entries of source at different places along dim."""
    n = x.shape[dim]
    if list(places) == list(range(places[0], places[0] + len(places))) if places else True:
        start = places[0] if places else 0
        parts = [x.narrow(dim, 0, start), source, x.narrow(dim, start + len(places), n - start - len(places))]
        return torch.cat([p for p in parts if p.shape[dim]], dim) if places else x
    origin, hit = [0] * n, [False] * n
    for k, place in enumerate(places):
        origin[place], hit[place] = k, True
    with _disable_current_modes():
        picks, where = torch.tensor(origin), torch.tensor(hit).reshape(-1, *([1] * (x.ndim - 1 - dim)))
    return torch.where(where.to(x.device), source.index_select(dim, picks.to(x.device)), x)


@decomposes(aten.slice_scatter.default)
def slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    dim = dim % x.ndim
    n = x.shape[dim]
    start, end = (min(max(v + n if v < 0 else v, 0), n) for v in (start or 0, n if end is None else end))
    if step == 1:  # sizes may follow the batch
        return torch.cat([x.narrow(dim, 0, start), source, x.narrow(dim, end, n - end)], dim)
    return _placed(x, source, dim, range(start, end, step))


@decomposes(aten.select_scatter.default)
def select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    dim = dim % x.ndim
    index = index % x.shape[dim]
    return slice_scatter(x, source.unsqueeze(dim).expand(*x.shape[:dim], 1, *x.shape[dim + 1 :]), dim, index, index + 1)


def _diagonal(x: Tensor, offset: int, first: int, second: int) -> tuple[Tensor, list[int], list[int]]:
    """x [..., rows * columns], the order of its axes, and the places of the diagonal."""
    first, second = first % x.ndim, second % x.ndim
    order = [i for i in range(x.ndim) if i not in (first, second)] + [first, second]
    rows, columns = x.shape[first], x.shape[second]
    places = [i * columns + i + offset for i in range(rows) if 0 <= i + offset < columns]
    return x.permute(order).flatten(-2), order, places


@decomposes(aten.diagonal.default)
def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    flat, _, places = _diagonal(x, offset, dim1, dim2)
    with _disable_current_modes():
        picks = torch.tensor(places, dtype=torch.int64)
    return flat.index_select(-1, picks.to(x.device))


@decomposes(aten.diagonal_scatter.default)
def diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    flat, order, places = _diagonal(x, offset, dim1, dim2)
    out = _placed(flat, source, flat.ndim - 1, places).reshape([x.shape[i] for i in order])
    return out.permute([order.index(i) for i in range(x.ndim)])


@decomposes(aten.diagonal_backward.default)
def diagonal_backward(grad: Tensor, size: Sequence[int], offset: int, dim1: int, dim2: int) -> Tensor:
    zeros = torch.full(tuple(size), 0, dtype=grad.dtype, device=grad.device)
    return diagonal_scatter(zeros, grad, offset, dim1, dim2)


# Index tensors: runtimes take them on the first axes only


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _leading(x: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor], list[int]]:
    """The indexed axes, their indices, and the order of axes that brings them to the front."""
    used = [i for i, index in enumerate(indices) if index is not None]
    return used, [indices[i] for i in used], used + [i for i in range(x.ndim) if i not in used]  # type: ignore[misc]


@decomposes(aten.index.Tensor)
def index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    used, given, order = _leading(x, indices)
    if any(map(_is_mask, given)) or len(used) == 1 or used == list(range(len(used))):
        return NotImplemented if len(used) else x
    out = aten.index.Tensor(x.permute(order), given)  # [index axes, the others]
    if used != list(range(used[0], used[-1] + 1)):
        return out  # indices apart from each other put their axes in front in PyTorch, too
    rank = out.ndim - (x.ndim - len(used))
    before = list(range(rank, rank + used[0]))
    return out.permute([*before, *range(rank), *range(rank + used[0], out.ndim)])


@decomposes(aten.index_put.default)
def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    used, given, order = _leading(x, indices)
    if any(map(_is_mask, given)):
        if len(used) != 1 or used != [0] or values.numel() != 1:
            return NotImplemented
        mask = given[0].bool().reshape(*given[0].shape, *([1] * (x.ndim - given[0].ndim)))
        value = values.reshape([1] * x.ndim).to(x.dtype)
        return torch.where(mask, x + value if accumulate else value, x)
    if accumulate and len(used) == 1 and given[0].ndim == 1 and x.shape[used[0]] * given[0].shape[0] <= ONE_HOT:
        return _add_rows(x, used[0], given[0], values)
    if used == list(range(len(used))):
        return NotImplemented
    rank = max(i.ndim for i in given)
    adjacent = used == list(range(used[0], used[-1] + 1))
    if adjacent:
        # PyTorch has the index axes where the first indexed axis was; bring them to the front.
        whole = [*(x.shape[i] for i in range(used[0])), *torch.broadcast_shapes(*(i.shape for i in given))]
        whole += [x.shape[i] for i in range(used[-1] + 1, x.ndim)]
        values = values.expand(whole)
        index_axes = list(range(used[0], used[0] + rank))
        values = values.permute(index_axes + [i for i in range(values.ndim) if i not in index_axes])
    out = aten.index_put.default(x.permute(order), given, values, accumulate)
    return out.permute([order.index(i) for i in range(x.ndim)])


@decomposes(aten._unsafe_index.Tensor)
def unsafe_index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    return aten.index.Tensor(x, indices)


@decomposes(aten._unsafe_index_put.default)
def unsafe_index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    return aten.index_put.default(x, indices, values, accumulate)


def _add_rows(x: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """x plus rows of values at the places that index [K] names along dim: a product with its one-hot rows."""
    n = x.shape[dim]
    places = torch.arange(n, device=x.device)
    hot = torch.where(index < 0, index + n, index)[:, None] == places  # [K, n]
    rows = values.expand(*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :]).to(x.dtype)
    if not x.dtype.is_floating_point:
        return NotImplemented
    return x + (rows.transpose(dim, -1) @ hot.to(x.dtype)).transpose(dim, -1)


@decomposes(aten.scatter_add.default)
def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """With the one-hot rows of the index: what gather's backward needs, and no scattering with a sum."""
    dim = dim % x.ndim
    if any(x.shape[i] != index.shape[i] for i in range(x.ndim) if i != dim):
        return NotImplemented
    if x.shape[dim] * index.shape[dim] > ONE_HOT:
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


def _places(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> tuple[list[int], int, list[int]] | None:
    """Where a strided view's elements are: x's memory order, its leading axes that the view keeps, places in the rest.

    None where x does not fill its memory. The kept axes hold the batch, so that the places are the same at any batch.
    """
    order = _memory_order(x.shape, x.stride())
    if order is None or x.storage_offset():
        return None
    kept = 0
    for axis in order[:-1]:
        if kept >= len(size) or size[kept] != x.shape[axis] or stride[kept] != x.stride(axis):
            break
        kept += 1
    inner = math.prod(x.shape[i] for i in order[kept:])
    places = [offset or 0]
    for n, step in zip(size[kept:], stride[kept:], strict=True):
        places = [place + i * step for place in places for i in range(n)]
    return (order, kept, places) if not places or max(places) < inner else None


@decomposes(aten.as_strided.default)
def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Tensor:
    if orders := _same_elements(x, size, stride, offset):
        return _in_order(x, orders[0], size, orders[1])
    if (found := _places(x, size, stride, offset)) is None:
        return NotImplemented
    order, kept, places = found
    with _disable_current_modes():
        picks = torch.tensor(places, dtype=torch.int64)
    return x.permute(order).flatten(kept).index_select(kept, picks.to(x.device)).reshape(size)


@decomposes(aten.as_strided_scatter.default)
def as_strided_scatter(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    if orders := _same_elements(x, size, stride, offset):
        return _in_order(source, orders[1], x.shape, orders[0])
    found = _places(x, size, stride, offset)
    if found is None or len(set(found[2])) != len(found[2]):
        return NotImplemented
    order, kept, places = found
    laid = _placed(x.permute(order).flatten(kept), source.reshape(*size[:kept], -1), kept, places)
    return laid.reshape([x.shape[i] for i in order]).permute([order.index(i) for i in range(x.ndim)])


@decomposes(aten.roll.default)
def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        return roll(x.flatten(), shifts, (0,)).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % x.shape[dim]
        if cut:
            x = torch.cat([x.narrow(dim, cut, x.shape[dim] - cut), x.narrow(dim, 0, cut)], dim)
    return x
