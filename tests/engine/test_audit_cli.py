"""`counterlens audit` on the real pack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterlens.engine.audit.results import Results
from tests.engine.test_cli import one_line_error, run

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
