"""Backends, shapes and poisoned buffers for the kernel tests. See ../../conftest.py for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

SHAPES = [(1, 3, 64, 64), (5, 4, 33, 31), (2, 16, 8, 8)]


@pytest.fixture(params=["cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """A compiled backend. Fails, and does not skip, where one cannot run: both are part of what is promised."""
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's tensors live."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    """Odd shapes."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned_buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised buffer that our code asks for is full of NaN (or of 127, or of true)."""
    if "compiles" in request.node.name:
        return  # a patched torch.empty cannot be traced

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            buffer = allocate(*args, **kwargs)
            if type(buffer) is Tensor:
                value = float("nan") if buffer.is_floating_point() else True if buffer.dtype == torch.bool else 127
                buffer.fill_(value)
            return buffer

        return poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Compare sample by sample, relative to the sample's largest magnitude; NaN only where NaN is expected."""

    def check(actual: Tensor, expected: Tensor, tolerance: float | Tensor) -> None:
        assert actual.shape == expected.shape
        actual, expected = actual.double().cpu(), expected.double().cpu()
        assert torch.equal(actual.isnan(), expected.isnan())
        if actual.numel() == 0:
            return
        n = len(expected)
        error = (actual - expected).nan_to_num(0, 0, 0).abs().reshape(n, -1).amax(1)
        largest = expected.nan_to_num(0, 0, 0).abs().reshape(n, -1).amax(1)
        assert (error <= tolerance * largest + 1e-12).all(), f"error {error} beside largest magnitude {largest}"

    return check


@pytest.fixture
def near_limit() -> Callable[..., Tensor]:
    """Per location, whether its angle is within 1e-3 rad of the limit: there, rounding may decide: [B, H, W]."""

    def check(score: Tensor, reference: Tensor, angle_deg: float, chunk: int = 1) -> Tensor:
        def vectors(x: Tensor) -> Tensor:
            return torch.nn.functional.unfold(x.double(), chunk, stride=chunk).transpose(1, 2)  # [B, locations, D]

        s, r = vectors(score), vectors(reference)
        angle = torch.nn.functional.cosine_similarity(s, r, dim=2, eps=0).clamp(-1, 1).acos()
        close = (angle - torch.pi * angle_deg / 180).abs() < 1e-3
        return close.reshape(score.shape[0], score.shape[2] // chunk, score.shape[3] // chunk)

    return check
