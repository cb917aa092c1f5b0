"""An audit goes on under the conditions that it began under: threads, runtimes, versions; shards of many machines."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from counterlens.engine.audit import conditions as conditions_module
from counterlens.engine.audit.merge import merge
from counterlens.engine.audit.results import Results, part_path
from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.runtime.artefacts import build
from tests.engine.audit.test_audit import PART, SETTINGS, comparable, make_engine, run
from tests.engine.images.test_sources import save

ROOT = Path(__file__).parents[3]
COUNT = 11


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(COUNT):
        save(folder / str(i % 3) / f"{i}.png", i)
    return folder


@pytest.fixture(scope="module")
def unbroken(tiny, source: Path, tmp_path_factory) -> Results:
    return run(make_engine(tiny), source, tmp_path_factory.mktemp("unbroken"))


def drop(results: Results, *parts: int) -> None:
    """As if an audit had been stopped before these parts."""
    for part in parts:
        (results.folder / part_path(part)).unlink()
    manifest = json.loads((results.folder / "manifest.json").read_text())
    del manifest["finished"]
    (results.folder / "manifest.json").write_text(json.dumps(manifest))


def copied(results: Results, to: Path) -> Results:
    shutil.copytree(results.folder, to)
    return Results.open(to)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("began", "goes_on"), [(1, 2), (1, 3), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_half_with_other_threads_are_the_rows_of_one_run(
    tiny, source: Path, tmp_path: Path, threads, began: int, goes_on: int
) -> None:
    threads(began)
    whole = run(make_engine(tiny), source, tmp_path / "whole")
    half = copied(whole, tmp_path / "half")
    drop(half, 1, 2)
    threads(goes_on)
    said: list[str] = []
    again = run(make_engine(tiny), source, tmp_path / "half", say=said.append)
    assert comparable(again) == comparable(whole)
    assert any(line.startswith(f"threads: {began}, as this audit began, instead of {goes_on}") for line in said)
    assert torch.get_num_threads() == goes_on  # of whoever called
    assert [facts["threads"] for facts in again.made_by()] == [began]


@pytest.mark.parametrize(
    ("field", "value"),
    [("cpu", "NEON"), ("precision", "medium"), ("kernels", "other"), ("versions.torch", "1.0"),
     ("versions.pillow", "1.0"), ("device", "NVIDIA H100")],
)  # fmt: skip
def test_what_cannot_be_set_must_be_the_same(
    tiny, source: Path, unbroken: Results, tmp_path: Path, field: str, value: str
) -> None:
    results = copied(unbroken, tmp_path / "o")
    drop(results, 2)
    manifest = json.loads((results.folder / "manifest.json").read_text())
    inner = manifest["conditions"]
    for key in field.split(".")[:-1]:
        inner = inner[key]
    inner[field.split(".")[-1]] = value
    (results.folder / "manifest.json").write_text(json.dumps(manifest))
    now = rf'{re.escape(field)} was "{re.escape(value)}", is ".+"'
    with pytest.raises(UsageError, match=rf"begun under other conditions: {now}.*--overwrite"):
        run(make_engine(tiny), source, results.folder)
    assert not (results.folder / part_path(2)).exists()


# Runtimes


def compiled_engine(tiny, store: Path) -> Engine:
    diffusion, classifier = tiny
    return Engine(diffusion, classifier, Config(), pack_settings={"realistic": SETTINGS}, store=store)


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory) -> Path:
    """A store with the compiled guided step, measured to be faster than eager."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    folder = tmp_path_factory.mktemp("store")
    engine = compiled_engine(tiny, folder)
    spec = engine.spec(engine.settings(engine.config))
    build(spec, "onnx", engine.store)
    for slots in engine.slots:
        engine.runners.step(engine.settings(engine.config)).measure(slots, seconds=0.0)
    for path in (folder / "measured").glob("*.json"):
        times = json.loads(path.read_text())
        path.write_text(json.dumps({n: {"eager": 1.0, "onnxruntime": 0.1} for n in times}))
    assert compiled_engine(tiny, folder).runtime_choice(4).runtime == "onnxruntime"
    return folder


@pytest.fixture(scope="module")
def compiled(tiny, source: Path, store: Path, tmp_path_factory) -> Results:
    return run(compiled_engine(tiny, store), source, tmp_path_factory.mktemp("compiled"))


