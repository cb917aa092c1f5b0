"""Metrics of saliency maps (perturbation curves, MSI and their relatives) and of counterfactuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lazy import find

if TYPE_CHECKING:
    from .attributes import attributes_changed, correlation_difference, read_attributes
    from .calibration import Calibration, calibrate, load_alpha_min
    from .counterfactuals import CounterfactualQuality, counterfactual_quality
    from .curves import Curves, perturbation_curve
    from .distribution import fid, kid, sfid
    from .faithfulness import (
        faithfulness_correlation,
        faithfulness_estimate,
        infidelity,
        irof,
        monotonicity,
        region_perturbation,
    )
    from .imputation import impute, road
    from .intervals import Interval, bootstrap
    from .localisation import mask_auc, pointing_game, relevance_mass, relevance_rank, top_k_intersection
    from .msi_score import MSI, msi
    from .paths import Faithfulness, comprehensiveness, deletion, insertion, lerf, morf, sufficiency
    from .protocols import Batch, Facts, find_protocol, protocol_table
    from .quantities import group_odds
    from .randomisation import efficient_mprt, mprt, smoothed
    from .reference_maps import gradient_maps
    from .shape import complexity, effective_complexity, islands, rank_variation, sparseness
    from .stability import sensitivity
    from .transition import Transition, cout

_HOMES = {
    ".attributes": ("attributes_changed", "correlation_difference", "read_attributes"),
    ".calibration": ("Calibration", "calibrate", "load_alpha_min"),
    ".counterfactuals": ("CounterfactualQuality", "counterfactual_quality"),
    ".curves": ("Curves", "perturbation_curve"),
    ".distribution": ("fid", "kid", "sfid"),
    ".faithfulness": (
        "faithfulness_correlation",
        "faithfulness_estimate",
        "infidelity",
        "irof",
        "monotonicity",
        "region_perturbation",
    ),
    ".imputation": ("impute", "road"),
    ".intervals": ("Interval", "bootstrap"),
    ".localisation": (
        "mask_auc",
        "pointing_game",
        "relevance_mass",
        "relevance_rank",
        "top_k_intersection",
    ),
    ".msi_score": ("MSI", "msi"),
    ".paths": ("Faithfulness", "comprehensiveness", "deletion", "insertion", "lerf", "morf", "sufficiency"),
    ".protocols": ("Batch", "Facts", "find_protocol", "protocol_table"),
    ".quantities": ("group_odds",),
    ".randomisation": ("efficient_mprt", "mprt", "smoothed"),
    ".reference_maps": ("gradient_maps",),
    ".shape": ("complexity", "effective_complexity", "islands", "rank_variation", "sparseness"),
    ".stability": ("sensitivity",),
    ".transition": ("Transition", "cout"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MSI", "Batch", "Calibration", "CounterfactualQuality", "Curves", "Facts", "Faithfulness", "Interval",
    "Transition", "attributes_changed", "bootstrap", "calibrate", "complexity", "comprehensiveness",
    "correlation_difference", "counterfactual_quality", "cout", "deletion", "effective_complexity",
    "efficient_mprt", "faithfulness_correlation", "faithfulness_estimate", "fid", "find_protocol", "gradient_maps",
    "group_odds", "impute", "infidelity", "insertion", "irof", "islands", "kid", "lerf", "load_alpha_min",
    "mask_auc", "monotonicity", "morf", "mprt", "msi", "perturbation_curve", "pointing_game", "protocol_table",
    "rank_variation", "read_attributes", "region_perturbation", "relevance_mass", "relevance_rank", "road",
    "sensitivity", "sfid", "smoothed", "sparseness", "sufficiency", "top_k_intersection",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # `counterlens --help` reads `.cli` in this folder, and must not wait for torch.
    return find(__name__, _HOME, name)
