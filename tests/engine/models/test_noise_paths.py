"""Flow matching in variance-preserving latents, what its schedulers' configurations say, and conditions of several
tensors."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from counterlens.engine.config import Settings
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.schedule import carried_strength, ddim, make_schedule, schedule_of
from counterlens.engine.guidance.solvers import advance, coefficients, no_history
from counterlens.engine.models.conditions import cat, each, floats_to, grouped, named, tensors
from counterlens.engine.models.fields import read_noise_levels
from counterlens.engine.models.predictions import PREDICTIONS, flow_levels, flow_sigmas, log_snr, to_clean, to_noise

HERE = Path("scheduler_config.json")
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SHIFTS = {"none": {}, "shift": {"shift": 3.0}, "dynamic": DYNAMIC, "linear": DYNAMIC | {"time_shift_type": "linear"}}
TOKENS = 1024


def flow(**fields: object) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**fields)


def levels_of(scheduler: object, tokens: int | None = TOKENS):
    return read_noise_levels(HERE, json.loads(scheduler.to_json_string()), tokens)


def velocity(z: Tensor, sigma: float) -> Tensor:
    """Any smooth field will do."""
    return torch.sin(1.3 * z + sigma) - 0.2 * z


@pytest.mark.parametrize("kind", SHIFTS)
def test_ddim_is_the_euler_step_of_the_flow(kind: str) -> None:
    """Through diffusers' own scheduler, from the same latents at the same shares of noise: 1e-12 in float64."""
    scheduler = flow(**SHIFTS[kind])
    levels = levels_of(scheduler)
    assert levels.prediction == "flow"
    assert levels.alphas_cumprod[0] == 1
    sigmas = flow_sigmas(levels.alphas_cumprod)
    taus = [900, 700, 450, 200, 60, 0]
    wanted = [float(sigmas[t]) for t in taus]
    scheduler.timesteps, scheduler.sigmas = torch.tensor(wanted[:-1]).double() * 1000, torch.tensor(wanted).double()
    scheduler.num_inference_steps = 5
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = x * (levels.alphas_cumprod[900].sqrt() + (1 - levels.alphas_cumprod[900]).sqrt())
    for i, (t, t_prev) in enumerate(pairwise(taus)):
        assert levels.times[t].item() == pytest.approx(1000 * wanted[i], rel=1e-12)
        out = velocity(x, wanted[i])
        x = x + (wanted[i + 1] - wanted[i]) * out
        abar, abar_prev = levels.alphas_cumprod[t].expand(2), levels.alphas_cumprod[t_prev].expand(2)
        alpha, sigma = (a.sqrt().reshape(-1, 1, 1, 1) for a in (abar, 1 - abar))
        z_prev, z0 = ddim(z, to_noise("flow", out, z, alpha, sigma), abar, abar_prev)
        torch.testing.assert_close(to_clean("flow", out, z, alpha, sigma), z0, rtol=0, atol=1e-12)
        z = z_prev
        back = z / (abar_prev.sqrt() + (1 - abar_prev).sqrt()).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SHIFTS)
def test_shares_of_noise_are_the_schedulers_own(kind: str) -> None:
    """Those of its own run of 1000 steps, which lie on our timesteps up to how it lays them."""
    scheduler = flow(**SHIFTS[kind])
    ours = flow_sigmas(levels_of(scheduler).alphas_cumprod)
    mu = 0.5 + (1.15 - 0.5) * (TOKENS - 256) / (4096 - 256)
    sigmas = [i / 1000 for i in range(999, 0, -1)]
    if kind == "shift":
        scheduler.set_timesteps(sigmas=sigmas)
    else:
        scheduler.set_timesteps(sigmas=sigmas, **({"mu": mu} if "dynamic" in kind or kind == "linear" else {}))
    torch.testing.assert_close(ours.flip(0)[:-1].float(), scheduler.sigmas[:-1], rtol=2e-6, atol=1e-7)