def test_what_auto_took_does_not_change_the_audit(tiny, source, store, compiled, unbroken, tmp_path: Path) -> None:
    """Compiled in between: it goes on in eager, as it began, bit for bit, and says so; and the other way round."""
    half = copied(unbroken, tmp_path / "half")
    drop(half, 1, 2)
    said: list[str] = []
    again = run(compiled_engine(tiny, store), source, half.folder, say=said.append)
    assert comparable(again) == comparable(unbroken)
    assert "runtime: eager, as this began" in said
    half = copied(compiled, tmp_path / "other")
    drop(half, 1, 2)
    assert comparable(run(compiled_engine(tiny, store), source, half.folder)) == comparable(compiled)
    (made,) = half.made_by()
    assert set(made["runtimes"]["guided-step"].values()) == {"onnxruntime"}
    assert made["parity"]["onnxruntime"]["worst"] <= made["parity"]["onnxruntime"]["tolerance"]


def test_a_runtime_that_is_gone_is_said_and_recorded(tiny, source, store, compiled, tmp_path: Path) -> None:
    half = copied(compiled, tmp_path / "half")
    drop(half, 2)
    said: list[str] = []
    again = run(compiled_engine(tiny, tmp_path / "empty"), source, half.folder, say=said.append)
    assert any("onnxruntime ran guided-step" in line and "eager does" in line for line in said)
    assert len(list(again.rows())) == COUNT
    assert len(again.made_by()) == 2


def test_an_explicit_runtime_is_part_of_the_audit(tiny, source, unbroken, tmp_path: Path) -> None:
    diffusion, classifier = tiny
    engine = Engine(diffusion, classifier, Config(), pack_settings={"realistic": SETTINGS}, runtime="eager")
    with pytest.raises(UsageError, match=r'config\.runtime was "auto", is "eager"'):
        run(engine, source, unbroken.folder)


def shards(tiny, source: Path, store: Path, tmp_path: Path) -> list[Path]:
    """One from a machine with a compiled step, one from a machine without."""
    run(make_engine(tiny), source, tmp_path / "1", shard=(1, 2))
    run(compiled_engine(tiny, store), source, tmp_path / "2", shard=(2, 2))
    return [tmp_path / "1", tmp_path / "2"]


def test_shards_of_different_runtimes_merge_where_parity_holds(tiny, source, store, unbroken, tmp_path: Path) -> None:
    folders, said = shards(tiny, source, store, tmp_path), []
    merged = merge(folders, tmp_path / "m", say=said.append)
    assert len(list(merged.rows())) == COUNT
    assert any("runtimes.guided-step" in line for line in said)
    rows, expected = comparable(merged), comparable(unbroken)
    assert [r["id"] for r in rows] == [r["id"] for r in expected]
    assert [r["flipped"] for r in rows] == [r["flipped"] for r in expected]
    assert (tmp_path / "m" / "run.json").exists()


@pytest.mark.parametrize("parity", [{}, {"onnxruntime": {"worst": 0.5, "tolerance": 1e-3}},
                                    {"onnxruntime": {"worst": float("nan"), "tolerance": 1e-3}}])  # fmt: skip
