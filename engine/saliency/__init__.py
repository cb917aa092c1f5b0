"""Saliency: the LAX adapter, established methods beside it, and what they explain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lazy import find

if TYPE_CHECKING:
    from ..models.image_classifiers import wrap_classifier
    from .evaluation import evaluate, summarise
    from .lax import LAX, open_adapter
    from .methods import explain_with
    from .one_file import export_saliency
    from .recipes import train_adapter
    from .training import Schedule

_HOMES = {
    "LAX": ".lax", "Schedule": ".training", "evaluate": ".evaluation", "explain_with": ".methods",
    "export_saliency": ".one_file", "open_adapter": ".lax", "summarise": ".evaluation", "train_adapter": ".recipes",
    "wrap_classifier": "..models.image_classifiers",
}  # fmt: skip

__all__ = [
    "LAX", "Schedule", "evaluate", "explain_with", "export_saliency", "open_adapter", "summarise", "train_adapter",
    "wrap_classifier",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # `counterlens --help` reads `.cli` in this folder, and must not wait for torch.
    return find(__name__, _HOMES, name)
