"""What `Engine.explain` does: a saliency map, how good it is, and asked for, the counterfactual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..metrics.inputs import Baseline
from ..metrics.msi_score import MSI, msi
from ..metrics.quantities import LogOdds, Quantity, make_quantity
from ..models.placing import computing_on
from ..packs import Pack
from ..showing import one_line
from .lax import LAX, open_adapter
from .methods import check_methods, explain_with
from .packed import pack_adapter

if TYPE_CHECKING:
    from ..config import Config
    from ..core.core import EngineCore
    from ..core.result import Counterfactuals
    from ..core.targets import Targets


@dataclass
class Explanations:
    """Saliency of B images, and what was asked for beside it.

    Attributes:
        images: [B, 3, H, W] in [0, 1].
        saliency: [B, H, W] in [0, 1].
        scores: [B, H, W] as the method gives them; ranks are of these.
        target: [B] the explained label.
        probability: [B] of the explained quantity for the whole image.
        msi: scores and curves, see `engine.metrics.MSI`.
        counterfactuals: of the same images, or None.
        labels: names of the classifier's labels.
        method: its name.
    """

    images: Tensor
    saliency: Tensor
    scores: Tensor
    target: Tensor
    probability: Tensor
    msi: MSI
    counterfactuals: Counterfactuals | None
    labels: list[str]
    method: str

    __repr__ = one_line

    def __len__(self) -> int:
        return len(self.images)

    def record(self, i: int) -> dict[str, Any]:
        """One image as plain values: method, target, probability, MSI with its terms and curves, counterfactual."""
        scores = self.msi
        assert scores.curves.keep is not None
        assert scores.curves.remove is not None
        record: dict[str, Any] = {
            "method": self.method,
            "target": self.labels[int(self.target[i])],
            "probability": round(self.probability[i].item(), 6),
            "msi": round(scores.score[i].item(), 6),
            "base_score": round(scores.base_score[i].item(), 6),
            "base_score_area": round(scores.base_score_area[i].item(), 6),
            "sufficient_area": round(scores.sufficient_area[i].item(), 6),
            "mask_area": round(scores.curves.areas[i, 0].item(), 6),
            "thresholds": [round(v, 6) for v in scores.curves.abscissae[i].tolist()],
            "keep": [round(v, 6) for v in scores.curves.keep[i].tolist()],
            "remove": [round(v, 6) for v in scores.curves.remove[i].tolist()],
        }
        if self.counterfactuals is not None:
            record["counterfactual"] = self.counterfactuals.record(i)
        return record


def find_adapter(engine: EngineCore, adapter: LAX | str | Path | None, quantity: str | LogOdds | Quantity) -> LAX:
    """The adapter that is given, opened from a folder, or the pack's.

    Raises:
        UsageError: the engine's pack has none, or the engine has no pack. CounterlensError: it is another model's.
    """
    from ..errors import UsageError

    if isinstance(adapter, LAX):
        for module in (adapter.head, adapter.classifier.module):
            module.to(engine.device)
        return adapter
    if adapter is not None:
        return open_adapter(adapter, engine.classifier, None if isinstance(quantity, str) else quantity)
    if "pack" not in engine.source:
        raise UsageError("adapter: this classifier is not a pack's; train one (counterlens adapter train) and give it")
    return pack_adapter(Pack(engine.source["pack"]), engine.source["classifier"], engine.classifier, quantity)


def explain(
    engine: EngineCore,
    images: Tensor,  # [B, 3, H, W] in [0, 1]
    *,
    explained: Targets | None = None,
    method: str = "lax",
    quantity: str | LogOdds | Quantity = "class",
    adapter: LAX | str | Path | None = None,
    baseline: Baseline | None = None,
    alpha_min: float = 0.5,
    counterfactual: bool = False,
    targets: Targets = "runner-up",
    seeds: Sequence[int] | None = None,
    config: Config | None = None,
) -> Explanations:
    """See `Engine.explain`."""
    from ..core.result import noise_seed

    check_methods([method])
    config = config or engine.config
    question = make_quantity(engine.classifier, quantity)
    found = find_adapter(engine, adapter, question) if method == "lax" else None
    if baseline is None:
        baseline = Pack(engine.source["pack"]).mean_colour if "pack" in engine.source else "mean"
    before = engine.probabilities(images)
    wanted = before.argmax(1) if explained is None else engine.resolve_targets(explained, before)
    own = [noise_seed(image, config) for image in images] if seeds is None else list(seeds)
    there = images.to(engine.device)
    with computing_on(engine.device):
        saliency, scores = explain_with(
            method, engine.classifier, there, wanted, quantity=question, baseline=baseline, adapter=found,
            seed=config.seed,
        )  # fmt: skip
        value = msi(
            engine.classifier, there, saliency, wanted, alpha_min=alpha_min, scores=scores, quantity=question,
            baseline=baseline, seeds=own,
        )  # fmt: skip
    changed = engine.counterfactual(images, targets, seeds, config) if counterfactual else None
    whole, maps = value.curves.full.to(torch.float32), (saliency.cpu(), scores.cpu())
    return Explanations(images, *maps, wanted, whole, value, changed, engine.labels, method)
