"""What an audit found, in numbers: rates with bootstrap intervals, flips by class pair, groups and timing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..blackbox.box import said
from ..metrics.intervals import DRAWS, bootstrap
from ..metrics.robust import brittle
from ..metrics.table import METRICS
from .results import Results

# Enough for every number; images, grids and curves stay in the files.
COLUMNS = [
    "number", "id", "slices", "label", "prediction", "confidence", "correct", "status", "target",
    "counterfactual_prediction", "target_confidence", "flipped", "transfer", "l1", "changed_area", "away_prediction",
    "true_flipped", "msi", "scores", "brittle", "seconds", "wall_seconds",
]  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean over `n` samples with its 95 % bootstrap interval; None without a sample, no interval for one."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"mean": _rounded(self.mean), "low": _rounded(self.low), "high": _rounded(self.high), "n": self.n}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def interval(values: Iterable[float | bool | None]) -> Interval:
    """The mean of the values that are there, with its 95 % bootstrap interval, see `metrics.intervals.bootstrap`."""
    v = np.array([float(x) for x in values if x is not None and x == x])
    if len(v) == 0:
        return Interval(None, None, None, 0)
    if len(v) == 1:
        return Interval(float(v[0]), None, None, 1)
    if v.min() == v.max() and v[0] in (0.0, 1.0):  # the rule of three instead of no width
        edge = 1 - 0.05 ** (1 / len(v))
        return Interval(float(v[0]), 0.0 if v[0] == 0 else 1 - edge, edge if v[0] == 0 else 1.0, len(v))
    return Interval(**asdict(bootstrap(torch.from_numpy(v), draws=DRAWS)))


@dataclass
class Group:
    """Rates of some samples: a class, a slice's value, or all."""

    name: str
    rows: list[dict[str, Any]] = field(repr=False)

    def table(self) -> dict[str, Any]:
        """Numbers for a row of a table, intervals included."""
        done = [r for r in self.rows if r["status"] == "done" and r["flipped"] is not None]
        return {
            "name": self.name,
            "samples": len(self.rows),
            "accuracy": interval(r["correct"] for r in self.rows),
            "flipped": interval(r["flipped"] for r in done),
            "transfer": interval(r["transfer"] for r in done if r["flipped"]),
            "l1": interval(r["l1"] for r in done if r["flipped"]),
            "changed_area": interval(r["changed_area"] for r in done if r["flipped"]),
            "msi": interval(r["msi"] for r in self.rows),
        }


@dataclass
class Summary:
    """An audit in numbers.

    Attributes:
        samples, done, skipped, failed: counts of rows.
        overall: of all samples; `by_class` by prediction, `by_slice` by column.
        scores: of the saliency maps, by metric of --metrics; `brittle`: what the metrics lose that lose more than 0.1
            when the maps are moved by one pixel, and the share of maps that do.
        pairs: (prediction, counterfactual's prediction) to count, where the prediction changed.
        seconds: p20, p50 and p80 of a counterfactual's share; empty without one.
        queries: of classifiers that can only be called, in the last session and in all (`BlackBox.record`).
    """

    samples: int
    done: int
    skipped: int
    failed: int
    overall: dict[str, Any]
    by_class: list[dict[str, Any]]
    by_slice: dict[str, list[dict[str, Any]]]
    scores: dict[str, Interval]
    brittle: dict[str, float]
    brittle_maps: Interval
    pairs: Counter[tuple[str, str]]
    seconds: dict[str, float]
    queries: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "samples": self.samples,
            "done": self.done,
            "skipped": self.skipped,
            "failed": self.failed,
            **{k: v.record() for k, v in self.overall.items() if isinstance(v, Interval)},
            **({"scores": {k: v.record() for k, v in self.scores.items()}} if self.scores else {}),
            **({"brittle": self.brittle, "brittle_maps": self.brittle_maps.record()} if self.brittle_maps.n else {}),
            "seconds": self.seconds,
            **({"queries": self.queries} if self.queries else {}),
        }

    @property
    def fragile(self) -> str:
        """What the maps lose when they are moved by one pixel, in a sentence; empty where that is little."""
        if not self.brittle:
            return ""
        lost = ", ".join(f"{METRICS[name].heading} gets worse by {by:.2f}" for name, by in self.brittle.items())
        return (
            f"The saliency maps are brittle: moved by one pixel, their {lost} ({self.brittle_maps.mean:.0%} of the "
            "maps). A part of what they mark is a pattern that only this model sees."
        )

    def lines(self) -> list[str]:
        """A few lines for a terminal."""
        lines = [f"{self.samples} samples: {self.done} explained, {self.skipped} skipped, {self.failed} failed"]
        names = {
            "accuracy": "correct", "flipped": "flipped", "transfer": "flips that the judge confirms",
        }  # fmt: skip
        for key, name in names.items():
            if (v := self.overall[key]).mean is not None:
                between = "" if v.low is None else f"{v.low:.1%} to {v.high:.1%} "
                lines.append(f"{name}: {v.mean:.1%} ({between}of {v.n})")
        for key, value in self.scores.items():
            if value.mean is not None:
                between = "" if value.low is None else f" ({value.low:.3f} to {value.high:.3f})"
                lines.append(f"{METRICS[key].arrow}: {value.mean:.3f}{between}")
        if self.fragile:
            lines.append(self.fragile)
        if self.seconds:
            lines.append(f"{self.seconds['p50']:.2f} s for each counterfactual (p50)")
        return lines + [said(record) for record in self.queries]


def summarise(results: Results) -> Summary:
    """Read an audit's rows and count."""
    rows = list(results.rows(COLUMNS))
    state = Counter(r["status"] for r in rows)
    classes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    slices: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["prediction"] is not None:
            classes[row["prediction"]].append(row)
        for column, value in (row["slices"] or {}).items():
            slices[column][value].append(row)
    scored = [r["scores"] for r in rows if r["scores"]]
    scores = {name: torch.tensor([s[name] for s in scored]) for name in scored[0]} if scored else {}
    return Summary(
        samples=len(rows),
        done=state["done"],
        skipped=state["skipped"],
        failed=state["failed"],
        overall=Group("all", rows).table(),
        by_class=_tables(classes),
        by_slice={column: _tables(values) for column, values in sorted(slices.items())},
        scores={name: interval(values.tolist()) for name, values in scores.items()},
        brittle=brittle(scores),
        brittle_maps=interval(r["brittle"] for r in rows),
        pairs=Counter(
            (r["prediction"], r["counterfactual_prediction"])
            for r in rows
            if r["counterfactual_prediction"] is not None and r["counterfactual_prediction"] != r["prediction"]
        ),
        seconds=_quantiles([r["seconds"] for r in rows if r["seconds"] is not None]),
        queries=results.manifest.get("queries", []),
    )


def _tables(groups: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    ordered = sorted(groups.items(), key=lambda item: (len(item[0]), item[0]))
    return [Group(name, rows).table() for name, rows in ordered]


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    p20, p50, p80 = np.quantile(np.array(values, dtype=float), [0.2, 0.5, 0.8]).tolist()
    return {"p20": round(p20, 4), "p50": round(p50, 4), "p80": round(p80, 4)}
