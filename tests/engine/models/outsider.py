"""A family of diffusion models as another package would bring it: this one file, which knows nothing of the tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from counterlens.engine.models.backbone import Backbone


class ToyDenoiser(ModelMixin, ConfigMixin):
    """One convolution, shifted by its class and the timestep."""

    @register_to_config
    def __init__(self, in_channels: int = 4, out_channels: int = 4, sample_size: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shift = nn.Embedding(classes + 1, out_channels)

    def forward(self, z: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        shift = self.shift(label) + 1e-3 * timestep.to(z.dtype).reshape(-1, 1)
        return torch.tanh(self.conv(z) + shift[:, :, None, None])


class ToyDiffusion(Backbone):
    """A `ToyDenoiser` over the latents of an `AutoencoderKL`."""

    networks = {"unet": ToyDenoiser, "vae": "AutoencoderKL"}  # noqa: RUF012

    def __init__(self, vae: Any, unet: Any, alphas_cumprod: Tensor, gain: float = 1.0, **options: Any) -> None:
        super().__init__(vae, unet, alphas_cumprod, classes=unet.config.classes, **options)
        self.gain = gain

    def denoise(self, z: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.gain * self.denoiser(z, timestep, condition)
