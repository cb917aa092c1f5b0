"""Tiny checkpoints in the original key layout of CompVis, written name by name from modules of diffusers."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from torch import Tensor, nn

RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
OUTER = {
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
}


def original_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The UNet's weights under the names of openaimodel.py."""
    each = unet.config.layers_per_block + 1
    with_attention = ["CrossAttn" in t for t in unet.config.up_block_types]
    out = {}
    for key, value in unet.state_dict().items():
        inner = next((v + key.removeprefix(k) for k, v in OUTER.items() if key.startswith(k)), None)
        if inner is None:
            inner = _block_name(key, each, with_attention)
        out[f"model.diffusion_model.{inner}"] = value.clone()
    return out


def _block_name(key: str, each: int, with_attention: list[bool]) -> str:
    if m := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key):
        return f"input_blocks.{(int(m[1]) + 1) * each}.0.op.{m[2]}"
    if m := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", key):
        b = int(m[1])
        return f"output_blocks.{b * each + each - 1}.{2 if with_attention[b] else 1}.conv.{m[2]}"
    m = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.*)", key)
    assert m, key
    where, block, what, layer, rest = m[1], int(m[2] or 0), m[3], int(m[4]), m[5]
    if what == "resnets":
        old = next(k for k in RESNET if rest.startswith(k))
        rest = RESNET[old] + rest.removeprefix(old)
    if where == "mid":
        return f"middle_block.{2 * layer if what == 'resnets' else 1}.{rest}"
    index = 1 + block * each + layer if where == "down" else block * each + layer
    return f"{'input' if where == 'down' else 'output'}_blocks.{index}.{0 if what == 'resnets' else 1}.{rest}"


def original_first_stage(vae: AutoencoderKL | VQModel) -> dict[str, Tensor]:
    """The autoencoder's weights under the names of ldm/modules/diffusionmodules/model.py."""
    depth = len(vae.config.block_out_channels)
    out = {}
    for key, value in vae.state_dict().items():
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{depth - 1 - int(m[1])}.block.{m[2]}", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{depth - 1 - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        if m := re.match(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", key):
            name = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}[m[2]]
            key = f"{m[1]}.mid.attn_1.{name}.{m[3]}"
            if value.ndim == 2:
                value = value[:, :, None, None]  # 1x1 convolutions there
        out[f"first_stage_model.{key}"] = value.clone()
    return out


def original_text(text: nn.Module) -> dict[str, Tensor]:
    """CLIP's text tower as Stable Diffusion 1.x keeps it, position ids included."""
    state = {k.removeprefix("text_model."): v.clone() for k, v in text.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model."
    out = {prefix + k: v for k, v in state.items()}
    out[f"{prefix}embeddings.position_ids"] = torch.arange(48)[None]
    return out


def original_open_clip(text: nn.Module, extra: int = 1) -> dict[str, Tensor]:
    """CLIP's text tower under open_clip's names, with `extra` last layers that Stable Diffusion 2.x does not use."""
    state = {k.removeprefix("text_model."): v.clone() for k, v in text.state_dict().items()}
    out = {
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
        "text_projection": torch.randn(64, 64),
        "logit_scale": torch.tensor(4.6),
    }
    layers = text.config.num_hidden_layers
    for i in range(layers + extra):
        mine = f"encoder.layers.{min(i, layers - 1)}."
        theirs = f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            out[f"{theirs}attn.in_proj_{kind}"] = torch.cat([state[f"{mine}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            out[f"{theirs}attn.out_proj.{kind}"] = state[f"{mine}self_attn.out_proj.{kind}"].clone()
            for old, new in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                out[f"{theirs}{new}.{kind}"] = state[f"{mine}{old}.{kind}"].clone()
    return {f"cond_stage_model.model.{k}": v for k, v in out.items()}
