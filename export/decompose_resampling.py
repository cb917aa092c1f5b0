"""Resampling and pooling in one to three dimensions, and their backward operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import _disable_current_modes

from counterlens.export.decomposing import OWN, decomposes, derived

aten = torch.ops.aten


# Resampling: along each axis a matrix, taken from PyTorch's own operator on the unit vectors


def _axis_matrix(size: int, operator: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The matrix [out, size] of a linear operator along the height, which leaves the width alone."""
    with _disable_current_modes():
        # Its image of the identity. (PyTorch 2.13's antialiased kernels are wrong for images of width 1.)
        return operator(torch.eye(size, dtype=torch.float64)[None, None])[0, 0].to(like.dtype).contiguous()


def separable(
    x: Tensor,  # [N, C, H, W]
    rows: Tensor,  # [h, H]
    columns: Tensor,  # [w, W]
) -> Tensor:
    """Apply one matrix along the height and one along the width: [N, C, h, w]."""
    rows, columns = rows.to(x.device), columns.to(x.device)
    return rows @ (x @ columns.T)


Operators = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _apply(x: Tensor, operators: Operators) -> Tensor:
    rows, columns = (_axis_matrix(n, f, x) for n, f in zip(x.shape[2:], operators, strict=True))
    return separable(x, rows, columns)


def _pull_back(grad: Tensor, size: Sequence[int], operators: Operators) -> Tensor:
    rows, columns = (_axis_matrix(n, f, grad) for n, f in zip(size[2:], operators, strict=True))
    return separable(grad, rows.T, columns.T)


def _resizers(operator: Any, size: Sequence[int], *fixed: Any, scales: Sequence[float | None]) -> Operators:
    """`operator` along the height and along the width, with the other axis left alone."""

    def along(out: int, scale: float | None) -> Callable[[Tensor], Tensor]:
        return lambda x: operator(x, [out, x.shape[-1]], *fixed, scale, None)

    return along(size[0], scales[0]), along(size[1], scales[1])


def _register_resize(forward: Any, backward: Any) -> None:
    @decomposes(forward)
    def resize(
        x: Tensor,
        size: Sequence[int],
        align: bool,
        scale_h: float | None = None,
        scale_w: float | None = None,
    ) -> Tensor:
        return _apply(x, _resizers(forward, size, align, scales=(scale_h, scale_w)))

    @decomposes(backward)
    def resize_backward(
        grad: Tensor,
        size: Sequence[int],
        input_size: Sequence[int],
        align: bool,
        scale_h: float | None = None,
        scale_w: float | None = None,
    ) -> Tensor:
        return _pull_back(grad, input_size, _resizers(forward, size, align, scales=(scale_h, scale_w)))


_register_resize(aten.upsample_bilinear2d.default, aten.upsample_bilinear2d_backward.default)
_register_resize(aten.upsample_bicubic2d.default, aten.upsample_bicubic2d_backward.default)
_register_resize(aten._upsample_bilinear2d_aa.default, aten._upsample_bilinear2d_aa_backward.default)
_register_resize(aten._upsample_bicubic2d_aa.default, aten._upsample_bicubic2d_aa_backward.default)


