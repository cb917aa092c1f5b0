"""One way from images to a saliency map and how good it is: `Engine.explain`, the commands and audits all take it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.result import image_seed
from ..errors import UsageError
from ..labels import distinct_names
from ..metrics.inputs import Baseline, check_computed, make_baseline, rank_planes
from ..metrics.msi_score import MSI
from ..metrics.quantities import LogOdds, Quantity, check_labels, make_quantity
from ..metrics.scoring import Curve, Scoring
from ..metrics.table import check_metrics
from ..models.files import read_json
from ..models.placing import computing_on
from ..models.protocols import Classifier
from ..packs import Pack
from ..showing import one_line
from .lax import DESCRIPTION, LAX, open_adapter
from .methods import check_callable, explain_with, predicted
from .table import METHODS, check_methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from ..config import Config
    from ..core.core import EngineCore
    from ..core.result import Counterfactuals
    from ..core.targets import Targets

FOLDER = "adapters"  # of a pack


@dataclass
class Explanations:
    """Saliency of B images by one method, and what was asked for beside it.

    Attributes:
        images: [B, 3, H, W] in [0, 1].
        saliency: [B, H, W] in [0, 1].
        scores: [B, H, W] as the method gives them; ranks are of these.
        target: [B] the explained label.
        probability: [B] of the explained quantity for the whole image.
        msi: scores and curves, see `engine.metrics.MSI`.
        values: metric (see `metrics.table.METRICS`) to [B].
        curves: of the metrics that bring one, the mean over the images, x and y.
        counterfactuals: of the same images, or None.
        labels: names of the classifier's labels.
        method: its name.
        seconds: of the map, for one image.
    """

    images: Tensor
    saliency: Tensor
    scores: Tensor
    target: Tensor
    probability: Tensor
    msi: MSI
    values: dict[str, Tensor]
    curves: dict[str, Curve]
    counterfactuals: Counterfactuals | None
    labels: list[str]
    method: str
    seconds: float

    __repr__ = one_line

    def __len__(self) -> int:
        return len(self.images)

    @property
    def regions(self) -> Tensor:
        """The smallest region of highest ranks that decides, as `sufficient_area` says: [B, H, W] bool, empty if none.

        Shown alone it keeps the answer, and hidden it takes it away, by a half of the probability together.
        """
        area = self.msi.sufficient_area
        counts = torch.where(area < 1, (area * self.scores.shape[1] * self.scores.shape[2]).round(), 0)
        return rank_planes(self.scores, "first", [0] * len(self)) < counts[:, None, None]

    def figure(self, most: int = 8) -> Figure:
        """Images, maps over them with `regions` outlined, and MSI's curves, as a matplotlib figure.

        Args:
            most: rows; further images are left out.

        Raises:
            CounterlensError: matplotlib is missing.
        """
        from ..images.figures import explanations_figure

        return explanations_figure(self, most)

    def to_pil(self, most: int = 8) -> Image.Image:
        """`figure`, drawn."""
        from ..images.figures import drawn

        return drawn(self.figure(most))

    def _repr_html_(self) -> str | None:
        from ..images.figures import as_html

        return as_html(self)

    def record(self, i: int) -> dict[str, Any]:
        """One image as plain values: method, target, probability, every metric, MSI's curves, counterfactual."""
        curves = self.msi.curves
        assert curves.keep is not None
        assert curves.remove is not None
        record: dict[str, Any] = {
            "method": self.method,
            "target": self.labels[int(self.target[i])],
            "probability": round(curves.full[i].item(), 6),
            **{name: round(values[i].item(), 6) for name, values in self.values.items()},
            "thresholds": [round(v, 6) for v in curves.abscissae[i].tolist()],
            "keep": [round(v, 6) for v in curves.keep[i].tolist()],
            "remove": [round(v, 6) for v in curves.remove[i].tolist()],
        }
        if self.counterfactuals is not None:
            record["counterfactual"] = self.counterfactuals.record(i)
        return record


