"""COUT: how soon the classifier changes its mind on the way from an image to its counterfactual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..showing import one_line
from .curves import Score, evaluate, make_plan, perturbing
from .inputs import (
    Ties,
    check_computed,
    check_images,
    check_normalisation,
    constant_maps,
    rank_planes,
    saliency_planes,
    sample_seeds,
)
from .paths import score_of
from .quantities import Explained, QuantityLike, check_targets


@dataclass(frozen=True)
class Transition:
    """COUT of N counterfactuals, on the CPU in float64.

    Attributes:
        score: [N] in [-1, 1]: area under the target's curve minus that under the source's; higher is better.
        target_values, source_values: [N, K], the quantity of the two classes along the way.
        shares: [K], the share of pixels taken from the counterfactual, 0 first.
        source, target: [N], the classes.
        forwards: images that went through the classifier. asked: without leaving out equal masks.
    """

    score: Tensor
    target_values: Tensor
    source_values: Tensor
    shares: Tensor
    source: Tensor
    target: Tensor
    forwards: int
    asked: int

    __repr__ = one_line


def cout(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    counterfactuals: Tensor,  # [N, C, H, W] in [0, 1]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    source: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    steps: int = 50,
    quantity: QuantityLike = "probability",
    compat: Literal["ace"] | None = None,
    ties: Ties | None = None,
    seeds: int | Sequence[int] = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    backend: str = "auto",
) -> Transition:
    """Turn images into their counterfactuals, the most changed pixels (sum of |difference| over channels) first.

    Args:
        target: classes of the counterfactuals; what the classifier says of them by default.
        source: classes of the images; what the classifier says of them by default.
        steps: groups of pixels of (nearly) equal size; the trapezoid is taken over their true shares.
        compat: `ace` takes groups of H * W // 50 pixels, counts the last one as whole, and breaks ties by index.
        classifier, quantity, ties, seeds, mean, std, batch_size, backend: as for `perturbation_curve`.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: Khorram and Fuxin, Cycle-consistent counterfactuals by latent transformations (arXiv 2203.15064), section
        4.1; compat: Jeanneret et al., ACE (arXiv 2303.09962).
    """
    check_images(images)
    check_normalisation(mean, std, images.shape[1])
    if not isinstance(counterfactuals, Tensor) or counterfactuals.shape != images.shape:
        got = list(counterfactuals.shape) if isinstance(counterfactuals, Tensor) else type(counterfactuals).__name__
        raise UsageError(f"counterfactuals: expected {list(images.shape)} as the images, got {got}")
    if compat not in (None, "ace"):
        raise UsageError(f"compat: cout has ace, got {compat!r}")
    if steps < 1:
        raise UsageError(f"steps: expected at least 1, got {steps}")
    explained = Explained(classifier, quantity)
    n, _, h, w = images.shape
    pixels = h * w
    chosen = sample_seeds(seeds, n)
    there = counterfactuals.to(images.device, images.dtype)
    planes = saliency_planes((there - images).abs().sum(1), images, "together")
    constant_maps(planes, "counterfactuals: {count} of {all} differ from their images evenly, or not at all")
    rank = rank_planes(planes, ties or ("first" if compat == "ace" else "random"), chosen)
    if compat == "ace":
        group = max(1, pixels // 50)
        changed = torch.arange(0, pixels + group, group).clamp(max=pixels)
        shares = torch.arange(len(changed)).double() * group / pixels
    else:
        changed = torch.from_numpy(np.floor(np.linspace(0, pixels, steps + 1) + 0.5).astype(np.int64)).unique()
        shares = changed.double() / pixels
    ready, fill = perturbing(images, there, rank, mean=mean, std=std, backend=backend)
    plan = make_plan(changed.expand(n, -1), pixels, "below")
    ends: list[Tensor] = []

    def score(logits: Tensor) -> Score:
        ends.append(check_targets(source, logits))
        if target is not None:
            ends.append(check_targets(target, logits))
        return lambda part, samples: part  # logits: the target may be what the last image of the way is taken for

    values = evaluate(explained, ready, plan, fill, score, batch_size)
    if target is None:
        ends.append(values[plan.place[:, 0, -1].to(values.device)].argmax(1))
    rows = values[plan.place[:, 0].to(values.device)]  # [N, K, classes]
    flat, k = rows.flatten(0, 1), rows.shape[1]
    of = [explained(flat, end.repeat_interleave(k)).view(n, k).double().cpu() for end in ends]
    for value in of:
        check_computed("classifier", value)
    zero = torch.zeros(n, dtype=torch.float64)
    if compat == "ace":
        areas = [score_of(v, shares, zero, "steps") * group / pixels for v in of]
    else:
        areas = [score_of(v, shares, zero, "trapezoid") for v in of]
    return Transition(
        areas[1] - areas[0], of[1], of[0], shares, ends[0].cpu(), ends[1].cpu(), len(values), n + plan.place.numel()
    )
