"""The forms of an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from counterlens.engine.blackbox.http import fill, find
from counterlens.engine.blackbox.reading import Unanswered, plain, read

LABELS = ["cat", "dog", "1"]


@pytest.mark.parametrize(
    ("answer", "row"),
    [
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        (np.array([0.2, 0.3, 0.5], np.float32), [0.2, 0.3, 0.5]),
        ({"dog": 0.3, "1": 0.5, "cat": 0.2}, [0.2, 0.3, 0.5]),
        ([{"label": n, "score": p} for n, p in (("1", 0.5), ("dog", 0.3), ("cat", 0.2))], [0.2, 0.3, 0.5]),
        ("dog", [0, 1, 0]),
        ("1", [0, 0, 1]),  # by name first
        (0, [1, 0, 0]),
        (np.int64(2), [0, 0, 1]),
        ([0.333, 0.333, 0.333], [1 / 3] * 3),  # rounded
    ],
)  # fmt: skip
def test_every_form_is_understood(answer: Any, row: list[float]) -> None:
    found = read(answer, LABELS, "probabilities")
    assert not isinstance(found, str)
    assert np.allclose(found[0], row, atol=1e-6)
    assert found[1] == isinstance(answer, str | int | np.int64)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([0.5, 0.5], "[2] scores, there are 3 labels"),
        ([0.2, 0.3, None], "NaN"),
        ([0.2, float("inf"), 0.1], "NaN or infinity"),
        ([0.9, 0.9, 0.9], "sum to 2.7"),
        ([-3.0, 2.0, 2.0], "from -3 to 2"),
        ({"cat": 1.0}, "says 1 of the 3 labels"),
        ({"cat": 0.5, "dog": 0.3, "cow": 0.2}, "'cow' is no label"),
        ([{"label": "cat", "score": 0.5}, {"label": "cat", "score": 0.5}], "one label twice"),
        ("cow", "'cow' is no label"),
        (7, "'7' is no label"),
        ("9" * 5000, "Exceeds the limit"),
        ([10**400, 0, 0], "not with scores"),
        ([{"label": ["cat"], "score": 1.0}], "is no label"),
        (None, "answers with"),
        ([["a"]], "not with scores"),
        ([[0.2, 0.3, 0.5]], "[1, 3] scores"),
    ],
)
def test_what_is_no_answer_is_said(answer: Any, said: str) -> None:
    found = read(answer, LABELS, "probabilities")
    assert isinstance(found, str)
    assert said in found


def test_a_label_may_be_called_by_a_long_name() -> None:
    name = "yellow lady's slipper, yellow lady-slipper, Cypripedium calceolus, Cypripedium parviflorum"
    row = read(name, ["cat", name], "probabilities")
    assert not isinstance(row, str)
    assert row[0].tolist() == [0, 1]


def test_there_is_one_answer_for_each_image() -> None:
    assert plain(np.eye(2), 2) == [[1, 0], [0, 1]]
    for answers in ([[1, 0]], None, "dog", 0.5, {"predictions": []}):
        with pytest.raises(Unanswered):
            plain(answers, 2)


def test_templates_are_filled_and_paths_followed() -> None:
    images = np.zeros((2, 1, 1, 3), np.uint8)

    def value(what: str, image: np.ndarray) -> Any:
        return image.tolist() if what == "pixels" else what

    assert fill({"a": [{"b": "$png"}], "c": 3}, images, value) == {"a": [{"b": "png"}, {"b": "png"}], "c": 3}
    assert fill(["$pixels"], images, value) == [[[[0, 0, 0]]]] * 2
    assert fill({"a": "$floats", "c": ["x", "y"]}, images[:1], value) == {"a": "floats", "c": ["x", "y"]}
    assert find({"out": [{"p": [1]}, {"p": [2]}]}, "out[*].p", 2) == [[1], [2]]
    assert find({"out": [{"p": [1]}]}, "out[0].p", 1) == [[1]]
    assert find([[1], [2]], "[*]", 2) == [[1], [2]]
    for said in ({}, {"out": 3}, {"out": []}, [], None):
        with pytest.raises(Unanswered, match="answers without out"):
            find(said, "out[0].p", 1)
