"""The official schedule, its presets, and how a config is decided."""

from __future__ import annotations

import pytest
import torch

from counterlens.engine.config import PRESETS, Config
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.schedule import add_noise, ddim, make_schedule

TUNED = {
    "realistic": {
        "steps": 10,
        "strength": 0.5,
        "guidance_scale": 3,
        "class_scale": 3,
        "distance_scale": 1,
        "angle": 45,
    },
    "audit": {"steps": 10, "strength": 0.5, "guidance_scale": 3, "class_scale": 3, "distance_scale": 1, "angle": 90},
}


@pytest.mark.parametrize(("preset", "steps"), [("pairs-class", 171), ("imagenet-class", 191), ("celeba-text", 251),
                                               ("flowers-text", 250), ("pets-text", 191)])  # fmt: skip
def test_published_step_counts(preset: str, steps: int) -> None:
    settings = PRESETS[preset]
    assert len(make_schedule(1000, settings.steps, settings.strength)) == steps


def test_schedule_by_hand() -> None:
    # T = 20, S = 5: tau = 1, 5, 9, 13, 17; strength 0.6 runs k = 3 steps from noise at tau_3.
    schedule = make_schedule(20, 5, 0.6)
    assert schedule.timesteps == (9, 5, 1)
    assert schedule.timesteps_prev == (5, 1, 0)
    assert schedule.start == 13


def test_full_strength_starts_at_the_last_timestep() -> None:
    schedule = make_schedule(20, 5, 1.0)
    assert len(schedule) == 5
    assert schedule.start == 17


def test_strength_is_not_lost_to_rounding() -> None:
    assert len(make_schedule(1000, 100, 0.29)) == 29  # 0.29 * 100 = 28.999999999999996


@pytest.mark.parametrize(("steps", "strength", "name"), [(0, 0.5, "steps"), (1000, 0.5, "steps"), (10, 0.0, "strength"),
                                                         (10, 1.1, "strength"), (10, 0.05, "strength")])  # fmt: skip
def test_bad_schedules_name_the_field(steps: int, strength: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        make_schedule(1000, steps, strength)


def test_ddim_walks_back_what_noise_added() -> None:
    g = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(2, 4, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    abar, abar_next = torch.tensor([0.5, 0.2]).double(), torch.tensor([0.9, 1.0]).double()
    z_next, z0 = ddim(add_noise(z, noise, abar), noise, abar, abar_next)
    torch.testing.assert_close(z0, z)
    torch.testing.assert_close(z_next, add_noise(z, noise, abar_next))


def test_modes_presets_and_fields() -> None:
    assert Config().settings(TUNED).angle == 45
    assert Config(mode="audit").settings(TUNED).angle == 90
    assert Config(mode="official").settings(TUNED) == PRESETS["pairs-class"]
    assert Config(preset="pets-text").mode_name == "official"
    assert Config(preset="pets-text", angle=30, gradient="detached").settings(TUNED) == PRESETS["pets-text"].model_copy(
        update={"angle": 30, "gradient": "detached"}
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"strength": 2.0}, "strength"),
        ({"mode": "fastest"}, "mode"),
        ({"angle": -1}, "angle"),
        ({"colour": 1}, "colour"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_fields_are_named(fields: dict, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}:"):
        Config.make(**fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"preset": "pairs-class", "mode": "audit"}, "preset"),
        ({"filter": "project", "angle": 90}, "angle"),
        ({"strength": 0.01}, "strength"),
    ],
)
def test_contradictions_are_named(fields: dict, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}:"):
        Config.make(**fields).settings(TUNED)
