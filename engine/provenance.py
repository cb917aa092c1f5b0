"""What made a result: models, settings and seed, and the machine and versions that they ran on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn

from counterlens.export.store import tensors_digest, weights_digest

from .packs import Pack

if TYPE_CHECKING:
    from .config import Config
    from .engine import Engine

PACKAGES = (
    "counterlens", "torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "triton",
    "numpy", "pillow", "pyarrow",
)  # fmt: skip


@cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def session(device: torch.device | None = None) -> dict[str, Any]:
    """When, where and with what this process runs: what may differ between two sessions of one run."""
    there = device or torch.device("cpu")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(there) if there.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),  # instructions of the kernels: sums differ in the last bit
        "versions": versions(),
    }


def engine_facts(engine: Engine, config: Config, batch: int = 1) -> dict[str, Any]:
    """What makes this engine's results with a config, and the session; `runtime` is what runs a batch of this size."""
    return {
        "classifier": type(engine.classifier.module).__name__,
        **engine.names,
        "mode": config.mode_name,
        "preset": config.preset,
        "speed": config.speed,
        "match_official": config.match_official,
        "settings": engine.settings(config).model_dump(),
        "seed": config.seed,
        "weights": engine_digest(engine),
        **engine_numbers(engine),
        "image_size": engine.image_size,
        "dtype": str(next(p for m in engine.diffusion.modules() for p in m.parameters()).dtype).removeprefix("torch."),
        "slots": engine.slots[-1],
        "neighbours": digest(engine.neighbours) if engine.neighbours else None,
        "attention": engine.attention,
        "checkpointing": engine.checkpointing,
        "kernels": engine.backend,
        "runtime_option": engine.runtime,
        "runtime": engine.runtime_choice(batch, config).runtime,
        **session(engine.device),
    }


@runtime_checkable
class HasDict(Protocol):
    """A config of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """All fields."""


def engine_numbers(engine: Engine) -> dict[str, Any]:
    """What decides results beside weights: noise levels, prompts, classes, ... of the diffusion model, and configs."""
    diffusion = engine.diffusion
    held = {k: v for k, v in vars(diffusion).items() if not k.startswith("_")}
    numbers = {k: v for k, v in held.items() if isinstance(v, str | int | float | bool)}
    numbers |= {k: tensors_digest(v)[:16] for k, v in held.items() if isinstance(v, torch.Tensor)}
    numbers |= {k: digest(v) for k, v in held.items() if isinstance(v, list | tuple | dict) and k != "labels"}
    configs = [getattr(m, "config", None) for m in (*diffusion.modules(), engine.classifier.module)]
    said: list[dict[str, Any] | None] = [
        dict(c) if isinstance(c, Mapping) else c.to_dict() if isinstance(c, HasDict) else None for c in configs
    ]
    # Names of folders and the versions that saved a model decide nothing.
    said = [c and {k: v for k, v in c.items() if not k.startswith("_") and "version" not in k} for c in said]
    return {"diffusion_model": numbers, "configs": [c and digest(c) for c in said]}


def pack_facts(name: str) -> dict[str, Any]:
    """A pack by name and contents, and the session."""
    pack = Pack(name)
    return {"pack": pack.name, "pack_hash": digest(pack.manifest["files"]), **session()}


def digest(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def models_digest(modules: Sequence[nn.Module], labels: Sequence[str]) -> str:
    """A short hash of weights, structure and labels."""
    shapes = hashlib.sha256("".join(map(str, modules)).encode()).hexdigest()
    return digest([weights_digest(modules), shapes, list(labels)])


def engine_digest(engine: Engine) -> str:
    """`models_digest` of an engine's models, made again only when one of their tensors is another or was written to."""
    modules = [*engine.diffusion.modules(), engine.classifier.module]
    if engine.guidance_decoder is not None:
        modules.append(engine.guidance_decoder.module)
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    state = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    if engine.digest is None or engine.digest[0] != state:
        engine.digest = (state, models_digest(modules, engine.labels))
    return engine.digest[1]
