"""Explains the samples of one part: predictions, counterfactuals, judges, insight, saliency."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..blackbox.box import as_box
from ..config import Config
from ..errors import CounterlensError, NotFinite
from ..images.files import as_saved
from ..metrics.inputs import check_computed
from ..metrics.robust import brittle
from ..metrics.table import METRICS, check_metrics
from ..models.freezing import frozen
from ..models.protocols import Classifier, probabilities
from ..runtime.spec import SLOTS
from .plan import Chosen, Options
from .rows import Row, changes

if TYPE_CHECKING:
    from ..core.core import EngineCore
    from ..core.result import Counterfactual

AWAY = 2  # likeliest other labels that are tried for the smallest change away from a wrong prediction
JUDGED = SLOTS[-1]  # images that a judge sees at once: always as many, so that its answer depends on no other
FAILURES = Exception  # a user's model may raise anything, classes of its own included: its rows fail, nobody else's
OnStep = Callable[[int, int], None]


@dataclass
class Item:
    """A sample while it is explained: its row, and beside it the pictures [3, H, W] or [H, W] by the row's column."""

    row: Row
    chosen: Chosen
    region: Tensor | str | None = None  # where alone it may change, [H, W] bool or auto
    pictures: dict[str, Tensor] = field(default_factory=dict, repr=False)


def scored_by(options: Options, judges: Mapping[str, Classifier]) -> list[str]:
    """The metrics of `Options.metrics`, groups written out; nobody gives masks in an audit.

    Raises:
        UsageError: one asks a judge, and there is none.
    """
    return check_metrics(options.metrics, ("judge", "stability") if judges else ("stability",))


def _stops(error: Exception) -> bool:
    """Whether it is about the audit, not about a sample: wrong usage, a budget that is spent, a box that is gone."""
    return isinstance(error, CounterlensError) and not isinstance(error, NotFinite)


def _images(items: Sequence[Item]) -> Tensor:
    return torch.stack([item.pictures["image"] for item in items])


