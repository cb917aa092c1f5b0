"""Pointwise operations and losses, and their backward operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from counterlens.export.decomposing import OWN, decomposes, derived, wide

aten = torch.ops.aten

# Right in PyTorch, and not among its core ones.
for _name in ("elu.default", "dist.default", "unfold.default", "rrelu_with_noise_backward.default"):
    _packet, _overload = _name.split(".")
    _operator = getattr(getattr(aten, _packet), _overload)
    OWN[_operator] = decomposition_table[_operator]


def negative(x: Tensor) -> Tensor:
    """Where the sign is minus, that of zero included."""
    return (x < 0) | ((x == 0) & (1 / x < 0))


@decomposes(aten.exp2.default)
def exp2(x: Tensor) -> Tensor:
    return torch.pow(2.0, x)


@decomposes(aten.log2.default)
def log2(x: Tensor) -> Tensor:
    return x.log() * (1 / math.log(2))


@decomposes(aten.log10.default)
def log10(x: Tensor) -> Tensor:
    return x.log() * (1 / math.log(10))


@decomposes(aten.asinh.default)
def asinh(x: Tensor) -> Tensor:
    """Written with log1p, so that tiny values keep their digits."""
    size = x.abs()
    square = size * size
    near = torch.log1p(size + square / (1 + (square + 1).sqrt()))
    return torch.where(size < 1e9, near, size.log() + math.log(2)) * x.sign()


@decomposes(aten.acosh.default)
def acosh(x: Tensor) -> Tensor:
    above = x - 1
    near = torch.log1p(above + (above * (above + 2)).sqrt())
    return torch.where(x < 1e9, near, x.log() + math.log(2))


@decomposes(aten.atanh.default)
def atanh(x: Tensor) -> Tensor:
    size = x.abs()
    return 0.5 * torch.log1p(2 * size / (1 - size)) * x.sign()


@decomposes(aten.sinh.default)
def sinh(x: Tensor) -> Tensor:
    u = torch.expm1(x.abs())
    return 0.5 * torch.where(u.isinf(), u, u + u / (u + 1)) * x.sign()


@decomposes(aten.erfc.default)
def erfc(x: Tensor) -> Tensor:
    """Numerical Recipes' Chebyshev fit: within 1.2e-7 of the value everywhere, where 1 - erf loses it all."""
    if x.dtype == torch.float64:
        return NotImplemented
    z = wide(x).abs()
    t = 1 / (1 + 0.5 * z)
    fit = torch.full_like(t, 0.17087277)
    for c in (-0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368):
        fit = fit * t + c
    tail = t * torch.exp(-z * z - 1.26551223 + t * fit)
    return torch.where(x >= 0, tail, 2 - tail).to(x.dtype)


@decomposes(aten.atan2.default)
def atan2(y: Tensor, x: Tensor) -> Tensor:
    base = torch.atan(y / x)
    turned = torch.where(x < 0, torch.where(negative(y), base - math.pi, base + math.pi), base)
    side = torch.where(negative(y), -1.0, 1.0).to(y.dtype)
    turned = torch.where(x == 0, side * (math.pi / 2), turned)
    return torch.where(y == 0, torch.where(negative(x), math.pi * side, 0.0 * y), turned)


@decomposes(aten.hypot.default)
def hypot(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.abs(), b.abs()
    large, small = torch.maximum(a, b), torch.minimum(a, b)
    ratio = torch.where(large == 0, 0.0, small / large)
    return large * (1 + ratio * ratio).sqrt()


@decomposes(aten.copysign.Tensor)
def copysign(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(negative(b), -a.abs(), a.abs())


@decomposes(aten.copysign.Scalar)
def copysign_number(a: Tensor, b: float) -> Tensor:
    return -a.abs() if math.copysign(1, b) < 0 else a.abs()


@decomposes(aten.fmax.default)
def fmax(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.maximum(a, b)))


@decomposes(aten.fmin.default)
def fmin(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.minimum(a, b)))


@decomposes(
    aten.__lshift__.Scalar,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.__lshift__.Tensor,
    aten.bitwise_left_shift.Tensor,
)
def left_shift(x: Tensor, bits: Any) -> Tensor:
    return NotImplemented if isinstance(bits, Tensor) or not 0 <= bits < 31 else x * (1 << int(bits))


@decomposes(
    aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar, aten.__rshift__.Tensor,
    aten.bitwise_right_shift.Tensor,
)  # fmt: skip
def right_shift(x: Tensor, bits: Any) -> Tensor:
    return NotImplemented if isinstance(bits, Tensor) or not 0 <= bits < 31 else x // (1 << int(bits))


