"""One thread owns the models: samples of many callers, in shared slots, with the bits that they have alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from counterlens.engine.config import Config
from counterlens.engine.core.core import EngineCore
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.models.tiny import LatentResolutionDecoder, TinyDecoder
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.sizing import check_slots, fit, free_bytes
from counterlens.engine.serve.wire import problem_of
from counterlens.engine.serve.worker import Cancelled, Draining, Exhausted, Full, Late, Ticket, Worker

NUMBERS = {
    "steps": 6, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
    "gradient": "detached", "spacing": "trailing",
}  # fmt: skip
QUICK, LONG = Config(steps=2, noise="inversion"), Config(steps=40, gradient="exact")
ENDLESS = Config(steps=240, gradient="exact")  # for what is ended before, on a busy machine too


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@contextmanager
def working(engine: EngineCore, **options: Any) -> Iterator[Worker]:
    """A worker that is stopped whatever happens: it holds the models that other tests use."""
    made = Worker(engine, **options)
    made.start()
    try:
        yield made
    finally:
        made.stop(grace_s=5)


@pytest.fixture
def worker(engine: EngineCore) -> Iterator[Worker]:
    with working(engine, slots=2, max_queue=8) as made:
        yield made


def in_that_moment(future: Future[Any], look: Callable[[], Any]) -> Future[Any]:
    """What `look` gives in the moment that a future has its answer, whenever this thread hears of it."""
    seen: Future[Any] = Future()
    future.add_done_callback(lambda _: seen.set_result(look()))
    return seen


class Gate:
    """Holds the worker between two ticks until it is opened."""

    def __init__(self, worker: Worker) -> None:
        self.held, self.open = threading.Event(), threading.Event()

        def hold() -> None:
            self.held.set()
            assert self.open.wait(20)

        worker.call(hold)
        assert self.held.wait(20)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()


def other(engine: EngineCore, image: Tensor, offset: int = 1) -> int:
    """A label that is not the prediction."""
    return int((engine.probabilities(image[None]).argmax() + offset) % len(engine.labels))


def test_results_are_those_of_the_engine_on_as_many_slots(engine: EngineCore) -> None:
    shown = images(5)
    configs = [Config(), QUICK, Config(steps=3, class_scale=1.0), Config(), QUICK]
    with engine.session(slots=2) as session:
        expected: dict[int, Any] = {}
        for image, config in zip(shown, configs, strict=True):
            session.submit(image, config=config)
        while session.busy:
            expected |= {r.id: r for r in session.tick()}
    with working(engine, slots=2) as worker:
        tickets = [worker.submit(image, config=config) for image, config in zip(shown, configs, strict=True)]
        results = [ticket.future.result(timeout=60) for ticket in tickets]
    for i, result in enumerate(results):
        assert torch.equal(result.image, expected[i].image)
        assert result.record() | {"seconds": 0} == expected[i].record() | {"seconds": 0}
        assert tickets[i].slots == 2
        assert tickets[i].arrived <= tickets[i].started <= tickets[i].finished


def test_steps_are_told_with_pictures(worker: Worker) -> None:
    told: list[tuple[int, int, Any]] = []

    def on_step(ticket: Ticket[Any], preview: Tensor | None) -> None:
        told.append((ticket.step, ticket.total, None if preview is None else preview.shape))

    ticket = worker.submit(images(1)[0], on_step=on_step, preview=True)
    ticket.future.result(timeout=60)
    total = told[0][1]
    assert [step for step, *_ in told] == list(range(1, len(told) + 1))
    assert len(told) in (total, total - 1)  # the last step and the result may come together
    assert {shape for *_, shape in told} == {torch.Size([3, 16, 16])}


@pytest.mark.parametrize("through", ["full", "tiny"])
def test_previews_are_of_the_decoder_that_guidance_goes_through(tiny: Any, through: str) -> None:
    channels, side, _ = tiny[0].latent_shape
    decoder = TinyDecoder(LatentResolutionDecoder(channels, 8, 1, tiny[0].image_size // side), "small", channels)
    numbers = NUMBERS | {"guidance_decoder": through}
    both = EngineCore(
        *tiny, pack_settings={"realistic": numbers, "audit": numbers}, runtime="eager", guidance_decoder=decoder
    )
    expected: dict[int, Tensor] = {}
    with both.session(slots=2) as session:
        id = session.submit(images(1)[0])
        while session.busy:
            session.tick()
            if id in session.stepped:
                seen = session.previews([id], decoder.decode if through == "tiny" else None)
                expected[session.stepped[id][0]] = seen[id]
    told: dict[int, Tensor] = {}
    with working(both, slots=2) as worker:
        ticket = worker.submit(images(1)[0], on_step=lambda t, seen: told.update({t.step: seen}), preview=True)
        ticket.future.result(timeout=60)
    assert told.keys() == expected.keys()
    assert all(torch.equal(told[step], expected[step]) for step in told)


def test_a_quick_request_does_not_wait_behind_long_ones_and_they_do_not_starve(engine: EngineCore) -> None:
    """While quick ones keep coming, the long one goes on: others work `SHARE` of its ticks at most between two."""
    order: list[str] = []

    def note(name: str) -> Callable[[Ticket[Any], Tensor | None], None]:
        return lambda ticket, preview: order.append(name)

    with working(engine, slots=1, max_queue=64) as worker:
        with Gate(worker):
            long = worker.submit(images(1)[0], config=LONG, on_step=note("long"))
        while not order:
            time.sleep(0.001)
        quick = [worker.submit(x, config=QUICK, on_step=note("quick")) for x in images(30)]
        quick[0].future.result(timeout=60)
        assert order.index("quick") - 1 <= 4  # steps of the long one before the first quick step
        long.future.result(timeout=120)
    second = [i for i, name in enumerate(order) if name == "quick"][1]  # the first quick one's last, or later
    assert "long" in order[second:]
    between, run = [], 0
    for name in order[order.index("quick") :]:
        if name == "long":
            between.append(run)
            run = 0
        else:
            run += 1
    assert between
    assert max(between) <= 40  # of sixty quick steps that waited: a loaded machine stretches some


def test_the_queue_is_bounded_and_says_when_to_come_back(engine: EngineCore, worker: Worker) -> None:
    with Gate(worker):
        for image in images(8):
            worker.submit(image)
        with pytest.raises(Full, match="queue: 8 requests wait already; try again in ") as full:
            worker.submit(images(1)[0])
        assert full.value.retry_after > 0
        assert worker.waiting == 8


def test_cancelled_requests_leave_their_slots_to_others(engine: EngineCore, worker: Worker) -> None:
    gone = [worker.submit(x, config=ENDLESS) for x in images(4)]
    while gone[0].step == 0:
        time.sleep(0.001)
    for ticket in gone:
        worker.cancel(ticket)
    kept = worker.submit(images(1)[0])
    assert kept.future.result(timeout=60).status in ("done", "skipped")
    for ticket in gone:
        with pytest.raises(Cancelled):
            ticket.future.result(timeout=60)
    assert worker.busy_slots == 0


def test_budgets_count_from_arrival(engine: EngineCore, worker: Worker) -> None:
    with pytest.raises(UsageError, match="budget_s: expected seconds above 0"):
        worker.submit(images(1)[0], budget_s=0)
    with Gate(worker):
        late = worker.submit(images(1)[0], budget_s=0.05)
        time.sleep(0.1)
    with pytest.raises(Late, match="ended while it waited"):
        late.future.result(timeout=60)
    worker.submit(images(1)[0]).future.result(timeout=60)  # now a rate is known
    with Gate(worker):
        before = [worker.submit(x) for x in images(6)]
        with pytest.raises(Late, match="6 requests are before this one"):
            worker.submit(images(1)[0], budget_s=1e-4)
    for ticket in before:
        ticket.future.result(timeout=60)
    part = worker.submit(images(1)[0], other(engine, images(1)[0]), config=LONG, budget_s=2.0).future.result(timeout=60)
    assert part.error is None or "budget_s" in part.error


def test_what_does_not_fit_is_refused_at_once(worker: Worker) -> None:
    with pytest.raises(UsageError, match="'nobody' is no label"):
        worker.submit(images(1)[0], "nobody")
    with pytest.raises(UsageError, match="images: expected"):
        worker.submit(torch.rand(3, 8, 8)).future.result(timeout=60)
    with pytest.raises(UsageError, match="slots: expected auto or one of 1, 2, 4, 8, 16"):
        Worker(worker.engine, slots=3)
    with pytest.raises(UsageError, match="max_queue"):
        Worker(worker.engine, max_queue=0)


class Unlucky(Exception):
    """What some library's models raise."""


