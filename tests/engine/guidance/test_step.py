"""One guided step against the literal baseline and against itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.baselines.literal import filter_angles, literal_step
from counterlens.engine.config import StepOptions
from counterlens.engine.guidance.pullback import PULLBACK_MODES, in_eager, pullback
from counterlens.engine.guidance.step import GuidedStep, unit_largest
from counterlens.engine.models.freezing import frozen

SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
NEAR_LIMIT = 1e-3  # radians


def inputs(diffusion, dtype: torch.dtype, batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    size = diffusion.image_size
    z = torch.randn(batch, *diffusion.latent_shape, generator=g, dtype=torch.float64).to(dtype)
    image = torch.rand(batch, 3, size, size, generator=g, dtype=torch.float64).to(dtype)
    return z, image, torch.arange(batch) % 10


def relative_error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).amax(1) / b.abs().flatten(1).amax(1)


def compare_with_literal(models, dtype: torch.dtype, mode: str, pull: str, detached: bool) -> tuple[Tensor, Tensor]:
    """Relative error of z_prev per sample, and which samples have a location near the angle limit."""
    diffusion, classifier = models
    z, image, target = inputs(diffusion, dtype, 24)
    t, t_prev, angle = 401, 381, 45.0
    with frozen(*diffusion.modules(), classifier.module), torch.no_grad():
        expected, score, reference = literal_step(
            diffusion, classifier, z, t, t_prev, image, target, **SCALES, angle_deg=angle, mode=mode, detached=detached
        )
        step = GuidedStep(
            diffusion, classifier, StepOptions(filter=mode, gradient="detached" if detached else "exact"), mode=pull
        )
        timestep = torch.full((len(z),), t)
        got, _, _ = step(
            z, timestep, torch.full_like(timestep, t_prev), target, image, target, **SCALES, angle_deg=angle
        )
    angles = filter_angles(score, reference, mode).reshape(len(z), -1)
    near = ((angles - math.radians(angle)).abs() < NEAR_LIMIT).any(1) & (mode != "off")
    return relative_error(got, expected), near


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("pull", PULLBACK_MODES)
@pytest.mark.parametrize("mode", ["zero", "project", "global", "off"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_step_equals_literal(tiny, tiny64, dtype, mode, pull, detached) -> None:
    models = tiny64 if dtype == torch.float64 else tiny
    error, near = compare_with_literal(models, dtype, mode, pull, detached)
    assert near.float().mean() <= 0.05
    assert error[~near].max() <= TOLERANCE[dtype]


def test_filter_matters_in_these_cases(tiny64) -> None:
    """The comparison above would say nothing if the filter kept, or removed, everything."""
    diffusion, classifier = tiny64
    z, image, target = inputs(diffusion, torch.float64, 24)
    step = GuidedStep(diffusion, classifier)
    t = torch.full((24,), 401)
    _, _, kept = step(z, t, t - 20, target, image, target, **SCALES, angle_deg=45.0)
    assert 0.02 < kept.mean() < 0.98


def test_pullback_modes_agree() -> None:
    torch.manual_seed(0)
    a = torch.randn(5, 3, dtype=torch.float64)
    x, v = torch.randn(3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected = a.T @ (v * torch.cos(a @ x))
    with torch.no_grad():
        for mode in PULLBACK_MODES:
            y, pull = pullback(lambda x: torch.sin(a @ x), x, mode)
            torch.testing.assert_close(y, torch.sin(a @ x))
            torch.testing.assert_close(pull(v), expected)
            torch.testing.assert_close(pull(2 * v), 2 * expected)
    with pytest.raises(ValueError, match="functional"):
        pullback(torch.sin, x, "other")  # type: ignore[arg-type]


def test_in_inference_mode_and_of_weights_made_there_a_step_runs() -> None:
    with torch.inference_mode():
        layer = torch.nn.Linear(2, 1, bias=False)
        y, pull = pullback(lambda x: layer(x) ** 2, torch.ones(1, 2), "autograd")
        expected = 2 * layer.weight.sum() * layer.weight
        torch.testing.assert_close(pull(torch.ones_like(y)), expected)
    assert in_eager("functional", [layer]) == "functional"
    mine = torch.nn.Linear(2, 1)
    assert in_eager("functional", [mine]) == "autograd"
    assert in_eager("functional", [mine.to("meta")]) == "functional"


def test_pullback_modes_agree_on_a_step(tiny) -> None:
    diffusion, classifier = tiny
    z, image, target = inputs(diffusion, torch.float32)
    t = torch.full((len(z),), 301)
    results = []
    with torch.no_grad():
        for mode in PULLBACK_MODES:
            step = GuidedStep(diffusion, classifier, StepOptions(filter="off"), mode=mode)
            results.append(step(z, t, t - 20, target, image, target, **SCALES, angle_deg=45.0)[0])
    assert relative_error(*results).max() <= 1e-6


def test_scalars_and_per_sample_values_agree(tiny64) -> None:
    diffusion, classifier = tiny64
    z, image, target = inputs(diffusion, torch.float64, 4)
    step = GuidedStep(diffusion, classifier)
    t = torch.tensor([101, 301, 501, 701])
    b = torch.ones(4, dtype=torch.float64)
    scales = {name: value * b for name, value in SCALES.items()}
    together = step(z, t, t - 20, target, image, target, **scales, angle_deg=45.0 * b)
    for i in range(4):
        one = slice(i, i + 1)
        alone = step(z[one], t[one], t[one] - 20, target[one], image[one], target[one], **SCALES, angle_deg=45.0)
        for a, c in zip(together, alone, strict=True):
            torch.testing.assert_close(a[one], c, rtol=1e-9, atol=1e-9)


def test_z0_is_of_the_guided_noise(tiny64) -> None:
    """z_prev and z0 must imply one noise vector: z = sqrt(abar) z0 + sqrt(1 - abar) eps, and likewise z_prev."""
    diffusion, classifier = tiny64
    z, image, target = inputs(diffusion, torch.float64, 3)
    t, t_prev = torch.full((3,), 401), torch.full((3,), 381)
    z_prev, z0, _ = GuidedStep(diffusion, classifier)(z, t, t_prev, target, image, target, **SCALES, angle_deg=45.0)
    abar, abar_prev = diffusion.alphas_cumprod[401], diffusion.alphas_cumprod[381]
    eps = (z - abar.sqrt() * z0) / (1 - abar).sqrt()
    torch.testing.assert_close(z_prev, abar_prev.sqrt() * z0 + (1 - abar_prev).sqrt() * eps)


def test_unit_largest_survives_vanishing_gradients() -> None:
    v = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scaled = unit_largest(v * torch.tensor([1e-30, 1.0, 1e30]).reshape(3, 1, 1, 1))
    torch.testing.assert_close(scaled, unit_largest(v))
    assert scaled.abs().amax(dim=(1, 2, 3)).tolist() == [1, 1, 1]
    assert unit_largest(torch.zeros(1, 4, 2, 2)).abs().max() == 0


def test_certain_target_still_gets_full_guidance(tiny) -> None:
    """Once the target is certain its gradient is tiny; R still asks for a full-sized vector."""
    diffusion, classifier = tiny
    z, image, target = inputs(diffusion, torch.float32, 2)

    class Sure:
        labels, module = classifier.labels, classifier.module

        def logits(self, image: Tensor) -> Tensor:
            return classifier.logits(image)

        def log_prob(self, image: Tensor, target: Tensor) -> Tensor:
            return classifier.log_prob(image, target) * 1e-25

    t = torch.full((2,), 301)
    steps = [GuidedStep(diffusion, c, StepOptions(filter="off")) for c in (classifier, Sure())]
    a, b = (s(z, t, t - 20, target, image, target, **SCALES, angle_deg=45.0)[0] for s in steps)
    assert relative_error(b, a).max() < 1e-3


def test_frozen_leaves_modules_as_they_were() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Linear(2, 2))
    module[0].weight.requires_grad_(False)
    module[2].eval()
    before = [m.training for m in module.modules()], [p.requires_grad for p in module.parameters()]

    def fail_inside() -> None:
        with frozen(module):
            assert not any(m.training for m in module.modules())
            assert not any(p.requires_grad for p in module.parameters())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert ([m.training for m in module.modules()], [p.requires_grad for p in module.parameters()]) == before
