"""What is installed here and what runs: the facts behind `counterlens info`."""

from __future__ import annotations

import platform
from typing import Any

import torch

from counterlens.export.versions import versions
from counterlens.kernels.registry import operations

from ..models.placing import choose_device
from ..packs import Pack
from ..runtime.registry import EAGER, find, names

PACKAGES = ("counterlens", "torch", "diffusers", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "xformers")


def describe(pack_name: str) -> dict[str, Any]:
    """Versions, device, the kernels' backends and the runtimes with every reason against them, and the pack."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    pack = Pack(pack_name)
    return {
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "device": device,
        "threads": torch.get_num_threads(),
        "operations": {op.name: {"backends": op.reasons, "auto": op.automatic, "why": op.why} for op in operations()},
        "runtimes": {EAGER: [], **{name: find(name).missing(choose_device("auto")) for name in names()}},
        "pack": {
            "name": pack.name,
            "folder": str(pack.folder),
            "classifiers": pack.classifier_names(),
            "settings": pack.manifest["settings"],
        },
    }
