"""Classifier-free image-to-image: eps_u + w (eps_c - eps_u), the generator's own way to change a class.

It never asks the classifier, so it can tell nothing about one; the same start, schedule and strength as ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterlens.engine.config import Settings
from counterlens.engine.guidance.jobs import seeded_noise
from counterlens.engine.guidance.sampler import invert
from counterlens.engine.guidance.schedule import add_noise, ddim, make_schedule
from counterlens.engine.models.protocols import Diffusion


@torch.no_grad()
def img2img(
    diffusion: Diffusion,
    image: Tensor,  # [B, 3, H, W] in [0, 1]
    target: Tensor,  # [B]
    seeds: list[int],
    settings: Settings,
    weight: float,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1]; only steps, strength and noise of the settings count."""
    schedule = make_schedule(len(diffusion.alphas_cumprod), settings.steps, settings.strength)
    z = diffusion.encode(image)
    batch = len(image)
    if settings.noise == "inversion":
        z = invert(diffusion, z, schedule)
    else:
        abar = diffusion.alphas_cumprod[schedule.start].to(z).expand(batch)
        z = add_noise(z, seeded_noise(diffusion.latent_shape, seeds, z), abar)
    null, condition = diffusion.null_condition(batch), diffusion.condition(target)
    for t, t_prev in zip(schedule.timesteps, schedule.timesteps_prev, strict=True):
        timestep = torch.full((batch,), t)
        eps_u = diffusion.predict_noise(z, timestep, null)
        eps = eps_u + weight * (diffusion.predict_noise(z, timestep, condition) - eps_u)
        abar, abar_prev = (diffusion.alphas_cumprod[i].to(z).expand(batch) for i in (t, t_prev))
        z, _ = ddim(z, eps, abar, abar_prev)
    return ((diffusion.decode(z) + 1) / 2).clamp(0, 1)


@torch.no_grad()
def generate(
    diffusion: Diffusion,
    target: Tensor,  # [B]
    seeds: list[int],
    *,
    steps: int,
    weight: float,
) -> Tensor:
    """Class-conditional samples from pure noise, classifier-free guidance `weight`: [B, 3, H, W] in [0, 1]."""
    schedule = make_schedule(len(diffusion.alphas_cumprod), steps, 1.0)
    z = seeded_noise(diffusion.latent_shape, seeds, torch.zeros(1))
    null, condition = diffusion.null_condition(len(target)), diffusion.condition(target)
    for t, t_prev in zip(schedule.timesteps, schedule.timesteps_prev, strict=True):
        timestep = torch.full((len(target),), t)
        eps_u = diffusion.predict_noise(z, timestep, null)
        eps = eps_u + weight * (diffusion.predict_noise(z, timestep, condition) - eps_u)
        abar, abar_prev = (diffusion.alphas_cumprod[i].to(z).expand(len(target)) for i in (t, t_prev))
        z, _ = ddim(z, eps, abar, abar_prev)
    return ((diffusion.decode(z) + 1) / 2).clamp(0, 1)
