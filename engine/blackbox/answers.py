"""Answers of black boxes, kept by image: in memory, or in a SQLite file that survives a kill.

A row is committed when its answer arrives, and a query is counted before it is sent. Several boxes (a classifier and a
judge) share a file; keys are the box's identity and the SHA-256 of the image.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CounterlensError

FILE = "answers.sqlite"
COUNTS = ("asked", "retried", "failed", "cached", "requests")
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS boxes (
    box TEXT PRIMARY KEY, name TEXT NOT NULL, fingerprint TEXT,
    {", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in COUNTS)}
);
CREATE TABLE IF NOT EXISTS answers (
    box TEXT NOT NULL, image BLOB NOT NULL, answer BLOB NOT NULL, PRIMARY KEY (box, image)
) WITHOUT ROWID;
"""
MOST = 500  # keys in one query
PATIENCE_S = 30  # that others who write are waited for


def key_of(
    image: NDArray[np.uint8],  # [H, W, 3]
) -> bytes:
    """SHA-256 of an image's size and pixels."""
    return hashlib.sha256(f"{image.shape[0]}x{image.shape[1]}:".encode() + image.tobytes()).digest()


class Answers:
    """The answers of one box, [labels] float32 by image, and how often it was asked, in all sessions.

    Args:
        path: the file; None keeps them in memory.
        box: the box's identity. name: as people know it.

    Attributes:
        session: the counts of this session alone, of which there may be several at once.

    Raises:
        CounterlensError: the file cannot be opened or is no such file.
    """

    def __init__(self, path: Path | None, box: str, name: str) -> None:
        self.path, self.box = path, box
        self._lock = threading.RLock()
        self.session = dict.fromkeys(COUNTS, 0)
        try:
            self._db = sqlite3.connect(
                ":memory:" if path is None else path,
                check_same_thread=False,
                isolation_level=None,
                timeout=PATIENCE_S,
            )
            self._share()
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(SCHEMA)
            self._run("INSERT OR IGNORE INTO boxes (box, name) VALUES (?, ?)", box, name)
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _share(self) -> None:
        """Have readers and a writer at the same time; SQLite itself does not wait where others do this just now."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """What is known of these images."""
        found: dict[bytes, NDArray[np.float32]] = {}
        for start in range(0, len(keys), MOST):
            some = keys[start : start + MOST]
            marks = ",".join("?" * len(some))
            rows = self._run(f"SELECT image, answer FROM answers WHERE box = ? AND image IN ({marks})", self.box, *some)
            found |= {image: np.frombuffer(answer, dtype=np.float32) for image, answer in rows}
        return found

    def put(self, rows: Iterable[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Keep answers, all of these or none."""
        with self._writing():
            for key, answer in rows:
                self._run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", self.box, key, answer.tobytes())

    def spend(self, images: int, most: int | None) -> int:
        """Count a request of so many images, or of those that `most` in all leaves, also to other processes."""
        with self._writing():
            allowed = images if most is None else max(0, min(images, most - self.counts()["asked"]))
            if allowed:
                self.count(asked=allowed, requests=1)
        return allowed

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """All of what is written here or none, while no other process writes."""
        with self._lock:
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.rollback()

    def count(self, **more: int) -> None:
        """Add to the counts."""
        changes = ", ".join(f"{name} = {name} + {by:d}" for name, by in more.items())
        with self._lock:
            self._run(f"UPDATE boxes SET {changes} WHERE box = ?", self.box)
            for name, by in more.items():
                self.session[name] += by

    def counts(self) -> dict[str, int]:
        """The counts of all sessions."""
        (row,) = self._run(f"SELECT {', '.join(COUNTS)} FROM boxes WHERE box = ?", self.box)
        return dict(zip(COUNTS, row, strict=True))

    def __len__(self) -> int:
        return int(self._run("SELECT count(*) FROM answers WHERE box = ?", self.box)[0][0])

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """What the box said of the probe images when the first answer was kept."""
        ((text,),) = self._run("SELECT fingerprint FROM boxes WHERE box = ?", self.box)
        return None if text is None else json.loads(text)

    @fingerprint.setter
    def fingerprint(self, value: dict[str, Any]) -> None:
        self._run("UPDATE boxes SET fingerprint = ? WHERE box = ?", json.dumps(value), self.box)

    def merge(self, other: Answers) -> None:
        """Take over what another one of the same box holds, and what this session has counted there."""
        rows = other._run("SELECT image, answer FROM answers WHERE box = ?", self.box)
        self.put((key, np.frombuffer(answer, np.float32)) for key, answer in rows)
        self.count(**other.session)

    def close(self) -> None:
        """Let the file go."""
        self._db.close()

    def _run(self, statement: str, *values: Any) -> list[Any]:
        try:
            with self._lock, closing(self._db.execute(statement, values)) as rows:
                return rows.fetchall()
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error) -> CounterlensError:
        return CounterlensError(f"{self.path}: answers cannot be read or kept ({error}); what was kept before stays")
