"""Inductor is never believed: blocks whose VJP PyTorch 2.13 compiles wrongly on the CPU, in a guided step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from counterlens.engine.config import StepOptions
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.runtime.here import Here
from counterlens.engine.runtime.inductor import RUNTIME
from counterlens.engine.runtime.parity import check_parity
from counterlens.engine.runtime.spec import Spec, relative_errors
from counterlens.export import ExportError

pytestmark = pytest.mark.slow
LABELS = ["a", "b"]


class Decoder(nn.Module):
    """A residual block from 64 to 48 channels and upsampling from 16 to 32 pixels; each alone is compiled rightly."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(4, 64, 1)
        self.resnet = ResnetBlock2D(in_channels=64, out_channels=48, temb_channels=None, groups=16)
        self.upsample = Upsample2D(48, use_conv=True, out_channels=48)
        self.narrow = nn.Conv2d(48, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.narrow(self.upsample(self.resnet(self.widen(z), None)))


class Small:
    """A diffusion model whose only part of any size is that decoder."""

    latent_shape = (4, 16, 16)
    image_size = 32
    labels = LABELS
    conditioning = "class"

    def __init__(self) -> None:
        self.alphas_cumprod = DDIMScheduler().alphas_cumprod.double()
        self.unet, self.decoder = nn.Conv2d(4, 4, 3, padding=1), Decoder()
        self.shift = torch.randn(3, 4, 1, 1)

    def modules(self) -> list[nn.Module]:
        return [self.unet, self.decoder]

    def encode(self, image: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image, 2)[:, [0, 1, 2, 0]]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def predict_noise(self, z: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.unet(z + self.shift[condition]).sin()

    def condition(self, targets: Tensor) -> Tensor:
        return targets

    def null_condition(self, batch: int) -> Tensor:
        return torch.full((batch,), 2)


@pytest.fixture(scope="module")
def spec() -> Spec:
    torch.manual_seed(0)
    diffusion, module = Small(), nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, len(LABELS)))
    for part in (*diffusion.modules(), module):
        part.eval().requires_grad_(False)
    return Spec(diffusion, SoftmaxClassifier(module, LABELS), options=StepOptions(gradient="detached"))


@torch.no_grad()
def test_a_wrongly_compiled_step_is_caught(spec: Spec) -> None:
    compiled: Any = torch.compile(spec.function(), fullgraph=True, dynamic=False)
    inputs = spec.example(2)
    wrong = relative_errors(compiled(*inputs)[0], spec.function()(*inputs)[0]).max().item() > 1e-2
    if not wrong:
        pytest.skip(f"needs a torch whose Inductor is wrong here (2.13.0 is), this is {torch.__version__}")
    with pytest.raises(ExportError, match=r"does not agree with eager.*not used"):
        check_parity(spec, compiled, batches=(2,))


@torch.no_grad()
def test_our_graph_of_the_same_step_is_compiled_rightly(spec: Spec) -> None:
    step = Here(spec, RUNTIME.prepare(spec, spec.function()))
    inputs = spec.example(2)
    assert relative_errors(step(*inputs)[0], spec.function()(*inputs)[0]).max() < 1e-4
    assert step.reports[2]["worst"] < 1e-4
