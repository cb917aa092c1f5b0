"""Multistep solvers for guided denoising over latents; their numbers, and the table of solvers, are in `multistep`.

A step of a solver is linear in what is known: the latents z, the guided clean estimate z0 at z, and the history of a
sample (its last latents x_last, its last two estimates m_last and m_before). So a whole run is a small table of
numbers, made once, and samples with different schedules, at different steps, under different solvers share one update.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..multistep import SOLVERS, Levels
from .schedule import Schedule

COLUMNS = 8


class History(NamedTuple):
    """What multistep solvers remember of each slot, [B, C, h, w] each; zeros for a slot that was just filled."""

    x_last: Tensor
    m_last: Tensor
    m_before: Tensor


def no_history(like: Tensor) -> History:
    """History of slots that have taken no step yet, shaped like `like` [B, C, h, w]."""
    return History(*(torch.zeros_like(like) for _ in range(3)))


def coefficients(
    schedule: Schedule,
    alphas_cumprod: Tensor,  # [T]
    solver: str,
) -> Tensor:
    """The numbers of a solver in `multistep.SOLVERS` for every step: [steps, 8] float64, see `advance`.

    Every schedule ends at alphas_cumprod[0], which is 1 for flows alone.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    levels = alphas_cumprod[[*schedule.timesteps, schedule.timesteps_prev[-1]]].tolist()
    alpha, sigma = [math.sqrt(a) for a in levels], [math.sqrt(1 - a) for a in levels]
    log_snr = [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma, strict=True)]
    return torch.tensor(SOLVERS[solver].rows(Levels(alpha, sigma, log_snr)), dtype=torch.float64)


def advance(
    coefficients: Tensor,  # [B, 8], each slot's own row
    z: Tensor,  # [B, C, h, w]
    z0: Tensor,  # [B, C, h, w]
    history: History,
) -> tuple[Tensor, History]:
    """One solver step of every slot: (z at the next noise level, the new history).

    x = c0 z + c1 x_last + c2 m_last + c3 m_before + c4 z0 (the corrector), then c5 x + c6 z0 + c7 m_last.
    """
    c = coefficients.to(z).reshape(-1, COLUMNS, 1, 1, 1).unbind(1)
    x_last, m_last, m_before = history
    x = c[0] * z + c[1] * x_last + c[2] * m_last + c[3] * m_before + c[4] * z0
    return c[5] * x + c[6] * z0 + c[7] * m_last, History(x, z0, m_last)
