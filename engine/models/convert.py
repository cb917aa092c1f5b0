"""Original CompVis checkpoints (cin256-v2, Stable Diffusion single files) to a folder that `open_diffusion` opens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CounterlensError, UsageError
from .fields import PREDICTIONS
from .files import read_tensors
from .load import open_diffusion
from .text import import_transformers, open_tokenizer

UNET, FIRST_STAGE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# Training state and what can be computed; everything else must find a place in the converted folder.
LEFT_OUT = re.compile(
    r"model_ema\.|first_stage_model\.(loss|model_ema)\.|loss\.|logvar$|scale_factor$|alphas_|betas$|log_one_minus|"
    r"sqrt_|posterior_|lvlb_weights$|cond_stage_model\.(transformer\.text_model\.embeddings\.position_ids$|"
    r"model\.(text_projection|logit_scale|attn_mask)$)|learned_"
)
# (first beta, last beta) of cin256-v2 and of Stable Diffusion, where the file does not hold its own.
BETAS = {"ldm": (0.0015, 0.0195), "stable-diffusion": (0.00085, 0.012)}
TEXT_NAMES = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    image_size: int | None = None,
    prediction: str = "epsilon",
    tokenizer: Path | None = None,
    labels: list[str] | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint in CompVis' layout once; every tensor finds its place or is known training state.

    Shapes tell the architecture. What they cannot tell is fixed by the published configurations: 32 channels a head in
    the class-conditional LDM, 8 heads in Stable Diffusion 1.x and 64 channels a head in 2.x.

    Args:
        checkpoint: `.safetensors`, or a pickle read with `weights_only=True`.
        out: folder to write; must not hold a model yet.
        image_size: side in pixels that the UNet was trained for; 256 for the LDM, 512 for Stable Diffusion without it.
        prediction: `v_prediction` for the 768-v models of Stable Diffusion 2.x.
        tokenizer: folder of a CLIP tokenizer; Stable Diffusion needs it, its checkpoints hold none.
        labels: names of the classes, for the LDM.

    Returns:
        kind, tensors by part, and how many were left out by the first word of their name.

    Raises:
        UsageError: an option does not fit. CounterlensError: the file cannot be read, or has tensors without a place.
    """
    if prediction not in PREDICTIONS:
        raise UsageError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"out: {out} is not empty; conversion writes a new folder")
    tensors = read_tensors(checkpoint)
    kind = "ldm" if f"{CONDITION}embedding.weight" in tensors else "stable-diffusion"
    if not any(k.startswith(UNET) for k in tensors) or not any(k.startswith(FIRST_STAGE) for k in tensors):
        raise CounterlensError(
            f"{checkpoint}: no {UNET}* and {FIRST_STAGE}* tensors; not a checkpoint of CompVis' layout"
        )
    if kind == "stable-diffusion" and tokenizer is None:
        raise UsageError("tokenizer: a Stable Diffusion checkpoint holds none; give the folder of a CLIP tokenizer")
    left_out = [k for k in tensors if LEFT_OUT.match(k)] + _last_open_clip_layer(tensors)
    kept = {k: v for k, v in tensors.items() if k not in set(left_out)}
    try:
        parts = _convert(kind, kept, image_size)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise CounterlensError(f"{checkpoint}: not the layout of a {kind} checkpoint ({error})") from error
    used = {t.untyped_storage().data_ptr() for _, module in parts.values() for t in module.values()}
    if lost := [k for k, v in kept.items() if v.untyped_storage().data_ptr() not in used]:
        raise CounterlensError(f"{checkpoint}: {len(lost)} tensors have no place: {', '.join(lost[:4])}")
    modules = {}
    for name, (module, state) in parts.items():
        missing, unexpected = module.load_state_dict(state, strict=False)
        missing = [k for k in missing if not k.endswith("position_ids")]
        if missing or unexpected:
            raise CounterlensError(f"{checkpoint}: {name}: missing {missing[:4]}, unexpected {list(unexpected)[:4]}")
        modules[name] = module
    _write(kind, modules, out, _scheduler(kind, tensors, prediction, checkpoint), tokenizer, labels)
    open_diffusion(out)  # what cannot be opened was not converted
    words = [k.split(".")[0] for k in left_out]
    return {
        "kind": kind,
        "folder": str(out),
        "tensors": {name: len(state) for name, (_, state) in parts.items()},
        "left_out": {word: words.count(word) for word in sorted(set(words))},
    }


