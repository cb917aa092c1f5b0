"""Compiled guided steps through the engine: parity, choice, refusals."""

from __future__ import annotations

import copy as copy_module
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from counterlens.engine import Engine
from counterlens.engine.config import Config, StepOptions
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.tiny import LatentResolutionDecoder, TinyDecoder
from counterlens.engine.runtime import artefacts, onnxruntime, tensorrt
from counterlens.engine.runtime.choice import StepRunner
from counterlens.engine.runtime.compiled import CompiledStep, expected_inputs
from counterlens.engine.runtime.parity import check_parity
from counterlens.engine.runtime.runners import PARTS
from counterlens.engine.runtime.spec import SIGNATURES, Spec
from counterlens.export import ExportError, Store, check
from tests.tensorrt_operators import unsupported

NUMBERS = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 45.0, "steps": 10}
SETTINGS = {mode: NUMBERS | {"strength": 0.3, "gradient": "exact"} for mode in ("realistic", "audit")}
SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.2, "angle_deg": 45.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def spec(tiny: Any) -> Spec:
    return Spec(*tiny)


@pytest.fixture(scope="module")
def artefact(spec: Spec, store: Store) -> Any:
    return artefacts.build(spec, "onnx", store)


def engine(tiny: Any, store: Store, **options: Any) -> Engine:
    return Engine(*tiny, Config(), pack_settings=SETTINGS, store=store.folder, **options)


def test_the_report_tells_parity_and_times(artefact: Any) -> None:
    assert artefact.report["parity"]["worst"] <= 1e-4
    assert artefact.report["parity"]["batches"] == [1, 3, 8]
    assert set(artefact.report["seconds"]) == {"trace", "write", "load", "check"}
    model = onnx.load(artefact.file("model.onnx"))
    assert [i.name for i in model.graph.input] == list(SIGNATURES["guided-step"][0])


def test_its_operators_are_documented_for_tensorrt(artefact: Any) -> None:
    assert unsupported(onnx.load(artefact.file("model.onnx"))) == []


def test_whole_runs_agree_with_eager(tiny: Any, store: Store, artefact: Any) -> None:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 16, 16)
    target = (engine(tiny, store).probabilities(images).argmax(1) + 1) % 10
    results = [
        engine(tiny, store, runtime=runtime).counterfactual(images, target) for runtime in ("eager", "onnxruntime")
    ]
    close = (results[0].images - results[1].images).abs().flatten(1).amax(1) < 1e-4
    assert close.double().mean() >= 0.8
    assert results[0].flipped.tolist() == results[1].flipped.tolist()


def test_auto_takes_what_was_measured_to_be_fastest(tiny: Any, store: Store, artefact: Any) -> None:
    one = engine(tiny, store)
    assert one.runtime_choice(3).runtime == "eager"
    assert "nothing was measured" in one.runtime_choice(3).why
    choice = one.warmup([3])[4]
    assert "fastest measured here for batch 4" in choice.why
    (path,) = (store.folder / "measured").glob("*.json")
    path.write_text(json.dumps({"4": {"eager": 1.0, "onnxruntime": 0.5, "aoti": 0.1}}))
    other = engine(tiny, store)
    assert other.runtime_choice(4).runtime == "onnxruntime"  # aoti was measured once but is not in the store
    assert isinstance(other.runners.step(other.config.settings(SETTINGS)).step(4), CompiledStep)
    path.write_text(json.dumps({"4": {"eager": 0.1, "onnxruntime": 0.5}}))
    assert engine(tiny, store).runtime_choice(4).runtime == "eager"


def test_parts_beside_the_steps_are_compiled_where_the_store_has_them(tiny: Any, store: Store, artefact: Any) -> None:
    for what in PARTS.values():
        artefacts.build(Spec(*tiny, what=what), "onnx", store)
    torch.manual_seed(1)
    images = torch.rand(3, 3, 16, 16)
    inverted = {m: s | {"noise": "inversion"} for m, s in SETTINGS.items()}
    runs = []
    for runtime in ("eager", "onnxruntime"):
        one = Engine(*tiny, Config(), pack_settings=inverted, store=store.folder, runtime=runtime)
        own = (tiny[0].predict_noise, tiny[0].encode, tiny[0].decode)
        assert [f in own for f in one.runners.functions(one.settings(one.config), 4).values()] == [
            runtime == "eager"
        ] * 3
        runs.append(one.counterfactual(images).images)
    close = (runs[0] - runs[1]).abs().flatten(1).amax(1) < 1e-4
    assert close.double().mean() >= 0.6


