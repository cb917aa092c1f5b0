"""What goes wrong at the front door is one sentence that helps, and results say what they are in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from counterlens.engine import Config, Engine
from counterlens.engine.audit.results import Results
from counterlens.engine.errors import UsageError
from counterlens.engine.metrics import msi
from counterlens.engine.packs import Pack


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "^steps: .*greater than or equal to 1, got 0"),
        ({"steps": "many"}, "^steps: .*got 'many'"),
        ({"steps": 2.5}, "^steps: .*got 2.5"),
        ({"strength": 0}, "^strength: .*got 0"),
        ({"strength": 1.5}, "^strength: .*got 1.5"),
        ({"angle": 181}, "^angle: .*got 181"),
        ({"class_scale": -1}, "^class_scale: .*got -1"),
        ({"mode": "fast"}, "^mode: .*'realistic'.*got 'fast'"),
        ({"solver": "euler"}, "^solver: .*'unipc'.*got 'euler'"),
        ({"guidance_every": 0}, "^guidance_every: "),
        ({"stpes": 3}, "^stpes: no field of Config; expected some of mode, .*steps"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(fields: dict[str, Any], words: str) -> None:
    for make in (Config, Config.make):
        with pytest.raises(UsageError, match=words) as caught:
            make(**fields)
        assert "\n" not in str(caught.value)
        assert "pydantic" not in str(caught.value)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def test_a_module_given_to_the_wrong_door_is_shown_the_right_one() -> None:
    with pytest.raises(UsageError, match=r"^classifier: .*not a Sequential.*Engine\.from_pretrained\('digits', module"):
        Engine.from_pack("digits", classifier=net())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^classifier: Sequential is a plain module; .*from_pretrained"):
        Engine(Pack("digits").diffusion(), net())  # type: ignore[arg-type]


LABELS = [str(i) for i in range(10)]


@pytest.mark.parametrize("key", ["image_mean", "size", "crop_size", "normalize", "do_resize", "image_size", "labels"])
def test_keys_of_preprocessing_are_named(key: str) -> None:
    with pytest.raises(
        UsageError,
        match=rf"^preprocessing: '{key}' is no key of it; expected some of output, resize, crop, mean, std, interpol",
    ):
        Engine.from_pretrained("digits", net(), labels=LABELS, preprocessing={key: 1})


@pytest.mark.parametrize("given", ["imagenet", [0.5, 0.5, 0.5], 224])
def test_preprocessing_is_a_mapping(given: object) -> None:
    with pytest.raises(UsageError, match=r"^preprocessing: expected a mapping such as \{'mean'"):
        Engine.from_pretrained("digits", net(), labels=LABELS, preprocessing=given)  # type: ignore[arg-type]


def test_opening_says_nothing_that_means_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        for dtype in ("float32", "float16"):
            Engine.from_pretrained("digits", net(), labels=LABELS, dtype=dtype)
    finally:
        logger.removeHandler(handler)
    assert heard == []
    assert capfd.readouterr().err == ""


def test_preprocessing_belongs_to_a_module(tiny) -> None:
    with pytest.raises(UsageError, match=r"^preprocessing: for a module of your own"):
        Engine.from_pretrained("digits", tiny[1], preprocessing={"resize": 16})
    engine = Engine.from_pretrained("digits", net(), labels=LABELS, preprocessing={"resize": 16}, device="cpu")
    assert engine.labels == LABELS


def test_results_are_one_line(tmp_path: Path, tiny) -> None:
    engine = Engine(*tiny, Config(mode="official", steps=4, strength=0.5), runtime="eager")
    images = torch.rand(3, 3, engine.image_size, engine.image_size)
    images[2] = torch.nan
    got = engine.counterfactual(images)
    scores = msi(tiny[1], images[:2], torch.rand(2, *images.shape[2:]))
    shown = [got, scores, scores.curves, Results(tmp_path / "audit", {}), Pack("digits").samples("test")]
    for result in shown:
        assert repr(result).startswith(f"{type(result).__name__}(")
        assert "\n" not in repr(result)
        assert "tensor" not in repr(result)
        assert len(repr(result)) < 300
    assert repr(got).startswith("Counterfactuals(2 of 3 made")
    assert "score [2]" in repr(scores)
