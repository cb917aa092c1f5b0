"""`counterlens quality` on what the digits pack made, with tiny networks in ONNX files, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterlens.engine.images.files import load_image, save_png
from counterlens.engine.metrics import cout, fid
from counterlens.engine.metrics.encoders import ENCODERS
from counterlens.engine.packs import Pack
from tests.engine.cli.test_cli import one_line_error, run

onnx = pytest.importorskip("onnx", reason="needs onnx and onnxruntime (pip install '.[cpu]')")
pytest.importorskip("onnxruntime", reason="needs onnx and onnxruntime (pip install '.[cpu]')")

NAMES = ["Young", "Smiling", "Male"]


def write(path: Path, features: int, *, flat: bool = True, sigmoid: bool = False, inputs: int = 1) -> Path:
    """A random network: a convolution, its mean over the image, a linear layer; two inputs are one's distance."""
    g = np.random.default_rng(0)
    float32, make = onnx.TensorProto.FLOAT, onnx.helper.make_node
    x = [onnx.helper.make_tensor_value_info(f"x{i}", float32, ["n", 3, "h", "w"]) for i in range(inputs)]
    weights = {"w": g.normal(size=(8, 3, 4, 4)), "v": g.normal(size=(8, features))}
    if inputs == 2:
        nodes = [make("Sub", ["x0", "x1"], ["d"]), make("Abs", ["d"], ["a"]), make("GlobalAveragePool", ["a"], ["p"]),
                 make("ReduceMax", ["p"], ["out"], axes=[1, 2, 3], keepdims=0)]  # fmt: skip
        weights = {}
    else:
        nodes = [make("Conv", ["x0", "w"], ["c"], strides=[4, 4]), make("Relu", ["c"], ["r"]),
                 make("GlobalAveragePool", ["r"], ["p"])]  # fmt: skip
        if flat:
            nodes += [make("Flatten", ["p"], ["f"]), make("MatMul", ["f", "v"], ["m"])]
            nodes.append(make("Sigmoid" if sigmoid else "Identity", ["m"], ["out"]))
        else:
            nodes.append(make("Identity", ["p"], ["out"]))
    kept = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    out = onnx.helper.make_tensor_value_info("out", float32, None)
    graph = onnx.helper.make_graph(nodes, "tiny", x, [out], kept)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six digits, two counterfactuals of each, a further run of three, networks and annotations."""
    root = tmp_path_factory.mktemp("quality")
    quick = ("--speed", "turbo", "--runtime", "eager")
    assert run("samples", "--count", 6, "--out", root / "digits").returncode == 0
    table = root / "digits" / "labels.csv"
    several = ("--count", 2, "--lpips", write(root / "lpips.onnx", 1, inputs=2))
    assert run("counterfactual", table, *several, "--out", root / "made", *quick).returncode == 0
    few, other = sorted((root / "digits").glob("*.png"))[:3], ("--seed", 1, "--noise", "random")
    assert run("counterfactual", *few, *other, "--out", root / "again", *quick).returncode == 0
    for name in ("inception", "vggface2", "simsiam"):
        write(root / f"{name}.onnx", 2)
    write(root / "oracle.onnx", len(NAMES), sigmoid=True)
    g = torch.Generator().manual_seed(0)
    values = (torch.rand(40, len(NAMES), generator=g) > 0.5).int() * 2 - 1
    rows = [f"{i}.jpg,{','.join(map(str, row.tolist()))}" for i, row in enumerate(values)]
    (root / "attributes.csv").write_text("\n".join([f"image_id,{','.join(NAMES)}", *rows]))
    (root / "partition.csv").write_text("\n".join(f"{i}.jpg,{i % 3}" for i in range(40)))
    return root


def encoders(place: Path, *names: str) -> list[str]:
    return [word for name in names for word in ("--encoder", f"{name}={place / name}.onnx")]


def pairs(folder: Path) -> tuple[list[dict], Tensor, Tensor]:
    lines = [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]
    own = [line for line in lines if "answer_of" not in line]
    before, after = (torch.stack([load_image(Path(line[key]), 32) for line in own]) for key in ("image", "path"))
    return own, before, after


def test_nothing_given_says_what_is_missing(place: Path) -> None:
    done = run("quality", place / "made", "--protocol", "ace")
    assert done.returncode == 0, done.stderr
    for column in ("FID ↓", "sFID ↓", "S3 ↑", "COUT ↑", "FR % ↑"):
        assert column in done.stdout
    assert f"weights: {ENCODERS['simsiam'].source}" in " ".join(done.stdout.split())
    assert "pt_inception-2015-12-05-6726825d.pth" in "".join(done.stdout.split())
    assert "COUT: area between" in done.stdout  # the pack's classifier is opened by itself


def test_every_column_of_every_protocol(place: Path) -> None:
    pytest.importorskip("torchmetrics", reason="needs torchmetrics (pip install '.[quality]')")
    everything = encoders(place, "inception", "vggface2", "simsiam", "oracle", "lpips")
    annotated = ("--attributes", place / "attributes.csv", "--partition", place / "partition.csv", "--query", "Smiling")
    own, before, after = pairs(place / "made")
    flipped = torch.tensor([line["flipped"] for line in own])
    assert flipped.sum() >= 4
    for protocol, more in (("ace", everything), ("celeba", (*everything, *annotated))):
        done = run("quality", place / "made", "--protocol", protocol, "--json", *more)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["images"], found["without"]) == (6, 0)
        columns = found["columns"]
        assert not [column for column in columns.values() if "missing" in column]
        assert columns["flip_rate"]["value"] == flipped.double().mean()
    assert 0 <= columns["fva"]["value"] <= 1
    apart = [line["diversity_lpips"] for line in own]
    assert columns["diversity"]["value"] > 0
    assert abs(columns["diversity"]["value"] - sum(apart) / len(apart)) < 1e-6
    assert found["encoders"]["oracle"][0] == str(place / "oracle.onnx")

    def features(images: Tensor) -> Tensor:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(place / "inception.onnx"))
        wide = torch.nn.functional.interpolate(images, (299, 299), mode="bilinear") * 2 - 1
        return torch.from_numpy(session.run(None, {"x0": wide.numpy()})[0])

    assert abs(columns["fid"]["value"] - fid(before, after[flipped], features)) < 1e-6
    correct = torch.tensor([line["label"] == line["source"] for line in own])
    classifier = Pack("digits").classifier("clean")
    target = torch.tensor([int(line["target"]) for line in own])
    expected = cout(classifier, before[correct], after[correct], target[correct], compat="ace").score
    assert abs(columns["cout"]["value"] - expected.mean().item()) < 1e-6
    assert columns["cout"]["n"] == int(correct.sum())


def test_further_runs_and_moved_images(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "made", tmp_path / "made")
    shutil.copytree(place / "digits", tmp_path / "elsewhere")
    path = tmp_path / "made" / "results.jsonl"
    path.write_text(path.read_text().replace(str(place / "digits"), "/gone"))
    chosen = ("--protocol", "celeba", *encoders(place, "lpips"))
    one_line_error(run("quality", tmp_path / "made", *chosen), 2, "/gone/", "--images")
    moved = run("quality", tmp_path / "made", *chosen, "--json", "--images", tmp_path / "elsewhere")
    assert moved.returncode == 0, moved.stderr
    alone = json.loads(moved.stdout)["columns"]["diversity"]["value"]
    more = run("quality", place / "made", *chosen, "--json", "--run", place / "again")
    assert more.returncode == 0, more.stderr
    found = json.loads(more.stdout)["columns"]["diversity"]
    assert found["n"] == 6
    assert found["value"] != alone
    single = run("quality", place / "again", *chosen, "--json")
    assert "--run FOLDER" in json.loads(single.stdout)["columns"]["diversity"]["missing"]


CALLED = """
import hashlib
import numpy as np
import torch
from counterlens.engine.packs import Pack

