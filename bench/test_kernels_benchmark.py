"""CPU kernels under pytest-benchmark: `pytest bench/test_kernels_benchmark.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterlens.kernels.consensus import consensus_filter
from counterlens.kernels.curve import curve_scores
from counterlens.kernels.guided_update import guided_update
from counterlens.kernels.perturb import perturb, soft_perturb

BACKENDS = ["cpp", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_consensus(benchmark: Any, backend: str) -> None:
    score, reference = torch.randn(2, 16, 4, 32, 32)
    benchmark(consensus_filter, score, reference, 45.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_update(benchmark: Any, backend: str) -> None:
    latents = torch.randn(5, 16, 4, 32, 32).unbind()
    scales = {"guidance_scale": 3.0, "class_scale": 2.3, "distance_scale": 0.3, "angle_deg": 45.0}
    benchmark(guided_update, *latents, 0.5, 0.52, **scales, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturb(benchmark: Any, backend: str) -> None:
    image, saliency = torch.rand(4, 3, 224, 224), torch.rand(4, 224, 224)
    benchmark(perturb, image, 0.5, saliency, torch.linspace(0.5, 1, 20), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_perturb_and_its_backward(benchmark: Any, backend: str) -> None:
    image, saliency = torch.rand(16, 3, 32, 32), torch.rand(16, 32, 32, requires_grad=True)
    thresholds = torch.tensor([0.5, 0.7])

    def step() -> torch.Tensor:
        mixed = soft_perturb(image, 0.5, saliency, thresholds, temperature=0.1, backend=backend)
        return torch.autograd.grad(mixed.sum(), saliency)[0]

    assert benchmark(step).shape == saliency.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_curve(benchmark: Any, backend: str) -> None:
    logits, targets = torch.randn(16, 2, 16, 1000), torch.randint(0, 1000, (16,))
    benchmark(curve_scores, logits, targets, torch.linspace(0.5, 1, 16), backend=backend)
