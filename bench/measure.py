"""Counterfactual quality on the digits pack, judged on images as the saved 8-bit files hold them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.baselines.img2img import img2img
from bench.record import interval
from counterlens.engine.cli.demo import marker_change
from counterlens.engine.config import Config, Settings
from counterlens.engine.core.result import image_seed
from counterlens.engine.engine import Engine
from counterlens.engine.images.files import as_saved
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack, Samples

BATCH = 16


def run_ours(engine: Engine, images: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    """Our counterfactuals as saved: [N, 3, H, W]; a failed sample stops the benchmark."""
    result = engine.counterfactual(images, targets, config=Config(mode="realistic", **settings.model_dump()))
    if failed := [e for e in result.errors if e is not None]:
        raise RuntimeError(f"{len(failed)} samples failed: {failed[0]}")
    return as_saved(result.images)


def run_img2img(engine: Engine, images: Tensor, targets: Tensor, settings: Settings, weight: float) -> Tensor:
    """Classifier-free image-to-image from the same start, as saved: [N, 3, H, W]."""
    seeds = [image_seed(image, 0) for image in images]
    parts = [
        img2img(engine.diffusion, images[i : i + BATCH], targets[i : i + BATCH], seeds[i : i + BATCH], settings, weight)
        for i in range(0, len(images), BATCH)
    ]
    return as_saved(torch.cat(parts))


@torch.no_grad()
def predictions(classifier: SoftmaxClassifier, images: Tensor) -> Tensor:
    """Predicted labels [N]."""
    return torch.cat([classifier.logits(b).argmax(1) for b in images.split(128)])


def quality(
    before: Tensor,  # [N, 3, H, W]
    after: Tensor,  # [N, 3, H, W] as saved
    targets: Tensor,  # [N]
    classifier: SoftmaxClassifier,
    judge: SoftmaxClassifier,
) -> dict[str, Tensor]:
    """Per-sample measures [N]: flipped, transferred (judge says the target), l1."""
    return {
        "flip": (predictions(classifier, after) == targets).double(),
        "transfer": (predictions(judge, after) == targets).double(),
        "l1": (after - before).abs().mean(dim=(1, 2, 3)).double(),
    }


def summary(values: dict[str, Tensor]) -> dict[str, Any]:
    """Means with 95 % intervals, and the share of flips that the judge does not confirm."""
    out: dict[str, Any] = {name: interval(v) for name, v in values.items()}
    flips = values["flip"] > 0
    unconfirmed = 1 - values["transfer"][flips]
    out["unconfirmed_flips"] = interval(unconfirmed) if flips.any() else math.nan
    return out


def touched(before: Tensor, after: Tensor, samples: Samples) -> Tensor:
    """Whether the mean change in each sample's own marker box exceeds 0.1: [N]."""
    return (marker_change(before, after, samples.markers) > 0.1).double()


def targets_across(engine: Engine, images: Tensor) -> Tensor:
    """The likeliest class on the other side of "5 or more" than the prediction: [N]."""
    p = engine.probabilities(images)
    same = (torch.arange(10)[None] >= 5) == (p.argmax(1, keepdim=True) >= 5)
    return p.masked_fill(same, -1).argmax(1)


def open_engines(pack: str) -> tuple[Pack, dict[str, Engine], SoftmaxClassifier]:
    """The pack, one engine for each explained classifier, and the judge."""
    opened = Pack(pack)
    diffusion = opened.diffusion()
    engines = {
        name: Engine(diffusion, opened.classifier(name), pack_settings=opened.manifest["settings"])
        for name in ("clean", "shortcut")
    }
    return opened, engines, opened.classifier("judge")


def two_targets(engine: Engine, images: Tensor) -> tuple[Tensor, Tensor]:
    """For each image the runner-up, and a random label that is neither that nor the prediction: [N], [N]."""
    p = engine.probabilities(images)
    first, second = p.topk(2, dim=1).indices.unbind(1)
    draws = torch.rand(p.shape, generator=torch.Generator().manual_seed(0))
    return second, draws.scatter(1, torch.stack([first, second], 1), -1).argmax(1)
