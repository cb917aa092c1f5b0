"""Opening diffusion models from folders in diffusers' layout, or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CounterlensError, UsageError
from .fields import check_side, latent_scale, read_noise_levels
from .files import WEIGHTS, check_dtype, find_folder, id2label_names, read_json, read_part, read_tensors, weight_files

if TYPE_CHECKING:
    from .dit import DiffusionTransformer
    from .latent import ClassConditionalLatentDiffusion
    from .ldm import ClassContextLatentDiffusion
    from .stable_diffusion import StableDiffusion

    OpenedDiffusion = (
        DiffusionTransformer | ClassContextLatentDiffusion | StableDiffusion | ClassConditionalLatentDiffusion
    )

# The parts of each kind of folder; the first part that is there and in no other kind tells which kind it is.
PARTS = {
    "dit": ("transformer", "vae", "scheduler"),
    "ldm": ("class_embedder", "vqvae", "unet", "scheduler"),
    "stable-diffusion": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
}


def missing_files(folder: Path, kind: str) -> list[str]:
    """Files that a model of this kind needs and the folder lacks, relative to it."""
    out = []
    for part in PARTS[kind]:
        inside = folder / part
        if part == "scheduler":
            wanted, weights = "scheduler_config.json", False
        elif part == "tokenizer":
            wanted, weights = "tokenizer_config.json", False
            if not (inside / "tokenizer.json").is_file():
                out += [f"{part}/{n}" for n in ("vocab.json", "merges.txt") if not (inside / n).is_file()]
        else:
            wanted, weights = "config.json", part != "class_embedder"
        if not (inside / wanted).is_file():
            out.append(f"{part}/{wanted}")
        if weights and not weight_files(inside):
            out.append(f"{part}/{WEIGHTS[part == 'text_encoder']}.safetensors")
        if part == "class_embedder" and not (inside / "model.safetensors").is_file():
            out.append(f"{part}/model.safetensors")
    return out


def open_diffusion(
    name: str | Path,
    *,
    dtype: str = "float32",
    image_size: int | None = None,
) -> OpenedDiffusion:
    """Open a Stable Diffusion, class-conditional LDM or DiT folder, or a hub id.

    Args:
        name: a folder in diffusers' layout (`unet/`, `vae/`, ...), or `owner/name`.
        dtype: of the weights: float32, float16 or bfloat16 (float64 for tests).
        image_size: side in pixels, for Stable Diffusion alone; the model's own without it.

    Raises:
        UsageError: the name or an option does not fit. CounterlensError: files are missing or corrupt.
    """
    folder = find_folder(name, "model")
    present = {p.name for p in folder.iterdir() if p.is_dir()}
    kind = next((k for k, parts in PARTS.items() if parts[0] in present), None)
    if kind is None:
        single = sorted(p.name for p in folder.iterdir() if p.suffix in (".ckpt", ".safetensors"))
        hint = f"; {single[0]} looks like an original checkpoint: see `counterlens convert`" if single else ""
        raise UsageError(f"model: {folder} has none of unet/, transformer/ and class_embedder/{hint}")
    if missing := missing_files(folder, kind):
        raise CounterlensError(
            f"model: {folder} is not complete, missing: {', '.join(missing)}. Get them where the others came from "
            f"(`hf download OWNER/NAME {' '.join(missing)} --local-dir {folder}`)"
        )
    if image_size is not None and kind != "stable-diffusion":
        raise UsageError(f"image_size: a {kind} model has one image size; only Stable Diffusion takes others")
    return _open(folder, kind, check_dtype(dtype, torch.device("cpu")), image_size)


def _open(folder: Path, kind: str, dtype: torch.dtype, image_size: int | None) -> OpenedDiffusion:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, VQModel

    path = folder / "scheduler" / "scheduler_config.json"
    alphas_cumprod, prediction = read_noise_levels(path, read_json(path))
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    names = id2label_names(index.get("id2label"))
    denoiser = folder / ("transformer" if kind == "dit" else "unet") / "config.json"
    check_side(denoiser, read_json(denoiser), chosen=image_size is not None)
    if kind == "dit":
        from .dit import DiffusionTransformer

        vae = _read_vae(AutoencoderKL, folder / "vae", dtype)
        transformer = read_part(DiTTransformer2DModel, folder / "transformer", dtype)
        return DiffusionTransformer(vae, transformer, alphas_cumprod, names, prediction)
    if kind == "ldm":
        from .ldm import ClassContextLatentDiffusion

        vqvae = _read_vae(VQModel, folder / "vqvae", dtype)
        unet = read_part(UNet2DConditionModel, folder / "unet", dtype)
        weight = read_tensors(folder / "class_embedder" / "model.safetensors").get("embedding.weight")
        if weight is None or weight.ndim != 2:
            raise CounterlensError(
                f"{folder / 'class_embedder'}: expected one tensor, embedding.weight [classes + 1, C]"
            )
        embedder = nn.Embedding.from_pretrained(weight.to(dtype), freeze=True)
        return ClassContextLatentDiffusion(vqvae, unet, embedder, alphas_cumprod, names, prediction)
    from .stable_diffusion import StableDiffusion
    from .text import open_text_encoder

    vae = _read_vae(AutoencoderKL, folder / "vae", dtype)
    unet = read_part(UNet2DConditionModel, folder / "unet", dtype)
    text_encoder, tokenizer = open_text_encoder(folder, dtype)
    return StableDiffusion(
        vae, unet, text_encoder, tokenizer, alphas_cumprod, prediction=prediction, image_size=image_size
    )


def _read_vae(loader: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A VAE; one that says `force_upcast` stays in float32 where the rest is float16, in which it overflows."""
    config = read_json(folder / "config.json")
    latent_scale(folder / "config.json", config)
    upcast = dtype == torch.float16 and config.get("force_upcast", False)
    return read_part(loader, folder, torch.float32 if upcast else dtype)
