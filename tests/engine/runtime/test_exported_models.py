"""Guided steps of the digits pack, Stable Diffusion, the class-conditional LDM and DiT as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from counterlens.engine import Config, Engine
from counterlens.engine.config import StepOptions
from counterlens.engine.models.load import open_diffusion
from counterlens.engine.runtime import artefacts
from counterlens.engine.runtime.spec import Spec
from counterlens.export import Store, export_onnx
from tests import tiny
from tests.engine.core.test_matrix import make_classifier
from tests.tensorrt_operators import unsupported

pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", tiny.DIFFUSIONS)
def test_tiny_models_are_exported_and_match(name: str, tmp_path: Path) -> None:
    diffusion = open_diffusion(tiny.DIFFUSIONS[name](tmp_path / name))
    classifier = make_classifier(tmp_path, "module", diffusion.image_size)
    diffusion.describe(classifier.labels)
    for module in (*diffusion.modules(), classifier.module):
        module.requires_grad_(False)
    built = artefacts.build(Spec(diffusion, classifier), "onnx", Store(tmp_path / "store"))
    assert built.report["parity"]["worst"] <= 1e-4
    assert unsupported(onnx.load(built.file("model.onnx"))) == []


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The digits pack's step as its default settings run it, through the engine."""
    store = tmp_path_factory.mktemp("store")
    engine = Engine.from_pack("digits", config=Config(), runtime="onnxruntime", store=store)
    engine.warmup([1, 16])
    return engine


def test_digits_whole_runs_flip_alike(digits: Any) -> None:
    from counterlens.engine.packs import Pack

    images = Pack("digits").samples("test", count=100, marker="random").images
    eager = Engine.from_pack("digits", config=Config(), runtime="eager").counterfactual(images)
    compiled = digits.counterfactual(images)
    close = (eager.images - compiled.images).abs().flatten(1).amax(1) < 1e-4
    assert close.double().mean() >= 0.9
    assert (eager.flipped == compiled.flipped).sum() >= 99


def test_digits_operators_are_documented_for_tensorrt(digits: Any) -> None:
    spec = Spec(digits.diffusion, digits.classifier, options=StepOptions(gradient="detached"))
    built = artefacts.build(spec, "onnx", digits.store)  # in the store already
    assert built.report["parity"]["worst"] <= 1e-4
    assert unsupported(onnx.load(built.file("model.onnx"))) == []


def test_exact_digits_step_stays_inside_tensorrts_documentation(digits: Any, tmp_path: Path) -> None:
    """Traced and written only: its parity is a figure of `python -m bench.runtimes`."""
    spec = Spec(digits.diffusion, digits.classifier)
    path = export_onnx(spec.function(), spec.example(2), tmp_path / "exact.onnx", input_names=spec.inputs)
    model = onnx.load(path)
    assert unsupported(model) == []
    assert len(model.graph.node) > 3000


def test_aoti_package(tmp_path: Path) -> None:
    """Compiled ahead of time and loaded again; the guided step takes many minutes, so a part of the models."""
    from tests.conftest import make_tiny

    spec = Spec(*make_tiny(), what="classifier")
    built = artefacts.build(spec, "aoti", Store(tmp_path))
    assert built.report["parity"]["worst"] <= 1e-4
    image = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(artefacts.open_function(built)(image)[0], spec.function()(image))
