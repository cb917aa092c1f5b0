"""A classifier, its adapter and MSI as one file: the metric's own numbers, and answers without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images.files import save_png
from counterlens.engine.metrics.msi_score import msi
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.image_classifiers import wrap_classifier
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack
from counterlens.engine.packs.architectures import StridedClassifier
from counterlens.engine.portable.file import SALIENCY, CounterfactualFile, SaliencyFile, card_of
from counterlens.engine.saliency.explain import pack_adapter
from counterlens.engine.saliency.lax import LAX, new_adapter
from counterlens.engine.saliency.one_file import CURVES, export_saliency, saliency_program
from counterlens.export.errors import ExportError
from counterlens.export.program import Values, run

pytest.importorskip("onnxruntime", reason="needs onnxruntime")
SIZE = 16


def answer(adapter: LAX, images: torch.Tensor, target: list[int], baseline: object, **options: object) -> Values:
    program = saliency_program(adapter, baseline, **options)
    with frozen(adapter.classifier.module, adapter.head), torch.no_grad():
        return run(program, {"image": images, "target": torch.tensor(target)})


@pytest.mark.parametrize(
    ("name", "quantity", "alpha_min", "steps"),
    [("clean", "class", 0.5, 16), ("shortcut", "0,1,2,3,4/5,6,7,8,9", 0.4, 3), ("shortcut", "class", 0.5, 1)],
)
def test_the_programs_numbers_are_the_metrics(name: str, quantity: str, alpha_min: float, steps: int) -> None:
    pack = Pack("digits")
    classifier = pack.classifier(name)
    adapter = pack_adapter(pack, name, classifier, quantity)
    images = pack.samples("test", count=4).images
    got = answer(adapter, images, [-1, -1, 3, 9], pack.mean_colour, alpha_min=alpha_min, steps=steps)
    first = classifier.logits(images).argmax(1)
    maps = adapter.explain(images, torch.tensor([int(first[0]), int(first[1]), 3, 9]))
    scored = msi(
        classifier, images, maps.saliency, maps.target, alpha_min=alpha_min, steps=steps, scores=maps.scores,
        quantity=adapter.quantity, baseline=pack.mean_colour,
    )  # fmt: skip
    assert torch.equal(got["prediction"], first)
    assert torch.equal(got["resolved_target"], maps.target)
    by_area = scored.area_curves
    assert by_area is not None
    expected = {
        "saliency": maps.saliency, "scores": maps.scores, "logits": maps.logits, "probability": scored.curves.full,
        "msi": scored.score, "base_score": scored.base_score, "mask_area": scored.mask_penalty,
        "base_score_area": scored.base_score_area, "sufficient_area": scored.sufficient_area,
        "keep": scored.curves.keep, "remove": scored.curves.remove, "keep_area": by_area.keep,
        "remove_area": by_area.remove,
    }  # fmt: skip
    for key, value in expected.items():
        torch.testing.assert_close(
            got[key], value.float(), rtol=1e-5, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}"
        )


@pytest.fixture(scope="module")
def adapter() -> LAX:
    torch.manual_seed(0)
    classifier = SoftmaxClassifier(StridedClassifier(classes=4, width=8).eval(), list("abcd"))
    return new_adapter(classifier, SIZE)


@pytest.fixture(scope="module")
def folder(adapter: LAX, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("where")
    card = export_saliency(adapter, out, baseline="mean", steps=3)
    assert card["parity"]["predictions_equal"] >= 63 / 64
    assert card["parity"]["msi_within_0.001"] >= 0.98
    assert "random" in card["parity"]["warning"]
    with pytest.raises(UsageError, match="steps was 3, is 4"):
        export_saliency(adapter, out, baseline="mean", steps=4)
    return out


def test_a_file_answers_as_the_program_does(adapter: LAX, folder: Path) -> None:
    images = torch.rand((5, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    images[3, 0, 0, 0], images[4] = torch.nan, 2.0
    maps = SaliencyFile(folder / SALIENCY, threads=1).run(images.numpy(), ["prediction", "d", 1, "a", "a"])
    expected = answer(adapter, images, [-1, 3, 1, 0, 0], "mean", steps=3)
    assert maps.errors == [
        None, None, None, "the image holds NaN or infinite values", "pixels from 2 to 2; expected 0 to 1"
    ]  # fmt: skip
    assert maps.target.tolist() == expected["resolved_target"].tolist()
    assert maps.target.tolist()[1:] == [3, 1, -1, -1]
    assert np.allclose(maps.saliency, expected["saliency"], atol=1e-5)
    assert not maps.saliency[3:].any()
    for name in CURVES:
        assert np.allclose(maps.curves[name], expected[name], atol=1e-4, equal_nan=True)
    assert np.isnan(maps.numbers["msi"]).tolist() == [False] * 3 + [True] * 2


def test_what_does_not_fit_is_said(folder: Path, tmp_path: Path) -> None:
    opened = SaliencyFile(folder / SALIENCY)
    with pytest.raises(UsageError, match="target: 'e' is no label; expected prediction, an index or one of a, b, c, d"):
        opened.target("e")
    with pytest.raises(UsageError, match=r"saliency\.json: the card of 'saliency', not of a counterfactual"):
        CounterfactualFile(folder / SALIENCY)
    (tmp_path / SALIENCY).write_bytes(b"x")
    (tmp_path / card_of(SALIENCY)).write_text((folder / card_of(SALIENCY)).read_text())
    with pytest.raises(CounterlensError, match=r"not the file that saliency\.json describes"):
        SaliencyFile(tmp_path / SALIENCY)


def test_counterlens_runs_it_without_pytorch(folder: Path, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(2)
    save_png(torch.rand((3, SIZE, SIZE), generator=g), tmp_path / "a.png")
    code = (
        "import sys; from counterlens.engine.cli.main import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "run", str(folder / SALIENCY), str(tmp_path / "a.png"), "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().endswith("False"), done.stderr
    row = json.loads(done.stdout)
    assert row["target"] == row["prediction"]
    assert row["msi"] == pytest.approx(row["base_score"] - row["mask_area"], abs=1e-5)
    assert Image.open(tmp_path / "out" / "a.png").size == (512, 256)
    refused = subprocess.run([*command, "--class-scale", "2"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "class-scale: of counterfactuals" in refused.stderr


def test_a_classifier_that_cannot_be_exported_is_named_by_its_line(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = StridedClassifier(classes=4, width=8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(self.network(x)[:, :, None] + torch.eye(4))  # has no ONNX form

    adapter = new_adapter(wrap_classifier(Odd().eval(), list("abcd"), image_size=SIZE), SIZE)
    with pytest.raises(ExportError, match=r"no ONNX form.*test_one_file\.py:\d+: return torch\.linalg\.svdvals"):
        export_saliency(adapter, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
