"""Every Triton kernel compiles for three generations of GPUs and spills nowhere. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def compile_for(*arguments: str) -> list[dict[str, Any]]:
    program = Path(__file__).with_name("compile_for_gpus.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(program), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def test_the_two_hot_kernels_compile_without_a_spill() -> None:
    rows = compile_for("90", "perturb value fp16", "guided_update zero fp32 4 channels, one launch")
    assert len(rows) == 2
    assert all(row["spilled_bytes"] == 0 < row["registers"] for row in rows)


@pytest.mark.slow
def test_compiles_for_three_generations_without_a_spill() -> None:
    rows = compile_for("80", "90", "100")
    assert {row["target"][:5] for row in rows} == {"sm_80", "sm_90", "sm_10"}
    assert len(rows) > 100
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert all(row["registers"] > 0 for row in rows)
