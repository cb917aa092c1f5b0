"""The portable C++ module and its twins for longer vectors give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.kernels import _cpu, consensus, curve, guided_update, perturb
from counterlens.kernels.dispatch import cpu_module


def runs() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    latents = torch.randn(5, 3, 4, 33, 31).unbind()
    image, saliency, grad = torch.rand(2, 3, 65, 67), torch.rand(2, 65, 67), torch.randn(2, 2, 2, 3, 65, 67)
    logits, targets = torch.randn(3, 2, 2, 100), torch.tensor([1, 2, 3])
    scales: dict[str, Any] = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.3, "backend": "cpp"}

    def soft() -> tuple[Tensor, ...]:
        x, s = image.clone().requires_grad_(), saliency.clone().requires_grad_()
        mixed = perturb.soft_perturb(x, 0.5, s, [0.2, 0.8], temperature=0.1, backend="cpp")
        return mixed.detach(), *torch.autograd.grad(mixed, (x, s), grad)

    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "soft": soft,
        "curve": lambda: curve.curve_scores(logits, targets, [0.5, 1.0], backend="cpp"),
        "perturb": lambda: (perturb.perturb(image, 0.5, saliency, [0.2, 0.8], mean=[0.4] * 3, std=[0.3] * 3),),
    }
    for mode in consensus.MODES:
        calls[f"consensus {mode}"] = lambda mode=mode: consensus.consensus_filter(
            *latents[:2], 60.0, mode=mode, backend="cpp"
        )
        calls[f"update {mode}"] = lambda mode=mode: guided_update.guided_update(
            *latents, 0.5, 0.6, angle_deg=60.0, mode=mode, **scales
        )
    return calls


@pytest.mark.skipif(not _cpu.twins(), reason="needs an x86 processor with AVX2")
def test_all_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for module in (_cpu, *[import_module(f"counterlens.kernels.{name}") for name in _cpu.twins()]):
        for package in (consensus, curve, guided_update, perturb):
            monkeypatch.setattr(package, "cpu_module", lambda module=module: module)
        results.append({name: run() for name, run in runs().items()})
    portable, *twins = results
    for name, tensors in portable.items():
        for twin in twins:
            for x, y in zip(tensors, twin[name], strict=True):
                assert torch.equal(x, y), name


def test_the_longest_vectors_are_taken() -> None:
    assert cpu_module().__name__.rpartition(".")[2] == [*_cpu.twins(), "_cpu"][0]
