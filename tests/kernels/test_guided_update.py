"""The guided update against its reference, on every edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterlens.kernels.consensus import MODES
from counterlens.kernels.guided_update import guided_update

NAMES = ("z", "eps_uncond", "eps_cond", "grad_class", "grad_distance")
ALPHA, ALPHA_PREV = 0.3, 0.35
SCALES: dict[str, Any] = {"guidance_scale": 3.0, "class_scale": 2.3, "distance_scale": 0.3, "angle_deg": 60.0}
# Of z_prev, relative to the sample's largest magnitude; z0's is larger by 1 / sqrt(alphas_cumprod).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def latents(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name in NAMES}


def update(inputs: dict[str, Tensor], device: torch.device | str = "cpu", **kwargs: Any) -> tuple[Tensor, ...]:
    arguments: dict[str, Any] = {"alphas_cumprod_t": ALPHA, "alphas_cumprod_prev": ALPHA_PREV, **SCALES, **kwargs}
    return guided_update(**{name: x.to(device) for name, x in inputs.items()}, **arguments)


def oracle(inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, ...]:
    return update({name: x.double().cpu() for name, x in inputs.items()}, backend="reference", **kwargs)


def steer_clear(inputs: dict[str, Tensor], near_limit: Callable[..., Tensor]) -> None:
    """One location at the limit rescales its whole sample: move those locations to the reference's direction."""
    direction = inputs["eps_cond"] - inputs["eps_uncond"]
    close = near_limit(-inputs["grad_class"], direction, SCALES["angle_deg"])
    assert close.float().mean() < 0.01
    inputs["grad_class"] = torch.where(close[:, None], -direction, inputs["grad_class"])


@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(
    backend: str,
    device: torch.device,
    shape: tuple[int, int, int, int],
    mode: str,
    assert_close: Callable[..., None],
    near_limit: Callable[..., Tensor],
) -> None:
    inputs = latents(shape)
    steer_clear(inputs, near_limit)
    z_prev, z0, kept = update(inputs, device, mode=mode, backend=backend)
    expected = oracle(inputs, mode=mode)
    assert_close(z_prev, expected[0], TOLERANCE[torch.float32])
    assert_close(z0, expected[1], TOLERANCE[torch.float32] / ALPHA**0.5)
    assert_close(kept, expected[2], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Callable[..., None],
    near_limit: Callable[..., Tensor],
) -> None:
    inputs = latents((2, 16, 8, 8), dtype=dtype)
    steer_clear(inputs, near_limit)
    z_prev, z0, kept = update(inputs, device, backend=backend)
    assert (z_prev.dtype, z0.dtype, kept.dtype) == (dtype, dtype, torch.float32)
    expected = oracle(inputs)
    assert_close(z_prev, expected[0], TOLERANCE[dtype])
    assert_close(z0, expected[1], TOLERANCE[dtype])


def test_double_precision_in_cpp(assert_close: Callable[..., None]) -> None:
    inputs = {name: x.double() for name, x in latents((3, 4, 9, 7)).items()}
    for mode in MODES:
        for actual, expected in zip(update(inputs, mode=mode, backend="cpp"), oracle(inputs, mode=mode), strict=True):
            assert actual.dtype == torch.float64
            assert_close(actual, expected, 1e-12)


def test_chunks_and_a_value_per_sample(backend: str, device: torch.device, assert_close: Callable[..., None]) -> None:
    inputs = latents((3, 4, 8, 12))
    values = {
        "alphas_cumprod_t": torch.tensor([0.2, 0.5, 0.99]),
        "alphas_cumprod_prev": torch.tensor([0.3, 0.6, 1.0]),
        "guidance_scale": torch.tensor([3.0, 1.0, 0.0]),
        "class_scale": torch.tensor([2.0, 0.0, 1.0]),
        "distance_scale": torch.tensor(0.5),
        "angle_deg": torch.tensor([85.0, 90.0, 95.0]),
    }
    on_device = {name: value.to(device) for name, value in values.items()}
    actual = update(inputs, device, chunk=2, backend=backend, **on_device)
    expected = oracle(inputs, chunk=2, **values)
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, 3e-5)


