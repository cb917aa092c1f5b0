"""The planted cause: a student of the pack's `shortcut`, which is only called, leads to the marker."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.measure import targets_across, touched
from counterlens.engine import Config, Engine
from counterlens.engine.images.files import as_saved
from counterlens.engine.models.protocols import probabilities
from counterlens.engine.packs import Pack
from counterlens.engine.surrogate.rounds import Plan

PLAN = Plan(queries=400, rounds=1, members=1, steps=300)


@pytest.mark.slow
def test_a_student_of_shortcut_finds_the_marker() -> None:
    pack = Pack("digits")
    shortcut = pack.classifier("shortcut")

    @torch.no_grad()
    def answer(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return torch.cat([probabilities(shortcut, some) for some in x.split(64)]).numpy()

    mine = torch.cat([pack.samples("train", marker=rule, count=100).images for rule in ("random", "matching")])
    config = Config(mode="audit", speed="fast")
    engine = Engine.from_pretrained("digits", answer, config, runtime="eager")
    surrogate = engine.train_surrogate(mine, None, PLAN)
    explained = engine.with_surrogate(surrogate)
    samples = pack.samples("test", marker="matching", count=20)
    made = explained.counterfactual(samples.images, targets_across(explained, samples.images))
    assert touched(samples.images, as_saved(made.images), samples).mean() >= 0.65
    assert made.flipped.float().mean() >= 0.65
    assert engine.classifier.queries.asked <= PLAN.queries + 6 + 4 * 20  # type: ignore[attr-defined]
