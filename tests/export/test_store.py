"""The artefact store: complete entries or none, built once, damage named."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from counterlens.export import hashing
from counterlens.export.errors import ExportError
from counterlens.export.store import MANIFEST, Store, default_folder, weights_digest

KEY = {"what": "test", "n": 1}


def write(folder: Path) -> dict[str, Any]:
    (folder / "a.bin").write_bytes(b"abc")
    return {"ok": True}


def test_built_once_and_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find(KEY) is None
    first = store.get(KEY, write)
    assert first.file("a.bin").read_bytes() == b"abc"
    assert first.key == KEY
    assert first.report == {"ok": True}
    again = store.get(KEY, lambda folder: pytest.fail("built twice"))
    assert again.folder == first.folder
    assert store.find({"what": "test", "n": 2}) is None
    assert [a.key for a in store.entries()] == [KEY]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        write(folder)
        raise ValueError("no")

    store = Store(tmp_path)
    with pytest.raises(ValueError, match="no"):
        store.get(KEY, fail)
    assert store.find(KEY) is None
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    store.get(KEY, write)


def test_a_killed_build_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    left = tmp_path / f"{store.path(KEY).name}.building-1"
    left.mkdir(parents=True)
    (left / "a.bin").write_bytes(b"half")
    assert store.find(KEY) is None
    store.get(KEY, write)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["changed", "missing", "manifest", "format"])
def test_damage_is_named_and_force_mends_it(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.get(KEY, write)
    manifest = entry.file(MANIFEST)
    if damage == "changed":
        entry.file("a.bin").write_bytes(b"abd")
    elif damage == "missing":
        entry.file("a.bin").unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 99}))
    newer = r"artefact\.json: written by a newer counterlens \(schema 99; this one knows 1\): update"
    named = {"manifest": "artefact.json", "format": newer}.get(damage, "a.bin")
    with pytest.raises(ExportError, match=rf"{named}.*--force"):
        store.get(KEY, write)
    assert store.get(KEY, write, force=True).file("a.bin").read_bytes() == b"abc"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        Store(tmp_path / "file" / "store").get(KEY, write)


def _slow_build(folder: Path) -> dict[str, Any]:
    time.sleep(0.5)
    (folder / "by.txt").write_text(multiprocessing.current_process().name)
    return {}


def _in_process(folder: str, queue: Any) -> None:
    queue.put(Store(folder).get(KEY, _slow_build).file("by.txt").read_text())


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_in_process, args=(str(tmp_path), queue), name=f"w{i}") for i in range(2)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers[0] == answers[1]


def test_weights_digest_sees_what_no_state_dict_holds() -> None:
    digests = []
    for mean in (0.0, 0.5, 0.5):
        net = nn.Linear(2, 2)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        net.register_buffer("mean", torch.full((3,), mean), persistent=False)
        digests.append(weights_digest([net]))
    assert digests[0] != digests[1] == digests[2]


def test_weights_digest_sees_every_value() -> None:
    net = nn.Linear(3, 2)
    before = weights_digest([net])
    assert weights_digest([net]) == before
    net.bias.data[1] += 1
    assert weights_digest([net]) != before


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COUNTERLENS_STORE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "counterlens"
    monkeypatch.setenv("COUNTERLENS_STORE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    entry = store.get(KEY, lambda folder: {"size": (folder / "model.onnx").write_bytes(b"a" * 100)})
    path, memory = entry.file("model.onnx"), entry.folder / "hashed.json"
    assert store.find(KEY) is not None
    assert not memory.exists()  # it is too young: it could change again under the same time stamp
    later = SimpleNamespace(time_ns=lambda: time.time_ns() + 2_100_000_000)
    monkeypatch.setattr(hashing, "time", later)
    assert store.find(KEY) is not None
    known = json.loads(memory.read_text())
    memory.write_text(json.dumps({"model.onnx": [known["model.onnx"][0], "0" * 64]}))
    with pytest.raises(ExportError, match="SHA-256 differs"):  # so it was the memory that was asked
        store.find(KEY)
    memory.write_text("{")
    assert store.find(KEY) is not None
    assert json.loads(memory.read_text()) == known
    times = path.stat()
    path.write_bytes(b"a" * 99 + b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # nothing but the inode's own time says it
    with pytest.raises(ExportError, match="SHA-256 differs"):
        store.find(KEY)
