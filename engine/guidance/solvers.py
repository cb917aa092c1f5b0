"""Multistep solvers for guided denoising, as coefficients for each step of a schedule.

A step of a solver is linear in what is known: the latents z, the guided clean estimate z0 at z, and the history of a
sample (its last latents x_last, its last two estimates m_last and m_before). So a whole run is a small table of
numbers, made once, and samples with different schedules, at different steps, under different solvers share one update.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .schedule import Schedule

Solver = Literal["ddim", "dpm++", "unipc"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
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
    solver: Solver,
) -> Tensor:
    """The solver's numbers for every step: [steps, 8] float64, see `advance`.

    `ddim` is the first-order step; `dpm++` DPM-Solver++(2M), midpoint; `unipc` UniPC of order 2, B(h) = exp(-h) - 1,
    its corrector included. The first step is of first order, so is the last one of `unipc`, and that of `dpm++` below
    15 steps. Every schedule ends at alphas_cumprod[0], which is not 1.

    Source: DPM-Solver++ (arXiv 2211.01095, algorithm 2), UniPC (arXiv 2302.04867, algorithms 5 to 8).
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    levels = alphas_cumprod[[*schedule.timesteps, schedule.timesteps_prev[-1]]].tolist()
    alpha, sigma = [math.sqrt(a) for a in levels], [math.sqrt(1 - a) for a in levels]
    log_snr = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    count = len(schedule)
    rows, order = [], 0
    for i in range(count):
        correct = (1.0, 0.0, 0.0, 0.0, 0.0)
        if solver == "unipc" and i > 0:
            before = log_snr[i - 2] if order == 2 else None
            correct = _corrector(alpha[i], sigma[i], sigma[i - 1], log_snr[i], log_snr[i - 1], before)
        last = i == count - 1
        first_order = solver == "ddim" or i == 0 or (last and (solver == "unipc" or count < 15))
        order = 1 if first_order else 2
        h = log_snr[i + 1] - log_snr[i]
        # Both predictors of second order are the same: x0 is extrapolated half a step along its last change.
        slope = 0.5 * h / (log_snr[i] - log_snr[i - 1]) if order == 2 else 0.0
        gain = -alpha[i + 1] * math.expm1(-h)
        rows.append((*correct, sigma[i + 1] / sigma[i], gain * (1 + slope), -gain * slope))
    return torch.tensor(rows, dtype=torch.float64)


def _corrector(
    alpha: float, sigma: float, sigma_last: float, log_snr: float, log_snr_last: float, log_snr_before: float | None
) -> tuple[float, float, float, float, float]:
    """UniC: z is replaced by what its own estimate z0 makes of the last step; of z, x_last, m_last, m_before, z0."""
    h = log_snr - log_snr_last
    gain = -alpha * math.expm1(-h)
    if log_snr_before is None:
        return 0.0, sigma / sigma_last, gain * 0.5, 0.0, gain * 0.5
    r = (log_snr_before - log_snr_last) / h
    phi_1 = math.expm1(-h) / -h - 1
    phi_2 = phi_1 / -h - 0.5
    b1, b2 = phi_1 / math.expm1(-h), 2 * phi_2 / math.expm1(-h)
    # [[1, 1], [r, 1]] rho = b
    rho_before = (b1 - b2) / (1 - r)
    rho_now = b1 - rho_before
    m_before = gain * rho_before / r
    return 0.0, sigma / sigma_last, gain * (1 - rho_now) - m_before, m_before, gain * rho_now


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
