"""Small models that every test can afford."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

from counterlens.engine.models.latent import ClassConditionalLatentDiffusion
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs.architectures import StridedClassifier


@pytest.fixture(autouse=True, scope="session")
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees what the user has compiled and measured."""
    before = os.environ.get("COUNTERLENS_STORE")
    os.environ["COUNTERLENS_STORE"] = str(tmp_path_factory.mktemp("store"))
    yield
    os.environ.pop("COUNTERLENS_STORE")
    if before is not None:
        os.environ["COUNTERLENS_STORE"] = before


LABELS = [str(d) for d in range(10)]


def make_tiny(dtype: torch.dtype = torch.float32) -> tuple[ClassConditionalLatentDiffusion, SoftmaxClassifier]:
    """A random-weight latent diffusion model (16x16 images, 4x4x4 latents) and a classifier."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=11,
    )
    # Default initialisation hardly tells classes apart; a random embedding does.
    torch.nn.init.normal_(unet.class_embedding.weight, std=1.0)
    module = StridedClassifier(width=8)
    alphas_cumprod = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear"
    ).alphas_cumprod.double()
    for part in (vae, unet, module):
        part.to(dtype).eval().requires_grad_(False)
    diffusion = ClassConditionalLatentDiffusion(vae, unet, alphas_cumprod, LABELS)
    return diffusion, SoftmaxClassifier(module, LABELS)


@pytest.fixture(scope="session")
def tiny() -> tuple[ClassConditionalLatentDiffusion, SoftmaxClassifier]:
    """The tiny models in float32."""
    return make_tiny()


@pytest.fixture(scope="session")
def tiny64() -> tuple[ClassConditionalLatentDiffusion, SoftmaxClassifier]:
    """The tiny models in float64."""
    return make_tiny(torch.float64)