@pytest.mark.parametrize("raised", [RuntimeError, Unlucky])
def test_a_model_that_raises_fails_its_own_lane_only(tiny: Any, raised: type[Exception]) -> None:
    diffusion, classifier = tiny
    inner, bad = classifier.module, torch.zeros(1)

    class Sick(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bad.item():
                raise raised("the weights are gone")
            return inner(x)

    sick = EngineCore(diffusion, SoftmaxClassifier(Sick(), classifier.labels), runtime="eager",
                      pack_settings={"realistic": NUMBERS, "audit": NUMBERS})  # fmt: skip
    image = images(1)[0]
    with working(sick, slots=1) as worker:
        assert worker.submit(image).future.result(timeout=60).error is None
        bad.fill_(1)
        for asked in (worker.submit(image).future, worker.call(lambda: sick.probabilities(images(1)))):
            with pytest.raises(CounterlensError, match=f"model: {raised.__name__}: the weights are gone") as told:
                asked.result(timeout=60)
            assert problem_of(told.value).status == 422
        bad.fill_(0)
        assert worker.submit(image).future.result(timeout=60).error is None


def test_full_memory_fails_its_batch_and_halves_the_slots(tiny: Any) -> None:
    """What torch raises where it cannot allocate, from a classifier that takes two samples and no more."""
    diffusion, classifier = tiny
    inner, full = classifier.module, torch.zeros(1)

    class Big(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if full.item() and len(x) > 2:
                torch.empty(2**55)
            return inner(x)

    big = EngineCore(diffusion, SoftmaxClassifier(Big(), classifier.labels), runtime="eager",
                     pack_settings={"realistic": NUMBERS, "audit": NUMBERS})  # fmt: skip
    full.fill_(1)
    with working(big, slots=8) as worker:
        for left in (4, 2):
            with pytest.raises(Exhausted, match="memory: it is full"):
                worker.submit(images(1)[0]).future.result(timeout=60)
            assert worker.largest == left
        tickets = [worker.submit(x) for x in images(3)]
        assert all(t.future.result(timeout=60).error is None for t in tickets)
        assert {t.slots for t in tickets} == {2}


def test_slots_are_held_to_the_memory_that_is_free(tiny: Any, tmp_path: Path) -> None:
    settings = {"realistic": NUMBERS, "audit": NUMBERS}
    engine = EngineCore(*tiny, pack_settings=settings, runtime="eager")
    each = fit(engine, free=(10**12, "memory")).sample_bytes
    assert each > 100_000
    for room, slots in ((16, 16), (15, 8), (1, 1)):
        fresh = EngineCore(*tiny, pack_settings=settings, runtime="eager")
        measured = fit(fresh, free=(2 * room * each, "cgroup"))
        assert (measured.slots, fresh.slots[-1]) == (slots, slots)
    assert f"up to 1 samples at once: {each / 1e6:.0f} MB each" in str(measured)
    check_slots("auto", measured)
    check_slots(1, measured)
    with pytest.raises(UsageError, match=r"slots: 4 samples at once need .*; 1 fit"):
        check_slots("4", measured)
    with pytest.raises(CounterlensError, match="memory: a step of one sample needs"):
        fit(engine, free=(each, "memory"))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_bytes(engine.device, tmp_path) == (5_120_000, "memory")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert free_bytes(engine.device, tmp_path) == (5_120_000, "memory")
    (group / "memory.max").write_text("4000\n")
    assert free_bytes(engine.device, tmp_path) == (3000, "cgroup")


def test_what_runs_counts_in_what_a_budget_can_reach(engine: EngineCore) -> None:
    with working(engine, slots=1) as worker:
        worker.submit(images(1)[0]).future.result(timeout=60)  # now a rate is known
        worker.rate = 10.0
        running = worker.submit(images(1)[0], config=ENDLESS)
        while running.step == 0:
            time.sleep(0.001)
        with pytest.raises(Late, match="1 requests are before this one"):
            worker.submit(images(1)[0], budget_s=0.02)
        worker.cancel(running)


def test_stopping_finishes_what_runs_and_refuses_the_rest(engine: EngineCore) -> None:
    with working(engine, slots=1) as worker:
        running = worker.submit(images(1)[0])
        worker.stop(grace_s=30)
        assert running.future.result(timeout=1).status in ("done", "skipped")
        with pytest.raises(Draining):
            worker.submit(images(1)[0])
        with pytest.raises(Draining):
            worker.call(lambda: 1)
    with working(engine, slots=1) as hurried:
        long = hurried.submit(images(1)[0], config=ENDLESS)
        hurried.stop(grace_s=0)
    with pytest.raises(Draining, match="stopped before this was done"):
        long.future.result(timeout=1)


def test_a_drain_that_is_hurried_ends_after_the_step_that_is_taken(engine: EngineCore) -> None:
    with working(engine, slots=1) as worker:
        ticket = worker.submit(images(1)[0], config=ENDLESS)
        stopping = threading.Thread(target=worker.stop, args=(60,))
        stopping.start()
        while not ticket.step:
            time.sleep(0.001)
        assert worker.unfinished == 1
        began = time.perf_counter()
        worker.hurry()
        stopping.join(timeout=20)
        assert time.perf_counter() - began < 5
        with pytest.raises(Draining):
            ticket.future.result(timeout=1)


def test_whoever_was_taken_may_finish_while_it_is_stopped(engine: EngineCore) -> None:
    with working(engine, slots=1) as worker:
        with worker.holding():
            worker.submit(images(1)[0]).future.result(timeout=60)
            stopping = threading.Thread(target=worker.stop, args=(30,))
            stopping.start()
            while not worker.draining:
                time.sleep(0.001)
            time.sleep(0.05)
            assert worker.call(lambda: 3, held=True).result(timeout=10) == 3
        stopping.join(timeout=10)
        assert not stopping.is_alive()
        with pytest.raises(Draining):
            worker.call(lambda: 3, held=True)


def test_calls_do_not_starve_samples(engine: EngineCore) -> None:
    with working(engine, slots=1, max_queue=16) as worker:
        with Gate(worker):
            calls = [worker.call(lambda: time.sleep(0.03)) for _ in range(12)]
            sample = worker.submit(images(1)[0], config=QUICK)
        calls[-2].result(timeout=60)
        assert sample.step > 0 or sample.future.done()  # all of them came first
        sample.future.result(timeout=60)
        calls[-1].result(timeout=60)


def test_who_is_late_while_waiting_hears_of_it_at_once(engine: EngineCore) -> None:
    with working(engine, slots=1) as worker:
        with Gate(worker):
            before = [worker.submit(images(1)[0], other(engine, images(1)[0]), ENDLESS) for _ in range(4)]
            late = worker.submit(images(1)[0], config=LONG, budget_s=0.01)
            first_done = in_that_moment(late.future, before[0].future.done)
            time.sleep(0.02)
        with pytest.raises(Late, match="ended while it waited"):
            late.future.result(timeout=60)
        assert not first_done.result(timeout=60)
        for ticket in before:
            worker.cancel(ticket)


def test_few_lanes_are_kept(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterlens.engine.serve.worker.KEPT_LANES", 2)
    with working(engine, slots=1) as worker:
        for config in (QUICK, LONG, Config(filter="off"), Config(guidance_every=2)):
            worker.submit(images(1)[0], config=config).future.result(timeout=60)
        assert len(worker._lanes) == 2


def test_auto_takes_one_slot_for_one_and_more_for_many(engine: EngineCore) -> None:
    with working(engine, slots="auto") as worker:
        alone = worker.submit(images(1)[0])
        alone.future.result(timeout=60)
        with Gate(worker):
            many = [worker.submit(x) for x in images(7)]
        for ticket in many:
            ticket.future.result(timeout=60)
    assert alone.slots == 1
    assert {t.slots for t in many} == {8}


def test_calls_between_ticks_answer_or_raise(worker: Worker) -> None:
    assert worker.call(lambda: 3).result(timeout=60) == 3

    def broken() -> None:
        raise UsageError("method: none")

    with pytest.raises(UsageError, match="method: none"):
        worker.call(broken).result(timeout=60)

    def sick() -> None:
        raise RuntimeError("no such layer")

    with pytest.raises(CounterlensError, match="model: RuntimeError: no such layer"):
        worker.call(sick).result(timeout=60)
    with Gate(worker):
        unwanted = worker.call(sick)
        assert unwanted.cancel()
    assert worker.call(lambda: 4).result(timeout=60) == 4
    assert worker.ready


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_worker_that_has_ended(engine: EngineCore) -> None:
    class Odd(BaseException):
        """What no model is expected to raise."""

    def fail() -> None:
        raise Odd

    with working(engine, slots=1) as worker:
        with Gate(worker):
            asked, called = worker.call(fail), worker.call(lambda: 3)
            ticket = worker.submit(images(1)[0])
        for future, error in ((asked, Odd), (called, Draining), (ticket.future, Draining)):
            with pytest.raises(error):
                future.result(timeout=60)
        assert worker.draining
        assert worker.failed
        with pytest.raises(Draining):
            worker.submit(images(1)[0])
        with TestClient(make_app(engine, worker)) as client:
            assert client.get("/healthz").status_code == client.get("/v2/health/live").status_code == 503
