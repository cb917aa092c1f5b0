"""What was seen of a few samples in the search for shortcuts: one file a batch, so that it is resumed, in shards too.

A batch is always the same samples, whoever makes it, and its file stands there whole or not at all.
"""

from __future__ import annotations

import io
import json
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CounterlensError
from ..files import write_atomically

FOLDER = "disagreement"
VERSION = 1
# What NumPy and zipfile raise of a file that is cut short or has bytes turned.
DAMAGED = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, SyntaxError, RuntimeError, zlib.error,
    zipfile.BadZipFile, tokenize.TokenError,
)  # fmt: skip
AGAIN = "remove it, and it is made again"


@dataclass
class Look:
    """What was seen of n samples.

    Attributes:
        facts: JSON values.
        each: arrays [n, ...] by name.
        sums: sums over samples [H, W] by name; `facts["counts"]` says over how many.
    """

    facts: dict[str, Any]
    each: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)

    def data(self) -> bytes:
        """As a compressed npz file."""
        buffer, text = io.BytesIO(), json.dumps(self.facts | {"version": VERSION}).encode()
        arrays = {f"each {k}": v for k, v in self.each.items()} | {f"sum {k}": v for k, v in self.sums.items()}
        np.savez_compressed(buffer, allow_pickle=False, facts=np.frombuffer(text, np.uint8), **arrays)
        return buffer.getvalue()


def look_path(folder: Path, batch: int) -> Path:
    """Where a batch's file stands in an audit's folder."""
    return folder / FOLDER / f"{batch:06d}.npz"


def look_files(folder: Path) -> list[Path]:
    """Those that are there, in order."""
    return sorted((folder / FOLDER).glob("[0-9][0-9][0-9][0-9][0-9][0-9].npz"))


def write_look(folder: Path, batch: int, look: Look, hint: str) -> None:
    """Write a batch.

    Raises:
        CounterlensError: it cannot be written.
    """
    write_atomically(look_path(folder, batch), look.data(), hint=hint, folders=True)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file.

    Raises:
        CounterlensError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except DAMAGED as error:
        raise CounterlensError(f"{path}: cannot be read ({error}); {AGAIN}") from error


def read_look(path: Path) -> Look:
    """Read a batch.

    Raises:
        CounterlensError: it cannot be read, or a newer counterlens wrote it.
    """
    arrays = read_arrays(path)
    try:
        facts = json.loads(arrays.pop("facts").tobytes())
        version = facts["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CounterlensError(f"{path}: cannot be read ({error}); {AGAIN}") from error
    if version != VERSION:
        raise CounterlensError(f"{path}: of version {version} of its format, this is {VERSION}; {AGAIN}")
    named = {
        kind: {k.partition(" ")[2]: v for k, v in arrays.items() if k.startswith(kind)} for kind in ("each", "sum")
    }
    return Look(facts, named["each"], named["sum"])


def joined(looks: Sequence[Look]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays of all samples, one batch's after the other's, and the means [H, W] of what was summed."""
    some = [look for look in looks if look.each]
    each = {k: np.concatenate([look.each[k] for look in some]) for k in (some[0].each if some else ())}
    means = {}
    for name in dict.fromkeys(name for look in looks for name in look.sums):
        there = [look for look in looks if name in look.sums]
        means[name] = sum(look.sums[name] for look in there) / sum(look.facts["counts"][name] for look in there)
    return each, means
