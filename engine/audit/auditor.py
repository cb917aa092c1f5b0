"""One audit without its folder: what is asked, which samples are chosen, and the rows of a part."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config import Config
from ..errors import CounterlensError, UsageError
from ..images.sources import Sample, need
from ..models.protocols import Classifier
from ..outputs import SCHEMA_VERSION
from .plan import Chosen
from .results import PLAN, image_path

if TYPE_CHECKING:
    from ..core.core import EngineCore
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ..errors import NotFinite
from ..images.collect import shown
from ..images.files import as_saved
from ..images.sources import Source, open_source
from ..labels import find_label, is_label
from ..metrics.inputs import check_computed
from ..models.freezing import frozen
from ..models.protocols import probabilities
from ..provenance import digest, models_digest, models_numbers, versions
from .conditions import COMPUTING
from .plan import OPTION_NAMES, Options
from .results import COLUMNS, encode_image
from .rows import AWAY, FAILURES, changes

if TYPE_CHECKING:
    from ..core.core import EngineCore
    from ..core.result import Counterfactuals


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
        self.judges = dict(judges or {})
        self.settings = engine.settings(self.config)
        self.notes = list(source.notes)
        for name, judge in self.judges.items():
            if list(judge.labels) != list(engine.classifier.labels):
                raise UsageError(f"judge: the labels of {name} are not those of the classifier")
        self.labels = self._match_labels()
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

    def _match_labels(self) -> list[int | None]:
        """Each sample's true label as the classifier's index; class folders that are no labels become a slice."""
        names = self.engine.labels
        said = {s.label for s in self.source.samples if s.label is not None}
        known = [label for label in sorted(said) if is_label(label, names)]
        index = {label: find_label(label, names, f"label in {self.source.path}") for label in known}
        unknown = sorted(said - index.keys())
        if unknown and index:
            raise UsageError(
                f"label: {unknown[0]!r} in {self.source.path} is none of the classifier's labels "
                f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}); {len(unknown)} like it"
            )
        if unknown and self.source.kind != "folder":
            raise UsageError(f"label: {unknown[0]!r} and all others in {self.source.path} are none of the classifier's")
        if unknown:
            self.notes.append(f"the folders ({unknown[0]}, ...) are no labels of the classifier; taken as groups")
            for s in self.source.samples:
                s.slices["folder"] = s.label or "none"
            return [None] * len(self.source.samples)
        return [index[s.label] if s.label is not None else None for s in self.source.samples]

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
            "judges": {name: models_digest([j.module], j.labels) for name, j in self.judges.items()},
        }
        config = {"mode": self.config.mode_name, **self.settings.model_dump(), "seed": self.config.seed}
        # What `auto` takes is held, not asked for: see `conditions`.
        config |= {"runtime": engine.runtime, "slots": engine.slots[-1], "kernels": engine.backend}
        config |= {"attention": engine.attention, "checkpointing": engine.checkpointing}
        asked = {self.options.target, *(s.target for s in self.source.samples)}
        if "neighbour" in asked:
            config["neighbours"] = digest({str(k): v for k, v in engine.targets.neighbours.items()})
        if self.config.match_official:
            config["match_official"] = True
        if engine.device.type != "cpu":  # whose results are not the CPU's, bit by bit
            config["device"] = engine.device.type
        source = {"kind": self.source.kind, "samples": len(self.source.samples), "digest": self.source.digest()}
        identity = {"model": model, "config": config, "options": asdict(self.options), "source": source}
        identity = json.loads(json.dumps(identity))
        text = json.dumps(identity, sort_keys=True)
        return identity | {
            "hash": hashlib.sha256(text.encode()).hexdigest()[:16],
            "config_hash": digest({"config": identity["config"], "options": identity["options"]}),
            "model_hash": digest(model),
        }

    # The plan

    def plan(self) -> list[Chosen]:
        """Choose the samples: by class, by prediction, then the first `limit`."""
        options, numbers = self.options, list(range(len(self.source.samples)))
        if options.per_class is not None:
            groups: dict[int | None, list[int]] = defaultdict(list)
            for n in numbers:
                groups[self.labels[n]].append(n)
            numbers = sorted(n for group in groups.values() for n in sorted(group, key=self._draw)[: options.per_class])
        if options.only_misclassified or options.only_below is not None:
            numbers = self._by_prediction(numbers)
            if not numbers:
                raise CounterlensError(f"no sample of {self.source.path} passes the filters; nothing to explain")
        chosen: list[Chosen] = []
        for n in numbers[: options.limit]:
            sample = self.source.samples[n]
            target = sample.target if sample.target is not None else options.target
            chosen.append(Chosen(len(chosen), sample, self.labels[n], target))
        return chosen

    def _draw(self, number: int) -> str:
        return hashlib.sha256(f"{self.options.sample_seed}:{self.source.samples[number].id}".encode()).hexdigest()

    def _by_prediction(self, numbers: list[int]) -> list[int]:
        """Numbers whose predictions pass the filters, in as many passes as it takes to fill the limit."""
        kept: list[int] = []
        for start in range(0, len(numbers), self.options.part_size):
            some = numbers[start : start + self.options.part_size]
            images, errors = self.read([self.source.samples[n] for n in some])
            readable = [n for n, error in zip(some, errors, strict=True) if error is None]
            if not readable:
                continue
            confidence, predicted = self.engine.probabilities(images).max(dim=1)
            for n, p, c in zip(readable, predicted.tolist(), confidence.tolist(), strict=True):
                wrong = not self.options.only_misclassified or p != self.labels[n]
                if wrong and (self.options.only_below is None or c < self.options.only_below):
                    kept.append(n)
            if self.options.limit is not None and len(kept) >= self.options.limit:
                break
        return kept

    # One part

    def read(
        self, samples: Sequence[Sample], pool: ThreadPoolExecutor | None = None
    ) -> tuple[Tensor, list[str | None]]:
        """Images [n, 3, H, W] of the samples that can be read, and for each sample None or what is wrong with it."""
        size = self.engine.image_size

        def one(sample: Sample) -> Tensor | str:
            try:
                return sample.load(size, self.config.interpolation)
            except CounterlensError as error:
                return str(error).removeprefix(f"{sample.name}: ")

        loaded = list(pool.map(one, samples) if pool else map(one, samples))
        images = [x for x in loaded if isinstance(x, Tensor)]
        stacked = torch.stack(images) if images else torch.zeros(0, 3, size, size)
        return stacked, [x if isinstance(x, str) else None for x in loaded]

    def explain(
        self,
        part: int,
        chosen: Sequence[Chosen],
        images: Tensor,  # [n, 3, H, W], those that could be read
        unread: Sequence[str | None],
        on_step: Callable[[int, int], None] | None = None,
    ) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """The rows of a part, one for each chosen sample, and the bytes of their images by path."""
        started = time.perf_counter()
        rows = [self._blank(part, c) for c in chosen]
        files: dict[str, bytes] = {}
        for row, error in zip(rows, unread, strict=True):
            if error is not None:
                row |= {"status": "failed", "error": error}
        at = [i for i, error in enumerate(unread) if error is None]
        at, images = self._predict(rows, at, images, [chosen[i] for i in at])
        if at and self.options.counterfactuals:
            self._counterfactuals(rows, at, images, [chosen[i].target for i in at], on_step)
            if self.options.insight:
                self._insight(rows, at, images, chosen)
        if at and self.options.saliency is not None:
            self._saliency(rows, at, images, self.options.saliency)
        for place, row in enumerate(rows):
            for what in ("image", "counterfactual", "true_counterfactual", "away_counterfactual", "saliency"):
                if isinstance(row[what], Tensor):
                    name = "input" if what == "image" else what.removesuffix("_counterfactual")
                    path = image_path(part, place, name, self.options.image_format)
                    said = {
                        k: row[k] for k in ("id", "file", "label", "prediction", "target", "seed", "number", "part")
                    }
                    files[path] = encode_image(
                        row[what], self.options.image_format, {"what": name, **said, **self.facts}
                    )
                    row[what] = path
        share = (time.perf_counter() - started) / max(len(rows), 1)
        for row in rows:
            row["wall_seconds"] = share
        return rows, files

    def _blank(self, part: int, chosen: Chosen) -> dict[str, Any]:
        sample, where = chosen.sample, chosen.sample.where
        row: dict[str, Any] = dict.fromkeys((name for name, _ in COLUMNS), None)
        return row | {
            "number": chosen.number,
            "id": sample.id,
            "file": sample.id if self.source.kind == "folder" else shown(where) if isinstance(where, Path) else None,
            "slices": dict(sorted(sample.slices.items())),
            "label": None if chosen.label is None else self.engine.labels[chosen.label],
            "judges": {},
            "status": "done",
            "retried": False,
            "part": part,
            "config_hash": self.identity["config_hash"],
            "model_hash": self.identity["model_hash"],
        }

    def _predict(
        self, rows: list[dict[str, Any]], at: list[int], images: Tensor, chosen: Sequence[Chosen]
    ) -> tuple[list[int], Tensor]:
        """Fill in predictions; samples on which the classifier fails are recorded and dropped."""
        if not at:
            return at, images

        def predict(some: list[int]) -> list[Tensor]:
            p = self.engine.probabilities(images[some])
            check_computed("classifier", p)
            return [p]

        results, errors = self._retrying(predict, len(at))
        for k, i in enumerate(at):
            row = rows[i]
            row["image"] = images[k]
            if errors[k] is not None:
                row |= {"status": "failed", "error": errors[k], "retried": True}
                continue
            confidence, predicted = results[k][0].max(dim=0)
            label = chosen[k].label
            row |= {
                "prediction": self.engine.labels[int(predicted)],
                "confidence": confidence.item(),
                "correct": None if label is None else int(predicted) == label,
            }
        good = [k for k, error in enumerate(errors) if error is None]
        return [at[k] for k in good], images[good]

    def _retrying(
        self, run: Callable[[list[int]], list[Tensor]], count: int
    ) -> tuple[dict[int, list[Tensor]], list[str | None]]:
        """Run something over samples 0 to count - 1, all at once and, where that fails, one by one.

        `run` takes indices and returns tensors whose first dimension is theirs.
        """
        results: dict[int, list[Tensor]] = {}
        errors: list[str | None] = [None] * count

        def attempt(some: list[int]) -> None:
            """Run over these; samples of which NaN is known drop out, and the others stay together."""
            while some:
                try:
                    tensors = run(some)
                except NotFinite as error:
                    for k in error.samples:
                        errors[some[k]] = f"{error.what}: NaN or infinity for this image"
                    some = [n for k, n in enumerate(some) if k not in error.samples]
                else:
                    results.update((n, [t[k] for t in tensors]) for k, n in enumerate(some))
                    return

        everything = list(range(count))
        try:
            attempt(everything)
        except UsageError:
            raise
        except FAILURES:
            for n in everything:
                if errors[n] is not None:
                    continue
                try:
                    attempt([n])
                except FAILURES as error:
                    errors[n] = f"{type(error).__name__}: {error}"
        return results, errors

    def _run_counterfactuals(
        self, images: Tensor, targets: list[str | int], on_step: Callable[[int, int], None] | None = None
    ) -> tuple[list[tuple[Counterfactuals, int] | str], bool]:
        """A result and a place in it, or what went wrong, for each image; and whether they had to be run singly."""
        options: dict[str, Any] = {"config": self.config, "on_step": on_step}
        if self.options.budget_s is not None:
            options["budget_s"] = self.options.budget_s
        try:
            result = self.engine.counterfactual(images, targets, **options)
            return [(result, i) for i in range(len(images))], False
        except UsageError:
            raise
        except FAILURES:
            out: list[tuple[Counterfactuals, int] | str] = []
            for i in range(len(images)):
                try:
                    out.append((self.engine.counterfactual(images[i : i + 1], targets[i : i + 1], **options), 0))
                except FAILURES as error:
                    out.append(f"{type(error).__name__}: {error}")
            return out, True

    def _counterfactuals(
        self,
        rows: list[dict[str, Any]],
        at: list[int],
        images: Tensor,
        targets: list[str | int],
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        runs, singly = self._run_counterfactuals(images, targets, on_step)
        for k, i in enumerate(at):
            row, run = rows[i], runs[k]
            row["retried"] = singly
            if isinstance(run, str):
                row |= {"status": "failed", "error": run}
                continue
            result, n = run
            row["target"] = result.labels[int(result.target[n])]
            row["seed"] = result.seeds[n]
            if result.errors[n] is not None:
                row |= {"status": result.status(n), "error": result.errors[n]}
                continue
            kept = result.kept_fraction[n]
            row |= {
                "counterfactual_prediction": result.labels[int(result.prediction[n])],
                "counterfactual_confidence": result.confidence[n].item(),
                "target_confidence": result.target_confidence[n].item(),
                "flipped": bool(result.flipped[n]),
                "l1": result.l1[n].item(),
                "l2": result.l2[n].item(),
                **changes(images[k], result.images[n]),
                "kept_fraction": kept[kept.isfinite()].mean().item(),
                "counterfactual": as_saved(result.images[n]),
                "seconds": result.seconds[n].item(),
            }
        self._ask_judges([rows[i] for i in at])

    def _saliency(self, rows: list[dict[str, Any]], at: list[int], images: Tensor, method: str) -> None:
        """Explain each prediction by a saliency map, scored by MSI (`Engine.explain`)."""
        from ..saliency.explain import explain

        def run(some: list[int]) -> list[Tensor]:
            found = explain(self.engine, images[some], method=method, config=self.config)
            msi, curves = found.msi, found.msi.curves
            assert curves.keep is not None
            assert curves.remove is not None
            return [found.saliency, msi.score, msi.base_score, msi.sufficient_area, curves.keep, curves.remove]

        results, errors = self._retrying(run, len(at))
        for k, i in enumerate(at):
            if errors[k] is not None:
                rows[i] |= {"status": "failed", "error": f"saliency: {errors[k]}", "retried": True}
                continue
            saliency, score, base, area, keep, remove = results[k]
            rows[i] |= {
                "saliency": saliency.clamp(0, 1),
                "msi": score.item(),
                "msi_base": base.item(),
                "sufficient_area": area.item(),
                "insertion_curve": keep.tolist(),
                "deletion_curve": remove.tolist(),
            }

    @torch.no_grad()
    def _ask_judges(self, rows: list[dict[str, Any]]) -> None:
        done = [r for r in rows if isinstance(r["counterfactual"], Tensor)]
        if not done or not self.judges:
            return
        for name, judge in self.judges.items():
            device = next((p.device for p in judge.module.parameters()), None)
            with frozen(judge.module):
                # Always the same shape, so that a judge's answer does not depend on how many samples there are.
                for start in range(0, len(done), 16):
                    some = done[start : start + 16]
                    images = torch.stack([r["counterfactual"] for r in some])
                    padded = torch.cat([images, images[:1].expand(16 - len(images), -1, -1, -1)])
                    try:
                        said = probabilities(judge, padded.to(device))[: len(some)].cpu()
                    except FAILURES as error:
                        raise CounterlensError(f"judge: {name} fails ({type(error).__name__}: {error})") from error
                    for row, p in zip(some, said, strict=True):
                        if p.isfinite().all():
                            row["judges"][name] = self.engine.labels[int(p.argmax())]
                        else:
                            row |= {"status": "failed", "error": f"judge {name}: NaN or infinity for this image"}
        for row in (row for row in done if row["status"] != "failed"):
            row["transfer"] = all(said == row["target"] for said in row["judges"].values())

    def _insight(self, rows: list[dict[str, Any]], at: list[int], images: Tensor, chosen: Sequence[Chosen]) -> None:
        """For wrong predictions: towards the true label, and the smallest of a few changes away from the prediction."""
        wrong = [(k, i) for k, i in enumerate(at) if rows[i]["correct"] is False]
        if not wrong:
            return
        labels = self.engine.labels
        index = [k for k, _ in wrong]
        p = self.engine.probabilities(images[index])
        asked: list[tuple[int, int]] = []  # place in `wrong`, label
        for w, (_, i) in enumerate(wrong):
            truth = chosen[i].label
            assert truth is not None
            likeliest = [
                c for c in p[w].topk(min(AWAY + 1, len(labels))).indices.tolist() if labels[c] != rows[i]["prediction"]
            ]
            had = labels.index(rows[i]["target"]) if isinstance(rows[i]["counterfactual"], Tensor) else None
            asked += [(w, c) for c in dict.fromkeys([truth, *likeliest[:AWAY]]) if c != had]
        runs, _ = self._run_counterfactuals(images[[index[w] for w, _ in asked]], [c for _, c in asked])
        found: dict[int, list[tuple[str, str, float, Tensor]]] = defaultdict(list)  # target, prediction, l1, image
        for w, (_, i) in enumerate(wrong):
            if isinstance(rows[i]["counterfactual"], Tensor):
                row = rows[i]
                found[w].append((row["target"], row["counterfactual_prediction"], row["l1"], row["counterfactual"]))
        for (w, c), run in zip(asked, runs, strict=True):
            if not isinstance(run, str) and run[0].errors[run[1]] is None:
                result, n = run
                now = labels[int(result.prediction[n])]
                found[w].append((labels[c], now, result.l1[n].item(), as_saved(result.images[n])))
        for w, (k, i) in enumerate(wrong):
            row = rows[i]
            for target, now, l1, image in found[w]:
                if target == row["label"]:
                    grid = changes(images[k], image)["change_grid"]
                    row |= {
                        "true_flipped": now == target,
                        "true_l1": l1,
                        "true_grid": grid,
                        "true_counterfactual": image,
                    }
            away = [f for f in found[w] if f[1] != row["prediction"]]
            if away:
                target, now, l1, image = min(away, key=lambda f: f[2])
                grid = changes(images[k], image)["change_grid"]
                row |= {"away_target": target, "away_prediction": now, "away_l1": l1, "away_grid": grid}
                row["away_counterfactual"] = image


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
    given: dict[str, Any] = {k: tuple(v) if k == "slices" else v for k, v in options.items() if v is not None}
    asked = Options(**given)
    return Auditor(engine, open_source(Path(source), asked.slices, asked.recursive), asked, config, judges)


def read_plan(folder: Path, auditor: Auditor) -> list[Chosen]:
    """The plan that is there."""
    pa, pq = need("pyarrow", "an audit's results"), need("pyarrow.parquet", "an audit's results")
    try:
        places = pq.read_table(folder / PLAN).column("place").to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise CounterlensError(f"{folder / PLAN}: cannot be read ({error}); remove it, and it is made again") from error
    chosen: list[Chosen] = []
    for number, place in enumerate(places):
        sample = auditor.source.samples[place]
        target = sample.target if sample.target is not None else auditor.options.target
        chosen.append(Chosen(number, sample, auditor.labels[place], target))
    return chosen
