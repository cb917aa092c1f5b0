"""Thresholds of a perturbation curve, checked once for every operation that takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterlens.kernels.dispatch import values_readable


def check_thresholds(
    thresholds: Tensor | Sequence[float], samples: int, device: torch.device, trusted: bool = False
) -> Tensor:
    """Thresholds as a tensor on `device`, [N, K] (a view where one row serves all samples).

    Raises:
        ValueError: the shape is neither [K] nor [N, K], or values are not strictly increasing in [0, 1] (checked where
            values can be read and are not `trusted`). TypeError: not a floating dtype.
    """
    if not isinstance(thresholds, Tensor):
        thresholds = torch.tensor(thresholds, dtype=torch.float64)
    if not thresholds.is_floating_point():
        raise TypeError(f"thresholds: expected a floating dtype, got {thresholds.dtype}")
    shape = list(thresholds.shape)
    if len(shape) not in (1, 2) or shape[-1] == 0 or (len(shape) == 2 and shape[0] != samples):
        raise ValueError(f"thresholds: expected [K] or [{samples}, K] with K at least 1, got {shape}")
    if values_readable(thresholds) and not (trusted and thresholds.is_cuda):
        values = thresholds.detach()
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"thresholds: expected values in [0, 1], got {values.tolist()}")
        if not bool((values.diff() > 0).all()):
            raise ValueError(f"thresholds: expected strictly increasing values, got {values.tolist()}")
    return thresholds.to(device).expand(samples, -1)
