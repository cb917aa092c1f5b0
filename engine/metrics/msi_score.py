"""MSI: one number for how sufficient, necessary and small the marked part of an image is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counterlens.kernels.curve.reference import mean_under_curve

from ..errors import UsageError
from ..showing import one_line
from .curves import Curves, marked_counts, perturbing, run
from .inputs import (
    Baseline,
    Channels,
    Normalize,
    check_images,
    check_normalisation,
    constant_maps,
    make_baseline,
    rank_planes,
    saliency_planes,
    sample_seeds,
)
from .quantities import Explained, QuantityLike


@dataclass(frozen=True)
class MSI:
    """Scores of N saliency maps, on the CPU in float64.

    Attributes:
        score: [N] in [-2, 1] for `penalty=1` and a quantity in [0, 1]: base_score - mask_penalty.
        base_score: [N] in [-1, 1]: half of Ins - Del at alpha_min, half of its mean over the thresholds.
        mask_penalty: [N], `penalty` times the share of pixels marked at alpha_min.
        sufficiency, necessity: [N], the two terms of base_score, of Ins and of Del (the lower the better). Quantus uses
            "sufficiency" for something else.
        base_score_area: [N], base_score with the most salient (1 - alpha) of the pixels marked, whatever their values:
            it cannot be raised by stretching the contrast. NaN without `area`.
        sufficient_area: [N], the smallest share of pixels on that grid with Ins - Del of at least one half; 1 where
            there is none. NaN without `area`.
        curves: the thresholds and both curves. area_curves: those of the area form, None without `area`.
        alpha_min, steps, penalty: what it was computed with.
    """

    score: Tensor
    base_score: Tensor
    mask_penalty: Tensor
    sufficiency: Tensor
    necessity: Tensor
    base_score_area: Tensor
    sufficient_area: Tensor
    curves: Curves
    area_curves: Curves | None
    alpha_min: float
    steps: int
    penalty: float

    __repr__ = one_line


def msi(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    alpha_min: float = 0.5,
    steps: int = 16,
    penalty: float = 1.0,
    area: bool = True,
    scores: Tensor | None = None,  # [N, H, W] or [N, 1, H, W]
    quantity: QuantityLike = "probability",
    baseline: Baseline = "mean",
    normalize: Normalize = "minmax",
    channels: Channels = "together",
    seeds: int | Sequence[int] = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    backend: str = "auto",
) -> MSI:
    """Score saliency maps: what they mark should be enough for the classifier, be needed by it, and be small.

    With M = [S >= alpha], Ins(alpha) = p(M x + (1 - M) b) and Del(alpha) = p((1 - M) x + M b), on the grid
    linspace(alpha_min, 1, steps). One step, or alpha_min = 1: the base score is Ins - Del there. A constant map marks
    nothing. The area form comes from the same forward batches.

    Args:
        quantity: something in [0, 1], or the score's range is another: `probability`, or `group_odds(...)`.
        alpha_min: freeze it on a validation split before methods are compared (`counterlens metrics calibrate`).
        steps: K, at least 1. penalty: lambda, 0 or more. area: whether to evaluate the area form as well.
        scores: what `saliency` was made of, such as the logits of a saturated map: they order its equal pixels, and so
            decide the area form there. Without them, those stand in the order of ties.
        classifier, images, saliency, target, baseline, normalize, channels, seeds, mean, std, batch_size, backend: as
            for `perturbation_curve`.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: MSI (Singh et al., arXiv 2605.18681); the area form is ours.
    """
    check_images(images)
    check_normalisation(mean, std, images.shape[1])
    levels = threshold_grid(alpha_min, steps)
    if not penalty >= 0:
        raise UsageError(f"penalty: expected 0 or more, got {penalty}")
    explained = Explained(classifier, quantity)
    n, k = len(images), len(levels)
    chosen = sample_seeds(seeds, n)
    planes = saliency_planes(saliency, images, channels)
    constant = constant_maps(planes)
    pixels = planes[0].numel() if n else 1
    grid = levels.expand(n, -1)
    marked = marked_counts(planes, constant, grid, "value", normalize)
    if area:
        # Masks of both forms are sets of the first pixels of one order: equal ones are evaluated once.
        marked = torch.cat([marked, marked_counts(planes, constant, grid, "rank", normalize)], 1)
    finer = None if scores is None else saliency_planes(scores, images, channels)
    rank = rank_planes(planes, "random", chosen, finer)
    hidden = make_baseline(baseline, images, chosen)
    ready, fill = perturbing(images, hidden, rank, mean=mean, std=std, backend=backend)
    targets, values, plan = run(explained, ready, marked, pixels, "both", fill, target, batch_size)
    sides, areas = values[plan.place], marked.double() / pixels  # [N, 2, K or 2 K]

    def curves(part: slice) -> Curves:
        return Curves(
            target=targets, full=values[:n], abscissae=grid, areas=areas[:, part], keep=sides[:, 0, part],
            remove=sides[:, 1, part], constant=constant.cpu(), forwards=len(values), asked=n + plan.place.numel(),
        )  # fmt: skip

    by_value, by_area = curves(slice(0, k)), curves(slice(k, None)) if area else None
    sufficiency, necessity = _terms(by_value)
    mask_penalty = penalty * areas[:, 0]
    nowhere = torch.full((n,), torch.nan, dtype=torch.float64)
    base_area, sufficient = nowhere, nowhere
    if by_area is not None:
        ins, out = _terms(by_area)
        base_area, sufficient = ins - out, _sufficient_area(by_area)
    base = sufficiency - necessity
    return MSI(
        base - mask_penalty, base, mask_penalty, sufficiency, necessity, base_area, sufficient, by_value, by_area,
        float(alpha_min), steps, float(penalty),
    )  # fmt: skip


def threshold_grid(alpha_min: float, steps: int) -> Tensor:
    """Thresholds from alpha_min to 1, both ends included: [K] float64; one where steps is 1 or alpha_min is 1.

    Raises:
        UsageError: alpha_min is outside [0, 1], or steps is below 1.
    """
    if not 0 <= alpha_min <= 1:
        raise UsageError(f"alpha_min: expected a number in [0, 1], got {alpha_min}")
    if not isinstance(steps, int) or steps < 1:
        raise UsageError(f"steps: expected a whole number, at least one threshold, got {steps}")
    return torch.linspace(alpha_min, 1, 1 if alpha_min == 1 else steps, dtype=torch.float64)


def _terms(curves: Curves) -> tuple[Tensor, Tensor]:
    """Half the first value and half the mean of Ins and of Del, each [N]."""
    assert curves.keep is not None
    assert curves.remove is not None
    return mean_under_curve(curves.keep, curves.abscissae), mean_under_curve(curves.remove, curves.abscissae)


def _sufficient_area(curves: Curves) -> Tensor:
    """The smallest share of pixels with Ins - Del of at least one half, 1 where there is none: [N]."""
    assert curves.keep is not None
    assert curves.remove is not None
    enough = curves.keep - curves.remove >= 0.5
    return curves.areas.masked_fill(~enough, 1.0).amin(1)
