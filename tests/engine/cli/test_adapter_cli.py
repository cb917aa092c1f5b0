"""The commands about saliency, and Engine.explain, on the digits pack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.metrics.quantities import make_quantity
from counterlens.engine.packs import Pack, find_pack
from counterlens.engine.saliency.explain import pack_adapter
from counterlens.engine.saliency.lax import new_adapter, open_adapter
from counterlens.engine.saliency.recipes import HALVES
from tests.engine.cli.test_cli import one_line_error, run

ROOT = Path(__file__).parents[3]


needs_adapters = pytest.mark.skipif(
    not (find_pack("digits") / "adapters").is_dir(),
    reason="needs the pack's adapters: python -m counterlens.engine.saliency.pack_adapters --pack digits --work run",
)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """An adapter of `clean` for labels that was saved before its training."""
    return new_adapter(Pack("digits").classifier("clean"), 32).save(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert run("samples", "--count", 6, "--marker", "matching", "--out", folder).returncode == 0
    return folder


@needs_adapters
def test_saliency_of_a_marked_digit(digits: Path, tmp_path: Path) -> None:
    file = sorted(digits.glob("*-2.png"))[0]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    result = run(
        "saliency", file, broken, "--classifier", "shortcut", "--quantity", HALVES, "--out", tmp_path / "out", "--json"
    )
    one_line_error(result, 1, "broken.png")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert "error" in records[1]
    record = records[0]
    assert len(record["thresholds"]) == len(record["keep"]) == len(record["remove"]) == 16
    assert Image.open(record["path"]).size == (512, 256)
    arrays = load_file(record["arrays"])
    assert arrays["saliency"].shape == (32, 32)
    assert torch.equal(arrays["saliency"], arrays["scores"].sigmoid())
    # The bottom-right marker is what `shortcut` looks at, and LAX says so.
    best = int(torch.nn.functional.avg_pool2d(arrays["scores"][None, None], 3, 1, 1).argmax())
    assert best // 32 >= 25
    assert best % 32 >= 25
    assert record["msi"] > 0
    assert record["base_score"] - record["mask_area"] == pytest.approx(record["msi"], abs=1e-5)


def test_adapter_explain_is_saliency_with_lax(digits: Path, untrained: Path, tmp_path: Path) -> None:
    file = sorted(digits.glob("*.png"))[0]
    first = run("saliency", file, "--adapter", untrained, "--out", tmp_path / "a", "--json")
    second = run("adapter", "explain", file, "--adapter", untrained, "--out", tmp_path / "b", "--json")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json.loads(first.stdout)["msi"] == json.loads(second.stdout)["msi"]


def test_images_of_one_name_and_a_frozen_alpha_min(digits: Path, untrained: Path, tmp_path: Path) -> None:
    file = sorted(digits.glob("*.png"))[0]
    files = [tmp_path / name for name in ("a/x.png", "b/x.png", "c/x-2.png")]
    for copy in files:
        copy.parent.mkdir()
        copy.write_bytes(file.read_bytes())
    frozen = ROOT / "bench/results/calibration-clean/calibration.json"
    out = tmp_path / "out"
    result = run("saliency", *files, "--adapter", untrained, "--alpha-min", frozen, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(r["path"]).name for r in records] == ["x.png", "x-2.png", "x-2-2.png"]
    assert len({r["arrays"] for r in records}) == 3
    assert all(r["thresholds"][0] == 0.4 for r in records)
    assert (out / "results.jsonl").read_text() == result.stdout


def test_an_image_that_cannot_be_read_and_constant_maps(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("captum", reason="needs captum")
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "black.png")
    (folder / "broken.png").write_bytes(b"")
    result = run("evaluate", "--methods", "gradxinput", "--images", folder, "--out", tmp_path / "out", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["msi"]["n"] == 1
    lines = result.stderr.splitlines()
    assert sum("warning: saliency: 1 of 1 maps are constant" in line for line in lines) == 1
    assert "Warning:" not in result.stderr
    assert any("broken.png" in line for line in lines)
    assert lines[-1].startswith("error: 1 of 2 images failed")


def test_what_no_metric_asks_is_refused(tmp_path: Path) -> None:
    asked = ("evaluate", "--methods", "gradxinput", "--count", 2, "--judge", "judge", "--out", tmp_path / "out")
    one_line_error(run(*asked), 2, "judge: no metric of this run asks it", "main,shape,judge")
    assert not (tmp_path / "out").exists()


def test_evaluate_by_other_groups_of_metrics(tmp_path: Path) -> None:
    pytest.importorskip("captum", reason="needs captum")
    question = ("--classifier", "shortcut", "--quantity", "0,1,2,3,4/5,6,7,8,9", "--marker", "matching", "--count", 3)
    more = ("--metrics", "main,shape,robust,judge,masks,irof", "--judge", "judge", "--masks", "marker")
    result = run("evaluate", "--methods", "occlusion", *question, *more, "--out", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert row["mask_auc"]["mean"] > 0.8  # the planted cause is found
    assert {"insertion_moved", "deletion_smoothed", "msi_judge", "islands", "irof"} <= set(row)
    assert "infidelity" not in row
    moved = {name: row[name]["mean"] - row[f"{name}_moved"]["mean"] for name in ("msi", "insertion")}
    assert {name for name in row["brittle"] if name in moved} == {name for name, fell in moved.items() if fell > 0.1}
    for options, message in (
        (("--metrics", "judge"), "msi_judge needs another classifier"),
        (("--metrics", "masks"), "pointing_game needs masks"),
        (("--metrics", "iorf"), "expected groups"),
        (("--metrics", "masks", "--masks", tmp_path / "none"), "is missing"),
        (("--metrics", "masks", "--masks", "marker", "--marker", "none"), "all of them with one"),
    ):
        refused = run("evaluate", "--methods", "occlusion", "--count", 1, *options, "--out", tmp_path / "no")
        assert refused.returncode == 2, refused.stderr
        assert message in " ".join(refused.stderr.split())


def test_evaluate_writes_its_table_curves_and_pictures(untrained: Path, tmp_path: Path) -> None:
    pytest.importorskip("captum", reason="needs captum")
    result = run(
        "evaluate", "--methods", "lax,gradcam", "--adapter", untrained, "--count", 3, "--out", tmp_path, "--json"
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["method"] for r in records] == ["lax", "gradcam"]
    assert all(r["msi"]["low"] <= r["msi"]["mean"] <= r["msi"]["high"] for r in records)
    written = {"summary.json", "scores.parquet", "curves.png", "methods.png", "run.json"}
    assert {p.name for p in tmp_path.iterdir() if p.name != ".lock"} == written
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["gradcam"]["msi"] == records[1]["msi"]
    alone = tmp_path / "alone"
    again = run("adapter", "evaluate", "--adapter", untrained, "--count", 3, "--out", alone, "--json")
    assert json.loads(again.stdout)["msi"] == records[0]["msi"]


def test_metrics_through_onnx_runtime(untrained: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[cpu]'")
    scores = []
    for runtime in ("eager", "onnxruntime"):
        command = ("adapter", "evaluate", "--adapter", untrained, "--count", 3, "--out", tmp_path / runtime, "--json")
        result = run(*command, "--runtime", runtime)
        assert result.returncode == 0, result.stderr
        scores.append(json.loads(result.stdout))
    for metric in ("msi", "insertion", "deletion", "road"):
        assert scores[0][metric] == pytest.approx(scores[1][metric], abs=1e-4)


def test_train_on_a_folder_and_go_on(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    # The pack's classifier by name, on images from a folder.
    command = ["adapter", "train", "--images", digits, "--validation", digits, "--out", out, "--batch", 2, "--json"]
    result = run(*command, "--steps", 2)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["taps"] == ["features.4", "features.7", "features"]
    assert Image.open(out / "loss.png").width > 500
    assert {"adapter.json", "adapter.safetensors", "checkpoint.pt", "loss.png"} == {p.name for p in out.iterdir()}
    for more, difference in (
        (["--steps", 3], "steps was 2, is 3"),
        (["--steps", 2, "--area", 0.5, "--seed", 4], "area was 3.0, is 0.5; seed was 0, is 4"),
    ):
        one_line_error(run(*command, *more), 2, "checkpoint.pt", "another training", difference)
    file = sorted(digits.glob("*.png"))[0]
    one_line_error(run("saliency", file, "--adapter", out, "--classifier", "shortcut", "--out", tmp_path), 1, "another")
    assert run("saliency", file, "--adapter", out, "--out", tmp_path / "s").returncode == 0


def test_usage_errors(digits: Path, tmp_path: Path) -> None:
    file = sorted(digits.glob("*.png"))[0]
    out = ["--out", tmp_path / "out"]
    for arguments, code, words in [
        (["saliency", file, "--method", "magic", *out], 2, ["method", "magic", "gradcam"]),
        (["saliency", file, "--target", "eleven", *out], 2, ["target", "eleven"]),
        (["saliency", file, "--quantity", "1,2/3", *out], 2, ["quantity"]),
        (["saliency", file, "--classifier", "judge", *out], 2, ["adapter", "judge", "train makes one"]),
        (["saliency", file, "--adapter", tmp_path / "none", *out], 1, ["adapter.json", "missing"]),
        (["saliency", file, "--method", "rise", "--out", file.parent], 2, ["out", "overwritten"]),
        (["evaluate", "--methods", "lax,magic", *out], 2, ["method", "magic"]),
        (["evaluate", "--classifier", "vgg", *out], 2, ["classifier", "vgg"]),
        (["evaluate", "--methods", "rise", "--runtime", "aoti", *out], 2, ["runtime", "eager or onnxruntime", "aoti"]),
        (["adapter", "train", "--taps", "features.44", *out], 2, ["features.44", "nearest", "features.4"]),
        (["adapter", "train", "--images", digits, *out], 2, ["validation"]),
        (["adapter", "train", "--baselines", "black", *out], 2, ["baselines", "black"]),
        (["adapter", "train", "--alpha-min", "1", *out], 2, ["alpha_min"]),
        (["adapter", "train", "--image-size", "64", *out], 2, ["image-size", "clean"]),
        (["saliency", file, "--labels", "a,b", *out], 2, ["labels", "clean"]),
    ]:
        one_line_error(run(*arguments), code, *words)
    for value, reason in (("1.5", "expected a number in [0, 1] or a calibration.json"), ("no.json", "cannot be read")):
        result = run("saliency", file, "--alpha-min", value, *out)
        assert result.returncode == 2
        assert reason in " ".join(result.stderr.replace("│", " ").split())
        assert f"'--alpha-min': {reason if value == '1.5' else value}" in result.stderr


@pytest.mark.parametrize("command", ["saliency", "evaluate", "adapter train", "adapter explain", "adapter evaluate"])
def test_help_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    assert f"Example: counterlens {command}" in text
    assert all(option in text for option in ("--json", "--out", "--seed"))


def test_engine_explain(tiny) -> None:
    diffusion, classifier = tiny
    engine = Engine(diffusion, classifier)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    halves = make_quantity(classifier, HALVES)
    adapter = new_adapter(classifier, 16, quantity=halves)
    result = engine.explain(images, adapter=adapter, quantity=halves)
    assert result.saliency.shape == (2, 16, 16)
    assert result.counterfactuals is None
    p = engine.probabilities(images)
    assert torch.equal(result.target, p.argmax(1))
    expected = torch.stack([q[:5].sum() if t < 5 else q[5:].sum() for q, t in zip(p, result.target, strict=True)])
    assert torch.allclose(result.probability, expected, atol=1e-5)
    record = result.record(1)
    assert record["base_score"] - record["mask_area"] == pytest.approx(record["msi"], abs=1e-5)
    short = Config(mode="official", steps=4, strength=0.5)
    both = engine.explain(images, method="rise", explained="runner-up", counterfactual=True, config=short)
    assert both.counterfactuals is not None
    assert "flipped" in both.record(0)["counterfactual"]
    assert torch.equal(both.target, p.topk(2, dim=1).indices[:, 1])
    with pytest.raises(UsageError, match="adapter: this classifier is not a pack's"):
        engine.explain(images)
    with pytest.raises(UsageError, match="quantity: the adapter explains"):
        engine.explain(images, adapter=adapter)
    with pytest.raises(UsageError, match="images: expected"):
        engine.explain(images[:, :, :8])
    with pytest.raises(UsageError, match="images: expected finite values, got NaN or infinity in sample 1"):
        engine.explain(torch.stack([images[0], images[1] * torch.nan]))


@needs_adapters
def test_the_packs_adapters_fit_their_classifiers(digits: Path) -> None:
    pack = Pack("digits")
    for name in ("clean", "shortcut"):
        for quantity in ("class", HALVES):
            adapter = pack_adapter(pack, name, pack.classifier(name), quantity)
            assert adapter.training["classifier"] == name
    with pytest.raises(CounterlensError, match="another model"):
        open_adapter(pack.folder / "adapters" / "clean", pack.classifier("shortcut"))
    with pytest.raises(UsageError, match="has none for 'judge'"):
        pack_adapter(pack, "judge", pack.classifier("judge"))


@needs_adapters
def test_the_planted_cause_is_what_one_sees() -> None:
    pack = Pack("digits")
    samples = pack.samples("test", marker="matching", count=40)
    inside = torch.zeros(40, 32, 32)
    for box, marker in zip(inside, samples.markers, strict=True):
        assert marker is not None
        box[marker.box] = 1
    near = torch.nn.functional.max_pool2d(inside, 5, 1, 2)  # two pixels around
    shares = {}
    for name in ("shortcut", "clean"):
        saliency = pack_adapter(pack, name, pack.classifier(name), HALVES).explain(samples.images).saliency
        marked = (saliency >= 0.5).float()
        shares[name] = ((marked * near).sum((1, 2)) / marked.sum((1, 2)).clamp(min=1)).mean().item()
    assert shares["shortcut"] > 0.9  # no bands along the border, and no second corner
    assert shares["clean"] < 0.05
