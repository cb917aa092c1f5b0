"""Runs a batch of samples through a whole guided schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Settings
from ..models.protocols import Classifier, Diffusion
from .pullback import PullbackMode
from .schedule import Schedule, add_noise, ddim, make_schedule
from .step import GuidedStep


@dataclass
class Run:
    """What comes out of `sample`: latents [B, C, h, w], kept [B, steps], and which samples stayed finite [B]."""

    z: Tensor
    kept_fraction: Tensor
    finite: Tensor


def seeded_noise(shape: tuple[int, int, int], seeds: list[int], like: Tensor) -> Tensor:
    """Noise [B, *shape] from each sample's own seed, drawn on the CPU in float32 on every device."""
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    return noise.to(like)


def invert(
    diffusion: Diffusion,
    z: Tensor,  # [B, C, h, w]
    schedule: Schedule,
) -> Tensor:
    """DDIM inversion, unconditional: the noised latents from which the unguided schedule leads back to `z`.

    Ends at the first timestep of the schedule, so that the first step starts from its own noise level. Costs one
    unconditional noise prediction for each step.
    """
    alphas_cumprod = diffusion.alphas_cumprod.to(z)
    batch = z.shape[0]
    null = diffusion.null_condition(batch)
    for t, t_prev in zip(reversed(schedule.timesteps), reversed(schedule.timesteps_prev), strict=True):
        timestep = torch.full((batch,), t, dtype=torch.long, device=z.device)
        eps = diffusion.predict_noise(z, timestep, null)
        z, _ = ddim(z, eps, alphas_cumprod[t_prev].expand(batch), alphas_cumprod[t].expand(batch))
    return z


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    classifier: Classifier,
    image: Tensor,  # [B, 3, H, W] in [0, 1]
    target: Tensor,  # [B]
    seeds: list[int],
    settings: Settings,
    *,
    pullback: PullbackMode = "functional",
    backend: str = "auto",
    step: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Run:
    """Encode, noise and denoise a batch under guidance; `on_step` gets step (from 1), total and z0 [B, C, h, w].

    `step` is a GuidedStep or one that was compiled (`engine.runtime`); without it the eager one of these settings.
    A sample whose latents stop being finite is stopped: it is reported in `finite`, and the others go on untouched.
    """
    schedule = make_schedule(len(diffusion.alphas_cumprod), settings.steps, settings.strength)
    step = step or GuidedStep(
        diffusion, classifier, filter_mode=settings.filter, gradient=settings.gradient, mode=pullback, backend=backend
    )
    batch = image.shape[0]
    z = diffusion.encode(image)
    if settings.noise == "inversion":
        z = invert(diffusion, z, schedule)
    else:
        abar = diffusion.alphas_cumprod[schedule.start].to(z).expand(batch)
        z = add_noise(z, seeded_noise(diffusion.latent_shape, seeds, z), abar)
    condition = diffusion.condition(target)
    kept = torch.full((batch, len(schedule)), torch.nan)
    finite = z.isfinite().flatten(1).all(dim=1)
    for i, (t, t_prev) in enumerate(zip(schedule.timesteps, schedule.timesteps_prev, strict=True)):
        timestep = torch.full((batch,), t, dtype=torch.long, device=z.device)
        z_prev, z0, kept_fraction = step(
            z, timestep, torch.full_like(timestep, t_prev), condition, image, target,
            guidance_scale=settings.guidance_scale, class_scale=settings.class_scale,
            distance_scale=settings.distance_scale, angle_deg=settings.angle,
        )  # fmt: skip
        finite = finite & z_prev.isfinite().flatten(1).all(dim=1)
        # A stopped sample keeps its place, so that the batch keeps its shape.
        z = torch.where(finite[:, None, None, None], z_prev, 0.0)
        kept[:, i] = torch.where(finite, kept_fraction, torch.nan).float().cpu()
        if on_step is not None:
            on_step(i + 1, len(schedule), z0)
    return Run(z, kept, finite)
