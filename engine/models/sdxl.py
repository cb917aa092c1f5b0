"""Stable Diffusion XL and SDXL-Turbo: a text-conditional latent diffusion model of two text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .backbone import vae_factor
from .files import pipeline_of
from .guidance_embedding import guidance_condition
from .prompted import Prompted, TextParts, check_width


class StableDiffusionXL(Prompted):
    """A `UNet2DConditionModel` that is told a text's tokens, its pooled meaning, and the image's size.

    Conditions are both encoders' tokens side by side, from the last layer but one, [B, 77, width], and the second
    one's pooled text [B, pooled]. The sizes are those of our images, uncropped. The null condition is zeros where
    model_index.json says so (`force_zeros_for_empty_prompt`), else the empty prompt.

    Args:
        empty_is_zero: whether it does.
        others: see `Prompted`.

    Raises:
        UsageError: the parts or the image size do not fit.

    Source: Podell et al., arXiv 2307.01952.
    """

    networks = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}  # noqa: RUF012
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}  # noqa: RUF012
    others = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    takes = ("addition_embed_type", "time_cond_proj_dim")
    rectangular = True
    unet: Any = property(attrgetter("denoiser"))

    def __init__(
        self,
        vae: Any,
        unet: Any,
        alphas_cumprod: Tensor,
        text: TextParts,
        empty_is_zero: bool = True,
        **options: Any,
    ) -> None:
        if (kind := unet.config.addition_embed_type) != "text_time":
            raise UsageError(f"unet: addition_embed_type is {kind!r}; Stable Diffusion XL has text_time")
        self.empty_is_zero = empty_is_zero
        super().__init__(vae, unet, alphas_cumprod, text, **options)

    @classmethod
    def more(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """The text encoders and tokenizers, and what an empty prompt is.

        Raises:
            UsageError: it is a refiner, which is told how beautiful an image is. See also `TextParts`.
        """
        index = pipeline_of(folder)
        if index.get("requires_aesthetics_score"):
            raise UsageError(
                f"{folder / 'model_index.json'}: requires_aesthetics_score is true: a refiner, which only finishes "
                "another model's images; take the base model"
            )
        return super().more(folder, dtype) | {"empty_is_zero": bool(index.get("force_zeros_for_empty_prompt", True))}

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Tokens [N, 77, width] and pooled texts [N, pooled]."""
        hidden = []
        for name in self.encoders:
            tokens, _ = self.text.tokens(name, prompts)
            said = self.encode_text(name, tokens, output_hidden_states=True)
            hidden.append(said.hidden_states[-2])
        context, pooled = torch.cat(hidden, dim=-1), said.text_embeds
        config = self.denoiser.config
        check_width(config, "cross_attention_dim", context.shape[-1], "text_encoder, text_encoder_2")
        told = pooled.shape[-1] + 6 * int(config.addition_time_embed_dim)
        check_width(config, "projection_class_embeddings_input_dim", told, "text_encoder_2 and six sizes")
        if self.empty_is_zero:
            kept = torch.tensor([prompt != "" for prompt in prompts], device=context.device)
            context, pooled = context * kept[:, None, None], pooled * kept[:, None]
        return context, pooled

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: tuple[Tensor, ...],
    ) -> Tensor:
        """What the UNet says: [B, C, h, w]."""
        context, pooled = condition
        factor = vae_factor(self.vae.config)
        height, width = (float(n * factor) for n in z.shape[-2:])
        # The original size, the corner at which it was cropped, and the size that is wanted.
        sizes = [z.new_full((len(z), 1), n) for n in (height, width, 0.0, 0.0, height, width)]
        return self.unet(
            z, timestep, encoder_hidden_states=context, timestep_cond=guidance_condition(self.unet, z),
            added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.cat(sizes, dim=1)},
        ).sample  # fmt: skip
