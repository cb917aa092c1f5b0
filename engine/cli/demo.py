"""The demo's work: two classifiers, the same marked digits, targets across the shortcut's boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..core.result import Counterfactuals
from ..engine import Engine
from ..images.drawing import Strip
from ..images.files import as_saved
from ..models.protocols import SoftmaxClassifier
from ..packs import Pack
from ..packs.rendering import Marker

PARTS = (("clean", "realistic"), ("shortcut", "realistic"), ("shortcut", "audit"))
TOUCHED = 0.1  # mean absolute change in a marker's box from which it counts as touched


@dataclass(frozen=True)
class DemoPart:
    """One classifier in one mode: what to draw, and what was measured."""

    classifier: str
    mode: str
    strip: Strip
    summary: dict[str, Any]
    records: list[dict[str, Any]]


def targets_across_boundary(
    probabilities: Tensor,  # [B, 10]
    labels: list[int],
) -> list[int]:
    """For each digit the likeliest class on the other side of "5 or more"."""
    out = []
    for p, label in zip(probabilities, labels, strict=True):
        other = range(5) if label >= 5 else range(5, 10)
        out.append(max(other, key=lambda c: p[c].item()))
    return out


def marker_change(
    before: Tensor,  # [B, 3, H, W]
    after: Tensor,  # [B, 3, H, W]
    markers: list[Marker | None],
) -> Tensor:
    """Mean absolute change inside each sample's own marker box: [B], NaN without a marker."""
    out = torch.full((len(markers),), torch.nan)
    for i, marker in enumerate(markers):
        if marker is not None:
            rows, columns = marker.box
            out[i] = (after[i, :, rows, columns] - before[i, :, rows, columns]).abs().mean()
    return out


def transfer(
    judge: SoftmaxClassifier,
    result: Counterfactuals,
) -> Tensor:
    """Whether the independent judge says the target too, on the images as saved: [B] bool."""
    with torch.no_grad():
        return (judge.logits(as_saved(result.images)).argmax(1) == result.target) & ok(result)


def ok(result: Counterfactuals) -> Tensor:
    """Which samples finished: [B] bool."""
    return torch.tensor([e is None for e in result.errors], dtype=torch.bool)


def run_demo(
    pack_name: str,
    count: int,
    seed: int,
    on_step: Callable[[int, int], None],
) -> list[DemoPart]:
    """Run every part of the demo on the pack's test digits, `count` of them with matching markers."""
    pack = Pack(pack_name)
    samples = pack.samples("test", count=count, marker="matching", seed=seed)
    judge = pack.classifier("judge")
    with torch.no_grad():
        wanted = targets_across_boundary(pack.classifier("clean").logits(samples.images), samples.labels)
    parts = []
    for number, (name, mode) in enumerate(PARTS):
        engine = Engine.from_pack(pack_name, name, Config.make(mode=mode, seed=seed, classifier=name, pack=pack_name))
        # `shortcut` and `clean` see the same digits and the same targets; one already predicted is left out.
        source = engine.probabilities(samples.images).argmax(1)
        chosen = [i for i, t in enumerate(wanted) if int(source[i]) != t]
        images = samples.images[chosen]

        def after_step(i: int, n: int, number: int = number) -> None:
            on_step(number * n + i, len(PARTS) * n)

        result = engine.counterfactual(images, [wanted[i] for i in chosen], on_step=after_step)
        markers = [samples.markers[i] for i in chosen]
        finished = ok(result)
        touched = marker_change(images, as_saved(result.images), markers)[finished] > TOUCHED
        before = engine.probabilities(images)
        labels = result.labels
        strip = Strip(
            title=f"{name}, mode {mode}",
            inputs=images,
            images=result.images,
            captions_before=[f"{labels[int(s)]} ({p[int(s)]:.2f})" for s, p in zip(result.source, before, strict=True)],
            captions_after=[
                "failed" if e else f"{labels[int(p)]} ({c:.2f})"
                for e, p, c in zip(result.errors, result.prediction, result.confidence, strict=True)
            ],
            good=result.flipped.tolist(),
        )
        summary = {
            "images": len(chosen),
            "flip_rate": result.flipped.float().mean().item(),
            "transfer_rate": transfer(judge, result).float().mean().item(),
            "l1_mean": result.l1[finished].mean().item(),
            "touched_rate": touched.float().mean().item(),
            "seconds_per_image": result.seconds[finished].mean().item(),
            "failed": int((~finished).sum()),
        }
        summary = {k: round(v, 6) if isinstance(v, float) else v for k, v in summary.items()}
        records = [{"image": f"test-{samples.ids[i]:04d}", **result.record(r)} for r, i in enumerate(chosen)]
        parts.append(DemoPart(name, mode, strip, summary, records))
    return parts
