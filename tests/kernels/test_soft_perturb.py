"""The differentiable perturbation against its reference, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.kernels.perturb import perturb, soft_perturb

THRESHOLDS = [0.3, 0.6, 1.0]


def run(
    image: Tensor, saliency: Tensor, *, image_wanted: bool = True, baseline: Any = 0.2, **kwargs: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The result, and the gradients of a fixed weighting of it."""
    image, saliency = image.clone().requires_grad_(image_wanted), saliency.clone().requires_grad_()
    result = soft_perturb(image, baseline, saliency, THRESHOLDS, temperature=0.1, **kwargs)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    (result * weights).sum().backward()
    return result.detach(), saliency.grad, image.grad


@pytest.mark.parametrize("normalise", [False, True])
def test_agrees_with_the_reference(
    backend: str,
    device: torch.device,
    shape: tuple[int, int, int, int],
    normalise: bool,
    assert_close: Callable[..., None],
) -> None:
    torch.manual_seed(0)
    image, saliency = torch.rand(shape), torch.rand(shape[0], 1, *shape[2:])
    options = {"mean": [0.4] * shape[1], "std": [0.3] * shape[1]} if normalise else {}
    actual = run(image.to(device), saliency.to(device), backend=backend, **options)
    expected = run(image.double(), saliency.double(), backend="reference", **options)
    for x, y in zip(actual, expected, strict=True):
        assert x is not None
        assert_close(x, y, 1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "expanded"])
def test_any_memory_layout(backend: str, device: torch.device, layout: str, assert_close: Callable[..., None]) -> None:
    torch.manual_seed(0)
    image, saliency = torch.rand(2, 3, 6, 7), torch.rand(2, 6, 7)
    baseline = torch.rand(2, 3, 6, 7).to(memory_format=torch.channels_last)
    if layout == "channels_last":
        image = image.to(memory_format=torch.channels_last)
    else:
        baseline = baseline[:1]
    actual = run(image.to(device), saliency.to(device), baseline=baseline.to(device), backend=backend)
    expected = run(image, saliency, baseline=baseline, backend="reference")
    for x, y in zip(actual, expected, strict=True):
        assert x is not None
        assert_close(x, y, 1e-5)


def test_half_precision_in_triton(assert_close: Callable[..., None]) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image, saliency = torch.rand(2, 3, 8, 8).half(), torch.rand(2, 8, 8)
    actual = run(image.to(device), saliency.to(device), backend="triton")
    expected = run(image.double(), saliency.double(), backend="reference")
    assert [x.dtype for x in actual if x is not None] == [torch.float16, torch.float32, torch.float16]
    for x, y in zip(actual, expected, strict=True):
        assert x is not None
        assert_close(x, y, 2**-10)


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    saliency = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, s: Tensor) -> Tensor:
        return soft_perturb(
            x, 0.2, s, [0.2, 0.6], temperature=0.2, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], backend=name
        )

    assert torch.autograd.gradcheck(function, (image, saliency))


def test_image_gradient_only_where_it_is_asked_for(backend: str, device: torch.device) -> None:
    image, saliency = torch.rand(1, 3, 4, 4, device=device), torch.rand(1, 4, 4, device=device)
    _, to_saliency, to_image = run(image, saliency, image_wanted=False, backend=backend)
    assert to_saliency is not None
    assert to_image is None


def test_cold_masks_are_hard(backend: str, device: torch.device, assert_close: Callable[..., None]) -> None:
    torch.manual_seed(0)
    image, saliency = torch.rand(1, 3, 8, 8, device=device), torch.rand(1, 8, 8, device=device)
    soft = soft_perturb(image, 0.0, saliency, THRESHOLDS, temperature=1e-7, backend=backend)
    assert soft.isfinite().all()
    assert_close(soft, perturb(image, 0.0, saliency, THRESHOLDS, backend=backend), 1e-6)


def test_allocates_no_buffer_of_the_masks_size() -> None:
    image = torch.rand(2, 1, 64, 64)
    saliency = torch.rand(2, 64, 64, requires_grad=True)
    thresholds = torch.linspace(0.1, 1, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = soft_perturb(image, 0.0, saliency, thresholds, temperature=0.1, backend="cpp")
        result.backward(torch.ones_like(result))
    output, masks = result.numel() * 4, 2 * 16 * 64 * 64 * 4
    allocated = sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)
    assert 2 * output <= allocated < 2 * output + masks / 2  # the result and its gradient; of masks, not even half


def test_empty_batch(backend: str, device: torch.device) -> None:
    image, saliency = torch.zeros(0, 3, 4, 4, device=device), torch.zeros(0, 4, 4, device=device)
    result = soft_perturb(image, 0.0, saliency, THRESHOLDS, temperature=0.1, backend=backend)
    assert result.shape == (0, 2, 3, 3, 4, 4)


def test_bad_input() -> None:
    image, saliency = torch.rand(1, 3, 4, 4), torch.rand(1, 4, 4)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a number above 0"):
            soft_perturb(image, 0.0, saliency, THRESHOLDS, temperature=temperature)
    with pytest.raises(ValueError, match="saliency: expected no NaN"):
        soft_perturb(image, 0.0, saliency * float("nan"), THRESHOLDS, temperature=1.0)
    with pytest.raises(TypeError, match="image: expected a floating dtype"):
        soft_perturb(image.long(), 0.0, saliency, THRESHOLDS, temperature=1.0)
    with pytest.raises(ValueError, match="baseline requires a gradient, which only reference gives"):
        soft_perturb(image, torch.zeros(3, requires_grad=True), saliency, THRESHOLDS, temperature=1.0, backend="cpp")


def test_compiles_as_one_graph(backend: str, device: torch.device) -> None:
    image, saliency = torch.rand(1, 3, 4, 4, device=device), torch.rand(1, 4, 4, device=device)
    thresholds = torch.tensor(THRESHOLDS, device=device)

    def function(s: Tensor) -> Tensor:
        return soft_perturb(image, 0.0, s * 0.5, thresholds, temperature=0.1, backend=backend)

    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(saliency), function(saliency))
