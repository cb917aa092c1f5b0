"""A class-conditional latent diffusion model from diffusers' parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor, nn


class ClassConditionalLatentDiffusion:
    """`UNet2DModel` with class embeddings, the last one null, over the latents of an `AutoencoderKL`.

    Args:
        vae, unet: diffusers models; `vae.config.scaling_factor` is applied here.
        alphas_cumprod: [T] float64.
        labels: one name for each class; the null class has none.
    """

    def __init__(self, vae: AutoencoderKL, unet: UNet2DModel, alphas_cumprod: Tensor, labels: Sequence[str]) -> None:
        self.vae = vae
        self.unet = unet
        self.alphas_cumprod = alphas_cumprod
        self.labels = list(labels)
        self.null_class = len(self.labels)
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.image_size = int(vae.config.sample_size)
        self.scale = float(vae.config.scaling_factor)

    def modules(self) -> list[nn.Module]:
        """The VAE and the UNet."""
        return [self.vae, self.unet]

    def encode(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """Scaled latents [B, C, h, w]: the encoder's mode (the official code samples instead)."""
        return self.vae.encode(image * 2 - 1).latent_dist.mode() * self.scale

    def decode(
        self,
        z: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Image [B, 3, H, W], nominally in [-1, 1]."""
        return self.vae.decode(z / self.scale).sample

    def predict_noise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Tensor,  # [B] class indices
    ) -> Tensor:
        """Noise in `z`: [B, C, h, w]."""
        return self.unet(z, timestep, class_labels=condition).sample

    def condition(
        self,
        targets: Tensor,  # [B]
    ) -> Tensor:
        """Class indices are their own condition."""
        return targets

    def null_condition(self, batch: int) -> Tensor:
        """The null class, `batch` times."""
        return torch.full((batch,), self.null_class, dtype=torch.long, device=next(self.unet.parameters()).device)
