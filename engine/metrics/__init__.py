"""Metrics of saliency maps (perturbation curves, MSI and their relatives) and of counterfactuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .curves import Curves, perturbation_curve
    from .msi_score import MSI, msi
    from .quantities import group_odds

__all__ = ["MSI", "Curves", "group_odds", "msi", "perturbation_curve"]

_HOMES = {
    "MSI": ".msi_score",
    "Curves": ".curves",
    "group_odds": ".quantities",
    "msi": ".msi_score",
    "perturbation_curve": ".curves",
}


def __getattr__(name: str) -> Any:
    # `counterlens --help` reads `.cli` in this folder, and must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
