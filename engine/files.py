"""Files of ours: written whole or not at all, with the permissions that the umask gives."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import CounterlensError

UNFINISHED = re.compile(r"\.[0-9a-f]{12}\.[0-9]+\.partial")


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
    # The name of the unfinished file is short, whatever the path's own: file systems take 255 bytes.
    tag = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    partial = path.with_name(f".{tag}.{os.getpid()}.partial")
    try:
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                if callable(data):
                    data(file)
                else:
                    file.write(data.encode(errors="surrogateescape") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:  # whatever stopped it, an interrupt too; once it is replaced there is nothing left
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
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
    return CounterlensError(f"{path}: cannot be written ({error.strerror or error}){hint and f'; {hint}'}")
