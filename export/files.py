"""Files that stand there whole or not at all, and which version of counterlens can read them; without PyTorch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

UNFINISHED = re.compile(r"\.[0-9a-f]{12}\.[0-9]+\.partial")


def write_whole(path: Path, data: bytes | str | Callable[[BinaryIO], object], *, folders: bool = False) -> None:
    """Write a file that stands there whole or not at all, also after a power failure.

    Args:
        path: of the file; one that is there is replaced.
        data: bytes, text (UTF-8), or what writes them into an open binary file.
        folders: make those that are missing on the way to it.

    Raises:
        OSError: it cannot be written.
    """
    # The name of the unfinished file is short, whatever the path's own: file systems take 255 bytes.
    tag = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    partial = path.with_name(f".{tag}.{os.getpid()}{threading.get_native_id()}.partial")
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


def cannot_write(path: Path, error: OSError, hint: str = "") -> str:
    """The message of a path that cannot be written: which one, why, and what to do."""
    return f"{path}: cannot be written ({error.strerror or error}){hint and f'; {hint}'}"


def newer(schema: object, known: int) -> str | None:
    """What to say of a file whose `schema_version` this counterlens does not know yet; None where it does."""
    if isinstance(schema, int) and schema > known:
        return f"written by a newer counterlens (schema {schema}; this one knows {known}): update"
    return None
