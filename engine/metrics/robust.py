"""Maps moved by a pixel or smoothed: what a pattern that nobody can see does not survive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .table import METRICS

SHIFTS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))
BRITTLE = 0.1  # what a score between 0 and 1 may lose when its map is moved by one pixel


def shifted(
    saliency: Tensor,  # [N, H, W]
    dy: int,
    dx: int,
) -> Tensor:
    """Maps moved by whole pixels down and right, their border repeated: [N, H, W].

    Raises:
        UsageError: they are moved by their whole size or more.
    """
    h, w = saliency.shape[1:]
    if abs(dy) >= h or abs(dx) >= w:
        raise UsageError(f"shift: expected less than the map's size {h}x{w}, got {dy}, {dx}")
    rows = (torch.arange(h, device=saliency.device) - dy).clamp(0, h - 1)
    columns = (torch.arange(w, device=saliency.device) - dx).clamp(0, w - 1)
    return saliency[:, rows][:, :, columns]


def neighbours(saliency: Tensor) -> Iterator[Tensor]:
    """Maps [N, H, W] moved by one pixel in each of eight directions, none where they are one pixel wide."""
    for dy, dx in SHIFTS:
        if abs(dy) < saliency.shape[1] and abs(dx) < saliency.shape[2]:
            yield shifted(saliency, dy, dx)


def smooth(
    saliency: Tensor,  # [N, H, W]
) -> Tensor:
    """3x3 means of maps, their border repeated: [N, H, W]."""
    return F.avg_pool2d(F.pad(saliency[:, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[:, 0]


def fall(
    before: Tensor,  # [N]
    after: Tensor,  # [N]
    higher_is_better: bool,
) -> float:
    """How much worse a mean score became, in its own unit; below 0 where it became better."""
    difference = float(before.mean() - after.mean())
    return difference if higher_is_better else -difference


def brittle(values: Mapping[str, Tensor], limit: float = BRITTLE) -> dict[str, float]:
    """What each score [N] loses on average when its map is moved by one pixel, by metric, where that is much."""
    falls = {
        name: fall(before, values[f"{name}_moved"], bool(METRICS[name].higher_is_better))
        for name, before in values.items()
        if f"{name}_moved" in values
    }
    return {name: value for name, value in falls.items() if value > limit}
