# mypy: allow-untyped-defs, allow-incomplete-defs
"""Perturbed images as Triton kernels. Follows reference.py; see README.md for bytes moved and edge cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterlens.kernels.dispatch import constants

BLOCK = 1024  # pixels a program handles; with four warps, a thread stores 16 bytes of half precision at a time
BACKWARD_BLOCK = 512  # it holds more at a time, and must not spill
WARPS, BACKWARD_WARPS = 4, 4
# What `bench.kernels --tune` tries on a card, as (block, warps); all compile without a spill.
CANDIDATES = ((256, 2), (512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8))


@triton.jit
def load_plane(x, stride_n, stride_c, stride_h, stride_w, n, c, y, x_at, valid):
    """Pixels of one channel in float32. Indices are 64-bit: strides may pass 2^31 elements."""
    at = n * stride_n + c * stride_c + y * stride_h + x_at * stride_w
    return tl.load(x + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def places(width, pixels, BLOCK: tl.constexpr):
    """This program's pixels: index, y and x as 64-bit integers, which of them exist."""
    pixel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return pixel, pixel // width, pixel % width, pixel < pixels


@triton.jit
def soft_mask(saliency, threshold, sharpness):
    """sigmoid((saliency - threshold) * sharpness)."""
    return 1.0 / (1.0 + tl.exp((threshold - saliency) * sharpness))


@triton.jit
def perturb_kernel(
    image, baseline, key, limits, mean, std, out,
    image_n, image_c, image_h, image_w,
    baseline_n, baseline_c, baseline_h, baseline_w,
    key_n, key_h, key_w,
    out_n, out_side, out_k, out_c,
    width, pixels, thresholds,
    NORMALISE: tl.constexpr, ABOVE: tl.constexpr, BELOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, i, c) reads its pixels of sample n, channel c once and writes them for every threshold and side.

    Stores are streaming ones, which leave the caches first: nothing here reads the output again.
    """
    n, c = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    pixel, y, x, valid = places(width, pixels, BLOCK)
    level = tl.load(key + n * key_n + y * key_h + x * key_w, mask=valid, other=0)
    shown = load_plane(image, image_n, image_c, image_h, image_w, n, c, y, x, valid)
    hidden = load_plane(baseline, baseline_n, baseline_c, baseline_h, baseline_w, n, c, y, x, valid)
    if NORMALISE:
        shift, scale = tl.load(mean + c), tl.load(std + c)
        shown = tl.div_rn(shown - shift, scale)
        hidden = tl.div_rn(hidden - shift, scale)
    shown, hidden = shown.to(out.dtype.element_ty), hidden.to(out.dtype.element_ty)
    out += n * out_n + c * out_c
    for k in range(thresholds):
        inside = level >= tl.load(limits + n * thresholds + k)
        if ABOVE:
            tl.store(out + pixel, tl.where(inside, shown, hidden), mask=valid, cache_modifier=".cs")
        if BELOW:
            tl.store(out + out_side + pixel, tl.where(inside, hidden, shown), mask=valid, cache_modifier=".cs")
        out += out_k  # a step at a time: k * out_k would need 64 bits


@triton.jit
def soft_kernel(
    image, baseline, saliency, limits, mean, std, out, sharpness,
    image_n, image_c, image_h, image_w,
    baseline_n, baseline_c, baseline_h, baseline_w,
    saliency_n, saliency_h, saliency_w,
    out_n, out_side, out_k, out_c,
    width, pixels, thresholds,
    NORMALISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, i, c) mixes image and baseline of its pixels for every threshold, both ways."""
    n, c = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    pixel, y, x, valid = places(width, pixels, BLOCK)
    level = tl.load(saliency + n * saliency_n + y * saliency_h + x * saliency_w, mask=valid, other=0.0).to(tl.float32)
    shown = load_plane(image, image_n, image_c, image_h, image_w, n, c, y, x, valid)
    hidden = load_plane(baseline, baseline_n, baseline_c, baseline_h, baseline_w, n, c, y, x, valid)
    if NORMALISE:
        shift, scale = tl.load(mean + c), tl.load(std + c)
        shown = tl.div_rn(shown - shift, scale)
        hidden = tl.div_rn(hidden - shift, scale)
    out += n * out_n + c * out_c
    for k in range(thresholds):
        m = soft_mask(level, tl.load(limits + n * thresholds + k), sharpness)
        keep, remove = m * shown + (1.0 - m) * hidden, (1.0 - m) * shown + m * hidden
        tl.store(out + pixel, keep.to(out.dtype.element_ty), mask=valid)
        tl.store(out + out_side + pixel, remove.to(out.dtype.element_ty), mask=valid)
        out += out_k


