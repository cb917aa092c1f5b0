"""The pack's networks in plain torch are diffusers' bit by bit, and opening the pack does not import diffusers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from counterlens.engine.guidance.memory import PeakMemory, checkpointed
from counterlens.engine.models.latent import ClassConditionalLatentDiffusion
from counterlens.engine.models.plain import Autoencoder, UNet, fits
from counterlens.engine.packs import Pack


@pytest.fixture(scope="module")
def both() -> list[ClassConditionalLatentDiffusion]:
    pack = Pack("digits")
    return [pack.diffusion(), pack.diffusion(plain=False)]


def results(diffusion: ClassConditionalLatentDiffusion, batch: int) -> list[Tensor]:
    """What the networks say, and gradients through them."""
    g = torch.Generator().manual_seed(batch)
    z = torch.randn(batch, 4, 8, 8, generator=g).requires_grad_()
    timestep, label = (torch.randint(n, (batch,), generator=g) for n in (1000, 11))
    noise, image = diffusion.predict_noise(z, timestep, label), diffusion.decode(z)
    gradients = [torch.autograd.grad(out.square().sum(), z)[0] for out in (noise, image)]
    at_once = diffusion.predict_noise(z, torch.tensor(301), label)
    return [noise, image, *gradients, at_once, diffusion.encode(torch.rand(batch, 3, 32, 32, generator=g))]


@pytest.mark.parametrize("batch", [1, 3, 16, 64])
def test_they_are_diffusers_bit_by_bit(both, batch: int) -> None:
    assert isinstance(both[0].unet, UNet)
    assert isinstance(both[0].vae, Autoencoder)
    assert type(both[1].unet).__name__ == "UNet2DModel"
    for ours, theirs in zip(*(results(d, batch) for d in both), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(both[0].alphas_cumprod, both[1].alphas_cumprod)
    for name in ("labels", "names", "null_class", "image_size", "latent_shape", "prediction"):
        assert getattr(both[0], name) == getattr(both[1], name)


def test_their_configurations_say_the_same(both) -> None:
    for ours, theirs in zip(both[0].modules(), both[1].modules(), strict=True):
        said = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
        assert {k: v for k, v in ours.config.items() if not k.startswith("_")} == said
        assert fits(ours.config)
        for field, value in (
            ("dropout", 0.1),
            ("norm_num_groups", None),
            ("act_fn", "gelu"),
            ("up_block_types", ["UpBlock2D"]),
            ("new", 1),
        ):
            assert not fits(ours.config | {field: value})


def test_activations_are_recomputed_where_asked_for(both) -> None:
    peaks, found = [], []
    for recompute in (False, True):
        with checkpointed(both[0].modules() if recompute else []), PeakMemory() as memory:
            found.append(results(both[0], 4))
        peaks.append(memory.peak)
    assert all(map(torch.equal, *found))
    assert peaks[1] < 0.7 * peaks[0]


def test_opening_the_pack_imports_no_library_of_models() -> None:
    run = (
        "import sys; from counterlens.engine import Engine; Engine.from_pack('digits', device='cpu'); "
        "print([n for n in ('diffusers', 'transformers', 'torch._dynamo') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_half_precision_leaves_the_autoencoder_where_it_would_overflow() -> None:
    pack = Pack("digits")
    for name in ("float16", "bfloat16"):
        ours, theirs = (
            [next(m.parameters()).dtype for m in pack.diffusion(name, plain=plain).modules()] for plain in (True, False)
        )
        assert ours == theirs
    assert ours == [torch.bfloat16, torch.bfloat16]
