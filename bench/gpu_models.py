"""What the GPU benchmarks run on: full-size models with random weights on the card, or tiny ones to try the script."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.record import say
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.models.tiny import LatentResolutionDecoder, TinyDecoder
from counterlens.engine.runtime.spec import DTYPES

MODEL = "stable-diffusion-1.x"
LARGE = ("sdxl", "sd3.5-large")  # names in bench.published, in the order of their size


@dataclass(frozen=True)
class Where:
    """A device, the type of the diffusion model's weights, and the runtimes beside eager; `dry`: tiny, on the CPU."""

    dtype: str
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def recorded(self) -> list[str]:
        """Runtimes that need no building; on a CPU there is none, and another that was asked for says so."""
        return ["cudagraphs"]

    def models(self) -> tuple[Any, SoftmaxClassifier, TinyDecoder]:
        """Diffusion model, classifier and tiny decoder."""
        if self.dry:
            from tests.conftest import make_tiny

            return *make_tiny(), TinyDecoder(LatentResolutionDecoder(4, 8, 1, 4), "tiny", 4)
        from diffusers import AutoencoderTiny

        from bench.real_models import build

        with torch.device(self.device):
            module = AutoencoderTiny()  # AutoencoderTiny's published configuration
        decoder = TinyDecoder(module.to(DTYPES[self.dtype]), "taesd, random weights", 4)
        return *build(MODEL, self.device, DTYPES[self.dtype]), decoder

    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"model": "tiny" if self.dry else MODEL, "dtype": self.dtype}


def large_model(name: str, dry: bool) -> tuple[Any, SoftmaxClassifier]:
    """A published generator with random weights in bfloat16 on the card and one convolution as its classifier."""
    if dry:
        from counterlens.engine.models.load import open_diffusion
        from counterlens.engine.packs.architectures import StridedClassifier
        from tests.tiny import IMAGE_SIZE, LABELS
        from tests.tiny_generators import GENERATORS

        with tempfile.TemporaryDirectory() as folder:
            diffusion = open_diffusion(
                GENERATORS[name[:4].removesuffix(".")](Path(folder) / name), image_size=IMAGE_SIZE
            )
        diffusion.describe(LABELS)
        return diffusion, SoftmaxClassifier(StridedClassifier(width=8).eval().requires_grad_(False), LABELS)
    from bench.generators import unmade
    from bench.published import PUBLISHED

    diffusion = unmade(PUBLISHED[name], device="cuda")
    with torch.device("cuda"):
        module = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    return diffusion, SoftmaxClassifier(module.eval().requires_grad_(False), ["a", "b"])


@contextmanager
def channels_last(*modules: nn.Module) -> Iterator[None]:
    """Weights with channels last inside, which is how tensor cores want them, and as they were after.

    PyTorch's group norm for CUDA makes its input contiguous again, so that each costs a copy: to be measured.
    """
    try:
        for module in modules:
            nn.Module.to(module, memory_format=torch.channels_last)
        yield
    finally:
        for module in modules:
            nn.Module.to(module, memory_format=torch.contiguous_format)


def first_line(error: Exception) -> str:
    """An error as a note in a table."""
    note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    say(note)
    return note
