"""Convolutions, normalisation and activations, and their backward operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from counterlens.export.decomposing import decomposes, wide

aten = torch.ops.aten


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


@decomposes(aten.convolution_backward.default)
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
        to_bias = wide(grad).sum((0, *range(2, grad.ndim))).to(grad.dtype)
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
    spread = rstd[:, :, None].expand(n, groups, c // groups).reshape(n, c)
    return spread if weight is None else spread * wide(weight)


@decomposes(aten.native_group_norm.default)
def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, inner: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One group a row and no weights, which runtimes do in one pass (ONNX: InstanceNormalization), then the weights."""
    if x.ndim == 3 and groups == c and weight is None and bias is None and x.dtype == wide(x).dtype:
        return NotImplemented  # it stays what it is
    rows = wide(x).reshape(n, groups, -1)  # [N, G, D]
    normed, mean, rstd = torch.native_group_norm(rows, None, None, n, groups, rows.shape[2], groups, eps)
    out = normed.reshape(x.shape)
    if weight is not None:
        out = out * _per_channel(wide(weight), x)
    if bias is not None:
        out = out + _per_channel(wide(bias), x)
    # Statistics stay in float32: nothing but the backward below reads them.
    return out.to(x.dtype), mean, rstd


@decomposes(aten.native_group_norm_backward.default)
def native_group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, n: int, c: int, inner: int, groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    grad, mean, rstd = wide(grad), wide(mean), wide(rstd)
    # `trace` takes the forward pass's normalised rows for this product.
    normed = (wide(x).reshape(n, groups, -1) - mean[..., None]) * rstd[..., None]
    planes = grad.reshape(n, c, -1)
    sums = planes.sum(-1)  # [N, C]
    dots = _dot(planes, normed.reshape(n, c, -1))[..., 0]  # [N, C]
    to_input = to_weight = to_bias = None
    if output_mask[0]:
        w = 1.0 if weight is None else wide(weight)
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


@decomposes(aten.native_layer_norm.default)
def native_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    first = x.ndim - len(shape)
    rows = wide(x).reshape(*x.shape[:first], -1)
    mean = rows.mean(-1, keepdim=True)
    centred = rows - mean
    rstd = (_dot(centred, centred) * (1 / rows.shape[-1]) + eps).rsqrt()
    out = (centred * rstd).reshape(x.shape)
    if weight is not None:
        out = out * wide(weight)
    if bias is not None:
        out = out + wide(bias)
    ones = (*x.shape[:first], *([1] * len(shape)))
    return out.to(x.dtype), mean.reshape(ones), rstd.reshape(ones)


@decomposes(aten.native_layer_norm_backward.default)
def native_layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    first = x.ndim - len(shape)
    lead = x.shape[:first]
    grad = wide(grad)
    rstd = wide(rstd).reshape(*lead, 1)
    centred = wide(x).reshape(*lead, -1) - wide(mean).reshape(*lead, 1)
    to_input = to_weight = to_bias = None
    if output_mask[0]:
        g = (grad if weight is None else grad * wide(weight)).reshape(*lead, -1)
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


@decomposes(aten.native_batch_norm.default)
def native_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """In eval mode: one scale and one shift per channel. In training, or without statistics, those of the batch."""
    if training:
        rows = wide(x).transpose(0, 1).flatten(1) if x.ndim > 1 else wide(x)[:, None]  # [C, N * ...]
        centre = rows.mean(1)
        centred = rows - centre[:, None]
        rstd = ((centred * centred).mean(1) + eps).rsqrt()
        out = (wide(x) - _per_channel(centre, x)) * _per_channel(rstd, x)
        if weight is not None:
            out = out * _per_channel(wide(weight), x)
        if bias is not None:
            out = out + _per_channel(wide(bias), x)
        return out.to(x.dtype), centre, rstd
    if mean is None or var is None:
        return NotImplemented
    scale = (wide(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * wide(weight)
    shift = -wide(mean) * scale
    if bias is not None:
        shift = shift + wide(bias)
    out = wide(x) * _per_channel(scale, x) + _per_channel(shift, x)
    return out.to(x.dtype), x.new_zeros(0), x.new_zeros(0)


def _sum(x: Tensor, over: tuple[int, ...]) -> Tensor:
    return x.sum(over) if over else x


# Activations


@decomposes(aten.silu_backward.default)
def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The slope does not depend on the cotangent, so that several pullbacks share it."""
    x, grad_wide = wide(x), wide(grad)
    sigmoid = x.sigmoid()
    y = x * sigmoid
    return (grad_wide * (y + sigmoid * (1 - y))).to(grad.dtype)


@decomposes(aten._safe_softmax.default)
def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax in which a row of nothing but -inf gives zeros; `trace` drops the choice where nothing is masked."""
    scores = wide(x)
    nothing = scores.amax(dim, keepdim=True) == -math.inf
    return torch.where(nothing, 0.0, torch.softmax(scores, dim)).to(dtype or x.dtype)
