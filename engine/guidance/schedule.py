"""The official DDIM schedule over the noised part of the diffusion process."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import UsageError


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
) -> Schedule:
    """Lay `steps` DDIM timesteps over the whole process and keep the first `strength` part of them.

    tau_i = i * (T // S) + 1, and k = floor(strength * S + 1e-9) steps run, i = k-1 ... 0, from noise at tau_k; k = S,
    out of range there, is noised at tau_(S-1).

    Args:
        train_timesteps: T, the length of alphas_cumprod.
        steps: S, 1 to T - 1.
        strength: in (0, 1].

    Raises:
        UsageError: steps or strength are out of range, or no step would run.

    Source: the schedule of the official LDCE code (arXiv 2310.06668, supplement, implementation details).
    """
    if not 1 <= steps < train_timesteps:
        raise UsageError(f"steps: expected 1 to {train_timesteps - 1}, got {steps}")
    if not 0 < strength <= 1:
        raise UsageError(f"strength: expected a number in (0, 1], got {strength}")
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
