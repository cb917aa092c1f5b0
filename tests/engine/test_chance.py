"""The share of random directions that an angle limit keeps: its closed form, samples of it, and limits carried over."""

from __future__ import annotations

import math

import pytest
import torch

from counterlens.engine.chance import angle_of, carried_over, share_kept
from counterlens.engine.config import PRESETS, default_settings
from counterlens.kernels.consensus import consensus_filter

# What the documentation's table says.
TABLE = {3: (0.146, 45.0), 4: (0.0908, 45.0), 8: (0.0166, 60.73), 16: (7.51e-4, 70.12), 32: (2.11e-6, 76.21)}


def test_the_closed_form_is_the_incomplete_beta_function() -> None:
    special = pytest.importorskip("scipy.special", reason="needs scipy")
    for channels in (2, 3, 4, 5, 8, 16, 32, 64):
        for angle in (0, 1, 20, 44.9, 45, 45.1, 60, 89, 90):
            x = math.sin(math.radians(angle)) ** 2
            expected = special.betainc((channels - 1) / 2, 0.5, x) / 2
            assert share_kept(angle, channels) == pytest.approx(expected, rel=1e-11, abs=1e-300)
            assert share_kept(180 - angle, channels) == pytest.approx(1 - expected, rel=1e-11)
    assert share_kept(50, 3) == pytest.approx((1 - math.cos(math.radians(50))) / 2)  # Archimedes' hat box


@pytest.mark.parametrize("channels", [3, 4, 16, 32])
def test_the_filter_keeps_that_share_of_random_vectors(channels: int) -> None:
    g = torch.Generator().manual_seed(channels)
    score, reference = torch.randn(2, 4, channels, 100, 100, generator=g)
    for angle in (45.0, carried_over(45.0, channels), 80.0):
        _, kept = consensus_filter(score, reference, angle, mode="zero", backend="reference")
        share, count = share_kept(angle, channels), 4 * 100 * 100
        spread = math.sqrt(share * (1 - share) / count)
        assert abs(float(kept.double().mean()) - share) <= 4 * spread + 1 / count


def test_limits_carried_over_keep_the_same_share() -> None:
    for channels, (share, angle) in TABLE.items():
        assert share_kept(45, channels) == pytest.approx(share, rel=5e-3)
        assert carried_over(45, channels) == angle
        if channels > 4:
            assert share_kept(angle, channels) == pytest.approx(share_kept(45, 4), rel=1e-3)
        assert angle_of(share_kept(33, channels), channels) == pytest.approx(33, rel=1e-9)
    assert carried_over(90, 16) == 90
    assert carried_over(120, 32) == 120
    with pytest.raises(ValueError, match="angle"):
        share_kept(181, 4)
    with pytest.raises(ValueError, match="share"):
        angle_of(1.5, 4)


def test_defaults_of_models_that_nobody_tuned() -> None:
    for conditioning, preset in (("text", "imagenet-text"), ("class", "imagenet-class")):
        published = PRESETS[preset].model_dump()
        for channels in (3, 4, 16, 32):
            made = default_settings(conditioning, channels)
            assert made["official"] == published
            assert made["realistic"] == published | {"angle": carried_over(published["angle"], channels)}
            assert made["audit"]["angle"] == 90
        assert default_settings(conditioning, 4)["realistic"]["angle"] == published["angle"]
        assert default_settings(conditioning, 16)["realistic"]["angle"] > 70
