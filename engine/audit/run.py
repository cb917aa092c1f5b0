"""Runs an audit: the plan, part after part with reading and writing beside it, resumable at every instant."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..blackbox.answers import FILE as ANSWERS
from ..config import Config
from ..errors import CounterlensError, UsageError
from ..files import real, sweep, write_atomically
from ..images.files import make_folder
from ..models.protocols import Classifier
from ..outputs import FORMAT as RUN_FORMAT
from ..outputs import RUN, SCHEMA_VERSION, locked
from .auditor import Auditor, open_auditor
from .conditions import conditions, held
from .plan import Chosen, parts_of, shard_of, write_plan
from .results import COMMAND, GOES_ON, MANIFEST, PLAN, Results, image_path, part_path
from .rows import Row

if TYPE_CHECKING:
    from ..core.core import EngineCore
    from ..core.photos import Photo


@dataclass
class Progress:
    """How far a run is: samples done in all and in this session, flips and failures among the latter, seconds."""

    total: int
    done: int = 0
    now: int = 0
    flips: int = 0
    failures: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Samples a second in this session."""
        return self.now / self.seconds if self.seconds else 0.0


class Interrupted(CounterlensError):
    """Ctrl-C: the running parts were finished (exit code 130)."""

    exit_code = 130


@contextmanager
def polite_interrupt(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; a second one interrupts as ever, and SIGTERM at once, leaving no partial."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        say("interrupted: finishing the running part; press Ctrl-C again to stop at once")

    def terminate(number: int, frame: FrameType | None) -> None:
        say("terminated; finished parts are kept, the same command goes on")
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, handle), signal.signal(signal.SIGTERM, terminate)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def run_parts(
    auditor: Auditor,
    results: Results,
    parts: Mapping[int, list[Chosen]],
    todo: Sequence[int],
    *,
    workers: int,
    stop: threading.Event,
    on_rows: Callable[[Sequence[Row]], None],
    on_step: Callable[[int, int, int], None],
) -> None:
    """Explain parts in order: the next one is read and the last one written while one is explained."""
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(2) as side:
        ahead: Future[list[Photo | str]] | None = None
        behind: Future[None] | None = None

        def read(part: int) -> list[Photo | str]:
            return auditor.read([c.sample for c in parts[part]], readers)

        def write(part: int, rows: Sequence[Row], files: dict[str, bytes]) -> None:
            results.write_part(part, rows, files)
            on_rows(rows)

        for k, part in enumerate(todo):
            photos = (ahead or side.submit(read, part)).result()
            ahead = side.submit(read, todo[k + 1]) if k + 1 < len(todo) else None
            size = len(parts[part])

            def stepped(i: int, n: int, size: int = size) -> None:
                on_step(i, n, size)

            rows, files = auditor.explain(part, parts[part], photos, stepped)
            if behind is not None:
                behind.result()
            results.made = conditions(auditor.engine, auditor.config)
            behind = side.submit(write, part, rows, files)
            if stop.is_set():
                break
        if behind is not None:
            behind.result()


