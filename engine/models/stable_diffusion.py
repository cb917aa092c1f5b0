"""Stable Diffusion 1.x and 2.x, miniSD and their relatives: a text-conditional latent diffusion model."""

from __future__ import annotations

import importlib.util
import re
import runpy
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CounterlensError, UsageError
from .backbone import Backbone
from .guidance_embedding import guidance_condition

# As published, punctuation included (LDCE, supplement): the full stop belongs to the prompt. The last three are binary
# attributes, the negative label's prompt first. `openai-imagenet` says OpenAI's names instead of the classifier's, and
# `official-age` what the authors' code says, which the paper does not.
PROMPTS: dict[str, str | tuple[str, str]] = {
    "imagenet": "a photo of a {label}.",
    "openai-imagenet": "a photo of a {label}.",
    "pets": "a photo of a {label}, a type of pet.",
    "flowers": "a photo of a {label}, a type of flower.",
    "smile": ("a photo of a non-smiling person", "a photo of a smiling person"),
    "age": ("a photo of an old person", "a photo of a young person"),
    "official-age": ("a photo of a old person", "a photo of a young person"),
}


def make_prompts(labels: Sequence[str], prompts: str | Sequence[str]) -> list[str]:
    """One prompt for each label: a name in `PROMPTS`, a template with {label}, or the prompts themselves.

    Raises:
        UsageError: a template has no {label}, there are more or fewer prompts than labels, or the labels are not
            ImageNet's. CounterlensError: OpenAI's names are not installed.
    """
    if prompts == "openai-imagenet":
        labels = openai_names(labels)
    chosen = PROMPTS.get(prompts, prompts) if isinstance(prompts, str) else prompts
    if isinstance(chosen, str):
        if "{label}" not in chosen:
            raise UsageError(
                f"prompts: {chosen!r} has no {{label}}; expected one of {', '.join(PROMPTS)} or a template"
            )
        if twice := [label for label, count in Counter(labels).items() if count > 1]:
            same = [i for i, label in enumerate(labels) if label == twice[0]]
            warnings.warn(
                f"prompts: labels {', '.join(map(str, same))} are all said as {chosen.replace('{label}', twice[0])!r} "
                f"({len(twice)} names repeat): text cannot tell them apart; give a prompt for each label",
                stacklevel=2,
            )
        return [chosen.replace("{label}", label) for label in labels]
    if len(chosen) != len(labels):
        raise UsageError(f"prompts: expected {len(labels)}, one per label, got {len(chosen)}")
    return list(chosen)


def prompts_alone(
    labels: Sequence[str], prompts: str | Sequence[str] | None, classes: Sequence[int] | None
) -> list[str]:
    """The prompts of a text-conditional model, see `make_prompts`; as ImageNet's without any.

    Raises:
        UsageError: as `make_prompts`; or classes are given, of which there are none.
    """
    if classes is not None:
        raise UsageError("classes: this model is text-conditional and has none; say the labels with prompts")
    return make_prompts(labels, "imagenet" if prompts is None else prompts)


def openai_names(labels: Sequence[str]) -> list[str]:
    """OpenAI's names of ImageNet's classes, as the package open_clip_torch ships them, for a classifier's labels.

    Only its list is read: the package itself, and what it needs, are not imported.

    Raises:
        UsageError: the labels are not ImageNet's, in ImageNet's order. CounterlensError: the package is missing.
    """
    package = importlib.util.find_spec("open_clip")
    path = Path(next(iter(package.submodule_search_locations or ())), "zero_shot_metadata.py") if package else None
    if path is None or not path.is_file():
        raise CounterlensError(
            "prompts: openai-imagenet reads the names of ImageNet's classes from the package open_clip_torch, which is "
            "not installed (2.21 or newer); pip install --no-deps open_clip_torch"
        )
    names = list(runpy.run_path(str(path))["IMAGENET_CLASSNAMES"])
    if len(labels) != len(names):
        raise UsageError(f"prompts: openai-imagenet has {len(names)} classes, this classifier {len(labels)} labels")
    shared = sum(bool(_words(label) & _words(name)) for label, name in zip(labels, names, strict=True))
    if shared < len(names) / 2:
        raise UsageError(
            f"prompts: openai-imagenet stands in ImageNet's order, these labels do not: {shared} of {len(names)} share "
            f"a word with theirs; {labels[0]!r} would be said {names[0]!r}"
        )
    return names


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


