"""A student of a black box: trained within its queries, gone on with, known again, and never the one that judges."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterlens.engine import Config, Engine
from counterlens.engine.blackbox.box import BlackBox, open_box, probes
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images.files import as_saved, save_png, to_uint8
from counterlens.engine.saliency.evaluation import evaluate
from counterlens.engine.saliency.explain import explain
from counterlens.engine.surrogate import confirming
from counterlens.engine.surrogate.confirming import Rung
from counterlens.engine.surrogate.rounds import Plan, Trainer, answered
from counterlens.engine.surrogate.surrogate import DESCRIPTION, WEIGHTS, Surrogate, open_surrogate
from tests.conftest import LABELS

PLAN = Plan(queries=60, rounds=2, members=2, width=8, steps=12, held=0.15)
SHORT = Plan(queries=60, rounds=1, members=1, width=8, steps=2, held=0.15)
CONFIG = Config(steps=4, strength=0.6, gradient="detached")
SEEN: list[bytes] = []  # every image that the box was sent, probes too


def brightness(images: np.ndarray) -> np.ndarray:
    """Ten labels by brightness, softly."""
    SEEN.extend(image.tobytes() for image in images)
    level = images.mean(axis=(1, 2, 3)) / 25.6
    scores = np.exp(-((level[:, None] - np.arange(10) - 0.5) ** 2))
    return scores / scores.sum(1, keepdims=True)


def darkness(images: np.ndarray) -> np.ndarray:
    return brightness(images)[:, ::-1]


def boxed(function: Callable[..., Any] = brightness, hard: bool = False) -> BlackBox:
    answer = (lambda images: function(images).argmax(1)) if hard else function
    return open_box(answer, LABELS, image_size=16)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    levels = torch.linspace(0.1, 0.9, 32)[:, None, None, None]
    return as_saved((levels + 0.1 * torch.rand(32, 3, 16, 16, generator=g)).clamp(0, 1))


@pytest.fixture(scope="module")
def engine(tiny: Any) -> Callable[[BlackBox], Engine]:
    return lambda box: Engine(tiny[0], box, CONFIG, runtime="eager")


@pytest.fixture(scope="module")
def trained(
    engine: Callable[[BlackBox], Engine], images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Surrogate, int]:
    """A surrogate, its folder, and what it asked."""
    box, folder = boxed(), tmp_path_factory.mktemp("surrogate")
    surrogate = engine(box).train_surrogate(images, folder, PLAN)
    return folder, surrogate, box.queries.asked


def test_it_asks_no_more_than_it_may_and_says_what_for(trained: tuple[Path, Surrogate, int]) -> None:
    _, surrogate, asked = trained
    assert sum(surrogate.training["queries"].values()) <= PLAN.queries
    assert asked <= PLAN.queries + 6  # the probes
    assert {"own", "generated", "counterfactuals", "blends", "held"} == set(surrogate.training["queries"])
    assert len(surrogate.training["rounds"]) == PLAN.rounds
    assert surrogate.training["agreement"]["pairs"] == 3
    assert len(surrogate.images) == len(surrogate.answers) == sum(surrogate.training["queries"].values()) - 9


def test_it_learns_what_the_box_says(trained: tuple[Path, Surrogate, int], images: torch.Tensor) -> None:
    box = boxed()
    with torch.no_grad():
        said, seen = box.logits(images).argmax(1), trained[1].classifier.logits(images).argmax(1)
    assert ((said - seen).abs() <= 2).float().mean() > 0.8  # a few dozen steps: near on the scale of brightness


def test_saved_and_opened_it_is_the_same(trained: tuple[Path, Surrogate, int], images: torch.Tensor) -> None:
    folder, surrogate, _ = trained
    again = open_surrogate(folder)
    assert torch.equal(again.classifier.logits(images), surrogate.classifier.logits(images))
    assert (again.training, again.box) == (surrogate.training, json.loads(json.dumps(surrogate.box)))
    again.check(boxed())


def test_a_box_that_changed_is_named(trained: tuple[Path, Surrogate, int], engine: Any) -> None:
    changed = open_box(darkness, LABELS, image_size=16)
    with pytest.raises(CounterlensError, match=r"is not what it was .* probe images have another answer"):
        engine(changed).with_surrogate(trained[0])


def test_a_file_that_changed_is_named(trained: tuple[Path, Surrogate, int], tmp_path: Path) -> None:
    for path in trained[0].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / WEIGHTS).write_bytes(b"x" + (tmp_path / WEIGHTS).read_bytes()[1:])
    with pytest.raises(CounterlensError, match=f"{WEIGHTS}: missing, or not the file"):
        open_surrogate(tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    with pytest.raises(UsageError, match="holds none"):
        open_surrogate(tmp_path)


class Killed(Exception):
    pass


def test_stopped_it_goes_on_and_asks_for_nothing_twice(
    trained: tuple[Path, Surrogate, int], engine: Any, images: torch.Tensor, tmp_path: Path
) -> None:
    def stop_at(name: str) -> Callable[..., None]:
        def told(stage: int, stages: int, now: str, trainer: Trainer) -> None:
            if now == name:
                raise Killed

        return told

    SEEN.clear()
    for name in ("generated", "round 1"):
        with pytest.raises(Killed):
            engine(boxed()).train_surrogate(images, tmp_path, PLAN, stop_at(name))
    surrogate = engine(boxed()).train_surrogate(images, tmp_path, PLAN)
    probes = 3 * 6
    assert len(SEEN) - probes <= PLAN.queries
    assert len(set(SEEN)) == len(SEEN) - probes + 4
    assert torch.equal(surrogate.classifier.logits(images), trained[1].classifier.logits(images))
    assert surrogate.training == trained[1].training


def test_stopped_within_a_stage_no_answer_is_asked_for_again(engine: Any, images: torch.Tensor, tmp_path: Path) -> None:
    sent: list[bytes] = []

    def slow(some: np.ndarray) -> np.ndarray:
        if len(sent) == 6 + 8:
            sent.append(b"")
            raise KeyboardInterrupt
        sent.extend(image.tobytes() for image in some)
        return brightness(some)

    for _ in range(2):
        box = open_box(slow, LABELS, image_size=16, batch=4)
        with suppress(KeyboardInterrupt):
            engine(box).train_surrogate(images, tmp_path, SHORT)
    asked = [image for image in sent if image not in {probe.tobytes() for probe in probes(16)}]
    assert b"" in asked
    assert len(asked) == len(set(asked))


def test_a_box_that_changed_meanwhile_is_named(engine: Any, images: torch.Tensor, tmp_path: Path) -> None:
    turned = False

    def moody(some: np.ndarray) -> np.ndarray:
        return darkness(some) if turned else brightness(some)

    def stop(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        engine(boxed(moody)).train_surrogate(images, tmp_path, PLAN, stop)
    turned = True
    with pytest.raises(CounterlensError, match="is not what it was when this training was stopped"):
        engine(boxed(moody)).train_surrogate(images, tmp_path, PLAN, stop)


def test_hidden_parts_and_many_rounds_stay_within_the_queries(engine: Any, images: torch.Tensor) -> None:
    plan = Plan(queries=40, hidden=0.6, rounds=8, members=1, width=8, steps=2)
    surrogate = engine(boxed()).train_surrogate(images, None, plan)
    assert sum(surrogate.training["queries"].values()) <= 40
    assert surrogate.training["queries"]["hidden"] == 24
    assert surrogate.training["queries"]["counterfactuals"] > 0


def test_another_plan_does_not_go_on(engine: Any, images: torch.Tensor, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        engine(boxed()).train_surrogate(images, tmp_path, PLAN, stop)
    with pytest.raises(UsageError, match="holds a training of another box, other images or another plan"):
        engine(boxed()).train_surrogate(images, tmp_path, Plan(queries=50), stop)


@pytest.mark.parametrize("hard", [False, True])
def test_the_box_judges_every_result(
    hard: bool, trained: tuple[Path, Surrogate, int], engine: Any, images: torch.Tensor
) -> None:
    box = boxed(hard=hard)
    surrogate = trained[1] if not hard else engine(box).train_surrogate(images, None, SHORT)
    before = box.queries.asked
    explained = engine(box).with_surrogate(surrogate, queries_each=3)
    made = explained.counterfactual(images[::8])
    said = torch.softmax(box.logits(as_saved(made.images)), 1)
    assert made.errors == [None] * 4
    assert torch.equal(made.prediction, said.argmax(1))
    assert torch.equal(made.flipped, made.prediction == made.target)
    assert torch.allclose(made.target_confidence, said.gather(1, made.target[:, None])[:, 0])
    assert torch.equal(made.source, box.logits(images[::8]).argmax(1))
    used = [student["queries"] for student in made.students]
    assert all(2 <= n <= 3 for n in used)
    assert box.queries.asked - before <= sum(used)
    assert all(
        n == 3 for n, flipped in zip(used, made.flipped, strict=True) if not flipped
    )  # tried as often as allowed
    record = made.record(0)
    assert {"student_prediction", "student_target_confidence", "attempt", "attempts", "queries"} <= record.keys()


def test_an_image_has_its_result_alone(trained: tuple[Path, Surrogate, int], engine: Any, images: torch.Tensor) -> None:
    explained = engine(boxed()).with_surrogate(trained[1])
    many = explained.counterfactual(images[:4])
    one = explained.counterfactual(images[3:4])
    assert (many.images[3] - one.images[0]).abs().max() < 1e-4
    assert many.seeds[3] == one.seeds[0]


def test_misuse_is_named(trained: tuple[Path, Surrogate, int], engine: Any, images: torch.Tensor, tiny: Any) -> None:
    with pytest.raises(UsageError, match="queries: expected 40 or more"):
        Plan(queries=3)
    with pytest.raises(UsageError, match="images: expected 8 or more"):
        engine(boxed()).train_surrogate(images[:3], None, PLAN)
    with pytest.raises(UsageError, match="queries_each: expected 2 or more"):
        engine(boxed()).with_surrogate(trained[1], queries_each=1)
    with pytest.raises(UsageError, match="this classifier guides by its own gradient"):
        Engine(*tiny, CONFIG).with_surrogate(trained[1])
    other = open_box(brightness, [f"no {label}" for label in LABELS], image_size=16)
    with pytest.raises(UsageError, match="its labels were"):
        trained[1].check(other)
    with pytest.raises(UsageError, match="trained on images of 16x16, these models take 32x32"):
        trained[1].check(open_box(brightness, LABELS, image_size=32))


def test_what_the_box_does_not_answer_is_left_out(engine: Any, images: torch.Tensor) -> None:
    def picky(some: np.ndarray) -> np.ndarray:
        if (some.mean(axis=(1, 2, 3)) > 200).any():
            raise ValueError("too bright")
        return brightness(some)

    box = boxed(picky)
    surrogate = engine(box).train_surrogate(images, None, SHORT)
    assert 0 < len(surrogate.images) < sum(surrogate.training["queries"].values()) - 9
    assert surrogate.answers.isfinite().all()
    explained = engine(box).with_surrogate(surrogate, queries_each=2)
    made = explained.counterfactual(images[[0, 31]])
    assert made.errors[0] is None
    assert "gives no answer for the image (raised ValueError: too bright)" in str(made.errors[1])
    alive = [True]

    def mortal(some: np.ndarray) -> np.ndarray:
        if not alive:
            raise RuntimeError("gone")
        return brightness(some)

    box = boxed(mortal)
    alive.clear()
    with pytest.raises(CounterlensError, match=r"answered none of \d+ images: raised RuntimeError: gone"):
        engine(box).train_surrogate(images, None, SHORT)


def test_what_the_box_does_not_answer_is_no_flip(
    trained: tuple[Path, Surrogate, int], engine: Any, tmp_path: Path
) -> None:
    known = {image.tobytes() for image in probes(16)}
    image = torch.full((1, 3, 16, 16), 0.5)
    known.add(to_uint8(image)[0].permute(1, 2, 0).numpy().tobytes())

    def shy(some: np.ndarray) -> np.ndarray:
        if any(one.tobytes() not in known for one in some):
            raise Killed("not this one")
        return brightness(some)

    box = boxed(shy)
    explained = engine(box).with_surrogate(trained[1], queries_each=3)
    made = explained.counterfactual(image, 0)
    assert "gives no answer for the counterfactual (raised Killed: not this one)" in str(made.errors[0])
    assert box.queries.failed == 2  # label 0 is not what no answer means
    save_png(image[0], tmp_path / "grey.png")
    with pytest.raises(CounterlensError, match=r"grey.png: the classifier gives no answer for the restored photo"):
        explained.restore(tmp_path / "grey.png", explained.read(tmp_path / "grey.png"), image[0] * 0.5)
    nothing = torch.zeros(3, 10).fill_(torch.nan)
    assert not answered(nothing, torch.tensor([0, 1, 2])).any()


def test_a_rung_that_fails_takes_nothing_away(
    trained: tuple[Path, Surrogate, int], engine: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirming, "LADDER", (Rung(), Rung(class_scale=float("nan")), Rung(0.1, 1.6)))
    made = engine(boxed()).with_surrogate(trained[1]).counterfactual(images[:1], 9)
    assert (made.errors, made.flipped.tolist()) == ([None], [False])
    assert (made.students[0]["attempts"], made.students[0]["queries"]) == (2, 3)


def test_an_image_without_numbers_says_so(trained: tuple[Path, Surrogate, int], engine: Any) -> None:
    made = engine(boxed()).with_surrogate(trained[1]).counterfactual(torch.full((1, 3, 16, 16), torch.nan))
    assert made.errors == ["the image holds NaN or infinite values"]


def test_methods_are_compared_on_the_box(trained: tuple[Path, Surrogate, int], images: torch.Tensor) -> None:
    box, shown, student = boxed(), images[::8], trained[1].classifier
    scored = evaluate(box, shown, ["gradxinput", "rise"], inside=student)
    labels = box.logits(shown).argmax(1)
    for name, seen in (("gradxinput", student), ("rise", box)):
        alone = explain(seen, shown, name, labels, forward=box, metrics=["main"])
        assert torch.equal(scored[name].scores, alone.scores)
        assert torch.equal(scored[name].target, labels)
        assert all(torch.equal(scored[name].values[metric], alone.values[metric]) for metric in alone.values)