def test_dpm_solvers_flow_tells_whole_timesteps() -> None:
    """As Sana's scheduler: the shift is another field, and the denoiser sees whole timesteps."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    levels = levels_of(scheduler, None)
    scheduler.set_timesteps(20)
    known = flow_sigmas(levels.alphas_cumprod)
    for sigma, time in zip(scheduler.sigmas[1:-1].tolist(), scheduler.timesteps[1:].tolist(), strict=True):
        i = int((known - sigma).abs().argmin())
        assert abs(float(known[i]) - sigma) < 2e-3
        assert abs(float(levels.times[i]) - time) <= 2
        assert float(levels.times[i]).is_integer()


SOLVED = {
    "_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "named_field"),
    [
        ({"shift_terminal": 0.1}, "shift_terminal"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"shift": -1.0}, "shift"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({**DYNAMIC, "time_shift_type": "cubic"}, "time_shift_type"),
        ({**DYNAMIC, "base_image_seq_len": 4096}, "base_image_seq_len"),
        ({"mystery": 2}, "mystery"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "prediction_type"),
        ({"_class_name": "EDMEulerScheduler"}, "_class_name"),
        ({**SOLVED, "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({**SOLVED, "thresholding": True}, "thresholding"),
        ({"timestep_type": "continuous"}, "timestep_type"),
    ],
)
def test_a_field_that_changes_numbers_is_refused_by_name(fields: dict[str, object], named_field: str) -> None:
    with pytest.raises(UsageError, match=rf"^scheduler_config\.json: {named_field} is") as caught:
        read_noise_levels(HERE, {"_class_name": "FlowMatchEulerDiscreteScheduler"} | fields, TOKENS)
    assert "\n" not in str(caught.value)


def test_dynamic_shifting_needs_the_images_size() -> None:
    with pytest.raises(UsageError, match="use_dynamic_shifting"):
        levels_of(flow(**DYNAMIC), None)
    small, large = levels_of(flow(**DYNAMIC), 256), levels_of(flow(**DYNAMIC), 4096)
    assert (large.alphas_cumprod[1:] < small.alphas_cumprod[1:]).all()  # more noise at the same time


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_answers_are_the_noise_and_the_clean_latents(prediction: str) -> None:
    g = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 3, 4, 5, 5, generator=g, dtype=torch.float64)
    abar = torch.tensor([0.9, 0.3, 0.001]).double().reshape(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    z = alpha * z0 + sigma * eps
    said = {"epsilon": eps, "v_prediction": alpha * eps - sigma * z0, "sample": z0, "flow": eps - z0}[prediction]
    torch.testing.assert_close(to_noise(prediction, said, z, alpha, sigma), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_clean(prediction, said, z, alpha, sigma), z0, rtol=0, atol=1e-11)


def test_clean_latents_survive_half_precision_where_nearly_all_is_noise() -> None:
    """Through the noise they would be lost: at sigma 0.999 alpha is 0.001."""
    g = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 1, 4, 8, 8, generator=g)
    abar = flow_levels(torch.tensor([0.999], dtype=torch.float64)).float().reshape(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    z, said = alpha * z0 + sigma * eps, (eps - z0).half().float()
    half = to_noise("flow", said, z, alpha, sigma).half().float()
    direct = (to_clean("flow", said, z, alpha, sigma) - z0).abs().max()
    through_noise = ((z - sigma * half) / alpha - z0).abs().max()
    assert direct < 5e-3 < 0.1 < through_noise


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "logsnr", "official"])
def test_every_solver_ends_without_noise(solver: str, spacing: str) -> None:
    """Its last step arrives at the clean estimate; with the exact answer all arrive at the same latents."""
    levels = levels_of(flow(shift=3.0)).alphas_cumprod
    schedule = make_schedule(1000, 20, 0.6, spacing, levels)
    table = coefficients(schedule, levels, solver)
    assert table.isfinite().all()
    z0 = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    first = levels[schedule.timesteps[0]]
    z, history = first.sqrt() * z0 + (1 - first).sqrt() * torch.randn_like(z0), no_history(z0)
    for row in table:
        z, history = advance(row[None], z, z0, history)
    torch.testing.assert_close(z, z0, rtol=0, atol=1e-10)


def test_strength_is_carried_over_by_noise_level() -> None:
    reference = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    own = reference.alphas_cumprod.double()
    assert carried_strength(0.382, own) == pytest.approx(0.382, abs=1e-4)
    wanted = float(log_snr(own)[382])
    for fields in SHIFTS.values():
        levels = levels_of(flow(**fields)).alphas_cumprod
        at = carried_strength(0.382, levels) * 1000
        assert float(log_snr(levels)[int(at)]) >= wanted - 1e-3 >= float(log_snr(levels)[int(at) + 1]) - 2e-2
    shares = [carried_strength(0.382, levels_of(flow(shift=s)).alphas_cumprod) for s in (1.0, 3.0, 6.0)]
    assert shares[0] > shares[1] > shares[2]  # the more shift, the earlier in the process
    assert 0 < carried_strength(1e-4, levels) < 0.06 < 0.5 < carried_strength(1.0, levels) < 1


def test_a_first_step_of_noise_alone_is_refused() -> None:
    levels = torch.linspace(1, 0, 100, dtype=torch.float64)
    numbers = {"guidance_scale": 1, "class_scale": 1, "distance_scale": 1, "angle": 45}
    with pytest.raises(UsageError, match=r"^strength: 1 begins at timestep 99 of 100, which is noise alone"):
        schedule_of(Settings(steps=10, strength=1.0, spacing="trailing", **numbers), levels)
    assert schedule_of(Settings(steps=10, strength=0.9, spacing="trailing", **numbers), levels).start == 89
    assert math.isinf(float(log_snr(levels)[0]))


def test_conditions_of_several_tensors() -> None:
    one, two = torch.ones(2, 3), (torch.ones(2, 3, 4), torch.ones(2, 5, dtype=torch.long))
    assert tensors(one) == (one,)
    assert grouped(tensors(one)) is one
    assert grouped(tensors(two)) == two
    assert [x.shape[0] for x in tensors(cat(two, two))] == [4, 4]
    assert cat(one, one).shape == (4, 3)
    assert [x.shape[0] for x in tensors(each(lambda x: x[:1], two))] == [1, 1]
    assert [x.dtype for x in tensors(floats_to(two, torch.float16))] == [torch.float16, torch.long]
    assert named(("z", "condition", "image"), 2) == ("z", "condition", "condition_2", "image")
