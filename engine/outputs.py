"""Output folders that tell the truth: one run in each, what made it in run.json, names that are safe everywhere.

    run.json        what made the files: command, models, every setting, seed, versions; which files it wrote
    results.jsonl   one line for each image, each with all of that
    .lock           held while a run writes

A folder that holds a run takes no other one. The same command goes on in it: what is finished is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from counterlens.export.files import newer
from counterlens.export.hashing import file_digest

from .errors import CounterlensError, UsageError
from .files import cannot_write, real, sweep, write_atomically
from .images.files import make_folder

FORMAT, SCHEMA_VERSION = "counterlens-run", 1
RUN, LOG, LOCK = "run.json", "results.jsonl", ".lock"
# Of run.json, what two sessions of one run may differ in; all else is what was asked for.
SESSION = ("format", "started", "device", "threads", "cpu", "runtime", "versions", "sources", "files", "queries")
LONGEST = 230  # bytes of a name without its ending; file systems take 255 with it


@dataclass(frozen=True)
class Source:
    """What one output is made of: the name it would like, what says which it is, and its file, if it is one."""

    name: str
    says: Mapping[str, Any]
    path: Path | None = None


def safe_name(text: str) -> str:
    """A name for a file, without its ending: no folder, nothing hidden, no option, no control characters, not long."""
    kept = "".join("_" if c in "/\\" or unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    if not kept or kept[0] in ".-":
        kept = "_" + kept[1:]
    if len(kept.encode()) > LONGEST:
        tag = hashlib.sha256(os.fsencode(text)).hexdigest()[:12]
        kept = f"{kept.encode()[: LONGEST - 13].decode(errors='ignore')}-{tag}"
    return kept


def output_names(wanted: Iterable[str], taken: Iterable[str] = (), endings: Sequence[str] = ("",)) -> list[str]:
    """One safe name for each that is wanted, none twice: numbered where it is taken, in capitals or not.

    With `endings` no two names make the same file: `four.2` is none beside `four` where that makes `four.2.png`.
    """
    used = {_folded(name + ending) for name in taken for ending in endings}
    names = []
    for text in wanted:
        base = name = safe_name(text)
        n = 1
        while not used.isdisjoint(_folded(name + ending) for ending in endings):
            n += 1
            name = f"{base}-{n}"
        used |= {_folded(name + ending) for ending in endings}
        names.append(name)
    return names


def _folded(name: str) -> str:
    """What a file system may take for the same name: macOS and Windows know no capitals."""
    return unicodedata.normalize("NFC", name).casefold()


@dataclass
class Run:
    """A run's folder while it is written.

    Attributes:
        folder: where.
        facts: what made it, as every line of results.jsonl says it.
        names: of the outputs, without ending, one for each source.
        done: for each source its finished line of an earlier session, or None.
        further: by name of such a source, the lines that it has besides; see `Run.line`.
        description: run.json.
    """

    folder: Path
    facts: dict[str, Any]
    description: dict[str, Any]
    names: list[str] = field(default_factory=list)
    done: list[dict[str, Any] | None] = field(default_factory=list)
    further: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def claim(self, files: Iterable[str]) -> None:
        """Put files, relative to the folder, into run.json before they are written.

        Raises:
            UsageError: one is there that this run did not write.
        """
        ours = set(self.description["files"])
        new = [name for name in files if name not in ours]
        for name in new:
            if os.path.lexists(self.folder / name):
                raise UsageError(
                    f"out: {self.folder / name} is there, is none of this run's files and would be overwritten; "
                    "choose another folder"
                )
        self.description["files"] += new
        self.save()

    def line(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """What results.jsonl says of an output: its record, its name, and all that made it.

        A source's further lines say its name in `answer_of`; its own says in `answers` how many there are with it.
        """
        facts = {("run_seed" if k == "seed" else k): v for k, v in self.facts.items() if k != "started"}
        return {**record, "name": name, **{k: v for k, v in facts.items() if k not in record}}

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to results.jsonl.

        Raises:
            CounterlensError: it cannot be written; nothing of it is.
        """
        append_line(self.folder / LOG, line)

    def save(self) -> None:
        """Write run.json."""
        write_atomically(self.folder / RUN, json.dumps(self.description, indent=1) + "\n")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file, whole or not at all.

    Raises:
        CounterlensError: it cannot be written.
    """
    data = (json.dumps(record) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an output folder for this process.

    Raises:
        CounterlensError: another process holds it. UsageError: it cannot be locked.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise CounterlensError(f"out: {folder} is in use by another process; one run at a time") from error
    except (OSError, NotImplementedError) as error:
        raise UsageError(f"out: {folder} cannot be locked ({getattr(error, 'strerror', None) or error})") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def open_run(
    out: Path,
    facts: Mapping[str, Any],
    *,
    sources: Sequence[Source] = (),
    endings: Sequence[str] = (),
    further: Sequence[str] = (),
    files: Sequence[str] = (),
    inputs: Sequence[Path] = (),
    overwrite: bool = False,
    resume: bool = False,
    redo: bool = False,
    option: str = "--{}",
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Run]:
    """Open a folder for one run, a new one or the same again, and hold it until done.

    Args:
        out: created if needed.
        facts: what makes the files (`provenance`), with `command`; those of `SESSION` may differ when a run goes on.
        sources: one for each image; without them the run writes only `files`, and its repetition writes them again.
        endings: of the files that each source becomes, such as .png.
        further: endings of files that it may become besides.
        files: that the run writes besides.
        inputs: files and folders that it reads besides; neither these nor sources are ever removed or overwritten.
        overwrite: remove what the run that is there wrote, and nothing else.
        resume: the same run may get more sources.
        redo: make again what is finished.
        option: how a person says `overwrite` and `resume`.
        say: told what a person should read.

    Raises:
        UsageError: overwrite and resume, or the folder holds another run, or files that would be overwritten; the
            message says in what the runs differ. CounterlensError: another process works there, or a file cannot be
            written.
    """
    if overwrite and resume:
        raise UsageError(f"overwrite: not together with {option.format('resume')}")
    made: dict[str, Any] = json.loads(json.dumps({**facts, "schema_version": SCHEMA_VERSION}))
    out = make_folder(out)
    with locked(out):
        sweep(out)
        before = read_run(out)
        if before is not None and not _wrote(out, before):
            before = None
        every = [*endings, *further]
        wanted = [f"{name}{e}" for name in output_names((s.name for s in sources), (), every or ("",)) for e in every]
        read = {real(path) for path in (*inputs, *(s.path for s in sources if s.path is not None))}
        if own := read & {real(out / name) for name in wanted}:
            raise UsageError(f"out: {min(own)} is an input and would be overwritten; choose another folder")
        if before is not None and overwrite:
            _remove(out, before, read)
            before = None
        pool: dict[str, list[str]] = {}  # names that sources got before, by what says which they are
        for known, says in (before or {}).get("sources", {}).items():
            pool.setdefault(json.dumps(says, sort_keys=True), []).append(known)
        names: list[str | None] = []
        for source in sources:
            had = pool.get(json.dumps(source.says, sort_keys=True))
            names.append(had.pop(0) if had else None)
        new = [source.name for source, name in zip(sources, names, strict=True) if name is None]
        if before is not None:
            _check_same(out, before, made, 0 if resume else len(new), len(sources), option)
        fresh = iter(output_names(new, (before or {}).get("sources", {}), every or ("",)))
        final = [name or next(fresh) for name in names]
        description = {"format": FORMAT, **made, "sources": {}, "files": []}
        if before is not None:
            description |= {"sources": before["sources"], "files": before["files"]}
        run = Run(out, made, description, final)
        description["sources"] |= {n: json.loads(json.dumps(s.says)) for n, s in zip(final, sources, strict=True)}
        run.claim([*files, *([LOG] if sources else []), *(f"{n}{ending}" for n in final for ending in every)])
        lines = {} if before is None else _finished_lines(run, endings, redo=redo)
        run.done = [lines.get(name) for name in final]
        for source, line in zip(sources, run.done, strict=True):
            _check_unchanged(source, line)
        if finished := sum(line is not None for line in run.done):
            again = option.format("overwrite")
            say(f"{finished} of {len(sources)} are done already in {out}; {again} makes them again")
        try:
            yield run
        finally:
            if not _wrote(out, description):  # it failed before its first file: the folder is free
                (out / RUN).unlink(missing_ok=True)


def _wrote(out: Path, description: dict[str, Any]) -> bool:
    return any(os.path.lexists(out / str(name)) for name in description["files"])


def read_run(folder: Path) -> dict[str, Any] | None:
    """What run.json of a folder says; None where there is none.

    Raises:
        UsageError: run.json cannot be read, or is of another version.
    """
    path = folder / RUN
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"out: {path} cannot be read ({error}); choose another folder") from error
    known = {"command": str, "sources": dict, "files": list}
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UsageError(f"out: {path} is there and does not describe a run of counterlens; choose another folder")
    if problem := newer(description.get("schema_version"), SCHEMA_VERSION):
        raise UsageError(f"out: {path} was {problem}, or choose another folder")
    if description.get("schema_version") != SCHEMA_VERSION or not all(
        isinstance(description.get(k), kind) for k, kind in known.items()
    ):
        raise UsageError(
            f"out: {path} is of version {description.get('schema_version')}, this is version {SCHEMA_VERSION}; "
            "choose another folder"
        )
    return description


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested objects as `a.b.c` to JSON text."""
    if isinstance(value, dict):
        out: dict[str, str] = {}
        for key, inner in value.items():
            out |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return out
    return {prefix: json.dumps(value, ensure_ascii=False)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 8) -> str:
    """What differs between two nested objects, field by field with both values; empty where nothing does.

    Fields whose name has `hash` in it are sums of others.
    """
    theirs, mine = flat(dict(before)), flat(dict(now))
    told = [
        f"{k} was {theirs.get(k, 'none')}, is {mine.get(k, 'none')}"
        for k in dict.fromkeys([*mine, *theirs])
        if mine.get(k) != theirs.get(k) and "hash" not in k
    ]
    return "; ".join(told[:most]) + (f" (and {len(told) - most} more)" if len(told) > most else "")