@dataclass
class Explainer:
    """Fills in the rows of samples whose images were read.

    Attributes:
        engine, config, options, judges: see `auditor.Auditor`.
    """

    engine: EngineCore
    config: Config
    options: Options
    judges: Mapping[str, Classifier]

    def explain(self, items: Sequence[Item], on_step: OnStep | None = None) -> None:
        """Fill in the rows and the pictures; what fails for a sample is said in its row."""
        items = self._predict(items)
        if not items:
            return
        if self.options.counterfactuals:
            self._counterfactuals(items, on_step)
            self._ask_judges(items)
            if self.options.insight:
                self._insight(items)
        if self.options.saliency is not None:
            self._saliency(items, self.options.saliency)

    def _predict(self, items: Sequence[Item]) -> list[Item]:
        """Fill in predictions; the samples on which the classifier does not fail."""

        def predict(some: Sequence[Item]) -> list[Tensor]:
            p = self.engine.probabilities(_images(some))
            check_computed("classifier", p)
            return [p]

        good = []
        for item, result in zip(items, self._retrying(predict, items), strict=True):
            if isinstance(result, str):
                item.row.fail(result, retried=True)
                continue
            confidence, predicted = result[0].max(dim=0)
            label = item.chosen.label
            item.row.prediction = self.engine.labels[int(predicted)]
            item.row.confidence = confidence.item()
            item.row.correct = None if label is None else int(predicted) == label
            good.append(item)
        return good

    def _run(
        self,
        images: Tensor,
        targets: Sequence[str | int],
        regions: Sequence[Tensor | str | None],
        on_step: OnStep | None = None,
    ) -> tuple[list[Counterfactual | str], bool]:
        """A counterfactual, or what went wrong, for each image; and whether they had to be run singly."""
        options: dict[str, Any] = {"config": self.config, "on_step": on_step, "budget_s": self.options.budget_s}
        options["whole"] = False  # the runtimes of an audit are pinned step by step
        try:
            return list(self.engine.counterfactual(images, targets, region=regions, **options)), False
        except FAILURES as error:
            if _stops(error):
                raise
            out: list[Counterfactual | str] = []
            for image, target, region in zip(images, targets, regions, strict=True):
                try:
                    out.append(self.engine.counterfactual(image[None], [target], region=[region], **options)[0])
                except FAILURES as error:
                    if _stops(error):
                        raise
                    out.append(f"{type(error).__name__}: {error}")
            return out, True

    def _counterfactuals(self, items: Sequence[Item], on_step: OnStep | None) -> None:
        runs, singly = self._run(
            _images(items), [item.chosen.target for item in items], [item.region for item in items], on_step
        )
        for item, made in zip(items, runs, strict=True):
            row = item.row
            row.retried = singly
            if isinstance(made, str):
                row.fail(made)
                continue
            row.target, row.seed = made.labels[made.target], made.seed
            if made.error is not None:
                row.status, row.error = made.status, made.error
                continue
            row.update(
                counterfactual_prediction=made.labels[made.prediction],
                counterfactual_confidence=made.confidence,
                target_confidence=made.target_confidence,
                flipped=made.flipped,
                l1=made.l1,
                l2=made.l2,
                kept_fraction=made.kept_fraction[made.kept_fraction.isfinite()].mean().item(),
                seconds=made.seconds,
                **made.student,
                **made.measures(),
                **changes(item.pictures["image"], made.image),
            )
            item.pictures["counterfactual"] = as_saved(made.image)

    @torch.no_grad()
    def _ask_judges(self, items: Sequence[Item]) -> None:
        done = [item for item in items if "counterfactual" in item.pictures]
        if not done or not self.judges:
            return
        for name, judge in self.judges.items():
            device = next((p.device for p in judge.module.parameters()), None)
            with frozen(judge.module):
                for start in range(0, len(done), JUDGED):
                    some = done[start : start + JUDGED]
                    images = torch.stack([item.pictures["counterfactual"] for item in some])
                    padded = torch.cat([images, images[:1].expand(JUDGED - len(images), -1, -1, -1)])
                    try:
                        said = probabilities(judge, padded.to(device))[: len(some)].cpu()
                    except FAILURES as error:
                        if _stops(error):
                            raise
                        raise CounterlensError(f"judge: {name} fails ({type(error).__name__}: {error})") from error
                    for item, p in zip(some, said, strict=True):
                        if p.isfinite().all():
                            item.row.judges[name] = self.engine.labels[int(p.argmax())]
                        else:
                            box = as_box(judge)
                            why = box.why(item.pictures["counterfactual"]) if box is not None else ""
                            item.row.fail(f"judge {name}: {why or 'NaN or infinity'} for this image")
        for row in (item.row for item in done if item.row.status != "failed"):
            row.transfer = all(said == row.target for said in row.judges.values())

    def _insight(self, items: Sequence[Item]) -> None:
        """For wrong predictions: towards the true label, and the smallest of a few changes away from the prediction."""
        wrong = [item for item in items if item.row.correct is False]
        if not wrong:
            return
        labels, images = self.engine.labels, _images(wrong)
        found: dict[int, list[tuple[str, str, float, Tensor]]] = defaultdict(list)  # target, prediction, l1, image
        asked: list[tuple[int, int]] = []  # place in `wrong`, label
        for w, (item, p) in enumerate(zip(wrong, self.engine.probabilities(images), strict=True)):
            row, truth, had = item.row, item.chosen.label, None
            assert truth is not None
            if (image := item.pictures.get("counterfactual")) is not None:
                assert row.target is not None
                assert row.counterfactual_prediction is not None
                assert row.l1 is not None
                found[w].append((row.target, row.counterfactual_prediction, row.l1, image))
                had = labels.index(row.target)
            likeliest = [c for c in p.topk(min(AWAY + 1, len(labels))).indices.tolist() if labels[c] != row.prediction]
            asked += [(w, c) for c in dict.fromkeys([truth, *likeliest[:AWAY]]) if c != had]
        regions = [wrong[w].region for w, _ in asked]
        runs, _ = self._run(images[[w for w, _ in asked]], [c for _, c in asked], regions)
        for (w, c), made in zip(asked, runs, strict=True):
            if not isinstance(made, str) and made.error is None:
                found[w].append((labels[c], labels[made.prediction], made.l1, as_saved(made.image)))
        for w, item in enumerate(wrong):
            row, before = item.row, item.pictures["image"]
            for target, now, l1, image in found[w]:
                if target == row.label:
                    grid = changes(before, image)["change_grid"]
                    row.update(true_flipped=now == target, true_l1=l1, true_grid=grid)
                    item.pictures["true_counterfactual"] = image
            away = [f for f in found[w] if f[1] != row.prediction]
            if away:
                target, now, l1, image = min(away, key=lambda f: f[2])
                grid = changes(before, image)["change_grid"]
                row.update(away_target=target, away_prediction=now, away_l1=l1, away_grid=grid)
                item.pictures["away_counterfactual"] = image

    def _saliency(self, items: Sequence[Item], method: str) -> None:
        """Explain each prediction by a saliency map, scored by MSI (`Engine.explain`)."""
        from ..saliency.explain import explain_by

        names = scored_by(self.options, self.judges)
        judge = (
            next(iter(self.judges.values()), None) if any(METRICS[name].group == "judge" for name in names) else None
        )
        if judge is not None:
            judge.module.to(self.engine.device)

        def run(some: Sequence[Item]) -> list[Tensor]:
            found = explain_by(
                self.engine, _images(some), method=method, config=self.config, metrics=names or None, judge=judge,
            )  # fmt: skip
            msi, curves = found.msi, found.msi.curves
            assert curves.keep is not None
            assert curves.remove is not None
            scores = [found.values[name] for name in names]
            return [found.saliency, msi.score, msi.base_score, msi.sufficient_area, curves.keep, curves.remove, *scores]

        for item, result in zip(items, self._retrying(run, items), strict=True):
            if isinstance(result, str):
                item.row.fail(f"saliency: {result}", retried=True)
                continue
            saliency, score, base, area, keep, remove, *scores = result
            item.pictures["saliency"] = saliency.clamp(0, 1)
            item.row.update(
                msi=score.item(), msi_base=base.item(), sufficient_area=area.item(), insertion_curve=keep.tolist(),
                deletion_curve=remove.tolist(),
            )  # fmt: skip
            if names:
                item.row.scores = {name: value.item() for name, value in zip(names, scores, strict=True)}
            if any(name.endswith("_moved") for name in names):
                item.row.brittle = bool(brittle(dict(zip(names, (v[None] for v in scores), strict=True))))

    def _retrying(
        self, run: Callable[[Sequence[Item]], list[Tensor]], items: Sequence[Item]
    ) -> list[list[Tensor] | str]:
        """What `run` gives for each sample, or what went wrong: all at once and, where that fails, one by one.

        `run` returns tensors whose first dimension is the samples'.
        """
        found: dict[int, list[Tensor] | str] = {}

        def attempt(some: list[int]) -> None:
            """Run over these; samples of which NaN is known drop out, and the others stay together."""
            while some:
                try:
                    tensors = run([items[n] for n in some])
                except NotFinite as error:
                    found.update((some[k], self._undefined(error, items[some[k]])) for k in error.samples)
                    some = [n for n in some if n not in found]
                else:
                    found.update((n, [t[k] for t in tensors]) for k, n in enumerate(some))
                    return

        try:
            attempt(list(range(len(items))))
        except FAILURES as error:
            if _stops(error):
                raise
            for n in range(len(items)):
                if n in found:
                    continue
                try:
                    attempt([n])
                except FAILURES as error:
                    if _stops(error):
                        raise
                    found[n] = f"{type(error).__name__}: {error}"
        return [found[n] for n in range(len(items))]

    def _undefined(self, error: NotFinite, item: Item) -> str:
        """Why there is no number for an image: NaN, or no answer of a classifier that can only be called."""
        box = self.engine.box or as_box(self.engine.classifier)
        said = box.why(item.pictures["image"]) if box is not None else ""
        return f"{error.what}: no answer, it {said}" if said else f"{error.what}: NaN or infinity for this image"
