"""A runtime from outside the package: one file, registered or found by its entry point."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from counterlens.engine import Engine
from counterlens.engine.config import Config
from counterlens.engine.errors import UsageError
from counterlens.engine.runtime import registry
from counterlens.engine.runtime.here import Here, Replay
from counterlens.engine.runtime.spec import SIGNATURES, Spec
from counterlens.export.errors import ExportError

pytest.importorskip("onnxruntime", reason="needs onnxruntime")

DUMMY = """
import onnxruntime, torch
from counterlens.engine.runtime.registry import Runtime
from counterlens.export.onnx import write_onnx

class Dummy(Runtime):
    name, file = "dummy", "model.dummy"
    factor = 1.0

    def build(self, graph, spec, path, timed):
        write = lambda: write_onnx(graph, path, input_names=spec.inputs, output_names=spec.outputs, metadata={})
        timed("writing", "write", write)

    def load(self, path, device):
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        def run(*inputs):
            given = {n: x.contiguous().numpy() for n, x in zip(names, inputs)}
            first, *others = map(torch.from_numpy, session.run(None, given))
            return (first * self.factor, *others)
        return run

RUNTIME = Dummy()
"""
NUMBERS = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 45.0, "steps": 10}
SETTINGS = {mode: NUMBERS | {"strength": 0.3, "gradient": "exact"} for mode in ("realistic", "audit")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What installing a package with a runtime leaves on the path."""
    where = tmp_path_factory.mktemp("site")
    (where / "dummy_runtime.py").write_text(DUMMY)
    info = where / "dummy_runtime-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy-runtime\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[counterlens.runtimes]\ndummy = dummy_runtime:RUNTIME\n")
    return where


@pytest.fixture
def dummy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(folder)
    runtime = import_module("dummy_runtime").RUNTIME
    monkeypatch.setattr(registry, "_registered", {})
    registry.register(runtime)
    return runtime


def test_builtin_runtimes_are_what_the_table_says() -> None:
    for name, kept in registry._BUILTIN.items():
        runtime = registry.find(name)
        assert (runtime.name, runtime.format, bool(runtime.file)) == (name, kept, bool(kept))
        if kept:
            assert registry.of_format(kept) is runtime
    assert registry.choices()[:2] == ["auto", "eager"]


def test_a_runtime_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"runtime: expected one of auto, eager, .*tensorrt, got 'tvm'"):
        registry.check("tvm")
    for format in ("tvm", "inductor", ""):
        with pytest.raises(UsageError, match="format: expected one of onnx, aoti, tensorrt"):
            registry.of_format(format)


@pytest.mark.slow
def test_one_that_is_registered_runs_is_checked_and_chosen(dummy: Any, tiny: Any, tmp_path: Path) -> None:
    def engine(runtime: str) -> Engine:
        return Engine(*tiny, Config(), pack_settings=SETTINGS, store=tmp_path, runtime=runtime)

    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    target = engine("eager").probabilities(images).argmin(1)
    expected, got = (engine(r).counterfactual(images, target) for r in ("eager", "dummy"))
    assert got.provenance[0]["runtime"] == "dummy"
    close = (got.images - expected.images).abs().flatten(1).amax(1) < 1e-4
    assert close.any()
    (file,) = tmp_path.glob("*/model.dummy")
    assert json.loads((file.parent / "artefact.json").read_text())["report"]["parity"]["worst"] <= 1e-4

    engine("auto").warmup([2])
    (path,) = (tmp_path / "measured").glob("*.json")
    assert set(json.loads(path.read_text())["2"]) == {"eager", "dummy"}
    path.write_text(json.dumps({"2": {"eager": 1.0, "dummy": 0.5}}))
    assert engine("auto").runtime_choice(2).runtime == "dummy"

    for record in file.parent.glob("agrees-*"):
        record.unlink()
    dummy.factor = 1.01  # from elsewhere, and wrong here
    try:
        with pytest.raises(ExportError, match="does not agree with eager"):
            engine("dummy").warmup([2])
        with pytest.warns(UserWarning, match="dummy is not used: .*does not agree"):
            assert engine("auto").warmup([2])[2].runtime == "eager"
    finally:
        dummy.factor = 1.0


