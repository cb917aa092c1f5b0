"""Memory options: the same gradients, measured savings, and batches that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterlens.engine.config import PRESETS, Config, StepOptions
from counterlens.engine.engine import Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.memory import PeakMemory, checkpointed, largest_batch, step_bytes, weight_bytes
from counterlens.engine.guidance.pullback import pullback
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.load import open_diffusion
from counterlens.engine.packs import Pack
from tests import tiny
from tests.engine.models.test_classifiers import Plain

pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
SETTINGS = PRESETS["imagenet-class"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("memory")
    return {name: save(base / name) for name, save in tiny.DIFFUSIONS.items()}


def make_engine(folder: Path, **options) -> Engine:
    torch.manual_seed(0)
    return Engine.from_pretrained(folder, Plain(), labels=tiny.LABELS, **options)


def test_peak_memory_counts_what_lives_at_once() -> None:
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        b.mul_(2)
        a.view(10, 100)
        del b
        c = torch.zeros(500)
    assert memory.peak == 8000
    assert memory.now == 6000
    del a, c
    assert memory.now == 0


@pytest.mark.parametrize("name", tiny.DIFFUSIONS)
def test_checkpointing_keeps_the_gradients_and_saves_memory(folders, name: str) -> None:
    """One step of each model, with and without; and the decoder alone, where the activations are."""
    diffusion = open_diffusion(folders[name])
    diffusion.describe(tiny.LABELS)
    engine = make_engine(folders[name])
    z = torch.randn(4, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    image, target, t = torch.rand(4, 3, 16, 16), torch.arange(4), torch.full((4,), 301)
    scales = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle_deg": 45.0}
    step = GuidedStep(diffusion, engine.classifier, StepOptions(filter="off"), mode="autograd")
    condition = diffusion.condition(target)
    results, peaks, gradients = [], [], []
    with frozen(*diffusion.modules(), engine.classifier.module), torch.no_grad():
        for modules in ([], diffusion.modules()):
            with checkpointed(modules), PeakMemory() as memory:
                results.append(step(z, t, t - 20, condition, image, target, **scales)[0])
            peaks.append(memory.peak)
            with checkpointed(modules):
                x0, pull = pullback(diffusion.decode, z, "autograd")
                gradients.append(pull(torch.ones_like(x0)))
    assert (results[0] - results[1]).abs().max() / results[0].abs().max() <= 1e-5
    assert (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max() <= 1e-5
    assert peaks[1] < 0.9 * peaks[0], peaks
    assert not any(getattr(m, "gradient_checkpointing", False) for part in diffusion.modules() for m in part.modules())


def test_an_engine_with_checkpointing_gives_the_same_images(folders) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    config = Config.make(steps=10, strength=0.3, filter="off")
    a, b = (make_engine(folders["dit"], checkpointing=c).counterfactual(images, config=config) for c in (False, True))
    assert a.errors == b.errors == [None, None]
    torch.testing.assert_close(a.images, b.images, rtol=1e-3, atol=1e-3)


def test_the_batch_fits_the_budget(folders) -> None:
    engine = make_engine(folders["ldm"])
    models = (engine.diffusion, engine.classifier)
    weights = weight_bytes([*engine.diffusion.modules(), engine.classifier.module])
    sizes = {n: weights + step_bytes(*models, n, SETTINGS) for n in (1, 4, 8)}
    assert weights < sizes[1] < sizes[4] < sizes[8]
    slots = (1, 2, 4, 8, 16)
    for n in (1, 4, 8):
        assert largest_batch(*models, SETTINGS, sizes[n] * 1.02, slots) == n
    limited = make_engine(folders["ldm"], memory_budget=sizes[4] * 1.02)
    assert limited.slots == (1, 2, 4)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert limited.counterfactual(images, config=Config.make(steps=4, strength=0.5)).errors == [None] * 6
    with pytest.raises(UsageError, match=r"^memory_budget: one sample needs"):
        make_engine(folders["ldm"], memory_budget=1000)


def test_the_tiny_decoder_takes_less_memory() -> None:
    pack = Pack("digits")
    engine = Engine.from_pack("digits", runtime="eager")
    models = (engine.diffusion, engine.classifier)
    full = engine.settings(Config(mode="realistic"))
    tiny = engine.settings(Config(mode="realistic", guidance_decoder="tiny", distance="latent"))
    assert step_bytes(*models, 4, tiny, decoder=pack.guidance_decoder()) < 0.8 * step_bytes(*models, 4, full)


def test_half_precision_keeps_guidance_in_float32(folders) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    config = Config.make(steps=10, strength=0.3, filter="off")
    for dtype in ("bfloat16", "float16"):
        engine = make_engine(folders["sd-eps"], dtype=dtype)
        assert next(engine.diffusion.unet.parameters()).dtype == getattr(torch, dtype)
        result = engine.counterfactual(images, config=config)
        exact = make_engine(folders["sd-eps"]).counterfactual(images, config=config)
        assert result.errors == [None, None]
        assert result.images.dtype == torch.float32
        assert 0 < (result.images - exact.images).abs().mean() < 0.05
    half = weight_bytes(engine.diffusion.modules())
    assert half < 0.6 * weight_bytes(make_engine(folders["sd-eps"]).diffusion.modules())
