"""Opening diffusion models from folders in diffusers' layout, or from the hub."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import CounterlensError, UsageError
from .fields import check_fields, check_side, latent_scale, read_noise_levels

if TYPE_CHECKING:
    from .dit import DiffusionTransformer
    from .latent import ClassConditionalLatentDiffusion
    from .ldm import ClassContextLatentDiffusion
    from .stable_diffusion import StableDiffusion

    OpenedDiffusion = (
        DiffusionTransformer | ClassContextLatentDiffusion | StableDiffusion | ClassConditionalLatentDiffusion
    )

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
# The parts of each kind of folder; the first part that is there and in no other kind tells which kind it is.
PARTS = {
    "dit": ("transformer", "vae", "scheduler"),
    "ldm": ("class_embedder", "vqvae", "unet", "scheduler"),
    "stable-diffusion": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
}
# What a class was called when weights that are still published were saved.
LEGACY = {"DiTTransformer2DModel": "Transformer2DModel"}
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
DOWNLOADED = ["*.json", "*.txt", "*.model", "*/diffusion_pytorch_model*.safetensors", "*model.safetensors"]
NOT_DOWNLOADED = ["*non_ema*", "*fp16*", "safety_checker/*"]


def find_folder(name: str | Path, what: str) -> Path:
    """A folder as it is, or the snapshot of a hub id (`owner/name`), downloaded if it is not in the cache.

    Args:
        name: path or id.
        what: for messages, `model` or `classifier`.

    Raises:
        UsageError: it is neither. CounterlensError: the hub does not answer and the cache does not hold it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise UsageError(f"{what}: {str(name)!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED))
    except (OSError, ValueError) as error:
        raise CounterlensError(
            f"{what}: {name!r} is no folder here, not in the local cache, and the hub cannot be asked "
            f"({type(error).__name__}). Where there is a network, run `hf download {name} --local-dir FOLDER "
            f"--include {shlex.join(DOWNLOADED)}`, bring FOLDER here and give its path"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that others wrote.

    Raises:
        CounterlensError: naming the file.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CounterlensError(f"{path}: missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CounterlensError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CounterlensError(f"{path}: expected a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a PyTorch checkpoint, which is read with `weights_only=True`.

    A checkpoint's tensors may lie under `state_dict`; entries that are no tensors are left out.

    Raises:
        CounterlensError: the file is missing or corrupt, or holds pickled code; the message names it.
    """
    if not path.is_file():
        raise CounterlensError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CounterlensError(f"{path}: not a safetensors file ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CounterlensError(
            f"{path}: refused: the pickle holds more than tensors ({named[1] if named else 'unknown objects'}), and "
            "unpickling it could run code; have its state_dict saved as safetensors by someone who trusts it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CounterlensError(f"{path}: cannot be read as a checkpoint ({error})") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise CounterlensError(f"{path}: expected a state dict, got {type(content).__name__}")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


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


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a part, safetensors before pickles."""
    for ending in ("safetensors", "bin"):
        found = [p for name in WEIGHTS for p in sorted(folder.glob(f"{name}*.{ending}")) if "non_ema" not in p.name]
        plain = [p for p in found if re.fullmatch(r"\w+(-\d+-of-\d+)?", p.stem)]
        if plain:
            return plain
    return []


def read_part(loader: Any, folder: Path, dtype: torch.dtype, ignore: str = r"$^") -> Any:
    """A module from its folder, every tensor accounted for, frozen and in eval mode.

    Args:
        loader: a class of diffusers or transformers.
        folder: with config.json and weights.
        dtype: of the weights once loaded.
        ignore: pattern of tensors that may be missing or left over.

    Raises:
        UsageError: a field asks for what is not done here. CounterlensError: a file is missing, corrupt or of another
            class, or tensors are missing, left over or of another shape.
    """
    config = read_json(folder / "config.json")
    written = config.get("_class_name", loader.__name__)
    if written not in (loader.__name__, LEGACY.get(loader.__name__)):
        raise CounterlensError(f"{folder / 'config.json'}: expected a {loader.__name__}, got a {written}")
    if "_class_name" in config:
        check_fields(folder / "config.json", config, loader)
    files = weight_files(folder)
    if not files:
        raise CounterlensError(f"{folder}: no weights ({', '.join(f'{n}.safetensors' for n in WEIGHTS[:2])})")
    pickled = files[0].suffix == ".bin"
    if pickled:
        for file in files:
            read_tensors(file)  # refuses code, by the file's name
    # Without accelerate, diffusers would say at length that it cannot save memory while loading.
    ours = {"torch_dtype": dtype, "low_cpu_mem_usage": False} if "_class_name" in config else {"dtype": dtype}
    try:
        module, info = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=not pickled, output_loading_info=True, **ours
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CounterlensError(f"{folder}: cannot be loaded as {loader.__name__} ({error})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(k for k in map(str, info.get(problem) or []) if not re.search(ignore, k)):
            raise CounterlensError(
                f"{files[0]}: {problem.replace('_', ' ')}: {', '.join(keys[:4])} ({len(keys)} in all)"
            )
    return module.eval().requires_grad_(False)


def check_dtype(name: str, device: torch.device) -> torch.dtype:
    """The data type of that name, if the device computes with it.

    Raises:
        UsageError: there is none of that name, or the device lacks it.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    dtype = DTYPES[name]
    probe = torch.ones(1, 2, 4, 4, device=device, dtype=dtype)
    try:
        nn.functional.group_norm(nn.functional.conv2d(probe, probe[:, :, :3, :3]), 1)
        nn.functional.scaled_dot_product_attention(probe, probe, probe)
    except RuntimeError as error:
        raise UsageError(f"dtype: {name} is not implemented on this {device.type} ({error}); use float32") from error
    return dtype


def open_diffusion(
    name: str | Path,
    *,
    dtype: str = "float32",
    image_size: int | None = None,
) -> OpenedDiffusion:
    """Open a Stable Diffusion, class-conditional LDM or DiT folder, a hub id, or a pack's generator.

    Args:
        name: a folder in diffusers' layout (`unet/`, `vae/`, ...), `owner/name`, `digits` or a pack's folder.
        dtype: of the weights: float32, float16 or bfloat16 (float64 for tests).
        image_size: side in pixels, for Stable Diffusion alone; the model's own without it.

    Raises:
        UsageError: the name or an option does not fit. CounterlensError: files are missing or corrupt.
    """
    if str(name) == "digits" or (Path(name) / "pack.json").is_file():
        from ..packs import Pack

        if image_size is not None:
            raise UsageError("image_size: a pack has one image size; only Stable Diffusion takes others")
        pack = Pack(str(name)).diffusion()
        for module in pack.modules():
            # not diffusers' own `to`, which warns of an empty list of modules
            nn.Module.to(module, check_dtype(dtype, torch.device("cpu")))
        return pack
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


def id2label_names(id2label: dict[str, str] | None) -> list[str] | None:
    """Label names in order of their index, from a config's id2label; None without one."""
    if not id2label:
        return None
    return [str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]
