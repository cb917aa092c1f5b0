"""Compiled artefacts on disk: found by what they were made from, complete or not there, built once.

Each entry is a folder named by the hash of its key, with the artefact's files and `artefact.json`: the key, every
file's size and SHA-256, and what the builder reported (parity, times). Writing goes to a folder of its own that is
renamed at the end, so a build that is killed leaves nothing that could be taken for an artefact; the next build of the
same key removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from counterlens.export.errors import ExportError
from counterlens.export.files import newer
from counterlens.export.hashing import file_digest, known_digest

SCHEMA_VERSION = 1
MANIFEST = "artefact.json"
HASHED = "hashed.json"  # what its files were when they were hashed last


@dataclass(frozen=True)
class Artefact:
    """An entry of the store: its folder, the key it was made from, what its builder reported, each file's SHA-256."""

    folder: Path
    key: dict[str, Any]
    report: dict[str, Any]
    hashes: dict[str, str] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """The path of one of its files."""
        return self.folder / name


def default_folder() -> Path:
    """COUNTERLENS_STORE, else `counterlens` in the user's cache folder."""
    if named := os.environ.get("COUNTERLENS_STORE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "counterlens"


def module_digest(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers, those of no state dict too."""
    digest = hashlib.sha256()
    for name, tensor in (module.state_dict() | dict(module.named_buffers())).items():
        if isinstance(tensor, Tensor):  # a module may save other things
            _add(digest, name, tensor)
    return digest.hexdigest()


def weights_digest(modules: Iterable[nn.Module], of: Callable[[nn.Module], str] = module_digest) -> str:
    """One hash of several modules' own, as `of` makes them; of a single one its own."""
    first, *more = [of(module) for module in modules]
    return hashlib.sha256(" ".join([first, *more]).encode()).hexdigest() if more else first


def tensors_digest(*tensors: Tensor) -> str:
    """SHA-256 over dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        _add(digest, "", tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def sources_digest(folders: Iterable[Path]) -> str:
    """SHA-256 over all Python sources in these folders: the code version of what is built from them."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)};".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Store:
    """A folder of artefacts.

    Args:
        folder: created when something is built; `default_folder()` without one.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)

    def path(self, key: Mapping[str, Any]) -> Path:
        """The folder of the entry with this key, there or not."""
        return self.folder / _name(key)

    def find(self, key: Mapping[str, Any]) -> Artefact | None:
        """The entry, its files checked against their hashes; None when there is none.

        Raises:
            ExportError: the entry is damaged or of another format.
        """
        return open_artefact(folder) if (folder := self.path(key)).exists() else None

    def get(self, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]], *, force: bool = False) -> Artefact:
        """The entry, built now if there is none (or with `force`). A second process waits and takes the first's.

        Args:
            key: everything the artefact depends on, as JSON values.
            build: writes the files into the folder it is given and returns a report of JSON values.
            force: build again, a damaged entry too.

        Raises:
            ExportError: the entry is damaged, or the disk is full. What `build` raises passes through.
        """
        entry = self.path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{entry.name}.lock"):
                if not force and (found := self.find(key)) is not None:
                    return found
                for left in self.folder.glob(f"{entry.name}.building-*"):
                    shutil.rmtree(left)
                work = self.folder / f"{entry.name}.building-{os.getpid()}"
                with _gone_at_the_end(work):
                    work.mkdir()
                    self._fill(work, key, build)
                    if entry.exists():
                        shutil.rmtree(entry)
                    os.replace(work, entry)
        except OSError as error:
            raise ExportError(f"{self.folder}: the artefact cannot be written ({error})") from error
        return open_artefact(entry)

    def _fill(self, work: Path, key: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> None:
        report = build(work)
        files = {
            str(p.relative_to(work)): {"bytes": p.stat().st_size, "sha256": file_digest(p)}
            for p in sorted(work.rglob("*"))
            if p.is_file()
        }
        manifest = {"schema_version": SCHEMA_VERSION, "key": dict(key), "files": files, "report": report}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def entries(self) -> list[Artefact]:
        """All entries, oldest first; ExportError names a damaged one."""
        found = [p for p in self.folder.glob("*/" + MANIFEST) if ".building-" not in p.parent.name]
        return [open_artefact(p.parent) for p in sorted(found, key=lambda p: p.stat().st_mtime)]


@contextmanager
def _gone_at_the_end(work: Path) -> Iterator[None]:
    """Remove a working folder whatever happens, SIGTERM (`timeout`, `docker stop`, a scheduler) included.

    Its own handler is only set where Python allows it, in the main thread, and where nobody else's is.
    """

    def stop(number: int, frame: object) -> None:
        shutil.rmtree(work, ignore_errors=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    free = threading.current_thread() is threading.main_thread()
    free = free and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if free:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def open_artefact(folder: Path) -> Artefact:
    """Read an entry and check its files. ExportError says what is wrong and how to be rid of it."""
    advice = f"delete the folder {folder} or build it again with --force"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if problem := newer(manifest.get("schema_version"), SCHEMA_VERSION):
            raise ExportError(f"{folder / MANIFEST}: {problem}, or {advice}")
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or known_digest(path, folder / HASHED) != expected["sha256"]:
                raise ExportError(f"{path}: not the file that was built (size or SHA-256 differs); {advice}")
        hashes = {name: file["sha256"] for name, file in manifest["files"].items()}
        return Artefact(folder, manifest["key"], manifest["report"], hashes)
    except FileNotFoundError as error:
        raise ExportError(f"{error.filename}: missing; {advice}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{folder / MANIFEST}: damaged ({error}); {advice}") from error


def _name(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
