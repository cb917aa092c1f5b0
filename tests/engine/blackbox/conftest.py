"""A small classifier and images of the digits pack, and the classifier's own answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.endpoint import answers_of
from counterlens.engine.blackbox.answers import key_of
from counterlens.engine.blackbox.box import probes
from counterlens.engine.images.files import to_uint8
from counterlens.engine.packs import Pack

LABELS = [str(d) for d in range(10)]


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """Sixty test digits, uint8 [60, 32, 32, 3]."""
    images = Pack("digits").samples("test", count=60).images
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="session")
def judge(digits: np.ndarray) -> Any:
    """The judge as a function from uint8 [N, 32, 32, 3] to probabilities; it has seen the digits and the probes."""
    asked, known = answers_of(Pack("digits").classifier("judge")), dict[bytes, np.ndarray]()

    def answer(images: np.ndarray) -> np.ndarray:
        if new := {key_of(image): image for image in images if key_of(image) not in known}:
            known.update(zip(new, asked(np.stack([*new.values()])), strict=True))
        return np.stack([known[key_of(image)] for image in images])

    answer(np.concatenate([digits, probes(32)]))
    return answer
