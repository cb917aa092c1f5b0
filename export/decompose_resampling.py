"""Resampling and pooling in one to three dimensions, and their backward operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .decomposing import decomposes, pair_of

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


@decomposes(aten.upsample_nearest2d.default)
def upsample_nearest2d(
    x: Tensor,
    size: Sequence[int],
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:
    if repeats(x.shape, size):
        return NotImplemented  # it stays what it is
    return _apply(x, _resizers(aten.upsample_nearest2d.default, size, scales=(scale_h, scale_w)))


@decomposes(aten.upsample_nearest2d_backward.default)
def upsample_nearest2d_backward(
    grad: Tensor,
    size: Sequence[int],
    input_size: Sequence[int],
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:
    if factors := repeats(input_size, size):
        return aten.avg_pool2d(grad, factors, factors) * float(factors[0] * factors[1])
    return _pull_back(grad, input_size, _resizers(aten.upsample_nearest2d.default, size, scales=(scale_h, scale_w)))


# Pooling


def _pool_operators(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool, count_include_pad: bool
) -> Operators:
    def along(k: int, s: int, p: int) -> Callable[[Tensor], Tensor]:
        return lambda x: aten.avg_pool2d(x, [k, 1], [s, 1], [p, 0], ceil_mode, count_include_pad)

    sizes = (pair_of(kernel), pair_of(stride or kernel), pair_of(padding))
    return along(*(v[0] for v in sizes)), along(*(v[1] for v in sizes))


@decomposes(aten.avg_pool2d_backward.default)
def avg_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    # With a divisor of its own, every window counts its padding and the usual divisor is undone.
    include = count_include_pad or divisor_override is not None
    out = _pull_back(grad, x.shape, _pool_operators(kernel, stride, padding, ceil_mode, include))
    return out if divisor_override is None else out * (math.prod(pair_of(kernel)) / divisor_override)


def _adaptive_operators(size: Sequence[int]) -> Operators:
    def along(n: int) -> Callable[[Tensor], Tensor]:
        return lambda x: aten._adaptive_avg_pool2d(x, [n, x.shape[-1]])

    return along(size[-2]), along(size[-1])


@decomposes(aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(size) == (1, 1):
        return x.mean((-2, -1), keepdim=True)
    return _apply(x, _adaptive_operators(size))


@decomposes(aten._adaptive_avg_pool2d_backward.default)
def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    if grad.shape[-2:] == (1, 1):
        return (grad / float(x.shape[-1] * x.shape[-2])).expand(x.shape)
    return _pull_back(grad, x.shape, _adaptive_operators(grad.shape))


@decomposes(aten.max_pool2d_with_indices_backward.default)
def max_pool2d_with_indices_backward(
    grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, indices: Tensor,
) -> Tensor:  # fmt: skip
    """Every offset in the window gets the gradient where it holds the first maximum, as PyTorch scans it.

    The indices are not used: runtimes disagree about them, and TensorRT has none.
    """
    (kh, kw), (ph, pw), (dh, dw) = pair_of(kernel), pair_of(padding), pair_of(dilation)
    sh, sw = pair_of(stride or kernel)
    h, w = x.shape[-2:]
    oh, ow = grad.shape[-2:]
    # Enough padding for every window to lie inside; ceil_mode's windows may reach past the end.
    height = max((oh - 1) * sh + (kh - 1) * dh + 1, h + ph)
    width = max((ow - 1) * sw + (kw - 1) * dw + 1, w + pw)
    lowest = torch.finfo(x.dtype).min
    padded = F.pad(x, (pw, width - w - pw, ph, height - h - ph), value=lowest)
    largest, _ = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    total = None
    free = None  # where no earlier offset held the maximum
    for i in range(kh):
        for j in range(kw):
            y0, x0 = i * dh, j * dw
            y1, x1 = y0 + (oh - 1) * sh + 1, x0 + (ow - 1) * sw + 1
            tap = padded[:, :, y0:y1:sh, x0:x1:sw]
            holds = tap == largest
            if free is not None:
                holds = holds & free
            free = ~holds if free is None else free & ~holds
            share = torch.where(holds, grad, 0.0)
            share = _spread(share, -2, sh, y0, height)
            share = _spread(share, -1, sw, x0, width)
            total = share if total is None else total + share
    assert total is not None
    return total[:, :, ph : ph + h, pw : pw + w]


def _spread(x: Tensor, dim: int, step: int, start: int, size: int) -> Tensor:
    """Put x's entries `step` apart along `dim` (-1 or -2), from `start`, into zeros of length `size`."""
    n = x.shape[dim]
    if step > 1:
        # A new axis behind `dim`, filled up with zeros and folded into it.
        wide = F.pad(x.unsqueeze(-1), (0, step - 1)) if dim == -1 else F.pad(x.unsqueeze(-2), (0, 0, 0, step - 1))
        x = wide.flatten(dim - 1, dim).narrow(dim, 0, (n - 1) * step + 1)
    before, after = start, size - start - x.shape[dim]
    return F.pad(x, (before, after) if dim == -1 else (0, 0, before, after))
