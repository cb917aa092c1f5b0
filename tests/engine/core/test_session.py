"""Samples one by one: the same bits as in a batch of as many slots, whenever they are submitted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.engine.config import Config
from counterlens.engine.core.result import Counterfactual
from counterlens.engine.core.session import Session
from counterlens.engine.engine import Engine
from counterlens.engine.errors import UsageError

NUMBERS = {
    "steps": 6, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
    "gradient": "detached", "spacing": "trailing",
}  # fmt: skip
CONFIGS = [Config(steps=2), Config(steps=5, solver="unipc", noise="inversion"), Config(steps=3, solver="dpm++")]


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def engine(tiny) -> Engine:
    made = Engine(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS})
    made.slots = (1, 4)
    return made


def finish(session: Session, before_tick: Callable[[int], None] = lambda tick: None) -> dict[int, Counterfactual]:
    out: dict[int, Counterfactual] = {}
    tick = 0
    while session.busy:
        before_tick(tick)
        out |= {one.id: one for one in session.tick()}
        tick += 1
        assert tick < 200
    return out


def facts(one: Counterfactual) -> dict[str, Any]:
    """All that a result says but the clock's part, with tensors and NaN as what compares by their bits."""
    said = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    said["provenance"] = {k: v for k, v in one.provenance.items() if k != "started"}
    said["kept_fraction"] = one.kept_fraction[one.kept_fraction.isfinite()]  # a batch has the longest schedule's length
    said |= {k: v.numpy().tobytes() for k, v in said.items() if isinstance(v, Tensor)}
    said |= {k: None for k, v in said.items() if isinstance(v, float) and math.isnan(v)}
    return {k: v for k, v in said.items() if k not in ("seconds", "id")}


def test_samples_submitted_at_any_tick_are_those_of_the_batch(engine: Engine) -> None:
    x = images(12)
    targets: list[str | int] = [["runner-up", 3, "5"][i % 3] for i in range(12)]
    said = engine.probabilities(x).argmax(1).tolist()
    targets[7] = said[7]  # is skipped
    configs = [CONFIGS[i % 3] for i in range(12)]
    batch = engine.counterfactual(x, targets, config=configs)
    assert [one.id for one in batch] == list(range(12))
    assert batch.status(7) == "skipped"
    with engine.session(CONFIGS[0], slots=3) as session:  # rounded up to 4
        place: dict[int, int] = {}

        def some_more(tick: int) -> None:
            for i in range(12)[(tick + 1) * 2 : (tick + 2) * 2]:
                place[session.submit(x[i], targets[i], config=configs[i])] = i

        some_more(-1)
        results = finish(session, some_more)
    assert sorted(place[id] for id in results) == list(range(12))
    for id, one in results.items():
        assert facts(one) == facts(batch[place[id]]), place[id]
        assert one.record().keys() == batch.record(place[id]).keys()


def test_what_cannot_start_ends_at_once_with_its_error(engine: Engine) -> None:
    x = images(4)
    sick = x[1].clone()
    sick[0, 0, 0] = torch.nan
    said = int(engine.probabilities(x[:1]).argmax())
    with engine.session() as session:
        ids = [session.submit(x[0], said), session.submit(sick), session.submit(x[2], "eleven"), session.submit(x[3])]
        first = {one.id: one for one in session.tick()}
        assert sorted(first) == ids[:3]
        assert [first[i].status for i in ids[:3]] == ["skipped", "failed", "failed"]
        assert "already the prediction" in str(first[ids[0]].error)
        assert "NaN" in str(first[ids[1]].error)
        assert str(first[ids[2]].error).startswith("target: 'eleven' is no label")
        assert torch.equal(first[ids[0]].image, x[0])
        assert math.isnan(first[ids[0]].l1)
        assert first[ids[2]].target == -1
        assert finish(session)[ids[3]].status == "done"


def test_a_sample_can_be_cancelled_wherever_it_is(engine: Engine) -> None:
    x = images(8)
    with engine.session(slots=4) as session:
        ids = [session.submit(one) for one in x]
        assert session.cancel(ids[6])  # not begun
        assert session.tick() == []
        assert session.cancel(ids[1])  # in a slot
        assert session.cancel(ids[7])  # waiting for one
        results = finish(session)
        assert sorted(results) == [i for n, i in enumerate(ids) if n not in (1, 6, 7)]
        assert not session.cancel(ids[0])
        assert not session.cancel(1000)
    for n, whole in enumerate(engine.counterfactual(x)):
        if ids[n] in results:
            assert torch.equal(results[ids[n]].image, whole.image)


def test_bad_samples_are_named_when_they_are_submitted(engine: Engine) -> None:
    x = images(1)[0]
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (x[:, :8], {}, "images"),
        (x * 2, {}, "images"),
        (x, {"budget_s": 0}, "budget_s"),
        (x, {"config": Config(gradient="exact")}, "gradient: samples in the same slots need the same one"),
        (x, {"config": Config(guidance_start=0.9, steps=2)}, "guidance_start: no step of 2"),
    ]
    with engine.session() as session:
        for image, more, name in bad:
            with pytest.raises(UsageError, match=f"^{name}"):
                session.submit(image, **more)
        assert not session.busy
        assert session.tick() == []
    with pytest.raises(UsageError, match=r"^slots: expected 1 or more"), engine.session(slots=-1):
        pass


def test_a_long_session_keeps_few_configs_and_says_the_facts_of_each(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("counterlens.engine.core.session.KNOWN", 2)
    asked = [(seed, budget) for seed in range(4) for budget in (None, 50.0, 60.0)]
    with engine.session(Config(steps=2), slots=1) as session:
        for seed, budget in asked:
            session.submit(images(1)[0], config=Config(steps=2, seed=seed), budget_s=budget)
        done = finish(session)
        assert len(session._settings) == len(session._facts) == 2
    said = [done[i].provenance for i in range(len(asked))]
    assert [(facts["seed"], facts["budget_s"]) for facts in said] == asked


def test_models_are_held_while_a_session_is_open(engine: Engine) -> None:
    module = engine.classifier.module.train()
    with engine.session() as session:
        session.submit(images(1)[0])
        assert not module.training
        finish(session)
    assert module.training
    module.eval()
