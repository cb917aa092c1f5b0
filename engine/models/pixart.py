"""PixArt-Sigma and PixArt-alpha: text-conditional diffusion transformers over an AutoencoderKL's latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbone import vae_factor
from .files import pipeline_of
from .prompted import Prompted, check_width

LENGTHS = {"PixArtAlphaPipeline": 120}  # tokens of a prompt; of Sigma 300


class PixArt(Prompted):
    """A `PixArtTransformer2DModel`; of its output the noise is used, the learned variance left out.

    Conditions are T5's embedding [B, tokens, width] and its attention mask [B, tokens]. Where the transformer takes the
    image's size and aspect beside them (`use_additional_conditions`: alpha at 1024), it is given ours, as its pipeline
    does.

    Args:
        tokens: to which a prompt is padded.
        others: see `Prompted`.

    Source: Chen et al., arXiv 2310.00426 and 2403.04692.
    """

    networks = {"transformer": "PixArtTransformer2DModel", "vae": "AutoencoderKL"}  # noqa: RUF012
    encoders = {"text_encoder": "T5EncoderModel"}  # noqa: RUF012
    rectangular = True
    carried = True  # betas are linear: at the same share of the process there is far more noise
    others = ("text_encoder", "tokenizer")

    def __init__(self, *parts: Any, tokens: int = 300, **options: Any) -> None:
        self.tokens = tokens
        super().__init__(*parts, **options)

    @classmethod
    def more(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """The text encoder, and how long its prompts are."""
        name = pipeline_of(folder).get("_class_name")
        return super().more(folder, dtype) | {"tokens": LENGTHS.get(str(name), 300)}

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """T5's embedding [N, tokens, width], and its attention mask [N, tokens] in the same dtype."""
        said = [prompt.lower().strip() for prompt in prompts]  # as its pipeline, without bs4 and ftfy, cleans them
        tokens, mask = self.text.tokens("text_encoder", said, self.tokens)
        embedding = self.encode_text("text_encoder", tokens, attention_mask=mask)[0]
        check_width(self.denoiser.config, "caption_channels", embedding.shape[-1], "text_encoder")
        return embedding, mask.to(embedding)

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: tuple[Tensor, ...],
    ) -> Tensor:
        """The noise in `z`, or what the transformer was trained to predict: [B, C, h, w]."""
        embedding, mask = condition
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:
            height, width = (float(side * vae_factor(self.vae.config)) for side in z.shape[2:])
            sizes["resolution"] = torch.tensor([height, width], dtype=z.dtype, device=z.device).repeat(len(z), 1)
            sizes["aspect_ratio"] = torch.tensor([height / width], dtype=z.dtype, device=z.device).repeat(len(z), 1)
        out = self.denoiser(
            z, encoder_hidden_states=embedding, timestep=timestep, added_cond_kwargs=sizes, encoder_attention_mask=mask
        ).sample
        return out[:, : z.shape[1]]
