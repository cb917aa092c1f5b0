"""PixArt, Stable Diffusion 3, FLUX.1 and Sana with random weights, small, in the folders that the real ones come in."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LCMScheduler,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from tests.tiny import IMAGE_SIZE, save_clip_text, save_stable_diffusion, tiny_kl

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"


def lively(module: nn.Module, gain: float = 2.0) -> nn.Module:
    """Conditions and timesteps that matter: zero or tiny default gates would leave the input as it came."""
    for name, parameter in module.named_parameters():
        modulates = "norm" in name and parameter.ndim == 2
        if modulates or any(part in name for part in ("embed", "caption", "attn2", "scale_shift_table")):
            parameter.data.mul_(gain)
    return module


@cache
def pieces() -> bytes:
    """A sentencepiece model of letters and a few words."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    said = [f"a photo of a thing {n}." for n in range(10)] + [" ".join(LETTERS)] * 2
    SentencePieceTrainer.train(
        sentence_iterator=iter(said), model_writer=written, vocab_size=60, hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def save_t5(folder: Path, suffix: str, width: int = 24, fast: bool = False) -> None:
    """A T5 encoder (version 1.1: gated GELU) and its sentencepiece tokenizer, as `spiece.model` or `tokenizer.json`."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tokenizer = folder / f"tokenizer{suffix}"
    tokenizer.mkdir(parents=True)
    (tokenizer / "spiece.model").write_bytes(pieces())
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    if fast:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tokenizer)
        (tokenizer / "spiece.model").unlink()
    torch.manual_seed(11)
    t5 = T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5EncoderModel(t5).save_pretrained(folder / f"text_encoder{suffix}")


def save_gemma(folder: Path, width: int = 16) -> None:
    """A Gemma 2 decoder and its tokenizer, which starts every text with <bos>."""
    from tokenizers import processors
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, "▁", "\n", *(chr(c) for c in range(33, 127))]
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(13)
    config = Gemma2Config(
        vocab_size=128, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    Gemma2Model(config).save_pretrained(folder / "text_encoder")


def save_index(folder: Path, pipeline: str, **parts: str | None) -> Path:
    """model_index.json; a part is `library:Class`, or none."""
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.30.0"}
    index |= {name: said.split(":") if said else [None, None] for name, said in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def kl16() -> AutoencoderKL:
    """An autoencoder of 16 shifted channels without the 1x1 convolutions, as SD 3 and FLUX.1 have it."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def save_pixart(folder: Path, pipeline: str = "PixArtSigmaPipeline", micro: bool = False) -> Path:
    """PixArt-Sigma (or -alpha): learned variance, T5 under an attention mask, `spiece.model` alone."""
    save_t5(folder, "")
    torch.manual_seed(14)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=4,
        caption_channels=24,
        use_additional_conditions=micro,
    )
    lively(transformer).save_pretrained(folder / "transformer")
    tiny_kl().save_pretrained(folder / "vae")
    DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").save_pretrained(
        folder / "scheduler"
    )
    return save_index(
        folder, pipeline, scheduler="diffusers:DPMSolverMultistepScheduler", text_encoder="transformers:T5EncoderModel",
        tokenizer="transformers:T5Tokenizer", transformer="diffusers:PixArtTransformer2DModel",
        vae="diffusers:AutoencoderKL",
    )  # fmt: skip


def save_sd3(folder: Path, large: bool = False, t5: bool = True) -> Path:
    """Stable Diffusion 3 (or 3.5: normed queries and keys, dual attention), with or without its T5."""
    save_clip_text(folder, projected=True, seed=12)
    save_clip_text(folder, "_2", projected=True, seed=14)
    if t5:
        save_t5(folder, "_3", width=40, fast=True)
    torch.manual_seed(15)
    more: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if large else {}
    transformer = SD3Transformer2DModel(
        sample_size=4,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=24,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        **more,
    )
    lively(transformer).save_pretrained(folder / "transformer")
    torch.manual_seed(16)
    kl16().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    third = ("transformers:T5EncoderModel", "transformers:T5TokenizerFast") if t5 else (None, None)
    return save_index(
        folder, "StableDiffusion3Pipeline", scheduler="diffusers:FlowMatchEulerDiscreteScheduler",
        text_encoder="transformers:CLIPTextModelWithProjection", tokenizer="transformers:CLIPTokenizer",
        text_encoder_2="transformers:CLIPTextModelWithProjection", tokenizer_2="transformers:CLIPTokenizer",
        transformer="diffusers:SD3Transformer2DModel", vae="diffusers:AutoencoderKL",
        text_encoder_3=third[0], tokenizer_3=third[1],
    )  # fmt: skip