def test_shards_without_parity_name_the_option(tiny, source, store, tmp_path: Path, parity: dict[str, Any]) -> None:
    folders = shards(tiny, source, store, tmp_path)
    for path in folders[1].glob("rows/*/*.parquet"):
        table = pq.read_table(path)
        made = json.loads(table.schema.metadata[b"made"]) | {"parity": parity}
        pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"made": json.dumps(made)}), path)
    with pytest.raises(UsageError, match=r"2: its parts were made by onnxruntime.*--runtime, such as eager"):
        merge(folders, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_shards_of_another_audit_are_named_with_the_field(tiny, source: Path, tmp_path: Path) -> None:
    run(make_engine(tiny), source, tmp_path / "1", shard=(1, 2))
    run(make_engine(tiny, seed=3), source, tmp_path / "2", shard=(2, 2))
    with pytest.raises(UsageError, match=r"2: no shard of the audit in .*1: config\.seed was 0, is 3"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "m")


def test_empty_shards_are_said(tiny, source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for n in range(1, 6):
        run(make_engine(tiny), source, tmp_path / str(n), shard=(n, 5), say=said.append)
    empty = [line for line in said if "is empty" in line]
    assert empty == [f"shard {n}/5 is empty: {COUNT} samples make 3 parts of {PART}" for n in (4, 5)]
    said.clear()
    merged = merge([tmp_path / str(n) for n in range(1, 6)], tmp_path / "m", say=said.append)
    assert len(list(merged.rows())) == COUNT
    assert sum("is empty" in line for line in said) == 2


# The folder


def test_overwrite_replaces_an_audit_and_nothing_else(tiny, source: Path, unbroken: Results, tmp_path: Path) -> None:
    results = copied(unbroken, tmp_path / "o")
    (results.folder / "images" / "mine.txt").write_text("mine")
    again = run(make_engine(tiny, seed=1), source, results.folder, limit=3, overwrite=True)
    assert len(list(again.rows())) == 3
    assert (results.folder / "images" / "mine.txt").read_text() == "mine"
    assert {r["part"] for r in again.rows()} == {0}
    assert len(list(results.folder.glob("images/000/*"))) == 1


def test_an_audit_without_a_finished_part_gives_way(tiny, source: Path, unbroken: Results, tmp_path: Path) -> None:
    results = copied(unbroken, tmp_path / "o")
    drop(results, 0, 1, 2)
    assert comparable(run(make_engine(tiny, seed=1), source, results.folder))[0]["seed"] is not None


def test_images_and_run_json_say_what_made_them(unbroken: Results) -> None:
    row = next(r for r in unbroken.rows() if r["status"] == "done")
    kept = json.loads(Image.open(unbroken.folder / row["counterfactual"]).text["counterlens"])
    assert (kept["id"], kept["target"], kept["seed"]) == (row["id"], row["target"], row["seed"])
    assert kept["settings"]["steps"] == 4
    assert {"classifier", "mode", "versions", "model_hash", "schema_version"} <= set(kept)
    described = json.loads((unbroken.folder / "run.json").read_text())
    assert described["command"] == "counterlens audit"
    assert {"classifier", "mode", "settings", "seed", "versions", "weights", "threads", "runtime"} <= set(described)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_leaves_the_folder_whole(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A process of its own, stopped after its first part; no partial file, and the same command goes on."""
    command = [sys.executable, "-m", "tests.audit_child", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 60
    while process.poll() is None and not list(tmp_path.glob("out/rows/*/*.parquet")) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1, 143), err  # 0: it was done before
    assert process.returncode != 1 or b"Interrupted" in err
    assert not list(tmp_path.rglob("*.partial"))
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0
    assert len(list(Results.open(tmp_path / "out").rows())) == COUNT


def test_what_a_killed_process_left_is_swept(tiny, source: Path, unbroken: Results, tmp_path: Path) -> None:
    results = copied(unbroken, tmp_path / "o")
    drop(results, 1)
    left = (
        ".0123456789ab.12.partial",
        "images/000/000001/.0123456789ab.12.partial",
        "rows/000/.0123456789ab.12.partial",
    )
    for name in (*left, "mine.partial"):
        (results.folder / name).touch()
    assert comparable(run(make_engine(tiny), source, results.folder)) == comparable(unbroken)
    assert [p.name for p in results.folder.rglob("*.partial")] == ["mine.partial"]


def test_overwrite_never_removes_the_source(tiny, source: Path, tmp_path: Path) -> None:
    result = make_engine(tiny).counterfactual(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    paths = result.save(tmp_path)
    with pytest.raises(UsageError, match="is an input"):
        run(make_engine(tiny), tmp_path, tmp_path, overwrite=True)
    assert all(path.exists() for path in paths)


def test_shards_merge_in_any_order(tiny, source: Path, store: Path, tmp_path: Path) -> None:
    first, second = shards(tiny, source, store, tmp_path)
    with pytest.raises(CounterlensError, match="run or finish shards 2/2"):
        merge([first], tmp_path / "m")
    manifest = json.loads((second / "manifest.json").read_text())
    manifest["conditions"]["cpu"] = "NEON"
    (second / "manifest.json").write_text(json.dumps(manifest))
    assert len(list(merge([second, first], tmp_path / "m").rows())) == COUNT


def test_conditions_are_json() -> None:
    engine = Engine.from_pack("digits", "clean")
    said = conditions_module.conditions(engine, engine.config)
    assert json.loads(json.dumps(said)) == said
    assert said["threads"] == torch.get_num_threads()


def test_a_run_of_another_command_is_named(tiny, source: Path, tmp_path: Path) -> None:
    make_engine(tiny).counterfactual(torch.rand(1, 3, 16, 16)).save(tmp_path)
    with pytest.raises(CounterlensError, match=r"holds what Counterfactuals\.save wrote"):
        run(make_engine(tiny), source, tmp_path)
