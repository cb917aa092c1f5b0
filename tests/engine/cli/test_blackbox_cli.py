"""--classifier of anything that can be called, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterlens.engine.audit.results import Results
from counterlens.engine.blackbox.answers import FILE
from tests.engine.cli.test_cli import one_line_error, run

MODULE = """
import numpy as np

def classify(images):
    if any(image[16, 16].tolist() == [9, 9, 9] for image in images):
        raise ValueError("cannot read this one")
    mean = images.reshape(len(images), -1).mean(1, keepdims=True) / 255
    scores = np.exp(-40 * (mean - np.linspace(0, 1, 10)) ** 2)
    return scores / scores.sum(1, keepdims=True)
"""
BOX = ["--classifier", "python:mine:classify"]
NO_CHANGE = ["--no-counterfactuals", "--saliency", "ablation", "--no-report"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a function and four digits, the last of which it cannot read."""
    from counterlens.engine.images.files import load_image, save_png

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(MODULE)
    assert run("samples", "--count", "4", "--out", "digits").returncode == 0
    last = sorted((tmp_path / "digits").glob("*.png"))[-1]
    image = load_image(last, 32)
    image[:, 16, 16] = 9 / 255
    save_png(image, last, {})
    return tmp_path


def test_an_audit_of_a_function_is_kept_counted_and_goes_on(here: Path) -> None:
    command = ["audit", "digits", *BOX, *NO_CHANGE, "--out", "audit", "--json"]
    done = run(*command)
    one_line_error(done, 1, "1 of 4 samples failed")
    rows = {row["id"]: row for row in Results.open(here / "audit").rows(["id", "status", "error", "msi"])}
    assert [row["status"] for _, row in sorted(rows.items())] == ["done"] * 3 + ["failed"]
    error = rows[max(rows)]["error"]
    assert error == "classifier: no answer, it raised ValueError: cannot read this one"
    summary = json.loads(done.stdout.splitlines()[-1])
    (queries,) = summary["queries"]
    assert queries["failed"] >= 1
    assert queries["asked"] > 3 * 64
    assert f"python:mine:classify: {queries['asked']} images asked in {queries['requests']} requests" in done.stderr
    again = run(*command, "--overwrite")
    (later,) = json.loads(again.stdout.splitlines()[-1])["queries"]
    assert later["asked"] <= 6 + 4  # probes, and what had no answer before
    assert later["asked_in_all"] == queries["asked"] + later["asked"]
    assert (here / "audit" / FILE).exists()


def test_maps_and_metrics_of_a_function(here: Path) -> None:
    done = run("evaluate", *BOX, "--methods", "ablation", "--count", "2", "--out", "compared", "--judge", "judge",
               "--metrics", "main,judge", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((here / "compared" / "summary.json").read_text())
    (queries,) = summary["queries"]
    assert queries["asked"] > 100
    assert {"queries": queries} in [json.loads(line) for line in done.stdout.splitlines()]
    one = sorted((here / "digits").glob("*.png"))[0]
    own = ["--labels", "0,1,2,3,4,5,6,7,8,9", "--image-size", "32", "--method", "ablation"]
    done = run("saliency", one, *BOX, *own, "--out", "where")
    assert done.returncode == 0, done.stderr
    assert "python:mine:classify: " in done.stdout
    assert json.loads((here / "where" / "run.json").read_text())["queries"][0]["asked"] > 64
    one_line_error(run("saliency", one, *BOX, *own, "--out", "less", "--max-queries", "60"), 1, "asked 60 times")


def test_what_a_box_cannot_do_is_said_with_the_way(here: Path) -> None:
    student = "`counterlens surrogate train` makes a student"
    for command in (
        ["counterfactual", "digits", *BOX, "--out", "o"],
        ["audit", "digits", *BOX, "--out", "o"],
        ["audit", "digits", *BOX, "--out", "o", "--no-counterfactuals", "--saliency", "ig"],
        ["evaluate", *BOX, "--out", "o", "--count", "2"],
        ["profile", *BOX, "--out", "o"],
        ["adapter", "train", *BOX, "--out", "o"],
        ["adapter", "explain", "digits", *BOX, "--out", "o"],
    ):
        one_line_error(run(*command), 2, student)
    wrong = ["--labels", "a,b", "--method", "rise", "--out", "o"]
    one_line_error(run("saliency", "digits", *BOX, *wrong), 1, "answers with [10] scores, there are 2 labels")
    asked = ["audit", "digits", *BOX, *NO_CHANGE, "--out", "o"]
    for command, said in (
        (["audit", "digits", *NO_CHANGE, "--out", "o", "--classifier-timeout", "3"], "classifier_timeout: for black"),
        (["evaluate", "--judge", "judge", "--max-queries", "3", "--out", "o"], "max_queries: for black boxes alone"),
        (["saliency", "digits", "--classifier-rate", "3", "--out", "o"], "classifier_rate: for black boxes alone"),
        ([*asked, "--classifier-template", "x"], "has no use for"),
        ([*asked, "--classifier-batch", "0"], "--classifier-batch"),
        ([*asked, "--dry-run"], "dry-run: times are measured"),
        ([*asked, "--ray", "local"], "is asked from one process"),
        ([*asked, "--runtime", "onnxruntime"], "can only be called"),
        (["evaluate", *BOX, "--methods", "rise", "--runtime", "onnxruntime", "--out", "o"], "not compiled"),
        (["serve", *BOX, "--surrogate", "o"], "surrogate: o holds none"),
        (["serve", "--surrogate", "o"], "surrogate: of a black box; name it"),
        (["serve", *BOX, "--answers", "o", "--ray", "auto"], "answers: its file is of one machine"),
        (["serve", *BOX, "--max-queries", "9", "--ray", "local"], "max_queries: replicas count together in one file"),
        (["serve", "--answers", "o"], "answers: of a black box"),
        (["serve", "--max-queries", "9"], "max_queries: for black boxes alone"),
        (["serve", *BOX, "--file", "x.onnx"], "has no use with --file"),
        (["evaluate", "--surrogate", "o", "--out", "o"], "surrogate: of a black box; name it"),
        (["saliency", "digits", *BOX, "--method", "rise", "--out", "o"], "labels: a black box needs"),
    ):
        one_line_error(run(*command), 2, said)
    assert not (here / "o").exists() or not any((here / "o").glob("*.json"))