def hidden_by(pack: Pack | None) -> Baseline:
    """What hides pixels where nothing else is asked for: the pack's training mean colour, else each image's blur."""
    return "blur" if pack is None else pack.mean_colour


def find_adapter(
    given: LAX | str | Path | None,
    classifier: Classifier,
    quantity: str | LogOdds | Quantity = "class",
    pack: Pack | None = None,
    name: str = "",
) -> LAX:
    """The adapter that is given, opened from a folder, or the pack's for its classifier of that name.

    Raises:
        UsageError: none is given, and the pack has none or there is no pack. CounterlensError: it is another model's.
    """
    if isinstance(given, LAX):
        parameter = next(classifier.module.parameters(), torch.empty(0))
        for module in (given.head, given.classifier.module):
            module.to(parameter.device)
        return given
    if given is not None:
        return open_adapter(given, classifier, None if isinstance(quantity, str) else quantity)
    if pack is None:
        raise UsageError("adapter: this classifier is not a pack's; train one (counterlens adapter train) and give it")
    return pack_adapter(pack, name, classifier, quantity)


def pack_adapters(pack: Pack) -> dict[tuple[str, str], Path]:
    """Folders of the pack's adapters, by classifier and quantity."""
    found = {}
    for path in sorted((pack.folder / FOLDER).glob(f"*/{DESCRIPTION}")):
        description = read_json(path)
        named = (description.get("training", {}).get("classifier"), description.get("quantity"))
        found[str(named[0]), str(named[1])] = path.parent
    return found


def pack_adapter(pack: Pack, name: str, classifier: Classifier, quantity: str | LogOdds | Quantity = "class") -> LAX:
    """The pack's adapter for one of its classifiers and a quantity.

    Raises:
        UsageError: the pack has none; the message says what it has. CounterlensError: it does not fit the weights.
    """
    wanted = make_quantity(classifier, quantity).name
    there = pack_adapters(pack)
    if (name, wanted) in there:
        return open_adapter(there[name, wanted], classifier)
    others = ", ".join(f"{own} ({explained})" for own, explained in there) or "none"
    raise UsageError(
        f"adapter: pack {pack.name!r} has none for {name!r} and quantity {wanted!r}, only {others}; "
        "counterlens adapter train makes one"
    )


