"""Scores of perturbation curves: from the logits of perturbed images to the terms of MSI in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from counterlens.kernels.curve import reference as _reference
from counterlens.kernels.dispatch import (
    FLOATING,
    choose_backend,
    compute_dtype,
    cpu_module,
    define_op,
    tensor_reasons,
    values_readable,
)
from counterlens.kernels.thresholds import check_thresholds

__all__ = ["CurveScores", "curve_scores", "not_supported_reasons"]


class CurveScores(NamedTuple):
    """Terms of MSI, in float32 (float64 for float64 logits)."""

    probability: Tensor  # [N, 2, K], of the target; index 0 = keep (Ins), 1 = remove (Del)
    insertion: Tensor  # [N], the MSI sufficiency term: half Ins at the first threshold, half Ins averaged over all
    deletion: Tensor  # [N], the necessity term: likewise for Del, the lower the better
    base_score: Tensor  # [N], insertion - deletion, in [-1, 1]


def not_supported_reasons(
    backend: str,
    logits: Tensor,
) -> list[str]:
    """Why `backend` cannot score `logits`; empty when it can."""
    return tensor_reasons(backend, "logits", logits)


def _scores(
    logits: Tensor,
    targets: Tensor,
    thresholds: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled versions; arguments are checked."""
    if backend == "triton":
        from counterlens.kernels.curve import triton as _triton

        return _triton.curve_scores(logits, targets, thresholds)
    n, _, k, classes = logits.shape
    compute = compute_dtype(logits.dtype)
    rows = logits.to(compute).contiguous()
    probability = torch.empty((n, 2, k), dtype=compute)
    insertion, deletion = torch.empty(n, dtype=compute), torch.empty(n, dtype=compute)
    function = cpu_module().curve_scores_f64 if compute == torch.float64 else cpu_module().curve_scores_f32
    function(
        rows.data_ptr(), targets.data_ptr(), thresholds.data_ptr(), probability.data_ptr(), insertion.data_ptr(),
        deletion.data_ptr(), n, k, classes, torch.get_num_threads(),
    )  # fmt: skip
    return probability, insertion, deletion


def _fake(logits: Tensor, targets: Tensor, thresholds: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(logits.dtype)
    n = logits.shape[0]
    return (
        logits.new_empty(logits.shape[:3], dtype=compute),
        logits.new_empty(n, dtype=compute),
        logits.new_empty(n, dtype=compute),
    )


define_op(
    "curve_scores(Tensor logits, Tensor targets, Tensor thresholds, str backend) -> (Tensor, Tensor, Tensor)",
    _scores,
    _fake,
)


def curve_scores(
    logits: Tensor,  # [N, 2, K, classes]
    targets: Tensor,  # [N]
    thresholds: Tensor | Sequence[float],  # [K] or [N, K]
    *,
    trusted: bool = False,
    backend: str = "auto",
) -> CurveScores:
    """Probability of the target on every perturbed image, and the MSI terms of the two curves.

    BaseScore = (D(first) + mean of D) / 2 with D = Ins - Del; the mean is the trapezoid rule on the thresholds as they
    are, over the range that they cover. One threshold: D itself. The mask penalty needs the saliency map and is not
    part of this. Logits may hold anything: infinite ones share the probability, NaN stays in its curve.

    Args:
        logits: [N, 2, K, classes], of the images that `perturb(keep="both")` makes.
        targets: [N], the explained class, int64.
        thresholds: [K] or [N, K], strictly increasing in [0, 1], as they were given to `perturb`.
        trusted: targets and thresholds on a GPU are known to be right: looking would wait for the device. A target that
            is no class then has NaN for a probability.
        backend: `auto`, `triton`, `cpp` or `reference`. Only reference can be differentiated through.

    Raises:
        ValueError: shapes, devices, targets or thresholds do not fit. TypeError: dtypes do not fit.
        BackendError: the named backend cannot run; the message says why.

    Source: MSI (arXiv 2605.18681), the base score.
    """
    if logits.ndim != 4 or logits.shape[1] != 2 or logits.shape[2] == 0 or logits.shape[3] == 0:
        raise ValueError(f"logits: expected [N, 2, K, classes] with K and classes at least 1, got {list(logits.shape)}")
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")
    n, _, k, classes = logits.shape
    if targets.shape != (n,):
        raise ValueError(f"targets: expected [{n}], got {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if targets.device != logits.device:
        raise ValueError(f"targets: expected logits' device {logits.device}, got {targets.device}")
    if n and values_readable(targets) and not (trusted and targets.is_cuda):
        lowest, highest = int(targets.amin()), int(targets.amax())
        if lowest < 0 or highest >= classes:
            raise ValueError(f"targets: expected classes from 0 to {classes - 1}, got {lowest} to {highest}")
    alphas = check_thresholds(thresholds, n, logits.device, trusted)
    if alphas.shape[1] != k:
        raise ValueError(f"thresholds: expected {k} of them as in logits {list(logits.shape)}, got {alphas.shape[1]}")
    compute = compute_dtype(logits.dtype)
    alphas = alphas.to(compute).contiguous()
    chosen = choose_backend("curve_scores", backend, logits, lambda name: not_supported_reasons(name, logits))
    if chosen == "reference" or n == 0:
        probability, insertion, deletion = _reference.curve_scores(logits.to(compute), targets, alphas)
    else:
        probability, insertion, deletion = torch.ops.counterlens.curve_scores(
            logits, targets.contiguous(), alphas, chosen
        )
    return CurveScores(probability, insertion, deletion, insertion - deletion)
