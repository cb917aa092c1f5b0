"""FLUX.1: a guidance-distilled (dev) or timestep-distilled (schnell) flow over an AutoencoderKL's packed latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .files import pipeline_of
from .prompted import Prompted, check_width

OTHERS = ("FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline")
GUIDANCE = 3.5  # what its pipeline tells the guidance embedding


class Flux(Prompted):
    """A `FluxTransformer2DModel`: conditions are T5's tokens [B, 512, width] and CLIP's pooled text [B, pooled].

    The transformer takes each 2x2 latents as one token; here they are packed and unpacked, and latents are
    [B, 16, h, w] as everywhere. FLUX.1-dev was distilled with guidance as an input: it has no unconditional half. What
    stands for it here is the empty prompt at the same guidance (`guidance`), and so the consensus filter compares two
    guided predictions.

    Args:
        guidance: what the guidance embedding is told, where there is one.
        others: see `Prompted`.

    Source: Black Forest Labs, FLUX.1 (2024); its prompts have 512 tokens, those of schnell 256.
    """

    networks = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"}  # noqa: RUF012
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}  # noqa: RUF012
    rectangular = True
    flows = True
    others = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    packed = 2
    own_side = 128

    @classmethod
    def more(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """The text encoders.

        Raises:
            UsageError: the model takes an image beside its latents.
        """
        if (name := pipeline_of(folder).get("_class_name")) in OTHERS:
            raise UsageError(
                f"{folder / 'model_index.json'}: _class_name is {name!r}: a model that takes an image beside the "
                "latents, which is not supported; expected FluxPipeline"
            )
        return super().more(folder, dtype)

    @classmethod
    def few_steps(cls, folder: Path, denoiser: Mapping[str, Any]) -> bool:
        """Schnell, which is told no guidance."""
        return not denoiser.get("guidance_embeds", False)

    def __init__(self, *parts: Any, guidance: float = GUIDANCE, **options: Any) -> None:
        self.guidance = guidance
        super().__init__(*parts, **options)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """T5's tokens [N, tokens, width] and CLIP's pooled text [N, pooled]."""
        config = self.denoiser.config
        tokens, _ = self.text.tokens("text_encoder_2", prompts, 512 if config.guidance_embeds else 256)
        t5 = self.encode_text("text_encoder_2", tokens)[0]
        check_width(config, "joint_attention_dim", t5.shape[-1], "text_encoder_2")
        tokens, _ = self.text.tokens("text_encoder", prompts)
        pooled = self.encode_text("text_encoder", tokens).pooler_output
        check_width(config, "pooled_projection_dim", pooled.shape[-1], "text_encoder")
        return t5, pooled

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: tuple[Tensor, ...],
    ) -> Tensor:
        """The flow's velocity at `z`: [B, C, h, w]."""
        tokens, pooled = condition
        b, _, h, w = z.shape
        places = torch.zeros(h // 2, w // 2, 3, dtype=z.dtype, device=z.device)
        places[..., 1] += torch.arange(h // 2, device=z.device)[:, None]
        places[..., 2] += torch.arange(w // 2, device=z.device)[None]
        embedded = self.denoiser.config.guidance_embeds
        out = self.denoiser(
            pack(z),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=timestep / 1000,
            img_ids=places.reshape(-1, 3),
            txt_ids=places.new_zeros(tokens.shape[1], 3),
            guidance=torch.full((b,), self.guidance, dtype=torch.float32, device=z.device) if embedded else None,
        ).sample
        return unpack(out, h, w)


def pack(
    z: Tensor,  # [B, C, h, w]
) -> Tensor:
    """Each 2x2 latents as one token: [B, h/2 * w/2, 4 C]."""
    b, c, h, w = z.shape
    return z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(
    tokens: Tensor,  # [B, h/2 * w/2, 4 C]
    h: int,
    w: int,
) -> Tensor:
    """The inverse of `pack`: [B, C, h, w]."""
    b, _, c = tokens.shape
    return tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)
