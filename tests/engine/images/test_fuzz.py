"""A few hundred mutated files through the reader; `python -m bench.fuzz` reads many more, in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench.fuzz import FORMATS, TABLES, bomb, mutated, read_one, seeds


@pytest.mark.parametrize("kind", [*FORMATS, *TABLES])
def test_mutated_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(seeds("png")[0])
    (tmp_path / "b c.png").write_bytes(seeds("png")[0])
    for data in seeds(kind)[:2]:
        assert read_one(kind, data, tmp_path) == "read"
    results = set()
    for number in range(25):
        started = time.process_time()
        results.add(read_one(kind, mutated(kind, 1, number), tmp_path))
        assert time.process_time() - started < 5
    assert results <= {"read", "refused"}
    assert "refused" in results
    assert mutated(kind, 1, 3) == mutated(kind, 1, 3)
    assert sorted(os.listdir(tmp_path))[:2] == ["a.png", "b c.png"]


def test_a_picture_of_3600_megapixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    started = time.process_time()
    assert read_one("bomb", bomb(6), tmp_path) == "refused"
    assert time.process_time() - started < 1
