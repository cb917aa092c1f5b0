"""What the tests of generators share: models opened once, classifiers to guide them, and inputs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterlens.engine.models.image_classifiers import open_classifier
from counterlens.engine.models.load import open_diffusion
from counterlens.engine.models.protocols import SigmoidClassifier, SoftmaxClassifier
from counterlens.engine.packs.architectures import StridedClassifier
from tests.tiny import IMAGE_SIZE, LABELS, save_clip
from tests.tiny_generators import GENERATORS, VARIANTS

BATCH = 4


class Folders(dict[str, Path]):
    """Folders of models by name; each is written when it is first asked for."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.base = base

    def __missing__(self, name: str) -> Path:
        save = (GENERATORS | VARIANTS | {"clip": save_clip})[name]
        self[name] = save(self.base / name)
        return self[name]


@cache
def opened(folder: Path, dtype: str = "float32") -> Any:
    """A model for every test that leaves it as it is."""
    diffusion = open_diffusion(folder, dtype=dtype, image_size=IMAGE_SIZE)
    diffusion.describe(LABELS[:BATCH])  # of the classifiers' labels, the targets here
    return diffusion


def softmax_classifier(dtype: torch.dtype = torch.float32) -> SoftmaxClassifier:
    """The smallest one."""
    torch.manual_seed(0)
    return SoftmaxClassifier(StridedClassifier(width=8).to(dtype).eval().requires_grad_(False), LABELS)


def classifiers(folders: dict[str, Path], dtype: torch.dtype) -> dict[str, Any]:
    """One of each kind."""
    softmax = softmax_classifier(dtype)
    clip = open_classifier(folders["clip"], image_size=IMAGE_SIZE, labels=LABELS)
    clip.module.to(dtype).requires_grad_(False)
    return {"softmax": softmax, "sigmoid": SigmoidClassifier(softmax.module, LABELS), "clip": clip}


def inputs(diffusion: Any, dtype: torch.dtype, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, images and targets."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(batch, *diffusion.latent_shape, generator=g, dtype=torch.float64).to(dtype)
    image = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=g, dtype=torch.float64).to(dtype)
    return z, image, torch.arange(batch) % 10
