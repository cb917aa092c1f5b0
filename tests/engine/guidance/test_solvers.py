"""Timestep spacings and multistep solvers against diffusers' schedulers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from counterlens.engine import Config, Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.schedule import SPACINGS, Schedule, make_schedule
from counterlens.engine.guidance.solvers import History, advance, coefficients, no_history
from counterlens.engine.multistep import SOLVERS, Solver, ddim, dpm_solver_2m

BETAS = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
STRENGTH = 0.6  # the noised part is a process of 600 timesteps of its own, which is what diffusers is given


def scheduler(kind: type, spacing: str, **options: Any) -> Any:
    betas = BETAS[: int(STRENGTH * 1000)].numpy()
    return kind(trained_betas=betas, num_train_timesteps=len(betas), timestep_spacing=spacing, **options)


def noise_at(z: Tensor, t: int) -> Tensor:
    """A model that is not linear in z and depends on the timestep."""
    return torch.sin(2 * z + 0.003 * t) + 0.3 * z.flip(-1)


def our_run(z: Tensor, schedule: Schedule, solver: str) -> Tensor:
    table, history = coefficients(schedule, ALPHAS, solver), no_history(z)
    for row, t in zip(table, schedule.timesteps, strict=True):
        z0 = (z - (1 - ALPHAS[t]).sqrt() * noise_at(z, t)) / ALPHAS[t].sqrt()
        z, history = advance(row.expand(len(z), -1), z, z0, history)
    return z


def diffusers_run(z: Tensor, scheduler: Any) -> Tensor:
    for t in scheduler.timesteps:
        z = scheduler.step(noise_at(z, int(t)), t, z).prev_sample
    return z


def start() -> Tensor:
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50])
@pytest.mark.parametrize(
    ("solver", "kind", "spacing", "options"),
    [
        ("ddim", DDIMScheduler, "leading", {"set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1}),
        ("ddim", DDIMScheduler, "trailing", {"set_alpha_to_one": False, "clip_sample": False}),
        ("dpm++", DPMSolverMultistepScheduler, "linspace", {"final_sigmas_type": "sigma_min"}),
        ("dpm++", DPMSolverMultistepScheduler, "trailing", {"final_sigmas_type": "sigma_min"}),
        ("unipc", UniPCMultistepScheduler, "linspace", {"final_sigmas_type": "sigma_min"}),
        ("unipc", UniPCMultistepScheduler, "trailing", {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_solvers_equal_diffusers(solver: str, kind: type, spacing: Any, options: dict[str, Any], steps: int) -> None:
    theirs = scheduler(kind, spacing, **options)
    theirs.set_timesteps(steps)
    ours = make_schedule(1000, steps, STRENGTH, spacing)
    assert list(ours.timesteps) == theirs.timesteps.tolist()
    expected = diffusers_run(start(), theirs)
    got = our_run(start(), ours, solver)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dpm_on_any_timesteps_equals_diffusers() -> None:
    ours = make_schedule(1000, 12, STRENGTH, "logsnr", ALPHAS)
    theirs = scheduler(DPMSolverMultistepScheduler, "linspace", final_sigmas_type="sigma_min")
    theirs.set_timesteps(timesteps=list(ours.timesteps))
    expected = diffusers_run(start(), theirs)
    assert (our_run(start(), ours, "dpm++") - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_second_order_converges_faster() -> None:
    """Twice the steps leave half of DDIM's error and at most a third of the others'."""
    truth = our_run(start(), make_schedule(1000, 499, 0.5, "linspace"), "dpm++")
    errors = {
        solver: [
            (our_run(start(), make_schedule(1000, n, 0.5, "logsnr", ALPHAS), solver) - truth).abs().mean().item()
            for n in (40, 80)
        ]
        for solver in SOLVERS
    }
    assert errors["ddim"][1] > 0.45 * errors["ddim"][0]
    for solver in ("dpm++", "unipc"):
        assert errors[solver][1] < errors[solver][0] / 3
        assert errors[solver][0] < 0.5 * errors["ddim"][0]


def test_samples_at_different_steps_share_an_update() -> None:
    """Rows of different schedules, steps and solvers in one batch give each sample what it gets alone."""
    z, z0 = start(), start().flip(0)
    history = History(start() * 0.5, start() * 0.3, start() * 0.1)
    kinds = zip((5, 9, 20), SOLVERS, strict=True)
    rows = torch.stack([coefficients(make_schedule(1000, n, 0.5, "linspace"), ALPHAS, s)[2] for n, s in kinds])
    together, after = advance(rows, z, z0, history)
    for i in range(3):
        one = slice(i, i + 1)
        alone, after_alone = advance(rows[one], z[one], z0[one], History(*(h[one] for h in history)))
        assert torch.equal(together[one], alone)
        assert all(torch.equal(a[one], b) for a, b in zip(after, after_alone, strict=True))


@pytest.mark.parametrize("spacing", [s for s in SPACINGS if s != "official"])
def test_spacings_cover_the_noised_part(spacing: Any) -> None:
    for steps in (1, 4, 10, 50):
        schedule = make_schedule(1000, steps, 0.4, spacing, ALPHAS)
        assert len(schedule) == steps
        assert schedule.start == schedule.timesteps[0] < 400
        assert schedule.timesteps_prev == (*schedule.timesteps[1:], 0)
        assert list(schedule.timesteps) == sorted(set(schedule.timesteps), reverse=True)
        if spacing != "leading":
            assert schedule.start == 399


def test_second_order_with_leading_spacing_warns_once() -> None:
    engine = Engine.from_pack("digits", runtime="eager")
    with pytest.warns(UserWarning, match="leading with solver dpm"):
        engine.settings(Config(mode="realistic", solver="dpm++", spacing="leading"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.settings(Config(mode="realistic", solver="ddim", spacing="leading"))


def test_log_snr_is_evenly_spaced() -> None:
    schedule = make_schedule(1000, 8, 0.5, "logsnr", ALPHAS)
    levels = ALPHAS[[*schedule.timesteps, 0]]
    gaps = (0.5 * (levels / (1 - levels)).log()).diff()
    assert gaps.max() / gaps.min() < 1.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 400, 0.4, "linspace"), r"^steps: 400 are more than the 399 timesteps of strength 0\.4"),
        ((1000, 300, 0.4, "trailing"), "^steps: 300 with spacing trailing do not fit"),
        ((1000, 0, 0.4, "trailing"), "^steps: expected 1 to 999"),
        ((1000, 5, 0.0001, "trailing"), "^steps: 5 are more than the 0 timesteps"),
        ((1000, 5, 0.4, "karras"), "^spacing: expected one of official"),
        ((1000, 5, 0.4, "logsnr"), "^spacing: logsnr needs alphas_cumprod"),
    ],
)
def test_bad_spacings_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_schedule(*arguments)


def test_unknown_solver() -> None:
    with pytest.raises(ValueError, match="solver: expected one of ddim"):
        coefficients(make_schedule(1000, 5, 0.5), ALPHAS, "euler")  # type: ignore[arg-type]


def test_a_solver_is_a_function_and_a_line(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options, runs and what a sample remembers read the table: one that is added to it runs."""
    rows = {"same": dpm_solver_2m, "other": ddim}
    for name, function in rows.items():
        monkeypatch.setitem(SOLVERS, name, Solver(function, ("m_last",), name))
    engine = Engine(*tiny, runtime="eager")
    x = torch.rand(2, 3, engine.image_size, engine.image_size, generator=torch.Generator().manual_seed(1))
    made = {
        name: engine.counterfactual(x, config=Config(mode="official", steps=4, spacing="trailing", solver=name)).images
        for name in ("ddim", "dpm++", "same", "other")
    }
    assert torch.equal(made["same"], made["dpm++"])
    torch.testing.assert_close(made["other"], made["ddim"], rtol=0, atol=1e-3)  # the step's own update, not the table
    assert not torch.equal(made["same"], made["other"])
    monkeypatch.delitem(SOLVERS, "same")
    with pytest.raises(UsageError, match=r"^solver: Input should be 'ddim', .*'unipc' or 'other', got 'same'"):
        Config(solver="same")
