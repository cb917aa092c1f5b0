"""The same image has the same map and scores from Engine.explain, `saliency`, `evaluate` and an audit: bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from counterlens.engine import Engine, load_image
from counterlens.engine.images.files import save_png
from counterlens.engine.metrics.inputs import make_baseline
from counterlens.engine.metrics.msi_score import msi
from counterlens.engine.metrics.quantities import make_quantity
from counterlens.engine.models.image_classifiers import open_classifier
from counterlens.engine.packs import Pack
from counterlens.engine.saliency import evaluate
from counterlens.engine.saliency.explain import explain, hidden_by
from counterlens.engine.saliency.methods import explain_with
from tests import tiny
from tests.engine.cli.test_cli import run

parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
pytest.importorskip("matplotlib", reason="needs matplotlib")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of one image each: a batch's shape decides the last bits, whoever asks."""
    images = Pack("digits").samples("test", count=2, marker="matching").images
    folders = [tmp_path_factory.mktemp("one") for _ in images]
    for image, folder in zip(images, folders, strict=True):
        save_png(image, folder / "x.png")
    return [folder / "x.png" for folder in folders]


@pytest.fixture(scope="module", params=["of the pack", "of a folder"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, list[str]]:
    """An engine, and the options of commands for its classifier."""
    if request.param == "of the pack":
        return Engine.from_pack("digits", "shortcut"), ["--classifier", "shortcut"]
    pytest.importorskip("transformers", reason="needs transformers")
    folder = tiny.save_resnet(tmp_path_factory.mktemp("resnet"))
    engine = Engine.from_pretrained("digits", folder, classes=range(10))
    return engine, ["--classifier", str(folder), "--image-size", "32"]


def test_every_front_gives_the_same(opened: tuple[Engine, list[str]], files: list[Path], tmp_path: Path) -> None:
    engine, options = opened
    methods = ["rise", "gradcam", *(["lax"] if engine.source else [])]  # the pack's adapters are of its own classifiers
    for number, (file, method) in enumerate(zip(files * 2, methods, strict=False)):
        out = tmp_path / str(number)
        names = ["msi", "base_score_area", "insertion", "deletion", "road", "mask_area"]
        expected = engine.explain(load_image(file, 32)[None], method=method, metrics=names)
        values = {name: value[0].item() for name, value in expected.values.items()}
        assert expected.saliency.flatten().unique().numel() > 10

        done = run("saliency", file, "--method", method, "--out", out / "maps", "--json", *options)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        arrays = load_file(record["arrays"])
        assert torch.equal(arrays["saliency"], expected.saliency[0])
        assert torch.equal(arrays["scores"], expected.scores[0])
        assert {name: record[name] for name in names} == {name: round(value, 6) for name, value in values.items()}
        assert record["keep"] == expected.record(0)["keep"]

        done = run("evaluate", "--methods", method, "--images", file.parent, "--out", out / "compared", *options)
        assert done.returncode == 0, done.stderr
        (row,) = parquet.read_table(out / "compared" / "scores.parquet").to_pylist()
        assert {name: row[name] for name in names} == values
        assert row["target"] == record["target"]

        (audited,) = engine.audit(
            file.parent, out / "audit", saliency=method, counterfactuals=False, report=False, shortcuts=0
        ).rows()
        curves = expected.msi.curves
        assert curves.keep is not None
        # Rows hold float32.
        assert audited["msi"] == expected.msi.score[0].float().item()
        assert audited["sufficient_area"] == expected.msi.sufficient_area[0].float().item()
        assert audited["insertion_curve"] == curves.keep[0].float().tolist()
        picture = load_image(out / "audit" / audited["saliency"], 32)[0]
        assert (picture - expected.saliency[0]).abs().max() <= 0.5 / 255 + 1e-6


def test_what_hides_pixels_and_breaks_ties() -> None:
    pack = Pack("digits")
    classifier, images = pack.classifier("shortcut"), pack.samples("test", count=3, marker="matching").images
    quantity = make_quantity(classifier)
    for given, colour in ((pack, pack.mean_colour), (None, "blur")):
        hidden = hidden_by(given)
        assert torch.equal(hidden, colour) if isinstance(hidden, Tensor) else hidden == colour
        found = explain(classifier, images, "rise", pack=given)
        filled = make_baseline(colour, images, [0] * 3)
        assert torch.equal(found.scores, explain_with("rise", classifier, images, found.target, baseline=filled)[1])
        scored = msi(classifier, images, found.saliency, found.target, baseline=filled, quantity=quantity)
        assert torch.equal(found.msi.score, scored.score)
    pytest.importorskip("captum", reason="needs captum")
    # A map of few values: its area form asks for an order of equal pixels, which is the image's own.
    together = evaluate(classifier, images, ["occlusion"], pack=pack)["occlusion"].values
    turned = evaluate(classifier, images.flip(0), ["occlusion"], pack=pack)["occlusion"].values
    other = evaluate(classifier, images, ["occlusion"], pack=pack, seed=1)["occlusion"].values
    assert torch.allclose(together["base_score_area"], turned["base_score_area"].flip(0), atol=1e-6)
    assert not torch.allclose(together["base_score_area"], other["base_score_area"], atol=1e-6)


def test_a_classifier_from_a_folder_needs_no_diffusion_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    classifier = open_classifier(tiny.save_resnet(tmp_path / "resnet"), image_size=32)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = explain(classifier, images, "rise", [1, 2])
    assert found.target.tolist() == [1, 2]
    assert found.record(1)["target"] == classifier.labels[2]
    assert set(found.values) == {"msi", "base_score", "base_score_area", "sufficient_area", "mask_area"}
