"""What is installed here and what runs: the facts behind `counterlens info`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from counterlens.kernels.registry import operations

from ..packs import Pack

PACKAGES = ("counterlens", "torch", "diffusers", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "xformers")


def describe(pack_name: str) -> dict[str, Any]:
    """Versions, device, the kernels' backends with every reason against them, and the pack."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    pack = Pack(pack_name)
    return {
        "versions": versions,
        "device": device,
        "threads": torch.get_num_threads(),
        "operations": {op.name: {"backends": op.reasons, "auto": op.automatic, "why": op.why} for op in operations()},
        "pack": {
            "name": pack.name,
            "folder": str(pack.folder),
            "classifiers": pack.classifier_names(),
            "settings": pack.manifest["settings"],
        },
    }
