"""Comparing two recorded results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from bench.report import compare, regressions


def result(seconds: float, ratio: float, device: str = "cpu") -> dict[str, Any]:
    figures = {
        "a step": {"value": seconds, "better": "lower", "unit": "s"},
        "gain": {"value": ratio, "better": "higher", "unit": "x"},
    }
    return {"environment": {"device": device, "threads": 2}, "figures": figures}


def test_one_regression_of_more_than_ten_percent_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for i, one in enumerate((result(1.0, 80), result(1.09, 75), result(1.2, 80), result(1.0, 70))):
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(one))
    compare(paths[0], paths[1])
    for worse, said in (
        (paths[2], "a step: 1 became 1.2 s, 20 % worse"),
        (paths[3], "gain: 80 became 70 x, 14 % wors"),
    ):
        with pytest.raises(typer.Exit) as stop:
            compare(paths[0], worse)
        assert stop.value.exit_code == 1
        assert said in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: 'cpu' and 'gpu' cannot be compared"):
        regressions(result(1, 1), result(1, 1, "gpu"))
    with pytest.raises(ValueError, match="none in common"):
        regressions(result(1, 1), result(1, 1) | {"figures": {}})
    assert regressions(result(1, 1), result(float("nan"), 1)) != []
    with pytest.raises(typer.Exit) as stop:
        compare(tmp_path / "none.json", tmp_path / "none.json")
    assert stop.value.exit_code == 2