COMMANDS = """
import contextlib, io, json, sys
from counterlens.engine.cli.main import main

for words in json.loads(sys.argv[1]):
    said, code = (io.StringIO(), io.StringIO()), 0
    sys.argv = ["counterlens", *words]
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, *(text.getvalue() for text in said)]))
"""


def test_one_with_an_entry_point_is_found_by_the_commands(folder: Path, tmp_path: Path) -> None:
    commands = [
        ["export", "--help"], ["counterfactual", "--help"], ["info", "--json"], ["export", "--format", "nope"],
        ["export", "--what", "vae-encoder", "--format", "dummy", "--no-measure", "--json"],
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(folder), "COUNTERLENS_STORE": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], env=environment, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    export, counterfactual, info, nope, built = (json.loads(line) for line in done.stdout.splitlines())
    assert "onnx, aoti, tensorrt or dummy" in export[1]
    assert "tensorrt or dummy" in counterfactual[1]
    runtimes = json.loads(info[1])["runtimes"]
    assert runtimes["dummy"] == runtimes["eager"] == []
    assert "onnx, aoti, tensorrt, dummy, got 'nope'" in nope[2]
    assert built[0] == 0, built[2]
    report = json.loads(built[1])
    assert (report["runtime"], report["target"]) == ("dummy", "dummy")
    assert Path(report["files"][1]).name == "model.dummy"


def test_an_entry_point_that_cannot_be_imported_says_so(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[counterlens.runtimes]\nbroken = not_there:RUNTIME\n")
    code = "from counterlens.engine.runtime.registry import find; find('broken')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "runtime broken: not_there:RUNTIME cannot be imported" in done.stderr.splitlines()[-1]


def test_names_need_no_torch() -> None:
    code = "import sys; from counterlens.engine.runtime import registry; registry.choices(), registry.formats(); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


def test_looking_for_artefacts_and_running_without_import_nothing_that_builds_them(tmp_path: Path) -> None:
    code = (
        "import sys; from counterlens.engine import Config, Engine; from counterlens.engine.packs import Pack\n"
        f"engine = Engine.from_pack(store={str(tmp_path)!r}, device='cpu')\n"
        "assert 'no compiled step in the store' in engine.runtime_choice(1).why\n"
        "engine.facts(engine.config)\n"
        "engine.counterfactual(Pack('digits').samples('test', count=1).images, config=Config(speed='fast'))\n"
        "print({'onnx', 'diffusers', 'transformers', 'torch._dynamo', 'scipy', 'pyarrow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def _in_threads(count: int, work: Any) -> list[Any]:
    out: list[Any] = [None] * count

    def one(i: int) -> None:
        out[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_a_replay_from_several_threads_never_mixes_their_tensors() -> None:
    """The launch reads and writes fixed buffers, as a CUDA graph does, and lets other threads run meanwhile."""
    held, made = torch.zeros(4), torch.zeros(4)

    def launch() -> None:
        time.sleep(0.002)
        made.copy_(held * 2)
        time.sleep(0.002)

    replay = Replay([held], [made], launch)
    results = _in_threads(4, lambda i: [replay(torch.full((4,), float(i)))[0] for _ in range(5)])
    assert all((x == 2 * i).all() for i, ones in enumerate(results) for x in ones)


def test_a_batch_size_is_prepared_once_whoever_comes_first(tiny: Any) -> None:
    spec, prepared = Spec(*tiny, what="classifier"), []

    def prepare(batch: int) -> Any:
        prepared.append(batch)
        time.sleep(0.05)
        return lambda image: (spec.function()(image),)

    here, (image,) = Here(spec, prepare), spec.example(3)
    results = _in_threads(3, lambda _: here(image)[0])
    assert prepared == [3]
    assert here.reports[3]["worst"] == 0
    assert all(torch.equal(r, results[0]) for r in results)
    assert SIGNATURES["classifier"][0] == ("image",)


def test_what_is_prepared_wrongly_is_never_used(tiny: Any) -> None:
    spec = Spec(*tiny, what="classifier")
    here = Here(spec, lambda batch: lambda image: (spec.function()(image) * 1.01,))
    for _ in range(2):
        with pytest.raises(ExportError, match="does not agree with eager"):
            here(*spec.example(2))
