"""Where the models run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.engine import Config, Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.models.placing import choose_device, full_precision
from counterlens.engine.packs import Pack
from counterlens.engine.runtime.choice import StepRunner
from counterlens.engine.runtime.cudagraphs import record
from counterlens.engine.runtime.spec import Spec
from counterlens.engine.saliency.explain import pack_adapter
from counterlens.export.errors import ExportError
from counterlens.export.store import Store

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONFIG = Config(mode="realistic", speed="fast")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return Pack("digits").samples("test", count=10, marker="random").images


@pytest.mark.parametrize("name", ["meta", "gpu0", ""])
def test_other_devices_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"device: expected auto, cpu, cuda or cuda:N, got '{name}'"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_device_says_why() -> None:
    with pytest.raises(UsageError, match=r"device: cuda is not here: this PyTorch .*; use cpu"):
        Engine.from_pack(device="cuda")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("other", ["tf32", "ieee"])
def test_full_precision_leaves_the_switches_as_they_were(other: str) -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.rnn.fp32_precision
    cudnn.rnn.fp32_precision = other  # one that agrees with convolutions, and one that does not
    try:
        held = (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
        with full_precision(), full_precision():
            assert cudnn.conv.fp32_precision != "tf32"
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == held
    finally:
        cudnn.rnn.fp32_precision = before


def test_cuda_graphs_say_what_they_need() -> None:
    engine = Engine.from_pack(runtime="cudagraphs", device="cpu", config=CONFIG)
    with pytest.raises(ExportError, match="the models are on cpu, CUDA graphs need a CUDA device"):
        engine.counterfactual(torch.rand(1, 3, 32, 32))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("runtime", ["eager", "cudagraphs"])
def test_runs_on_a_gpu_agree_with_the_cpu(images: Tensor, runtime: str) -> None:
    expected = Engine.from_pack(config=CONFIG, device="cpu", runtime="eager").counterfactual(images)
    got = Engine.from_pack(config=CONFIG, device="cuda", runtime=runtime).counterfactual(images)
    assert got.errors == expected.errors
    assert got.images.device == torch.device("cpu")
    difference = (got.images - expected.images).abs().amax((1, 2, 3))
    assert (difference <= 1e-4).double().mean() >= 0.9
    assert (got.flipped == expected.flipped).double().mean() >= 0.99


@pytest.mark.gpu
@needs_gpu
def test_maps_on_a_gpu_agree_with_the_cpu(images: Tensor) -> None:
    expected, got = (Engine.from_pack(device=d, config=CONFIG).explain(images) for d in ("cpu", "cuda"))
    torch.testing.assert_close(got.saliency, expected.saliency, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.msi.score, expected.msi.score, rtol=0, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
def test_auto_takes_cuda_graphs_where_they_were_measured_to_be_faster(tmp_path: Any) -> None:
    engine = Engine.from_pack(device="cuda", config=CONFIG, store=tmp_path)
    choice = engine.warmup([1])[1]
    assert choice.runtime in ("eager", "cudagraphs")
    assert "cudagraphs" in choice.why


@pytest.mark.gpu
@needs_gpu
def test_what_waits_for_the_device_cannot_be_recorded() -> None:
    engine = Engine.from_pack(device="cuda", config=CONFIG)
    spec = Spec(engine.diffusion, engine.classifier, what="classifier")
    with pytest.raises(ExportError, match="cudagraphs: cannot be recorded"):
        record(lambda image: image * image.mean().item(), spec.example(1))


class Refusing:
    """Stands for a recorder whose batch 2 cannot be recorded."""

    def record(self, batch: int) -> None:
        if batch == 2:
            raise ExportError("cudagraphs: cannot be recorded (it waits)")

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.record(len(inputs[0]))
        return (inputs[0],)


def test_auto_goes_on_in_eager_where_nothing_can_be_recorded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterlens.engine.runtime.cudagraphs.RUNTIME.missing", lambda device: [])
    engine = Engine.from_pack(device="cpu", config=CONFIG)
    spec = Spec(engine.diffusion, engine.classifier, what="vae-decoder", weights="w")
    runner = StepRunner(spec, "auto", Store(tmp_path))
    runner._here["cudagraphs"] = Refusing()
    assert "nothing was measured here for batch 2; Engine.warmup measures" in runner.choose(2).why
    assert set(runner.measure(1, seconds=0.01)) == {"eager", "cudagraphs"}
    assert set(runner.measure(2, seconds=0.01)) == {"eager"}
    assert runner.choose(2).why == "cudagraphs: cannot be recorded (it waits)"
    (path,) = (tmp_path / "measured").iterdir()
    path.write_text('{"1": {"eager": 2.0, "cudagraphs": 1.0}, "2": {"eager": 2.0, "cudagraphs": 1.0}}')
    later = StepRunner(spec, "auto", Store(tmp_path))  # another process, which finds the measurements
    later._here["cudagraphs"] = Refusing()
    assert [later.choose(batch).runtime for batch in (1, 2)] == ["cudagraphs", "cudagraphs"]
    z = torch.rand(2, *engine.diffusion.latent_shape)
    assert torch.equal(later.part(1)(z[:1]), z[:1])  # what the stand-in gives back
    torch.testing.assert_close(later.part(2)(z), engine.diffusion.decode(z))
    assert later.choose(2).why == "cudagraphs: cannot be recorded (it waits)"


def test_an_adapter_goes_where_the_engine_is(images: Tensor) -> None:
    engine = Engine.from_pack(config=CONFIG)  # on a GPU where there is one
    pack = Pack("digits")
    adapter = pack_adapter(pack, "clean", pack.classifier("clean"))
    assert torch.equal(engine.explain(images, adapter=adapter).saliency, engine.explain(images).saliency)
