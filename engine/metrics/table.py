"""The metrics by which saliency methods are compared: one line each. Imports no torch, so that `--help` can read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..tables import Table


@dataclass(frozen=True)
class Metric:
    """One number for each saliency map.

    Attributes:
        name: in results.
        function: from a `scoring.Scoring`, which holds N maps, to their values [N].
        higher_is_better: None for what describes a map and does not rank methods.
        heading: of its column.
        about: one line for people.
        from_msi: whether MSI's own curves give it, so that it costs nothing beside MSI.
        curve: from a `Scoring` to a line to draw, x [K] and y [K]. axes: the chart's title, and what x and y are.
    """

    name: str
    function: Callable[[Any], Any]
    higher_is_better: bool | None
    heading: str
    about: str
    from_msi: bool = False
    curve: Callable[[Any], tuple[Sequence[float], Sequence[float]]] | None = None
    axes: tuple[str, str, str] = ("", "", "")

    @property
    def arrow(self) -> str:
        """The heading, and which way is better."""
        return self.heading + {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]


METRICS = Table(
    "counterlens.metrics",
    Metric,
    [
        Metric("msi", lambda s: s.msi.score, True, "MSI", "what is marked is enough, needed and small", from_msi=True,
               curve=lambda s: s.difference, axes=("MSI", "threshold", "Ins - Del")),
        Metric("base_score", lambda s: s.msi.base_score, None, "BaseScore", "MSI without its penalty", from_msi=True),
        Metric("base_score_area", lambda s: s.msi.base_score_area, True, "BaseScore_area",
               "by ranks: contrast does not matter", from_msi=True),
        Metric("insertion", lambda s: s.inserted.score, True, "insertion", "probability while salient pixels appear",
               curve=lambda s: s.inserted.mean, axes=("most salient pixels shown", "share shown", "probability")),
        Metric("deletion", lambda s: s.removed.score, False, "deletion", "probability while salient pixels disappear",
               curve=lambda s: s.removed.mean, axes=("most salient pixels hidden", "share hidden", "probability")),
        Metric("road", lambda s: s.imputed.score, False, "ROAD", "probability with salient pixels imputed"),
        Metric("sufficient_area", lambda s: s.msi.sufficient_area, None, "sufficient",
               "least share of pixels with Ins - Del of a half", from_msi=True),
        Metric("mask_area", lambda s: s.msi.curves.areas[:, 0], None, "marked", "share of pixels at alpha_min",
               from_msi=True),
    ],
)  # fmt: skip


def compared() -> list[str]:
    """Names of the metrics that rank methods."""
    return [name for name, metric in METRICS.items() if metric.higher_is_better is not None]


def check_metrics(names: Sequence[str] | None) -> list[str]:
    """Names of metrics, none twice; without any, those that cost nothing beside MSI.

    Raises:
        UsageError: one is not in `METRICS`.
    """
    if names is None:
        return [name for name, metric in METRICS.items() if metric.from_msi]
    for name in names:
        if name not in METRICS:
            raise UsageError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
    return list(dict.fromkeys(names))