@triton.jit
def soft_backward_kernel(
    grad, image, baseline, saliency, limits, std, grad_saliency, grad_image, sharpness,
    image_n, image_c, image_h, image_w,
    baseline_n, baseline_c, baseline_h, baseline_w,
    saliency_n, saliency_h, saliency_w,
    grad_n, grad_side, grad_k, grad_c,
    channels, width, pixels, thresholds,
    NORMALISE: tl.constexpr, IMAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (n, i) reads the gradient of its pixels once; masks are made again; no sums across programs."""
    n = tl.program_id(0).to(tl.int64)
    pixel, y, x, valid = places(width, pixels, BLOCK)
    level = tl.load(saliency + n * saliency_n + y * saliency_h + x * saliency_w, mask=valid, other=0.0).to(tl.float32)
    to_saliency = tl.zeros([BLOCK], tl.float32)
    grad += n * grad_n
    grad_image += n * channels * pixels
    for c in range(channels):
        contrast = load_plane(image, image_n, 0, image_h, image_w, n, 0, y, x, valid)
        contrast -= load_plane(baseline, baseline_n, 0, baseline_h, baseline_w, n, 0, y, x, valid)
        image += image_c  # a step at a time: c * image_c would need 64 bits
        baseline += baseline_c
        scale = 1.0
        if NORMALISE:
            scale = 1.0 / tl.load(std + c)
        # What does not depend on the threshold is multiplied in at the end.
        slope, to_image = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        at = grad
        for k in range(thresholds):
            m = soft_mask(level, tl.load(limits + n * thresholds + k), sharpness)
            keep = tl.load(at + pixel, mask=valid, other=0.0).to(tl.float32)
            remove = tl.load(at + grad_side + pixel, mask=valid, other=0.0).to(tl.float32)
            slope += (keep - remove) * (m * (1.0 - m))
            if IMAGE:
                to_image += keep * m + remove * (1.0 - m)
            at += grad_k
        to_saliency += slope * (contrast * scale * sharpness)
        grad += grad_c
        if IMAGE:
            tl.store(grad_image + pixel, (to_image * scale).to(grad_image.dtype.element_ty), mask=valid)
            grad_image += pixels
    tl.store(grad_saliency + n * pixels + pixel, to_saliency.to(grad_saliency.dtype.element_ty), mask=valid)


def perturb(
    image: Tensor,  # [N, C, H, W]
    baseline: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N, H, W] float32 or int32
    limits: Tensor,  # [N, K]
    mean: Sequence[float],
    std: Sequence[float],
    out: Tensor,  # [N, sides, K, C, H, W]
    above: bool,
    below: bool,
) -> None:
    """See `counterlens.kernels.perturb.perturb`, which checks the arguments."""
    n, c, h, w = image.shape
    block = min(BLOCK, triton.next_power_of_2(h * w))
    out_n, out_side, out_k, out_c = out.stride()[:4]
    perturb_kernel[(n, triton.cdiv(h * w, block), c)](
        image, baseline, key, limits, constants(tuple(mean), image.device), constants(tuple(std), image.device), out,
        *image.stride(), *baseline.stride(), *key.stride(), out_n, out_side if above and below else 0, out_k, out_c,
        w, h * w, limits.shape[1], NORMALISE=len(mean) > 0, ABOVE=above, BELOW=below, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


def soft_perturb(
    image: Tensor,  # [N, C, H, W]
    baseline: Tensor,  # [N, C, H, W]
    saliency: Tensor,  # [N, H, W]
    thresholds: Tensor,  # [N, K] float32
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """See `counterlens.kernels.perturb.soft_perturb`, which checks the arguments: [N, 2, K, C, H, W]."""
    n, c, h, w = image.shape
    block = min(BLOCK, triton.next_power_of_2(h * w))
    out = torch.empty((n, 2, thresholds.shape[1], c, h, w), dtype=image.dtype, device=image.device)
    soft_kernel[(n, triton.cdiv(h * w, block), c)](
        image, baseline, saliency, thresholds, constants(tuple(mean), image.device),
        constants(tuple(std), image.device), out, 1 / temperature, *image.stride(), *baseline.stride(),
        *saliency.stride(), *out.stride()[:4], w, h * w, thresholds.shape[1], NORMALISE=len(mean) > 0, BLOCK=block,
        num_warps=WARPS,
    )  # fmt: skip
    return out


def soft_perturb_backward(
    grad: Tensor,  # [N, 2, K, C, H, W] contiguous
    image: Tensor,  # [N, C, H, W]
    baseline: Tensor,  # [N, C, H, W]
    saliency: Tensor,  # [N, H, W]
    thresholds: Tensor,  # [N, K] float32
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
    image_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to saliency, [N, H, W], and to the image, [N, C, H, W] (empty unless wanted)."""
    n, c, h, w = image.shape
    block = min(BACKWARD_BLOCK, triton.next_power_of_2(h * w))
    grad_saliency = torch.empty((n, h, w), dtype=saliency.dtype, device=image.device)
    grad_image = torch.empty((n, c, h, w) if image_wanted else 0, dtype=image.dtype, device=image.device)
    soft_backward_kernel[(n, triton.cdiv(h * w, block))](
        grad, image, baseline, saliency, thresholds, constants(tuple(std), image.device), grad_saliency, grad_image,
        1 / temperature, *image.stride(), *baseline.stride(), *saliency.stride(), *grad.stride()[:4], c, w, h * w,
        thresholds.shape[1], NORMALISE=len(mean) > 0, IMAGE=image_wanted, BLOCK=block, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return grad_saliency, grad_image
