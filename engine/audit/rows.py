"""The rows of a part: predictions, counterfactuals, saliency, judges, insight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..images.files import as_saved
from .results import GRID

CHANGED = 0.1  # mean absolute difference over channels from which a pixel counts as changed
AWAY = 2  # likeliest other labels that are tried for the smallest change away from a wrong prediction


# What a user's model may raise on a batch; anything else is a mistake of ours and stops the run.
FAILURES = (RuntimeError, ArithmeticError, LookupError, ValueError, TypeError, AssertionError)


def changes(
    before: Tensor,  # [3, H, W] in [0, 1]
    after: Tensor,  # [3, H, W] in [0, 1]
) -> dict[str, Any]:
    """Where a counterfactual differs: share of changed pixels, and the mean change in each cell of a grid."""
    difference = (as_saved(after) - before).abs().mean(dim=0)
    cells = torch.nn.functional.adaptive_avg_pool2d(difference[None], GRID)[0]
    return {"changed_area": (difference > CHANGED).float().mean().item(), "change_grid": cells.flatten().tolist()}
