"""Every diffusion model with every kind of classifier, from disk: the literal baseline's numbers, and three steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.baselines.literal import filter_angles, literal_step
from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.image_classifiers import ImageClassifier, open_classifier, wrap_classifier
from counterlens.engine.models.load import open_diffusion
from counterlens.engine.packs import Pack
from tests import tiny

pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
DIFFUSIONS = (*tiny.DIFFUSIONS, "digits")
CLASSIFIERS = ("resnet", "vit", "dino", "clip", "siglip", "binary", "module")
SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # as for the digits pack
NEAR_LIMIT = {torch.float64: 1e-7, torch.float32: 1e-3}  # radians
BATCH = 6


class Plain(nn.Module):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.gelu(self.conv(x)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("matrix")
    for name, save in tiny.DIFFUSIONS.items():
        save(base / name)
    for save in (tiny.save_resnet, tiny.save_vit, tiny.save_dino, tiny.save_clip, tiny.save_siglip):
        save(base / save.__name__.removeprefix("save_"))
    tiny.save_resnet(base / "binary", labels=1)
    return base


def make_classifier(folder: Path, name: str, image_size: int) -> ImageClassifier:
    if name == "module":
        torch.manual_seed(10)
        return wrap_classifier(Plain(), tiny.LABELS, image_size=image_size, resize=20, crop=18, mean=(0.5,) * 3)
    options: dict = {"dino": {"head": folder / "dino" / "head.safetensors"}}.get(name, {})
    if name in ("dino", "clip", "siglip"):
        options["labels"] = tiny.LABELS
    if name == "binary":
        options["labels"] = ["old", "young"]
    return open_classifier(folder / name, image_size=image_size, **options)


def make_models(folder: Path, diffusion_name: str, name: str, dtype: torch.dtype) -> tuple:
    precision = str(dtype).removeprefix("torch.")
    if diffusion_name == "digits":
        diffusion: Any = Pack("digits").diffusion(precision)
    else:
        diffusion = open_diffusion(folder / diffusion_name, dtype=precision)
    classifier = make_classifier(folder, name, diffusion.image_size)
    classifier.module.to(dtype)
    if diffusion.conditioning == "text":
        diffusion.describe(classifier.labels, prompts="age" if name == "binary" else "imagenet")
    else:
        diffusion.describe(classifier.labels, classes=[3, 8] if name == "binary" else None)
    return diffusion, classifier


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("diffusion_name", DIFFUSIONS)
def test_step_equals_literal_and_three_steps_run(folder: Path, diffusion_name: str, name: str) -> None:
    for dtype in (torch.float64, torch.float32):
        diffusion, classifier = make_models(folder, diffusion_name, name, dtype)
        g = torch.Generator().manual_seed(2)
        size = diffusion.image_size
        image = torch.rand(BATCH, 3, size, size, generator=g, dtype=torch.float64).to(dtype)
        z = torch.randn(BATCH, *diffusion.latent_shape, generator=g, dtype=torch.float64).to(dtype)
        target = torch.arange(BATCH) % len(classifier.labels)
        timestep = torch.full((BATCH,), 301)
        with frozen(*diffusion.modules(), classifier.module), torch.no_grad():
            expected, score, reference = literal_step(
                diffusion, classifier, z, 301, 281, image, target, **SCALES, angle_deg=60.0
            )
            got, _, _ = GuidedStep(diffusion, classifier)(
                z, timestep, timestep - 20, diffusion.condition(target), image, target, **SCALES, angle_deg=60.0
            )
        angles = filter_angles(score, reference, "zero").flatten(1)
        near = ((angles - math.radians(60)).abs() < NEAR_LIMIT[dtype]).any(1)
        assert near.sum() <= 2
        error = (got - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)
        assert error[~near].max() <= TOLERANCE[dtype], (dtype, error)
        assert score.abs().amax() > 0
    settings = {"steps": 6, "strength": 0.5, "angle": 60, **SCALES}
    engine = Engine(diffusion, classifier, pack_settings={"realistic": settings, "audit": settings})
    result = engine.counterfactual(image[:2], config=Config())
    assert result.errors == [None, None]
    assert result.images.shape == (2, 3, size, size)
    assert result.images.isfinite().all()
    assert result.kept_fraction.shape == (2, 3)
    assert not torch.equal(result.images, image[:2])
