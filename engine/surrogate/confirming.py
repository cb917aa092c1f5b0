"""Counterfactuals that a student leads to and the box judges: what it does not confirm is tried again, within a budget.

Candidates cost no query. Each rung of a ladder of settings makes one for every image that is still open, and the box is
asked about those that even the least convinced student takes for the target.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Config, Settings
from ..core.regions import check_region, one_region_each
from ..core.result import ALREADY, Counterfactual, Counterfactuals, noise_seed
from ..core.targets import one_each
from ..errors import UsageError
from ..guidance.jobs import Job, Outcome, finished
from ..guidance.region import Region
from ..images.files import as_saved
from .student import Students

if TYPE_CHECKING:
    from ..core.core import EngineCore
    from ..core.regions import RegionLike
    from ..core.targets import Targets

Pursuit = Generator[Job | Tensor, Any, None]  # see `pursue`
SHORTEST_S = 1e-3  # that a first candidate has where asking about its image took all of the budget
TRUSTED = 0.5  # probability of the target, by the least convinced student, from which the box is asked


@dataclass(frozen=True)
class Rung:
    """One way to try: what changes against the settings that were asked for.

    Attributes:
        strength: added.
        class_scale: factor.
        renewed: share of other noise, from a seed of its own.
    """

    strength: float = 0.0
    class_scale: float = 1.0
    renewed: float = 0.0

    def settings(self, base: Settings) -> Settings:
        """The settings of this rung; the graph is that of `base`."""
        strength = max(base.strength, min(0.95, base.strength + self.strength))
        return base.model_copy(update={"strength": strength, "class_scale": base.class_scale * self.class_scale})


LADDER = (Rung(), Rung(0.0, 1.6), Rung(0.1, 1.6), Rung(0.1, 2.0, 0.5), Rung(0.2, 2.0, 0.7))


@dataclass
class Candidate:
    """An image that a rung made, and what is thought of it.

    Attributes:
        rung: its place in the ladder.
        outcome: of the run.
        saved: the image as its 8-bit file holds it, [3, H, W].
        seen: the students' probabilities [labels].
        doubt: probability of the target by the least convinced student.
        said: the box's probabilities [labels]; None: not asked.
    """

    rung: int
    outcome: Outcome
    saved: Tensor
    seen: Tensor
    doubt: float
    said: Tensor | None = None


@dataclass
class Case:
    """One image on its way to a target.

    Attributes:
        unanswered: why there is an error: the box says nothing of the image, or of no candidate.
        deadline: `time.perf_counter` after which nothing more is tried.
    """

    place: int
    image: Tensor
    region: Region | None
    seed: int
    source: int = -1
    target: int = -1
    error: str | None = None
    unanswered: bool = False
    deadline: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def asked(self) -> int:
        """Queries so far, the image itself left out."""
        return sum(c.said is not None for c in self.candidates)

    @property
    def left(self) -> float | None:
        """Seconds until its deadline."""
        return None if self.deadline is None else self.deadline - time.perf_counter()

    @property
    def late(self) -> bool:
        """Its deadline is over."""
        return self.left is not None and self.left <= 0

    def confirms(self, candidate: Candidate) -> bool:
        """The box says the target."""
        said = candidate.said
        return said is not None and bool(said.isfinite().all()) and int(said.argmax()) == self.target

    @property
    def best(self) -> Candidate | None:
        """The one that the box confirms, else the one that it takes for the target most."""
        told = [c for c in self.candidates if c.said is not None and c.said.isfinite().all()]
        return max(told, key=lambda c: (self.confirms(c), float(c.said[self.target])), default=None)  # type: ignore[index]

    def open(self, asks: int) -> bool:
        """Whether it is worth trying on."""
        return self.error is None and self.asked < asks and not any(map(self.confirms, self.candidates))


def counterfactual(
    engine: EngineCore,
    images: Tensor,  # [B, 3, H, W] in [0, 1]
    targets: Targets,
    seeds: Sequence[int] | None,
    config: Config,
    region: RegionLike | Sequence[RegionLike | None] | None,
    asks: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Counterfactuals:
    """See `EngineCore.counterfactual`; `asks` are the queries that each counterfactual may take, its image's aside."""
    engine.check_images(images)
    engine.meet_images(images)
    asked = one_each(targets, len(images))
    for target in dict.fromkeys(asked):
        engine.check_target(target)
    if seeds is not None and len(seeds) != len(images):
        raise UsageError(f"seeds: expected {len(images)}, one per image, got {len(seeds)}")
    regions = one_region_each(config.region if region is None else region, images)
    cases = [
        Case(n, image, check_region(regions[n], image), noise_seed(image, config) if seeds is None else seeds[n])
        for n, image in enumerate(images)
    ]
    pursuits = [pursue(engine, case, target, config, asks) for case, target in zip(cases, asked, strict=True)]
    wanted = {n: next(pursuit) for n, pursuit in enumerate(pursuits)}
    rung = 0
    while wanted:  # the box first: who waits for a candidate then waits for one of the same rung
        judged = {n: want for n, want in wanted.items() if isinstance(want, Tensor)}
        replies: Iterable[Any]
        if judged:
            replies = engine.probabilities(torch.stack([*judged.values()]))
        else:
            rung += 1
            tell = None if on_step is None else functools.partial(on_step, rung, len(LADDER))
            replies = make(engine, config, [want for want in wanted.values() if isinstance(want, Job)], tell)
        for n, reply in zip([*(judged or wanted)], replies, strict=True):
            try:
                wanted[n] = pursuits[n].send(reply)
            except StopIteration:
                del wanted[n]
    facts = engine.facts(config, engine.slots_for(len(images))) | {"budget_s": None}
    return Counterfactuals.stack([result_of(engine, case, facts) for case in cases], images, engine.labels)


