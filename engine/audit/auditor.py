"""One audit without its folder: what is asked, which samples are chosen, and the rows of a part."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..blackbox.box import BlackBox, as_box, no_gradient
from ..config import Config
from ..errors import CounterlensError, UsageError
from ..images.collect import shown
from ..images.masks import Masks
from ..images.sources import Sample, Source, open_source
from ..models.protocols import Classifier
from ..outputs import SCHEMA_VERSION
from ..provenance import digest, models_digest, models_numbers, versions
from ..saliency.methods import check_callable
from .conditions import COMPUTING
from .explaining import Explainer, Item, scored_by
from .plan import OPTION_NAMES, Chosen, Options, choose, match_labels, read_places
from .results import encode_image, image_path
from .rows import PICTURES, Row

if TYPE_CHECKING:
    from ..core.core import EngineCore
    from ..core.photos import Photo


class Auditor:
    """One audit of one source by one engine, without its folder: what is chosen, and the rows of each part.

    Args:
        engine: makes the explanations.
        source: see `sources.open_source`.
        options: what is asked.
        config: of the counterfactuals; the engine's without one.
        judges: classifiers that guidance never sees, by name; a flip that they confirm counts as transferred.

    Raises:
        UsageError: options do not fit the source or the engine.
    """

    def __init__(
        self,
        engine: EngineCore,
        source: Source,
        options: Options,
        config: Config | None = None,
        judges: Mapping[str, Classifier] | None = None,
    ) -> None:
        self.engine, self.source, self.options = engine, source, options
        self.config = config or engine.config
        if self.config.count > 1:
            raise UsageError("count: an audit makes one counterfactual of each image; leave it out")
        self.judges = dict(judges or {})
        self.masks = None if self.config.region is None else Masks(self.config.region)
        self.settings = engine.settings(self.config)
        if (box := as_box(engine.classifier)) is not None and options.counterfactuals:
            raise UsageError(f"counterfactuals: {no_gradient(box.name)}. Maps need none: leave counterfactuals out")
        if options.saliency is not None:
            check_callable(engine.classifier, [options.saliency])
        self.notes = list(source.notes)
        scored_by(options, self.judges)  # refused now, not at the first map
        for name, judge in self.judges.items():
            if list(judge.labels) != list(engine.classifier.labels):
                raise UsageError(f"judge: the labels of {name} are not those of the classifier")
        self.labels, notes = match_labels(source, engine.labels)
        self.notes += notes
        for target in dict.fromkeys([s.target for s in source.samples if s.target is not None]):
            engine.check_target(target)
        engine.check_target(options.target)
        if any(label is None for label in self.labels):
            missing = sum(label is None for label in self.labels)
            wanted = [n for n in ("only_misclassified", "per_class") if getattr(options, n)]
            if wanted:
                raise UsageError(
                    f"{wanted[0]}: needs true labels; {missing} of {len(self.labels)} samples of {source.path} have "
                    f"none, {source.samples[self.labels.index(None)].id!r} for one"
                )
        self.identity = self._identity()
        here = versions()
        self.facts = {
            "command": "counterlens audit", "audit": self.identity["hash"], "config_hash": self.identity["config_hash"],
            "model_hash": self.identity["model_hash"], "classifier": type(engine.classifier.module).__name__,
            **engine.names, "mode": self.config.mode_name, "settings": self.settings.model_dump(),
            "run_seed": self.config.seed, "versions": {k: v for k, v in here.items() if k in COMPUTING},
            "schema_version": SCHEMA_VERSION,
        }  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the rows; an audit goes on only with the same."""
        engine = self.engine
        model = {
            "diffusion": type(engine.diffusion).__name__,
            "classifier": type(engine.classifier.module).__name__,
            "labels": len(engine.labels),
            "weights": engine.digest(),
            **models_numbers(engine.diffusion, engine.classifier),
            **engine.source,
            **({} if engine.box is None else {"box": engine.box.identity}),
            "judges": {name: models_digest([j.module], j.labels) for name, j in self.judges.items()},
        }
        config = {"mode": self.config.mode_name, **self.settings.model_dump(), "seed": self.config.seed}
        # What `auto` takes is held, not asked for: see `conditions`.
        config |= {"runtime": engine.runtime, "slots": engine.slots[-1], "kernels": engine.backend}
        config |= {"attention": engine.attention, "checkpointing": engine.checkpointing}
        asked = {self.options.target, *(s.target for s in self.source.samples)}
        if engine.box is not None:
            config["queries_each"] = engine.names["queries_each"]
        if "neighbour" in asked:
            config["neighbours"] = digest({str(k): v for k, v in engine.targets.neighbours.items()})
        if self.masks is not None:
            config |= self.masks.facts()
        if self.config.match_official:
            config["match_official"] = True
        if self.config.fit != "auto":
            config["fit"] = self.config.fit
        if engine.device.type != "cpu":  # whose results are not the CPU's, bit by bit
            config["device"] = engine.device.type
        source = {"kind": self.source.kind, "samples": len(self.source.samples), "digest": self.source.digest()}
        options = asdict(self.options)
        if not self.options.metrics:  # as in audits made before there were any
            del options["metrics"]
        identity = {"model": model, "config": config, "options": options, "source": source}
        identity = json.loads(json.dumps(identity))
        text = json.dumps(identity, sort_keys=True)
        return identity | {
            "hash": hashlib.sha256(text.encode()).hexdigest()[:16],
            "config_hash": digest({"config": identity["config"], "options": identity["options"]}),
            "model_hash": digest(model),
        }

    @property
    def boxes(self) -> list[BlackBox]:
        """Those of classifier and judges that can only be called."""
        held = (self.engine.box, self.engine.classifier, *self.judges.values())
        return [box for one in held if (box := as_box(one)) is not None]

    # The plan

    def plan(self) -> list[Chosen]:
        """Choose the samples: by class, by prediction, then the first `limit`.

        Raises:
            CounterlensError: none is left.
        """
        return self._chosen(choose(self.source, self.labels, self.options, self._predict))

    def read_plan(self, folder: Path) -> list[Chosen]:
        """The plan that an audit's folder holds.

        Raises:
            CounterlensError: it cannot be read.
        """
        return self._chosen(read_places(folder))

    def _chosen(self, places: Sequence[int]) -> list[Chosen]:
        found = [(self.source.samples[place], self.labels[place]) for place in places]
        return [
            Chosen(number, sample, label, self.options.target if sample.target is None else sample.target)
            for number, (sample, label) in enumerate(found)
        ]

    def _predict(self, places: Sequence[int]) -> Iterator[tuple[int, int, float]]:
        """Place, prediction and confidence of the samples in these places that can be read."""
        read = self.read([self.source.samples[n] for n in places], own=False)
        found = {n: photo.image for n, photo in zip(places, read, strict=True) if not isinstance(photo, str)}
        answers: dict[int, tuple[int, float]] = {}
        for some in by_shape(found):
            confidence, predicted = self.engine.probabilities(torch.stack([found[n] for n in some])).max(dim=1)
            answers |= dict(zip(some, zip(predicted.tolist(), confidence.tolist(), strict=True), strict=True))
        yield from ((n, *answers[n]) for n in found)

    # One part

    def read(
        self,
        samples: Sequence[Sample],
        pool: ThreadPoolExecutor | None = None,
        *,
        own: bool = True,
        config: Config | None = None,
    ) -> list[Photo | str]:
        """Each sample as the models see it, or what is wrong with it; `own`, `config`: see `EngineCore.read`."""

        def one(sample: Sample) -> Photo | str:
            try:
                return self.engine.read(sample.file(), sample.name, config or self.config, own=own)
            except CounterlensError as error:
                return str(error).removeprefix(f"{sample.name}: ")

        return list(pool.map(one, samples) if pool else map(one, samples))

    def squares(self, chosen: Sequence[Chosen]) -> dict[str, Tensor]:
        """Images [3, H, W] of one shape, whatever the fit, by id: those that can be read."""
        config = self.config.model_copy(update={"fit": "auto"}) if self.config.fit == "native" else self.config
        read = self.read([c.sample for c in chosen], own=False, config=config)
        return {c.sample.id: photo.image for c, photo in zip(chosen, read, strict=True) if not isinstance(photo, str)}

    def explain(
        self,
        part: int,
        chosen: Sequence[Chosen],
        read: Sequence[Photo | str],
        on_step: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Row], dict[str, bytes]]:
        """The rows of a part, one for each chosen sample as it was read, and the bytes of their images by path."""
        started = time.perf_counter()
        items = [Item(self._blank(part, c), c) for c in chosen]
        photos: dict[int, Photo] = {}
        for place, (item, photo) in enumerate(zip(items, read, strict=True)):
            if isinstance(photo, str):
                item.row.fail(photo)
                continue
            try:
                if self.masks is not None:
                    item.region = self.masks.of(item.chosen.sample, photo.frame)
            except CounterlensError as wrong:
                item.row.fail(str(wrong))
                continue
            photos[place] = photo
            item.pictures["image"] = photo.image
            said = photo.frame.record()
            item.row.update(fit=said["fit"], photo=said["photo"], box=said["box"])
        for place, answer in zip(photos, self.engine.own_answers(list(photos.values())), strict=True):
            if answer is not None:
                items[place].row.update(own_prediction=answer.label, own_confidence=answer.confidence)
        explainer = Explainer(self.engine, self.config, self.options, self.judges)
        for some in by_shape({place: photo.image for place, photo in photos.items()}):
            explainer.explain([items[place] for place in some], on_step)
        files: dict[str, bytes] = {}
        for place, item in enumerate(items):
            row = item.row
            said = {
                k: getattr(row, k) for k in ("id", "file", "label", "prediction", "target", "seed", "number", "part")
            }
            for column, name in PICTURES.items():
                if (picture := item.pictures.get(column)) is not None:
                    path = image_path(part, place, name, self.options.image_format)
                    files[path] = encode_image(picture, self.options.image_format, {"what": name, **said, **self.facts})
                    row.update(**{column: path})
        share = (time.perf_counter() - started) / max(len(items), 1)
        for item in items:
            item.row.wall_seconds = share
        return [item.row for item in items], files

    def _blank(self, part: int, chosen: Chosen) -> Row:
        sample, where = chosen.sample, chosen.sample.where
        return Row(
            number=chosen.number,
            id=sample.id,
            file=sample.id if self.source.kind == "folder" else shown(where) if isinstance(where, Path) else None,
            slices=dict(sorted(sample.slices.items())),
            label=None if chosen.label is None else self.engine.labels[chosen.label],
            part=part,
            config_hash=self.identity["config_hash"],
            model_hash=self.identity["model_hash"],
        )


def by_shape(images: Mapping[int, Tensor]) -> list[list[int]]:
    """The keys of images that have one shape, and can share a batch, together."""
    groups: dict[torch.Size, list[int]] = {}
    for key, image in images.items():
        groups.setdefault(image.shape, []).append(key)
    return list(groups.values())


def open_auditor(
    engine: EngineCore,
    source: str | Path,
    config: Config | None = None,
    judges: Mapping[str, Classifier] | None = None,
    **options: Any,
) -> Auditor:
    """An auditor of a path.

    Raises:
        UsageError: the source, an option or a label does not fit.
    """
    unknown = sorted(options.keys() - set(OPTION_NAMES))
    if unknown:
        raise UsageError(f"{unknown[0]}: no option of an audit; expected {', '.join(OPTION_NAMES)}")
    several = ("slices", "metrics")
    given: dict[str, Any] = {k: tuple(v) if k in several else v for k, v in options.items() if v is not None}
    asked = Options(**given)
    return Auditor(engine, open_source(Path(source), asked.slices, asked.recursive), asked, config, judges)
