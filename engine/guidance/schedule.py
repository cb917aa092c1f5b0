"""Timesteps over the noised part of the diffusion process: the official DDIM schedule, and others with fewer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from ..config import Settings
from ..errors import UsageError
from ..models.predictions import log_snr

Spacing = Literal["official", "leading", "trailing", "linspace", "logsnr"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)


@dataclass(frozen=True)
class Schedule:
    """Timesteps of one run, in the order in which they are denoised.

    Attributes:
        timesteps: timestep of each step, falling.
        timesteps_prev: the timestep that each step arrives at; 0 at the end (whose alphas_cumprod is not 1).
        start: the timestep whose alphas_cumprod noises the encoded image.
    """

    timesteps: tuple[int, ...]
    timesteps_prev: tuple[int, ...]
    start: int

    def __len__(self) -> int:
        return len(self.timesteps)


def make_schedule(
    train_timesteps: int,
    steps: int,
    strength: float,
    spacing: Spacing = "official",
    alphas_cumprod: Tensor | None = None,
) -> Schedule:
    """Lay timesteps over the noised part of the process, which is its first `strength` part.

    `official` lays `steps` timesteps over the whole process and keeps the first `strength` part of them:
    tau_i = i * (T // S) + 1, and k = floor(strength * S + 1e-9) steps run, i = k-1 ... 0, from noise at tau_k; k = S,
    out of range there, is noised at tau_(S-1). All others lay `steps` timesteps over the noised part alone, the first
    N = floor(strength * T + 1e-9) timesteps, and every one of them runs, from noise at the first of them:
    `leading` i * (N // S) + 1, `trailing` N - i * N / S - 1, `linspace` evenly from N - 1 down to 0, `logsnr` evenly in
    log(alpha / sigma) between the same two, where there are timesteps enough. 0 is where the last step arrives, under
    every spacing.

    Args:
        train_timesteps: T, the length of alphas_cumprod.
        steps: S, 1 to T - 1.
        strength: in (0, 1].
        spacing: one of `SPACINGS`.
        alphas_cumprod: [T], for `logsnr` only.

    Raises:
        UsageError: steps, strength or spacing are out of range, no step would run, or more than there are timesteps.

    Source: the schedule of the official LDCE code (arXiv 2310.06668, supplement, implementation details); the other
    names are those of Lin et al. (arXiv 2305.08891, table 2), uniform log-SNR is that of DPM-Solver (arXiv 2206.00927).
    """
    if not 1 <= steps < train_timesteps:
        raise UsageError(f"steps: expected 1 to {train_timesteps - 1}, got {steps}")
    if not 0 < strength <= 1:
        raise UsageError(f"strength: expected a number in (0, 1], got {strength}")
    if spacing not in SPACINGS:
        raise UsageError(f"spacing: expected one of {', '.join(SPACINGS)}, got {spacing!r}")
    if spacing == "official":
        return _official(train_timesteps, steps, strength)
    noised = math.floor(strength * train_timesteps + 1e-9)
    if steps >= noised:
        raise UsageError(f"steps: {steps} are more than the {max(noised - 1, 0)} timesteps of strength {strength:g}")
    if spacing == "leading":
        taus = [i * (noised // steps) + 1 for i in reversed(range(steps))]
    elif spacing == "trailing":
        taus = [round(noised - i * noised / steps) - 1 for i in range(steps)]
    elif spacing == "linspace":
        taus = [round((noised - 1) * (steps - i) / steps) for i in range(steps)]
    else:
        if alphas_cumprod is None:
            raise UsageError("spacing: logsnr needs alphas_cumprod")
        taus = _even_in_log_snr(alphas_cumprod[:noised].double().cpu(), steps)
    if taus[-1] < 1 or any(a <= b for a, b in pairwise(taus)):
        raise UsageError(f"steps: {steps} with spacing {spacing} do not fit into {noised} timesteps; use fewer")
    return Schedule(timesteps=tuple(taus), timesteps_prev=(*taus[1:], 0), start=taus[0])


def _official(train_timesteps: int, steps: int, strength: float) -> Schedule:
    k = math.floor(strength * steps + 1e-9)
    if k < 1:
        raise UsageError(f"strength: {strength} of {steps} steps leaves no step to run; raise strength or steps")
    tau = [i * (train_timesteps // steps) + 1 for i in range(steps)]
    if tau[-1] >= train_timesteps:
        raise UsageError(f"steps: {steps} steps reach timestep {tau[-1]} of {train_timesteps}; use fewer")
    return Schedule(
        timesteps=tuple(reversed(tau[:k])),
        timesteps_prev=tuple(reversed([0, *tau[: k - 1]])),
        start=tau[min(k, steps - 1)],
    )


def _even_in_log_snr(
    alphas_cumprod: Tensor,  # [N]
    steps: int,
) -> list[int]:
    known = log_snr(alphas_cumprod)  # falling
    last = known[0] if known[0].isfinite() else known[1]
    wanted = [known[-1] + (last - known[-1]) * i / steps for i in range(steps)]
    taus = [int((known - w).abs().argmin()) for w in wanted]
    # Near the end timesteps are further apart in log-SNR than the steps: each needs one of its own.
    for i in reversed(range(steps)):
        taus[i] = max(taus[i], taus[i + 1] + 1 if i + 1 < steps else 1)
    return taus


def add_noise(
    z: Tensor,  # [B, C, H, W]
    noise: Tensor,  # [B, C, H, W]
    abar: Tensor,  # [B]
) -> Tensor:
    """Diffuse latents to the noise level `abar` (alphas_cumprod): sqrt(abar) z + sqrt(1 - abar) noise."""
    abar = abar.reshape(-1, 1, 1, 1)
    return abar.sqrt() * z + (1 - abar).sqrt() * noise


def ddim(
    z: Tensor,  # [B, C, H, W]
    eps: Tensor,  # [B, C, H, W]
    abar: Tensor,  # [B]
    abar_next: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """Deterministic DDIM from one noise level to another, either way: (z at abar_next, z0)."""
    abar, abar_next = abar.reshape(-1, 1, 1, 1), abar_next.reshape(-1, 1, 1, 1)
    z0 = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
    return abar_next.sqrt() * z0 + (1 - abar_next).sqrt() * eps, z0


def schedule_of(settings: Settings, alphas_cumprod: Tensor) -> Schedule:
    """The schedule that settings ask for, over a model's noise levels; see `make_schedule`.

    Raises:
        UsageError: see `make_schedule`; or the first timestep is noise alone.
    """
    total = len(alphas_cumprod)
    schedule = make_schedule(total, settings.steps, settings.strength, settings.spacing, alphas_cumprod)
    if not alphas_cumprod[max(schedule.start, schedule.timesteps[0])] > 0:
        raise UsageError(
            f"strength: {settings.strength:g} begins at timestep {schedule.start} of {total}, which is noise alone and "
            "says nothing of the image; take less"
        )
    return schedule


def carried_strength(
    strength: float,
    alphas_cumprod: Tensor,  # [T]
) -> float:
    """The strength of a model with these noise levels that noises as much as `strength` does Stable Diffusion 1.x.

    Equal log-SNR: the published strengths are shares of its 1000 timesteps, and the same share of another path is
    another noise level (of a flow under `shift` a far higher one).
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    reference = log_snr((1 - betas).cumprod(0))  # falling
    at = min(strength * len(reference), len(reference) - 1.0)
    below = int(at)
    above = min(below + 1, len(reference) - 1)
    wanted = reference[below] + (at - below) * (reference[above] - reference[below])
    known = log_snr(alphas_cumprod.double().cpu())
    # Where it lies between two timesteps; the first may be without noise, infinitely far.
    after = int((known > wanted).sum())
    if after >= len(known):
        return 1.0
    if after == 0 or not known[after - 1].isfinite():
        return max(after, 1) / len(known)
    share = (known[after - 1] - wanted) / (known[after - 1] - known[after])
    return float(after - 1 + share) / len(known)
