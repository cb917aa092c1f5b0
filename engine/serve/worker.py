"""One thread owns the models; callers submit one sample and get a ticket.

Samples whose settings share a graph share the slots of a lane; lanes take turns. The next tick belongs to the lane that
will be done with its oldest sample first, so that a fast request does not wait behind a long one; but a lane for which
others have worked `SHARE` times as long as one of its own ticks takes comes next, so that none starves.

A black box is asked in threads beside it, as many requests at once as its concurrency: whoever waits for its word is in
no slot, and holds up nobody who does not. Whoever leaves before their turn is not asked about.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..blackbox.box import as_box, no_gradient
from ..config import Config, StepOptions
from ..core.core import EngineCore
from ..core.regions import RegionLike
from ..core.result import Counterfactual
from ..core.session import Session
from ..core.targets import RELATIVE_TARGETS
from ..errors import CounterlensError, UsageError
from ..guidance.sampler import PATIENCE
from ..guidance.schedule import schedule_of
from ..surrogate.session import ConfirmingSession
from .beside import FAILURES, Beside, taken
from .refusals import Cancelled, Draining, Exhausted, Full, Late

T = TypeVar("T")
SHARE = 3.0
Group = tuple[StepOptions, torch.Size]  # the graph and the image's shape: samples that share both share a batch
LANES = 2  # of one graph that are busy at once
KEPT_LANES = 32  # with their graphs and slots; more only if all are busy
AHEAD = 3  # batches that a lane of all slots holds beside the one in them: inverted, encoded, or waiting for a pass
ASKING = 4  # times a box's concurrency: threads that ask it, some of them in a pause between two tries
PATIENCE_FULL = 8  # of a lane with more than a batch behind its slots: a decoder pass for few costs all of them more
SMOOTHING = 0.2  # weight of the newest tick in a lane's measured seconds a tick
KNOWN_TICK_S = 0.02  # before the first one was measured
LOOK_S = 0.1  # between two looks at the budgets of those who wait while all lanes wait for a black box
# How torch's allocator for the CPU, ONNX Runtime and C++ say that memory is full; CUDA has a class of its own.
NO_MEMORY = ("can't allocate memory", "not enough memory", "Failed to allocate memory", "bad_alloc", "out of memory")


@dataclass
class Ticket(Generic[T]):
    """A request in the worker's hands.

    Attributes:
        future: the result, or why there is none.
        step, total: guided steps that the sample has taken, and of how many; 0, 0 before the first.
        attempt: of a black box's surrogate, which try these steps are of, from 1; else 0.
        slots: how many samples its lane guides at once; 0 before it is in one.
        shares: of the latest preview: probability of the label that was predicted before, and of the target; None where
            they are not finite, and of a black box, which is not asked about steps.
        arrived, started, finished: `time.perf_counter` at arrival, when it got into a lane, and when it was done.
        first, last: when its first step began, and when the last one that was told ended; 0 without a step.
    """

    future: Future[T] = field(default_factory=taken)
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first: float = 0.0
    last: float = 0.0
    finished: float = 0.0
    step: int = 0
    total: int = 0
    attempt: int = 0
    slots: int = 0
    shares: tuple[float, float] | None = None
    cancelled: bool = False
    on_step: Callable[[Ticket[T], Tensor | None], None] | None = None
    preview: bool = False

    @property
    def stages(self) -> list[tuple[str, float, float]]:
        """What a finished one waited for, with start and end: queue, prepare, steps, decode (measuring included)."""
        times = [self.arrived, self.started, self.first, self.last, self.finished]
        if not self.first:  # it took no step
            times[2:4] = [self.finished, self.finished]
        return list(zip(("queue", "prepare", "steps", "decode"), times, times[1:], strict=False))


@dataclass
class _Request:
    ticket: Ticket[Counterfactual]
    image: Tensor  # [3, H, W]
    target: str | int
    seed: int | None
    config: Config
    graph: Group
    total: int  # ticks that it takes at least
    budget_s: float | None
    region: RegionLike | None

    def left(self, now: float) -> float:
        """Seconds of its budget."""
        return math.inf if self.budget_s is None else self.budget_s - (now - self.ticket.arrived)

    @property
    def late(self) -> Late:
        return Late(f"budget_s: {self.budget_s:g} s ended while it waited")


class _Lane:
    """The slots of one graph, and who is in them."""

    def __init__(self, session: Session, slots: int, ahead: int, asking: int) -> None:
        self.session, self.slots = session, slots
        # Requests, those that are prepared meanwhile or wait for a black box included.
        self.most = (1 + ahead) * slots + asking
        self.filling = True
        self.requests: dict[int, _Request] = {}
        self.tick_s = 0.0
        self.owed = 0.0  # seconds that other lanes worked since its last tick

    @property
    def ready(self) -> bool:
        """Whether a tick has something to do."""
        waits = isinstance(self.session, ConfirmingSession) and not self.session.ready
        return bool(self.requests) and not waits

    @property
    def takes(self) -> bool:
        """Whether it takes one more; once it was full it waits for room for a batch, to fill encoder and classifier."""
        held = len(self.requests)
        self.filling = held < self.most and (self.filling or held <= self.most - self.slots)
        return self.filling

    @property
    def left(self) -> float:
        """Seconds until its oldest sample is done, about."""
        oldest = next(iter(self.requests.values()))
        return (oldest.total - oldest.ticket.step) * (self.tick_s or KNOWN_TICK_S)


class Worker:
    """Owns an engine's models in a thread of its own.

    Args:
        engine: nobody else may use it while the worker lives.
        slots: samples that are guided at once in each lane: a number, whose results have the same bits whatever is
            beside them; `auto`: as many as wait when a lane is opened, one for a request that is alone. Half as many
            after each time that memory was full.
        max_queue: requests that may wait; one more is refused with `Full`.

    Raises:
        UsageError: the engine has no such slot count.
    """

    def __init__(self, engine: EngineCore, *, slots: int | str = "auto", max_queue: int = 64) -> None:
        if slots != "auto" and slots not in engine.slots:
            known = ", ".join(map(str, engine.slots))
            raise UsageError(f"slots: expected auto or one of {known}, got {slots}")
        if max_queue < 1:
            raise UsageError(f"max_queue: expected 1 or more, got {max_queue}")
        self.engine, self.slots, self.max_queue = engine, slots, max_queue
        self.box = engine.box or as_box(engine.classifier)
        self.largest = engine.slots[-1] if slots == "auto" else int(slots)
        self.draining = False
        self.ready = False
        self.failed = False  # the thread has ended, and nobody stopped it
        self.ticks = 0
        self.steps = 0  # samples stepped, all ticks together
        self.places = 0  # slots of those ticks
        self.rate = 0.0  # samples a second lately, 0 before the first
        self._waiting: deque[_Request] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lanes: list[tuple[Group, _Lane]] = []
        self._change = threading.Condition()
        asking = 0 if self.box is None else ASKING * self.box.source.concurrency
        self._beside = Beside(self._change, self._told, self._tell_thread, asking)
        self._stop = False
        self._held = 0  # see `holding`
        self._news = False  # something has happened since the thread last looked
        self._worked_s = 0.0  # in ticks
        self._finished: deque[float] = deque([0.0], maxlen=32)  # seconds worked when the latest results were delivered
        self._thread = threading.Thread(target=self._run, name="counterlens-worker", daemon=True)

    # For callers, from any thread

    def start(self, warm: Callable[[], None] = lambda: None) -> Future[None]:
        """Start the thread; `warm` runs in it before it is `ready`, and its error is the future's."""
        future: Future[None] = Future()
        self._calls.append((warm, future))
        self._thread.start()
        return future

    @property
    def waiting(self) -> int:
        """Requests that are in no slot yet: those in no lane, and those that a lane prepares meanwhile."""
        return len(self._waiting) + sum(max(0, len(lane.requests) - lane.slots) for _, lane in list(self._lanes))

    @property
    def busy_slots(self) -> int:
        """Requests in lanes."""
        return sum(len(lane.requests) for _, lane in self._lanes)

    @property
    def accepting(self) -> bool:
        """Whether requests are taken: after warm-up, and not while it is being stopped."""
        return self.ready and not self.draining

    def check_room(self) -> None:
        """Refuse before anything costs time: an upload that will not be taken need not be decoded.

        Raises:
            UsageError, Full, Draining: see `submit`.
        """
        self._check_guides()
        if self.draining:
            raise Draining("server: it is being stopped; ask another one")
        if (before := self.waiting) >= self.max_queue:
            raise Full(before, self._wait_for(1))

    def _check_guides(self) -> None:
        if (box := as_box(self.engine.classifier)) is not None:
            raise UsageError(f"classifier: {no_gradient(box.name)}; serve with --surrogate FOLDER then")

    @property
    def tick_s(self) -> float:
        """Seconds that a step of the slowest lane takes."""
        return max((lane.tick_s for _, lane in list(self._lanes)), default=0.0)

    def submit(
        self,
        image: Tensor,  # [3, H, W] in [0, 1]
        target: str | int = "runner-up",
        config: Config | None = None,
        *,
        seed: int | None = None,
        budget_s: float | None = None,
        region: RegionLike | None = None,
        on_step: Callable[[Ticket[Counterfactual], Tensor | None], None] | None = None,
        preview: bool = False,
    ) -> Ticket[Counterfactual]:
        """Ask for a counterfactual.

        Args:
            image, target, config, seed, region: see `core.session.Session.submit`.
            budget_s: seconds from now until the answer; what there is by then comes back.
            on_step: told after each of its steps, in the worker's thread; with `preview` also the clean estimate
                [3, H, W] in [0, 1], which costs a decoder pass and a prediction (`Ticket.shares`). It is the tiny
                decoder's where guidance goes through that one, else the full one's.

        Raises:
            UsageError: an argument does not fit, or the classifier can only be called. Full, Draining, Late: it is not
                taken.
        """
        self._check_guides()
        config = config or self.engine.config
        if budget_s is not None and not budget_s > 0:
            raise UsageError(f"budget_s: expected seconds above 0, got {budget_s:g}")
        settings = self.engine.settings(config)
        if target not in RELATIVE_TARGETS:
            self.engine.check_target(target)
        total = len(schedule_of(settings, self.engine.diffusion.alphas_cumprod))
        total *= 2 if settings.noise == "inversion" else 1
        ticket: Ticket[Counterfactual] = Ticket(on_step=on_step, preview=preview)
        request = _Request(ticket, image, target, seed, config, (settings.graph, image.shape), total, budget_s, region)
        with self._change:
            self.check_room()
            if budget_s is not None:
                self._check_budget(budget_s)
            self._waiting.append(request)
            self._tell_thread()
        return ticket

    def _check_budget(self, budget_s: float) -> None:
        """Refuse what cannot be there in time: by what waits, and by what is left of the samples in the slots."""
        held = [r.ticket for _, lane in list(self._lanes) for r in list(lane.requests.values())]
        before = len(self._waiting) + len(held)
        if not self.rate or (before < self.largest and not self._waiting):  # nothing is known, or a slot is free
            return
        left = len(self._waiting) + sum(1 - t.step / t.total if t.total else 1.0 for t in held)
        if (seconds := self._wait_for(left)) > budget_s:
            raise Late(
                f"budget_s: {before} requests are before this one; the answer takes about {seconds:.1f} s, and "
                f"{budget_s:g} s were given"
            )

    def call(self, run: Callable[[], T], *, held: bool = False) -> Future[T]:
        """Run something short that needs the models, between two ticks; `held`: within `holding`.

        Of a black box it is run beside the ticks: its answer takes as long as it takes.
        """
        future: Future[T] = Future()
        with self._change:
            if self._stop or (self.draining and not held):
                raise Draining("server: it is being stopped; ask another one")
            calls = self._calls if self.box is None else self._beside.calls
            if len(calls) >= self.max_queue:
                raise Full(len(calls), self._wait_for(1))
            if self.box is not None:
                return self._beside.run(run)
            self._calls.append((run, future))
            self._tell_thread()
        return future

    def _ask(self, image: Tensor) -> Future[Tensor]:
        """The box's probabilities of an image [3, H, W]; those that it has said wait behind nobody's."""

        def ask() -> Tensor:
            return self.engine.probabilities(image[None])[0]

        assert self.box is not None
        said: Future[Tensor] = Future()
        try:
            if not self.box.knows(image):
                return self._beside.part(ask)
            said.set_result(ask())
        except CounterlensError as error:
            said.set_exception(error)
        return said

    def _tell_thread(self) -> None:
        """It looks again; for those who hold `_change`."""
        self._news = True
        self._change.notify()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Whoever was taken may finish: within this, `stop` waits, and `held` calls are taken until its grace ends."""
        with self._change:
            self._held += 1
        try:
            yield
        finally:
            with self._change:
                self._held -= 1

    def cancel(self, ticket: Ticket[Any]) -> None:
        """Give its slot free at the next step's boundary; a result that is there stays."""
        with self._change:
            ticket.cancelled = True
            self._tell_thread()

    def stop(self, grace_s: float = 10.0) -> None:
        """Take nothing new, finish what there is within the grace period, fail the rest, and end the thread."""
        with self._change:
            self.draining = True
            self._tell_thread()
        end = time.perf_counter() + grace_s
        while (self.unfinished or self._held) and not self._stop and time.perf_counter() < end:
            time.sleep(0.01)
        self.hurry()
        self._thread.join(timeout=60)

    @property
    def unfinished(self) -> int:
        """Requests that were taken and have no result yet."""
        return len(self._waiting) + self.busy_slots + len(self._calls) + len(self._beside.calls)

    def hurry(self) -> None:
        """End the grace period: what is not done fails as soon as the step that is being taken ends."""
        with self._change:
            self.draining = self._stop = True
            self._tell_thread()

    def _wait_for(self, count: float) -> float:
        """Seconds until so many requests are done, as measured lately."""
        return max(1.0, count) / self.rate if self.rate else 1.0

    # The thread

    def _run(self) -> None:
        try:
            with self.engine.frozen() if as_box(self.engine.classifier) is None else nullcontext():
                while True:
                    with self._change:
                        while not (self._stop or self._news or self._calls or self._lanes_ready()):
                            if not self._change.wait(LOOK_S if self._waiting else None):
                                break
                        self._news = False
                        if self._stop:
                            break
                    self._run_calls()
                    self.ready = True
                    self._drop_cancelled()
                    self._fill()
                    self._tick()
        finally:  # whatever ended it: nobody waits for ever, and health checks see it
            with self._change:
                self.failed = not self._stop
                self.draining = self._stop = True
            self._fail_rest(Draining("server: it was stopped before this was done"))

    def _lanes_ready(self) -> bool:
        return any(lane.ready for _, lane in self._lanes)

    def _run_calls(self) -> None:
        """Those that wait; samples' next tick waits no longer for them than for other lanes, but for the last one."""
        end = time.perf_counter() + SHARE * (self.tick_s or KNOWN_TICK_S)
        for _ in range(len(self._calls)):
            self._call(*self._calls.popleft())
            if time.perf_counter() > end and (self._waiting or self._lanes_ready()):
                break

    def _call(self, run: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = run()
        except FAILURES as error:
            future.set_exception(self._told(error))
        except BaseException as error:
            future.set_exception(error)
            raise
        else:
            future.set_result(result)

    def _drop_cancelled(self) -> None:
        gone, now = Cancelled("request: cancelled"), time.perf_counter()
        with self._change:
            for request in [r for r in self._waiting if r.ticket.cancelled or r.left(now) <= 0]:
                self._waiting.remove(request)
                request.ticket.future.set_exception(gone if request.ticket.cancelled else request.late)
        for _, lane in self._lanes:
            for id in [id for id, r in lane.requests.items() if r.ticket.cancelled]:
                lane.session.cancel(id)
                lane.requests.pop(id).ticket.future.set_exception(gone)

    def _fill(self) -> None:
        """Move requests into lanes, oldest first."""
        with self._change:
            waiting = list(self._waiting)
        for request in list(waiting):
            lane = self._lane_for(request, waiting)
            if lane is None:
                continue
            waiting.remove(request)
            self._enter(request, lane)
            with self._change:  # afterwards: at every moment it is somewhere
                self._waiting.remove(request)

    def _lane_for(self, request: _Request, waiting: list[_Request]) -> _Lane | None:
        """A lane with a free slot; else the widest, which prepares newcomers while others run; else a second one."""
        mine = [lane for graph, lane in self._lanes if graph == request.graph]
        busy = [lane for lane in mine if lane.requests]
        for lane in busy:
            if len(lane.requests) < lane.slots or (lane.slots >= self.largest and lane.takes):
                return lane
        if len(busy) == LANES or (busy and self.slots != "auto"):
            takes = (lane for lane in busy if lane.takes)
            return min(takes, key=lambda lane: len(lane.requests) / lane.slots, default=None)
        count = sum(r.graph == request.graph for r in waiting)
        slots = min(self.engine.slots_for(count), self.largest) if self.slots == "auto" else self.largest
        for lane in mine:
            if lane.slots == slots and not lane.requests:
                return lane
        if len(self._lanes) >= KEPT_LANES:  # images may have any size: of lanes that nobody is in the oldest goes
            idle = [one for one in self._lanes if not one[1].requests]
            self._lanes = [one for one in self._lanes if not idle or one is not idle[0]]
        ahead = AHEAD if slots == self.largest else 1
        lane = _Lane(self._session(request.config, slots), slots, ahead, self._beside.most)
        self._lanes.append((request.graph, lane))
        return lane

    def _session(self, config: Config, slots: int) -> Session:
        if self.engine.box is None:
            return Session(self.engine, config, slots)
        return ConfirmingSession(self.engine, config, slots, self.engine.queries_each - 1, self._ask)

    def _enter(self, request: _Request, lane: _Lane) -> None:
        ticket, now = request.ticket, time.perf_counter()
        left = None if request.budget_s is None else request.left(now)
        try:
            if left is not None and left <= 0:
                raise request.late
            id = lane.session.submit(request.image, request.target, request.seed, request.config, left, request.region)
        except CounterlensError as error:
            ticket.future.set_exception(error)
            return
        ticket.started, ticket.slots = now, lane.slots
        lane.requests[id] = request

    def _tick(self) -> None:
        busy = [lane for _, lane in self._lanes if lane.ready]
        if not busy:
            return
        self._news = True  # there may be room for those who wait
        starved = [lane for lane in busy if lane.owed > SHARE * lane.tick_s]
        chosen = max(starved, key=lambda lane: lane.owed) if starved else min(busy, key=lambda lane: lane.left)
        chosen.session.patience = PATIENCE if len(chosen.requests) <= 2 * chosen.slots else PATIENCE_FULL
        started = time.perf_counter()
        try:
            done = chosen.session.tick()
            spent = time.perf_counter() - started
            self._tell(chosen, started)
        except FAILURES as error:
            self._broken(chosen, error)
            return
        if not isinstance(chosen.session, ConfirmingSession) or chosen.session.stepped:  # else the box was heard alone
            chosen.tick_s = spent if not chosen.tick_s else (1 - SMOOTHING) * chosen.tick_s + SMOOTHING * spent
        chosen.owed = 0.0
        self._worked_s += spent
        for lane in busy:
            if lane is not chosen:
                lane.owed += spent
        for result in done:
            self._deliver(chosen.requests.pop(result.id), result)
        if isinstance(chosen.session, ConfirmingSession):
            while chosen.session.failed:
                id, said = chosen.session.failed.popitem()
                chosen.requests.pop(id).ticket.future.set_exception(said)

    def _tell(self, lane: _Lane, began: float) -> None:
        """Progress of the samples that took a step in this tick, which began then."""
        stepped = lane.session.stepped
        if stepped:
            self.ticks += 1
            self.steps += len(stepped)
            self.places += lane.slots
        wanted = [id for id in stepped if id in lane.requests and lane.requests[id].ticket.preview]
        tiny = self.engine.guidance_decoder if lane.session.graph.guidance_decoder == "tiny" else None
        previews = lane.session.previews(wanted, tiny.decode if tiny else None) if wanted else {}
        if previews and self.box is None:
            seen = self.engine.probabilities(torch.stack([*previews.values()]), (lane.slots,))
            for id, p in zip(previews, seen, strict=True):
                one, other = p[[*lane.session.labels_of(id)]].tolist()
                lane.requests[id].ticket.shares = (one, other) if math.isfinite(one + other) else None
        for id, (step, total) in stepped.items():
            request = lane.requests.get(id)
            if request is None:
                continue
            ticket = request.ticket
            ticket.step, ticket.total = step, total
            if isinstance(lane.session, ConfirmingSession):
                ticket.attempt = lane.session.attempt(id)
            ticket.first, ticket.last = ticket.first or began, time.perf_counter()
            if ticket.on_step is not None:
                ticket.on_step(ticket, previews.get(id))

    def _deliver(self, request: _Request, result: Counterfactual) -> None:
        request.ticket.finished = time.perf_counter()
        self._finished.append(self._worked_s)
        self.rate = (len(self._finished) - 1) / max(self._worked_s - self._finished[0], 1e-6)
        request.ticket.future.set_result(result)

    def _broken(self, lane: _Lane, error: Exception) -> None:
        """A model raised: the samples of this lane fail, the others go on; without memory lanes become narrower."""
        said = self._told(error)
        self._lanes = [(graph, other) for graph, other in self._lanes if other is not lane]
        if isinstance(said, Exhausted) and lane.slots <= self.largest:
            self.largest = max(1, lane.slots // 2)
            self._lanes = [(graph, o) for graph, o in self._lanes if o.slots <= self.largest or o.requests]
        for request in lane.requests.values():
            request.ticket.future.set_exception(said)

    def _told(self, error: Exception) -> CounterlensError:
        """What callers hear of what a model raised."""
        if isinstance(error, CounterlensError):
            return error
        cuda = isinstance(error, torch.OutOfMemoryError)
        if cuda or isinstance(error, MemoryError) or any(said in str(error) for said in NO_MEMORY):
            if cuda:
                torch.cuda.empty_cache()
            return Exhausted("memory: it is full; fewer samples are worked on at once from now on, try again")
        return CounterlensError(f"model: {type(error).__name__}: {error}")

    def _fail_rest(self, error: CounterlensError) -> None:
        with self._change:
            waiting, calls = list(self._waiting), list(self._calls)
            self._waiting.clear()
            self._calls.clear()
        self._beside.fail(error)
        if self.box is not None:
            self.box.stop()
        held = [r for _, lane in self._lanes for r in lane.requests.values()]
        for request in (*waiting, *held):
            if not request.ticket.future.done():
                request.ticket.future.set_exception(error)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._lanes = []
