"""The script for a GPU runs where there is none: its syntax, its parts, and every suite with tiny models."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"
LENT = 15 * 60  # seconds of a card
STARTING = 100  # of these before and between the parts


def run(*arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *arguments], cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=timeout, check=False
    )


def test_its_syntax_limits_and_arguments() -> None:
    assert run("-n", str(SCRIPT)).returncode == 0
    told = run(str(SCRIPT), "--help")
    assert told.returncode == 0
    assert re.search(r"^parts: build tests gpu-tests step counterfactual xformers onnxruntime-cuda", told.stdout, re.M)
    limits = [int(n) for n in re.findall(r"[a-z-]+:(\d+)", re.search(r'PARTS="([^"]*)"', SCRIPT.read_text())[1])]  # type: ignore[index]
    assert sum(limits) <= LENT - STARTING
    unknown = run(str(SCRIPT), "--dry-run", "step", "everything")
    assert unknown.returncode == 2
    assert "unknown part: everything; expected some of" in unknown.stderr
    assert run(str(SCRIPT), "--quick").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts", ["step,sanitizer", "counterfactual,models", "xformers,digits,onnxruntime-cuda,metrics,serve"]
)
def test_its_parts_run_at_tiny_size(parts: str) -> None:
    done = run(str(SCRIPT), "--dry-run", parts, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in parts.split(","):
        assert f"== {part}: exit 0" in done.stdout
