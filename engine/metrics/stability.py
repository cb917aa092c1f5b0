"""How much a method's maps change with an image that hardly does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..showing import one_line
from .inputs import check_computed, check_images, sample_seeds

NEIGHBOUR_STREAM = 2**43  # beside the streams of ties, of noise and of subsets
Explain = Callable[[Tensor, Tensor], Tensor]  # images [B, C, H, W] and targets [B] to maps [B, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Changes of maps, on the CPU in float64.

    Attributes:
        maximum, mean: [N], the largest and the mean change over neighbours, relative to the map's own norm.
        changes: [N, S], of each neighbour.
    """

    maximum: Tensor
    mean: Tensor
    changes: Tensor

    __repr__ = one_line


def sensitivity(
    explain: Explain,
    images: Tensor,  # [N, C, H, W]
    saliency: Tensor,  # [N, ...], the maps of the images themselves
    target: Tensor,  # [N]
    *,
    radius: float = 0.2,
    samples: int = 10,
    noise: Tensor | None = None,  # [S, N, C, H, W]
    seeds: int | Sequence[int] = 0,
    batch_size: int = 64,
) -> Sensitivity:
    """Change of a method's maps under uniform noise: max- and avg-sensitivity at once, the lower the better.

    Args:
        explain: the method.
        radius: of the noise, in the images' unit. samples: neighbours of each image, from its seed.
        noise: what is added, in place of radius and samples.
        batch_size: images explained at once.

    Returns:
        NaN for a map that is zero everywhere.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: a neighbour's map holds NaN or infinity.

    Source: Yeh et al., On the (in)fidelity and sensitivity of explanations (arXiv 1901.09392), definition 3.1 by
        sampling. quantus.MaxSensitivity, quantus.AvgSensitivity.
    """
    check_images(images)
    n = len(images)
    if noise is None:
        if radius <= 0 or samples < 1:
            raise UsageError(f"radius, samples: expected numbers above 0, got {radius} and {samples}")
        drawn = []
        for seed in sample_seeds(seeds, n):
            g = torch.Generator().manual_seed(seed + NEIGHBOUR_STREAM)
            drawn.append(torch.rand(samples, *images.shape[1:], generator=g) * 2 * radius - radius)
        noise = torch.stack(drawn, 1) if drawn else torch.empty(samples, *images.shape)
    if noise.ndim != 5 or noise.shape[1:] != images.shape or not len(noise):
        raise UsageError(f"noise: expected [S, {', '.join(map(str, images.shape))}], got {list(noise.shape)}")
    moved = (images + noise.to(images)).flatten(0, 1)  # [S * N, C, H, W]
    wanted = target.repeat(len(noise))
    maps = torch.cat([explain(a, b) for a, b in zip(moved.split(batch_size), wanted.split(batch_size), strict=True)])
    if maps.shape[1:] != saliency.shape[1:] or len(maps) != len(moved):
        raise UsageError(
            f"explain: expected maps [{len(moved)}, ...] as {list(saliency.shape)}, got {list(maps.shape)}"
        )
    check_computed("explain", maps, torch.arange(n).repeat(len(noise)))
    own = saliency.detach().double().flatten(1).cpu()
    changed = maps.detach().double().cpu().reshape(len(noise), n, own.shape[1]) - own
    changes = (changed.norm(dim=2) / own.norm(dim=1)).T
    return Sensitivity(changes.amax(1), changes.mean(1), changes)
