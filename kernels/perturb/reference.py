"""Perturbed images in plain torch, to be read next to the formulas of MSI and LAX: the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_pixels(
    saliency: Tensor,  # [N, H, W]
    permutations: Tensor,  # [N, H*W] int64: a permutation of the pixels per sample, which breaks ties
) -> Tensor:
    """Rank of every pixel in its sample, descending, 0 most salient: [N, H, W] int64."""
    shuffled = saliency.flatten(1).gather(1, permutations)  # [N, H*W]
    order = permutations.gather(1, shuffled.argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return rank.reshape(saliency.shape)


def rank_counts(
    thresholds: Tensor,  # [..., K]
    pixels: int,
) -> Tensor:
    """How many pixels each threshold shows: (1 - threshold) * pixels, halves rounded up, [..., K] int64."""
    return torch.floor((1 - thresholds.double()) * pixels + 0.5).long()


def normalised(
    image: Tensor,  # [N, C, H, W]
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """(image - mean) / std per channel; the image itself where there is no mean: [N, C, H, W]."""
    if not mean:
        return image
    shift = torch.tensor(mean, dtype=image.dtype, device=image.device)[:, None, None]
    return (image - shift) / torch.tensor(std, dtype=image.dtype, device=image.device)[:, None, None]


def perturb(
    image: Tensor,  # [N, C, H, W] float32 or float64
    baseline: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N, H, W]
    limits: Tensor,  # [N, K]; key >= limit shows the image
    mean: Sequence[float],
    std: Sequence[float],
    above: bool,
    below: bool,
) -> Tensor:
    """See `counterlens.kernels.perturb.perturb`, which checks the arguments: [N, sides, K, C, H, W]."""
    shown = (key[:, None] >= limits[:, :, None, None])[:, :, None]  # [N, K, 1, H, W]
    x, b = normalised(image, mean, std)[:, None], normalised(baseline, mean, std)[:, None]  # [N, 1, C, H, W]
    sides = [torch.where(shown, x, b)] * above + [torch.where(shown, b, x)] * below
    return torch.stack(sides, 1)


def soft_perturb(
    image: Tensor,  # [N, C, H, W] float32 or float64
    baseline: Tensor,  # [N, C, H, W]
    saliency: Tensor,  # [N, H, W]
    thresholds: Tensor,  # [N, K]
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """See `counterlens.kernels.perturb.soft_perturb`, which checks the arguments: [N, 2, K, C, H, W]."""
    m = torch.sigmoid((saliency[:, None] - thresholds[:, :, None, None]) / temperature)[:, :, None]  # [N, K, 1, H, W]
    x, b = normalised(image, mean, std)[:, None], normalised(baseline, mean, std)[:, None]  # [N, 1, C, H, W]
    return torch.stack([m * x + (1 - m) * b, (1 - m) * x + m * b], 1)