class StableDiffusion(Backbone):
    """A `UNet2DConditionModel` over an `AutoencoderKL`'s latents; the condition is the target's text embedding.

    Args:
        vae, unet, text_encoder, tokenizer: parts of a diffusers folder.
        alphas_cumprod, options: see `Backbone`.

    Raises:
        UsageError: the parts or the image size do not fit.
    """

    conditioning = "text"
    networks = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}  # noqa: RUF012
    others = ("text_encoder", "tokenizer")
    takes = ("time_cond_proj_dim",)
    sized = True
    rectangular = True
    unet: Any = property(attrgetter("denoiser"))

    def __init__(
        self,
        vae: Any,
        unet: Any,
        text_encoder: Any,
        tokenizer: Any,
        alphas_cumprod: Tensor,
        **options: Any,
    ) -> None:
        super().__init__(vae, unet, alphas_cumprod, **options)
        width = unet.config.cross_attention_dim
        widths = set(width) if isinstance(width, list | tuple) else {width}
        if widths != {text_encoder.config.hidden_size}:
            raise UsageError(
                f"text encoder: its {text_encoder.config.hidden_size} channels are not the UNet's {width} "
                "(cross_attention_dim)"
            )
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.prompts: list[str] = []
        self._embeddings: dict[str, Tensor] = {}
        self.null_condition(1)  # embedded here, so that it is a constant where a step is traced

    @classmethod
    def more(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Text encoder and tokenizer (see `text.open_text_encoder`)."""
        from .text import open_text_encoder

        text_encoder, tokenizer = open_text_encoder(folder, dtype)
        return {"text_encoder": text_encoder, "tokenizer": tokenizer}

    def fingerprint(self) -> Mapping[str, Any]:
        """All but the prompts that were encoded so far."""
        return {name: value for name, value in vars(self).items() if name != "_embeddings"}

    def describe(
        self,
        labels: Sequence[str],
        *,
        prompts: str | Sequence[str] | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        """Name the labels and how each is said in words (see `make_prompts`; as ImageNet's without prompts).

        Raises:
            UsageError: prompts do not fit the labels, or one is longer than the text encoder reads; or classes are
                given, of which there are none.
        """
        made = prompts_alone(labels, prompts, classes)
        longest = self.tokenizer.model_max_length
        for prompt in made:
            if (count := len(self.tokenizer(prompt).input_ids)) > longest:
                raise UsageError(f"prompts: {prompt!r} has {count} tokens, the text encoder reads {longest}")
        self.labels, self.prompts = list(labels), made

    def modules(self) -> list[nn.Module]:
        """The VAE, the UNet and the text encoder."""
        return [*super().modules(), self.text_encoder]

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Tensor,  # [B, tokens, width]
    ) -> Tensor:
        """What the UNet says: [B, C, h, w]."""
        told = guidance_condition(self.unet, z)
        return self.unet(z, timestep, timestep_cond=told, encoder_hidden_states=condition).sample

    def condition(
        self,
        targets: Tensor,  # [B]
    ) -> Tensor:
        """Text embeddings of the targets' prompts: [B, tokens, width]; each prompt is encoded once."""
        return torch.cat([self._embed(self.prompts[t]) for t in targets.tolist()])

    def null_condition(self, batch: int) -> Tensor:
        """The empty prompt's embedding, `batch` times: [batch, tokens, width]."""
        return self._embed("").expand(batch, -1, -1)

    @torch.no_grad()
    def _embed(self, prompt: str) -> Tensor:
        device = next(self.text_encoder.parameters()).device
        if prompt not in self._embeddings or self._embeddings[prompt].device != device:
            tokens = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
            self._embeddings[prompt] = self.text_encoder(tokens.to(device)).last_hidden_state  # [1, tokens, width]
        return self._embeddings[prompt]
