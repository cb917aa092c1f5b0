"""The commands: train a surrogate of what can only be called, look at it, explain and audit through it."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from counterlens.engine.audit.results import Results
from counterlens.engine.blackbox.answers import FILE
from counterlens.engine.images.files import as_saved, save_png, to_uint8
from counterlens.engine.surrogate.surrogate import open_surrogate
from tests.engine.cli.test_cli import run

BOX = """
import torch
from counterlens.engine.packs import Pack

judge = Pack("digits").classifier("judge")


def answer(images):
    with torch.no_grad():
        return judge.logits(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).softmax(1).numpy()


def other(images):
    return answer(images)[:, ::-1]
"""
SMALL = ("--queries", "120", "--fit", "crop", "--rounds", "1", "--members", "1", "--fit-steps", "20")


@pytest.mark.slow
def test_a_surrogate_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_box_of_digits.py").write_text(BOX)
    name = "python:a_box_of_digits:answer"
    assert run("samples", "--split", "train", "--count", 40, "--out", "mine").returncode == 0
    wide = as_saved(torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)))
    save_png(wide, tmp_path / "mine" / "wide.png")
    made = run("surrogate", "train", "mine", "--classifier", name, *SMALL, "--out", "s", "--json")
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    assert sum(said["queries"].values()) <= 120
    middle = to_uint8(wide)[:, :, 8:40]
    assert any(torch.equal(image, middle) for image in open_surrogate("s").images)
    assert "the box confirms" in made.stderr
    assert "images asked in" in made.stderr

    shown = run("surrogate", "show", "s", "--classifier", name)
    assert (shown.returncode, "answers as it did then" in shown.stdout) == (0, True), shown.stderr
    changed = run("surrogate", "show", "s", "--classifier", "python:a_box_of_digits:other")
    assert changed.returncode == 1
    assert "is not what it was" in changed.stderr
    twice = run("surrogate", "train", "mine", "--classifier", name, *SMALL, "--out", "s")
    assert (twice.returncode, "holds a surrogate" in twice.stderr) == (2, True)

    assert run("samples", "--count", 2, "--out", "digits").returncode == 0
    asked = ("--classifier", name, "--surrogate", "s", "--speed", "fast")
    done = run("counterfactual", "digits", *asked, "--queries-each", 3, "--out", "changed", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "changed" / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["done", "done"]
    assert all(2 <= row["queries"] <= 3 and row["classifier"] == name and row["student_prediction"] for row in rows)
    assert json.loads((tmp_path / "changed" / "run.json").read_text())["queries"][0]["asked"] <= 6 + 2 * 3

    fewer = run("counterfactual", "digits", *asked, "--queries-each", 2, "--out", "changed")
    assert (fewer.returncode, "queries_each" in fewer.stderr) == (2, True), fewer.stderr

    audited = run(
        "audit", "digits", *asked, "--judge", "judge", "--shortcuts", 0, "--saliency", "gradcam", "--no-report",
        "--out", "audited",
    )  # fmt: skip
    assert audited.returncode == 0, audited.stderr
    for row in Results.open(tmp_path / "audited").rows():
        assert row["flipped"] == (row["counterfactual_prediction"] == row["target"])
        assert row["transfer"] == row["flipped"]  # the judge is the box
        assert row["queries"] >= 2
        assert row["msi"] is not None

    compared = run(
        "evaluate", *asked[:4], "--methods", "gradcam,rise", "--count", 2, "--metrics", "main", "--out", "compared",
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    summary = json.loads((tmp_path / "compared" / "summary.json").read_text())
    assert {n: summary[n]["looked_at"] for n in ("gradcam", "rise")} == {"gradcam": "student", "rise": "black box"}
    assert "gradcam looked at the student; all labels and scores are the black box's" in compared.stdout
    assert summary["queries"][0]["asked"] > 2 * 16

    with started(*asked, "--queries-each", "3", "--slots", "2", "--answers", "kept") as (client, process):
        for file, row in zip(sorted((tmp_path / "digits").glob("*.png")), rows, strict=True):
            found = client.post("/v1/counterfactuals", files={"image": file.read_bytes()}).json()
            assert {k: found[k] for k in ("l1", "queries", "flipped")} == {
                k: row[k] for k in ("l1", "queries", "flipped")
            }
            assert found["confirmed"] == found["flipped"]
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["image"]))))
            assert np.array_equal(shown, np.asarray(Image.open(row["path"]).convert("RGB")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "kept" / FILE).exists()


@contextmanager
def started(*options: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """A server that is ready."""
    with Path("said").open("w") as log:
        command = [sys.executable, "-m", "counterlens.engine.cli.main", "serve", "--port", "0", *options]
        process = subprocess.Popen(command, stderr=log, text=True)
    try:
        while (found := re.search(r"serving at (\S+) \(.*asks python:", Path("said").read_text())) is None:
            assert process.poll() is None, Path("said").read_text()
            time.sleep(0.05)
        with httpx.Client(base_url=found[1], timeout=60) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.05)
            yield client, process
    finally:
        process.kill()


def test_what_needs_a_box_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    save_png(torch.rand(3, 32, 32), tmp_path / "images" / "one.png")
    for command, said in (
        (("surrogate", "show", "nothing"), "surrogate: nothing holds none"),
        (("surrogate", "train", "images", "--classifier", "clean"), "name what can only be called"),
        (
            ("surrogate", "train", "images", "--classifier", "python:a:b", "--fit", "native"),
            "fit: a surrogate sees square",
        ),
        (("counterfactual", "images", "--classifier", "clean", "--surrogate", "s"), "surrogate: of a black box"),
        (
            ("profile", "images", "--classifier", "b.onnx", "--surrogate", "s"),
            "surrogate: this command asks no black box",
        ),
        (("export", "--classifier", "b.onnx", "--surrogate", "s"), "surrogate: this command asks no black box"),
        (("counterfactual", "images", "--queries-each", 3), "queries_each: of counterfactuals through a surrogate"),
    ):
        found = run(*command)
        assert found.returncode == 2, found.stderr
        assert said in found.stderr
        assert not (tmp_path / "counterfactuals").exists()
