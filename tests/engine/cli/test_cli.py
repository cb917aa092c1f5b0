"""The command line on the real pack: what a person types, what a machine reads, and what goes wrong."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from counterlens.engine.cli.main import main
from counterlens.engine.images.files import load_image
from counterlens.engine.packs import find_pack

QUICK = ["--steps", "4", "--strength", "0.5"]


@dataclass
class Finished:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Finished:
    """Run the command line in this process, as `counterlens ARGUMENTS` would."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["counterlens", *map(str, arguments)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return Finished(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def one_line_error(result: Finished, code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" not in result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert lines, result.stderr
    for word in words:
        assert any(word in line for line in lines), (word, lines)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert run("samples", "--count", 4, "--marker", "matching", "--out", folder).returncode == 0
    return folder


def test_samples_writes_what_it_says(digits: Path) -> None:
    with (digits / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "label", "marker"]
    assert [r["label"] for r in rows] == ["0", "1", "2", "3"]
    assert all(r["marker"].startswith("bottom-right:") for r in rows)
    assert load_image(digits / rows[0]["file"], 32).shape == (3, 32, 32)
    assert len(list(digits.glob("*.png"))) == 4


def test_counterfactual_json(digits: Path, tmp_path: Path) -> None:
    files = sorted(digits.glob("*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:100])
    big = tmp_path / "big.png"
    Image.open(files[3]).resize((200, 100)).save(big)
    out = tmp_path / "out"
    result = run("counterfactual", files[0], broken, files[1], big, "--json", "--out", out, *QUICK)
    one_line_error(result, 1, "broken.png")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["image"] for r in records] == [str(p) for p in (files[0], broken, files[1], big)]
    assert "error" in records[1]
    assert "path" not in records[1]
    for record in (records[0], records[2], records[3]):
        assert {"source", "target", "prediction", "confidence", "flipped", "l1", "l2", "path", "seconds"} <= set(record)
        back, before = load_image(Path(record["path"]), 32), load_image(Path(record["image"]), 32)
        assert abs((back - before).abs().mean().item() - record["l1"]) < 1e-5
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == records


def test_same_seed_same_pixels_whatever_the_neighbours(digits: Path, tmp_path: Path) -> None:
    files = sorted(digits.glob("*.png"))
    run("counterfactual", files[0], files[1], "--out", tmp_path / "a", "--noise", "random", *QUICK)
    run("counterfactual", files[2], files[0], "--out", tmp_path / "b", "--noise", "random", *QUICK)
    run("counterfactual", files[2], files[0], "--out", tmp_path / "c", "--noise", "random", "--seed", 1, *QUICK)
    a, b, c = (load_image(tmp_path / x / files[0].name, 32) for x in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_what_is_refused_leaves_no_folder_and_is_named(digits: Path, tmp_path: Path) -> None:
    file, out = next(iter(sorted(digits.glob("*.png")))), tmp_path / "out"
    one_line_error(run("counterfactual", file, "--target", "crane", "--out", out), 2, "target: 'crane' is no label")
    (tmp_path / "wrong.csv").write_text("crane,heron\n")
    refused = run("counterfactual", file, "--neighbours", tmp_path / "wrong.csv", "--out", out)
    one_line_error(refused, 2, "neighbours: 'crane' is no label")
    layer = ("--method", "rise", "--layer", "conv")
    one_line_error(run("saliency", file, *layer, "--out", out), 2, "layer: rise reads no layer of the classifier")
    assert not out.exists()


def test_usage_errors(digits: Path, tmp_path: Path) -> None:
    file = next(iter(sorted(digits.glob("*.png"))))
    (tmp_path / "file").touch()
    for arguments, words in [
        (["--target", "eleven"], ["target", "eleven"]),
        (["--mode", "quick"], ["mode", "quick"]),
        (["--strength", "3"], ["strength"]),
        (["--preset", "pairs-class", "--mode", "audit"], ["preset"]),
        (["--classifier", "vgg"], ["classifier", "vgg", "clean"]),
        (["--pack", "letters"], ["pack", "letters"]),
        (["--out", tmp_path / "file"], ["out", "file"]),
        (["--filter", "project", "--angle", "90"], ["angle"]),
        (["--steps", "1000"], ["steps"]),
        (["--steps", "700", "--spacing", "trailing"], ["steps", "timesteps of strength"]),
        (["--speed", "warp"], ["speed", "warp"]),
        (["--solver", "euler"], ["solver", "euler"]),
        (["--guidance-start", "0.9", "--guidance-end", "0.1"], ["guidance_start"]),
        (["--budget", "0"], ["budget"]),
        (["--tiny-decoder", tmp_path / "nothing"], ["guidance_decoder", "nothing"]),
    ]:
        out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
        one_line_error(run("counterfactual", file, *arguments, *out), 2, *words)
    assert run("counterfactual").returncode == 2
    before = file.read_bytes()
    one_line_error(run("counterfactual", file, "--out", file.parent), 2, "overwritten", file.name)
    assert file.read_bytes() == before


def test_target_that_equals_the_prediction_is_skipped(digits: Path, tmp_path: Path) -> None:
    file = sorted(digits.glob("*-3.png"))[0]
    result = run("counterfactual", file, "--target", "3", "--out", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["status"], record["error"]) == ("skipped", "target '3' is already the prediction")
    assert f"skipped: {file}" in result.stderr.replace("\n", "")


def test_tampered_and_incomplete_packs(digits: Path, tmp_path: Path) -> None:
    file = next(iter(sorted(digits.glob("*.png"))))
    pack = tmp_path / "pack"
    shutil.copytree(find_pack("digits"), pack)
    weights = pack / "classifiers" / "clean" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    one_line_error(run("counterfactual", file, "--pack", pack, "--out", tmp_path / "o"), 1, "clean/model.safetensors")
    weights.unlink()
    one_line_error(run("counterfactual", file, "--pack", pack, "--out", tmp_path / "o"), 1, "clean/model.safetensors")
    (pack / "pack.json").write_text("{}")
    one_line_error(run("info", "--pack", pack), 1, "pack.json")


def test_demo(tmp_path: Path) -> None:
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("counterlens")), "demo", "--count", "2", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    last = records[-1]
    assert {"images", "flip_rate", "transfer_rate", "l1_mean", "seconds_per_image", "artifacts"} <= set(last)
    assert len(records) == 7
    assert last["artifacts"] == ["counterlens-demo/counterfactuals.png"]
    assert Image.open(tmp_path / last["artifacts"][0]).width > 250


def test_info(tmp_path: Path) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["operations"]["consensus_filter"]["backends"]["reference"] == []
    assert facts["pack"]["classifiers"] == ["clean", "judge", "shortcut"]
    assert "consensus_filter" in run("info", "--out", tmp_path).stdout
    assert json.loads((tmp_path / "info.json").read_text()) == facts
    assert "runtimes: eager, " in run("info").stdout


@pytest.mark.parametrize(
    "command", ["demo", "counterfactual", "samples", "info", "audit", "audit-merge", "audit-report"]
)
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert f"Example: counterlens {command}" in " ".join(result.stdout.split())


def test_help_imports_nothing_slow() -> None:
    slow = ("torch", "diffusers", "numpy", "PIL", "pyarrow", "ray", "jinja2")
    code = f"import sys; import counterlens.engine.cli.main; print([m for m in {slow} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
