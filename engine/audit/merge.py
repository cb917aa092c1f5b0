"""Shards of one audit put together, and what an audit will cost before it is run."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from ..images import make_folder
from .explaining import Auditor
from .results import GOES_ON, PLAN, Results, image_path, locked, part_path, table_bytes
from .run import mark_finished


def merge(folders: Sequence[Path], out: Path) -> Results:
    """Copy the parts of several shards into one audit; run again after a missing shard was finished, it goes on.

    Raises:
        UsageError: they are not of the same audit; the message says in what they differ.
        CounterlensError: parts are missing; the message says which shards are to be run or finished.
    """
    opened = [Results.open(folder) for folder in folders]
    if not opened:
        raise UsageError("folders: none given")
    plan = _read(opened[0].folder / PLAN)
    for other in opened[1:]:
        if _read(other.folder / PLAN) != plan:
            raise UsageError(f"{other.folder}: its plan is not that of {opened[0].folder}; shards need the same source")
    out = make_folder(out)
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise UsageError(f"out: {out} is one of the shards; choose a folder of its own")
    with locked(out):
        merged = Results.begin(out, opened[0].manifest["identity"], None)
        for other in opened[1:]:
            Results.begin(out, other.manifest["identity"], None)  # says in what it differs
        write_atomically(out / PLAN, plan, hint=GOES_ON)
        size = merged.manifest["identity"]["options"]["part_size"]
        samples = pq.read_metadata(out / PLAN).num_rows
        parts = {i // size: min(size, samples - i) for i in range(0, samples, size)}
        done = merged.finished(parts)
        for results in opened:
            for part in sorted(results.finished(parts) - done):
                _copy(results.folder, out, part)
                done.add(part)
        missing = sorted(parts.keys() - done)
        if missing:
            shards = opened[0].manifest["shard"]
            count = shards[1] if shards else 1
            named = ", ".join(f"{s}/{count}" for s in sorted({p % count + 1 for p in missing}))
            raise CounterlensError(
                f"{len(missing)} of {len(parts)} parts are missing; run or finish shards {named}, then merge again"
            )
        mark_finished(merged, samples)
    return merged


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error


def _copy(source: Path, out: Path, part: int) -> None:
    """Copy a part: its images first, then its rows."""
    images = Path(image_path(part, 0, "input", "png")).parent
    try:
        if (source / images).is_dir():
            shutil.rmtree(out / images, ignore_errors=True)
            shutil.copytree(source / images, out / images)
        rows = (source / part_path(part)).read_bytes()
    except (OSError, shutil.Error) as error:
        raise CounterlensError(f"{source}: part {part} cannot be copied ({error}); what is copied stays") from error
    write_atomically(out / part_path(part), rows, hint=GOES_ON, folders=True)


@dataclass(frozen=True)
class Estimate:
    """What an audit will take: samples, seconds, bytes on disk, and on how many samples that was measured."""

    samples: int
    seconds: float
    bytes: int
    measured_on: int


def estimate(auditor: Auditor) -> Estimate:
    """Run the first few samples without writing anything, and scale up."""
    chosen = auditor.plan()
    first = chosen[: min(len(chosen), auditor.options.part_size, auditor.engine.slots[-1])]
    images, unread = auditor.read([c.sample for c in first])
    auditor.explain(0, first, images, unread)  # the first run also loads and compiles
    started = time.perf_counter()
    images, unread = auditor.read([c.sample for c in first])
    rows, files = auditor.explain(0, first, images, unread)
    seconds = time.perf_counter() - started
    size = sum(map(len, files.values())) + len(table_bytes(rows, {}))
    scale = len(chosen) / max(len(first), 1)
    return Estimate(len(chosen), seconds * scale, int(size * scale), len(first))


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds a folder, or would."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(os.path.abspath(folder)).free
