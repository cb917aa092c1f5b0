"""Adapter and perturbation curve as ONNX files: the same numbers as in eager, at batches that were not traced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterlens.engine.adapter.exporting import export_adapter, export_curve
from counterlens.engine.adapter.lax import new_adapter
from counterlens.engine.metrics.curves import perturbation_curve
from counterlens.engine.metrics.msi_score import threshold_grid
from counterlens.engine.models.classifiers import StridedClassifier
from counterlens.engine.models.protocols import SoftmaxClassifier

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
SIZE = 16


@pytest.fixture(scope="module")
def classifier() -> SoftmaxClassifier:
    torch.manual_seed(0)
    return SoftmaxClassifier(StridedClassifier(classes=4, width=8).eval(), list("abcd"))


@pytest.mark.parametrize("taps", [None, []])
def test_adapter(classifier, taps, tmp_path: Path) -> None:
    adapter = new_adapter(classifier, SIZE, taps=taps, quantity="a,b/c,d")
    torch.nn.init.normal_(adapter.head.condition[0].weight)
    session = onnxruntime.InferenceSession(str(export_adapter(adapter, tmp_path / "lax.onnx")))
    images, target = torch.rand(5, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3, 0])
    expected = adapter.explain(images, target)
    got = session.run(None, {"image": images.numpy(), "target": target.numpy()})
    for name, value in zip(("saliency", "scores", "logits"), got, strict=True):
        assert torch.allclose(torch.from_numpy(value), getattr(expected, name), rtol=1e-4, atol=1e-4), name


def test_curve(classifier, tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(str(export_curve(classifier, SIZE, tmp_path / "curve.onnx", steps=5)))
    images, saliency, target = torch.rand(3, 3, SIZE, SIZE), torch.rand(3, SIZE, SIZE), torch.tensor([3, 1, 2])
    hidden = torch.full_like(images, 0.3)
    given = {"image": images, "baseline": hidden, "saliency": saliency, "target": target}
    got = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in given.items()})[0])
    curves = perturbation_curve(
        classifier, images, saliency, target, baseline=hidden, thresholds=threshold_grid(0.5, 5), normalize="none"
    )
    assert torch.allclose(got[:, 0].double(), curves.keep, atol=1e-5)
    assert torch.allclose(got[:, 1].double(), curves.remove, atol=1e-5)
