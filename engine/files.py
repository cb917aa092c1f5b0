"""Files of ours: written whole or not at all, with the permissions that the umask gives."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from counterlens.export import files
from counterlens.export.files import UNFINISHED, write_whole

from .errors import CounterlensError


def write_atomically(
    path: Path, data: bytes | str | Callable[[BinaryIO], object], *, hint: str = "", folders: bool = False
) -> None:
    """Write a file that stands there whole or not at all, also after a power failure.

    Args:
        path: of the file; one that is there is replaced.
        data: bytes, text (UTF-8), or what writes them into an open binary file.
        hint: added to the message of a failure: what to do then.
        folders: make those that are missing on the way to it.

    Raises:
        CounterlensError: it cannot be written; the message names it.
    """
    try:
        write_whole(path, data, folders=folders)
    except OSError as error:
        raise cannot_write(path, error, hint) from error


def real(path: Path) -> Path:
    """Where a path leads, all links followed; a link to itself stays as it is (`Path.resolve` raises RuntimeError)."""
    return Path(os.path.realpath(path))


def sweep(folder: Path) -> None:
    """Remove what `write_atomically` of a process that was killed left in a folder; for whoever holds it."""
    for path in folder.glob(".*.partial"):
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError, hint: str = "") -> CounterlensError:
    """The error of a path that cannot be written: which one, why, and what to do."""
    return CounterlensError(files.cannot_write(path, error, hint))
