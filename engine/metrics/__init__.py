"""Metrics of saliency maps (perturbation curves, MSI and their relatives) and of counterfactuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lazy import find

if TYPE_CHECKING:
    from .calibration import Calibration, calibrate, load_alpha_min
    from .counterfactuals import CounterfactualQuality, counterfactual_quality
    from .curves import Curves, perturbation_curve
    from .distribution import fid, kid, sfid
    from .imputation import impute, road
    from .intervals import Interval, bootstrap
    from .msi_score import MSI, msi
    from .paths import Faithfulness, comprehensiveness, deletion, insertion, lerf, morf, sufficiency
    from .quantities import group_odds
    from .reference_maps import gradient_maps
    from .transition import Transition, cout

_HOMES = {
    ".calibration": ("Calibration", "calibrate", "load_alpha_min"),
    ".counterfactuals": ("CounterfactualQuality", "counterfactual_quality"),
    ".curves": ("Curves", "perturbation_curve"),
    ".distribution": ("fid", "kid", "sfid"),
    ".imputation": ("impute", "road"),
    ".intervals": ("Interval", "bootstrap"),
    ".msi_score": ("MSI", "msi"),
    ".paths": ("Faithfulness", "comprehensiveness", "deletion", "insertion", "lerf", "morf", "sufficiency"),
    ".quantities": ("group_odds",),
    ".reference_maps": ("gradient_maps",),
    ".transition": ("Transition", "cout"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MSI", "Calibration", "CounterfactualQuality", "Curves", "Faithfulness", "Interval", "Transition", "bootstrap",
    "calibrate", "comprehensiveness", "counterfactual_quality", "cout", "deletion", "fid", "gradient_maps",
    "group_odds", "impute", "insertion", "kid", "lerf", "load_alpha_min", "morf", "msi", "perturbation_curve", "road",
    "sfid", "sufficiency",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # `counterlens --help` reads `.cli` in this folder, and must not wait for torch.
    return find(__name__, _HOME, name)
