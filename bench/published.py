"""Published configurations of generators, and how many parameters their denoisers are said to have."""

from __future__ import annotations

from typing import Any, NamedTuple

KL4: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
KL16 = KL4 | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
DC32: dict[str, Any] = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
# Parameters of the autoencoders: the SDXL VAE, that of SD 3 and of FLUX.1, and DC-AE f32c32.
AUTOENCODERS = {4: 83_653_863, 16: 83_819_683, 32: 312_250_275}
PIXART: dict[str, Any] = {
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "sample_size": 128,
    "use_additional_conditions": False,
}
SD3: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SANA600: dict[str, Any] = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


class Published(NamedTuple):
    """A generator as it was published.

    Attributes:
        family: `module:Class` in `engine.models`.
        denoiser, vae: fields of their configurations that differ from the class's defaults.
        said: parameters of the denoiser, as its paper or card says them.
        counted: parameters of the denoiser, every one.
        conditions: shape of each tensor of a condition, for one sample.
        size: side of its images in pixels.
        layout: some of the denoiser's tensors and their shapes, as its files have them.
    """

    family: str
    denoiser: dict[str, Any]
    vae: dict[str, Any]
    said: str
    counted: int
    conditions: tuple[tuple[int, ...], ...]
    size: int
    layout: dict[str, tuple[int, ...]]


# The UNets of Stable Diffusion XL (and SDXL-Turbo), of 2.1 (and SD-Turbo), and of LCM, which is 1.5's told a scale.
XL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD21: dict[str, Any] = {
    "sample_size": 64, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
    "use_linear_projection": True,
}  # fmt: skip
LCM: dict[str, Any] = {"sample_size": 96, "cross_attention_dim": 768, "time_cond_proj_dim": 256}

PUBLISHED: dict[str, Published] = {
    "Stable Diffusion XL": Published(
        "sdxl:StableDiffusionXL", XL, KL4, "2.6 B", 2_567_463_684, ((77, 2048), (1280,)), 1024,
        {"add_embedding.linear_1.weight": (1280, 2816), "conv_in.weight": (320, 4, 3, 3),
         "mid_block.attentions.0.transformer_blocks.9.attn2.to_k.weight": (1280, 2048)},
    ),
    "SD-Turbo": Published(
        "stable_diffusion:StableDiffusion", SD21, KL4 | {"sample_size": 768, "scaling_factor": 0.18215}, "0.87 B",
        865_910_724, ((77, 1024),), 512,
        {"mid_block.attentions.0.proj_in.weight": (1280, 1280),
         "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 1024)},
    ),
    "LCM Dreamshaper": Published(
        "stable_diffusion:StableDiffusion", LCM, KL4 | {"sample_size": 768, "scaling_factor": 0.18215}, "0.86 B",
        859_602_884, ((77, 768),), 768,
        {"time_embedding.cond_proj.weight": (320, 256), "mid_block.attentions.0.proj_in.weight": (1280, 1280, 1, 1)},
    ),
    "PixArt-Sigma XL 1024": Published(
        "pixart:PixArt", PIXART, KL4, "0.61 B", 610_856_096, ((300, 4096), (300,)), 1024,
        {"pos_embed.proj.weight": (1152, 4, 2, 2), "caption_projection.linear_1.weight": (1152, 4096),
         "transformer_blocks.27.attn2.to_k.weight": (1152, 1152), "proj_out.weight": (32, 1152)},
    ),
    "Stable Diffusion 3 medium": Published(
        "sd3:StableDiffusion3", SD3, KL16, "2.0 B", 2_028_328_000, ((333, 4096), (2048,)), 1024,
        {"pos_embed.pos_embed": (1, 36864, 1536), "context_embedder.weight": (1536, 4096),
         "transformer_blocks.23.attn.to_q.weight": (1536, 1536), "proj_out.weight": (64, 1536)},
    ),
    "Stable Diffusion 3.5 large": Published(
        "sd3:StableDiffusion3",
        SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
        KL16, "8.1 B", 8_056_627_520, ((333, 4096), (2048,)), 1024,
        {"pos_embed.pos_embed": (1, 36864, 2432), "transformer_blocks.37.attn.norm_added_q.weight": (64,),
         "transformer_blocks.36.ff_context.net.0.proj.weight": (9728, 2432)},
    ),
    "FLUX.1 dev": Published(
        "flux:Flux", {"guidance_embeds": True}, KL16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}, "11.9 B",
        11_901_408_320, ((512, 4096), (768,)), 1024,
        {"x_embedder.weight": (3072, 64), "time_text_embed.guidance_embedder.linear_1.weight": (3072, 256),
         "transformer_blocks.18.attn.add_q_proj.weight": (3072, 3072),
         "single_transformer_blocks.37.proj_out.weight": (3072, 15360)},
    ),
    "Sana 1600M": Published(
        "sana:Sana", {}, DC32, "1.6 B", 1_604_462_752, ((300, 2304), (300,)), 1024,
        {"patch_embed.proj.weight": (2240, 32, 1, 1), "transformer_blocks.19.ff.conv_depth.weight": (11200, 1, 3, 3),
         "caption_projection.linear_1.weight": (2240, 2304)},
    ),
    "Sana 600M": Published(
        "sana:Sana", SANA600, DC32, "0.59 B", 591_747_872, ((300, 2304), (300,)), 1024,
        {"patch_embed.proj.weight": (1152, 32, 1, 1), "transformer_blocks.27.attn2.to_out.0.weight": (1152, 1152)},
    ),
}  # fmt: skip