@decomposes(aten.pow.Tensor_Scalar)
def pow_number(x: Tensor, exponent: float) -> Tensor:
    """Whole numbers by products, which wrap around as PyTorch's do; runtimes go through floating point."""
    if x.dtype.is_floating_point or not isinstance(exponent, int) or not 0 <= exponent <= 64:
        return NotImplemented
    out, square = None, x
    while exponent:
        if exponent & 1:
            out = square if out is None else out * square
        exponent >>= 1
        square = square * square if exponent else square
    return torch.ones_like(x) if out is None else out


@decomposes(aten.hardshrink_backward.default, aten.softshrink_backward.default)
def shrink_backward(grad: Tensor, x: Tensor, limit: float) -> Tensor:
    return torch.where((x >= -limit) & (x <= limit), 0.0, grad)


@decomposes(aten.rrelu_with_noise_functional.default)
def rrelu(
    x: Tensor, noise: Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> tuple[Tensor, Tensor]:
    return NotImplemented if training else (aten.leaky_relu(x, (lower + upper) / 2), noise)


@decomposes(aten.round.decimals)
def round_decimals(x: Tensor, *, decimals: int = 0) -> Tensor:
    factor = 10.0 ** abs(decimals)
    return (x * factor).round() / factor if decimals >= 0 else (x / factor).round() * factor


@decomposes(aten.bucketize.Tensor)
def bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    below = boundaries <= x.unsqueeze(-1) if right else boundaries < x.unsqueeze(-1)
    return below.sum(-1).to(torch.int32 if out_int32 else torch.int64)


@decomposes(aten.searchsorted.Tensor)
def searchsorted(
    rows: Tensor, x: Tensor, *, out_int32: bool = False, right: bool = False, side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if sorter is not None:
        return NotImplemented
    rows = rows.unsqueeze(-2) if rows.ndim > 1 else rows
    return bucketize(x, rows, out_int32=out_int32, right=right or side == "right")


# Losses: divided by the number of elements, which may follow the batch, and never by a number made from it


def _register_loss(backward: Any, slope: Callable[..., Tensor]) -> None:
    @decomposes(backward)
    def pull(grad: Tensor, x: Tensor, target: Tensor, reduction: int, *rest: Any) -> Tensor:
        out = slope(x, target, *rest) * grad
        return out / x.numel() if reduction == 1 else out


def _huber(x: Tensor, target: Tensor, delta: float) -> Tensor:
    return (x - target).clamp(-delta, delta)


def _smooth(x: Tensor, target: Tensor, beta: float) -> Tensor:
    return ((x - target) / beta).clamp(-1, 1) if beta else (x - target).sign()


def _soft_margin(x: Tensor, target: Tensor) -> Tensor:
    return -target * torch.sigmoid(-target * x)


@decomposes(aten.elu_backward.default)
def elu_backward(grad: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor) -> Tensor:
    below = input_scale * (x + alpha * scale) if is_result else input_scale * alpha * scale * torch.exp(x * input_scale)
    return grad * torch.where(x > 0, scale, below)


_register_loss(aten.mse_loss_backward.default, lambda x, target: 2 * (x - target))
_register_loss(aten.huber_loss_backward.default, _huber)
_register_loss(aten.smooth_l1_loss_backward.default, _smooth)
_register_loss(aten.soft_margin_loss_backward.default, _soft_margin)


@decomposes(aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, p: float, margin: float, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    forward = decomposition_table[aten.multi_margin_loss.default]
    if weight is not None or reduction != 0:
        return NotImplemented
    return derived(lambda v, labels: forward(v, labels, p, margin, None, 0), (x,), grad, target)[0]


# Norms and statistics


@decomposes(aten.linalg_vector_norm.default)
def vector_norm(
    x: Tensor, order: float = 2, dim: Sequence[int] | int | None = None, keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    out = dtype or x.dtype
    size = wide(x.to(out)).abs()
    axes = list(range(x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim) or list(range(x.ndim))
    if not axes:
        return (size != 0).to(out) if order == 0 else size.to(out)
    if math.isinf(order):
        y = size.amax(axes, keepdim) if order > 0 else size.amin(axes, keepdim)
    elif order == 0:
        y = (size != 0).to(size.dtype).sum(axes, keepdim)
    elif order == 1:
        y = size.sum(axes, keepdim)
    elif order == 2:
        y = (size * size).sum(axes, keepdim).sqrt()
    else:
        y = size.pow(order).sum(axes, keepdim).pow(1 / order)
    return y.to(out)


@decomposes(aten.var_mean.correction)
def var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = list(range(x.ndim)) if not dim else [d % x.ndim for d in dim]
    values = wide(x)
    mean = values.mean(axes, keepdim=True)
    centred = values - mean
    # A tensor: the count may follow the batch, and so would a number that is made from it.
    count = torch.full((), math.prod(x.shape[d] for d in axes), dtype=values.dtype, device=x.device)
    free = (count - (1 if correction is None else correction)).clamp_min(0)
    var = (centred * centred).sum(axes, keepdim=True) / free
    if not keepdim:
        var, mean = (v.squeeze(axes) for v in (var, mean))
    return var.to(x.dtype), mean.to(x.dtype)


@decomposes(aten.var.correction)
def var(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


@decomposes(aten.std.correction)
def std(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0].sqrt()


@decomposes(aten.max.default)
def max_of_all(x: Tensor) -> Tensor:
    return x.amax(list(range(x.ndim)))


@decomposes(aten.min.default)
def min_of_all(x: Tensor) -> Tensor:
    return x.amin(list(range(x.ndim)))


@decomposes(aten._cdist_forward.default)
def cdist(a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:
    return vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


@decomposes(aten._cdist_backward.default)
def cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: float, distance: Tensor) -> Tensor:
    """The gradient with respect to a; zero where two rows are equal."""
    way = a.unsqueeze(-2) - b.unsqueeze(-3)
    grad, distance = grad.unsqueeze(-1), distance.unsqueeze(-1)
    if p == 1:
        slope = way.sign()
    elif math.isinf(p):
        slope = way.sign() * (way.abs() == distance)
    elif p == 2:
        slope = way / distance
    else:
        slope = way * way.abs().pow(p - 2) / distance.pow(p - 1)
    return torch.where((distance == 0) | (way == 0), 0.0, slope * grad).sum(-2)


@decomposes(aten._trilinear.default)
def trilinear(
    a: Tensor, b: Tensor, c: Tensor, expand_a: Sequence[int], expand_b: Sequence[int], expand_c: Sequence[int],
    over: Sequence[int], unroll: int = 1,
) -> Tensor:  # fmt: skip
    for axes, x in ((expand_a, "a"), (expand_b, "b"), (expand_c, "c")):
        for axis in sorted(axes):
            if x == "a":
                a = a.unsqueeze(axis)
            elif x == "b":
                b = b.unsqueeze(axis)
            else:
                c = c.unsqueeze(axis)
    product = a * b * c
    return product.sum(list(over)) if over else product


# Scans, over every pair of places: what runtimes have besides a running sum


def _before(x: Tensor, dim: int, fill: float) -> Tensor:
    """[..., i, j, ...] with x at j where j <= i, else `fill`."""
    n = x.shape[dim]
    place = torch.arange(n, device=x.device)
    seen = (place[:, None] >= place).reshape(n, n, *([1] * (x.ndim - 1 - dim)))
    return torch.where(seen, x.unsqueeze(dim), torch.full((), fill, dtype=x.dtype, device=x.device))


@decomposes(aten.cumprod.default)
def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    x = x.to(dtype) if dtype else x if x.dtype.is_floating_point else x.long()
    return _before(x, dim % x.ndim, 1).prod(dim % x.ndim + 1) if x.ndim else x


@decomposes(aten.logcumsumexp.default)
def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    return _before(x, dim % x.ndim, -math.inf).logsumexp(dim % x.ndim + 1) if x.ndim else x


def _register_running(operator: Any, reduce: str, lowest: float) -> None:
    @decomposes(operator)
    def running(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if not x.ndim or not x.dtype.is_floating_point:
            return NotImplemented
        dim = dim % x.ndim
        values = getattr(_before(x, dim, lowest), reduce)(dim + 1)
        place = torch.arange(x.shape[dim], device=x.device).reshape(-1, *([1] * (x.ndim - 1 - dim)))
        # The last of equal values, as PyTorch has it.
        held = (_before(x, dim, math.nan) == values.unsqueeze(dim + 1)) * place
        return values, held.amax(dim + 1)


_register_running(aten.cummax.default, "amax", -math.inf)
_register_running(aten.cummin.default, "amin", math.inf)


# Orders


@decomposes(aten.kthvalue.default)
def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, places = torch.topk(x, k, dim, largest=False)
    values, places = (v.narrow(dim, k - 1, 1) for v in (values, places))
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


@decomposes(aten.median.dim)
def median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)


@decomposes(aten.median.default)
def median_of_all(x: Tensor) -> Tensor:
    return median(x.flatten(), 0)[0]