Part = tuple[nn.Module, dict[str, Tensor]]


def _convert(kind: str, tensors: dict[str, Tensor], image_size: int | None) -> dict[str, Part]:
    from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    first = {k.removeprefix(FIRST_STAGE): v for k, v in tensors.items() if k.startswith(FIRST_STAGE)}
    vae_config = first_stage_config(first)
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    size = image_size or (256 if kind == "ldm" else 512)
    unet_config = unet_config_of(
        {k.removeprefix(UNET): v for k, v in tensors.items() if k.startswith(UNET)}, size // factor, kind
    )
    vae_state = convert_ldm_vae_checkpoint({k: v for k, v in tensors.items() if k.startswith(FIRST_STAGE)}, vae_config)
    vae_config["sample_size"] = size
    unet_state = convert_ldm_unet_checkpoint({k: v for k, v in tensors.items() if k.startswith(UNET)}, unet_config)
    unet = UNet2DConditionModel.from_config(unet_config)
    if kind == "ldm":
        codes = first["quantize.embedding.weight"]
        vae_config |= {"num_vq_embeddings": codes.shape[0], "vq_embed_dim": codes.shape[1], "scaling_factor": 1.0}
        vae_state["quantize.embedding.weight"] = codes
        weight = tensors[f"{CONDITION}embedding.weight"]
        embedder = nn.Embedding(*weight.shape)
        return {
            "unet": (unet, unet_state),
            "vqvae": (VQModel.from_config(vae_config), vae_state),
            "class_embedder": (embedder, {"weight": weight}),
        }
    vae_config |= {"scaling_factor": 0.18215}
    text = {k.removeprefix(CONDITION): v for k, v in tensors.items() if k.startswith(CONDITION)}
    return {
        "unet": (unet, unet_state),
        "vae": (AutoencoderKL.from_config(vae_config), vae_state),
        "text_encoder": _text_encoder(text),
    }


