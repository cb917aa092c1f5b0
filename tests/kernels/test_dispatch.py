"""A backend that was asked for runs or raises; `auto` says what it takes."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import Tensor

from counterlens.kernels import dispatch, registry
from counterlens.kernels.consensus import consensus_filter
from counterlens.kernels.dispatch import BackendError, choose_backend


def vectors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)


def test_auto_prefers_cpp_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COUNTERLENS_BACKEND", raising=False)
    assert choose_backend("op", "auto", torch.zeros(1), lambda name: []) == "cpp"
    assert choose_backend("op", "auto", torch.zeros(1), lambda name: ["broken"] * (name == "cpp")) == "reference"


def test_the_variable_and_the_argument_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERLENS_BACKEND", "reference")
    assert choose_backend("op", "auto", torch.zeros(1), lambda name: []) == "reference"
    assert choose_backend("op", "cpp", torch.zeros(1), lambda name: []) == "cpp"


@pytest.mark.parametrize("by_variable", [False, True])
def test_what_was_asked_for_and_cannot_run_raises_with_every_reason(
    monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    monkeypatch.setenv("COUNTERLENS_BACKEND", "cpp" if by_variable else "auto")
    with pytest.raises(BackendError, match="op: backend 'cpp' cannot run: one; two"):
        choose_backend("op", "auto" if by_variable else "cpp", torch.zeros(1), lambda name: ["one", "two"])


def test_an_unknown_backend_raises() -> None:
    with pytest.raises(BackendError, match="expected auto, triton, cpp, reference, got 'cuda'"):
        consensus_filter(*vectors(), 45.0, backend="cuda")


def test_float64_and_gradients_are_refused_by_name_and_taken_by_auto() -> None:
    score, reference = vectors()
    with pytest.raises(BackendError, match="score is float64, triton takes"):
        consensus_filter(score.double(), reference.double(), 45.0, backend="triton")
    with pytest.raises(BackendError, match="an input requires a gradient and cpp has no backward"):
        consensus_filter(score.requires_grad_(), reference, 45.0, backend="cpp")
    filtered, _ = consensus_filter(score, reference, 45.0)
    assert filtered.requires_grad


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="there is no CUDA device"):
        consensus_filter(*vectors(), 45.0, backend="triton")


def test_export_swaps_in_the_reference() -> None:
    class Filter(torch.nn.Module):
        def forward(self, score: Tensor, reference: Tensor) -> Tensor:
            return consensus_filter(score, reference, 45.0)[0]

    score, reference = vectors()
    program = torch.export.export(Filter(), (score, reference))
    assert not any("counterlens" in str(node.target) for node in program.graph.nodes)
    expected, _ = consensus_filter(score, reference, 45.0, backend="reference")
    assert torch.equal(program.module()(score, reference), expected)


def test_registry_lists_every_operation_and_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COUNTERLENS_BACKEND", raising=False)
    for path in registry.OPERATIONS:
        module, _, name = path.partition(":")
        function = getattr(importlib.import_module(f"counterlens.kernels.{module}"), name)
        assert inspect.signature(function).parameters["backend"].default == "auto"
    operations = registry.operations()
    assert [op.name for op in operations] == [path.partition(":")[2] for path in registry.OPERATIONS]
    assert all(op.reasons.keys() == set(dispatch.BACKENDS) for op in operations)
    assert all(op.reasons["reference"] == [] for op in operations)
    if not torch.cuda.is_available():
        assert all((op.automatic, op.why) == ("cpp", "preferred on CPU tensors") for op in operations)
    monkeypatch.setattr(registry, "environment_reasons", lambda name: [] if name == "reference" else ["gone"])
    assert registry.operations()[0].automatic == "reference"
    assert "gone" in registry.operations()[0].why
    monkeypatch.setenv("COUNTERLENS_BACKEND", "reference")
    assert registry.operations()[0].why == "COUNTERLENS_BACKEND asks for it"
