"""The C++ sources in a program of their own under AddressSanitizer and UBSan."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ctest") is None, reason="needs cmake and ctest")
def test_standalone_program_under_sanitizers(tmp_path: Path) -> None:
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCOUNTERLENS_STANDALONE_TESTS=ON"],
        ["cmake", "--build", str(tmp_path)],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure"],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "1 tests passed" in result.stdout or "100% tests passed" in result.stdout
