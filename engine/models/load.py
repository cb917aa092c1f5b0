"""Opening diffusion models from folders in diffusers' layout, or from the hub."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from ..errors import CounterlensError, UsageError
from .backbone import Backbone
from .files import WEIGHTS, check_dtype, find_folder, missing_weights, read_json

VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model")  # each holds all of a tokenizer's
GROUP = "counterlens.backbones"  # of entry points: names as below, and `module:Class`
# Each family by what tells its folders: the class that model_index.json names, the one that the config of its denoiser
# or VAE names, or else a folder that there is. Later lines go before earlier ones.
BACKBONES: dict[str, str | type[Backbone]] = {
    "unet": "stable_diffusion:StableDiffusion",
    "UNet2DConditionModel": "stable_diffusion:StableDiffusion",
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "sdxl:StableDiffusionXL",
    "StableDiffusionXLImg2ImgPipeline": "sdxl:StableDiffusionXL",
    "UNet2DModel": "latent:ClassConditionalLatentDiffusion",
    "class_embedder": "ldm:ClassContextLatentDiffusion",
    "VQModel": "ldm:ClassContextLatentDiffusion",
    "ClassContextLatentDiffusion": "ldm:ClassContextLatentDiffusion",
    "transformer": "dit:DiffusionTransformer",
    "DiTTransformer2DModel": "dit:DiffusionTransformer",
    "DiTPipeline": "dit:DiffusionTransformer",
    "PixArtTransformer2DModel": "pixart:PixArt",
    "PixArtAlphaPipeline": "pixart:PixArt",
    "PixArtSigmaPipeline": "pixart:PixArt",
    "SD3Transformer2DModel": "sd3:StableDiffusion3",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "FluxTransformer2DModel": "flux:Flux",
    "FluxPipeline": "flux:Flux",
    "AutoencoderDC": "sana:Sana",
    "SanaTransformer2DModel": "sana:Sana",
    "SanaPipeline": "sana:Sana",
}


def register(name: str, backbone: type[Backbone]) -> None:
    """Add a family for this process; an installed package names its own in the entry points `counterlens.backbones`.

    Args:
        name: the class that its model_index.json, or the config of its denoiser or VAE, says (`_class_name`).
        backbone: the family's class.

    Raises:
        UsageError: the name is another family's, or this is none.
    """
    if not _is_family(backbone):
        raise UsageError(f"backbones: {name}: expected a subclass of Backbone, got {backbone!r:.80}")
    if BACKBONES.setdefault(name, backbone) is not backbone:
        raise UsageError(f"backbones: {name} is the name of {BACKBONES[name]}")


def find_backbone(folder: Path) -> type[Backbone] | None:
    """The family that a folder's model is of; None where nothing tells.

    Raises:
        CounterlensError: a config cannot be read, or an installed package's family cannot be imported or is none.
    """
    installed = {point.name: point for point in entry_points(group=GROUP)}
    index, parts = _class_of(folder / "model_index.json"), _classes(folder)
    unnamed = [part for part, name in parts.items() if name is None]
    for told in ([index], parts.values(), unnamed):
        name = next((n for n in reversed([*BACKBONES, *installed]) if n in told), None)
        if name in installed:
            said = f"{GROUP}: {name} = {installed[name].value}"
            try:
                family = installed[name].load()
            except (ImportError, AttributeError) as error:
                raise CounterlensError(f"{said}: cannot be imported ({error})") from error
            if not _is_family(family):
                raise CounterlensError(f"{said}: expected a subclass of Backbone, got {family!r:.80}")
            return family
        if name is not None:
            found = BACKBONES[name]
            return resolve_name(f"{__package__}.{found}") if isinstance(found, str) else found
    return None


def _is_family(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Backbone)


def _class_of(config: Path) -> str | None:
    return read_json(config).get("_class_name") if config.is_file() else None


def _classes(folder: Path) -> dict[str, str | None]:
    """The class that the config in each of a model's folders names."""
    return {path.name: _class_of(path / "config.json") for path in sorted(folder.iterdir()) if path.is_dir()}


def missing_files(folder: Path, backbone: type[Backbone]) -> list[str]:
    """Files that a model of this family needs and the folder lacks, relative to it."""
    out = []
    present = [part for part in backbone.optional if (folder / part).is_dir()]
    for part in (*backbone.networks, *backbone.others, *(backbone.optional if present else ()), "scheduler"):
        inside = folder / part
        if part == "scheduler":
            wanted, weights = "scheduler_config.json", False
        elif part.startswith("tokenizer"):
            wanted, weights = "tokenizer_config.json", False
            if not any((inside / name).is_file() for name in VOCABULARIES):
                out += [f"{part}/{n}" for n in ("vocab.json", "merges.txt") if not (inside / n).is_file()]
        else:
            wanted, weights = "config.json", True
        if not (inside / wanted).is_file():
            out.append(f"{part}/{wanted}")
        if weights:
            out += [f"{part}/{name}" for name in missing_weights(inside, WEIGHTS[part not in backbone.networks])]
    return out


def foreign(file: str) -> str:
    """What a file of weights beside or instead of a model's folders seems to be, and what to do."""
    if file.endswith(".gguf"):
        return (
            f"{file} holds quantised weights (GGUF), which are not read; take the model's folder in diffusers' layout"
        )
    if "lora" in file.lower() or file == "adapter_model.safetensors":
        return f"{file} looks like a LoRA, which only changes a model; fuse it into one and save that with diffusers"
    return f"{file} looks like an original checkpoint: see `counterlens convert`"


def open_diffusion(
    name: str | Path,
    *,
    dtype: str = "float32",
    image_size: int | None = None,
) -> Backbone:
    """Open a folder of a family in `BACKBONES` (Stable Diffusion, DiT, PixArt, FLUX.1, ...), or a hub id.

    Args:
        name: a folder in diffusers' layout (`unet/`, `vae/`, ...), or `owner/name`.
        dtype: of the weights: float32, float16 or bfloat16 (float64 for tests).
        image_size: side in pixels, for families of prompts alone; the model's own without it.

    Raises:
        UsageError: the name or an option does not fit. CounterlensError: files are missing or corrupt.
    """
    if (path := Path(name).expanduser()).is_file():
        raise UsageError(f"model: {path} is a file, expected a folder in diffusers' layout; {foreign(path.name)}")
    folder = find_folder(name, "model")
    backbone = find_backbone(folder)
    if backbone is None:
        single = sorted(p.name for p in folder.iterdir() if p.suffix in (".ckpt", ".safetensors", ".gguf"))
        hint = f"; {foreign(single[0])}" if single else ""
        if said := [f"{part}/ is a {name}" for part, name in _classes(folder).items() if name is not None]:
            raise UsageError(f"model: {folder}: no family that is known ({', '.join(said)}); see {GROUP}")
        raise UsageError(f"model: {folder} has none of unet/, transformer/ and class_embedder/{hint}")
    if missing := missing_files(folder, backbone):
        raise CounterlensError(
            f"model: {folder} is not complete, missing: {', '.join(missing)}. Get them where the others came from "
            f"(`hf download OWNER/NAME {' '.join(missing)} --local-dir {folder}`)"
        )
    if image_size is not None and not backbone.sized:
        raise UsageError(f"image_size: a {backbone.__name__} has one image size; models of prompts take others")
    return backbone.open(folder, check_dtype(dtype, torch.device("cpu")), image_size)
