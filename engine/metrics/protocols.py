"""The tables of the papers on counterfactual images: which columns each has, and over which images each is taken.

A protocol is a list of columns; a column is a function of what was measured once over all images, and the images that
it counts. What the authors' published code does decides; where it differs from their paper, the column says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import CounterlensError, NotFinite, UsageError
from .attributes import Attributes, attributes_changed, correlation_difference
from .distribution import encoded, frechet, split_frechet, warn_of_few
from .encoders import ENCODERS
from .inputs import check_computed, check_images
from .intervals import Interval, bootstrap
from .quantities import Explained
from .transition import cout

SAME_FACE = 0.5  # FVA: two faces are one person's where their features' cosine is above this
Over = Literal["all", "flipped", "correct"]
OVERS: tuple[Over, ...] = get_args(Over)
WHICH = {"all": "all counterfactuals", "flipped": "those that flip", "correct": "images that are classified correctly"}


@dataclass(frozen=True)
class Batch:
    """Images of one size with their counterfactuals.

    Attributes:
        images, counterfactuals: [B, C, H, W] in [0, 1].
        further: of each image its other counterfactuals, of further runs or starts, [K, C, H, W] with any K.
    """

    images: Tensor
    counterfactuals: Tensor
    further: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Facts:
    """What is known of N counterfactuals before a network sees them.

    Attributes:
        flipped: [N] bool, the classifier says the target.
        target_confidence: [N], its probability of the target.
        source, target: [N], the classifier's labels of the images, and asked for.
        correct: [N] bool, the classifier is right about the image; None where true labels are not known.
    """

    flipped: Tensor
    target_confidence: Tensor
    source: Tensor
    target: Tensor
    correct: Tensor | None = None

    def rows(self, over: Over) -> Tensor:
        """Which of them a column counts: [N] bool.

        Raises:
            UsageError: `correct`, and true labels are not known.
        """
        if over == "all":
            return torch.ones_like(self.flipped)
        if over == "flipped":
            return self.flipped
        if self.correct is None:
            raise UsageError("needs true labels, to know which images are classified correctly")
        return self.correct


@dataclass
class Measured:
    """What all columns are made of, each once for N images; float64 on the CPU.

    Attributes:
        facts: see there.
        l1, l2: [N], norms of the difference, summed over pixels and channels of images in [0, 1].
        features: by encoder, of images and of counterfactuals, [N, D] each.
        cout: [N], NaN where no column asked for it.
        apart: [N], mean LPIPS between an image's counterfactuals, two by two; NaN with one.
        splits: random halvings of split FID. seed: of them.
        attributes, query: annotations of the data, and which attribute was to change.
    """

    facts: Facts
    l1: Tensor
    l2: Tensor
    features: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cout: Tensor | None = None
    apart: Tensor | None = None
    splits: int = 1
    seed: int = 0
    attributes: Attributes | None = None
    query: int = 0

    def cosine(self, encoder: str) -> Tensor:
        """Cosine between an image's features and its counterfactual's: [N]."""
        return torch.cosine_similarity(*self.features[encoder], dim=1)


@dataclass(frozen=True)
class Column:
    """One number of a table.

    Attributes:
        name: in results. heading: as papers print it.
        higher_is_better: which way is.
        value: from a `Measured` and the rows that count, [N] bool, to values of these rows, or to one number.
        about: what it is, in one line.
        over: which counterfactuals count.
        needs: names of encoders, `classifier`, `attributes` or `further`.
        percent: shown times 100. digits: behind the point.
    """

    name: str
    heading: str
    higher_is_better: bool
    value: Callable[[Measured, Tensor], Tensor | float]
    about: str
    over: Over = "all"
    needs: tuple[str, ...] = ()
    percent: bool = False
    digits: int = 2

    @property
    def arrow(self) -> str:
        """The heading, and which way is better."""
        return f"{self.heading} {'↑' if self.higher_is_better else '↓'}"

    def shown(self, value: float) -> str:
        """A value as a table has it."""
        return f"{value * (100 if self.percent else 1):.{self.digits}f}"


def _fid(m: Measured, rows: Tensor) -> float:
    before, after = m.features["inception"]
    distance = frechet(before, after[rows])
    warn_of_few(int(rows.sum()), after.shape[1], "FID")
    return distance


def _sfid(m: Measured, rows: Tensor) -> float:
    return split_frechet(*m.features["inception"], kept=rows, splits=m.splits, seed=m.seed)


def _sfid_by_class(m: Measured, rows: Tensor) -> float:
    if m.splits != 1:
        raise UsageError("splits: this protocol halves each class once, in the images' order; leave it out")
    return split_frechet(*m.features["inception"], kept=rows, groups=m.facts.source)


def _cd(m: Measured, rows: Tensor) -> float:
    assert m.attributes is not None
    before, after = m.features["oracle"]
    return correlation_difference(before[rows], after[rows], m.query, m.attributes.correlations(m.query))


def _cout(m: Measured, rows: Tensor) -> Tensor:
    assert m.cout is not None
    if lost := int(m.cout[rows].isnan().sum()):
        raise CounterlensError(f"the classifier has no answer on the way of {lost} of {int(rows.sum())}")
    return m.cout[rows]


def _apart(m: Measured, rows: Tensor) -> Tensor:
    assert m.apart is not None
    return m.apart[rows & m.apart.isfinite()]


L1 = Column("l1", "L1", False, lambda m, rows: m.l1[rows], "sum of |difference| over pixels and channels, in [0, 1]")
L2 = Column("l2", "L2", False, lambda m, rows: m.l2[rows], "root of the sum of squared differences, in [0, 1]")
FID = Column("fid", "FID", False, _fid, "Fréchet distance of Inception's features, to all images", needs=("inception",))
SFID = Column(
    "sfid", "sFID", False, _sfid, "FID of one random half's counterfactuals to the other half's images, both ways",
    needs=("inception",),
)  # fmt: skip
S3 = Column(
    "s3", "S3", True, lambda m, rows: m.cosine("simsiam")[rows], "cosine of SimSiam's projected features",
    needs=("simsiam",), digits=4,
)  # fmt: skip
FVA = Column(
    "fva", "FVA %", True, lambda m, rows: m.cosine("vggface2")[rows] > SAME_FACE,
    f"share of faces that stay one person's: cosine of VGGFace2's features above {SAME_FACE:g}",
    needs=("vggface2",), percent=True, digits=1,
)  # fmt: skip
FS = Column(
    "fs", "FS", True, lambda m, rows: m.cosine("vggface2")[rows], "cosine of VGGFace2's features",
    needs=("vggface2",), digits=4,
)  # fmt: skip
MNAC = Column(
    "mnac", "MNAC", False, lambda m, rows: attributes_changed(*m.features["oracle"])[rows],
    "attributes that the oracle sees change", needs=("oracle",),
)  # fmt: skip
CD = Column(
    "cd", "CD", False, _cd, "how far attributes that change with the query are from those that go with it in the data",
    needs=("oracle", "attributes"),
)  # fmt: skip
COUT = Column(
    "cout", "COUT", True, _cout, "area between the target's and the source's probability on the way, ACE's steps",
    needs=("classifier",), digits=4,
)  # fmt: skip
FLIPS = Column(
    "flip_rate", "FR %", True, lambda m, rows: m.facts.flipped[rows], "share that the classifier calls the target",
    percent=True, digits=1,
)  # fmt: skip
CONFIDENCE = Column(
    "confidence", "confidence", True, lambda m, rows: m.facts.target_confidence[rows], "probability of the target",
    digits=3,
)  # fmt: skip
DIVERSITY = Column(
    "diversity", "LPIPS between runs", True, _apart, "mean LPIPS between counterfactuals of one image, two by two",
    needs=("lpips", "further"), digits=4,
)  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """A table of a paper.

    Attributes:
        name: to ask for it. about: which tables. columns: in order.
    """

    name: str
    about: str
    columns: tuple[Column, ...]


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            "ldce", "LDCE (arXiv 2310.06668), ImageNet",
            (L1, L2, FID, replace(SFID, value=_sfid_by_class, about="FID of counterfactuals of one half of each class, "
             "in order, to the other half's images, both ways"), S3, COUT, FLIPS, CONFIDENCE),
        ),
        Protocol(
            "ace", "ACE (arXiv 2303.09962), ImageNet",
            (replace(FID, over="flipped"), replace(SFID, over="flipped"), replace(S3, over="correct"),
             replace(COUT, over="correct"), FLIPS),
        ),
        Protocol(
            "celeba", "ACE and DiME (arXiv 2203.15636), CelebA and CelebA-HQ",
            (*(replace(c, over="flipped") for c in (FID, SFID, FVA, FS, MNAC, CD)), replace(COUT, over="correct"),
             DIVERSITY, FLIPS),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A column's number, or why there is none.

    Attributes:
        column: what it is of; its `over` is the one that was taken.
        value: NaN where there is none.
        interval: 95 % bootstrap interval of a mean; None for distances between sets.
        n: how many counterfactuals count.
        missing: what is not there, or why it cannot be computed.
        failed: it was to be computed and cannot be; else something was not given.
    """

    column: Column
    value: float = math.nan
    interval: Interval | None = None
    n: int = 0
    missing: str | None = None
    failed: bool = False


