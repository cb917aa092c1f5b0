"""Samples that come and go in a fixed number of slots: the same bits as alone, whatever happens beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.jobs import Job, Outcome, count_ticks, guided_steps
from counterlens.engine.guidance.sampler import Sampler
from counterlens.engine.models.protocols import SoftmaxClassifier

NUMBERS = {
    "steps": 6, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
    "gradient": "detached", "spacing": "trailing",
}  # fmt: skip
# Different lengths, starts, solvers, scales and subsets of guided steps, all for one and the same step.
KINDS: list[dict[str, Any]] = [
    {"steps": 2},
    {"steps": 5, "solver": "unipc", "noise": "inversion"},
    {"steps": 3, "solver": "dpm++", "class_scale": 1.0},
    {"steps": 7, "strength": 0.3, "noise": "inversion", "angle": 90},
    {"steps": 4, "guidance_start": 0.5, "solver": "unipc"},
    {"steps": 8, "strength": 0.4, "spacing": "official", "noise": "inversion", "guidance_end": 0.7},
]


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[Engine]:
    made = Engine(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS})
    with made.frozen():
        yield made


def job(engine: Engine, number: int, **more: Any) -> Job:
    kind = KINDS[number % len(KINDS)]
    return Job(images(12)[number % 12], number % 10, number, engine.settings(Config(**(kind | more))))


def run(sampler: Sampler, jobs: list[Job], before_tick: Callable[[int], None] = lambda _: None) -> dict[int, Outcome]:
    """Outcomes by id; ids count from 0 in the order of the jobs."""
    for one in jobs:
        sampler.submit(one)
    out: dict[int, Outcome] = {}
    while sampler.busy:
        before_tick(sampler.ticks)
        out |= {o.id: o for o in sampler.tick()}
        assert sampler.ticks < 200
    return out


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Outcome]:
    """Every job by itself, in as many slots."""
    return [run(engine.sampler(slots=3), [job(engine, i)])[0] for i in range(12)]


def test_mixed_samples_equal_solo_runs(engine: Engine, alone: list[Outcome]) -> None:
    """Twelve samples of six kinds through three slots: bit for bit what each one gets alone."""
    sampler = engine.sampler(slots=3)
    together = run(sampler, [job(engine, i) for i in range(12)])
    assert sorted(together) == list(range(12))
    for i in range(12):
        assert together[i].error is None
        assert torch.equal(together[i].image, alone[i].image), i
        kept = [torch.tensor(outcomes[i].kept) for outcomes in (together, alone)]
        torch.testing.assert_close(*kept, equal_nan=True, rtol=0, atol=0)
    steps = [len(alone[i].kept) for i in range(12)]
    assert sampler.ticks == count_ticks(steps, 3) < sum(steps) / 3 + max(steps)


def test_slots_are_never_idle_while_jobs_wait(engine: Engine) -> None:
    sampler = engine.sampler(slots=2)
    for i in range(6):
        sampler.submit(job(engine, i))
    busy = []
    while sampler.busy:
        sampler.tick()
        busy.append(len(sampler.stepped))
    assert set(busy[:-7]) == {2}  # the last sample may be alone for as long as the longest one is


def test_the_step_sees_one_shape(tiny, engine: Engine) -> None:
    shapes = set()
    sampler = engine.sampler(slots=4)
    step = sampler.step

    def watched(*tensors: Tensor, **scales: Tensor) -> tuple[Tensor, ...]:
        shapes.add(tuple(tuple(t.shape) for t in (*tensors, *scales.values())))
        return step(*tensors, **scales)

    sampler.step = watched
    run(sampler, [job(engine, i) for i in range(6)])
    assert len(shapes) == 1


def test_cancelling_frees_the_slot_and_disturbs_nobody(engine: Engine, alone: list[Outcome]) -> None:
    """Cancelled while running, inverting, waiting, and twice."""
    sampler = engine.sampler(slots=3)
    cancelled: list[bool] = []

    def cancel(ticks: int) -> None:
        if ticks == 1:
            cancelled.extend(sampler.cancel(i) for i in (1, 3, 11, 11))

    together = run(sampler, [job(engine, i) for i in range(12)], cancel)
    assert cancelled == [True, True, True, False]
    assert sorted(together) == [0, 2, 4, 5, 6, 7, 8, 9, 10]
    for i, outcome in together.items():
        assert torch.equal(outcome.image, alone[i].image), i


def test_a_sick_sample_frees_its_slot(tiny, engine: Engine, alone: list[Outcome]) -> None:
    diffusion, classifier = tiny

    class Sick(SoftmaxClassifier):
        """NaN for one target."""

        def log_prob(self, image: Tensor, target: Tensor) -> Tensor:
            return super().log_prob(image, target) * torch.where(target == 4, torch.nan, 1.0)

    tuned = {"realistic": NUMBERS, "audit": NUMBERS}
    ill = Engine(diffusion, Sick(classifier.module, classifier.labels), pack_settings=tuned)
    together = run(ill.sampler(slots=3), [job(engine, i) for i in range(10)])
    assert together[4].error == "the model returned NaN or infinite values at step 3 of 4"  # the first guided one
    assert together[4].image is None
    for i in (0, 1, 2, 3, 5, 6, 7, 8, 9):
        assert torch.equal(together[i].image, alone[i].image), i


def test_an_unreadable_latent_is_an_error(tiny, engine: Engine) -> None:
    broken = Job(torch.full((3, 16, 16), torch.inf), 1, 0, job(engine, 0).settings)
    together = run(engine.sampler(slots=2), [broken, job(engine, 1)])
    assert "encoder" in str(together[0].error)
    assert together[1].error is None


def test_a_budget_returns_the_best_so_far(engine: Engine, alone: list[Outcome]) -> None:
    """A clock that moves one second with every tick, and a budget of three."""
    sampler = engine.sampler(slots=3)
    sampler.clock = lambda: float(sampler.ticks)
    jobs = [job(engine, i) for i in (1, 3, 4)]
    jobs[1] = Job(jobs[1].image, jobs[1].target, jobs[1].seed, jobs[1].settings, budget_s=3.5)
    estimates: dict[int, Tensor] = {}

    def remember(ticks: int) -> None:
        if ticks == 4:
            estimates[ticks] = sampler.z0[1].clone()

    together = run(sampler, jobs, remember)
    assert not together[1].complete
    assert len(together[1].kept) == 4
    assert together[1].total == 7
    assert together[1].error is None
    assert torch.equal(together[1].z, estimates[4])
    assert together[0].complete
    assert torch.equal(together[0].image, alone[1].image)
    assert torch.equal(together[2].image, alone[4].image)


def test_a_budget_that_ends_before_the_first_step(engine: Engine) -> None:
    one = job(engine, 1)
    hopeless = Job(one.image, one.target, one.seed, one.settings, budget_s=1e-9)
    outcome = run(engine.sampler(slots=2), [hopeless])[0]
    assert outcome.error == "budget_s: 1e-09 s ended before the first guided step"
    assert not outcome.complete


def test_settings_that_need_another_step_are_refused(engine: Engine) -> None:
    sampler = engine.sampler(slots=2)
    for field, value in (("filter", "off"), ("gradient", "exact"), ("distance", "latent"), ("guidance_every", 2)):
        with pytest.raises(UsageError, match=f"^{field}: samples in the same slots need the same one"):
            sampler.submit(job(engine, 0, **{field: value}))
    with pytest.raises(UsageError, match=r"^budget_s: expected seconds above 0"):
        sampler.submit(Job(images(1)[0], 0, 0, job(engine, 0).settings, budget_s=0))
    assert not sampler.busy


def test_engine_runs_mixed_configs_and_more_images_than_slots(engine: Engine) -> None:
    x = images(12)
    configs = [Config(**KINDS[i % 3]) for i in range(12)]
    engine.slots = (2, 4)
    try:
        seen: list[tuple[int, int]] = []
        together = engine.counterfactual(x, config=configs, on_step=lambda step, total: seen.append((step, total)))
        assert together.kept_fraction.shape == (12, 5)
        assert together.complete.all()
        total = count_ticks([(2, 5, 3)[i % 3] for i in range(12)], 4)
        assert seen == [(i + 1, total) for i in range(total)]
        for start in (0, 4, 8):
            part = slice(start, start + 4)
            again = engine.counterfactual(x[part], config=configs[part])
            assert torch.equal(again.images, together.images[part])
        assert together.kept_fraction.isfinite().sum(1).tolist() == [(2, 5, 3)[i % 3] for i in range(12)]
        with pytest.raises(UsageError, match=r"^config: expected 2, one per image, got 1"):
            engine.counterfactual(x[:2], config=configs[:1])
        with pytest.raises(UsageError, match=r"^gradient: samples in the same slots"):
            engine.counterfactual(x[:2], config=[Config(), Config(gradient="exact")])
        with pytest.raises(UsageError, match=r"^budget_s"):
            engine.counterfactual(x[:2], budget_s=-1)
        hopeless = engine.counterfactual(x[:2], config=Config(noise="inversion"), budget_s=1e-9)
        assert [str(e) for e in hopeless.errors] == ["budget_s: 1e-09 s ended before the first guided step"] * 2
        short = engine.counterfactual(x[:2], budget_s=1e-9)
        assert short.complete.tolist() == [False, False]
        assert short.errors == [None, None]
        assert short.record(0)["complete"] is False
    finally:
        engine.slots = (1, 2, 4, 8, 16)


def test_a_callback_that_raises_stops_its_call_only(engine: Engine) -> None:
    x = images(3)
    expected = engine.counterfactual(x).images

    def fail(step: int, total: int) -> None:
        raise KeyError("callback")

    with pytest.raises(KeyError):
        engine.counterfactual(x, on_step=fail)
    assert torch.equal(engine.counterfactual(x).images, expected)


def test_guided_steps() -> None:
    def of(steps: int, **fields: Any) -> list[int]:
        numbers = Config(**fields).settings({"realistic": NUMBERS})
        return [i for i, guided in enumerate(guided_steps(numbers, steps)) if guided]

    assert of(5) == [0, 1, 2, 3, 4]
    assert of(10, guidance_start=0.2, guidance_end=0.8) == [2, 3, 4, 5, 6, 7]
    assert of(10, guidance_start=0.2, guidance_end=0.8, guidance_every=3) == [2, 5]
    with pytest.raises(UsageError, match=r"guidance_start: no step of 2 lies in \[0\.6, 0\.9\)"):
        of(2, guidance_start=0.6, guidance_end=0.9)
    with pytest.raises(UsageError, match=r"guidance_start: 0\.5 is not before guidance_end 0\.5"):
        of(2, guidance_start=0.5, guidance_end=0.5)


def test_count_ticks_by_hand() -> None:
    assert count_ticks([3, 1, 1, 1], 2) == 3
    assert count_ticks([1, 1, 1, 5], 2) == 6
    assert count_ticks([4] * 5, 2) == 12


def test_live_slots_give_the_same_bits_and_keep_nobody_waiting(engine: Engine, alone: list[Outcome]) -> None:
    """A newcomer with an inversion of seven passes delays no step of the others, and the first to finish leaves."""
    sampler = engine.sampler(slots=3)
    sampler.live = True
    calls = 0
    inner = sampler.predict_noise

    def counted(*inputs: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return inner(*inputs)

    sampler.predict_noise = counted
    for i in range(12):
        sampler.submit(job(engine, i))
    out: dict[int, Outcome] = {}
    left: dict[int, int] = {}
    while sampler.busy:
        before = calls
        for outcome in sampler.tick():
            out[outcome.id] = outcome
            left[outcome.id] = sampler.ticks
        assert calls - before <= 2  # one pass of inversion, one of an unguided step
    assert sorted(out) == list(range(12))
    for i, outcome in out.items():
        assert torch.equal(outcome.z, alone[i].z)
        assert torch.equal(outcome.image, alone[i].image)
    sampler = engine.sampler(slots=3)
    patient = run_until_first(sampler, engine)
    assert min(left.values()) <= 4 < patient


def run_until_first(sampler: Sampler, engine: Engine) -> int:
    """The tick at which the first of twelve samples comes back."""
    for i in range(12):
        sampler.submit(job(engine, i))
    while not sampler.tick():
        assert sampler.ticks < 200
    return sampler.ticks
