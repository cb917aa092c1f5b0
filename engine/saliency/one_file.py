"""A LAX map and its MSI as one ONNX file: image and target in; map, logits, score and curves out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError
from counterlens.export.hashing import file_digest
from counterlens.export.onnx import appearing
from counterlens.export.program import Call, Loop, Storage, Values, check_file, write_program
from counterlens.export.program import Step as ProgramStep
from counterlens.export.store import weights_digest
from counterlens.export.versions import versions
from counterlens.kernels.curve.reference import mean_under_curve
from counterlens.kernels.perturb.reference import rank_counts

from ..core.whole_run import described, free_batch, parity_images, usable_inputs, write_card
from ..metrics.inputs import make_baseline
from ..metrics.msi_score import msi, threshold_grid
from ..models.freezing import frozen
from ..models.processors import card_fit
from ..outputs import Run, open_run
from ..packs import Pack
from ..portable.file import SALIENCY, SCHEMA_VERSION, card_of
from ..portable.overlay import PLASMA
from ..runtime import onnxruntime
from .lax import LAX
from .onnx import logistic, saliency_function

INPUTS = {
    "image": "pixels, red, green and blue, in [0, 1]",
    "target": "label whose evidence is asked for, by its place in `labels`; -1: the prediction",
}
OUTPUTS = {
    "saliency": "where the evidence is, in [0, 1]; 0 everywhere where image or target cannot be used",
    "scores": "the same before the sigmoid: finer ranks",
    "logits": "of the classifier",
    "prediction": "label with the largest logit; -1 where image or target cannot be used",
    "resolved_target": "label whose evidence is shown",
    "probability": "of the explained quantity, for the whole image",
    "msi": "base_score minus mask_area; NaN, as all numbers below, where image or target cannot be used",
    "base_score": "half of keep - remove at the first threshold, half of its mean over all",
    "mask_area": "share of pixels marked at the first threshold",
    "base_score_area": "base_score with the most salient pixels marked, whatever their values",
    "sufficient_area": "the smallest of `areas` with keep_area - remove_area of one half or more; 1: there is none",
    "keep": "probability with only the marked pixels shown, at each of `thresholds`",
    "remove": "probability with the marked pixels hidden",
    "keep_area": "as keep, with the share `areas` of the pixels marked",
    "remove_area": "as remove, likewise",
}
TERMS = ("msi", "base_score", "mask_area", "base_score_area", "sufficient_area")
CURVES = ("keep", "remove", "keep_area", "remove_area")
EQUAL_PREDICTIONS, CLOSE = 63 / 64, 0.98
WITHIN_MAP, WITHIN_MSI = 1 / 255, 1e-3  # a pixel on the edge of a threshold moves MSI by more


def saliency_program(
    adapter: LAX, baseline: str | float | Tensor, alpha_min: float = 0.5, steps: int = 16
) -> list[ProgramStep]:
    """`OUTPUTS` from the values image [B, 3, S, S] in [0, 1] and target [B] int64, -1 for the prediction.

    Equal pixels stand in an order that is the file's, the same for every image; `metrics.msi` draws one for each.
    To be run or written with classifier and head frozen.
    """
    classifier, quantity, size = adapter.classifier, adapter.quantity, adapter.image_size
    labels, pixels = len(classifier.labels), size * size
    levels = threshold_grid(alpha_min, steps)
    counts = rank_counts(levels, pixels)
    areas = (counts.double() / pixels).float()
    near = levels.float()  # none below the level itself, which the metric compares with in float64
    near = torch.where(near.double() < levels, torch.nextafter(near, torch.tensor(2.0)), near)
    grid = levels[None].expand(len(levels), -1)
    shares = mean_under_curve(torch.eye(len(levels), dtype=torch.float64), grid).float()  # of each threshold in a score
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(0))
    colour = baseline[None, :, None, None].float() if isinstance(baseline, Tensor) else baseline
    explain = saliency_function(adapter)

    def explain_image(image: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        usable = usable_inputs(image, target, labels)
        clean = torch.where(usable[:, None, None, None], image, 0.0)
        first = classifier.logits(clean).argmax(dim=1)
        wanted = torch.where(target < 0, first, target.clamp(max=labels - 1))
        saliency, scores, logits = explain(clean, wanted)
        usable = usable & ((logits * 0 == 0).to(image.dtype).amin(dim=1) > 0)
        probability = logistic(quantity.log_odds(logits, wanted))
        return clean, usable, saliency, scores, logits, wanted, probability

    def unit_and_rank(saliency: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        low, high = saliency.amin((1, 2), keepdim=True), saliency.amax((1, 2), keepdim=True)
        unit = (saliency - low) / torch.where(high > low, high - low, 1.0)
        best = order[scores.flatten(1)[:, order].topk(pixels, dim=1).indices]
        rank = torch.zeros_like(best).scatter(1, best, torch.arange(pixels).expand_as(best))
        return unit, rank.reshape(scores.shape)

    def hide(clean: Tensor) -> Tensor:
        hidden = colour if isinstance(colour, Tensor) else make_baseline(colour, clean, [])  # type: ignore[arg-type]
        return torch.zeros_like(clean) + hidden

    def perturb_and_classify(
        unit: Tensor, rank: Tensor, clean: Tensor, hidden: Tensor, wanted: Tensor, i: Tensor
    ) -> tuple[Tensor, ...]:
        by_value, by_rank = unit >= near[i], rank < counts[i]
        mixed = []
        for shown in (by_value[:, None], by_rank[:, None]):
            mixed += [torch.where(shown, clean, hidden), torch.where(shown, hidden, clean)]
        odds = quantity.log_odds(classifier.logits(torch.cat(mixed)), wanted.repeat(4))
        marked = by_value.to(unit.dtype).mean(dim=(1, 2))
        return (*logistic(odds).reshape(4, -1).unbind(0), marked)

    def score(
        usable: Tensor, logits: Tensor, wanted: Tensor, saliency: Tensor, marked: Tensor, *curves: Tensor
    ) -> tuple[Tensor, ...]:
        keep, remove, keep_area, remove_area = curves
        base, base_area = ((a - b) @ shares for a, b in ((keep, remove), (keep_area, remove_area)))
        mask = marked[:, 0]
        enough = torch.where(keep_area - remove_area >= 0.5, areas, 1.0).amin(dim=1)
        terms = (base - mask, base, mask, base_area, enough)
        said = [torch.where(usable, label, -1) for label in (logits.argmax(dim=1), wanted)]
        shown = torch.where(usable[:, None, None], saliency, 0.0)
        known = [torch.where(usable, x, torch.nan) for x in terms]
        return (shown, *said, *known, *(torch.where(usable[:, None], x, torch.nan) for x in curves))

    curves = tuple(f"{name} raw" for name in CURVES)
    body = (Call(perturb_and_classify, ("unit", "rank", "clean", "hidden", "wanted", "i"), (*curves, "marked")),)
    explained = ("clean", "usable", "map", "scores", "logits", "wanted", "probability")
    return [
        Call(explain_image, ("image", "target"), explained),
        Call(unit_and_rank, ("map", "scores"), ("unit", "rank")),
        Call(hide, ("clean",), ("hidden",)),
        Loop(len(levels), "i", (), body, scans=(*curves, "marked")),
        Call(score, ("usable", "logits", "wanted", "map", "marked", *curves),
             ("saliency", "prediction", "resolved_target", *TERMS, *CURVES)),
    ]  # fmt: skip


def export_saliency(
    adapter: LAX,
    folder: str | Path,
    *,
    baseline: str | float | Tensor = "blur",
    pack: Pack | None = None,
    alpha_min: float = 0.5,
    steps: int = 16,
    batch: int | None = None,
    storage: Storage = "lossless",
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    option: str = "{}=True",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write `saliency.onnx`, a classifier with its adapter and MSI, and `saliency.json` that says how to use it.

    It is handed over only if it agrees with `LAX.explain` and `metrics.msi` on 64 images: of the pack, or random ones
    (with a warning).

    Args:
        adapter: on the CPU.
        folder: created if needed; it takes one run, as every output folder.
        baseline: what hides pixels: `mean` (each image's own), `blur`, `zero`, a number or a colour [3].
        pack: whose images it is compared on.
        alpha_min, steps: MSI's thresholds.
        batch: the only size of the batch; open without it.
        storage: of the weights, see `export.program.write_program`.
        facts: what made the models, for run.json.
        overwrite: remove what an earlier run wrote into the folder.
        option: how a person says `overwrite`.
        say: told what is being done.

    Returns:
        What saliency.json holds.

    Raises:
        UsageError: a number is out of range. ExportError: something cannot be exported, or the file does not agree.
        CounterlensError: a file cannot be written.
    """
    threshold_grid(alpha_min, steps)  # what is wrong is said before minutes of work
    settings = {"alpha_min": alpha_min, "steps": steps, "batch": batch, "storage": storage}
    facts = {**(facts or {}), "command": "counterlens export", "what": "saliency", **settings}
    with open_run(Path(folder), facts, files=[SALIENCY, card_of(SALIENCY)], overwrite=overwrite, option=option) as run:
        return write_saliency(
            adapter, run, baseline=baseline, pack=pack, alpha_min=alpha_min, steps=steps, batch=batch, storage=storage,
            say=say,
        )  # fmt: skip


