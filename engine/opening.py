"""The engine that a command line describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import Config
from .data import read_names, read_neighbours
from .engine import Engine
from .errors import UsageError


def open_engine(
    config: Config,
    *,
    pack: str = "digits",
    classifier: str | None = None,
    model: str | None = None,
    labels: str | None = None,
    classes: str | None = None,
    checkpointing: bool = False,
    memory_budget: float | None = None,
    neighbours: Path | None = None,
    **own: Any,
) -> Engine:
    """Open a pack's engine, or with `model` any diffusion model and classifier; arguments are the options' values.

    Args:
        memory_budget: in GB.
        own: further options that need a model: prompts, head, weights, image_size, dtype; None means not given.

    Raises:
        UsageError: an option does not fit; the message names it.
    """
    own = {"labels": labels, "classes": classes, **own}
    own = {name: value for name, value in own.items() if value is not None}
    saving: dict[str, Any] = {"checkpointing": checkpointing}
    if memory_budget is not None:
        saving["memory_budget"] = memory_budget * 1e9
    if neighbours is not None:
        saving["neighbours"] = read_neighbours(neighbours)
    if model is None:
        if own:
            raise UsageError(f"{next(iter(own))}: needs --model; the pack's models have their own")
        return Engine.from_pack(pack, classifier or "clean", config, **saving)
    if classifier is None:
        raise UsageError("classifier: --model needs one to explain; give a folder, a hub id or torchvision:NAME")
    if labels is not None:
        own["labels"] = read_names(labels)
    if classes is not None:
        own["classes"] = _numbers(classes)
    return Engine.from_pretrained(model, classifier, config, **own, **saving)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(f"classes: expected numbers separated by commas, got {text!r}") from error
