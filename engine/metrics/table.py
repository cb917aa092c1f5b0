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
        group: `main`; `shape`, of the map alone; `robust`, moved and smoothed maps; `judge`, asked of another model;
            `field`, other faithfulness metrics; `stability`, which ask the method again; `masks`, against given ones.
        from_msi: whether MSI's own curves give it, so that it costs nothing beside MSI.
        curve: from a `Scoring` to a line to draw, x [K] and y [K]. axes: the chart's title, and what x and y are.
    """

    name: str
    function: Callable[[Any], Any]
    higher_is_better: bool | None
    heading: str
    about: str
    group: str = "main"
    from_msi: bool = False
    curve: Callable[[Any], tuple[Sequence[float], Sequence[float]]] | None = None
    axes: tuple[str, str, str] = ("", "", "")

    @property
    def arrow(self) -> str:
        """The heading, and which way is better."""
        return self.heading + {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]


GROUPS = ("main", "shape", "robust", "judge", "field", "stability", "masks")
NEEDS = {"judge": "another classifier (judge)", "stability": "the method itself (explain)", "masks": "masks"}


def _moved(name: str, of: str) -> Callable[[Any], Any]:
    """A metric's mean over maps moved by a pixel (`neighbours`), or of smoothed ones (`smoothed`)."""
    return lambda s: sum(METRICS[name].function(other) for other in getattr(s, of)) / len(getattr(s, of))


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
        Metric("islands", lambda s: s.shape.islands(s.scores), None, "islands",
               "median size in pixels of the connected parts of the top 10 %", "shape"),
        Metric("rank_variation", lambda s: s.shape.rank_variation(s.scores), None, "variation",
               "difference in rank of neighbouring pixels; a third is noise", "shape"),
        Metric("sparseness", lambda s: s.shape.sparseness(s.saliency), None, "sparseness",
               "Gini coefficient of the map", "shape"),
        Metric("complexity", lambda s: s.shape.complexity(s.saliency), None, "entropy", "of the map, in nats",
               "shape"),
        Metric("effective_complexity", lambda s: s.shape.effective_complexity(s.saliency), None, "used pixels",
               "how many are not zero", "shape"),
        *(
            Metric(f"{name}_{how}", _moved(name, of), higher, f"{heading}, {short}", f"{heading} of {about}", "robust")
            for name, heading, higher in (
                ("msi", "MSI", True), ("insertion", "insertion", True), ("deletion", "deletion", False),
                ("road", "ROAD", False),
            )
            for how, of, short, about in (
                ("moved", "neighbours", "moved", "the map moved by one pixel, mean of eight directions"),
                ("smoothed", "smoothed", "3x3", "the map's 3x3 means"),
            )
        ),
        Metric("msi_judge", lambda s: s.judged.msi.score, True, "MSI, judge", "MSI asked of the judge", "judge"),
        Metric("insertion_judge", lambda s: s.judged.inserted.score, True, "insertion, judge",
               "insertion asked of the judge", "judge"),
        Metric("deletion_judge", lambda s: s.judged.removed.score, False, "deletion, judge",
               "deletion asked of the judge", "judge"),
        Metric("faithfulness_correlation", lambda s: s.field("faithfulness_correlation", subset_size=s.subset), True,
               "faithfulness", "correlation of the map with what hiding random pixels does", "field"),
        Metric("faithfulness_estimate", lambda s: s.field("faithfulness_estimate", per_step=s.per_step), True,
               "estimate", "correlation of the map with what hiding its pixels, group by group, does", "field"),
        Metric("monotonicity", lambda s: s.field("monotonicity", per_step=s.per_step, rule="share"), True,
               "monotonicity", "how often showing more does not lower the probability", "field"),
        Metric("region_perturbation", lambda s: s.field("region_perturbation", patch=s.patch).score, True, "regions",
               "mean drop while patches are hidden", "field"),
        Metric("irof", lambda s: s.field("irof", patch=s.patch), True, "IROF", "area over the curve of patches",
               "field"),
        Metric("infidelity", lambda s: s.field("infidelity", patches=(s.patch,), scaled=True), False, "infidelity",
               "error of the map, best scaled, as a linear model of hidden patches", "field"),
        Metric("max_sensitivity", lambda s: s.sensitivity.maximum, False, "max-sensitivity",
               "largest change of the map under noise", "stability"),
        Metric("avg_sensitivity", lambda s: s.sensitivity.mean, False, "avg-sensitivity",
               "mean change of the map under noise", "stability"),
        Metric("pointing_game", lambda s: s.inside("pointing_game"), True, "pointing", "the largest value is inside",
               "masks"),
        Metric("relevance_mass", lambda s: s.inside("relevance_mass"), True, "mass", "share of the map inside",
               "masks"),
        Metric("relevance_rank", lambda s: s.inside("relevance_rank"), True, "rank",
               "share of the largest values inside, as many as the mask has", "masks"),
        Metric("mask_auc", lambda s: s.inside("mask_auc"), True, "AUC", "of the map as a score of being inside",
               "masks"),
    ],
)  # fmt: skip


def compared(names: Sequence[str] | None = None) -> list[str]:
    """Names of the metrics that rank methods: of all, or of those."""
    return [name for name in names or METRICS if METRICS[name].higher_is_better is not None]


def check_metrics(names: Sequence[str] | None, given: Sequence[str] = tuple(NEEDS)) -> list[str]:
    """Names of metrics, none twice, groups (see `Metric`) written out; `all`: every group that can be had.

    Args:
        names: without any, those that cost nothing beside MSI.
        given: groups among `NEEDS` whose need is met.

    Raises:
        UsageError: one is neither in `METRICS` nor in `GROUPS`, or what it needs is not given.
    """
    if names is None:
        return [name for name, metric in METRICS.items() if metric.from_msi]
    chosen: list[str] = []
    for name in names:
        if name in METRICS:
            chosen.append(name)
        elif name == "all":
            chosen += [n for n, m in METRICS.items() if m.group not in NEEDS or m.group in given]
        elif name in GROUPS:
            chosen += [n for n, m in METRICS.items() if m.group == name]
        else:
            raise UsageError(
                f"metrics: expected groups ({', '.join(GROUPS)}, all) or names, got {name!r}; names are "
                f"{', '.join(METRICS)}"
            )
    for name in chosen:
        if (group := METRICS[name].group) in NEEDS and group not in given:
            raise UsageError(f"metrics: {name} needs {NEEDS[group]}")
    return list(dict.fromkeys(chosen))
