"""Scores of perturbation curves in plain torch, to be read next to the formulas of MSI: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def target_probability(
    logits: Tensor,  # [..., classes] float32 or float64
    targets: Tensor,  # [...] int64
) -> Tensor:
    """Softmax at the target, [...]. Infinite logits share the probability; where all are -inf, it is uniform."""
    largest = logits.amax(-1, keepdim=True)
    shifted = torch.where(logits == largest, 0.0, logits - largest)  # inf - inf would be NaN
    at_target = shifted.gather(-1, targets[..., None])
    return (at_target.exp() / shifted.exp().sum(-1, keepdim=True)).squeeze(-1)


def mean_under_curve(
    values: Tensor,  # [N, K]
    thresholds: Tensor,  # [N, K]
) -> Tensor:
    """Half the first value and half the curve's mean by the trapezoid rule; the first value where K is 1: [N]."""
    if values.shape[1] == 1:
        return values[:, 0]
    span = thresholds[:, -1] - thresholds[:, 0]
    return (values[:, 0] + torch.trapezoid(values, thresholds) / span) / 2


def curve_scores(
    logits: Tensor,  # [N, 2, K, classes] float32 or float64
    targets: Tensor,  # [N] int64
    thresholds: Tensor,  # [N, K]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `counterlens.kernels.curve.curve_scores`, which checks the arguments."""
    probability = target_probability(logits, targets[:, None, None].expand(logits.shape[:3]))  # [N, 2, K]
    insertion = mean_under_curve(probability[:, 0], thresholds)
    deletion = mean_under_curve(probability[:, 1], thresholds)
    return probability, insertion, deletion
