"""Checkpoints in CompVis' key layout, converted and opened: every tensor in its place, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from safetensors.torch import save_file
from torch import Tensor, nn

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.convert import convert_checkpoint, first_stage_config, unet_config_of
from counterlens.engine.models.load import open_diffusion
from tests.original import original_first_stage, original_open_clip, original_text, original_unet
from tests.tiny import LABELS, save_tokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
FIRST_STAGE = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
}


def make_unet(channels: int, width: int, heads: object, linear: bool = False) -> UNet2DConditionModel:
    """Three levels as in cin256: the first without attention, two layers each."""
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=heads,
        use_linear_projection=linear,
    )


def training_state() -> dict[str, Tensor]:
    """What a Lightning checkpoint of a latent diffusion model holds besides."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    return {
        "betas": betas.float(),
        "alphas_cumprod": (1 - betas).cumprod(0).float(),
        "model_ema.decay": torch.tensor(0.9999),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2),
        "logvar": torch.zeros(1000),
    }


def make_ldm() -> tuple[UNet2DConditionModel, VQModel, nn.Embedding, dict[str, Tensor]]:
    torch.manual_seed(0)
    unet = make_unet(3, 16, [1, 2, 2])
    vq = VQModel(**FIRST_STAGE, latent_channels=3, num_vq_embeddings=64, vq_embed_dim=3)
    embedder = nn.Embedding(11, 16)
    state = original_unet(unet) | original_first_stage(vq) | training_state()
    return unet, vq, embedder, state | {"cond_stage_model.embedding.weight": embedder.weight.detach().clone()}


def make_sd(second: bool) -> tuple[UNet2DConditionModel, AutoencoderKL, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(1)
    unet = make_unet(4, 64, [1, 1, 1] if second else 8, linear=second)
    vae = AutoencoderKL(**FIRST_STAGE, latent_channels=4)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=48,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            hidden_act="gelu" if second else "quick_gelu",
        )
    )
    words = original_open_clip(text) if second else original_text(text)
    return unet, vae, text, original_unet(unet) | original_first_stage(vae) | words


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_class_conditional_ldm_round_trip(tmp_path: Path, ending: str) -> None:
    unet, vq, embedder, state = make_ldm()
    path = tmp_path / f"model.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": state, "global_step": 7, "epoch": 1}, path)
    else:
        save_file(state, path)
    report = convert_checkpoint(path, tmp_path / "out", image_size=16, labels=LABELS)
    assert report["kind"] == "ldm"
    assert sum(report["tensors"].values()) + sum(report["left_out"].values()) == len(state)
    assert set(report["left_out"]) == {"betas", "alphas_cumprod", "model_ema", "first_stage_model", "logvar"}
    back = open_diffusion(tmp_path / "out")
    assert_same(back.unet, unet)
    assert_same(back.vqvae, vq)
    assert torch.equal(back.class_embedder.weight, embedder.weight)
    assert back.image_size == 16
    assert back.names == LABELS
    torch.testing.assert_close(back.alphas_cumprod.float(), state["alphas_cumprod"], rtol=1e-4, atol=1e-6)
    z, context = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 16)
    t = torch.tensor([10, 500])
    torch.testing.assert_close(back.predict_noise(z, t, context), unet.eval()(z, t, encoder_hidden_states=context)[0])


@pytest.mark.parametrize("second", [False, True])
def test_stable_diffusion_single_file_round_trip(tmp_path: Path, second: bool) -> None:
    unet, vae, text, state = make_sd(second)
    save_file(state, tmp_path / "sd.safetensors")
    save_tokenizer(tmp_path / "tokenizer", ["thing"])
    report = convert_checkpoint(
        tmp_path / "sd.safetensors", tmp_path / "out", image_size=16, tokenizer=tmp_path / "tokenizer",
        prediction="v_prediction" if second else "epsilon",
    )  # fmt: skip
    assert report["kind"] == "stable-diffusion"
    back = open_diffusion(tmp_path / "out")
    assert_same(back.unet, unet)
    assert_same(back.vae, vae)
    assert_same(back.text_encoder, text)
    assert back.prediction == ("v_prediction" if second else "epsilon")
    tokens = torch.tensor([[0, 5, 9, 1]])
    torch.testing.assert_close(back.text_encoder(tokens)[0], text.eval()(tokens)[0])
    assert back.unet.config.attention_head_dim == ([1, 1, 1] if second else 8)


def test_published_configurations_are_recognised() -> None:
    """Full-size shapes on the meta device: cin256-v2's and Stable Diffusion's numbers come out."""
    with torch.device("meta"):
        cin = UNet2DConditionModel(
            sample_size=64, in_channels=3, out_channels=3, block_out_channels=(192, 384, 576, 960),
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
            up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
            cross_attention_dim=512, attention_head_dim=[6, 12, 18, 30],
        )  # fmt: skip
        sd = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vq = VQModel(
            block_out_channels=(128, 256, 512), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2, latent_channels=3, num_vq_embeddings=8192,
        )  # fmt: skip
    for unet, kind in ((cin, "ldm"), (sd, "stable-diffusion")):
        names = {k.removeprefix("model.diffusion_model."): v for k, v in original_unet(unet).items()}
        config = unet_config_of(names, 64, kind)
        for field, value in config.items():
            written = unet.config[field]
            assert (list(written) if isinstance(written, tuple) else written) == value, field
    config = first_stage_config({k.removeprefix("first_stage_model."): v for k, v in original_first_stage(vq).items()})
    assert config["block_out_channels"] == [128, 256, 512]
    assert config["latent_channels"] == 3


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    _, _, _, state = make_ldm()
    path, out = tmp_path / "model.safetensors", tmp_path / "out"

    def attempt(changed: dict[str, Tensor]) -> None:
        save_file(changed, path)
        convert_checkpoint(path, out, image_size=16)

    with pytest.raises(CounterlensError, match=r"1 tensors have no place: cond_stage_model\.other"):
        attempt(state | {"cond_stage_model.other": torch.zeros(1)})
    with pytest.raises(CounterlensError, match=r"unet: missing \['conv_norm_out.bias'\]"):
        attempt({k: v for k, v in state.items() if k != "model.diffusion_model.out.0.bias"})
    with pytest.raises(CounterlensError, match="not a checkpoint of CompVis"):
        attempt({"weight": torch.zeros(1)})
    with pytest.raises(CounterlensError, match="betas"):
        attempt(state | {"betas": torch.linspace(0.0015, 0.0195, 1000)})
    assert not out.exists()
    with pytest.raises(UsageError, match=r"^prediction:"):
        convert_checkpoint(path, out, prediction="x0")
    _, _, _, sd = make_sd(False)
    save_file(sd, path)
    with pytest.raises(UsageError, match=r"^tokenizer:"):
        convert_checkpoint(path, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match=r"^out:.*not empty"):
        convert_checkpoint(path, tmp_path / "full")


class Callback:
    """As Lightning pickles its callbacks."""


def test_a_checkpoint_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": make_ldm()[3], "callbacks": Callback()}, tmp_path / "model.ckpt")
    with pytest.raises(CounterlensError, match=r"model\.ckpt: refused.*Callback"):
        convert_checkpoint(tmp_path / "model.ckpt", tmp_path / "out")