def find_protocol(name: str, over: Over | None = None) -> Protocol:
    """The protocol of that name; `over` replaces each column's.

    Raises:
        UsageError: there is none, or no such `over`.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    if over is not None and over not in OVERS:
        raise UsageError(f"over: expected one of {', '.join(OVERS)}, got {over!r}")
    found = PROTOCOLS[name]
    keep = ("flip_rate", "confidence")
    return found if over is None else replace(
        found, columns=tuple(c if c.name in keep else replace(c, over=over) for c in found.columns)
    )  # fmt: skip


def protocol_table(
    protocol: Protocol,
    facts: Facts,
    batches: Iterable[Batch],
    *,
    encoders: Mapping[str, Callable[..., Tensor]] | None = None,
    classifier: Any = None,
    attributes: Attributes | None = None,
    query: str | None = None,
    further: bool = False,
    splits: int = 1,
    seed: int = 0,
) -> list[Cell]:
    """The cells of a protocol's table; what a column needs and was not given is said in its cell.

    Args:
        facts: of all images. batches: the images themselves, in that order, read one batch at a time.
        encoders: by name (`metrics.encoders.ENCODERS`), from images in [0, 1] to features [B, D]; `lpips` takes two
            batches and returns [B].
        classifier: for COUT; see `quantities.Explained`.
        attributes, query: annotations of the training data and the attribute that was to change, for CD.
        further: whether batches hold further counterfactuals.
        splits: random halvings of split FID; ACE's scripts make one.
        seed: of them, and of intervals.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: a network gives NaN or infinity.
    """
    given = dict(encoders or {})
    if unknown := given.keys() - ENCODERS.keys() - {need for column in protocol.columns for need in column.needs}:
        raise UsageError(f"encoder: expected some of {', '.join(ENCODERS)}, got {min(unknown)!r}")
    if splits < 1:
        raise UsageError(f"splits: expected at least 1, got {splits}")
    if attributes is not None and query is None:
        raise UsageError("query: say which attribute was to change, beside attributes")
    there = {*given, *(["classifier"] if classifier is not None else []), *(["further"] if further else [])}
    there |= {"attributes"} if attributes is not None else set()
    rows: dict[str, Tensor] = {}
    cells: dict[str, Cell] = {}
    for column in protocol.columns:
        missing = [_missing(need) for need in column.needs if need not in there]
        try:
            rows[column.name] = facts.rows(column.over)
        except UsageError as error:
            missing.append(str(error))
        if missing:
            cells[column.name] = Cell(column, missing="; ".join(missing))
    todo = [column for column in protocol.columns if column.name not in cells]
    used = {need for column in todo for need in column.needs}
    with_cout = rows["cout"] if any(c.name == "cout" for c in todo) else None
    measured = _measure(
        facts, batches, {name: given[name] for name in given if name in used},
        None if with_cout is None else (classifier, with_cout),
    )  # fmt: skip
    measured.splits, measured.seed, measured.attributes = splits, seed, attributes
    if attributes is not None and query is not None:
        measured.query = attributes.index(query)
    for column in todo:
        cells[column.name] = _cell(column, measured, rows[column.name], seed)
    return [cells[column.name] for column in protocol.columns]


def _missing(need: str) -> str:
    """What a person can do about something that a column needs and was not given."""
    if need in ENCODERS:
        encoder = ENCODERS[need]
        return f"needs --encoder {need}=FILE.onnx: {encoder.about}; weights: {encoder.source}"
    others = {
        "classifier": "needs the classifier that they are of: --classifier, and what describes it",
        "attributes": "needs --attributes and --query: annotations of CelebA's training images (list_attr_celeba.csv, "
        "list_eval_partition.csv of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)",
        "further": "needs several counterfactuals of an image: a run with --count, or further runs (--run FOLDER)",
    }
    return others.get(need, f"needs the encoder {need}")


def _cell(column: Column, measured: Measured, rows: Tensor, seed: int) -> Cell:
    n = int(rows.sum())
    try:
        value = column.value(measured, rows)
    except CounterlensError as error:
        return Cell(column, n=n, missing=str(error).removeprefix(f"{column.heading}: "), failed=True)
    if not isinstance(value, Tensor):
        return Cell(column, value, n=n)
    if not len(value):
        return Cell(column, missing=f"there is none: 0 of {len(rows)} ({WHICH[column.over]})", failed=True)
    interval = bootstrap(value.double(), seed=seed)
    return Cell(column, interval.mean, interval, len(value))


def _measure(
    facts: Facts,
    batches: Iterable[Batch],
    encoders: Mapping[str, Callable[..., Tensor]],
    with_cout: tuple[Any, Tensor] | None,
) -> Measured:
    """Read each batch once and keep what columns are made of."""
    l1, l2, couts, apart = [], [], [], []
    features: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in encoders if name != "lpips"}
    done = 0
    for batch in batches:
        images, after = batch.images, batch.counterfactuals
        check_images(images)
        if after.shape != images.shape:
            raise UsageError(f"counterfactuals: expected {list(images.shape)} as the images, got {list(after.shape)}")
        b = len(images)
        here = slice(done, done + b)
        difference = (after - images).double().flatten(1)
        l1.append(difference.abs().sum(1).cpu())
        l2.append(difference.norm(dim=1).cpu())
        for name, parts in features.items():
            both = [encoded(f"encoder {name}", encoders[name], x) for x in (images, after)]
            parts.append((both[0], both[1]))
        if with_cout is not None:
            classifier, wanted = with_cout
            rows = wanted[here].nonzero()[:, 0]
            found = torch.full((b,), math.nan, dtype=torch.float64)
            while len(rows):  # an image without an answer takes no other with it
                before, made = (x[rows].to(_device_of(classifier)) for x in (images, after))
                target, source = (x[here][rows] for x in (facts.target, facts.source))
                try:
                    found[rows] = cout(classifier, before, made, target, source, compat="ace").score
                    break
                except NotFinite as error:
                    rows = rows[[k not in error.samples for k in range(len(rows))]]
            couts.append(found)
        if "lpips" in encoders:
            apart.append(_apart_in(batch, encoders["lpips"]))
        done += b
    if done != len(facts.flipped):
        raise UsageError(f"images: facts are of {len(facts.flipped)}, the batches hold {done}")
    whole = {name: tuple(torch.cat(part) for part in zip(*parts, strict=True)) for name, parts in features.items()}
    for name, (before, after) in whole.items():
        check_computed(f"encoder {name}", torch.cat([before, after], dim=1))
    return Measured(
        facts, torch.cat(l1), torch.cat(l2), {name: (pair[0], pair[1]) for name, pair in whole.items()},
        torch.cat(couts) if couts else None, torch.cat(apart) if apart else None,
    )  # fmt: skip


def _apart_in(batch: Batch, distance: Callable[..., Tensor]) -> Tensor:
    """`mean_apart` of each image's counterfactuals: [B]."""
    found = [
        mean_apart(torch.cat([first[None], others]), distance)
        for first, others in zip(batch.counterfactuals, batch.further, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def mean_apart(
    images: Tensor,  # [K, C, H, W] in [0, 1]
    distance: Callable[..., Tensor],
) -> float:
    """Mean distance between images, two by two; NaN of one.

    Args:
        distance: from two batches [P, C, H, W] to [P]: LPIPS.

    Raises:
        UsageError: it returns something else. NotFinite: NaN or infinity.
    """
    pairs = list(combinations(range(len(images)), 2))
    if not pairs:
        return math.nan
    a, b = (torch.stack([images[pair[k]] for pair in pairs]) for k in (0, 1))
    found = distance(a, b)
    if not isinstance(found, Tensor) or found.numel() != len(pairs):
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"encoder lpips: expected [{len(pairs)}] of two batches {list(a.shape)}, got {got}")
    values = found.double().reshape(-1)
    check_computed("encoder lpips", values)
    return values.mean().item()


def _device_of(classifier: Any) -> torch.device:
    """Where a classifier's weights are; of one without any, the CPU."""
    parameters = (p for module in Explained(classifier).modules for p in module.parameters())
    return next(parameters, torch.empty(0)).device


def check_classifier(classifier: Any, facts: Facts, batch: Batch) -> None:
    """Refuse a classifier that is not the one that made these counterfactuals: it must say of them what the facts say.

    Args:
        batch: the first images of the facts.

    Raises:
        UsageError: it does not. NotFinite: it says nothing of any.
    """
    explained = Explained(classifier)
    n = len(batch.images)
    with torch.no_grad():
        logits = explained.logits(batch.counterfactuals.to(_device_of(classifier))).cpu()
    answered = logits.isfinite().all(1)
    if not answered.any():
        raise NotFinite("classifier", range(n))
    wrong = int((answered & ((logits.argmax(1) == facts.target[:n].cpu()) != facts.flipped[:n].cpu())).sum())
    if wrong * 20 > n:  # ties may fall the other way in another batch
        raise UsageError(
            f"classifier: it says otherwise than the results of {wrong} of the first {n} counterfactuals; give the one "
            "that they are of"
        )