def save_flux(folder: Path, guidance: bool = True) -> Path:
    """FLUX.1 dev (a guidance embedding, dynamic shift) or schnell (neither)."""
    save_clip_text(folder, seed=12)
    save_t5(folder, "_2", fast=True)
    torch.manual_seed(17)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    lively(transformer).save_pretrained(folder / "transformer")
    torch.manual_seed(16)
    kl16().save_pretrained(folder / "vae")
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    FlowMatchEulerDiscreteScheduler(**shift).save_pretrained(folder / "scheduler")
    return save_index(
        folder, "FluxPipeline", scheduler="diffusers:FlowMatchEulerDiscreteScheduler",
        text_encoder="transformers:CLIPTextModel", tokenizer="transformers:CLIPTokenizer",
        text_encoder_2="transformers:T5EncoderModel", tokenizer_2="transformers:T5TokenizerFast",
        transformer="diffusers:FluxTransformer2DModel", vae="diffusers:AutoencoderKL",
    )  # fmt: skip


def save_sana(folder: Path, solver: bool = False) -> Path:
    """Sana: linear attention over a deep autoencoder's 32 channels; flow by Euler, or by DPM-Solver's configuration."""
    save_gemma(folder)
    torch.manual_seed(18)
    transformer = SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=4,
    )
    lively(transformer).save_pretrained(folder / "transformer")
    vae = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )
    vae.save_pretrained(folder / "vae")
    if solver:
        scheduler: Any = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    return save_index(
        folder, "SanaPipeline", scheduler=f"diffusers:{type(scheduler).__name__}",
        text_encoder="transformers:Gemma2Model", tokenizer="transformers:GemmaTokenizerFast",
        transformer="diffusers:SanaTransformer2DModel", vae="diffusers:AutoencoderDC",
    )  # fmt: skip


def save_sdxl(folder: Path, turbo: bool = False) -> Path:
    """Stable Diffusion XL, or SDXL-Turbo: the same with a scheduler of few steps."""
    save_clip_text(folder, seed=12)
    save_clip_text(folder, "_2", projected=True, seed=14)
    torch.manual_seed(19)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    lively(unet).save_pretrained(folder / "unet")
    vae = tiny_kl()
    vae.register_to_config(scaling_factor=0.13025, force_upcast=True)
    vae.save_pretrained(folder / "vae")
    kind = EulerAncestralDiscreteScheduler if turbo else EulerDiscreteScheduler
    kind(**SD_BETAS, timestep_spacing="trailing" if turbo else "leading").save_pretrained(folder / "scheduler")
    return save_index(
        folder, "StableDiffusionXLPipeline", scheduler=f"diffusers:{kind.__name__}",
        text_encoder="transformers:CLIPTextModel", tokenizer="transformers:CLIPTokenizer",
        text_encoder_2="transformers:CLIPTextModelWithProjection", tokenizer_2="transformers:CLIPTokenizer",
        unet="diffusers:UNet2DConditionModel", vae="diffusers:AutoencoderKL",
    )  # fmt: skip


def save_few_steps(folder: Path, lcm: bool = False) -> Path:
    """SD-Turbo: Stable Diffusion with Euler's trailing timesteps; or LCM, whose UNet is told a guidance scale."""
    save_stable_diffusion(folder)
    for file in (folder / "scheduler").iterdir():
        file.unlink()
    if not lcm:
        EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
        return folder
    LCMScheduler(**SD_BETAS).save_pretrained(folder / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    torch.manual_seed(20)
    told = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=6)
    told.load_state_dict(unet.state_dict(), strict=False)
    nn.init.normal_(told.time_embedding.cond_proj.weight, std=0.5)
    told.save_pretrained(folder / "unet")
    return save_index(folder, "LatentConsistencyModelPipeline")


GENERATORS = {
    "sdxl": save_sdxl,
    "lcm": lambda folder: save_few_steps(folder, lcm=True),
    "pixart": save_pixart,
    "sd3": save_sd3,
    "flux": save_flux,
    "sana": save_sana,
}
# Others of the same families: micro-conditions, normed attention, no T5, no guidance embedding, another scheduler.
VARIANTS = {
    "sdxl-turbo": lambda folder: save_sdxl(folder, turbo=True),
    "sd-turbo": save_few_steps,
    "alpha": lambda folder: save_pixart(folder, "PixArtAlphaPipeline", micro=True),
    "sd3.5": lambda folder: save_sd3(folder, large=True),
    "sd3-without-t5": lambda folder: save_sd3(folder, t5=False),
    "flux-schnell": lambda folder: save_flux(folder, guidance=False),
    "sana-dpm": lambda folder: save_sana(folder, solver=True),
}
