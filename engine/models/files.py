"""Files of models: folders, hub snapshots, configs and weights, read without trusting them."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import CounterlensError, UsageError
from .fields import check_fields

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
# What a class was called when weights that are still published were saved.
LEGACY = {"DiTTransformer2DModel": "Transformer2DModel", "PixArtTransformer2DModel": "Transformer2DModel"}
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
DOWNLOADED = ["*.json", "*.txt", "*.model", "*/diffusion_pytorch_model*.safetensors", "*model.safetensors",
              "*/model-*-of-*.safetensors"]  # fmt: skip
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
        if type(error).__name__ == "GatedRepoError":
            raise CounterlensError(
                f"{what}: {name!r} is gated: accept its terms on https://huggingface.co/{name} and log in with "
                "`hf auth login`, or give the path of a folder that has it"
            ) from error
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


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a part, safetensors before pickles."""
    for ending in ("safetensors", "bin"):
        found = [p for name in WEIGHTS for p in sorted(folder.glob(f"{name}*.{ending}")) if "non_ema" not in p.name]
        plain = [p for p in found if re.fullmatch(r"\w+(-\d+-of-\d+)?", p.stem)]
        if plain:
            return plain
    return []


def missing_weights(folder: Path, name: str) -> list[str]:
    """Weight files of a part that are not there: those of its index, or `name`.safetensors where there is none.

    Raises:
        CounterlensError: the index cannot be read.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if re.fullmatch(r"\w+", index.name.removesuffix(".safetensors.index.json")):  # of no variant (.fp16)
            named = read_json(index).get("weight_map", {})
            return sorted(n for n in set(map(str, named.values())) if not (folder / n).is_file())
    return [] if weight_files(folder) else [f"{name}.safetensors"]


def read_part(loader: Any, folder: Path, dtype: torch.dtype, ignore: str = r"$^", taken: Collection[str] = ()) -> Any:
    """A module from its folder, every tensor accounted for, frozen and in eval mode.

    Args:
        loader: a class of diffusers or transformers.
        folder: with config.json and weights.
        dtype: of the weights once loaded.
        ignore: pattern of tensors that may be missing or left over.
        taken: fields of its config that the caller sees to, see `fields.check_fields`.

    Raises:
        UsageError: a field asks for what is not done here. CounterlensError: a file is missing, corrupt or of another
            class, or tensors are missing, left over or of another shape.
    """
    config = read_json(folder / "config.json")
    written = config.get("_class_name", loader.__name__)
    if written not in (loader.__name__, LEGACY.get(loader.__name__)):
        raise CounterlensError(f"{folder / 'config.json'}: expected a {loader.__name__}, got a {written}")
    if "_class_name" in config:
        check_fields(folder / "config.json", config, loader, taken)
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
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, ArithmeticError) as error:
        said = " ".join(str(error).split())
        raise CounterlensError(f"{folder}: cannot be loaded as {loader.__name__} ({said})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(k for k in map(str, info.get(problem) or []) if not re.search(ignore, k)):
            raise CounterlensError(
                f"{files[0]}: {problem.replace('_', ' ')}: {', '.join(keys[:4])} ({len(keys)} in all)"
            )
    if "_class_name" in config and dtype_of(module) != dtype and not getattr(module, "_keep_in_fp32_modules", None):
        nn.Module.to(module, dtype)  # of some classes (SD3Transformer2DModel) diffusers takes the file's dtype instead
    return module.eval().requires_grad_(False)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The data type of a module's parameters."""
    return next(module.parameters()).dtype


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


def id2label_names(id2label: dict[str, str] | None) -> list[str] | None:
    """Label names in order of their index, from a config's id2label; None without one."""
    if not id2label:
        return None
    return [str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]


def pipeline_of(folder: Path) -> dict[str, Any]:
    """What model_index.json says, if there is one."""
    path = folder / "model_index.json"
    return read_json(path) if path.is_file() else {}