def repeats(size: Sequence[int], out: Sequence[int]) -> tuple[int, int] | None:
    """By what whole numbers nearest resizing from `size` to `out` repeats pixels; None when it does otherwise."""
    (h, w), (oh, ow) = size[-2:], out[-2:]
    return (oh // h, ow // w) if oh % h == 0 and ow % w == 0 else None


def _nearest(exact: bool, dims: int) -> tuple[Any, Any]:
    name = f"{'_upsample_nearest_exact' if exact else 'upsample_nearest'}{dims}d"
    return getattr(aten, name).default, getattr(aten, f"{name}_backward").default


def _register_nearest(exact: bool, dims: int) -> None:
    forward, backward = _nearest(exact, dims)
    along = _nearest(exact, 1)[0]

    @decomposes(forward)
    def resize(x: Tensor, size: Sequence[int], *scales: float | None) -> Tensor:
        """Pixels are picked, not multiplied: what is not finite stays in its place."""
        if dims == 2 and not exact and repeats(x.shape, size):
            return NotImplemented  # it stays what it is
        for axis, (out, scale) in enumerate(zip(size, scales or [None] * dims, strict=True), start=2):
            if out != x.shape[axis] or scale not in (None, 1.0):
                with _disable_current_modes():
                    places = along(torch.arange(x.shape[axis], dtype=torch.float64)[None, None], [out], scale)
                x = x.index_select(axis, places[0, 0].long().to(x.device))
        return x

    @decomposes(backward)
    def resize_backward(grad: Tensor, size: Sequence[int], input_size: Sequence[int], *scales: float | None) -> Tensor:
        if dims == 2 and not exact and (factors := repeats(input_size, size)):
            return aten.avg_pool2d(grad, factors, factors) * float(factors[0] * factors[1])
        fitted = zip(size, scales or [None] * dims, strict=True)
        return _pull_along(grad, input_size, [_resizer(along, out, scale) for out, scale in fitted])


def _resizer(operator: Any, out: int, *rest: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: operator(x, [out], *rest)


def _rows(size: int, operator: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The matrix [out, size] of a linear operator on signals [N, C, size]."""
    with _disable_current_modes():
        matrix = operator(torch.eye(size, dtype=torch.float64)[None])[0].T
    return matrix.to(like.dtype).contiguous().to(like.device)


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """The matrix [out, size] times x along an axis."""
    return (x.transpose(axis, -1) @ matrix.T).transpose(axis, -1)


def _apply_along(x: Tensor, operators: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    for axis, operator in enumerate(operators, start=2):
        x = _along(x, axis, _rows(x.shape[axis], operator, x))
    return x


def _pull_along(grad: Tensor, size: Sequence[int], operators: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    for axis, operator in enumerate(operators, start=len(size) - len(operators)):
        grad = _along(grad, axis, _rows(size[axis], operator, grad).T)
    return grad


for _dims in (1, 2, 3):
    for _exact in (False, True):
        _register_nearest(_exact, _dims)


def _register_linear(forward: Any, backward: Any) -> None:
    along = aten.upsample_linear1d.default

    @decomposes(forward)
    def resize(x: Tensor, size: Sequence[int], align: bool, *scales: float | None) -> Tensor:
        fitted = zip(size, scales or [None] * len(size), strict=True)
        return _apply_along(x, [_resizer(along, out, align, scale) for out, scale in fitted])

    @decomposes(backward)
    def resize_backward(
        grad: Tensor, size: Sequence[int], input_size: Sequence[int], align: bool, *scales: float | None
    ) -> Tensor:
        fitted = zip(size, scales or [None] * len(size), strict=True)
        return _pull_along(grad, input_size, [_resizer(along, out, align, scale) for out, scale in fitted])


_register_linear(aten.upsample_linear1d.default, aten.upsample_linear1d_backward.default)
_register_linear(aten.upsample_trilinear3d.default, aten.upsample_trilinear3d_backward.default)


# Padding


def _register_padding(kind: str, dims: int) -> None:
    def padder(pad: Sequence[int]) -> Callable[[Tensor], Tensor]:
        one = getattr(aten, f"{kind}_pad1d").default
        return lambda x: one(x, list(pad))

    @decomposes(getattr(aten, f"{kind}_pad{dims}d").default)
    def padded(x: Tensor, pad: Sequence[int]) -> Tensor:
        for i in range(dims):
            axis, ends = x.ndim - 1 - i, pad[2 * i : 2 * i + 2]
            if any(ends):
                with _disable_current_modes():
                    places = padder(ends)(torch.arange(x.shape[axis], dtype=torch.float64)[None])[0].long()
                x = x.index_select(axis, places.to(x.device))
        return x

    @decomposes(getattr(aten, f"{kind}_pad{dims}d_backward").default)
    def padded_backward(grad: Tensor, x: Tensor, pad: Sequence[int]) -> Tensor:
        for i in range(dims):
            axis, ends = x.ndim - 1 - i, pad[2 * i : 2 * i + 2]
            if any(ends):
                grad = _along(grad, axis, _rows(x.shape[axis], padder(ends), grad).T)
        return grad


for _dims in (1, 2, 3):
    for _kind in ("reflection", "replication"):
        _register_padding(_kind, _dims)


# Pooling


def _several(values: Sequence[int] | int, dims: int) -> list[int]:
    """One number for each axis."""
    held = [values] if isinstance(values, int) else list(values)
    return held * dims if len(held) == 1 else held


def windows(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows PyTorch lays along an axis: none begins behind the image and its padding."""
    over = n + 2 * padding - dilation * (kernel - 1) - 1
    out = (-(-over // stride) if ceil_mode else over // stride) + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= n + padding else out


def _pool_matrix(n: int, kernel: int, stride: int, padding: int, ceil_mode: bool, divide: str, like: Tensor) -> Tensor:
    """[out, n]: each window's share of the pixels. `divide`: by the "padded" or the "real" part of it, or by "nothing".

    The padded part ends where the padding does: what ceil_mode adds behind it counts for nothing.
    """
    rows = torch.zeros(windows(n, kernel, stride, padding, 1, ceil_mode), n, dtype=torch.float64)
    for i, row in enumerate(rows):
        start, end = i * stride - padding, min(i * stride - padding + kernel, n + padding)
        real = slice(max(start, 0), min(end, n))
        row[real] = {"padded": 1 / (end - start), "real": 1 / (real.stop - real.start), "nothing": 1.0}[divide]
    return rows.to(like.dtype)


def _pool_matrices(
    like: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool, count_include_pad: bool, divisor: int | None, dims: int,
) -> list[Tensor]:  # fmt: skip
    divide = "nothing" if divisor is not None else "padded" if count_include_pad else "real"
    shapes = (_several(kernel, dims), _several(stride or kernel, dims), _several(padding, dims))
    with _disable_current_modes():
        return [
            _pool_matrix(n, k, s, p, ceil_mode, divide, like).to(like.device)
            for n, k, s, p in zip(size[-dims:], *shapes, strict=True)
        ]


def _register_avg_pool(dims: int) -> None:
    @decomposes(getattr(aten, f"avg_pool{dims}d").default)
    def pool(
        x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Tensor:  # fmt: skip
        if not ceil_mode and divisor_override is None:
            return NotImplemented  # it stays what it is
        matrices = _pool_matrices(
            x, x.shape, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, dims
        )
        for axis, matrix in enumerate(matrices, start=x.ndim - dims):
            x = _along(x, axis, matrix)
        return x if divisor_override is None else x / divisor_override

    @decomposes(getattr(aten, f"avg_pool{dims}d_backward").default)
    def pool_backward(
        grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
    ) -> Tensor:  # fmt: skip
        matrices = _pool_matrices(
            grad, x.shape, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, dims
        )
        if dims == 2:
            grad = separable(grad, *(m.T for m in matrices))
        else:
            for axis, matrix in enumerate(matrices, start=x.ndim - dims):
                grad = _along(grad, axis, matrix.T)
        return grad if divisor_override is None else grad / divisor_override


_register_avg_pool(2)
_register_avg_pool(3)


def _adaptive(out: int) -> Callable[[Tensor], Tensor]:
    return lambda x: aten.adaptive_avg_pool1d(x, [out])


def _register_adaptive(dims: int) -> None:
    axes = tuple(range(-dims, 0))

    @decomposes(getattr(aten, f"_adaptive_avg_pool{dims}d").default)
    def pool(x: Tensor, size: Sequence[int]) -> Tensor:
        if all(n == 1 for n in size):
            return x.mean(axes, keepdim=True)
        matrices = [_rows(n, _adaptive(out), x) for n, out in zip(x.shape[-dims:], size, strict=True)]
        if dims == 2:
            return separable(x, *matrices)
        for axis, matrix in zip(axes, matrices, strict=True):
            x = _along(x, axis, matrix)
        return x

    @decomposes(getattr(aten, f"_adaptive_avg_pool{dims}d_backward").default)
    def pool_backward(grad: Tensor, x: Tensor) -> Tensor:
        if all(n == 1 for n in grad.shape[-dims:]):
            return (grad / float(math.prod(x.shape[-dims:]))).expand(x.shape)
        sizes = zip(x.shape[-dims:], grad.shape[-dims:], strict=True)
        matrices = [_rows(n, _adaptive(out), grad).T for n, out in sizes]
        if dims == 2:
            return separable(grad, *matrices)
        for axis, matrix in zip(axes, matrices, strict=True):
            grad = _along(grad, axis, matrix)
        return grad


_register_adaptive(2)
_register_adaptive(3)


def _register_adaptive_max(dims: int) -> None:
    """Windows of different sizes are filled up with their own last pixels, which change no maximum."""

    @decomposes(getattr(aten, f"adaptive_max_pool{dims}d").default)
    def pool(x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        with _disable_current_modes():
            places = torch.zeros(1, 1, dtype=torch.int64)  # [windows, pixels]
            for n, out in zip(x.shape[-dims:], size, strict=True):
                starts = [i * n // out for i in range(out)]
                ends = [-(-(i + 1) * n // out) for i in range(out)]
                longest = max(e - s for s, e in zip(starts, ends, strict=True))
                rows = torch.tensor(
                    [[min(s + j, e - 1) for j in range(longest)] for s, e in zip(starts, ends, strict=True)]
                )
                places = (places[:, None, :, None] * n + rows[None, :, None, :]).reshape(
                    len(places) * out, places.shape[1] * longest
                )
            picked = places.flatten()
        lead, flat = x.shape[:-dims], x.reshape(*x.shape[:-dims], -1)
        count, pixels = places.shape
        seen = flat.index_select(-1, picked.to(x.device)).reshape(*lead, count, pixels)
        first = seen.argmax(-1, keepdim=True)  # [..., windows, 1]
        held = torch.where(first == torch.arange(pixels, device=x.device), places.to(x.device), 0).sum(-1)
        return seen.amax(-1).reshape(*lead, *size), held.reshape(*lead, *size)

    @decomposes(getattr(aten, f"adaptive_max_pool{dims}d_backward").default)
    def pool_backward(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        lead = x.shape[:-dims]
        flat = torch.zeros_like(x).reshape(*lead, -1)
        return flat.scatter_add(-1, indices.reshape(*lead, -1), grad.reshape(*lead, -1)).reshape(x.shape)


_register_adaptive_max(2)
_register_adaptive_max(3)


def _register_max_backward(dims: int) -> None:
    forward = getattr(aten, f"max_pool{dims}d_with_indices").default

    @decomposes(getattr(aten, f"max_pool{dims}d_with_indices_backward").default)
    def pool_backward(
        grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], ceil_mode: bool, indices: Tensor,
    ) -> Tensor:  # fmt: skip
        """Every offset in the window gets the gradient where it holds the first maximum, as PyTorch scans it.

        The indices are not used: runtimes disagree about them, and TensorRT has none.
        """
        k, s, p, d = (_several(v, dims) for v in (kernel, stride or kernel, padding, dilation))
        sizes, outs = x.shape[-dims:], grad.shape[-dims:]
        # Enough padding for every window to lie inside; ceil_mode's windows may reach past the end.
        wide = [
            max((o - 1) * b + (a - 1) * c + 1, n + q) for o, b, a, c, n, q in zip(outs, s, k, d, sizes, p, strict=True)
        ]
        ends = [(q, w - n - q) for q, w, n in zip(p, wide, sizes, strict=True)]
        padded = F.pad(x, [v for pair in reversed(ends) for v in pair], value=torch.finfo(x.dtype).min)
        largest, _ = forward(x, kernel, stride, padding, dilation, ceil_mode)
        total = None
        free = None  # where no earlier offset held the maximum
        for offset in itertools.product(*(range(n) for n in k)):
            starts = [i * c for i, c in zip(offset, d, strict=True)]
            tap = padded
            for axis, (start, step, out) in enumerate(zip(starts, s, outs, strict=True), start=x.ndim - dims):
                tap = aten.slice.Tensor(tap, axis, start, start + (out - 1) * step + 1, step)
            holds = tap == largest
            if free is not None:
                holds = holds & free
            free = ~holds if free is None else free & ~holds
            share = torch.where(holds, grad, 0.0)
            for axis, (start, step, size) in enumerate(zip(starts, s, wide, strict=True), start=-dims):
                share = _spread(share, axis, step, start, size)
            total = share if total is None else total + share
        assert total is not None
        for axis, (begin, n) in enumerate(zip(p, sizes, strict=True), start=x.ndim - dims):
            total = total.narrow(axis, begin, n)
        return total


_register_max_backward(2)
_register_max_backward(3)


def _spread(x: Tensor, dim: int, step: int, start: int, size: int) -> Tensor:
    """Put x's entries `step` apart along `dim` (counted from the end), from `start`, into zeros of length `size`."""
    n, behind = x.shape[dim], [0, 0] * (-1 - dim)
    if step > 1:
        # A new axis behind `dim`, filled up with zeros and folded into it.
        wide = F.pad(x.unsqueeze(dim), [*behind, 0, step - 1])
        x = wide.flatten(dim - 1, dim).narrow(dim, 0, (n - 1) * step + 1)
    return F.pad(x, [*behind, start, size - start - x.shape[dim]])


# Sampling at places that are values


OWN[aten.grid_sampler_2d.default] = decomposition_table[aten.grid_sampler_2d.default]


@decomposes(aten.grid_sampler_2d_backward.default)
def grid_sampler_2d_backward(
    grad: Tensor, x: Tensor, grid: Tensor, mode: int, padding: int, align: bool, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    forward = decomposition_table[aten.grid_sampler_2d.default]
    to_x, to_grid = derived(lambda a, b: forward(a, b, mode, padding, align), (x, grid), grad)
    return to_x if output_mask[0] else None, to_grid if output_mask[1] else None
