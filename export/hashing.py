"""Hashes of files, without PyTorch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from counterlens.export.files import write_whole

YOUNG = 2_000_000_000  # nanoseconds in which a file may change twice under one time stamp


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def known_digest(path: Path, memory: Path) -> str:
    """`file_digest`, hashed once: gigabytes take seconds, at every start.

    Args:
        path: of the file.
        memory: JSON file that keeps the hash beside size, inode and both times of change; where any of them differs, or
            the file was changed just before it was hashed, it is hashed again.
    """
    before = path.stat()
    now = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
    try:
        known: dict[str, Any] = json.loads(memory.read_text())
        if known[path.name][0] == now:
            return str(known[path.name][1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # none, or damaged: it is made again
        known = {}
    digest = file_digest(path)
    if max(before.st_mtime_ns, before.st_ctime_ns) < time.time_ns() - YOUNG:
        with contextlib.suppress(OSError):  # in a store that cannot be written it is hashed every time
            write_whole(memory, json.dumps(known | {path.name: [now, digest]}) + "\n")
    return digest
