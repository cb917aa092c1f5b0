"""Adapter and perturbation curve as ONNX files: the same numbers as in eager, at batches that were not traced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from counterlens.engine.cli.main import app
from counterlens.engine.errors import UsageError
from counterlens.engine.metrics.curves import perturbation_curve
from counterlens.engine.metrics.msi_score import threshold_grid
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack
from counterlens.engine.packs.architectures import StridedClassifier
from counterlens.engine.saliency.lax import new_adapter
from counterlens.engine.saliency.onnx import build_artefacts, export_adapter, export_curve, logistic
from counterlens.export.store import Store
from tests.engine.saliency.test_taps import FORMS, Net, Twice

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
SIZE = 16


@pytest.fixture(scope="module")
def classifier() -> SoftmaxClassifier:
    torch.manual_seed(0)
    return SoftmaxClassifier(StridedClassifier(classes=4, width=8).eval(), list("abcd"))


@pytest.mark.parametrize("taps", [None, []])
def test_adapter(classifier, taps, tmp_path: Path) -> None:
    adapter = new_adapter(classifier, SIZE, taps=taps, quantity="a,b/c,d")
    for name, parameter in adapter.head.named_parameters():
        if name.startswith(("gains", "out")):  # alike for all conditions before training
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    session = onnxruntime.InferenceSession(str(export_adapter(adapter, tmp_path / "lax.onnx")))
    images, target = torch.rand(5, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3, 0])
    expected = adapter.explain(images, target)
    got = session.run(None, {"image": images.numpy(), "target": target.numpy()})
    for name, value in zip(("saliency", "scores", "logits"), got, strict=True):
        assert torch.allclose(torch.from_numpy(value), getattr(expected, name), rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("name", ["tokens after registers", "tokens, batch second", "a dataclass", "in place"])
def test_adapters_on_maps_in_other_layouts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, tap = (Twice(True), "act#2") if name == "in place" else (Net(FORMS[name][0]), FORMS[name][1])
    adapter = new_adapter(SoftmaxClassifier(module.eval(), ["a", "b", "c"]), SIZE, taps=[tap])
    session = onnxruntime.InferenceSession(str(export_adapter(adapter, tmp_path / "lax.onnx")))
    images, target = torch.rand(3, 3, SIZE, SIZE), torch.arange(3)
    got = session.run(None, {"image": images.numpy(), "target": target.numpy()})
    assert torch.allclose(torch.from_numpy(got[1]), adapter.explain(images, target).scores, atol=1e-5)


def test_small_probabilities_keep_their_digits() -> None:
    odds = torch.tensor([-100.0, -60.0, -20.0, -3.0, 0.0, 20.0, 100.0])
    assert torch.allclose(logistic(odds), odds.sigmoid(), rtol=1e-5, atol=1e-38)


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


def test_artefacts_are_checked_and_found_again(classifier, tmp_path: Path) -> None:
    adapter, store = new_adapter(classifier, SIZE), Store(tmp_path)
    built = build_artefacts(adapter, store, steps=4)
    assert {name: a.report["what"] for name, a in built.items()} == {"adapter": "adapter", "curve": "curve"}
    assert all(0 <= a.report["parity"]["worst"] <= 1e-4 for a in built.values())
    again = build_artefacts(adapter, store, steps=4)
    assert {n: a.folder for n, a in again.items()} == {n: a.folder for n, a in built.items()}
    other = build_artefacts(new_adapter(classifier, SIZE, seed=1), store, steps=4)
    assert other["adapter"].folder != built["adapter"].folder
    assert other["curve"].folder == built["curve"].folder


def test_command(classifier, tmp_path: Path) -> None:
    """The pack's classifier with an adapter that was never trained: what is written can be opened."""
    clean = Pack("digits").classifier("clean")
    new_adapter(clean, 32).save(tmp_path / "adapter")
    given = ["adapter", "export", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, [*given, "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["what"] for row in rows] == ["adapter", "curve"]
    session = onnxruntime.InferenceSession(rows[1]["path"])
    assert session.get_outputs()[0].shape[1:] == [2, 16]
    result = CliRunner().invoke(app, ["adapter", "export", "--classifier", "nobody"])
    assert isinstance(result.exception, UsageError)
    assert "another one needs --adapter" in str(result.exception)
