"""Shards of one audit put together, and what an audit will cost before it is run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch

from ..errors import CounterlensError, UsageError
from ..files import real, write_atomically
from ..images.files import make_folder
from ..outputs import RUN, differences, locked
from ..runtime.registry import same_as_eager
from .auditor import Auditor
from .disagreement import conclude_folder, find
from .looks import FOLDER as LOOKS
from .looks import look_files, read_look
from .plan import parts_of, shard_of
from .results import GOES_ON, PLAN, Results, image_path, part_path
from .rows import table_bytes
from .run import mark_finished


def merge(folders: Sequence[Path], out: Path, say: Callable[[str], None] = lambda text: None) -> Results:
    """Copy the parts of several shards into one audit; run again after a missing shard was finished, it goes on.

    Machines may have run it differently where `auto` chose: a compiled runtime's parts say how far it was from eager.

    Raises:
        UsageError: they are not of the same audit, or a runtime's parity was not recorded; the message says what to do.
        CounterlensError: parts are missing; the message says which shards are to be run or finished.
    """
    opened = [Results.open(folder) for folder in folders]
    if not opened:
        raise UsageError("folders: none given")
    first = opened[0]
    for other in opened[1:]:
        if told := differences(first.manifest["identity"], other.manifest["identity"]):
            raise UsageError(
                f"{other.folder}: no shard of the audit in {first.folder}: {told}. Run all shards with the same options"
            )
    plan = _read(first.folder / PLAN)
    for other in opened[1:]:
        if _read(other.folder / PLAN) != plan:
            raise UsageError(f"{other.folder}: its plan is not that of {first.folder}; shards need the same source")
    for results in opened:
        if not results.part_files():
            say(f"{results.folder} is empty: it has no finished part")
    _check_made(opened, say)
    out = make_folder(out)
    if real(out) in [real(folder) for folder in folders]:
        raise UsageError(f"out: {out} is one of the shards; choose a folder of its own")
    with locked(out):
        merged = Results.begin(out, first.manifest["identity"], None, None)
        merged.manifest.setdefault("conditions", first.manifest.get("conditions", {}))
        write_atomically(out / PLAN, plan, hint=GOES_ON)
        if (first.folder / RUN).exists():
            write_atomically(out / RUN, _read(first.folder / RUN), hint=GOES_ON)
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
            shards = first.manifest["shard"]
            count = shards[1] if shards else 1
            named = ", ".join(f"{s}/{count}" for s in sorted({p % count + 1 for p in missing}))
            raise CounterlensError(
                f"{len(missing)} of {len(parts)} parts are missing; run or finish shards {named}, then merge again"
            )
        _merge_looks(opened, out, say)
        mark_finished(merged, samples)
    return merged


def _merge_looks(opened: Sequence[Results], out: Path, say: Callable[[str], None]) -> None:
    """Put together what shards saw in the search for shortcuts, and test it once nothing is missing.

    Raises:
        UsageError: they looked at another number of samples.
    """
    found: dict[str, Path] = {}
    for results in opened:
        for path in look_files(results.folder):
            found.setdefault(path.name, path)
    if not found:
        return
    asked = {path: read_look(path).facts for path in found.values()}
    first, said = next(iter(asked.items()))
    for path, facts in asked.items():
        if facts["asked"] != said["asked"]:
            raise UsageError(
                f"{path}: of a search among {facts['asked']} samples, {first} of one among {said['asked']}; run all "
                "shards with the same --shortcuts"
            )
    for path in look_files(out):  # of an earlier merge
        if read_look(path).facts["asked"] != said["asked"]:
            path.unlink()
    for name, path in found.items():
        write_atomically(out / LOOKS / name, _read(path), hint=GOES_ON, folders=True)
    if (missing := said["batches"] - len(look_files(out))) > 0:
        say(f"shortcuts: {missing} of {said['batches']} batches are missing; run all shards with the same --shortcuts")
        return
    conclude_folder(out)


def _check_made(opened: Sequence[Results], say: Callable[[str], None]) -> None:
    """Parts of several runtimes must be held to eager; what else differs between their machines is said.

    Raises:
        UsageError: a runtime's parity with eager is not recorded, or did not hold.
    """
    made = {results.folder: results.made_by() for results in opened}
    everything = [facts for found in made.values() for facts in found]
    if len({json.dumps(facts.get("runtimes"), sort_keys=True) for facts in everything}) > 1:
        for folder, found in made.items():
            for facts in found:
                used = {name for by_slots in facts["runtimes"].values() for name in by_slots.values()}
                for name in sorted(n for n in used if not same_as_eager(n)):
                    parity = facts.get("parity", {}).get(name)
                    if parity is None or not parity["worst"] <= parity["tolerance"]:
                        raise UsageError(
                            f"{folder}: its parts were made by {name}, whose parity with eager is not recorded there, "
                            "and others by another runtime; run all shards with the same --runtime, such as eager"
                        )
    told = {differences(everything[0], facts) for facts in everything[1:]} - {""} if everything else set()
    for text in sorted(told):
        say(f"shards were made under different conditions, which their parts say: {text}")


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


def estimate(auditor: Auditor, shortcuts: int = 0, shard: tuple[int, int] | None = None) -> Estimate:
    """Run a batch of samples from all over the plan without writing anything, and scale up.

    Args:
        shortcuts, shard: see `run.run_audit`; the search for shortcuts is measured on the same batch.
    """
    chosen = auditor.plan()
    parts = parts_of(chosen, auditor.options.part_size)
    count = sum(len(parts[p]) for p in shard_of(parts, shard))
    size = min(len(chosen), auditor.options.part_size, auditor.engine.slots[-1])
    some = [chosen[i * len(chosen) // max(size, 1)] for i in range(size)]
    auditor.explain(0, some, auditor.read([c.sample for c in some]))  # the first run also loads and compiles
    started = time.perf_counter()
    rows, files = auditor.explain(0, some, auditor.read([c.sample for c in some]))
    seconds = (time.perf_counter() - started) * count / max(size, 1)
    asked = min(shortcuts, len(chosen)) / (1 if shard is None else shard[1]) if auditor.options.counterfactuals else 0
    images = auditor.squares(some) if asked else {}
    if len(images) > 1 and len(auditor.engine.labels) > 1:
        started = time.perf_counter()
        find(auditor.engine, torch.stack(list(images.values())), list(images), auditor.config)
        seconds += (time.perf_counter() - started) * asked / len(images)
    kept = sum(map(len, files.values())) + len(table_bytes(rows, {}))
    return Estimate(count, seconds, int(kept * count / max(size, 1)), size)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds a folder, or would."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(os.path.abspath(folder)).free