def explain(
    classifier: Classifier,
    images: Tensor,  # [B, 3, H, W] in [0, 1]
    method: str = "lax",
    target: int | Sequence[int] | Tensor | None = None,
    *,
    pack: Pack | None = None,
    quantity: str | LogOdds | Quantity = "class",
    adapter: LAX | None = None,
    baseline: Baseline | None = None,
    alpha_min: float = 0.5,
    layer: str | None = None,
    metrics: Sequence[str] | None = None,
    judge: Classifier | None = None,
    masks: Tensor | None = None,  # [B, H, W] bool
    forward: Classifier | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch: int = 64,
) -> Explanations:
    """Saliency of images by one method, scored: the same image gives the same answer from every front.

    Args:
        classifier: see `engine.models.protocols.Classifier`; on the images' device, and left as it was.
        method: in `table.METHODS`.
        target: labels to explain, one for all or one per image; the predictions without it.
        pack: whose classifier it is; its mean colour hides pixels.
        quantity, adapter, layer: see `methods.explain_with`.
        baseline: what hides pixels, see `metrics.inputs.make_baseline`; `hidden_by` decides without it.
        alpha_min: of MSI, frozen before methods are compared.
        metrics: names or groups in `metrics.table`; those that cost nothing beside MSI without it.
        judge: another classifier of the same labels, which metrics of group `judge` ask.
        masks: where the evidence is, for metrics of group `masks`.
        forward: the classifier as `runtime.forward.compile_classifier` made it, for the metrics; the same without it.
        seed: of noise and masks, which are the same for every image.
        seeds: of what is each image's own, such as ties; made of its pixels and `seed` without them.
        batch: images at once.

    Raises:
        UsageError: an argument does not fit. NotFinite: the classifier or the method gives NaN or infinity.
    """
    check_methods([method])
    check_callable(classifier, [method])
    given = {"judge": judge is not None, "masks": masks is not None, "stability": True}
    names = check_metrics(metrics, [group for group, there in given.items() if there])
    if judge is not None and list(judge.labels) != list(classifier.labels):
        raise UsageError("judge: its labels are not the classifier's")
    question = make_quantity(classifier, quantity)
    if target is None:
        parts = [predicted(classifier, part, i * batch) for i, part in enumerate(images.split(batch))]
        wanted = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=images.device)
    else:
        wanted = check_labels(target, len(images), len(classifier.labels), images.device)
    own = [image_seed(image, seed) for image in images] if seeds is None else list(seeds)
    hiding = hidden_by(pack) if baseline is None else baseline
    hidden = make_baseline(hiding, images, own)
    _wait(images)
    started = time.perf_counter()

    def maps(images: Tensor, target: Tensor, baseline: Baseline) -> tuple[Tensor, Tensor]:
        return explain_with(
            method, classifier, images, target, quantity=question, baseline=baseline, adapter=adapter, layer=layer,
            seed=seed, batch=batch,
        )  # fmt: skip

    saliency, scores = maps(images, wanted, hidden)
    _wait(images)
    seconds = (time.perf_counter() - started) / max(1, len(images))
    scoring = Scoring(
        classifier if forward is None else forward, images, saliency, scores, wanted, question, hidden, alpha_min, own,
        batch, judge, masks, lambda neighbours, target: maps(neighbours, target, hiding)[0],
    )  # fmt: skip
    values, full = scoring.values(names), scoring.msi.curves.full.float()
    return Explanations(
        images.cpu(), saliency.cpu(), scores.cpu(), wanted.cpu(), full, scoring.msi, values, scoring.curves(names),
        None, distinct_names(classifier.labels), method, seconds,
    )  # fmt: skip


def _wait(images: Tensor) -> None:
    """For the images' device, whose work goes on behind Python's back."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def explain_by(
    engine: EngineCore,
    images: Tensor,  # [B, 3, H, W] in [0, 1]
    *,
    explained: Targets | None = None,
    method: str = "lax",
    quantity: str | LogOdds | Quantity = "class",
    adapter: LAX | str | Path | None = None,
    counterfactual: bool = False,
    targets: Targets = "runner-up",
    seeds: Sequence[int] | None = None,
    config: Config | None = None,
    **options: Any,
) -> Explanations:
    """See `Engine.explain`; `options` are those of `explain`."""
    check_methods([method])
    config = config or engine.config
    if counterfactual and config.count > 1:
        raise UsageError("count: an explanation has one counterfactual; Engine.counterfactual makes several")
    pack = Pack(engine.source["pack"]) if "pack" in engine.source else None
    question = make_quantity(engine.classifier, quantity)
    check_callable(engine.classifier, [method])
    found = None
    if METHODS[method].adapter:
        found = find_adapter(adapter, engine.classifier, question, pack, engine.source.get("classifier", ""))
    wanted = None if explained is None else engine.resolve_targets(explained, engine.probabilities(images))
    classifier: Classifier = engine.classifier
    if engine.box is not None:  # which scores the maps of its student, and is asked itself where that is enough
        if wanted is None:
            p = engine.probabilities(images)
            check_computed("classifier", p)
            wanted = p.argmax(1)
        options["forward"] = engine.box
        classifier = engine.classifier if METHODS[method].inside else engine.box
    with computing_on(engine.device):
        result = explain(
            classifier, images.to(engine.device), method, wanted, pack=pack, quantity=question, adapter=found,
            seed=config.seed, seeds=seeds, **options,
        )  # fmt: skip
    if counterfactual:
        result.counterfactuals = engine.counterfactual(images, targets, seeds, config)
    return result
