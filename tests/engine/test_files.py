"""Writing files: whole or not at all, by the umask, whatever the name's length and whatever stops it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from counterlens.engine.errors import CounterlensError
from counterlens.engine.files import write_atomically


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("name", ["a.png", "m" * 251 + ".png"])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int, name: str) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / name, b"x")
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == mode
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError, OSError])
def test_what_stops_it_leaves_the_old_file(tmp_path: Path, stop: type[BaseException]) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def half(file) -> None:
        file.write(b"new, and")
        raise stop("no")

    with pytest.raises(CounterlensError if stop is OSError else stop):
        write_atomically(path, half)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


@pytest.mark.parametrize("where", ["file/a.png", "folder", "gone/a.png", "n" * 300, "/proc/a.png"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CounterlensError, match=r"cannot be written \(.+\); choose another") as error:
        write_atomically(tmp_path / where, "x", hint="choose another")
    assert str(tmp_path / where) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