def test_a_part_is_the_same_whatever_guidance_differentiates_through(tiny: Any, store: Store) -> None:
    """Exported for one speed, found under another."""
    channels, side, _ = tiny[0].latent_shape
    module = LatentResolutionDecoder(channels, 8, 1, tiny[0].image_size // side)
    decoder = TinyDecoder(module, "small", channels)
    one = engine(tiny, store, guidance_decoder=decoder)
    tiny_decoder, full = (one.settings(Config(guidance_decoder=name)) for name in ("tiny", "full"))
    assert one.spec(tiny_decoder).key("onnx") != one.spec(full).key("onnx")
    for what in PARTS.values():
        assert one.spec(tiny_decoder, what=what).key("onnx") == one.spec(full, what=what).key("onnx")


def test_without_artefacts_auto_is_eager_and_says_so(tiny: Any, tmp_path: Path) -> None:
    choice = engine(tiny, Store(tmp_path)).runtime_choice(1)
    assert choice.runtime == "eager"
    assert "counterlens export" in choice.why


def test_unknown_runtime(tiny: Any, store: Store) -> None:
    with pytest.raises(UsageError, match="runtime: expected one of auto, eager"):
        engine(tiny, store, runtime="tvm")


@pytest.mark.skipif(not tensorrt.missing(), reason="TensorRT is here")
def test_a_named_runtime_that_is_missing_raises(tiny: Any, store: Store) -> None:
    with pytest.raises(ExportError, match=r"tensorrt cannot be imported|no CUDA device"):
        engine(tiny, store, runtime="tensorrt").warmup([1])


def test_wrong_shapes_and_dtypes_are_named(artefact: Any, spec: Spec) -> None:
    step = artefacts.open_step(artefact)
    z, t, t_prev, condition, image, target, *_ = spec.example(2)
    step(z, t, t_prev, condition, image, target, **SCALES)
    with pytest.raises(UsageError, match=r"onnx: image: expected float32 \[2, 3, 16, 16\], got float32 \[2, 3, 8, 8\]"):
        step(z, t, t_prev, condition, image[:, :, :8, :8], target, **SCALES)
    with pytest.raises(UsageError, match=r"onnx: z: expected float32 .*, got float64"):
        step(z.double(), t, t_prev, condition, image, target, **SCALES)
    with pytest.raises(UsageError, match=r"timestep: expected int64 \[2\], got int64 \[3\]"):
        step(z, torch.zeros(3, dtype=torch.long), t_prev, condition, image, target, **SCALES)


def test_a_damaged_artefact_is_refused(spec: Spec, artefact: Any, tiny: Any, tmp_path: Path) -> None:
    copy = Store(tmp_path)
    entry = copy.get(artefacts.key_of(spec, "onnx"), lambda folder: _copy(artefact, folder))
    path = entry.file("model.onnx")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ExportError, match=r"model\.onnx: not the file that was built.*--force"):
        engine(tiny, copy, runtime="onnxruntime").warmup([1])


@pytest.mark.slow
def test_under_auto_what_is_damaged_is_built_again_with_a_warning(
    spec: Spec, artefact: Any, tiny: Any, tmp_path: Path
) -> None:
    copy = Store(tmp_path)
    entry = copy.get(artefacts.key_of(spec, "onnx"), lambda folder: _copy(artefact, folder))
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for damage in (b"", entry.file("model.onnx").read_bytes()[:1000]):
        entry.file("model.onnx").write_bytes(damage)
        with pytest.warns(UserWarning, match=r"model\.onnx: not the file that was built.*: built again"):
            assert engine(tiny, copy).counterfactual(images).errors[0] is None
    (entry.folder / "artefact.json").write_text("{")
    with pytest.warns(UserWarning, match=r"artefact\.json: damaged .*: built again"):
        engine(tiny, copy).warmup([1])


def test_under_auto_measurements_that_are_damaged_are_taken_again_with_a_warning(
    spec: Spec, artefact: Any, tiny: Any, tmp_path: Path
) -> None:
    copy = Store(tmp_path)
    copy.get(artefacts.key_of(spec, "onnx"), lambda folder: _copy(artefact, folder))
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    engine(tiny, copy).warmup([1])
    (path,) = (copy.folder / "measured").glob("*.json")
    for damaged in ("", "[1]", '{"1": {"eager": "x"}}', '{"1": 3}', "\0"):
        path.write_text(damaged)
        one = engine(tiny, copy)
        with pytest.warns(UserWarning, match=r"measured.*: measured again"):
            assert one.counterfactual(images).errors[0] is None
        assert "fastest measured here" in one.runtime_choice(1).why
    path.write_text("[1]")
    with pytest.raises(ExportError, match=r"damaged .*delete it"):
        StepRunner(spec, "onnxruntime", copy).measurements()


