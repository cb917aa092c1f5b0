"""Choosing MSI's alpha_min once, on a validation split, before any methods are compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterlens.export.versions import versions
from counterlens.kernels.curve.reference import mean_under_curve

from ..errors import UsageError
from ..files import write_atomically
from ..models.holding import switched
from ..showing import one_line
from .curves import Curves, perturbation_curve
from .inputs import Baseline, Normalize, said
from .msi_score import threshold_grid
from .quantities import QuantityLike

CANDIDATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RULE = (
    "the alpha_min at which MSI best tells the maps of a reference method from the same maps given to other images: "
    "largest mean over standard deviation of the paired difference, the smallest alpha_min of equals"
)
FORMAT = "counterlens-msi-calibration"


@dataclass(frozen=True)
class Candidate:
    """One alpha_min: the effect it was chosen by, and the mean MSI of an image's own and of another image's map."""

    alpha_min: float
    effect: float
    own: float
    other: float


@dataclass(frozen=True)
class Calibration:
    """A frozen alpha_min and how it was chosen.

    Attributes:
        alpha_min, steps, penalty: for `msi`. candidates: what it was chosen from. images: how many there were.
        forwards: images that went through the classifier.
    """

    alpha_min: float
    steps: int
    penalty: float
    candidates: list[Candidate]
    images: int
    forwards: int

    __repr__ = one_line

    def save(self, path: str | Path, **facts: Any) -> dict[str, Any]:
        """Write JSON with the choice, the rule and whatever else says on what it was made; returns the same.

        Raises:
            CounterlensError: the file cannot be written.
        """
        content = {
            "format": FORMAT, "alpha_min": self.alpha_min, "steps": self.steps, "penalty": self.penalty, "rule": RULE,
            "images": self.images, **facts, "candidates": [vars(c) for c in self.candidates],
            "versions": versions(("counterlens", "torch")),
        }  # fmt: skip
        write_atomically(Path(path), json.dumps(content, indent=1) + "\n")
        return content


def load_alpha_min(path: str | Path) -> float:
    """The alpha_min that `counterlens metrics calibrate` froze in a file.

    Raises:
        UsageError: the file cannot be read, or is not one of those.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    value = content.get("alpha_min") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UsageError(f"{path}: not a file that `counterlens metrics calibrate` wrote")
    return float(value)


def calibrate(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1], of a validation split
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W], of a reference method
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    candidates: Sequence[float] = CANDIDATES,
    steps: int = 16,
    penalty: float = 1.0,
    quantity: QuantityLike = "probability",
    baseline: Baseline = "mean",
    normalize: Normalize = "minmax",
    seeds: int | Sequence[int] = 0,
    batch_size: int = 64,
) -> Calibration:
    """Choose alpha_min: MSI should be high for a map of the image and low for the same map of another image.

    Another image's map has the same values and areas, so the choice is about sense and not about size. Every image gets
    the map of the one after it; all candidates are read off one run of curves.

    Args:
        candidates: values of alpha_min to choose from, in [0, 1].
        classifier, images, saliency, target, steps, penalty, quantity, baseline, normalize, seeds, batch_size: as for
            `msi`.

    Raises:
        UsageError: an argument does not fit, there are fewer than two images, or the maps say nothing about them; the
            message names it.
    """
    if not len(candidates):
        raise UsageError("candidates: expected at least one alpha_min")
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) < 2:
        raise UsageError("images: expected at least two, [N, C, H, W]")
    grids = [threshold_grid(a, steps) for a in sorted(set(candidates))]
    union, place = torch.cat(grids).unique(return_inverse=True)
    shared: dict[str, Any] = {
        "quantity": quantity, "baseline": baseline, "normalize": normalize, "seeds": seeds, "batch_size": batch_size,
        "thresholds": union,
    }  # fmt: skip
    own = perturbation_curve(classifier, images, saliency, target, **shared)
    with switched(said, True):  # the same maps
        other = perturbation_curve(classifier, images, saliency.roll(-1, 0), own.target, **shared)
    rows = []
    for grid, columns in zip(grids, place.split([len(g) for g in grids]), strict=True):
        a, b = (_score(c, grid, columns, penalty) for c in (own, other))
        difference = a - b
        spread = difference.std().item()
        effect = difference.mean().item() / spread if spread > 0 else 0.0
        rows.append(Candidate(float(grid[0]), effect, a.mean().item(), b.mean().item()))
    best = max(rows, key=lambda row: (row.effect, -row.alpha_min))
    if all(row.own == row.other for row in rows):
        raise UsageError(
            "saliency: MSI is the same for an image's own map and for another image's at every alpha_min; the maps say "
            "nothing about the images"
        )
    return Calibration(best.alpha_min, steps, penalty, rows, len(images), own.forwards + other.forwards)


def _score(curves: Curves, grid: Tensor, columns: Tensor, penalty: float) -> Tensor:
    """MSI [N] from a few columns of longer curves."""
    assert curves.keep is not None
    assert curves.remove is not None
    levels = grid.expand(len(curves.keep), -1)
    base = mean_under_curve(curves.keep[:, columns] - curves.remove[:, columns], levels)
    return base - penalty * curves.areas[:, columns[0]]
