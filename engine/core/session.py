"""Counterfactuals one by one: each is submitted with its target, run in slots beside others, and measured when done."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import Config, Settings
from ..errors import UsageError
from ..guidance.jobs import Job, Outcome, check_graph, count_ticks, finished, guided_steps
from ..guidance.region import Region
from ..guidance.sampler import PATIENCE, Observer, Sampler
from ..guidance.schedule import schedule_of
from ..images.files import as_saved
from ..models.protocols import Diffusion
from ..runtime.registry import EAGER
from ..runtime.runners import REAL_IMAGES
from ..runtime.spec import SLOTS
from .answers import RENEWED, answer_seed
from .regions import RegionLike, check_region
from .result import ALREADY, Counterfactual, noise_seed
from .targets import RUNNERS_UP, TargetLabels
from .whole_runs import NAME, WholeSampler

KNOWN = 256  # configs of samples whose settings and facts are kept


class Models(Protocol):
    """What a session needs of `EngineCore`."""

    config: Config
    diffusion: Diffusion
    targets: TargetLabels

    def check_images(self, images: Tensor) -> None: ...
    def meet_images(self, images: Tensor) -> None: ...
    def settings(self, config: Config) -> Settings: ...
    def probabilities(self, images: Tensor, sizes: Sequence[int] | None = None) -> Tensor: ...
    def slots_for(self, batch: int, sides: tuple[int, int] | None = None) -> int: ...
    def slots_of(self, sides: tuple[int, int]) -> tuple[int, ...]: ...
    def is_own_size(self, sides: Sequence[int]) -> bool: ...
    def sampler(
        self, config: Config | None, slots: int, observe: Observer | None = None, sides: tuple[int, int] | None = None
    ) -> Sampler: ...
    def open_whole(self, settings: Settings, slots: int) -> WholeSampler | None: ...
    def facts(self, config: Config, batch: int = 1) -> dict[str, Any]: ...


@dataclass
class _Sample:
    id: int
    image: Tensor  # [3, H, W] in [0, 1]
    target: str | int
    seed: int
    config: Config
    settings: Settings
    steps: int
    budget_s: float | None
    region: Region | None
    k: int = 0
    source: int = -1
    wanted: int = -1
    error: str | None = None
    outcome: Outcome | None = None
    made: Tensor | None = None  # as image, not rounded to 8 bits


class Session:
    """Samples that come and go in one engine's slots; `EngineCore.session` opens one.

    To be used from one thread. An image stays where it is given, on the CPU, until its sample is in a slot.

    Args:
        models: of the engine.
        config: of samples that bring none. Those that do must agree with it on what decides the step's graph: filter,
            gradient, guidance_decoder, distance and whether guidance_every and what is reused are 1.
        slots: how many samples are guided at once, and the shape of every batch, predictions included: a sample's
            result then has the same bits whatever is beside it. Without it all that is submitted before the first tick
            is one batch: it takes the slots that it needs, and the results come together at the end.
        observe: see `EngineCore.counterfactual`; told the samples' ids.
        whole: the batch may run by a whole run's file, see `EngineCore.open_whole`.

    Attributes:
        patience: with `slots`, the ticks that a finished sample waits at most for others to be decoded with.
    """

    def __init__(
        self,
        models: Models,
        config: Config | None = None,
        slots: int | None = None,
        observe: Observer | None = None,
        whole: bool = False,
    ) -> None:
        self.models, self.config, self.slots, self.observe = models, config or models.config, slots, observe
        self.whole, self.patience = whole, PATIENCE
        self.graph = models.settings(self.config).graph
        self.sampler: Sampler | WholeSampler | None = None
        self.sides: tuple[int, int] | None = None  # height and width of its images, the first one's
        self.total = 0  # ticks that the first batch needs, if no sample ends early
        self._settings: dict[Config, tuple[Settings, int]] = {}  # with their steps
        self._facts: dict[Config, dict[str, Any]] = {}
        self._next_id = 0
        self._new: list[_Sample] = []
        self._running: dict[int, _Sample] = {}  # by the sampler's id
        self._done: list[_Sample] = []

    @property
    def busy(self) -> bool:
        """Whether any sample's result is still to come."""
        return bool(self._new or self._running or self._done)

    def submit(
        self,
        image: Tensor,  # [3, H, W] in [0, 1]
        target: str | int = "runner-up",
        seed: int | None = None,
        config: Config | None = None,
        budget_s: float | None = None,
        region: RegionLike | None = None,
        k: int = 0,
    ) -> int:
        """Add a sample and return its id; its result comes from a later `tick`.

        Args:
            image: [3, H, W] in [0, 1] at the model's image size.
            target: label index, label name, `runner-up`, `runners-up`, `opposite` or `neighbour`.
            seed: without it the image's own pixels and `config.seed` decide.
            config: instead of the session's.
            budget_s: seconds from the moment that it is first worked on, see `EngineCore.counterfactual`.
            region: where alone it may change, see there; `config.region` without it.
            k: which of the `config.count` counterfactuals of this image, from 0, see `core.answers`.

        Raises:
            UsageError: image, config, budget, region or k do not fit. A target that is no label, or is predicted
                already, is in the result's `error` instead.
        """
        config = config or self.config
        settings, steps = self._checked(config)
        if budget_s is not None and not budget_s > 0:
            raise UsageError(f"budget_s: expected seconds above 0, got {budget_s}")
        self.models.check_images(image[None])
        self._check_sides((image.shape[1], image.shape[2]))
        if not 0 <= k < config.count:
            raise UsageError(f"k: expected 0 to {config.count - 1}, of {config.count} (count), got {k}")
        seed = noise_seed(image, config) if seed is None else seed
        if target != RUNNERS_UP:
            seed = answer_seed(seed, k)
        found = check_region(config.region if region is None else region, image)
        sample = _Sample(self._next_id, image, target, seed, config, settings, steps, budget_s, found, k)
        self._next_id += 1
        self._new.append(sample)
        return sample.id

    def cancel(self, id: int) -> bool:
        """Drop a sample wherever it is and leave the others as they are; False if its result was given already."""
        for held in (self._new, self._done):
            for sample in held:
                if sample.id == id:
                    held.remove(sample)
                    return True
        for key, sample in self._running.items():
            if sample.id == id and self.sampler is not None:
                self.sampler.cancel(key)
                del self._running[key]
                return True
        return False

    def tick(self) -> list[Counterfactual]:
        """Let new samples in, take one step of all in the slots, and return the results of those that are done.

        What the models raise passes through and ends the session.
        """
        if self._new:
            self._begin()
        if self.sampler is not None:
            self.sampler.patience = self.patience
            for outcome in self.sampler.tick():
                sample = self._running.pop(outcome.id)
                sample.outcome, sample.error = outcome, outcome.error
                sample.made = finished(outcome, sample.image).image
                outcome.z = outcome.image = None  # of the device
                self._done.append(sample)
        if self.slots is None and self._running:
            return []
        done, self._done = sorted(self._done, key=lambda sample: sample.id), []
        return self._measure(done)

    @property
    def stepped(self) -> dict[int, tuple[int, int]]:
        """Of the samples that took a step in the last tick: how many they have taken, and of how many."""
        if self.sampler is None:
            return {}
        stepped = {id for _, id in self.sampler.stepped}
        return {self._running[id].id: at for id, at in self.sampler.progress.items() if id in stepped}

    def previews(self, ids: Collection[int], decode: Callable[[Tensor], Tensor] | None = None) -> dict[int, Tensor]:
        """Clean estimates [3, H, W] in [0, 1] of samples that took a step in the last tick, by id.

        Costs a decoder pass; `decode` is a cheaper one than the model's own.
        """
        if self.sampler is None:
            return {}
        rows = {self._running[id].id: slot for slot, id in self.sampler.stepped if id in self._running}
        wanted = [id for id in ids if id in rows]
        if not wanted:
            return {}
        with torch.no_grad():
            images = (decode or self.models.diffusion.decode)(self.sampler.z0[[rows[id] for id in wanted]])
        return dict(zip(wanted, ((images + 1) / 2).clamp(0, 1).cpu(), strict=True))

    def labels_of(self, id: int) -> tuple[int, int]:
        """The prediction and the target of a sample that takes steps."""
        sample = next(sample for sample in self._running.values() if sample.id == id)
        return sample.source, sample.wanted

    def _checked(self, config: Config) -> tuple[Settings, int]:
        """The settings of a config, which these slots can take, and how many steps they are."""
        if config not in self._settings:
            settings = self.models.settings(config)
            check_graph(settings, self.graph)
            steps = len(schedule_of(settings, self.models.diffusion.alphas_cumprod))
            guided_steps(settings, steps)
            _keep(self._settings, config, (settings, steps))
        return self._settings[config]

    def _check_sides(self, sides: tuple[int, int]) -> None:
        """Refuse an image of another size than the first: they cannot share a batch."""
        self.sides = self.sides or sides
        if sides != self.sides:
            height, width = self.sides
            raise UsageError(
                f"images: one of {sides[1]}x{sides[0]} among those of {width}x{height}; samples in the same slots need "
                "the same size; run them apart"
            )

    def _begin(self) -> None:
        """Predict the new samples, find their targets, and hand those that can start to the sampler."""
        new, self._new = self._new, []
        self.models.meet_images(torch.stack([sample.image for sample in new[:REAL_IMAGES]]))
        assert self.sides is not None
        size = self.slots or self.models.slots_of(self.sides)[-1]
        for start in range(0, len(new), size):
            self._predict(new[start : start + size])
        todo = [sample for sample in new if sample.error is None]
        self._done += [sample for sample in new if sample.error is not None]
        if todo and self.sampler is None:
            slots = self.slots or self.models.slots_for(len(todo), self.sides)
            self.sampler = self._whole_sampler(todo, slots)
            if self.sampler is None:
                self.sampler = self.models.sampler(self.config, slots, self._watch(), self.sides)
            self.sampler.live = self.slots is not None
            self.total = count_ticks([sample.steps for sample in todo], slots)
        for sample in todo:
            assert self.sampler is not None
            job = Job(
                sample.image, sample.wanted, sample.seed, sample.settings, sample.budget_s, sample.region,
                renewed=RENEWED if sample.k and sample.target != RUNNERS_UP else 0.0,
            )  # fmt: skip
            self._running[self.sampler.submit(job)] = sample

    def _whole_sampler(self, samples: Sequence[_Sample], slots: int) -> WholeSampler | None:
        """A whole run's file for a batch whose samples share their settings and end together."""
        settings = samples[0].settings
        alike = all(
            s.settings == settings and (s.budget_s, s.region, s.k) == (None, None, 0) and not s.config.match_official
            for s in samples
        )
        alike = alike and self.models.is_own_size(samples[0].image.shape[1:])
        return self.models.open_whole(settings, slots) if self.whole and alike else None

    def _predict(self, samples: Sequence[_Sample]) -> None:
        probabilities = self._probabilities(torch.stack([sample.image for sample in samples]))
        for sample, p in zip(samples, probabilities, strict=True):
            finite = bool(p.isfinite().all())
            sample.source = int(p.argmax()) if finite else -1
            try:
                sample.wanted = self.models.targets.resolve(sample.target, p, sample.k)
            except UsageError as error:
                sample.error = str(error)
                continue
            if sample.source == sample.wanted and not sample.config.match_official:
                sample.error = f"target {self.models.targets.labels[sample.wanted]!r} {ALREADY}"
            if not finite:
                sample.error = "the classifier gives NaN or infinity for the image"
            if not sample.image.isfinite().all():
                sample.error = "the image holds NaN or infinite values"

    def _probabilities(self, images: Tensor) -> Tensor:
        sides = (images.shape[2], images.shape[3])
        return self.models.probabilities(images, self.models.slots_of(sides) if self.slots is None else (self.slots,))

    def _watch(self) -> Observer | None:
        observe = self.observe
        if observe is None:
            return None

        def watch(ids: list[int], score: Tensor, reference: Tensor) -> None:
            observe([self._running[id].id for id in ids], score, reference)

        return watch

    def _measure(self, samples: Sequence[_Sample]) -> list[Counterfactual]:
        """What became of the samples; every measure is of the image as the saved 8-bit file holds it."""
        out: list[Counterfactual] = []
        size = self.slots or self.models.slots_for(len(samples), self.sides)
        for start in range(0, len(samples), size):
            some = samples[start : start + size]
            rows = [*some, *[some[0]] * (size - len(some))]  # always the same shape: the last bits depend on it
            before = torch.stack([sample.image for sample in rows])
            after = torch.stack([sample.image if sample.made is None else sample.made for sample in rows])
            saved = as_saved(after)
            difference = saved - before
            l1 = difference.abs().mean(dim=(1, 2, 3)).tolist()
            l2 = difference.square().mean(dim=(1, 2, 3)).sqrt().tolist()
            probabilities = self._probabilities(saved[: len(some)])
            out += [self._result(*row) for row in zip(some, probabilities, l1, l2, strict=False)]
        return out

    def _result(self, sample: _Sample, probabilities: Tensor, l1: float, l2: float) -> Counterfactual:
        kept = torch.full((sample.steps,), torch.nan)
        seconds, complete, outcome = math.nan, False, sample.outcome
        if outcome is not None:
            kept[: len(outcome.kept)] = torch.tensor(outcome.kept)
            seconds, complete = outcome.seconds, outcome.complete
        if sample.error is None and not probabilities.isfinite().all():
            sample.error, complete = "the classifier gives NaN or infinity for the counterfactual", False
        failed = sample.error is not None
        confidence, prediction = probabilities.max(dim=0)
        made = self._facts.get(sample.config)
        if made is None:
            slots = 1 if self.sampler is None else self.sampler.slots
            made = self.models.facts(sample.config, slots) | {"budget_s": None}
            made |= {"runtime": NAME} if isinstance(self.sampler, WholeSampler) else {}
            made |= {} if self.models.is_own_size(sample.image.shape[1:]) else {"runtime": EAGER}
            _keep(self._facts, sample.config, made)
        if sample.budget_s is not None:
            made = made | {"budget_s": sample.budget_s}
        return Counterfactual(
            id=sample.id,
            image=sample.image if sample.made is None else sample.made,
            input=sample.image,
            source=sample.source,
            target=sample.wanted,
            prediction=-1 if failed else int(prediction),
            confidence=math.nan if failed else confidence.item(),
            target_confidence=math.nan if failed else probabilities[sample.wanted].item(),
            flipped=not failed and int(prediction) == sample.wanted,
            l1=math.nan if failed else l1,
            l2=math.nan if failed else l2,
            kept_fraction=kept,
            seconds=seconds,
            complete=complete,
            seed=sample.seed,
            error=sample.error,
            labels=self.models.targets.labels,
            provenance=made,
            region=None if outcome is None or failed else outcome.region,
            sample=sample.id,
            k=sample.k,
        )


def _keep(known: dict[Config, Any], config: Config, value: Any) -> None:
    """Keep what is asked for again; the oldest makes room, because a session may last for weeks."""
    if len(known) >= KNOWN:
        del known[next(iter(known))]
    known[config] = value


def padded_batches(count: int, slots: Sequence[int] = SLOTS) -> list[tuple[list[int], int]]:
    """Rows of each batch, padded to a slot count with its first row, and how many of them are real."""
    batches = []
    for start in range(0, count, slots[-1]):
        rows = list(range(start, min(start + slots[-1], count)))
        size = next(s for s in slots if s >= len(rows))
        batches.append((rows + rows[:1] * (size - len(rows)), len(rows)))
    return batches
