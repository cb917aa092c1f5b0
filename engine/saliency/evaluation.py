"""Saliency methods side by side, by the same metrics on the same images."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CounterlensError, install_hint
from ..files import write_atomically
from ..metrics.imputation import road
from ..metrics.inputs import Baseline, said
from ..metrics.intervals import bootstrap
from ..metrics.msi_score import MSI, msi
from ..metrics.paths import Faithfulness, deletion, insertion
from ..metrics.quantities import LogOdds, Quantity, make_quantity
from ..models.holding import switched
from ..models.protocols import Classifier
from ..showing import one_line
from .lax import LAX
from .methods import check_methods, explain_with, predicted
from .taps import NoMaps

# Metric: whether more is better.
METRICS = {"msi": True, "base_score_area": True, "insertion": True, "deletion": False, "road": False}
DRAWS = 2000
STEPS = 32  # of the insertion and deletion curves


@dataclass(frozen=True)
class Scored:
    """One method on N images.

    Attributes:
        saliency: [N, H, W] in [0, 1]. scores: [N, H, W] as the method gives them.
        target: [N] the explained labels.
        msi: of `saliency`.
        inserted, removed: of the ranks of `scores`.
        values: metric (see `METRICS`, `base_score`, `sufficient_area` and `mask_area`) to [N].
        seconds: for one image.
    """

    saliency: Tensor
    scores: Tensor
    target: Tensor
    msi: MSI
    inserted: Faithfulness
    removed: Faithfulness
    values: dict[str, Tensor]
    seconds: float

    __repr__ = one_line


def score_maps(
    classifier: Classifier,
    images: Tensor,  # [N, 3, H, W]
    saliency: Tensor,  # [N, H, W]
    scores: Tensor,  # [N, H, W]
    target: Tensor,  # [N]
    quantity: Quantity,
    *,
    alpha_min: float = 0.5,
    baseline: Baseline = "mean",
    seeds: int | Sequence[int] = 0,
    seconds: float = 0.0,
    batch: int = 64,
) -> Scored:
    """Every metric of maps that are there; `saliency` is compared by value, `scores` by rank.

    Raises:
        UsageError: sizes do not fit, or a map holds NaN.
    """
    given: dict[str, Any] = {"quantity": quantity, "baseline": baseline, "seeds": seeds, "batch_size": batch}
    by_value = msi(classifier, images, saliency, target, alpha_min=alpha_min, area=False, **given)
    imputed = {k: v for k, v in given.items() if k != "baseline"}
    with switched(said, True):  # once, of the values
        by_area = msi(classifier, images, scores, target, alpha_min=alpha_min, **given)
        inserted = insertion(classifier, images, scores, target, steps=STEPS, **given)
        removed = deletion(classifier, images, scores, target, steps=STEPS, **given)
        replaced = road(classifier, images, scores, target, **imputed)
    values = {
        "msi": by_value.score,
        "base_score": by_value.base_score,
        "base_score_area": by_area.base_score_area,
        "insertion": inserted.score,
        "deletion": removed.score,
        "road": replaced.score,
        "sufficient_area": by_area.sufficient_area,
        "mask_area": by_value.curves.areas[:, 0],
    }
    return Scored(saliency, scores, target, by_value, inserted, removed, values, seconds)


def evaluate(
    classifier: Classifier,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    methods: Sequence[str],
    target: Tensor | None = None,  # [N]
    *,
    quantity: str | LogOdds | Quantity = "class",
    adapter: LAX | None = None,
    forward: Classifier | None = None,
    alpha_min: float = 0.5,
    baseline: Baseline = "mean",
    layer: str | None = None,
    seed: int = 0,
    seeds: int | Sequence[int] = 0,
    batch: int = 64,
    on_method: Callable[[str], None] = lambda _: None,
) -> dict[str, Scored]:
    """Explain the same images with several methods and score all of them alike.

    Args:
        methods: names in `methods.saliency_methods`.
        target: explained labels; the predictions without it.
        forward: the classifier as `runtime.forward.compile_classifier` made it, for the metrics; the same without it.
        alpha_min: of MSI, frozen before methods are compared.
        seeds: of ties, one per image.
        on_method: told the name of each method before it runs.
        classifier, images, quantity, adapter, baseline, layer, seed, batch: see `methods.explain_with`.

    Returns:
        Scores by method; one that has nothing to look at in this classifier is left out, with a warning.

    Raises:
        UsageError: an argument does not fit. NotFinite: the classifier or a method gives NaN or infinity for an image.
    """
    explained = make_quantity(classifier, quantity)
    if target is None:
        parts = [predicted(classifier, part, i * batch) for i, part in enumerate(images.split(batch))]
        target = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=images.device)
    out = {}
    chosen = check_methods(methods)
    for name in chosen:
        on_method(name)
        _wait(images)
        started = time.perf_counter()
        try:
            saliency, scores = explain_with(
                name, classifier, images, target, quantity=explained, baseline=baseline, adapter=adapter, layer=layer,
                seed=seed, batch=batch,
            )  # fmt: skip
        except NoMaps as error:
            if len(chosen) == 1:
                raise
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
            continue
        _wait(images)
        seconds = (time.perf_counter() - started) / max(1, len(images))
        out[name] = score_maps(
            classifier if forward is None else forward, images, saliency, scores, target, explained,
            alpha_min=alpha_min, baseline=baseline, seeds=seeds, seconds=seconds, batch=batch,
        )  # fmt: skip
    return out


def _wait(images: Tensor) -> None:
    """For the images' device, whose work goes on behind Python's back."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def interval(values: Tensor) -> dict[str, float]:
    """Mean of per-image values with its 95 % bootstrap interval: mean, low, high, n; NaN where a value is."""
    if bool(values.isnan().any()):
        return {"mean": torch.nan, "low": torch.nan, "high": torch.nan, "n": len(values)}
    return asdict(bootstrap(values, draws=DRAWS))


def summarise(scored: dict[str, Scored]) -> dict[str, dict[str, Any]]:
    """Method to metric to mean and interval, and milliseconds per image."""
    return {
        name: {metric: interval(v) for metric, v in s.values.items()} | {"ms_per_image": 1e3 * s.seconds}
        for name, s in scored.items()
    }


def write_parquet(
    scored: dict[str, Scored],
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
