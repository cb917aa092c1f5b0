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
from counterlens.engine.runtime.cudagraphs import CudaGraphStep
from counterlens.engine.runtime.spec import Spec
from counterlens.export.errors import ExportError

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
    step = CudaGraphStep(spec, lambda image: image * image.mean().item())
    with pytest.raises(ExportError, match="cudagraphs: cannot be recorded"):
        step(*spec.example(1))