def test_numbers_and_tensors_give_the_same(backend: str, device: torch.device) -> None:
    inputs = latents((2, 4, 8, 8))
    tensors = {name: torch.full((2,), value).to(device) for name, value in SCALES.items() if name != "angle_deg"}
    for x, y in zip(update(inputs, device, backend=backend), update(inputs, device, backend=backend, **tensors)):  # noqa: B905
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)


def test_tiny_gradients_still_give_full_sized_vectors(
    backend: str, device: torch.device, assert_close: Callable[..., None], near_limit: Callable[..., Tensor]
) -> None:
    inputs = latents((2, 4, 8, 8))
    steer_clear(inputs, near_limit)
    expected = update(inputs, device, backend=backend)
    inputs["grad_class"] = inputs["grad_class"] * 1e-30
    inputs["grad_distance"] = inputs["grad_distance"] * 1e-30
    for x, y in zip(update(inputs, device, backend=backend), expected, strict=True):
        assert_close(x, y, 1e-5)


def test_large_gradients_do_not_overflow(backend: str, device: torch.device) -> None:
    inputs = latents((2, 4, 8, 8))
    inputs["grad_class"] = inputs["grad_class"] * 1e30
    assert all(x.isfinite().all() for x in update(inputs, device, backend=backend))


def test_zero_gradients_leave_the_unguided_step(
    backend: str, device: torch.device, assert_close: Callable[..., None]
) -> None:
    inputs = latents((2, 4, 8, 8))
    inputs["grad_class"].zero_()
    inputs["grad_distance"].zero_()
    z_prev, z0, kept = update(inputs, device, backend=backend)
    clean = (inputs["z"] - (1 - ALPHA) ** 0.5 * inputs["eps_uncond"]) / ALPHA**0.5
    assert_close(z0, clean, 1e-6)
    assert_close(z_prev, ALPHA_PREV**0.5 * clean + (1 - ALPHA_PREV) ** 0.5 * inputs["eps_uncond"], 1e-6)
    assert torch.equal(kept.cpu(), torch.ones(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["grad_class", "grad_distance", "eps_cond"])
def test_broken_values_stay_in_their_sample(backend: str, device: torch.device, value: float, name: str) -> None:
    inputs = latents((3, 4, 8, 8))
    whole = update(inputs, device, backend=backend)
    inputs[name][1, 2, 3, 4] = value
    broken = update(inputs, device, backend=backend)
    for x, y in zip(whole, broken, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    assert broken[0][1].isnan().all()
    expected = oracle(inputs)
    assert expected[0][1].isnan().all()


def test_neighbours_do_not_matter(backend: str, device: torch.device) -> None:
    inputs = latents((4, 4, 8, 8))
    swapped = {name: x[[2, 0, 3, 1]] for name, x in inputs.items()}
    for x, y in zip(update(inputs, device, backend=backend), update(swapped, device, backend=backend), strict=True):
        assert torch.equal(x[[2, 0, 3, 1]], y)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_any_memory_layout(backend: str, device: torch.device, layout: str) -> None:
    inputs = latents((2, 4, 6, 6))
    dense = update(inputs, device, backend=backend)
    for name in NAMES:
        x = inputs[name]
        if layout == "channels_last":
            inputs[name] = x.to(memory_format=torch.channels_last)
        else:
            inputs[name] = torch.cat([x, x], 2)[:, :, :6]
    for x, y in zip(dense, update(inputs, device, backend=backend), strict=True):
        assert torch.equal(x, y)


def test_large_latents_in_threads(assert_close: Callable[..., None], near_limit: Callable[..., Tensor]) -> None:
    inputs = latents((3, 16, 64, 64))  # above a MiB of output, so that C++ starts threads
    steer_clear(inputs, near_limit)
    for x, y in zip(update(inputs, backend="cpp"), oracle(inputs), strict=True):
        assert_close(x, y, 1e-5 / ALPHA**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_largest_latent_in_two_phases(
    mode: str, assert_close: Callable[..., None], near_limit: Callable[..., Tensor]
) -> None:
    inputs = latents((1, 16, 128, 128))
    steer_clear(inputs, near_limit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for x, y in zip(update(inputs, device, mode=mode, backend="triton"), oracle(inputs, mode=mode), strict=True):
        assert_close(x, y, 1e-5 / ALPHA**0.5)


def test_64_bit_addresses(backend: str, device: torch.device) -> None:
    """Samples 2^31 elements apart; the pages in between are never touched."""
    inputs = latents((2, 1, 4, 4), dtype=torch.float16)
    expected = update(inputs, device, backend=backend)
    storage = torch.UntypedStorage(2 * (2**31 + 16), device=device)
    far = torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, (2, 1, 4, 4), (2**31, 16, 4, 1))  # type: ignore[call-overload]
    far.copy_(inputs["z"])
    inputs["z"] = far
    for x, y in zip(update(inputs, device, backend=backend), expected, strict=True):
        assert torch.equal(x, y)


def test_empty_batch(backend: str, device: torch.device) -> None:
    z_prev, z0, kept = update(latents((0, 4, 6, 6)), device, backend=backend)
    assert z_prev.shape == z0.shape == (0, 4, 6, 6)
    assert kept.shape == (0,)


@settings(max_examples=8, deadline=None)
@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 1000))
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_the_step_does_not_depend_on_the_gradients_scale(name: str, p: int, q: int, seed: int) -> None:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    inputs = latents((1, 4, 6, 6), seed)
    expected = update(inputs, device, backend=name)
    inputs["grad_class"] = inputs["grad_class"] * 2.0**p
    inputs["grad_distance"] = inputs["grad_distance"] * 2.0**q
    for x, y in zip(update(inputs, device, backend=name), expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)


def test_bad_input() -> None:
    inputs = latents((2, 4, 6, 6))
    with pytest.raises(ValueError, match=r"grad_class: expected z's shape \[2, 4, 6, 6\], got \[1, 4, 6, 6\]"):
        update(inputs | {"grad_class": inputs["grad_class"][:1]})
    with pytest.raises(TypeError, match=r"eps_cond: expected z's dtype torch\.float32, got torch\.float16"):
        update(inputs | {"eps_cond": inputs["eps_cond"].half()})
    with pytest.raises(ValueError, match=r"z: expected \[B, C, H, W\], got \[4, 6, 6\]"):
        update(inputs | {"z": inputs["z"][0]})
    with pytest.raises(TypeError, match=r"z: expected a floating dtype, got torch\.int64"):
        update(inputs | {"z": inputs["z"].long()})
    with pytest.raises(ValueError, match=r"alphas_cumprod_t: expected values in \(0, 1\]"):
        update(inputs, alphas_cumprod_t=0.0)
    with pytest.raises(ValueError, match=r"alphas_cumprod_prev: expected values in \(0, 1\]"):
        update(inputs, alphas_cumprod_prev=torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"class_scale: expected a number or \[2\], got \[3\]"):
        update(inputs, class_scale=torch.zeros(3))
    with pytest.raises(ValueError, match="chunk: expected a divisor"):
        update(inputs, chunk=4)
    with pytest.raises(ValueError, match="mode: expected one of"):
        update(inputs, mode="none")


def test_compiles_as_one_graph(backend: str, device: torch.device) -> None:
    inputs = {name: x.to(device) for name, x in latents((2, 4, 8, 8)).items()}

    def run(alphas: Tensor) -> tuple[Tensor, ...]:
        return update(inputs, device, alphas_cumprod_t=alphas, backend=backend)

    alphas = torch.tensor([0.4, 0.5], device=device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(alphas), run(alphas), strict=True):
        assert torch.equal(actual, expected)
