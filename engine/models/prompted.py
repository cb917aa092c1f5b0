"""Backbones whose conditions are prompts, embedded once by text encoders that are then freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from .backbone import Backbone
from .conditions import Condition
from .stable_diffusion import prompts_alone
from .text import open_encoder, open_tokenizer, prompt_length
from .wide import exact

AT_ONCE = 64  # labels whose prompts are embedded as soon as they are known; of more, those that a batch asks for


class TextParts:
    """Text encoders and tokenizers of a folder; the encoders are read again where they are asked for once freed.

    Args:
        folder: of the whole model.
        dtype: of the encoders' weights.
        encoders: their folders, to classes of transformers; each one's tokenizer lies in the folder that ends alike.

    Raises:
        UsageError, CounterlensError: see `text.open_encoder` and `text.open_tokenizer`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, encoders: Mapping[str, str]) -> None:
        self.tokenizers = {name: open_tokenizer(folder / tokenizer_of(name)) for name in encoders}
        self.readers = {name: partial(open_encoder, folder / name, kind, dtype) for name, kind in encoders.items()}
        self.held: dict[str, Any] = {}

    def encoder(self, name: str) -> Any:
        """The text encoder in the folder of this name."""
        if name not in self.held:
            self.held[name] = self.readers[name]()
        return self.held[name]

    def free(self) -> None:
        """Let the encoders go."""
        self.held.clear()

    def tokens(
        self, name: str, prompts: Sequence[str], length: int | None = None, prefix: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask [prompts, length] for the encoder of this name, padded to one length.

        Raises:
            UsageError: a prompt is longer.
        """
        tokenizer = self.tokenizers[name]
        length = length or prompt_length(tokenizer, name)
        for prompt in prompts:
            if (count := len(tokenizer(prefix + prompt).input_ids)) > length:
                raise UsageError(f"prompts: {prompt!r} has {count} tokens, {name} reads {length}")
        texts = [prefix + prompt for prompt in prompts]
        given = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return given.input_ids, given.attention_mask


def tokenizer_of(encoder: str) -> str:
    """The folder of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


class Prompted(Backbone):
    """A denoiser that takes prompts as one or several tensors, which `embed` makes.

    Args:
        vae, denoiser, alphas_cumprod: see `Backbone`.
        text: reads and frees the text encoders.
        options: of `Backbone`.

    Raises:
        UsageError: the parts or the image size do not fit.
    """

    conditioning = "text"
    encoders: ClassVar[dict[str, str]]  # folder of each text encoder to its class in transformers
    sized = True

    def __init__(self, vae: Any, denoiser: Any, alphas_cumprod: Any, text: TextParts, **options: Any) -> None:
        super().__init__(vae, denoiser, alphas_cumprod, **options)
        self.text = text
        self.prompts: list[str] = []
        self._embeddings: dict[str, tuple[Tensor, ...]] = {}
        self._prepare([""])
        # A constant where a step is traced, on the device of the denoiser.
        self._null = tuple(t.to(self._device()) for t in self._embeddings[""])

    @classmethod
    def more(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """The text encoders and their tokenizers."""
        return {"text": TextParts(folder, dtype, cls.encoders)}

    def fingerprint(self) -> Mapping[str, Any]:
        """All but the prompts that were embedded so far and what embeds them."""
        return {name: value for name, value in vars(self).items() if name not in ("_embeddings", "text")}

    def describe(
        self,
        labels: Sequence[str],
        *,
        prompts: str | Sequence[str] | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        """Name the labels and how each is said in words (see `make_prompts`; as ImageNet's without prompts).

        Raises:
            UsageError: prompts do not fit the labels, or one is longer than a text encoder reads; or classes are given,
                of which there are none.
        """
        made = prompts_alone(labels, prompts, classes)
        if len(made) <= AT_ONCE:
            self._prepare(made)
        else:  # the longest alone, so that one that is too long is refused here and not in the middle of a run
            with torch.no_grad():
                self.embed(list({max(made, key=lambda p: len(t(p).input_ids)) for t in self.text.tokenizers.values()}))
        self.text.free()
        self.labels, self.prompts = list(labels), made

    def condition(
        self,
        targets: Tensor,  # [B]
    ) -> tuple[Tensor, ...]:
        """What the targets' prompts are embedded as, [B, ...] each; see the family's `embed`."""
        prompts = [self.prompts[t] for t in targets.tolist()]
        if new := [p for p in dict.fromkeys(prompts) if p not in self._embeddings]:
            self._prepare(new)
            self.text.free()
        each = zip(*(self._embeddings[p] for p in prompts), strict=True)
        return tuple(torch.cat(tensors).to(self._device()) for tensors in each)

    def null_condition(self, batch: int) -> tuple[Tensor, ...]:
        """What the empty prompt is embedded as, `batch` times: [batch, ...] each."""
        if self._null[0].device != self._device():
            self._null = tuple(t.to(self._device()) for t in self._null)
        return tuple(t.expand(batch, *t.shape[1:]) for t in self._null)

    def answer(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Condition,
    ) -> Tensor:
        """What the denoiser says of `z`: [B, C, h, w]."""
        with exact(self.denoiser):
            return super().answer(z, timestep, condition)

    def decode(
        self,
        z: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Image [B, 3, H, W] in the latents' dtype, nominally in [-1, 1]."""
        with exact(self.vae):
            return super().decode(z)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Conditions of prompts, [prompts, ...] each, from `self.text`."""
        raise NotImplementedError

    def encode_text(
        self,
        name: str,
        tokens: Tensor,  # [N, length]
        **options: Any,
    ) -> Any:
        """What the text encoder of this name says, computed where the denoiser is."""
        device = self._device()
        given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
        return self.text.encoder(name).to(device)(tokens.to(device), **given)

    def _device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @torch.no_grad()
    def _prepare(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt not in self._embeddings:
                self._embeddings[prompt] = tuple(t.cpu() for t in self.embed([prompt]))


def check_width(config: Any, field: str, width: int, what: str) -> None:
    """Refuse a text encoder that is not the denoiser's.

    Raises:
        UsageError: naming the field.
    """
    if (wanted := config.get(field)) is not None and wanted != width:
        raise UsageError(f"{what}: its {width} channels are not the denoiser's {wanted} ({field})")
