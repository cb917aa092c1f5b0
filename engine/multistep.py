"""Multistep solvers of the guided denoising as plain numbers: the table that options, runs and exported files read.

A solver is one function of a run's noise levels and one line in `SOLVERS`. Its function gives for every step what
`guidance.solvers.advance` multiplies: the corrector's five numbers, of z, x_last, m_last, m_before and z0, then the
predictor's three, of the corrected z, z0 and m_last. Nothing here imports torch.

Source: DPM-Solver++ (arXiv 2211.01095, algorithm 2), UniPC (arXiv 2302.04867, algorithms 5 to 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

Row = tuple[float, ...]  # eight numbers
AS_IT_IS = (1.0, 0.0, 0.0, 0.0, 0.0)  # no corrector


class Levels(NamedTuple):
    """A run's noise levels, from its first timestep to the end of its last step: one more than there are steps.

    The last may be without noise, its log-SNR infinite: nothing extrapolates so far.
    """

    alpha: list[float]
    sigma: list[float]
    log_snr: list[float]

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1


class Solver(NamedTuple):
    """What there is to know about a solver.

    Attributes:
        rows: its numbers for every step.
        remembers: what it reads of a sample's past, names in `guidance.solvers.History`.
        about: its name as help texts say it.
    """

    rows: Callable[[Levels], list[Row]]
    remembers: tuple[str, ...]
    about: str


def ddim(levels: Levels) -> list[Row]:
    """First order."""
    return [(*AS_IT_IS, *_predictor(levels, i, order=1)) for i in range(levels.steps)]


def dpm_solver_2m(levels: Levels) -> list[Row]:
    """DPM-Solver++(2M), midpoint; the first step is of first order, and the last one below 15 steps or to no noise."""
    last, careful = levels.steps - 1, levels.steps < 15 or not levels.sigma[-1]
    orders = [1 if i == 0 or (i == last and careful) else 2 for i in range(levels.steps)]
    return [(*AS_IT_IS, *_predictor(levels, i, order)) for i, order in enumerate(orders)]


def unipc(levels: Levels) -> list[Row]:
    """UniPC of order 2, B(h) = exp(-h) - 1, its corrector included; its first and last predictors are of order 1."""
    last = levels.steps - 1
    orders = [1 if i in (0, last) else 2 for i in range(levels.steps)]
    return [
        (*(AS_IT_IS if i == 0 else _corrector(levels, i, orders[i - 1])), *_predictor(levels, i, order))
        for i, order in enumerate(orders)
    ]


def _predictor(levels: Levels, i: int, order: int) -> Row:
    """Both predictors of second order are the same: x0 is extrapolated half a step along its last change."""
    alpha, sigma, log_snr = levels
    h = log_snr[i + 1] - log_snr[i]
    slope = 0.5 * h / (log_snr[i] - log_snr[i - 1]) if order == 2 else 0.0
    gain = -alpha[i + 1] * math.expm1(-h)
    return sigma[i + 1] / sigma[i], gain * (1 + slope), -gain * slope


def _corrector(levels: Levels, i: int, order: int) -> Row:
    """UniC: z is replaced by what its own estimate z0 makes of the last step, which was of this order."""
    alpha, sigma, log_snr = levels
    h = log_snr[i] - log_snr[i - 1]
    gain = -alpha[i] * math.expm1(-h)
    if order == 1:
        return 0.0, sigma[i] / sigma[i - 1], gain * 0.5, 0.0, gain * 0.5
    r = (log_snr[i - 2] - log_snr[i - 1]) / h
    phi_1 = math.expm1(-h) / -h - 1
    phi_2 = phi_1 / -h - 0.5
    b1, b2 = phi_1 / math.expm1(-h), 2 * phi_2 / math.expm1(-h)
    # [[1, 1], [r, 1]] rho = b
    rho_before = (b1 - b2) / (1 - r)
    rho_now = b1 - rho_before
    m_before = gain * rho_before / r
    return 0.0, sigma[i] / sigma[i - 1], gain * (1 - rho_now) - m_before, m_before, gain * rho_now


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, (), "ddim"),
    "dpm++": Solver(dpm_solver_2m, ("m_last",), "dpm++ (DPM-Solver++(2M))"),
    "unipc": Solver(unipc, ("x_last", "m_last", "m_before"), "unipc"),
}
