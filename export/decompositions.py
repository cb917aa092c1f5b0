"""Backward operators, and forward ones that few runtimes know, as operations that every runtime knows.

`TABLE` extends PyTorch's core ATen decompositions. Every entry computes what its operator computes, gradients of
weights included where autograd may ask for them; tests/export/test_decompositions.py holds each to autograd. Sums and
statistics of half-precision tensors are taken in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
OWN: dict[Any, Callable[..., Any]] = {}


def _decomposes(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            OWN[operator] = function
        return function

    return register


def _wide(x: Tensor) -> Tensor:
    """In float32 if x is of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _pair(v: Sequence[int] | int) -> tuple[int, int]:
    values = (v,) if isinstance(v, int) else tuple(v)
    return (values[0], values[-1]) if values else (0, 0)


# Convolutions


def flip_weight(
    weight: Tensor,  # [O, I/groups, *k]
    groups: int,
) -> Tensor:
    """The kernel of the convolution that pulls a gradient back through one of stride 1: [I, O/groups, *k]."""
    o, i = weight.shape[:2]
    spatial = weight.shape[2:]
    w = weight.reshape(groups, o // groups, i, *spatial).transpose(1, 2).reshape(groups * i, o // groups, *spatial)
    return w.flip(tuple(range(2, w.ndim)))


@_decomposes(aten.convolution_backward.default)
def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradient of the input as a convolution (stride 1: with the flipped kernel, which runtimes run fastest)."""
    dims = weight.ndim - 2
    stride, padding, dilation = (list(v) * dims if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    kernel = weight.shape[2:]
    to_input = to_weight = to_bias = None
    if output_mask[0]:
        if transposed:
            to_input = aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * dims, groups)
        else:
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if all(s == 1 for s in stride) and all(p <= r for p, r in zip(padding, reach, strict=True)):
                inverse = [r - p for r, p in zip(reach, padding, strict=True)]
                flipped = flip_weight(weight, groups)
                to_input = aten.convolution(grad, flipped, None, stride, inverse, dilation, False, [0] * dims, groups)
            else:
                # What the forward convolution's rounding down left out at the end.
                rest = [
                    n - ((g - 1) * s - 2 * p + r + 1)
                    for n, g, s, p, r in zip(x.shape[2:], grad.shape[2:], stride, padding, reach, strict=True)
                ]
                to_input = aten.convolution(grad, weight, None, stride, padding, dilation, True, rest, groups)
    if output_mask[1]:
        to_weight = _weight_gradient(grad, x, weight, stride, padding, dilation, transposed, groups)
    if output_mask[2]:
        to_bias = _wide(grad).sum((0, *range(2, grad.ndim))).to(grad.dtype)
    return to_input, to_weight, to_bias


def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    groups: int,
) -> Tensor:
    """The weight's gradient: the input convolved with the output's gradient, batch and channels swapped."""
    if transposed:
        x, grad = grad, x
    per_group = []
    for one_x, one_grad in zip(x.chunk(groups, 1), grad.chunk(groups, 1), strict=True):
        g = aten.convolution(
            one_x.transpose(0, 1), one_grad.transpose(0, 1), None, dilation, padding, stride, False,
            [0] * len(stride), 1,
        )  # fmt: skip
        for axis, k in enumerate(weight.shape[2:], start=2):
            g = g.narrow(axis, 0, k)
        per_group.append(g.transpose(0, 1))
    return torch.cat(per_group, 0)


# Normalisation. Few passes over whole tensors, because runtimes that do not fuse pay for each: statistics are sums and
# dot products, and scales are multiplied together while they are one number per channel.


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] or [N, C] shaped to multiply x [N, C, ...]."""
    lead = (1, -1) if values.ndim == 1 else tuple(values.shape)
    return values.reshape(*lead, *([1] * (x.ndim - 2)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of rows, [..., R] and [..., R] to [..., 1], without their product in memory."""
    rows = a.shape[-1]
    # Transposed, not reshaped: ONNX Runtime's product of rows with rows is four times faster than rows with columns.
    return torch.bmm(a.reshape(-1, 1, rows), b.reshape(-1, 1, rows).transpose(1, 2)).reshape(*a.shape[:-1], 1)


def _group_scale(rstd: Tensor, weight: Tensor | None, c: int) -> Tensor:
    """What each channel is multiplied by: rstd [N, G] of its group times its weight [C], as [N, C]."""
    n, groups = rstd.shape
    wide = rstd[:, :, None].expand(n, groups, c // groups).reshape(n, c)
    return wide if weight is None else wide * _wide(weight)


@_decomposes(aten.native_group_norm.default)
def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, inner: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One group a row and no weights, which runtimes do in one pass (ONNX: InstanceNormalization), then the weights."""
    if x.ndim == 3 and groups == c and weight is None and bias is None and x.dtype == _wide(x).dtype:
        return NotImplemented  # it stays what it is
    rows = _wide(x).reshape(n, groups, -1)  # [N, G, D]
    normed, mean, rstd = torch.native_group_norm(rows, None, None, n, groups, rows.shape[2], groups, eps)
    out = normed.reshape(x.shape)
    if weight is not None:
        out = out * _per_channel(_wide(weight), x)
    if bias is not None:
        out = out + _per_channel(_wide(bias), x)
    # Statistics stay in float32: nothing but the backward below reads them.
    return out.to(x.dtype), mean, rstd


@_decomposes(aten.native_group_norm_backward.default)
def native_group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, n: int, c: int, inner: int, groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    grad, mean, rstd = _wide(grad), _wide(mean), _wide(rstd)
    # `trace` takes the forward pass's normalised rows for this product.
    normed = (_wide(x).reshape(n, groups, -1) - mean[..., None]) * rstd[..., None]
    planes = grad.reshape(n, c, -1)
    sums = planes.sum(-1)  # [N, C]
    dots = _dot(planes, normed.reshape(n, c, -1))[..., 0]  # [N, C]
    to_input = to_weight = to_bias = None
    if output_mask[0]:
        w = 1.0 if weight is None else _wide(weight)
        count = float(x.shape[1] // groups * (x[0, 0].numel()))
        along = (dots * w).reshape(n, groups, -1).sum(-1) * rstd / count  # [N, G]
        level = (sums * w).reshape(n, groups, -1).sum(-1) * rstd / count
        scaled = (grad * _per_channel(_group_scale(rstd, weight, c), x)).reshape(n, groups, -1)
        to_input = (scaled - (normed * along[..., None] + level[..., None])).reshape(x.shape).to(x.dtype)
    if output_mask[1]:
        to_weight = dots.sum(0).to(x.dtype)
    if output_mask[2]:
        to_bias = sums.sum(0).to(x.dtype)
    return to_input, to_weight, to_bias


@_decomposes(aten.native_layer_norm.default)
def native_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    first = x.ndim - len(shape)
    rows = _wide(x).reshape(*x.shape[:first], -1)
    mean = rows.mean(-1, keepdim=True)
    centred = rows - mean
    rstd = (_dot(centred, centred) * (1 / rows.shape[-1]) + eps).rsqrt()
    out = (centred * rstd).reshape(x.shape)
    if weight is not None:
        out = out * _wide(weight)
    if bias is not None:
        out = out + _wide(bias)
    ones = (*x.shape[:first], *([1] * len(shape)))
    return out.to(x.dtype), mean.reshape(ones), rstd.reshape(ones)


@_decomposes(aten.native_layer_norm_backward.default)
def native_layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    first = x.ndim - len(shape)
    lead = x.shape[:first]
    grad = _wide(grad)
    rstd = _wide(rstd).reshape(*lead, 1)
    centred = _wide(x).reshape(*lead, -1) - _wide(mean).reshape(*lead, 1)
    to_input = to_weight = to_bias = None
    if output_mask[0]:
        g = (grad if weight is None else grad * _wide(weight)).reshape(*lead, -1)
        count = float(math.prod(shape))
        along = _dot(g, centred) * rstd * rstd / count
        level = g.mean(-1, keepdim=True)
        to_input = ((g - (centred * along + level)) * rstd).reshape(x.shape).to(x.dtype)
    outer = tuple(range(first))
    if output_mask[1]:
        to_weight = _sum(grad * (centred * rstd).reshape(x.shape), outer).to(x.dtype)
    if output_mask[2]:
        to_bias = _sum(grad, outer).to(x.dtype)
    return to_input, to_weight, to_bias


@_decomposes(aten.native_batch_norm.default)
def native_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """In eval mode: one scale and one shift per channel."""
    if training or mean is None or var is None:
        return NotImplemented
    scale = (_wide(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * _wide(weight)
    shift = -_wide(mean) * scale
    if bias is not None:
        shift = shift + _wide(bias)
    out = _wide(x) * _per_channel(scale, x) + _per_channel(shift, x)
    return out.to(x.dtype), x.new_zeros(0), x.new_zeros(0)


def _sum(x: Tensor, over: tuple[int, ...]) -> Tensor:
    return x.sum(over) if over else x


# Activations


@_decomposes(aten.silu_backward.default)
def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The slope does not depend on the cotangent, so that several pullbacks share it."""
    x, grad_wide = _wide(x), _wide(grad)
    sigmoid = x.sigmoid()
    y = x * sigmoid
    return (grad_wide * (y + sigmoid * (1 - y))).to(grad.dtype)


@_decomposes(aten._safe_softmax.default)
def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax in which a row of nothing but -inf gives zeros; `trace` drops the choice where nothing is masked."""
    wide = _wide(x)
    nothing = wide.amax(dim, keepdim=True) == -math.inf
    return torch.where(nothing, 0.0, torch.softmax(wide, dim)).to(dtype or x.dtype)


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
    @_decomposes(forward)
    def resize(
        x: Tensor,
        size: Sequence[int],
        align: bool,
        scale_h: float | None = None,
        scale_w: float | None = None,
    ) -> Tensor:
        return _apply(x, _resizers(forward, size, align, scales=(scale_h, scale_w)))

    @_decomposes(backward)
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


@_decomposes(aten.upsample_nearest2d.default)
def upsample_nearest2d(
    x: Tensor,
    size: Sequence[int],
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:
    if repeats(x.shape, size):
        return NotImplemented  # it stays what it is
    return _apply(x, _resizers(aten.upsample_nearest2d.default, size, scales=(scale_h, scale_w)))


@_decomposes(aten.upsample_nearest2d_backward.default)
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

    sizes = (_pair(kernel), _pair(stride or kernel), _pair(padding))
    return along(*(v[0] for v in sizes)), along(*(v[1] for v in sizes))


@_decomposes(aten.avg_pool2d_backward.default)
def avg_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    # With a divisor of its own, every window counts its padding and the usual divisor is undone.
    include = count_include_pad or divisor_override is not None
    out = _pull_back(grad, x.shape, _pool_operators(kernel, stride, padding, ceil_mode, include))
    return out if divisor_override is None else out * (math.prod(_pair(kernel)) / divisor_override)


def _adaptive_operators(size: Sequence[int]) -> Operators:
    def along(n: int) -> Callable[[Tensor], Tensor]:
        return lambda x: aten._adaptive_avg_pool2d(x, [n, x.shape[-1]])

    return along(size[-2]), along(size[-1])


@_decomposes(aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(size) == (1, 1):
        return x.mean((-2, -1), keepdim=True)
    return _apply(x, _adaptive_operators(size))


@_decomposes(aten._adaptive_avg_pool2d_backward.default)
def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    if grad.shape[-2:] == (1, 1):
        return (grad / float(x.shape[-1] * x.shape[-2])).expand(x.shape)
    return _pull_back(grad, x.shape, _adaptive_operators(grad.shape))


@_decomposes(aten.max_pool2d_with_indices_backward.default)
def max_pool2d_with_indices_backward(
    grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, indices: Tensor,
) -> Tensor:  # fmt: skip
    """Every offset in the window gets the gradient where it holds the first maximum, as PyTorch scans it.

    The indices are not used: runtimes disagree about them, and TensorRT has none.
    """
    (kh, kw), (ph, pw), (dh, dw) = _pair(kernel), _pair(padding), _pair(dilation)
    sh, sw = _pair(stride or kernel)
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


# Indexing


def _pad_along(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    dim = dim % x.ndim
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [before, after]) if before or after else x


@_decomposes(aten.select_backward.default)
def select_backward(grad: Tensor, size: Sequence[int], dim: int, index: int) -> Tensor:
    dim, index = dim % len(size), index % size[dim]
    return _pad_along(grad.unsqueeze(dim), dim, index, size[dim] - 1 - index)


@_decomposes(aten.slice_backward.default)
def slice_backward(grad: Tensor, size: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    dim = dim % len(size)
    n = size[dim]
    start = min(max(start + n if start < 0 else start, 0), n)
    if step > 1:
        kept = grad.shape[dim]
        wide = _pad_along(grad.unsqueeze(dim + 1), dim + 1, 0, step - 1).flatten(dim, dim + 1)
        grad = wide.narrow(dim, 0, (kept - 1) * step + 1)
    return _pad_along(grad, dim, start, n - start - grad.shape[dim])


@_decomposes(aten.slice_scatter.default)
def slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    n = x.shape[dim]
    start, end = (min(max(v + n if v < 0 else v, 0), n) for v in (start or 0, n if end is None else end))
    if step != 1:
        return NotImplemented
    return torch.cat([x.narrow(dim, 0, start), source, x.narrow(dim, end, n - end)], dim)


@_decomposes(aten.scatter_add.default)
def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """With the one-hot rows of the index: what gather's backward needs, and no scattering with a sum."""
    dim = dim % x.ndim
    if any(x.shape[i] != index.shape[i] for i in range(x.ndim) if i != dim):
        return NotImplemented
    source = source[tuple(slice(0, n) for n in index.shape)]
    places = torch.arange(x.shape[dim], device=x.device).reshape(-1, *([1] * (x.ndim - 1 - dim)))
    hot = index.unsqueeze(dim + 1) == places  # [..., k, n, ...]
    return x + torch.where(hot, source.unsqueeze(dim + 1), 0).sum(dim).to(x.dtype)


@_decomposes(aten.embedding_dense_backward.default)
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


@_decomposes(aten.as_strided.default)
def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Tensor:
    orders = _same_elements(x, size, stride, offset)
    return _in_order(x, orders[0], size, orders[1]) if orders else NotImplemented


@_decomposes(aten.as_strided_scatter.default)
def as_strided_scatter(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    orders = _same_elements(x, size, stride, offset)
    return _in_order(source, orders[1], x.shape, orders[0]) if orders else NotImplemented


@_decomposes(aten.roll.default)
def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        return roll(x.flatten(), shifts, (0,)).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % x.shape[dim]
        if cut:
            x = torch.cat([x.narrow(dim, cut, x.shape[dim] - cut), x.narrow(dim, 0, cut)], dim)
    return x


# PyTorch's own decompositions leave some of its primitives behind

prims = torch.ops.prims
for _primitive, _operator in (
    (prims.mul.default, torch.mul),
    (prims.add.default, torch.add),
    (prims.sub.default, torch.sub),
    (prims.div.default, torch.div),
    (prims.neg.default, torch.neg),
    (prims.exp.default, torch.exp),
    (prims.tanh.default, torch.tanh),
    (prims.where.default, torch.where),
    (prims.convert_element_type.default, lambda x, dtype: x.to(dtype)),
):
    _decomposes(_primitive)(_operator)


# Memory that is written later


@_decomposes(aten.empty_permuted.default)
def empty_permuted(size: Sequence[int], physical_layout: Sequence[int], **options: Any) -> Tensor:
    return torch.full(tuple(size), 0, dtype=options.get("dtype"), device=options.get("device"))


@_decomposes(aten.new_empty_strided.default, aten.empty_strided.default)
def empty_strided(*arguments: Any, **options: Any) -> Tensor:
    size = arguments[1] if isinstance(arguments[0], Tensor) else arguments[0]
    like = arguments[0] if isinstance(arguments[0], Tensor) else None
    dtype = options.get("dtype") or (like.dtype if like is not None else None)
    return torch.full(tuple(size), 0, dtype=dtype, device=options.get("device"))


def table() -> dict[Any, Callable[..., Any]]:
    """PyTorch's core ATen decompositions with ours over them."""
    return {**core_aten_decompositions(), **OWN}
