"""Regions: only there may a sample change. Outside, its latents are the noised original at every step.

A region is a mask over the image's pixels, [H, W] bool. A location of the latents is free if any of its pixels lies in
the region, so that every pixel of the region can change; all others are put back after each step. What the decoder
makes of it is laid over the image inside the region alone, with an edge that fades inwards: outside, pixels are the
image's own, bit by bit.

`auto` finds the region itself. Guidance is what was added to the unconditional noise, after the consensus filter; where
it is strong in the first guided steps, the image is about to change. The region is the smallest set of locations that
holds `SHARE` of its magnitude, smoothed over the locations beside each. At the end what hardly changed is taken out of
it: of the differences from what encoding and decoding alone make of the image, those above `CHANGED` of the largest
stay, and what lies so near to them that the faded edge would reach them. (MaskDiME and RCSB restrict counterfactuals to
regions, too; how they are found is ours.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import add_noise

Region = Tensor | Literal["auto"]  # [H, W] bool
LOOKS = 0.4  # share of the guided steps after which `auto` decides
SHARE = 0.95  # of their guidance
CHANGED = 0.5  # of the sample's largest change, in any channel
LEVEL = 1 / 255  # of files; what differs less has not changed
FADE = 64  # the edge is one pixel wide for so many pixels of the image's shorter side, and at least one


def free_latents(
    mask: Tensor,  # [H, W] bool
    size: tuple[int, int],  # of the latents
) -> Tensor:
    """Locations with any pixel in the region: [h, w] bool."""
    return F.adaptive_max_pool2d(mask[None].float(), size)[0] > 0


def fade_width(mask: Tensor) -> int:
    """Pixels over which a region's edge fades, of a mask [H, W]."""
    return max(1, min(mask.shape) // FADE)


def weights(
    mask: Tensor,  # [H, W] bool
) -> Tensor:
    """How much of what was made is shown: [H, W], 0 outside, 1 inside, rising in steps over the edge within.

    The image's border is no edge: a region that holds the whole image fades nowhere.
    """
    width = fade_width(mask)
    left = mask[None].float()
    out = left.clone()
    for _ in range(width):
        left = 1 - F.max_pool2d(1 - left, 3, stride=1, padding=1)  # without its outermost pixels
        out += left
    return out[0] / (width + 1)


def compose(
    image: Tensor,  # [3, H, W] in [0, 1]
    made: Tensor,  # [3, H, W] in [0, 1]
    mask: Tensor,  # [H, W] bool
) -> Tensor:
    """What was made inside the region, the image itself outside, bit by bit: [3, H, W]."""
    w = weights(mask).to(made)
    blended = torch.where(w == 1, made, image + w * (made - image))
    return torch.where(mask, blended, image)


def strongest(
    guidance: Tensor,  # [h, w], magnitudes
    size: Sequence[int],  # of the image
) -> Tensor:
    """The smallest set of locations that holds `SHARE` of the guidance, smoothed, as pixels: [H, W] bool."""
    line = guidance.new_tensor([1.0, 2.0, 1.0])
    near = torch.outer(line, line)[None, None]
    there = F.conv2d(torch.ones_like(guidance)[None, None], near, padding=1)
    smooth = (F.conv2d(guidance[None, None], near, padding=1) / there)[0, 0]
    falling, order = smooth.flatten().sort(descending=True, stable=True)
    before = falling.cumsum(0) - falling
    chosen = torch.zeros(guidance.numel(), device=guidance.device)
    chosen[order[before < SHARE * falling.sum()]] = 1.0
    return F.interpolate(chosen.reshape(1, 1, *guidance.shape), tuple(size))[0, 0] > 0


@dataclass
class Held:
    """One sample's region while it runs.

    Attributes:
        mask: [H, W] bool; None until `auto` has found it.
        latents: of the image, [C, h, w].
        noise: that they were noised with, [C, h, w]; None for an inversion.
        trajectory: of an inversion, the latents [C, h, w] at which each step of the schedule arrives.
        looks: guided steps that `auto` still waits for.
        auto: the mask was not given.
    """

    mask: Tensor | None
    latents: Tensor
    noise: Tensor | None = None
    trajectory: dict[int, Tensor] = field(default_factory=dict)
    looks: int = 1
    auto: bool = False
    _free: Tensor | None = None  # [h, w] bool, of the mask
    _seen: Tensor | None = None  # [h, w], guidance of the guided steps so far

    def put_back(
        self,
        z: Tensor,  # [C, h, w], after a step
        z0: Tensor,  # [C, h, w]
        step: int,
        abar: Tensor,  # [], where the step arrives
    ) -> tuple[Tensor, Tensor]:
        """Both with the image's own latents outside the region, noised for z.

        Solvers with a memory need no more: their steps mix no two locations, and what is outside is put back anyway.
        """
        if self.mask is None:
            return z, z0
        there = self.trajectory[step] if self.noise is None else add_noise(self.latents, self.noise, abar[None])[0]
        return self.inside(z, there), self.inside(z0, self.latents)

    def inside(
        self,
        z: Tensor,  # [C, h, w]
        there: Tensor,  # [C, h, w]
    ) -> Tensor:
        """`z` where it may change, what is there elsewhere."""
        if self.mask is None:
            return z
        if self._free is None:
            self._free = free_latents(self.mask, (z.shape[-2], z.shape[-1])).to(z.device)
        return torch.where(self._free, z, there)

    def look(
        self,
        guidance: Tensor,  # [C, h, w], added to the unconditional noise
        size: Sequence[int],  # of the image
    ) -> None:
        """Take a guided step into account, and decide after the last one."""
        strength = guidance.float().square().sum(dim=0).sqrt()
        self._seen = strength if self._seen is None else self._seen + strength
        self.looks -= 1
        if self.looks == 0:
            self.decide(size)

    def decide(self, size: Sequence[int]) -> None:
        """Let `auto` take the guided steps that there were, of a run that ends before the last that it waits for."""
        if self.mask is None and self._seen is not None:
            self.mask = strongest(self._seen, size)


def hold(region: Region | None, latents: Tensor, guided: Sequence[bool]) -> Held | None:
    """A sample's region, or None; `latents` [C, h, w] are its image's, `guided` says which of its steps are."""
    if region is None:
        return None
    looks = max(1, math.ceil(LOOKS * sum(guided) - 1e-9))
    return Held(region if isinstance(region, Tensor) else None, latents, looks=looks, auto=isinstance(region, str))


def guidance_of(
    z: Tensor,  # [B, C, h, w], before a step
    z0: Tensor,  # [B, C, h, w], what the guided noise of the step implies
    eps_u: Tensor,  # [B, C, h, w]
    abar: Tensor,  # [B]
) -> Tensor:
    """What guidance added to the unconditional noise, [B, C, h, w]."""
    abar = abar.reshape(-1, 1, 1, 1)
    return (z - abar.sqrt() * z0) / (1 - abar).sqrt() - eps_u


def narrow(
    regions: Mapping[int, Held],  # by row
    made: Tensor,  # [B, 3, H, W], as decoded
    decode: Callable[[Tensor], Tensor],
) -> None:
    """Take out of the regions that `auto` found what hardly changed; where nothing did at all, they stay."""
    found = {row: region.mask for row, region in regions.items() if region.auto and region.mask is not None}
    if not found:
        return
    latents = regions[next(iter(found))].latents
    z = latents.new_zeros(len(made), *latents.shape)
    for row in found:
        z[row] = regions[row].latents
    change = (made - (decode(z) + 1) / 2).abs().amax(dim=1)  # [B, H, W]
    for row, mask in found.items():
        inside = torch.where(mask, change[row], 0.0)
        reach = fade_width(mask) + 1
        strong = (inside > (CHANGED * inside.max()).clamp(min=LEVEL)).float()
        near = F.max_pool2d(strong[None], 2 * reach + 1, stride=1, padding=reach)[0] > 0
        if (mask & near).any():
            regions[row].mask = mask & near
