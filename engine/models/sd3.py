"""Stable Diffusion 3 and 3.5: flow matching by joint attention over an AutoencoderKL's 16 channels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .backbone import vae_factor
from .files import pipeline_of
from .prompted import Prompted, TextParts, check_width

T5_TOKENS = 256  # as its pipeline pads prompts for T5


class StableDiffusion3(Prompted):
    """An `SD3Transformer2DModel`: conditions are the three encoders' tokens side by side, and CLIP's pooled texts.

    [B, 77 + 256, width] and [B, pooled]; CLIP's tokens come from the last layer but one. Without `text_encoder_3/` T5's
    tokens are zeros, as its pipeline has them.

    Args: see `Prompted`.

    Source: Esser et al., arXiv 2403.03206.
    """

    networks = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}  # noqa: RUF012
    encoders = {  # noqa: RUF012
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    rectangular = True
    flows = True
    others = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    optional = ("text_encoder_3", "tokenizer_3")

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        config = self.denoiser.config
        factor = vae_factor(self.vae.config) * int(config.patch_size)
        self.longest = int(config.pos_embed_max_size) * factor
        if self.image_size // factor > (most := int(config.pos_embed_max_size)):
            raise UsageError(
                f"image_size: {self.image_size} is more than the {most * factor} that the denoiser knows places for "
                "(pos_embed_max_size)"
            )

    @classmethod
    def few_steps(cls, folder: Path, denoiser: Mapping[str, Any]) -> bool:
        """Turbo: its files are those of the model that it was distilled from, and its name alone says so."""
        names = [folder.name, str(pipeline_of(folder).get("_name_or_path", "")), str(denoiser.get("_name_or_path", ""))]
        if folder.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/commit
            names.append(folder.parents[1].name)
        return any("turbo" in name.rpartition("/")[2].lower() for name in names)

    @classmethod
    def more(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """The text encoders that there are."""
        present = {name: kind for name, kind in cls.encoders.items() if (folder / name).is_dir()}
        if "text_encoder_3" not in present and (pipeline_of(folder).get("text_encoder_3") or [None])[0] is not None:
            warnings.warn(
                f"model: {folder} has no text_encoder_3/ (T5), which its model_index.json names: zeros stand in for "
                "it, as in its own pipeline, and prompts are read by CLIP alone",
                stacklevel=2,
            )
        return {"text": TextParts(folder, dtype, present)}

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Tokens [N, 77 + 256, width] and pooled texts [N, pooled]."""
        config = self.denoiser.config
        width = int(config.joint_attention_dim)
        hidden, pooled = [], []
        for name in ("text_encoder", "text_encoder_2"):
            tokens, _ = self.text.tokens(name, prompts)
            said = self.encode_text(name, tokens, output_hidden_states=True)
            hidden.append(said.hidden_states[-2])
            pooled.append(said.text_embeds)
        clip, vector = torch.cat(hidden, dim=-1), torch.cat(pooled, dim=-1)
        check_width(config, "pooled_projection_dim", vector.shape[-1], "text_encoder, text_encoder_2")
        if (more := width - clip.shape[-1]) < 0:
            raise UsageError(
                f"text_encoder, text_encoder_2: their {clip.shape[-1]} channels are more than the denoiser's {width} "
                "(joint_attention_dim)"
            )
        if "text_encoder_3" in self.text.tokenizers:
            tokens, _ = self.text.tokens("text_encoder_3", prompts, T5_TOKENS)
            t5 = self.encode_text("text_encoder_3", tokens)[0]
            check_width(config, "joint_attention_dim", t5.shape[-1], "text_encoder_3")
        else:
            t5 = clip.new_zeros(len(prompts), T5_TOKENS, width)
        return torch.cat([torch.nn.functional.pad(clip, (0, more)), t5.to(clip)], dim=1), vector

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: tuple[Tensor, ...],
    ) -> Tensor:
        """The flow's velocity at `z`: [B, C, h, w]."""
        tokens, pooled = condition
        return self.denoiser(z, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=timestep).sample
