"""Counterfactuals that a student leads to and the box judges: what it does not confirm is tried again, within a budget.

Candidates cost no query. Each rung of a ladder of settings makes one for every image that is still open, and the box is
asked about those that even the least convinced student takes for the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Config, Settings
from ..core.regions import check_region, one_region_each
from ..core.result import ALREADY, Counterfactual, Counterfactuals, noise_seed
from ..core.targets import one_each
from ..errors import UsageError
from ..guidance.jobs import Job, Outcome
from ..guidance.region import Region, compose
from ..images.files import as_saved
from .student import Students

if TYPE_CHECKING:
    from ..core.core import EngineCore
    from ..core.regions import RegionLike
    from ..core.targets import Targets

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
    """One image on its way to a target."""

    place: int
    image: Tensor
    region: Region | None
    seed: int
    source: int = -1
    target: int = -1
    error: str | None = None
    candidates: list[Candidate] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def asked(self) -> int:
        """Queries so far, the image itself left out."""
        return sum(c.said is not None for c in self.candidates)

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
    base = engine.settings(config)
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
    for case, target, p in zip(cases, asked, engine.probabilities(images), strict=True):
        _begin(engine, case, target, p, config)
    for number, rung in enumerate(LADDER):
        todo = [case for case in cases if case.open(asks)]
        _make(engine, todo, number, rung.settings(base), config, on_step)
        made = [(case, x) for case in todo for x in case.candidates if x.rung == number]
        _ask(engine, [(case, x) for case, x in made if x.doubt >= TRUSTED])
    for _ in range(asks):  # what no student is sure of, the likeliest first
        left = [(c, [x for x in c.candidates if x.said is None]) for c in cases if c.open(asks)]
        _ask(engine, [(c, max(some, key=lambda x: x.doubt)) for c, some in left if some])
    facts = engine.facts(config, engine.slots_for(len(images))) | {"budget_s": None}
    return Counterfactuals.stack([_result(engine, case, facts) for case in cases], images, engine.labels)


def _begin(engine: EngineCore, case: Case, target: str | int, p: Tensor, config: Config) -> None:
    if not case.image.isfinite().all():
        case.error = "the image holds NaN or infinite values"
        return
    if not p.isfinite().all():
        case.error = f"the classifier gives no answer for the image{_reason(engine, case.image)}"
        return
    case.source, case.target = int(p.argmax()), engine.targets.resolve(target, p)
    if case.source == case.target and not config.match_official:
        case.error = f"target {engine.labels[case.target]!r} {ALREADY}"


def _make(
    engine: EngineCore,
    cases: Sequence[Case],
    rung: int,
    settings: Settings,
    config: Config,
    on_step: Callable[[int, int], None] | None,
) -> None:
    """Add a candidate to each case, as one rung makes it."""
    if not cases:
        return
    jobs = [
        Job(case.image, case.target, case.seed + rung, settings, region=case.region, renewed=LADDER[rung].renewed)
        for case in cases
    ]
    outcomes = make(engine, config, jobs, None if on_step is None else lambda: on_step(rung + 1, len(LADDER)))
    students = engine.classifier.module
    for case, outcome in zip(cases, outcomes, strict=True):
        case.seconds += outcome.seconds
        if outcome.image is None:
            if not case.candidates:
                case.error = outcome.error
            continue
        saved = as_saved(outcome.image)
        with torch.no_grad():
            given = saved[None].to(engine.device)
            seen = torch.softmax(students(given), 1)[0].cpu()
            doubt = students.doubtful(given)[0].cpu() if isinstance(students, Students) else seen
        case.candidates.append(Candidate(rung, outcome, saved, seen, float(doubt[case.target])))


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
    outcomes = [found[id] for id in ids]
    for outcome, job in zip(outcomes, jobs, strict=True):
        if outcome.image is not None:
            outcome.image = outcome.image.clamp(0, 1).to(job.image)
            if outcome.region is not None:
                outcome.region = outcome.region.to(job.image.device)
                outcome.image = compose(job.image, outcome.image, outcome.region)
    return outcomes


def _ask(engine: EngineCore, some: Sequence[tuple[Case, Candidate]]) -> None:
    if not some:
        return
    said = engine.probabilities(torch.stack([candidate.saved for _, candidate in some]))
    for (_, candidate), p in zip(some, said, strict=True):
        candidate.said = p


def _reason(engine: EngineCore, image: Tensor) -> str:
    said = "" if engine.box is None else engine.box.why(image)
    return f" ({said})" if said else ""


def _result(engine: EngineCore, case: Case, facts: dict[str, Any]) -> Counterfactual:
    best = case.best
    if case.error is None and best is None:
        asked = [c for c in case.candidates if c.said is not None]
        why = _reason(engine, asked[-1].saved) if asked else ""
        case.error = f"the classifier gives no answer for the counterfactual{why}"
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