class Watched:
    """Counts the eager steps of a spec."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checks: list[dict[str, Any]] = []
        real = artefacts.check_parity

        def check(*args: Any, **named: Any) -> dict[str, Any]:
            self.checks.append(real(*args, **named))
            return self.checks[-1]

        monkeypatch.setattr(artefacts, "check_parity", check)


def test_an_artefact_is_held_to_eager_once_on_each_machine(
    spec: Spec, artefact: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, copy = Watched(monkeypatch), Store(tmp_path)
    entry = copy.get(artefacts.key_of(spec, "onnx"), lambda folder: _copy(artefact, folder))  # from another machine
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    target = engine(tiny, copy, runtime="eager").probabilities(images).argmin(1)

    def run(**options: Any) -> None:
        assert engine(tiny, copy, runtime="onnxruntime", **options).counterfactual(images, target).errors[0] is None

    run()
    assert [c["inputs"] for c in watched.checks] == ["real images and random"]
    run()
    engine(tiny, copy, runtime="onnxruntime").warmup([1])
    assert len(watched.checks) == 1  # the record is there
    (record,) = entry.folder.glob("agrees-*.json")
    said = json.loads(record.read_text())
    assert said["parity"]["worst"] <= 1e-4
    for field, other in (("where", {}), ("files", {"model.onnx": "0"}), ("real", False)):
        record.write_text(json.dumps(said | {field: other}))
        run()
    record.write_text("{")
    run()
    assert len(watched.checks) == 5
    with monkeypatch.context() as patch:
        patch.setattr("counterlens.engine.runtime.record.machine", lambda: "another processor")
        run()
    assert len(watched.checks) == 6
    assert len(list(entry.folder.glob("agrees-*.json"))) == 2


def test_a_wrong_artefact_from_elsewhere_is_never_used(spec: Spec, artefact: Any, tiny: Any, tmp_path: Path) -> None:
    """It is whole and has the right key, but does something else: of another build, or another kind of processor."""
    copy, model = Store(tmp_path), onnx.load(artefact.file("model.onnx"))
    largest = max(model.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float32(1.1), largest.name))

    def put(folder: Path) -> dict[str, Any]:
        onnx.save(model, folder / "model.onnx")
        return artefact.report

    copy.get(artefacts.key_of(spec, "onnx"), put)
    with pytest.raises(ExportError, match="does not agree with eager"):
        engine(tiny, copy, runtime="onnxruntime").warmup([1])
    with pytest.warns(UserWarning, match="onnxruntime is not used: .*does not agree with eager"):
        choice = engine(tiny, copy).warmup([1])[1]
    assert choice.runtime == "eager"


def _with_another_noise_schedule(diffusion: Any) -> Any:
    other = copy_module.deepcopy(diffusion)
    other.alphas_cumprod = torch.linspace(0.999, 0.02, len(diffusion.alphas_cumprod), dtype=torch.float64)
    return other


def test_steps_of_two_noise_schedules_have_two_keys(spec: Spec, tiny: Any) -> None:
    other = Spec(_with_another_noise_schedule(tiny[0]), tiny[1])
    assert artefacts.key_of(other, "onnx") != artefacts.key_of(spec, "onnx") == artefacts.key_of(Spec(*tiny), "onnx")


@pytest.mark.slow
def test_a_step_is_never_that_of_another_noise_schedule(tiny: Any, tmp_path: Path) -> None:
    diffusion, classifier = tiny
    other = _with_another_noise_schedule(diffusion)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    runs = {}
    for name, model in (("first", diffusion), ("other", other)):
        for runtime in ("onnxruntime", "eager"):
            one = Engine(model, classifier, Config(), pack_settings=SETTINGS, store=tmp_path, runtime=runtime)
            target = one.probabilities(images).argmin(1)
            runs[name, runtime] = one.counterfactual(images, target).images
    assert (runs["first", "eager"] - runs["other", "eager"]).abs().max() > 1e-3
    for name in ("first", "other"):
        close = (runs[name, "eager"] - runs[name, "onnxruntime"]).abs().flatten(1).amax(1) < 1e-4
        assert close.any()


def test_a_build_that_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from counterlens.export import Store\n"
        "def build(folder):\n"
        "    (folder / 'model.onnx').write_text('half')\n"
        "    print('building', flush=True); time.sleep(60)\n"
        f"Store({str(tmp_path)!r}).get({{'a': 1}}, build)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    assert list(tmp_path.glob("*.building-*"))
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM
    assert not list(tmp_path.glob("*.building-*"))


def test_onnxruntime_keeps_nothing_about_its_user(tmp_path: Path) -> None:
    code = "from counterlens.engine.runtime import onnxruntime; assert not onnxruntime.missing()"
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", code], env=environment | {"HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.rglob("deviceid")) + list(tmp_path.rglob("onnxruntime.db"))


def _copy(artefact: Any, folder: Path) -> dict[str, Any]:
    (folder / "model.onnx").write_bytes(artefact.file("model.onnx").read_bytes())
    return artefact.report


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model at all")
    with pytest.raises(ExportError, match=r"m\.onnx: ONNX Runtime cannot open it"):
        onnxruntime.load(tmp_path / "m.onnx")


def test_a_wrong_result_is_never_used(spec: Spec) -> None:
    step = spec.function()

    def wrong(*inputs: Tensor) -> tuple[Tensor, ...]:
        z_prev, z0, kept = step(*inputs)
        return z_prev * 1.001, z0, kept

    with pytest.raises(ExportError, match=r"does not agree with eager: relative error 0\.001 .*not used"):
        check_parity(spec, wrong)

    def broken(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * float("nan") for x in step(*inputs))

    with pytest.raises(ExportError, match="does not agree"):
        check_parity(spec, broken)


@pytest.mark.parametrize("what", ["unet", "vae-encoder", "vae-decoder", "classifier"])
def test_parts(what: str, tiny: Any, store: Store) -> None:
    part = artefacts.build(Spec(*tiny, what=what), "onnx", store)
    assert part.report["parity"]["worst"] <= 1e-4
    with pytest.raises(ExportError, match=f"holds the {what}, not the guided step"):
        artefacts.open_step(part)


def test_a_full_disk_leaves_the_store_valid(tiny: Any, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same call fails in the same place."""
    spec, full = Spec(*tiny, what="unet"), Store(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ExportError, match=r"the artefact cannot be written \(.*File too large"):
            artefacts.build(spec, "onnx", full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.entries() == []
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert artefacts.build(spec, "onnx", full).report["parity"]["worst"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("filter_mode", ["project", "global", "off"])
def test_other_filters_and_the_detached_gradient(filter_mode: Any, tiny: Any, store: Store) -> None:
    built = artefacts.build(Spec(*tiny, options=StepOptions(filter=filter_mode, gradient="detached")), "onnx", store)
    assert built.report["parity"]["worst"] <= 1e-4


@pytest.mark.slow
def test_half_precision_agrees_and_overflow_is_named(tiny: Any, store: Store) -> None:
    spec = Spec(*tiny, dtype="fp16", options=StepOptions(gradient="detached"))
    built = artefacts.build(spec, "onnx", store)
    types = {t.data_type for t in onnx.load(built.file("model.onnx")).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    step = artefacts.open_step(built)
    z, t, t_prev, condition, image, target, *_ = spec.example(2)
    with pytest.raises(CounterlensError, match=r"fp16 returned NaN or infinite values.*overflow in fp16; use bf16"):
        step(z * 1e30, t, t_prev, condition, image, target, **SCALES)


def test_models_of_the_user_stay_as_they_are(tiny: Any, store: Store) -> None:
    diffusion, classifier = tiny
    before = [(p.dtype, p.requires_grad) for m in (*diffusion.modules(), classifier.module) for p in m.parameters()]
    Spec(*tiny, dtype="bf16").function()(*Spec(*tiny).example(2))
    after = [(p.dtype, p.requires_grad) for m in (*diffusion.modules(), classifier.module) for p in m.parameters()]
    assert before == after


def test_other_weights_are_another_artefact(tiny: Any) -> None:
    diffusion, classifier = tiny
    key = artefacts.key_of(Spec(diffusion, classifier), "onnx")
    bias = next(p for p in classifier.module.parameters() if p.ndim == 1)
    bias.data += 1
    try:
        assert artefacts.key_of(Spec(diffusion, classifier), "onnx") != key
    finally:
        bias.data -= 1


@pytest.mark.slow
def test_inductor_step_checks_before_it_answers(tiny: Any, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    """The compiler is replaced by one that is wrong: its result must not come through."""
    spec = Spec(*tiny, options=StepOptions(gradient="detached"))
    monkeypatch.setattr(torch, "compile", lambda graph, **_: lambda *x: tuple(2 * y for y in graph(*x)))
    runner = StepRunner(spec, "inductor", store)
    first = spec.example(1)[:6]
    with pytest.raises(ExportError, match="does not agree with eager"):
        runner.step(1)(*first, **SCALES)


def test_expected_inputs_are_those_of_the_signature(spec: Spec) -> None:
    inputs = dict(zip(spec.inputs, spec.example(2), strict=True))
    assert expected_inputs(inputs)["z"] == (torch.float32, (4, 4, 4))


def test_batches_beyond_the_memory_are_named(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(*tiny, what="classifier")
    monkeypatch.setattr(check, "free_memory", lambda device: 100_000)
    parity = artefacts.build(spec, "onnx", Store(tmp_path)).report["parity"]
    assert 8 not in parity["batches"]
    assert "takes about" in parity["beyond_memory"]["8"]
