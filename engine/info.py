"""What is installed here and what runs: the facts behind `counterlens info`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from counterlens.kernels.consensus import not_supported_reasons
from counterlens.kernels.dispatch import BACKENDS, choose_backend

from .packs import Pack

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
    probe = torch.zeros(1, 4, 8, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    operations = {"consensus_filter": {b: not_supported_reasons(b, probe) for b in BACKENDS}}
    auto = {
        "consensus_filter": choose_backend("consensus_filter", "auto", probe, lambda b: not_supported_reasons(b, probe))
    }
    pack = Pack(pack_name)
    return {
        "versions": versions,
        "device": device,
        "threads": torch.get_num_threads(),
        "operations": operations,
        "auto": auto,
        "pack": {
            "name": pack.name,
            "folder": str(pack.folder),
            "classifiers": pack.classifier_names(),
            "settings": pack.manifest["settings"],
        },
    }
