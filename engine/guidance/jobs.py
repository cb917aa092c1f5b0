"""What a sampler is given and gives back, and how many steps and ticks that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import Settings, StepOptions
from ..errors import UsageError
from ..showing import one_line
from .region import Held, Region, compose
from .schedule import Schedule


@dataclass(frozen=True)
class Job:
    """One sample to be made.

    Attributes:
        image: [3, H, W] in [0, 1].
        target: label index of the classifier.
        seed: of the sample's noise.
        settings: its numbers; those that decide the step's graph must be the sampler's.
        budget_s: seconds from the moment that the sample is first worked on, after which what there is comes back.
        region: where alone it may change, see `guidance.region`; [H, W] bool or `auto`, anywhere without it.
        renewed: share in [0, 1] of its own noise in the noise that an inversion found, see `renew`.
    """

    image: Tensor
    target: int
    seed: int
    settings: Settings
    budget_s: float | None = None
    region: Region | None = None
    renewed: float = 0.0


@dataclass
class Outcome:
    """What became of a job.

    Attributes:
        id: as `submit` gave it.
        z: final latents [C, h, w]; the last guided clean estimate where the budget ended the run; None with an error.
        image: z decoded, [3, H, W] nominally in [0, 1], not clamped, before `finished`; None with an error.
        kept: for each step taken, the share of locations that the filter kept; NaN where the step was not guided.
        total: how many steps the schedule has.
        complete: the whole schedule was run.
        seconds: time of every batched operation that the sample took part in, divided by the samples in it.
        error: why there is no image.
        region: where it could change, [H, W] bool; None: anywhere.
    """

    id: int
    z: Tensor | None
    image: Tensor | None
    kept: list[float]
    total: int
    complete: bool
    seconds: float
    error: str | None = None
    region: Tensor | None = None

    __repr__ = one_line


def finished(
    outcome: Outcome,
    image: Tensor,  # [3, H, W] in [0, 1], the job's
) -> Outcome:
    """The outcome with what was made clamped to [0, 1] and laid into its region, where the job's image is."""
    if outcome.image is not None:
        outcome.image = outcome.image.clamp(0, 1).to(image)
        if outcome.region is not None:
            outcome.region = outcome.region.to(image.device)
            outcome.image = compose(image, outcome.image, outcome.region)
    return outcome


@dataclass
class Sample:
    id: int
    job: Job
    schedule: Schedule
    table: Tensor  # [steps, 8], see `solvers.coefficients`
    guided: list[bool]  # for each step
    reused: list[tuple[str, ...]]  # of each step, what it takes from an earlier one, see `StepOptions.reuses`
    latents: Tensor = field(default_factory=lambda: torch.empty(0))  # of the image [C, h, w]
    z: Tensor = field(default_factory=lambda: torch.empty(0))  # between the stages, [C, h, w]
    kept: list[float] = field(default_factory=list)
    region: Held | None = None
    inverted: int = 0  # inversion steps taken
    started: float = 0.0
    seconds: float = 0.0
    complete: bool = True
    finished: int = 0  # the tick of its last step

    def outcome(self, error: str | None = None) -> Outcome:
        total = len(self.schedule)
        done = self.complete and error is None
        return Outcome(self.id, None, None, self.kept, total, done, self.seconds, error)


def seeded_noise(shape: tuple[int, int, int], seeds: list[int], like: Tensor) -> Tensor:
    """Noise [B, *shape] from each sample's own seed, drawn on the CPU in float32 on every device."""
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    return noise.to(like)


def check_graph(settings: Settings, graph: StepOptions) -> None:
    """Refuse settings that need another step.

    Raises:
        UsageError: names what differs.
    """
    if names := [name for name, value in settings.graph if value != getattr(graph, name)]:
        raise UsageError(f"{names[0]}: samples in the same slots need the same one; run them apart")


def guided_steps(settings: Settings, steps: int) -> list[bool]:
    """Which of the steps ask the classifier: those in the interval, and of these every n-th.

    Raises:
        UsageError: none would.
    """
    first, last = settings.guidance_start, settings.guidance_end
    inside = [i for i in range(steps) if first <= i / steps < last]
    if not inside:
        raise UsageError(f"guidance_start: no step of {steps} lies in [{first:g}, {last:g}) of the run; widen it")
    return [i in inside and (i - inside[0]) % settings.guidance_every == 0 for i in range(steps)]


def reused_kinds(settings: Settings, guided: Sequence[bool]) -> list[tuple[str, ...]]:
    """What each step takes from an earlier one: all but every n-th of the guided ones, the first is always anew."""
    every = {"features": settings.reuse_features, "gradients": settings.reuse_gradients}
    first = guided.index(True)
    return [tuple(kind for kind, n in every.items() if asked and (i - first) % n) for i, asked in enumerate(guided)]


def count_ticks(steps: Sequence[int], slots: int) -> int:
    """How many ticks a sampler needs for jobs of so many steps, if none ends early."""
    free = [0] * slots  # the tick at which each slot is free
    for n in steps:
        slot = min(range(slots), key=lambda i: free[i])
        free[slot] += n
    return max(free)