def _check_same(out: Path, before: dict[str, Any], facts: dict[str, Any], new: int, asked: int, option: str) -> None:
    """Refuse another run, and the same one with sources that are new to it."""
    overwrite = option.format("overwrite")
    ways = f"{overwrite} replaces its files, or choose another folder"
    if before["command"] != facts["command"]:
        raise UsageError(
            f"out: {out} holds what {before['command']} wrote; choose another folder ({overwrite} would remove that)"
        )
    was, now = ({k: v for k, v in x.items() if k not in SESSION} for x in (before, facts))
    told = differences(was, now)
    if told:
        raise UsageError(f"out: {out} holds another run of {before['command']}: {told}; {ways}")
    if new:
        raise UsageError(
            f"out: {out} holds a run with these settings that was not asked for {new} of these {asked} images; "
            f"{option.format('resume')} adds them, {ways}"
        )


def _check_unchanged(source: Source, line: dict[str, Any] | None) -> None:
    """A finished line must be of the file as it is now."""
    if line is None or source.path is None or line.get("input_sha256") is None:
        return
    try:
        now = file_digest(source.path)
    except OSError:
        return  # gone since; its result stands
    if now != line["input_sha256"]:
        raise UsageError(
            f"out: {source.path} has changed since it was explained there; overwrite what is there, or choose another "
            "folder"
        )