def run_audit(
    auditor: Auditor,
    out: Path,
    *,
    shard: tuple[int, int] | None = None,
    workers: int = 2,
    ray: str | None = None,
    shortcuts: int = 0,
    overwrite: bool = False,
    on_progress: Callable[[Progress, float], None] = lambda progress, fraction: None,
    on_rows: Callable[[Sequence[Row]], None] = lambda rows: None,
    say: Callable[[str], None] = lambda text: None,
) -> Results:
    """Run an audit into a folder, or go on with it; see `Engine.audit`.

    Args:
        shortcuts: samples for the disagreement map, of which a shard sees its share; 0: none.
        overwrite: remove the audit that is in the folder.
        on_progress: told after every step and part; the second argument is the share of the running part.
        on_rows: told the rows of every part once they are written.
        say: told what a person should read.
    """
    if ray is not None and auditor.boxes:
        raise UsageError(
            f"ray: {auditor.boxes[0].name} is asked from one process, which counts queries and keeps answers"
        )
    if shard is not None and not (1 <= shard[0] <= shard[1]):
        raise UsageError(f"shard: expected NUMBER/COUNT with 1 <= NUMBER <= COUNT, got {shard[0]}/{shard[1]}")
    out = make_folder(out)
    engine, config = auditor.engine, auditor.config
    with ExitStack() as stack:
        stack.enter_context(locked(out))
        stop = stack.enter_context(polite_interrupt(say))
        here = conditions(engine, config)
        files = {real(s.where) for s in auditor.source.samples if isinstance(s.where, Path)}
        read = {real(auditor.source.path), *files}
        results = Results.begin(out, auditor.identity, shard, here, overwrite=overwrite, read=read)
        for box in auditor.boxes:
            box.keep(out / ANSWERS)
        stack.callback(_count_queries, auditor, results)
        stack.enter_context(held(engine, results.manifest["conditions"], config, say))
        write_atomically(out / RUN, json.dumps(run_json(auditor, shard), indent=1) + "\n", hint=GOES_ON)
        if (out / PLAN).exists():
            chosen = auditor.read_plan(out)
        else:
            chosen = auditor.plan()
            if stop.is_set():
                raise Interrupted("interrupted while samples were chosen; the same command begins again")
            write_plan(out, chosen, auditor.source.samples)
        parts = parts_of(chosen, auditor.options.part_size)
        mine = shard_of(parts, shard)
        if not mine and shard is not None:
            size = auditor.options.part_size
            say(f"shard {shard[0]}/{shard[1]} is empty: {len(chosen)} samples make {len(parts)} parts of {size}")
        missing = [p for p in mine if not (out / part_path(p)).exists()]
        names = (name for p in missing for name in (image_path(p, 0, "input", "png"), part_path(p)))
        for place in {out, *((out / name).parent for name in names)}:
            sweep(place)
        done = results.finished({p: len(parts[p]) for p in mine})
        todo = [p for p in mine if p not in done]
        progress = Progress(sum(len(parts[p]) for p in mine), sum(len(parts[p]) for p in done))
        if done:
            say(f"going on: {progress.done} of {progress.total} samples are done")
        started = time.perf_counter()
        on_progress(progress, 0.0)

        def wrote(rows: Sequence[Row]) -> None:
            progress.done += len(rows)
            progress.now += len(rows)
            progress.flips += sum(bool(r.flipped) for r in rows)
            progress.failures += sum(r.status == "failed" for r in rows)
            progress.seconds = time.perf_counter() - started
            on_rows(rows)
            on_progress(progress, 0.0)

        if ray is not None:
            from .cluster import run_on_ray

            run_on_ray(auditor, results, todo, parts, ray, workers=workers, stop=stop, on_rows=wrote)
        else:
            run_parts(
                auditor, results, parts, todo, workers=workers, stop=stop, on_rows=wrote,
                on_step=lambda i, n, size: on_progress(progress, size * i / n),
            )  # fmt: skip
        missing = [p for p in mine if not (out / part_path(p)).exists()]
        if missing:
            if stop.is_set():
                raise Interrupted(
                    f"interrupted with {progress.done} of {progress.total} samples done; the same command goes on"
                )
            raise CounterlensError(
                f"out: {len(missing)} parts are not in {out}; every worker must write to this folder"
            )
        if shortcuts and auditor.options.counterfactuals:
            from .disagreement import run_disagreement

            say("looking for shortcuts")
            found = run_disagreement(auditor, results, chosen, shortcuts, shard, stopped=stop.is_set)
            if found is None and stop.is_set():
                raise Interrupted("interrupted while shortcuts were looked for; the same command goes on")
        mark_finished(results, progress.total)
    return results


def run_json(auditor: Auditor, shard: tuple[int, int] | None) -> dict[str, Any]:
    """What run.json says: who made the folder, with which models and settings; the manifest has it in full."""
    identity, facts = auditor.identity, auditor.engine.facts(auditor.config)
    return {
        "format": RUN_FORMAT, "command": COMMAND, "schema_version": SCHEMA_VERSION, **facts,
        "options": identity["options"], "shard": shard, "source": identity["source"], "audit": identity["hash"],
        "manifest": MANIFEST, "sources": {}, "files": [],
    }  # fmt: skip


def _count_queries(auditor: Auditor, results: Results) -> None:
    """Write into the manifest how often boxes were asked, in this session and in all."""
    if auditor.boxes:
        results.manifest["queries"] = [box.record() for box in auditor.boxes]
        results.save()


def mark_finished(results: Results, samples: int) -> None:
    """Write into the manifest that all is there, with the SHA-256 of every part by path."""
    hashes = {
        p.relative_to(results.folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in results.part_files()
    }
    results.manifest["finished"] = {"samples": samples, "parts": hashes}
    results.save()


def audit(
    engine: EngineCore,
    source: str | Path,
    out: str | Path,
    config: Config | None = None,
    judges: Mapping[str, Classifier] | None = None,
    *,
    shard: tuple[int, int] | None = None,
    workers: int = 2,
    ray: str | None = None,
    shortcuts: int = 0,
    overwrite: bool = False,
    report: bool = True,
    on_progress: Callable[[Progress, float], None] = lambda progress, fraction: None,
    on_rows: Callable[[Sequence[Row]], None] = lambda rows: None,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Results:
    """Explain a whole data set; see `Engine.audit`.

    Args:
        shard: (number from 1, count): only this share of the parts; `merge.merge` puts shards together.
        workers: threads that read images; with `ray` the number of engines.
        ray: `local`, or the address of a Ray cluster whose machines see source and folder.
        shortcuts: samples for the disagreement map (`audit.disagreement`); 0: none.
        overwrite: remove the audit that is in the folder.
        report: write report.html at the end (needs jinja2).
        on_progress, on_rows, say: see `run_audit`.
        options: of `Options`.
    """
    auditor = open_auditor(engine, source, config, judges, **options)
    results = run_audit(
        auditor, Path(out), shard=shard, workers=workers, ray=ray, shortcuts=shortcuts, overwrite=overwrite,
        on_progress=on_progress, on_rows=on_rows, say=say,
    )  # fmt: skip
    if report:
        from .report import write_report

        write_report(results)
    return results
