"""One guided denoising step in plain torch, to be read next to LDCE sections 3.1 and 3.2: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from counterlens.kernels.consensus.reference import consensus_filter


def scaled_norm(
    x: Tensor,  # [B, D]
) -> tuple[Tensor, Tensor, Tensor]:
    """x over its largest magnitude, [B, D]; that magnitude (1 for a zero vector) and the norm of the quotient, [B, 1].

    Squares of the quotient neither overflow nor vanish.
    """
    largest = x.abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)
    unit = x / largest
    return unit, largest, (unit * unit).sum(-1, keepdim=True).sqrt()


def rescale(
    x: Tensor,  # [B, C, H, W]
    like: Tensor,  # [B, C, H, W]
) -> Tensor:
    """Rescale each sample of x to the norm of the same sample of `like`; zero stays zero: [B, C, H, W]."""
    unit, _, norm = scaled_norm(x.flatten(1))
    _, largest, like_norm = scaled_norm(like.flatten(1))
    return (unit / torch.where(norm == 0, 1.0, norm) * (largest * like_norm)).reshape(x.shape)


def guided_update(
    z: Tensor,  # [B, C, H, W] float32 or float64
    eps_uncond: Tensor,  # [B, C, H, W]
    eps_cond: Tensor,  # [B, C, H, W]
    grad_class: Tensor,  # [B, C, H, W]
    grad_distance: Tensor,  # [B, C, H, W]
    alphas_cumprod_t: Tensor,  # [B]
    alphas_cumprod_prev: Tensor,  # [B]
    guidance_scale: Tensor,  # [B]
    class_scale: Tensor,  # [B]
    distance_scale: Tensor,  # [B]
    cos_limit: Tensor,  # [B]
    tan_limit: Tensor,  # [B]
    mode: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `counterlens.kernels.guided_update.guided_update`, which checks the arguments."""
    per_sample = (-1, 1, 1, 1)
    abar, abar_prev = alphas_cumprod_t.reshape(per_sample), alphas_cumprod_prev.reshape(per_sample)  # [B, 1, 1, 1]
    noise_level = (1 - abar).sqrt()
    direction = eps_cond - eps_uncond
    score, kept = consensus_filter(-noise_level * grad_class, direction, cos_limit, tan_limit, mode, chunk)
    towards_class = class_scale.reshape(per_sample) * rescale(score, direction)
    towards_image = distance_scale.reshape(per_sample) * rescale(noise_level * grad_distance, direction)
    eps = eps_uncond + guidance_scale.reshape(per_sample) * (towards_class + towards_image)
    z0 = (z - noise_level * eps) / abar.sqrt()
    z_prev = abar_prev.sqrt() * z0 + (1 - abar_prev).sqrt() * eps  # DDIM with eta = 0
    return z_prev, z0, kept.flatten(1).to(z.dtype).mean(1)
