"""The class-conditional latent diffusion model of CompVis (cin256-v2): VQ first stage, class embedder as context."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CounterlensError, UsageError
from .backbone import Backbone
from .files import dtype_of, read_tensors


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


class ClassContextLatentDiffusion(Backbone):
    """A `UNet2DConditionModel` whose context is one class embedding, over a `VQModel`'s unquantised latents.

    Args:
        vqvae, unet: diffusers models.
        class_embedder: [classes + 1, width] embedding, the null class last.
        alphas_cumprod, names, prediction, options: see `Backbone`.

    Raises:
        UsageError: the parts do not fit.

    Source: Rombach et al., arXiv 2112.10752, the model `cin256-v2`; decoding re-quantises as its first stage does.
    """

    networks = {"unet": "UNet2DConditionModel", "vqvae": "VQModel"}  # noqa: RUF012
    others = ("class_embedder",)
    unet: Any = property(attrgetter("denoiser"))
    vqvae: Any = property(attrgetter("vae"))

    def __init__(
        self,
        vqvae: Any,
        unet: Any,
        class_embedder: nn.Embedding,
        alphas_cumprod: Tensor,
        names: Sequence[str] | None = None,
        prediction: str = "epsilon",
        **options: Any,
    ) -> None:
        classes = class_embedder.num_embeddings - 1
        super().__init__(vqvae, unet, alphas_cumprod, classes=classes, names=names, prediction=prediction, **options)
        if (width := unet.config.cross_attention_dim) != class_embedder.embedding_dim:
            raise UsageError(
                f"class embedder: its {class_embedder.embedding_dim} channels are not the UNet's {width} "
                "(cross_attention_dim)"
            )
        self.class_embedder = class_embedder

    @classmethod
    def more(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """The class embedder.

        Raises:
            CounterlensError: its file holds something else.
        """
        weight = read_tensors(folder / "class_embedder" / "model.safetensors").get("embedding.weight")
        if weight is None or weight.ndim != 2:
            raise CounterlensError(
                f"{folder / 'class_embedder'}: expected one tensor, embedding.weight [classes + 1, C]"
            )
        return {"class_embedder": nn.Embedding.from_pretrained(weight.to(dtype), freeze=True)}

    def modules(self) -> list[nn.Module]:
        """The first stage, the UNet and the class embedder."""
        return [*super().modules(), self.class_embedder]

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

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Tensor,  # [B, 1, width]
    ) -> Tensor:
        """What the UNet says: [B, C, h, w]."""
        return self.unet(z, timestep, encoder_hidden_states=condition).sample

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
