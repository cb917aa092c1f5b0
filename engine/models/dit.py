"""DiT: a class-conditional diffusion transformer over an AutoencoderKL's latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor, nn

from .fields import to_noise
from .latent import check_image_size, check_parts, decode_kl, dtype_of, encode_kl, match_classes


class DiffusionTransformer:
    """A `DiTTransformer2DModel`; of its output the noise is used, the learned variance left out.

    Args:
        vae, transformer: diffusers models.
        alphas_cumprod: [T] float64.
        names: of the classes, if known.
        prediction: what the transformer was trained to predict, see `fields.to_noise`.

    Raises:
        UsageError: the parts do not fit.

    Source: Peebles and Xie, arXiv 2212.09748.
    """

    conditioning = "class"

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: DiTTransformer2DModel,
        alphas_cumprod: Tensor,
        names: Sequence[str] | None = None,
        prediction: str = "epsilon",
    ) -> None:
        check_parts(vae, transformer)
        self.vae = vae
        self.transformer = transformer
        self.alphas_cumprod = alphas_cumprod
        self.prediction = prediction
        self.names = names
        self.null_class = int(transformer.config.num_embeds_ada_norm)
        channels, side = int(transformer.config.in_channels), int(transformer.config.sample_size)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_size = side * factor
        check_image_size(self.image_size, factor, int(transformer.config.patch_size))
        self.latent_shape = (channels, side, side)
        self.labels: list[str] = list(names or [])
        self.classes = torch.arange(len(self.labels))  # the class of each label

    def describe(self, labels: Sequence[str], classes: Sequence[int] | None = None) -> None:
        """Say which of the model's classes each label is (see `match_classes`).

        Raises:
            UsageError: they cannot be matched, or a class is out of range.
        """
        self.classes = match_classes(labels, self.null_class, self.names, classes)
        self.labels = list(labels)

    def modules(self) -> list[nn.Module]:
        """The VAE and the transformer."""
        return [self.vae, self.transformer]

    def encode(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """Scaled latents [B, C, h, w]: the encoder's mode."""
        return encode_kl(self.vae, image)

    def decode(
        self,
        z: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Image [B, 3, H, W], nominally in [-1, 1]."""
        return decode_kl(self.vae, z)

    def predict_noise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Tensor,  # [B] class indices
    ) -> Tensor:
        """Noise in `z`: [B, C, h, w]."""
        out = self.transformer(z.to(dtype_of(self.transformer)), timestep, class_labels=condition).sample
        return to_noise(self.prediction, out[:, : z.shape[1]].to(z.dtype), z, self.alphas_cumprod, timestep)

    def condition(
        self,
        targets: Tensor,  # [B]
    ) -> Tensor:
        """The model's class indices of the targets: [B]."""
        return self.classes.to(targets.device)[targets]

    def null_condition(self, batch: int) -> Tensor:
        """The null class, `batch` times: [batch]."""
        device = next(self.transformer.parameters()).device
        return torch.full((batch,), self.null_class, dtype=torch.long, device=device)
