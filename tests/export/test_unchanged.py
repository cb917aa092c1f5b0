"""Exporting leaves a model as it was: what it memoises, its weights, its flags, and the random generators."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from counterlens.export import ExportError, export_onnx
from counterlens.export.tracing import trace
from tests.export.test_onnx import run

SHARED: dict[Any, Tensor] = {}
LAST: Tensor | None = None


@functools.lru_cache(maxsize=4)
def ramp(n: int) -> Tensor:
    return torch.linspace(0, 1, n)


@functools.cache
def ones(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape)


@functools.cache
def ramps(n: int) -> tuple[dict[str, Tensor], ...]:
    return ({"ramp": torch.linspace(0, 1, n)},)


class Memo(nn.Module):
    """Adds something of its own, which it computes once and keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.cache: dict[Any, Any] = {}
        self.kept: Tensor | None = None
        self.table = nn.Buffer(torch.zeros(6))
        self.lazy: nn.Buffer | None
        self.register_buffer("lazy", None)
        self.ready = False
        self.calls = 0

    def bias(self, x: Tensor) -> Tensor:
        return torch.arange(6.0) + self.head.weight.sum(0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x + self.bias(x))


class Dict(Memo):
    def bias(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = super().bias(x)
        return self.cache["bias"]


class DictByShape(Memo):
    def bias(self, x: Tensor) -> Tensor:
        if (x.shape[1:], x.device, x.dtype) not in self.cache:
            self.cache[x.shape[1:], x.device, x.dtype] = [super().bias(x)]
        return self.cache[x.shape[1:], x.device, x.dtype][0]


class DictByBatch(Memo):
    def bias(self, x: Tensor) -> Tensor:
        if x.shape not in self.cache:
            self.cache[x.shape] = super().bias(x)
        return self.cache[x.shape]


class Attribute(Memo):
    def bias(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = super().bias(x)
        return self.kept


class NewAttribute(Memo):
    def bias(self, x: Tensor) -> Tensor:
        if not hasattr(self, "grown"):
            self.grown = super().bias(x)
        return self.grown


class EmptyBuffer(Memo):
    def bias(self, x: Tensor) -> Tensor:
        if self.lazy is None:
            self.lazy = super().bias(x)
        return self.lazy


class FilledBuffer(Memo):
    def bias(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.table.copy_(super().bias(x))
            self.ready = True
        return self.table


class ClassAttribute(Memo):
    known: dict[str, Tensor] | None = None

    def bias(self, x: Tensor) -> Tensor:
        if type(self).known is None:
            type(self).known = {"ramp": torch.linspace(0, 1, 6)}
        assert type(self).known is not None
        return type(self).known["ramp"]


class GlobalDict(Memo):
    def bias(self, x: Tensor) -> Tensor:
        if 6 not in SHARED:
            SHARED[6] = torch.linspace(0, 1, 6)
        return SHARED[6]


class GlobalName(Memo):
    def bias(self, x: Tensor) -> Tensor:
        global LAST
        if LAST is None:
            LAST = torch.linspace(0, 1, 6)
        return LAST


class CachedFunction(Memo):
    def bias(self, x: Tensor) -> Tensor:
        return ramp(x.shape[1])


class CachedStructure(Memo):
    def bias(self, x: Tensor) -> Tensor:
        return ramps(x.shape[1])[0]["ramp"]


class CachedByBatch(Memo):
    def bias(self, x: Tensor) -> Tensor:
        return ramp(x.shape[0] + 2)[:1] + super().bias(x)


class CachedByShape(Memo):
    def bias(self, x: Tensor) -> Tensor:
        return ones(tuple(x.shape)) * super().bias(x)


class CachedMethod(Memo):
    @functools.lru_cache  # noqa: B019
    def grid(self, n: int) -> Tensor:
        return torch.linspace(0, 1, n) * self.head.weight.sum(0)

    def bias(self, x: Tensor) -> Tensor:
        return self.grid(x.shape[1])


class CachedProperty(Memo):
    @functools.cached_property
    def grid(self) -> Tensor:
        return super().bias(self.table)

    def bias(self, x: Tensor) -> Tensor:
        return self.grid


KINDS = (
    Dict, DictByShape, DictByBatch, Attribute, NewAttribute, EmptyBuffer, FilledBuffer, ClassAttribute, GlobalDict,
    GlobalName, CachedFunction, CachedStructure, CachedByShape, CachedMethod, CachedProperty,
)  # fmt: skip


def gradient(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.grad(lambda v: net(v).square().sum())(x)


WARM = (Dict, ClassAttribute, CachedFunction)  # in the fast tier: of a module, of a class and of a library's wrapper
WAYS = [
    pytest.param(kind, through, warm, id=f"{kind.__name__}-{through}-{'warm' if warm else 'cold'}",
                 marks=[pytest.mark.slow] if warm and kind not in WARM else [])
    for kind in KINDS for through, warm in (("module", False), ("gradient", False), ("gradient", True))
]  # fmt: skip


@pytest.mark.parametrize(("kind", "through", "warm"), WAYS)
def test_what_forward_keeps(kind: Any, through: str, warm: bool, tmp_path: Path) -> None:
    """The file is right, and eager gives what it gave, with real tensors in every cache."""
    if kind is FilledBuffer and through == "gradient" and not warm:
        pytest.skip("eager cannot do that either")
    SHARED.clear()
    ramp.cache_clear()
    ramps.cache_clear()
    ones.cache_clear()
    torch.manual_seed(0)
    net = kind().eval().requires_grad_(False)
    x = torch.randn(3, 6)
    expected = net(x) if warm else None
    before = dict(vars(net)), dict(net.cache), dict(SHARED), LAST, net.table.clone()
    fn = net if through == "module" else gradient(net)
    path = export_onnx(fn, [torch.randn(2, 6)], tmp_path / "m.onnx")
    assert vars(net) == before[0]
    assert (net.cache, SHARED, LAST) == before[1:4]
    assert torch.equal(net.table, before[4])
    got = net(x)
    assert not isinstance(got, FakeTensor)
    assert expected is None or torch.equal(got, expected)
    torch.testing.assert_close(run(path, x)[0], fn(x))
    net(torch.randn(7, 6)), net(torch.randn(23, 6))  # the batches that were traced


def test_a_cache_that_holds_the_batch_is_refused_and_restored(tmp_path: Path) -> None:
    ramp.cache_clear()
    with pytest.raises(ExportError, match=r"keeps a tensor that is \[6\] at batch 4.*ramp\(x\.shape"):
        export_onnx(CachedByBatch().requires_grad_(False), [torch.randn(2, 6)], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    assert all(not isinstance(ramp(n + 2), FakeTensor) for n in (1, 3, 4, 7, 8, 23))


def test_what_is_drawn_once_and_kept_is_refused() -> None:
    class Projection(Memo):
        def bias(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = torch.randn(6)
            return self.kept

    net = Projection()
    with pytest.raises(ExportError, match=r"keeps a tensor .* with other values \(a random one\?\), at .*\.py:\d+"):
        trace(net, [torch.randn(2, 6)])
    assert net.kept is None
    net(torch.randn(2, 6))
    trace(net, [torch.randn(2, 6)])


def test_weights_flags_hooks_and_generators_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    net[1].eval()
    net[2].eval()
    net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones(2, 6)
    seen: list[Any] = []
    net[0].register_forward_hook(lambda *a: seen.append(a[2]))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks)) for m in net.modules()]
    wants = [(p.requires_grad, p.grad) for p in net.parameters()]
    generators = torch.get_rng_state(), random.getstate()
    export_onnx(net, [torch.randn(2, 6, generator=torch.Generator().manual_seed(1))], tmp_path / "m.onnx")
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert flags == [(m.training, len(m._forward_hooks)) for m in net.modules()]
    assert [(p.requires_grad, p.grad) for p in net.parameters()] == wants
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert seen == []


@pytest.mark.parametrize("how", ["training", "average", "clamped", "data"])
def test_a_refused_model_is_unchanged_too(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.average = nn.Buffer(torch.zeros(6))
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            if how == "training":
                return self.norm(x)
            if how == "average":
                self.average.lerp_(x.mean(0), 0.1)
                return x - self.average
            if how == "clamped":
                with torch.no_grad():
                    self.weight.clamp_(-0.1, 0.1)
            else:
                self.weight.data.clamp_(-0.1, 0.1)
            return x @ self.weight

    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ExportError, match=r"a parameter or buffer is changed in place, at .*\.py:\d+"):
        trace(net, [torch.randn(2, 6)])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_failing_trace_leaves_no_fakes() -> None:
    net = Dict()
    with pytest.raises(ExportError, match="looks at a tensor's value"):
        trace(lambda x: net(x) if net(x).sum() > 0 else x, [torch.randn(2, 6)])
    assert net.cache == {}
    assert net.calls == 0


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Levit": {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8], "patch_size": 16},  # noqa: E501
    "Beit": {"use_relative_position_bias": True},
    "Data2VecVision": {"use_relative_position_bias": True},
    "DINOv3ViT": {},
    "Swinv2": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},  # noqa: E501
}  # fmt: skip
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32, "patch_size": 8}  # fmt: skip # noqa: E501


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_that_keep_positions(name: str, tmp_path: Path) -> None:
    import transformers

    options = ARCHITECTURES[name] if name in ("Levit", "Swinv2") else VIT | ARCHITECTURES[name]
    model_type = getattr(transformers, f"{name}ForImageClassification", None) or getattr(transformers, f"{name}Model")
    torch.manual_seed(0)
    model = model_type(getattr(transformers, f"{name}Config")(**options)).eval().requires_grad_(False)
    size = options["image_size"]

    def net(x: Tensor) -> Tensor:
        out = model(x)
        return getattr(out, "logits", None) if hasattr(out, "logits") else out.pooler_output

    x = torch.rand(3, 3, size, size)
    before = net(x)
    report: dict[str, Any] = {}
    export_onnx(gradient(net), [torch.rand(2, 3, size, size)], tmp_path / "m.onnx", report=report)
    assert report["batches"] == [1, 3, 8]
    assert torch.equal(net(x), before)
    assert onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_inputs()[0].shape[0] == "batch"