def unet_config_of(tensors: dict[str, Tensor], sample_size: int, kind: str) -> dict[str, Any]:
    """The configuration of a CompVis UNet (keys without prefix), read from names and shapes."""
    levels: list[dict[str, Any]] = [{"layers": 0, "attention": False, "width": 0}]
    block = 1
    while any(k.startswith(f"input_blocks.{block}.") for k in tensors):
        name = f"input_blocks.{block}"
        if f"{name}.0.op.weight" in tensors:
            levels.append({"layers": 0, "attention": False, "width": 0})
        else:
            levels[-1]["layers"] += 1
            levels[-1]["width"] = tensors[f"{name}.0.out_layers.3.weight"].shape[0]
            levels[-1]["attention"] |= f"{name}.1.proj_in.weight" in tensors
        block += 1
    widths = [level["width"] for level in levels]
    context = next(v.shape[1] for k, v in tensors.items() if k.endswith("attn2.to_k.weight"))
    linear = next(v.ndim == 2 for k, v in tensors.items() if k.endswith(".proj_in.weight"))
    head_channels = 32 if kind == "ldm" else 64 if linear else None
    cross = [level["attention"] for level in levels]
    return {
        "sample_size": sample_size,
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": levels[0]["layers"],
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        # diffusers' name for the number of heads
        "attention_head_dim": [max(w // head_channels, 1) for w in widths] if head_channels else 8,
    }


def first_stage_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration of a CompVis autoencoder (keys without prefix), read from names and shapes."""
    if level := next((k for k in tensors if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", k)), None):
        raise ValueError(f"{level}: attention inside the levels of the first stage is not supported")
    depth = 1 + max(int(m[1]) for k in tensors if (m := re.match(r"encoder\.down\.(\d+)\.", k)))
    layers = 1 + max(int(m[1]) for k in tensors if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", k)))
    return {
        "block_out_channels": [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(depth)],
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "layers_per_block": layers,
        "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
    }


def _text_encoder(tensors: dict[str, Tensor]) -> Part:
    """CLIP's text tower from Stable Diffusion 1.x (transformers' names) or 2.x (open_clip's, last layer unused)."""
    transformers = import_transformers()
    first = "transformer.text_model."
    if any(k.startswith(first) for k in tensors):
        state, act = {k.removeprefix(first): v for k, v in tensors.items()}, "quick_gelu"
    else:
        state, act = _from_open_clip({k.removeprefix("model."): v for k, v in tensors.items()}), "gelu"
    width = state["embeddings.token_embedding.weight"].shape[1]
    layers = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.layers\.(\d+)\.", k)))
    config = transformers.CLIPTextConfig(
        vocab_size=state["embeddings.token_embedding.weight"].shape[0],
        max_position_embeddings=state["embeddings.position_embedding.weight"].shape[0],
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        projection_dim=width,
        hidden_act=act,
    )
    module = transformers.CLIPTextModel(config)
    prefix = "text_model." if any(k.startswith("text_model.") for k in module.state_dict()) else ""
    return module, {prefix + k: v for k, v in state.items()}


def _last_open_clip_layer(tensors: dict[str, Tensor]) -> list[str]:
    """Stable Diffusion 2.x conditions on the layer before open_clip's last one."""
    numbered = {
        k: int(m[1]) for k in tensors if (m := re.search(r"cond_stage_model\.model\.\w+\.resblocks\.(\d+)\.", k))
    }
    return [k for k, layer in numbered.items() if layer == max(numbered.values())]


def _from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {
        "embeddings.token_embedding.weight": tensors["token_embedding.weight"],
        "embeddings.position_embedding.weight": tensors["positional_embedding"],
        "final_layer_norm.weight": tensors["ln_final.weight"],
        "final_layer_norm.bias": tensors["ln_final.bias"],
    }
    for key, value in tensors.items():
        found = re.match(r"transformer\.resblocks\.(\d+)\.(.*)", key)
        if not found:
            continue
        layer, rest = f"encoder.layers.{found[1]}.", found[2]
        if rest.startswith("attn.in_proj_"):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[f"{layer}self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = rows
        else:
            old = next(name for name in TEXT_NAMES if rest.startswith(name))
            state[layer + rest.replace(old, TEXT_NAMES[old])] = value
    return state


def _scheduler(kind: str, tensors: dict[str, Tensor], prediction: str, checkpoint: Path) -> Any:
    from diffusers import DDIMScheduler

    start, end = BETAS[kind]
    betas = tensors.get("betas")
    if betas is not None:
        start, end = betas[0].item(), betas[-1].item()
    scheduler = DDIMScheduler(
        beta_start=start, beta_end=end, beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    if betas is not None and not torch.allclose(scheduler.betas, betas.float(), rtol=1e-3):
        raise CounterlensError(f"{checkpoint}: its betas are not the square of a line; another schedule than is known")
    return scheduler


def _write(
    kind: str,
    modules: dict[str, nn.Module],
    out: Path,
    scheduler: Any,
    tokenizer: Path | None,
    labels: list[str] | None,
) -> None:
    from safetensors.torch import save_file

    for name, module in modules.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        if isinstance(module, nn.Embedding):
            save_file({"embedding.weight": module.weight.detach().contiguous()}, out / name / "model.safetensors")
            config = {"classes": module.num_embeddings, "width": module.embedding_dim}
            (out / name / "config.json").write_text(json.dumps(config))
        else:
            module.save_pretrained(out / name)  # type: ignore[operator]
    scheduler.save_pretrained(out / "scheduler")
    if tokenizer is not None and kind == "stable-diffusion":
        open_tokenizer(tokenizer).save_pretrained(out / "tokenizer")
    names = {"id2label": dict(enumerate(labels))} if labels else {}
    pipeline = "StableDiffusionPipeline" if kind == "stable-diffusion" else "ClassContextLatentDiffusion"
    (out / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **names}, indent=1))
