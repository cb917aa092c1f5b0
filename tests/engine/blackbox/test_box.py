"""What can only be called stands where any classifier does: counted, cached, within its budget, and never trusted."""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterlens.engine.blackbox.answers import FILE, Answers, key_of
from counterlens.engine.blackbox.asking import BudgetSpent
from counterlens.engine.blackbox.box import BlackBox, Fingerprint, open_box, probes
from counterlens.engine.blackbox.reading import Unusable
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.protocols import probabilities
from counterlens.engine.packs import Pack
from counterlens.engine.saliency.explain import explain
from tests.engine.blackbox.conftest import LABELS


def dark(images: np.ndarray) -> np.ndarray:
    """How dark images are, and how light."""
    m = images.reshape(len(images), -1).mean(1) / 255
    return np.stack([1 - m, m], 1)


class Counted:
    """A function that says how often it was asked about each image."""

    def __init__(self, function: Any = dark) -> None:
        self.function, self.asked = function, Counter[bytes]()

    def __call__(self, images: np.ndarray) -> Any:
        self.asked.update(key_of(image) for image in images)
        return self.function(images)


def some(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def opened(function: Any = dark, labels: Any = ("dark", "light"), **options: Any) -> BlackBox:
    return open_box(function, labels, image_size=8, **options)


def test_an_image_is_asked_about_once_and_every_query_is_counted() -> None:
    asked = Counted()
    box, x = opened(asked), some(5)
    twice = np.concatenate([x, x[:2]])
    first = box.answer(twice)
    assert np.allclose(first, dark(twice), atol=1e-6)
    assert np.array_equal(box.answer(x), first[:5])
    of_images = [asked.asked[key_of(image)] for image in x]
    assert of_images == [1] * 5
    q = box.queries
    assert (q.asked, q.cached, q.retried, q.failed) == (6 + 5, 5, 0, 0)
    assert q.asked == sum(asked.asked.values())  # probes and all


def test_it_is_a_classifier_whose_images_are_rounded_to_8_bits() -> None:
    box, x = opened(), torch.from_numpy(some(6)).permute(0, 3, 1, 2).float() / 255
    assert torch.allclose(probabilities(box, x), torch.from_numpy(dark(some(6))).float(), atol=1e-6)
    asked = box.queries.asked
    assert torch.equal(box.logits(x), box.logits((x + 0.4 / 255).clamp(0, 1)))  # the same 8 bits
    assert box.queries.asked == asked
    x[2, 0, 0, 0] = torch.nan
    assert box.logits(x).isfinite().all(1).tolist() == [True, True, False, True, True, True]
    assert box.queries.asked == asked  # nobody is asked about what is no image
    target = torch.zeros(6, dtype=torch.long)
    assert torch.allclose(box.log_prob(x, target), box.logits(x)[:, 0], atol=1e-6, equal_nan=True)


def test_a_gradient_is_refused_and_the_way_named() -> None:
    box = opened()
    with pytest.raises(UsageError, match=r"can only be called.*counterlens surrogate train"):
        box.logits(torch.rand(1, 3, 8, 8, requires_grad=True))


def test_perturbation_methods_and_metrics_see_what_they_see_of_the_classifier_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("counterlens.engine.saliency.methods.RISE", (40, 8, 0.5))
    pack = Pack("digits")
    images, itself = pack.samples("test", count=1).images, pack.classifier("judge")

    @torch.no_grad()
    def function(pixels: np.ndarray) -> np.ndarray:
        return probabilities(itself, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).numpy()

    box = open_box(function, LABELS, image_size=32)
    for method in ("ablation", "rise"):
        mine, theirs = (explain(c, images, method, pack=pack) for c in (box, itself))
        # what is hidden in part is rounded to 8 bits on its way to a box
        assert (mine.saliency - theirs.saliency).abs().max() < 0.03
        assert torch.allclose(mine.msi.score, theirs.msi.score, atol=0.03)
    with pytest.raises(UsageError, match="ig is not for a black box"):
        explain(box, images, "ig")


def test_labels_alone_are_enough() -> None:
    names, places = ["dark", "light"], dark(some(9)).argmax(1)
    for function in (
        lambda x: [names[i] for i in dark(x).argmax(1)],
        lambda x: dark(x).argmax(1),
        lambda x: np.array(names)[dark(x).argmax(1)],
    ):
        box = opened(function)
        assert box.hard
        assert box.answer(some(9)).tolist() == np.eye(2)[places].tolist()
        assert torch.isfinite(box.logits(torch.rand(2, 3, 8, 8))).all()
    assert not opened().hard


def test_one_score_of_two_labels_and_scores_that_are_none() -> None:
    assert np.allclose(opened(lambda x: dark(x)[:, 1:]).answer(some(3)), dark(some(3)), atol=1e-6)
    logits = opened(lambda x: 10 * dark(x), output="logits").answer(some(3))
    assert np.allclose(logits, torch.softmax(torch.from_numpy(10 * dark(some(3))), 1), atol=1e-6)
    apart = opened(lambda x: np.stack([dark(x)[:, 0], dark(x)[:, 0]], 1), output="independent")
    assert apart.link == "sigmoid"
    x = torch.from_numpy(some(3)).permute(0, 3, 1, 2).float() / 255
    assert torch.allclose(probabilities(apart, x)[:, 1], torch.from_numpy(dark(some(3))[:, 0]).float(), atol=1e-5)


class VendorError(Exception):
    """As clients of vendors raise, of no family."""


BAD = {
    "sum to 1.1": lambda x: dark(x) * 1.1,
    "which are no probabilities.*--classifier-output": lambda x: dark(x) * 7 - 2,
    "NaN": lambda x: dark(x) * np.nan,
    r"\[3\] scores, there are 2 labels": lambda x: np.ones((len(x), 3)) / 3,
    "answers for 3 images, 4 were sent": lambda x: dark(x)[:-1] if len(x) > 1 else dark(x)[:0],
    "'grey' is no label": lambda x: ["grey"] * len(x),
    "raised ZeroDivisionError": lambda x: 1 // 0,
    "not with a list of": lambda x: None,
    "raised VendorError: quota": lambda x: (_ for _ in ()).throw(VendorError("quota")),
    "raised SystemExit: 2": lambda x: sys.exit(2),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_answer_is_said_when_it_is_opened(message: str) -> None:
    text = message.replace("answers for 3 images, 4 were sent", "answers for 0 images, 1 were sent")
    with pytest.raises(CounterlensError, match=text):
        opened(BAD[message])


def test_one_bad_image_takes_no_other_with_it() -> None:
    bad = key_of(some(20)[3])

    def function(images: np.ndarray) -> np.ndarray:
        if any(key_of(image) == bad for image in images):
            raise ValueError("cannot read this one")
        return dark(images)

    box = opened(function)
    rows = box.answer(some(20))
    assert np.isnan(rows).all(1).nonzero()[0].tolist() == [3]
    assert np.allclose(np.delete(rows, 3, 0), np.delete(dark(some(20)), 3, 0), atol=1e-6)
    image = torch.from_numpy(some(20)[3]).permute(2, 0, 1) / 255
    assert "cannot read this one" in box.why(image)
    assert box.queries.failed == 1
    box.answer(some(20)[3:4])  # never cached: asked again
    assert box.queries.failed == 2


def test_a_function_that_writes_into_its_images_changes_nothing() -> None:
    def function(images: np.ndarray) -> np.ndarray:
        out = dark(images)
        images[:] = 0
        return out

    x = some(4)
    assert np.allclose(opened(function).answer(x), dark(x), atol=1e-6)
    assert np.array_equal(x, some(4))


def test_one_that_is_not_deterministic_is_measured_and_said() -> None:
    noise = np.random.default_rng(0)

    def function(images: np.ndarray) -> np.ndarray:
        shift = noise.normal(0, 0.01, (len(images), 1))
        return (dark(images) + np.concatenate([shift, -shift], 1)).clip(0, 1)

    with pytest.warns(UserWarning, match="is not deterministic: two answers to one image differ by"):
        box = opened(function)
    assert 0.001 < box.fingerprint().spread < 0.1
    x = some(2)
    assert np.array_equal(box.answer(x), box.answer(x))  # the first one is kept
    assert box.record()["spread"] == round(box.fingerprint().spread, 6)


def test_the_budget_ends_it_and_loses_nothing(tmp_path: Path) -> None:
    asked = Counted()
    box = opened(asked, max_queries=16, batch=4)
    box.keep(tmp_path / FILE)
    assert box.left == 10
    with pytest.raises(BudgetSpent, match="16 times, as often as max_queries"):
        box.answer(some(20))
    assert sum(asked.asked.values()) == 16 == box.queries_in_all.asked
    assert box.left == 0
    more = opened(asked, max_queries=32, batch=4)  # six of them are probes
    more.keep(tmp_path / FILE)
    assert np.allclose(more.answer(some(20)), dark(some(20)), atol=1e-6)
    assert [asked.asked[key_of(image)] for image in some(20)] == [1] * 20
    assert more.queries_in_all.asked == 32
    assert more.left == 0


def test_a_budget_is_one_for_all_who_share_the_file(tmp_path: Path) -> None:
    boxes = [opened(max_queries=40) for _ in range(2)]
    for box in boxes:
        box.keep(tmp_path / FILE)
    for k, box in enumerate(boxes):
        with pytest.raises(BudgetSpent):
            box.answer(some(60, seed=k))
    assert boxes[0].queries_in_all.asked == 40
    assert [box.queries.asked for box in boxes] == [34, 6]  # each its own
    counted = boxes[0].queries
    boxes[0].keep(tmp_path / FILE)  # again: nothing is counted twice
    assert boxes[0].queries == counted


def test_a_file_that_another_one_makes_just_now_is_waited_for(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / FILE, check_same_thread=False, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.1, other.rollback).start()
    assert len(Answers(tmp_path / FILE, "box", "name")) == 0


def test_what_could_not_be_kept_hinders_no_later_answer(tmp_path: Path) -> None:
    answers = Answers(tmp_path / FILE, "box", "name")
    row = np.array([0.5, 0.5], np.float32)

    def rows() -> Any:
        yield b"first", row
        raise CounterlensError("in the middle")

    with pytest.raises(CounterlensError, match="in the middle"):
        answers.put(rows())
    assert len(answers) == 0
    answers.put([(b"second", row)])
    assert len(Answers(tmp_path / FILE, "box", "name")) == 1


def test_a_long_wait_for_the_rate_ends_with_the_run() -> None:
    def gone(images: np.ndarray) -> Any:
        raise Unusable("gone")

    box = opened(batch=1, concurrency=4, rate=1000.0)
    box._asker.options = box.options.model_copy(update={"rate": 0.05})  # twenty seconds apart
    box.source.ask = gone  # type: ignore[method-assign]
    started = time.monotonic()
    with pytest.raises(Unusable, match="gone"):
        box.answer(some(4))
    assert time.monotonic() - started < 5


def test_a_failure_ends_the_run_while_the_first_request_is_under_way() -> None:
    asked = list[float]()

    def gone(images: np.ndarray) -> Any:
        asked.append(time.monotonic())
        if len(asked) == 1:
            time.sleep(1)
            return np.full((len(images), 2), 0.5)
        time.sleep(0.02)
        raise Unusable("gone")

    box = opened(batch=1, concurrency=2)
    box.source.ask = gone  # type: ignore[method-assign]
    with pytest.raises(Unusable, match="gone"):
        box.answer(some(40))
    assert len(asked) < 20


def test_a_box_that_changed_since_is_named_and_one_that_did_not_goes_on(tmp_path: Path) -> None:
    box = opened(dark)
    box.answer(some(3))
    box.keep(tmp_path / FILE)
    box.answer(some(5))
    same = opened(dark)
    same.keep(tmp_path / FILE)
    same.answer(some(5))
    assert same.queries.cached == 5
    kept = same.fingerprint()
    assert Fingerprint.of(kept.record()) == kept

    name = box.name
    changed = open_box(lambda x: dark(x)[:, ::-1], ["dark", "light"], image_size=8)
    assert "4 of 4 probe images have another answer; of one it said" in kept.change(changed.fingerprint())
    changed.source.name = changed.name = name
    changed.identity = changed._answers.box = box.identity
    with pytest.raises(CounterlensError, match=r"is not what it was when the answers in .* were kept: 4 of 4"):
        changed.keep(tmp_path / FILE)


def test_noise_is_no_change() -> None:
    def fingerprint(seed: int) -> Fingerprint:
        noise = np.random.default_rng(seed)

        def function(images: np.ndarray) -> np.ndarray:
            off = noise.normal(0, 0.01, (len(images), 1))
            return (dark(images) + np.concatenate([off, -off], 1)).clip(0, 1)

        with pytest.warns(UserWarning, match="not deterministic"):
            return open_box(function, ["dark", "light"], image_size=8).fingerprint()

    prints = [fingerprint(seed) for seed in range(40)]
    assert not [now for before, now in zip(prints[::2], prints[1::2], strict=True) if before.change(now)]


def test_answers_of_two_boxes_share_a_file_and_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    def light(images: np.ndarray) -> np.ndarray:
        return dark(images)[:, ::-1]

    boxes = [opened(dark), opened(light)]
    for box in boxes:
        box.keep(tmp_path / FILE)
        box.answer(some(3))
    rows = sqlite3.connect(tmp_path / FILE).execute("SELECT count(*) FROM answers GROUP BY box").fetchall()
    assert rows == [(3,), (3,)]
    (tmp_path / "none.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(CounterlensError, match=r"none\.sqlite: answers cannot be read or kept"):
        opened().keep(tmp_path / "none.sqlite")


def test_names_and_options_that_do_not_fit(tmp_path: Path) -> None:
    for name, labels, options, message in (
        ("python:nowhere.at_all:f", "ab", {}, "nowhere.at_all:f cannot be imported"),
        ("python:math", "ab", {}, "expected python:package.module:function"),
        ("python:math:pi", "ab", {}, "is a float, not a function"),
        ("python:numpy:mean", "ab", {"timeout": 3.0}, "classifier_timeout: has no use for"),
        ("numpy", "ab", {}, "is no ONNX file"),
        ("python:numpy:mean", "a", {}, "needs the names of two or more"),
    ):
        with pytest.raises(UsageError, match=message):
            open_box(name, list(labels), image_size=8, **options)
    with pytest.raises(CounterlensError, match=r"a\.onnx: no such file"):
        open_box(tmp_path / "a.onnx", ["a", "b"], image_size=8)


def test_probes_are_always_the_same() -> None:
    assert np.array_equal(probes(8), probes(8))
    assert len({key_of(image) for image in probes(8)}) == len(probes(8))


def test_threads_that_want_one_image_at_once_ask_once() -> None:
    """Eight threads, of which one asks and the others wait; what got no answer there is asked again."""
    calls, gate, here = list[int](), threading.Event(), threading.Barrier(9)

    def slow(x: np.ndarray) -> np.ndarray:
        if gate.is_set():
            calls.append(len(x))
            time.sleep(0.1)
        return dark(x)

    box = opened(slow)
    gate.set()

    def ask(n: int) -> np.ndarray:
        here.wait()
        return box.answer(some(9)[n % 2 : n % 2 + 8])

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, n) for n in range(8)]
        here.wait()
        rows = [future.result() for future in futures]
    assert sum(calls) == 9
    assert box.queries.cached == 8 * 8 - 9
    for n, found in enumerate(rows):
        assert np.allclose(found, dark(some(9)[n % 2 : n % 2 + 8]), atol=1e-6)
    assert not box._flying

    lost = iter([True])

    def first_fails(x: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        if gate.is_set() and len(x) == 1 and next(lost, False):
            raise VendorError("not now")
        return dark(x)

    gate.clear()
    box = opened(first_fails)
    gate.set()
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda _: box.answer(some(1)), range(2)))
    assert sum(int(np.isnan(found).any()) for found in rows) <= 1
