"""Sana: flow matching by linear attention over the 32 channels of a deep compression autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .files import dtype_of
from .prompted import Prompted, TextParts, check_width

TOKENS = 300


class Sana(Prompted):
    """A `SanaTransformer2DModel` over an `AutoencoderDC`: conditions are Gemma's tokens and their attention mask.

    [B, 300, width] and [B, 300]. As its pipeline does, a prompt stands behind an instruction to enhance it, of which
    the first token and the last 299 are kept; the empty prompt stands alone.

    Args: see `Prompted`.

    Source: Xie et al., arXiv 2410.10629; the instruction is the one of diffusers' `SanaPipeline`.
    """

    networks = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC"}  # noqa: RUF012
    encoders = {"text_encoder": "Gemma2Model"}  # noqa: RUF012
    rectangular = True
    flows = True
    others = ("text_encoder", "tokenizer")

    def __init__(self, vae: Any, denoiser: Any, alphas_cumprod: Any, text: TextParts, **options: Any) -> None:
        text.tokenizers["text_encoder"].padding_side = "right"  # Gemma's own is left
        super().__init__(vae, denoiser, alphas_cumprod, text, **options)

    def encode(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """Scaled latents [B, C, h, w] in the image's dtype; the encoder is deterministic."""
        z = self.vae.encode((image * 2 - 1).to(dtype_of(self.vae))).latent
        return z.to(image.dtype) * self.vae.config.scaling_factor

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Gemma's tokens [N, 300, width], and their attention mask [N, 300] in the same dtype."""
        each = [self._embed_one(prompt.lower().strip()) for prompt in prompts]
        return tuple(torch.cat(tensors) for tensors in zip(*each, strict=True))

    def _embed_one(self, prompt: str) -> tuple[Tensor, Tensor]:
        before = instruction() if prompt else ""
        read = len(self.text.tokenizers["text_encoder"](before).input_ids) + TOKENS - 2 if prompt else TOKENS
        tokens, mask = self.text.tokens("text_encoder", [prompt], read, prefix=before)
        hidden = self.encode_text("text_encoder", tokens, attention_mask=mask)[0]
        check_width(self.denoiser.config, "caption_channels", hidden.shape[-1], "text_encoder")
        kept = [0, *range(read - TOKENS + 1, read)]
        return hidden[:, kept], mask[:, kept].to(hidden)

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: tuple[Tensor, ...],
    ) -> Tensor:
        """The flow's velocity at `z`: [B, C, h, w]."""
        hidden, mask = condition
        time = timestep * self.denoiser.config.timestep_scale
        return self.denoiser(z, encoder_hidden_states=hidden, timestep=time, encoder_attention_mask=mask).sample


def instruction() -> str:
    """What Sana's pipeline puts before a prompt, unless told otherwise."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
