"""Saliency methods side by side, by the same metrics on the same images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CounterlensError, install_hint
from ..files import write_atomically
from ..metrics.intervals import DRAWS, bootstrap
from ..metrics.robust import brittle
from ..models.protocols import Classifier
from .explain import Explanations, explain
from .methods import predicted
from .table import METHODS, check_methods
from .taps import NoMaps


def evaluate(
    classifier: Classifier,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    methods: Sequence[str],
    target: Tensor | None = None,  # [N]
    *,
    metrics: Sequence[str] = ("main",),
    inside: Classifier | None = None,
    on_method: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> dict[str, Explanations]:
    """Explain the same images with several methods and score all of them alike.

    Args:
        methods: names in `table.METHODS`.
        target: explained labels; the predictions without it.
        metrics: names or groups in `metrics.table`.
        inside: what methods look into that look inside a classifier (`Method.inside`): the student of one that can only
            be called. Labels and scores are the classifier's all the same.
        on_method: told the name of each method before it runs.
        classifier, images, options: see `explain.explain`.

    Returns:
        Explanations by method; one that has nothing to look at in this classifier is left out, with a warning.

    Raises:
        UsageError: an argument does not fit. NotFinite: the classifier or a method gives NaN or infinity for an image.
    """
    out: dict[str, Explanations] = {}
    chosen = check_methods(methods)
    if inside is not None:
        if target is None:
            target = predicted(classifier, images)
        options["forward"] = options.get("forward") or classifier
    for name in chosen:
        on_method(name)
        seen = classifier if inside is None or not METHODS[name].inside else inside
        try:
            out[name] = explain(seen, images, name, target, metrics=metrics, **options)
        except NoMaps as error:
            if len(chosen) == 1:
                raise
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
    return out


def interval(values: Tensor) -> dict[str, float]:
    """Mean of per-image values with its 95 % bootstrap interval: mean, low, high, n; NaN where a value is."""
    if bool(values.isnan().any()):
        return {"mean": torch.nan, "low": torch.nan, "high": torch.nan, "n": len(values)}
    return asdict(bootstrap(values, draws=DRAWS))


def summarise(scored: dict[str, Explanations]) -> dict[str, dict[str, Any]]:
    """Method to metric to mean and interval, milliseconds per image, and what is `brittle`."""
    return {
        name: {metric: interval(v) for metric, v in s.values.items()}
        | {"ms_per_image": 1e3 * s.seconds, "brittle": brittle(s.values)}
        for name, s in scored.items()
    }


def write_parquet(
    scored: dict[str, Explanations],
    names: Sequence[str],
    labels: Sequence[str],
    path: Path,
    failed: Mapping[str, str] | None = None,
) -> None:
    """One row for each image and method: image, target, every metric; and one for each image that failed: its error.

    Raises:
        CounterlensError: pyarrow is missing, or the file cannot be written.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CounterlensError(
            f"pyarrow cannot be imported ({error}); the table per image needs it: {install_hint('explain')}"
        ) from error
    columns: dict[str, list[Any]] = {"image": [], "method": [], "target": [], "error": []}
    for method, s in scored.items():
        columns["image"] += list(names)
        columns["method"] += [method] * len(names)
        columns["target"] += [labels[t] for t in s.target.tolist()]
        columns["error"] += [None] * len(names)
        for metric, values in s.values.items():
            columns.setdefault(metric, []).extend(values.tolist())
    for image, message in (failed or {}).items():
        for column, cells in columns.items():
            cells.append({"image": image, "error": message}.get(column))
    write_atomically(path, lambda file: pyarrow.parquet.write_table(pyarrow.table(columns), file))
