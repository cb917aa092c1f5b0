"""What made a result: models, settings and seed, and the machine and versions that they ran on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from counterlens.export.store import module_digest, tensors_digest, weights_digest
from counterlens.export.versions import installed

from .models.protocols import Classifier, Diffusion

PACKAGES = (
    "counterlens", "torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "triton",
    "numpy", "pillow", "pyarrow",
)  # fmt: skip


@cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


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


@runtime_checkable
class HasDict(Protocol):
    """A config of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """All fields."""


def models_numbers(diffusion: Diffusion, classifier: Classifier) -> dict[str, Any]:
    """What decides results beside weights: noise levels, prompts, classes, ... of the diffusion model, and configs."""
    held = {k: v for k, v in vars(diffusion).items() if not k.startswith("_")}
    numbers = {k: v for k, v in held.items() if isinstance(v, str | int | float | bool)}
    numbers |= {k: tensors_digest(v)[:16] for k, v in held.items() if isinstance(v, torch.Tensor)}
    numbers |= {k: digest(v) for k, v in held.items() if isinstance(v, list | tuple | dict) and k != "labels"}
    configs = [getattr(m, "config", None) for m in (*diffusion.modules(), classifier.module)]
    said: list[dict[str, Any] | None] = [
        dict(c) if isinstance(c, Mapping) else c.to_dict() if isinstance(c, HasDict) else None for c in configs
    ]
    # Names of folders and the versions that saved a model decide nothing.
    said = [c and {k: v for k, v in c.items() if not k.startswith("_") and "version" not in k} for c in said]
    return {"diffusion_model": numbers, "configs": [c and digest(c) for c in said]}


def digest(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class WeightHashes:
    """Hashes of modules' weights, each made again only when one of its tensors is another or was written to.

    One for each engine: what is written into a tensor's `.data` is not seen, but by the next engine.
    """

    def __init__(self) -> None:
        self._known: dict[nn.Module, tuple[list[Any], str]] = {}

    def __call__(self, module: nn.Module) -> str:
        tensors = (*module.parameters(), *module.buffers())
        state = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        known = self._known.get(module)
        if known is None or known[0] != state:
            known = self._known[module] = state, module_digest(module)
        return known[1]


def models_digest(
    modules: Sequence[nn.Module], labels: Sequence[str], of: Callable[[nn.Module], str] = module_digest
) -> str:
    """A short hash of weights, structure and labels."""
    shapes = hashlib.sha256("".join(map(str, modules)).encode()).hexdigest()
    return digest([weights_digest(modules, of), shapes, list(labels)])
