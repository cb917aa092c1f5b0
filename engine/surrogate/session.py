"""Counterfactuals through a surrogate that come and go: a session whose samples the box judges meanwhile."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..blackbox.reading import NoAnswer
from ..core.result import Counterfactual
from ..core.session import KNOWN, Session
from ..errors import CounterlensError, UsageError
from ..guidance.jobs import Job, finished
from .confirming import Case, Pursuit, pursue, result_of

if TYPE_CHECKING:
    from ..config import Config
    from ..core.core import EngineCore
    from ..core.session import _Sample


@dataclass
class _Chase:
    """A sample, its case, and what leads it there."""

    sample: _Sample
    case: Case
    pursuit: Pursuit
    job: Job | None = None  # that is being made
    said: Future[Tensor] | None = None  # what the box will say
    attempt: int = 0


class ConfirmingSession(Session):
    """A `Session` through a surrogate: what the box does not confirm takes its slots again, as `confirming` tries it.

    Each sample's result is that of `confirming.counterfactual` on as many slots. The box is asked beside the ticks, and
    whoever waits for its word is in no slot.

    Args:
        engine, config, slots: see `Session`.
        asks: of the box, for one sample, its image aside.
        ask: has the box asked about an image [3, H, W], elsewhere: its probabilities [labels], or why there are none.

    Attributes:
        failed: samples that have no result since the last look, and why; whoever looks takes them out.
    """

    def __init__(
        self, engine: EngineCore, config: Config, slots: int, asks: int, ask: Callable[[Tensor], Future[Tensor]]
    ) -> None:
        super().__init__(engine, config, slots)
        self.engine, self.asks, self.ask = engine, asks, ask
        self.failed: dict[int, CounterlensError] = {}
        self._chases: dict[int, _Chase] = {}
        self._made_by = functools.lru_cache(KNOWN)(lambda config: engine.facts(config, slots) | {"budget_s": None})

    @property
    def busy(self) -> bool:
        """See `Session.busy`."""
        return bool(self._new or self._chases)

    @property
    def ready(self) -> bool:
        """Whether a tick has something to do; False while all wait for the box."""
        return bool(self._new or self._running) or any(c.said and c.said.done() for c in self._chases.values())

    def attempt(self, id: int) -> int:
        """Which try a sample is at, from 1; 0 before the first."""
        return self._chases[id].attempt

    def cancel(self, id: int) -> bool:
        """See `Session.cancel`."""
        chase = self._chases.pop(id, None)
        if chase is not None and chase.said is not None:
            chase.said.cancel()  # nothing is asked for it, if nothing is yet
        return super().cancel(id) or chase is not None

    def tick(self) -> list[Counterfactual]:
        """Go on with those whom the box has answered, take one step of all in the slots, and return what is done."""
        new, self._new = self._new, []
        done = [self._begin_one(sample) for sample in new]
        for chase in [*self._chases.values()]:
            if chase.said is not None and chase.said.done():
                done.append(self._heard(chase, chase.said))
        if self.sampler is not None:
            self.sampler.patience, self.sampler.stepped = self.patience, []
            for outcome in self.sampler.tick() if self._running else []:
                chase = self._chases[self._running.pop(outcome.id).id]
                assert chase.job is not None
                done.append(self._go_on(chase, finished(outcome, chase.job.image)))
        return [result for result in done if result is not None]

    def _begin_one(self, sample: _Sample) -> Counterfactual | None:
        case = Case(sample.id, sample.image, sample.region, sample.seed)
        if sample.budget_s is not None:
            case.deadline = time.perf_counter() + sample.budget_s
        self.engine.meet_images(sample.image[None])
        chase = _Chase(sample, case, pursue(self.engine, case, sample.target, sample.config, self.asks))
        self._chases[sample.id] = chase
        return self._go_on(chase, None)

    def _heard(self, chase: _Chase, said: Future[Tensor]) -> Counterfactual | None:
        chase.said = None
        try:
            p = said.result()
        except CounterlensError as error:  # nobody can be asked, or not any more
            self._fail(chase, error)
            return None
        return self._go_on(chase, p)

    def _go_on(self, chase: _Chase, reply: Any) -> Counterfactual | None:
        """Give a sample what it waits for, until it waits for something else; its result if it does not."""
        sample, case = chase.sample, chase.case
        try:
            want = chase.pursuit.send(reply)
        except StopIteration:
            if case.unanswered:
                self._fail(chase, NoAnswer(str(case.error)))
                return None
            del self._chases[sample.id]
            budget = {} if sample.budget_s is None else {"budget_s": sample.budget_s}
            return result_of(self.engine, case, self._made_by(sample.config) | budget)
        except UsageError as error:  # the target has no meaning for this image
            self._fail(chase, error)
            return None
        if not isinstance(want, Job):
            chase.said = self.ask(want)
            return None
        if self.sampler is None:
            assert self.slots is not None
            self.sampler = self.engine.sampler(self.config, self.slots, None, self.sides)
            self.sampler.live = True
        chase.job, chase.attempt = want, chase.attempt + 1
        self._running[self.sampler.submit(want)] = sample
        return None

    def _fail(self, chase: _Chase, error: CounterlensError) -> None:
        del self._chases[chase.sample.id]
        self.failed[chase.sample.id] = error
