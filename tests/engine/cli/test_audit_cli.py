"""`counterlens audit` on the real pack."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from counterlens.engine.audit.disagreement import ENOUGH, verdict
from counterlens.engine.audit.results import Results
from counterlens.engine.cli.audit import RAY_SAYS, _quiet_ray
from tests.engine.cli.test_cli import one_line_error, run

QUICK = ["--steps", "4", "--strength", "0.5", "--part-size", "4", "--shortcuts", "0"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert run("samples", "--count", 6, "--marker", "matching", "--out", folder).returncode == 0
    return folder


def test_audit_report_shards_and_merge(digits: Path, tmp_path: Path) -> None:
    labels, out = digits / "labels.csv", tmp_path / "out"
    result = run("audit", labels, "--slice", "marker", "--out", out, "--json", *QUICK)
    assert result.returncode == 0, result.stderr
    *records, summary = [json.loads(line) for line in result.stdout.splitlines()]
    rows = list(Results.open(out).rows())
    assert [r["id"] for r in records] == [r["id"] for r in rows]
    assert all(set(r["judges"]) == {"judge"} for r in rows)
    assert (summary["samples"], summary["failed"], summary["flipped"]["n"]) == (6, 0, 6)
    assert (out / "report.html").stat().st_size > 10_000
    assert "going on: 6 of 6" in run("audit", labels, "--slice", "marker", "--out", out, *QUICK).stderr
    again = run("audit-report", out, "--json")
    assert json.loads(again.stdout)["report"] == str(out / "report.html")
    elsewhere = tmp_path / "reports" / "of it"
    assert run("audit-report", out, "--out", elsewhere).returncode == 0
    page = (elsewhere / "report.html").read_text()
    links = [f for files in re.findall(r'"files":\s*\[([^\]]*)\]', page) for f in re.findall(r'"([^"]+)"', files)]
    assert len(links) >= 12
    assert all((elsewhere / link).is_file() for link in links)
    for shard in ("1/2", "2/2"):
        arguments = ["--slice", "marker", "--shard", shard, "--out", tmp_path / shard[0], "--no-report", *QUICK]
        assert run("audit", labels, *arguments).returncode == 0
    merged = run("audit-merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "all")
    assert merged.returncode == 0, merged.stderr
    fields = [k for k in rows[0] if "seconds" not in k]
    for a, b in zip(Results.open(tmp_path / "all").rows(), rows, strict=True):
        assert [a[k] for k in fields] == [b[k] for k in fields]


def test_usage_errors_and_failures(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, arguments, words in [
        (tmp_path / "empty", [], ["empty", "no image"]),
        (digits / "labels.csv", [], ["marker", "--slice"]),
        (digits, ["--shard", "3of8"], ["shard", "3/8"]),
        (digits, ["--target", "eleven"], ["target", "eleven"]),
        (digits, ["--only-misclassified"], ["only_misclassified", "labels"]),
        (digits, ["--judge", "vgg"], ["classifier", "vgg"]),
        (digits, ["--labels", "a,b"], ["labels", "--model"]),
        (digits, ["--image-format", "gif"], ["image_format"]),
    ]:
        one_line_error(run("audit", source, "--out", tmp_path / "out", *arguments), 2, *words)
    assert not (tmp_path / "out").exists()
    dry = run("audit", digits, "--out", tmp_path / "out", "--dry-run", "--json", *QUICK)
    assert json.loads(dry.stdout)["samples"] == 6
    assert not (tmp_path / "out").exists()
    (tmp_path / "bad.csv").write_text("image\nnowhere.png\n")
    one_line_error(run("audit", tmp_path / "bad.csv", "--out", tmp_path / "out", *QUICK), 1, "no such file", "1 of 1")


def test_empty_shards_are_said_and_merge(digits: Path, tmp_path: Path) -> None:
    command = ["audit", digits, "--no-report", *QUICK]
    for shard in ("1/3", "2/3", "3/3"):
        result = run(*command, "--shard", shard, "--out", tmp_path / shard[0])
        assert result.returncode == 0, result.stderr
        assert ("shard 3/3 is empty: 6 samples make 2 parts" in result.stderr) == (shard == "3/3")
    merged = run("audit-merge", *(tmp_path / n for n in "312"), "--out", tmp_path / "all")
    assert merged.returncode == 0, merged.stderr
    assert "6 samples" in merged.stdout
    dry = run(*command, "--shard", "3/3", "--dry-run", "--json", "--out", tmp_path / "x")
    assert json.loads(dry.stdout)["samples"] == 0


def facts(samples: int, found: bool) -> dict[str, Any]:
    place = {"box": [0, 0, 8, 8], "push": 0.2, "evidence": 0.01, "p": 0.001}
    return {"all": {"samples": samples, "places": [place] if found else []}}


@pytest.mark.parametrize("samples", [2, 16, 20, 32, ENOUGH - 1])
def test_few_images_do_not_say_that_there_is_no_shortcut(samples: int) -> None:
    said = verdict(facts(samples, False), 32)
    assert said.startswith(f"Nothing can be said about shortcuts: {samples} images show none, but they are few.")
    assert "No shortcut" not in said
    assert verdict(facts(samples, True), 32).startswith("Possible shortcut: around the top left")


@pytest.mark.parametrize("samples", [ENOUGH, 1000])
def test_enough_images_say_what_was_looked_for(samples: int) -> None:
    assert verdict(facts(samples, False), 32).startswith(f"No shortcut found in {samples} images")
    assert f"{samples} images" in verdict(facts(samples, True), 32)


def test_enough_is_what_was_measured() -> None:
    rows = json.loads((Path(__file__).parents[3] / "bench/results/audit-detector.json").read_text())["rows"]
    power = rows["marker, planted"]["power"]
    assert power[str(ENOUGH)] > 0.9
    assert 0.1 < power["32"] < 0.5  # "under half"


def test_a_small_audit_ends_with_its_verdict(digits: Path, tmp_path: Path) -> None:
    quick = ["--steps", "4", "--strength", "0.5", "--shortcuts", "4", "--no-insight"]
    result = run("audit", digits, "--out", tmp_path / "out", *quick)
    assert result.returncode == 0, result.stderr
    assert "4 images" in result.stdout
    assert "shortcut" in (tmp_path / "out" / "report.html").read_text()
    one = sorted(digits.glob("*.png"))[0]
    (tmp_path / "one").mkdir()
    shutil.copy(one, tmp_path / "one")
    result = run("audit", tmp_path / "one", "--out", tmp_path / "single", "--no-report", *quick)
    assert "Shortcuts were not looked for" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--shortcuts", "64"], ["--shortcuts", "0"], ["--saliency", "rise"]])
def test_dry_run_is_right_within_a_factor_of_two(options: list[str], tmp_path: Path) -> None:
    assert run("samples", "--count", 64, "--out", tmp_path / "digits").returncode == 0
    command = ["audit", tmp_path / "digits", "--steps", "6", "--strength", "0.5", *options]
    ratios = []
    for attempt in range(3):  # other work on the machine comes and goes
        estimated = json.loads(run(*command, "--dry-run", "--json", "--out", tmp_path / "x").stdout)["seconds"]
        started = time.perf_counter()
        assert run(*command, "--out", tmp_path / f"out{attempt}").returncode == 0
        ratios.append(estimated / (time.perf_counter() - started))
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"estimated over taken: {ratios}")


@pytest.mark.parametrize(("name", "text"), RAY_SAYS)
def test_ray_says_what_matters_only(name: str, text: str) -> None:
    _quiet_ray()
    logger = logging.getLogger(name)

    def passes(message: str) -> bool:
        return bool(logger.filter(logger.makeRecord(name, logging.WARNING, "", 0, message, (), None)))

    assert not passes(f"2026: {text} 7.")
    assert passes("The node ran out of memory.")
