"""Small decoders for guidance: only gradients go through them, results come from the diffusion model's own decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CounterlensError, UsageError
from .files import dtype_of, find_folder, read_json
from .protocols import Diffusion

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ARCHITECTURE = "latent-resolution"


class LatentResolutionDecoder(nn.Module):
    """Convolutions at the latents' own resolution, then every latent location becomes a square of pixels.

    Args:
        latent_channels: C.
        width, blocks: channels, and residual blocks of one 3x3 convolution.
        factor: pixels of each latent location, per side.
    """

    def __init__(self, latent_channels: int, width: int, blocks: int, factor: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.leave = nn.Conv2d(width, 3 * factor**2, 3, padding=1)
        self.factor = factor

    def forward(
        self,
        z: Tensor,  # [B, C, h, w], scaled latents
    ) -> Tensor:
        """Image [B, 3, h * factor, w * factor], nominally in [-1, 1]."""
        x = self.enter(z)
        for block in self.blocks:
            x = x + block(nn.functional.silu(x))
        return nn.functional.pixel_shuffle(self.leave(nn.functional.silu(x)), self.factor)


class TinyDecoder:
    """A small decoder behind the protocol `Decoder`.

    Args:
        module: from scaled latents to an image in [-1, 1], or an `AutoencoderTiny`.
        name: for messages.
        latent_channels: of the latents that it was made for.
        scaling_factor: of those latents; None: it takes any (an `AutoencoderTiny` takes scaled latents as they are).
    """

    def __init__(self, module: nn.Module, name: str, latent_channels: int, scaling_factor: float | None = None) -> None:
        self.module = module.eval().requires_grad_(False)
        self.name = name
        self.latent_channels = latent_channels
        self.scaling_factor = scaling_factor

    def decode(
        self,
        z: Tensor,  # [B, C, h, w], scaled latents
    ) -> Tensor:
        """Image [B, 3, H, W] in the latents' dtype, nominally in [-1, 1]."""
        decode = getattr(self.module, "decoder", self.module)
        return decode(z.to(dtype_of(self.module))).to(z.dtype)


@torch.no_grad()
def check_decoder(decoder: TinyDecoder, diffusion: Diffusion) -> None:
    """Refuse a decoder that was made for other latents.

    Raises:
        UsageError: latent channels, scaling factor or image size differ.
    """
    channels, height, width = diffusion.latent_shape
    if decoder.latent_channels != channels:
        raise UsageError(
            f"guidance_decoder: {decoder.name} decodes {decoder.latent_channels} latent channels, the diffusion model "
            f"has {channels}; take one that was made for this model's VAE"
        )
    vae = getattr(diffusion, "vae", None)
    theirs = getattr(getattr(vae, "config", None), "scaling_factor", None)
    mine = decoder.scaling_factor
    if mine is not None and theirs is not None and abs(mine / theirs - 1) > 1e-3:
        raise UsageError(
            f"guidance_decoder: {decoder.name} was made for latents scaled by {mine:g}, the diffusion model's are "
            f"scaled by {theirs:g}; take one that was made for this model's VAE"
        )
    device = next(decoder.module.parameters()).device
    size = list(decoder.decode(torch.zeros(1, channels, height, width, device=device)).shape)
    if size != [1, 3, diffusion.image_size, diffusion.image_size]:
        raise UsageError(
            f"guidance_decoder: {decoder.name} makes images of {size[-1]} pixels, the diffusion model of "
            f"{diffusion.image_size}; its scale does not fit"
        )


def open_decoder(folder: str | Path) -> TinyDecoder:
    """Read a folder: our `config.json` and `model.safetensors`, or an `AutoencoderTiny` in diffusers' layout.

    Raises:
        UsageError: there is no such folder, or the config is of neither kind. CounterlensError: a file is corrupt.
    """
    folder = find_folder(folder, "guidance_decoder")
    config = read_json(folder / CONFIG)
    if config.get("_class_name") == "AutoencoderTiny":
        from diffusers import AutoencoderTiny

        module = AutoencoderTiny.from_pretrained(folder)
        factor = float(module.config.scaling_factor)
        # Every published one takes scaled latents as they are; another factor says that this one does not.
        return TinyDecoder(module, folder.name, module.config.latent_channels, None if factor == 1 else factor)
    if config.get("architecture") != ARCHITECTURE:
        raise UsageError(f"guidance_decoder: {folder / CONFIG} is neither an AutoencoderTiny nor {ARCHITECTURE!r}")
    return read_decoder(folder, config)


def read_decoder(folder: Path, config: dict[str, Any]) -> TinyDecoder:
    """A `LatentResolutionDecoder` from its folder and config.

    Raises:
        CounterlensError: the weights do not fit or are corrupt.
    """
    try:
        sizes = {name: int(config[name]) for name in ("latent_channels", "width", "blocks", "factor")}
        module = LatentResolutionDecoder(**sizes)
        module.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
    except (SafetensorError, RuntimeError, OSError, KeyError, ValueError, TypeError) as error:
        raise CounterlensError(f"{folder}: cannot be read as a decoder ({type(error).__name__}: {error})") from error
    return TinyDecoder(module, folder.name, sizes["latent_channels"], float(config["scaling_factor"]))


def save_decoder(module: LatentResolutionDecoder, folder: Path, config: dict[str, Any]) -> None:
    """Write a decoder in float16 with its config."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in module.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"architecture": ARCHITECTURE, **config}, indent=2) + "\n")