def _finished_lines(run: Run, endings: Sequence[str], *, redo: bool) -> dict[str, dict[str, Any]]:
    """The lines of finished outputs by name; of those that are asked for now the others are dropped, to be redone."""
    path = run.folder / LOG
    if not path.exists():
        return {}
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"out: {path} cannot be read ({error}); --overwrite replaces it") from error
    known: dict[str, dict[str, dict[str, Any]]] = {}  # lines by name, by the source's name
    for text in texts:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed
        name = line.get("name") if isinstance(line, dict) else None
        if isinstance(name, str):
            known.setdefault(line.get("answer_of", name), {})[name] = line
    asked, kept = set(run.names), {}
    for source, lines in known.items():
        there = all((run.folder / f"{source}{e}").is_file() for e in endings)
        own = lines.get(source, {})
        whole = len(lines) == own.get("answers", 1) and all(_has_file(run.folder, line) for line in lines.values())
        if source not in asked or (not redo and there and "path" in own and whole):
            kept[source] = lines
    if sum(map(len, kept.values())) < len(texts):
        every = [line for lines in kept.values() for line in lines.values()]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in every))
    for source in asked & kept.keys():
        run.further[source] = [line for name, line in kept[source].items() if name != source]
    return {source: kept[source][source] for source in asked & kept.keys()}


def _has_file(folder: Path, line: dict[str, Any]) -> bool:
    """Whether a line says a file that is there; the folder may have been moved since."""
    return "path" in line and (folder / Path(line["path"]).name).is_file()


def remove_run(out: Path, read: set[Path]) -> None:
    """Remove what run.json of a folder says that a run wrote, if there is one; `read` are the next run's inputs."""
    if (description := read_run(out)) is not None:
        _remove(out, description, read)


def _remove(out: Path, description: dict[str, Any], read: set[Path]) -> None:
    """Remove the files that a run wrote, run.json last; what it does not list stays.

    Raises:
        UsageError: it is an audit's folder, one of the files is read by the next run, or cannot be removed.
    """
    if description["command"] == "counterlens audit":
        raise UsageError(f"out: {out} holds an audit; choose another folder")
    root = real(out)
    ours = [out / name for name in map(str, description["files"]) if ".." not in Path(name).parts]
    ours = [path for path in ours if real(path.parent).is_relative_to(root)]
    for path in ours:
        if own := read & {real(path), *real(path).parents}:
            raise UsageError(f"out: {path} is an input ({min(own)}) and would be overwritten; choose another folder")
    for path in [*ours, out / RUN]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"out: {path} cannot be removed ({error.strerror or error})") from error
