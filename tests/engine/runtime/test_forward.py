"""A classifier's forward pass through ONNX Runtime: the same metrics, and clear refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from counterlens.engine.errors import UsageError
from counterlens.engine.metrics import msi
from counterlens.engine.models.image_classifiers import wrap_classifier
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs.architectures import StridedClassifier
from counterlens.engine.runtime.forward import compile_classifier, forward_by
from counterlens.export.errors import ExportError
from counterlens.export.store import Store

for package in ("onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs {package}: pip install '.[cpu]'")
onnx = pytest.importorskip("counterlens.export.onnx")

SIZE = 16


def make(width: int = 8) -> SoftmaxClassifier:
    torch.manual_seed(0)
    return SoftmaxClassifier(StridedClassifier(width=width, classes=4).eval(), list("abcd"))


def test_metrics_are_the_same(tmp_path: Path) -> None:
    classifier, g = make(), torch.Generator().manual_seed(1)
    images, maps = torch.rand((5, 3, SIZE, SIZE), generator=g), torch.rand((5, SIZE, SIZE), generator=g)
    compiled = compile_classifier(classifier, SIZE, store=Store(tmp_path))
    assert compiled.labels == classifier.labels
    assert compiled.logits(images).requires_grad is False
    for batch_size in (1, 7):
        ours = msi(compiled, images, maps, steps=4, batch_size=batch_size)
        eager = msi(classifier, images, maps, steps=4, batch_size=batch_size)
        assert torch.equal(ours.curves.target, eager.curves.target)
        assert torch.allclose(ours.score, eager.score, atol=1e-5)
    assert classifier.logits(images).requires_grad  # left as it was


def test_it_is_built_once_for_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_classifier(make(), SIZE, store=Store(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "export_onnx", None)
        compile_classifier(make(), SIZE, store=Store(tmp_path))
    compile_classifier(make(16), SIZE, store=Store(tmp_path))
    assert len(Store(tmp_path).entries()) == 2


def test_equal_weights_are_not_yet_the_same_model(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module, by: float) -> None:
            super().__init__()
            self.inner, self.by = inner, by

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.by

    net, store, images = make().module, Store(tmp_path), torch.rand(2, 3, SIZE, SIZE)
    plain, scaled = (
        wrap_classifier(net, list("abcd"), image_size=SIZE, mean=[m] * 3, std=[s] * 3)
        for m, s in ((0.0, 1.0), (0.5, 0.25))
    )
    shifted = [SoftmaxClassifier(Shifted(net, by).eval(), list("abcd")) for by in (0.0, 2.0)]
    for classifier in (plain, scaled, *shifted, plain):
        compiled = compile_classifier(classifier, SIZE, store=store)
        assert torch.allclose(compiled.logits(images), classifier.logits(images), atol=1e-5)


def test_what_does_not_agree_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnx.export_onnx
    monkeypatch.setattr(onnx, "export_onnx", lambda fn, *rest, **named: real(lambda x: fn(x) * 1.01, *rest, **named))
    with pytest.raises(ExportError, match="does not agree with eager"):
        compile_classifier(make(), SIZE, store=Store(tmp_path))
    assert not Store(tmp_path).entries()


def test_what_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(self.weight * x.flatten(2))

    with pytest.raises(ExportError, match=r"svd.*no ONNX form"):
        compile_classifier(SoftmaxClassifier(Sorts(), list("abc")), SIZE, store=Store(tmp_path))
    half = make()
    half.module.half()
    with pytest.raises(ExportError, match=r"features\.0\.weight is torch\.float16 on cpu"):
        compile_classifier(half, SIZE, store=Store(tmp_path))
    compiled = compile_classifier(make(), SIZE, store=Store(tmp_path))
    for wrong, message in (
        (torch.rand(1, 3, 8, 8), r"expected \[B, 3, 16, 16\], got \[1, 3, 8, 8\]"),
        (torch.rand(1, 3, SIZE, SIZE).double(), "expected float32"),
        (torch.rand(1, 3, SIZE, SIZE, requires_grad=True), "no gradient"),
    ):
        with pytest.raises(UsageError, match=message):
            compiled.logits(wrong)
    with pytest.raises(UsageError, match="runtime: expected eager or onnxruntime"):
        forward_by("tensorrt", make(), SIZE)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match="onnx cannot be imported"):
        compile_classifier(make(), SIZE, store=Store(tmp_path))
    classifier = make()
    assert forward_by("eager", classifier, SIZE) is classifier