def write_saliency(
    adapter: LAX,
    run: Run,
    *,
    baseline: str | float | Tensor = "blur",
    pack: Pack | None = None,
    alpha_min: float = 0.5,
    steps: int = 16,
    batch: int | None = None,
    storage: Storage = "lossless",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What `export_saliency` does in a run's folder that is open."""
    started, classifier, size = time.perf_counter(), adapter.classifier, adapter.image_size
    model = run.folder / SALIENCY
    with frozen(classifier.module, adapter.head), torch.no_grad(), appearing(model) as unchecked:
        program = saliency_program(adapter, baseline, alpha_min, steps)
        rows = batch or free_batch(program, {size, len(classifier.labels), *adapter.head.channels})
        g = torch.Generator().manual_seed(0)
        inputs = {"image": torch.rand((rows, 3, size, size), generator=g), "target": torch.full((rows,), -1)}
        write_program(program, inputs, list(OUTPUTS), unchecked, storage=storage, dynamic_batch=batch is None, say=say)
        composed = time.perf_counter() - started
        say("comparing it with the adapter and the metric")
        parity, outputs = check_saliency(adapter, unchecked, baseline, pack, alpha_min, steps, batch)
        run.claim(path.name for path in unchecked.parent.iterdir())
    levels = threshold_grid(alpha_min, steps)
    card = {
        "schema_version": SCHEMA_VERSION,
        "what": "saliency",
        "file": SALIENCY,
        "sha256": file_digest(model),
        "bytes": model.stat().st_size,
        "labels": list(classifier.labels),
        "image_size": size,
        "fit": card_fit(classifier),
        "inputs": [described(n, x, batch, INPUTS) for n, x in inputs.items()],
        "outputs": [described(n, outputs[n], batch, OUTPUTS) for n in OUTPUTS],
        "method": "lax",
        "quantity": adapter.quantity.name,
        "baseline": baseline.tolist() if isinstance(baseline, Tensor) else baseline,
        "alpha_min": alpha_min,
        "thresholds": [round(v, 6) for v in levels.tolist()],
        "areas": [round(v / size**2, 6) for v in rank_counts(levels, size**2).tolist()],
        "heat": PLASMA,
        "classifier": adapter.training.get("classifier"),
        "weights": weights_digest([classifier.module, adapter.head]),
        "versions": versions(("counterlens", "torch", "onnx", "onnxruntime")),
        "storage": storage,
        "parity": parity,
        "seconds": {"composing": round(composed, 1), "in all": round(time.perf_counter() - started, 1)},
    }
    write_card(run.folder, card_of(SALIENCY), card)
    return card


def check_saliency(
    adapter: LAX,
    path: Path,
    baseline: str | float | Tensor,
    pack: Pack | None,
    alpha_min: float,
    steps: int,
    batch: int | None,
) -> tuple[dict[str, Any], Values]:
    """Hold a file to `LAX.explain` and `metrics.msi`; returns the report and the outputs of the last batch.

    Raises:
        ExportError: ONNX Runtime is missing or cannot open it, or too few images agree.
    """
    images, said = parity_images(pack, adapter.image_size)
    check_file(path)
    run_file, at_once = onnxruntime.load(path), batch or 16
    equal, off_map, off_msi = 0, [], []
    got: Values = {}
    for start in range(0, len(images), at_once):
        rows = images[[i % len(images) for i in range(start, start + at_once)]]
        expected = adapter.explain(rows)
        scored = msi(
            adapter.classifier, rows, expected.saliency, expected.target, alpha_min=alpha_min, steps=steps,
            scores=expected.scores, quantity=adapter.quantity, baseline=baseline,  # type: ignore[arg-type]
        )  # fmt: skip
        got = dict(zip(OUTPUTS, run_file(rows, torch.full((len(rows),), -1)), strict=True))
        equal += int((got["prediction"] == expected.target).sum())
        off_map.append((got["saliency"] - expected.saliency).abs().flatten(1).amax(dim=1))
        terms = (scored.score, scored.base_score_area)
        mine = (got["msi"], got["base_score_area"])
        off_msi.append(torch.stack([(a - b).abs() for a, b in zip(mine, terms, strict=True)]).amax(dim=0))
    maps, scores = torch.cat(off_map), torch.cat(off_msi)
    count = len(maps)
    close_maps, close_scores = int((maps < WITHIN_MAP).sum()), int((scores < WITHIN_MSI).sum())
    asked = {"predictions_equal": EQUAL_PREDICTIONS, "maps_within_1_of_255": CLOSE, "msi_within_0.001": CLOSE}
    report: dict[str, Any] = {
        **said,
        "predictions_equal": equal / count,
        "maps_within_1_of_255": close_maps / count,
        "worst_in_255": round(maps.max().item() * 255, 4),
        "msi_within_0.001": close_scores / count,
        "worst_msi": round(scores.max().item(), 6),
        "asked": asked,
    }
    if not all(report[name] >= least for name, least in asked.items()):
        raise ExportError(
            f"the written map does not agree with the adapter: {equal} of {count} predictions equal, {close_maps} maps "
            f"within 1/255 (the worst off by {report['worst_in_255']:g}/255), {close_scores} scores within 0.001; it "
            "was not kept"
        )
    return report, got
