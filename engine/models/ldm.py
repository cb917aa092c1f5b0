"""The class-conditional latent diffusion model of CompVis (cin256-v2): VQ first stage, class embedder as context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel, VQModel
from torch import Tensor, nn

from ..errors import UsageError
from .fields import to_noise
from .latent import check_image_size, check_parts, dtype_of, match_classes


def quantise(
    z: Tensor,  # [B, C, h, w]
    codes: Tensor,  # [K, C]
) -> Tensor:
    """Each location's nearest code, the gradient passed straight through: [B, C, h, w]."""
    flat = z.permute(0, 2, 3, 1)  # [B, h, w, C]
    # |z - e|^2 without |z|^2, which is the same for every code.
    distance = codes.square().sum(dim=1) - 2 * flat @ codes.T  # [B, h, w, K]
    nearest = codes[distance.argmin(dim=-1)].permute(0, 3, 1, 2)
    return z + (nearest - z).detach()


class ClassContextLatentDiffusion:
    """A `UNet2DConditionModel` whose context is one class embedding, over a `VQModel`'s unquantised latents.

    Args:
        vqvae, unet: diffusers models.
        class_embedder: [classes + 1, width] embedding, the null class last.
        alphas_cumprod: [T] float64.
        names: of the classes, if known.
        prediction: what the UNet was trained to predict, see `fields.to_noise`.

    Raises:
        UsageError: the parts do not fit.

    Source: Rombach et al., arXiv 2112.10752, the model `cin256-v2`; decoding re-quantises as its first stage does.
    """

    conditioning = "class"

    def __init__(
        self,
        vqvae: VQModel,
        unet: UNet2DConditionModel,
        class_embedder: nn.Embedding,
        alphas_cumprod: Tensor,
        names: Sequence[str] | None = None,
        prediction: str = "epsilon",
    ) -> None:
        check_parts(vqvae, unet)
        if (width := unet.config.cross_attention_dim) != class_embedder.embedding_dim:
            raise UsageError(
                f"class embedder: its {class_embedder.embedding_dim} channels are not the UNet's {width} "
                "(cross_attention_dim)"
            )
        self.prediction = prediction
        self.vqvae = vqvae
        self.unet = unet
        self.class_embedder = class_embedder
        self.alphas_cumprod = alphas_cumprod
        self.names = names
        self.null_class = class_embedder.num_embeddings - 1
        factor = 2 ** (len(vqvae.config.block_out_channels) - 1)
        side = int(unet.config.sample_size)
        self.image_size = side * factor
        check_image_size(self.image_size, factor, 2 ** (len(unet.config.block_out_channels) - 1))
        self.latent_shape = (int(unet.config.in_channels), side, side)
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
        """The first stage, the UNet and the class embedder."""
        return [self.vqvae, self.unet, self.class_embedder]

    def encode(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """Scaled latents [B, C, h, w], not quantised."""
        z = self.vqvae.encode((image * 2 - 1).to(dtype_of(self.vqvae))).latents
        return z.to(image.dtype) * self.vqvae.config.scaling_factor

    def decode(
        self,
        z: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Image [B, 3, H, W], nominally in [-1, 1], of the nearest codes; their gradient is passed straight through."""
        codes = self.vqvae.quantize.embedding.weight.to(z.dtype)  # distances in the latents' precision
        z = quantise(z / self.vqvae.config.scaling_factor, codes)
        hidden = self.vqvae.post_quant_conv(z.to(dtype_of(self.vqvae)))
        return self.vqvae.decoder(hidden).to(z.dtype)

    def predict_noise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Tensor,  # [B, 1, width]
    ) -> Tensor:
        """Noise in `z`: [B, C, h, w]."""
        dtype = dtype_of(self.unet)
        out = self.unet(z.to(dtype), timestep, encoder_hidden_states=condition.to(dtype)).sample.to(z.dtype)
        return to_noise(self.prediction, out, z, self.alphas_cumprod, timestep)

    def condition(
        self,
        targets: Tensor,  # [B]
    ) -> Tensor:
        """Embeddings of the targets' classes: [B, 1, width]."""
        weight = self.class_embedder.weight.detach()
        return weight[self.classes.to(weight.device)[targets.to(weight.device)]][:, None]

    def null_condition(self, batch: int) -> Tensor:
        """The null class's embedding, `batch` times: [batch, 1, width]."""
        return self.class_embedder.weight.detach()[self.null_class].expand(batch, 1, -1)
