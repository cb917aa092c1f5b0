"""Curve scores against their reference, and against hand-worked curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.kernels.curve import curve_scores

NAMES = ("probability", "insertion", "deletion", "base_score")


@pytest.mark.parametrize("size", [(3, 1, 2), (2, 5, 7), (1, 16, 1000), (2, 20, 1), (1, 100, 33)], ids=str)
def test_agrees_with_the_reference(
    backend: str, device: torch.device, size: tuple[int, int, int], assert_close: Callable[..., None]
) -> None:
    n, k, classes = size
    torch.manual_seed(0)
    logits, targets = torch.randn(n, 2, k, classes) * 5, torch.randint(0, classes, (n,))
    thresholds = (torch.arange(1, k + 1) / k).square()  # uneven
    actual = curve_scores(logits.to(device), targets.to(device), thresholds.to(device), backend=backend)
    expected = curve_scores(logits.double(), targets, thresholds.double(), backend="reference")
    for name in NAMES[:3]:
        assert_close(getattr(actual, name), getattr(expected, name), 2e-6)
    assert (actual.base_score.cpu() - expected.base_score).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(backend: str, device: torch.device, dtype: torch.dtype, assert_close: Callable[..., None]) -> None:
    torch.manual_seed(0)
    logits, targets = (torch.randn(2, 2, 4, 10) * 5).to(dtype), torch.tensor([3, 9])
    actual = curve_scores(logits.to(device), targets.to(device), [0.1, 0.2, 0.6, 1.0], backend=backend)
    expected = curve_scores(logits.double(), targets, [0.1, 0.2, 0.6, 1.0], backend="reference")
    assert actual.probability.dtype == torch.float32
    assert_close(actual.probability, expected.probability, 2e-6)


def logits_of(probability: list[list[float]], device: torch.device | str = "cpu") -> Tensor:
    """Two classes whose first has these probabilities: [1, 2, K, 2]."""
    p = torch.tensor([probability], dtype=torch.float32, device=device)
    return torch.stack([p.log(), (1 - p).log()], -1)


@pytest.mark.parametrize("name", ["cpp", "triton", "reference"])
def test_curves_worked_by_hand(name: str) -> None:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    logits = logits_of([[1.0, 0.5, 0.0], [0.0, 0.2, 0.4]], device)
    targets = torch.zeros(1, dtype=torch.long, device=device)
    scores = curve_scores(logits, targets, [0.5, 0.6, 1.0], backend=name)
    insertion = (1.0 + (0.1 * 0.75 + 0.4 * 0.25) / 0.5) / 2
    deletion = (0.0 + (0.1 * 0.1 + 0.4 * 0.3) / 0.5) / 2
    assert scores.insertion.item() == pytest.approx(insertion, abs=1e-6)
    assert scores.deletion.item() == pytest.approx(deletion, abs=1e-6)
    assert scores.base_score.item() == pytest.approx(insertion - deletion, abs=1e-6)
    one = curve_scores(logits[:, :, :1], targets, [1.0], backend=name)
    assert one.base_score.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["cpp", "triton", "reference"])
def test_any_logits(name: str) -> None:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[inf, 0.0, inf], [-inf, -inf, -inf], [1e38, -1e38, 0.0], [nan, 1.0, 2.0]], device=device)
    logits = rows[:, None, None].expand(4, 2, 1, 3)
    scores = curve_scores(logits, torch.zeros(4, dtype=torch.long, device=device), [0.5], backend=name)
    for side in range(2):
        assert scores.probability[:3, side, 0].tolist() == pytest.approx([0.5, 1 / 3, 1.0])
        assert scores.probability[3, side, 0].isnan()
    assert scores.base_score[:3].tolist() == [0, 0, 0]


def test_strided_logits(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    dense = torch.randn(2, 2, 3, 6, device=device)
    strided = dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    targets = torch.tensor([1, 4], device=device)
    for x, y in zip(
        curve_scores(dense, targets, [0.1, 0.5, 1.0], backend=backend),
        curve_scores(strided, targets, [0.1, 0.5, 1.0], backend=backend),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_empty_batch(backend: str, device: torch.device) -> None:
    scores = curve_scores(
        torch.zeros(0, 2, 3, 5, device=device), torch.zeros(0, dtype=torch.long, device=device), [0.1, 0.5, 1.0],
        backend=backend,
    )  # fmt: skip
    assert [getattr(scores, name).shape for name in NAMES] == [(0, 2, 3), (0,), (0,), (0,)]


def test_bad_input() -> None:
    good: dict[str, Any] = {
        "logits": torch.zeros(2, 2, 3, 5), "targets": torch.tensor([0, 4]), "thresholds": [0.1, 0.5, 1.0],
    }  # fmt: skip

    def bad(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            curve_scores(**{**good, **changes})

    bad(r"logits: expected \[N, 2, K, classes\]", logits=torch.zeros(2, 1, 3, 5))
    bad("logits: expected a floating dtype", TypeError, logits=torch.zeros(2, 2, 3, 5).long())
    bad(r"targets: expected \[2\], got \[3\]", targets=torch.zeros(3).long())
    bad("targets: expected int64", TypeError, targets=torch.zeros(2))
    bad("targets: expected classes from 0 to 4, got 0 to 5", targets=torch.tensor([0, 5]))
    bad("thresholds: expected 3 of them", thresholds=[0.1, 0.5])
    bad("thresholds: expected strictly increasing", thresholds=[0.1, 0.5, 0.4])
    bad("targets: expected logits' device cpu, got meta", targets=torch.zeros(2, device="meta").long())


def test_compiles_as_one_graph(backend: str, device: torch.device) -> None:
    logits, targets = torch.randn(2, 2, 3, 5, device=device), torch.tensor([0, 4], device=device)
    thresholds = torch.tensor([0.1, 0.5, 1.0], device=device)

    def run(x: Tensor) -> Tensor:
        return curve_scores(x * 2, targets, thresholds, backend=backend).base_score

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(logits), run(logits))
