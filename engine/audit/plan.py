"""What an audit is asked, which samples it takes and in which parts."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from ..images.sources import Sample, Source, need
from ..labels import find_label, is_label
from ..metrics.table import check_metrics
from ..saliency.table import check_methods
from .results import FORMATS, GOES_ON, PLAN


@dataclass(frozen=True)
class Options:
    """What is asked of an audit; everything here decides the rows.

    Attributes:
        target: for samples without their own: label, index or one of `RELATIVE_TARGETS`.
        counterfactuals: make them.
        saliency: method of `Engine.explain` that explains each prediction, such as lax; None: no saliency.
        metrics: names or groups in `metrics.table` that score its maps, beside MSI; group `judge` asks the first judge.
        insight: for wrong predictions also the way to the true label, and the smallest change away from the prediction.
        limit: at most so many samples.
        per_class: at most so many samples of each true label, drawn by `sample_seed`.
        only_misclassified: only where prediction and true label differ.
        only_below: only where the prediction's probability is below this.
        sample_seed: of `per_class`.
        budget_s: deadline in seconds for each sample; results then depend on the machine's speed.
        part_size: samples in a part, the unit that is written at once.
        image_format: png or webp (lossless).
        slices: columns of the source that group the report.
        recursive: of a source that is a folder all folders below it, not only its class folders.
    """

    target: str | int = "runner-up"
    counterfactuals: bool = True
    saliency: str | None = None
    metrics: tuple[str, ...] = ()
    insight: bool = True
    limit: int | None = None
    per_class: int | None = None
    only_misclassified: bool = False
    only_below: float | None = None
    sample_seed: int = 0
    budget_s: float | None = None
    part_size: int = 64
    image_format: str = "png"
    slices: tuple[str, ...] = ()
    recursive: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "per_class", "part_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected 1 or more, got {value}")
        if self.only_below is not None and not 0 < self.only_below <= 1:
            raise UsageError(f"only_below: expected a probability in (0, 1], got {self.only_below:g}")
        if self.budget_s is not None and not self.budget_s > 0:
            raise UsageError(f"budget_s: expected more than 0 seconds, got {self.budget_s:g}")
        if self.image_format not in FORMATS:
            raise UsageError(f"image_format: expected one of {', '.join(FORMATS)}, got {self.image_format!r}")
        if self.saliency is not None:
            check_methods([self.saliency])
        elif self.metrics:
            raise UsageError("metrics: they score saliency maps; give saliency, a method, too")
        check_metrics(self.metrics, ("judge", "stability"))
        if not (self.counterfactuals or self.saliency):
            raise UsageError("counterfactuals: without them and without saliency there is nothing to do")


@dataclass(frozen=True)
class Chosen:
    """A sample of the plan: its number, the sample, its label's and its target's index (-1: none, or relative)."""

    number: int
    sample: Sample
    label: int | None
    target: str | int


OPTION_NAMES = tuple(f.name for f in fields(Options))


def parts_of(chosen: Sequence[Chosen], size: int) -> dict[int, list[Chosen]]:
    """Parts by number; which samples share a part never depends on what was done before."""
    return {i // size: list(chosen[i : i + size]) for i in range(0, len(chosen), size)}


def shard_of(parts: Iterable[int], shard: tuple[int, int] | None) -> list[int]:
    """The parts of one shard (number from 1, of how many)."""
    return [p for p in parts if shard is None or p % shard[1] == shard[0] - 1]


def write_plan(folder: Path, chosen: Sequence[Chosen], samples: Sequence[Sample]) -> None:
    """Write the plan: which samples of the source, in which order."""
    pa, pq = need("pyarrow", "an audit's results"), need("pyarrow.parquet", "an audit's results")
    places = {s.id: i for i, s in enumerate(samples)}
    table = pa.table(
        {
            "number": pa.array([c.number for c in chosen], pa.int64()),
            "id": pa.array([c.sample.id for c in chosen], pa.string()),
            "place": pa.array([places[c.sample.id] for c in chosen], pa.int64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(folder / PLAN, buffer.getvalue(), hint=GOES_ON)


def read_places(folder: Path) -> list[int]:
    """The places in the source of a plan's samples, in order.

    Raises:
        CounterlensError: the plan cannot be read.
    """
    pa, pq = need("pyarrow", "an audit's results"), need("pyarrow.parquet", "an audit's results")
    try:
        places: list[int] = pq.read_table(folder / PLAN).column("place").to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise CounterlensError(f"{folder / PLAN}: cannot be read ({error}); remove it, and it is made again") from error
    return places


def match_labels(source: Source, names: Sequence[str]) -> tuple[list[int | None], list[str]]:
    """Each sample's true label as the classifier's index, and what a person should know of it.

    Class folders that are no labels become a slice.

    Raises:
        UsageError: the source has labels that the classifier has not.
    """
    said = {s.label for s in source.samples if s.label is not None}
    known = [label for label in sorted(said) if is_label(label, names)]
    index = {label: find_label(label, names, f"label in {source.path}") for label in known}
    unknown = sorted(said - index.keys())
    if unknown and index:
        raise UsageError(
            f"label: {unknown[0]!r} in {source.path} is none of the classifier's labels "
            f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}); {len(unknown)} like it"
        )
    if unknown and source.kind != "folder":
        raise UsageError(f"label: {unknown[0]!r} and all others in {source.path} are none of the classifier's")
    if unknown:
        for s in source.samples:
            s.slices["folder"] = s.label or "none"
        note = f"the folders ({unknown[0]}, ...) are no labels of the classifier; taken as groups"
        return [None] * len(source.samples), [note]
    return [index[s.label] if s.label is not None else None for s in source.samples], []


def choose(
    source: Source,
    labels: Sequence[int | None],
    options: Options,
    predict: Callable[[Sequence[int]], Iterable[tuple[int, int, float]]],
) -> list[int]:
    """The places of the samples that are asked for: by class, by prediction, then the first `limit`.

    Args:
        source, labels: the samples, and each one's true label.
        options: what is asked.
        predict: place, prediction and confidence of the samples in some places that can be read.

    Raises:
        CounterlensError: none is left.
    """
    places = list(range(len(source.samples)))
    if options.per_class is not None:

        def draw(place: int) -> str:
            return hashlib.sha256(f"{options.sample_seed}:{source.samples[place].id}".encode()).hexdigest()

        groups: dict[int | None, list[int]] = defaultdict(list)
        for n in places:
            groups[labels[n]].append(n)
        places = sorted(n for group in groups.values() for n in sorted(group, key=draw)[: options.per_class])
    if options.only_misclassified or options.only_below is not None:
        kept: list[int] = []
        for start in range(0, len(places), options.part_size):  # in as many passes as it takes to fill the limit
            for n, predicted, confidence in predict(places[start : start + options.part_size]):
                wrong = not options.only_misclassified or predicted != labels[n]
                if wrong and (options.only_below is None or confidence < options.only_below):
                    kept.append(n)
            if options.limit is not None and len(kept) >= options.limit:
                break
        if not kept:
            raise CounterlensError(f"no sample of {source.path} passes the filters; nothing to explain")
        places = kept
    return places[: options.limit]