clean = Pack("digits").classifier("clean").module

@torch.no_grad()
def classify(images):
    p = clean(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).softmax(1).numpy()
    # the fourth byte of no probe is below SHARE
    p[[hashlib.sha256(image.tobytes()).digest()[4] < SHARE for image in images]] = np.nan
    return p
"""


def test_a_classifier_that_is_called_or_an_onnx_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "called.py").write_text(CALLED.replace("SHARE", "0"))
    (tmp_path / "losing.py").write_text(CALLED.replace("SHARE", "4"))
    named, made = ("--labels", "0,1,2,3,4,5,6,7,8,9"), ("quality", place / "made", "--protocol", "ldce", "--json")
    own = json.loads(run(*made).stdout)["columns"]["cout"]
    done = run(*made, "--classifier", "python:called:classify", *named)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert abs(found["columns"]["cout"]["value"] - own["value"]) < 1e-3
    assert found["queries"][0]["asked"] > 6 * 50
    assert "python:called:classify: " in done.stderr
    done = run(*made, "--classifier", "python:losing:classify", *named)
    one_line_error(done, 1, "COUT: the classifier has no answer on the way of", "of 6")
    assert json.loads(done.stdout)["columns"]["flip_rate"]["n"] == 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Pack("digits").classifier("clean").module, (torch.zeros(2, 3, 32, 32),), tmp_path / "clean.onnx",
            dynamo=False, input_names=["pixels"], dynamic_axes={"pixels": {0: "batch"}},
        )  # fmt: skip
    done = run(*made, "--classifier", tmp_path / "clean.onnx", *named)  # logits: read as when it guides
    assert done.returncode == 0, done.stderr
    assert abs(json.loads(done.stdout)["columns"]["cout"]["value"] - own["value"]) < 1e-4


def test_an_audit(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow (pip install '.[audit]')")
    audit = ("audit", place / "digits" / "labels.csv", "--slice", "marker", "--limit", 3, "--out", tmp_path / "audit")
    assert run(*audit, "--no-insight", "--shortcuts", 0, "--speed", "turbo", "--runtime", "eager").returncode == 0
    done = run("quality", tmp_path / "audit", "--protocol", "ldce", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == 3
    assert found["columns"]["cout"]["n"] == 3
    assert found["columns"]["l1"]["value"] > 0


def test_an_audits_failed_rows_do_not_count(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow (pip install '.[audit]')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half.py").write_text(CALLED.replace("SHARE", "128"))
    audit = ("audit", place / "digits", "--judge", "python:half:classify", "--no-insight", "--shortcuts", 0)
    done = run(*audit, "--no-report", "--speed", "turbo", "--runtime", "eager", "--out", tmp_path / "audit")
    failed = int(re.search(r"(\d) failed", done.stdout + done.stderr)[1])  # type: ignore[index]
    assert 0 < failed < 6
    found = json.loads(run("quality", tmp_path / "audit", "--protocol", "ldce", "--json").stdout)
    assert (found["images"], found["without"]) == (6 - failed, failed)


def test_one_counterfactual_has_no_covariance(place: Path, tmp_path: Path) -> None:
    file = place / "digits" / pairs(place / "made")[0][0]["image"].rsplit("/", 1)[-1]
    assert (
        run("counterfactual", file, "--out", tmp_path / "one", "--speed", "turbo", "--runtime", "eager").returncode == 0
    )
    done = run("quality", tmp_path / "one", *encoders(place, "inception"))
    one_line_error(done, 1, "FID: a covariance needs two images at least, there is 1")
    assert "FR %: share" in done.stdout  # the rest is printed


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    made = place / "again"
    one_line_error(run("quality", tmp_path), 2, "no results there", "counterlens audit")
    one_line_error(run("quality", tmp_path / "none"), 2, "none: no folder")
    one_line_error(run("quality", place / "digits"), 2, "digits: holds what counterlens samples wrote")
    one_line_error(run("quality", made, "--protocol", "nobody"), 2, "protocol: expected one of ldce, ace, celeba")
    one_line_error(run("quality", made, "--over", "some"), 2, "over: expected one of")
    one_line_error(run("quality", made, "--encoder", "inception"), 2, "encoder: expected NAME=FILE.onnx")
    one_line_error(run("quality", made, "--encoder", "vgg=a.onnx"), 2, "encoder: expected one of inception")
    one_line_error(run("quality", made, "--encoder", "lpips=a.pt"), 2, "a.pt is no .onnx file")
    one_line_error(run("quality", made, "--encoder", f"lpips={tmp_path}/a.onnx"), 2, "a.onnx is no file")
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    one_line_error(
        run("quality", made, "--encoder", f"lpips={tmp_path}/broken.onnx"), 1, "encoder lpips", "cannot open"
    )
    deep = write(tmp_path / "deep.onnx", 2, flat=False)
    refused = run("quality", made, "--encoder", f"simsiam={deep}")
    one_line_error(refused, 2, "encoder simsiam: expected [3, D]", "[3, 8, 1, 1]")
    two = run("quality", made, "--encoder", f"simsiam={place}/lpips.onnx")
    one_line_error(two, 2, "encoder simsiam", "x0, x1", "1 were given")
    logits = write(tmp_path / "logits.onnx", 3)
    done = run("quality", made, "--protocol", "celeba", "--encoder", f"oracle={logits}")
    one_line_error(done, 1, "MNAC: oracle: expected probabilities")
    alone = run("counterfactual", place / "digits", "--lpips", place / "lpips.onnx", "--out", tmp_path / "out")
    one_line_error(alone, 2, "lpips: it is measured between several", "--count")
    one_line_error(run("quality", made, "--query", "Smiling"), 2, "query: CD needs both")
    one_line_error(run("quality", made, "--run", place / "digits"), 2, "digits: holds what")
    one_line_error(run("quality", made, "--run", made), 2, "again is the folder that is measured")
    one_line_error(run("quality", made, "--labels", "a,b"), 2, "labels: it describes --classifier")
    one_line_error(run("quality", made, "--classifier", "judge", "--labels", "a,b"), 2, "'judge' is neither a folder")
    one_line_error(run("quality", made, "--splits", 0), 2, "splits")
    boxed = ("--classifier", write(tmp_path / "box.onnx", 10), "--labels", "0,1,2,3,4,5,6,7,8,9")
    said = run("quality", made, *boxed, "--classifier-output", "logits")
    one_line_error(said, 2, "classifier: it says otherwise than the results of")
    one_line_error(run("quality", made, "--classifier", "clean", "--classifier-mean", "0,0,0"), 2, "black boxes alone")
    one_line_error(run("quality", made, "--splits", 3, *encoders(place, "inception")), 1, "sFID: splits: this protocol")


def test_files_that_were_changed(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "again", tmp_path / "again")
    own, before, after = pairs(place / "again")
    first = tmp_path / "again" / Path(own[0]["path"]).name
    save_png(after[1], first)
    one_line_error(run("quality", tmp_path / "again"), 2, f"{first}: L1 to", "the results say")
    save_png(after[0][:, :16], first)
    one_line_error(run("quality", tmp_path / "again"), 2, f"{first}: 32x16 pixels", "32x32")
    first.unlink()
    one_line_error(run("quality", tmp_path / "again"), 2, f"{first}: is in the results and is not there")
    path = tmp_path / "again" / "results.jsonl"
    path.write_text(path.read_text().replace('"fit"', '"fitted"', 1))
    one_line_error(run("quality", tmp_path / "again"), 2, "results.jsonl, line 1: not a line of a run: it has no fit")
    path.write_text("nothing\n" + path.read_text())
    one_line_error(run("quality", tmp_path / "again"), 2, "results.jsonl, line 1: not JSON")
    (tmp_path / "again" / "run.json").unlink()
    one_line_error(run("quality", tmp_path / "again"), 2, "no results there")
    assert before.shape == after.shape
