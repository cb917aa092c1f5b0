"""transformers, where it is needed: text encoders and tokenizers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import CounterlensError, UsageError, install_hint
from .files import read_json, read_part


def import_transformers() -> ModuleType:
    """The package, which only real models need.

    Raises:
        CounterlensError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise CounterlensError(f"transformers is not installed; {install_hint('models')}") from error
    # Bars for the fraction of a second in which a text encoder loads would only hide what the command line says.
    transformers.utils.logging.disable_progress_bar()
    return transformers


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        CounterlensError: it cannot be read, or needs a package that is not installed.
    """
    try:
        return import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise CounterlensError(f"{folder}: no tokenizer that can be read ({error})") from error


def open_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """CLIP text encoder and tokenizer of a Stable Diffusion folder.

    Raises:
        UsageError: the text encoder is another kind. CounterlensError: see `read_part` and `open_tokenizer`.
    """
    transformers = import_transformers()
    path = folder / "text_encoder" / "config.json"
    config = read_json(path)
    if (kind := config.get("model_type", "clip_text_model")) not in ("clip_text_model", "clip"):
        raise UsageError(f"{path}: model_type is {kind!r}; expected clip_text_model")
    if config.get("use_attention_mask"):
        raise UsageError(f"{path}: use_attention_mask is set: the prompt's padding is hidden, which is not supported")
    tokenizer = open_tokenizer(folder / "tokenizer")
    prompt_length(tokenizer, "text_encoder")
    return read_part(transformers.CLIPTextModel, folder / "text_encoder", dtype), tokenizer


def prompt_length(tokenizer: Any, encoder: str) -> int:
    """Tokens to which prompts are padded.

    Raises:
        UsageError: the tokenizer does not say; its class then makes it an endless number.
    """
    if (length := tokenizer.model_max_length) > LONGEST:
        raise UsageError(
            f"{tokenizer.name_or_path}: tokenizer_config.json says no model_max_length; expected what {encoder} reads, "
            "for CLIP 77"
        )
    return int(length)


LONGEST = 2**20  # tokens that any prompt could have
# What a text encoder's config calls the model that each class reads.
KINDS = {
    "CLIPTextModel": ("clip_text_model", "clip"),
    "CLIPTextModelWithProjection": ("clip_text_model", "clip"),
    "T5EncoderModel": ("t5",),
    "Gemma2Model": ("gemma2", "gemma2_text"),
}


def open_encoder(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """A text encoder of a class of transformers.

    Raises:
        UsageError: the folder holds another kind. CounterlensError: see `read_part`.
    """
    path = folder / "config.json"
    if (said := read_json(path).get("model_type", KINDS[kind][0])) not in KINDS[kind]:
        raise UsageError(f"{path}: model_type is {said!r}; expected {KINDS[kind][0]}")
    return read_part(getattr(import_transformers(), kind), folder, dtype)