def pursue(engine: EngineCore, case: Case, target: str | int, config: Config, asks: int) -> Pursuit:
    """One image on its way to a target, one thing after the other; what becomes of it is in the case.

    Yields what it needs and is sent that: a job, for its outcome (see `finished`), or an image [3, H, W], for the box's
    probabilities [labels]. No case knows of another one.

    Raises:
        UsageError: the target has no meaning here.
    """
    base = engine.settings(config)
    _begin(engine, case, target, (yield case.image), config)
    for number, rung in enumerate(LADDER):
        if not case.open(asks) or (number and case.late):
            break
        job = Job(
            case.image, case.target, case.seed + number, rung.settings(base), region=case.region, renewed=rung.renewed,
            budget_s=None if case.left is None else max(case.left, SHORTEST_S),
        )  # fmt: skip
        candidate = _candidate(engine, case, number, (yield job))
        if candidate is not None and candidate.doubt >= TRUSTED:
            candidate.said = yield candidate.saved
    while case.open(asks) and (unasked := [c for c in case.candidates if c.said is None]):
        if case.asked and case.late:
            break
        likeliest = max(unasked, key=lambda c: c.doubt)  # what no student is sure of
        likeliest.said = yield likeliest.saved


def _begin(engine: EngineCore, case: Case, target: str | int, p: Tensor, config: Config) -> None:
    if not case.image.isfinite().all():
        case.error = "the image holds NaN or infinite values"
        return
    if not p.isfinite().all():
        case.error, case.unanswered = f"the classifier gives no answer for the image{_reason(engine, case.image)}", True
        return
    case.source, case.target = int(p.argmax()), engine.targets.resolve(target, p)
    if case.source == case.target and not config.match_official:
        case.error = f"target {engine.labels[case.target]!r} {ALREADY}"


def _candidate(engine: EngineCore, case: Case, rung: int, outcome: Outcome) -> Candidate | None:
    """What a rung made, which the case has now too, and what the students think of it."""
    case.seconds += outcome.seconds
    if outcome.image is None:
        if not case.candidates:
            case.error = outcome.error
        return None
    saved = as_saved(outcome.image)
    students = engine.classifier.module
    with torch.no_grad():
        given = saved[None].to(engine.device)
        seen = torch.softmax(students(given), 1)[0].cpu()
        doubt = students.doubtful(given)[0].cpu() if isinstance(students, Students) else seen
    case.candidates.append(Candidate(rung, outcome, saved, seen, float(doubt[case.target])))
    return case.candidates[-1]


def make(
    engine: EngineCore,
    config: Config,
    jobs: Sequence[Job],
    on_tick: Callable[[], None] | None = None,
) -> list[Outcome]:
    """The outcomes of jobs, images clamped to [0, 1] and laid into their regions; nothing is asked of the box."""
    found: dict[int, Outcome] = {}
    with engine.frozen():
        sampler = engine.sampler(config, engine.slots_for(len(jobs)))
        ids = [sampler.submit(job) for job in jobs]
        while sampler.busy:
            for outcome in sampler.tick():
                found[outcome.id] = outcome
            if on_tick is not None:
                on_tick()
    return [finished(found[id], job.image) for id, job in zip(ids, jobs, strict=True)]


def _reason(engine: EngineCore, image: Tensor) -> str:
    said = "" if engine.box is None else engine.box.why(image)
    return f" ({said})" if said else ""


def result_of(engine: EngineCore, case: Case, facts: dict[str, Any]) -> Counterfactual:
    """What became of a case; `facts` are what made it."""
    best = case.best
    if case.error is None and best is None:
        asked = [c for c in case.candidates if c.said is not None]
        why = _reason(engine, asked[-1].saved) if asked else ""
        case.error, case.unanswered = f"the classifier gives no answer for the counterfactual{why}", True
    failed = case.error is not None or best is None
    common: dict[str, Any] = {
        "id": case.place, "input": case.image, "source": case.source, "target": case.target, "seed": case.seed,
        "seconds": case.seconds or math.nan, "error": case.error, "labels": engine.labels, "provenance": facts,
        "sample": case.place,
    }  # fmt: skip
    if failed:
        nothing: dict[str, Any] = dict.fromkeys(("confidence", "target_confidence", "l1", "l2"), math.nan)
        return Counterfactual(
            image=case.image, prediction=-1, flipped=False, kept_fraction=torch.empty(0), complete=False,
            **nothing, **common,
        )  # fmt: skip
    assert best is not None
    assert best.said is not None
    assert best.outcome.image is not None
    change = best.saved - case.image
    confidence, prediction = best.said.max(dim=0)
    return Counterfactual(
        image=best.outcome.image,
        prediction=int(prediction),
        confidence=confidence.item(),
        target_confidence=best.said[case.target].item(),
        flipped=int(prediction) == case.target,
        l1=change.abs().mean().item(),
        l2=change.square().mean().sqrt().item(),
        kept_fraction=torch.tensor(best.outcome.kept),
        complete=best.outcome.complete,
        region=best.outcome.region,
        student={
            "student_prediction": engine.labels[int(best.seen.argmax())],
            "student_target_confidence": round(float(best.seen[case.target]), 6),
            "attempts": len(case.candidates),
            "attempt": best.rung + 1,
            "queries": 1 + case.asked,
        },
        **common,
    )
