"""A function of tensors in, a compiled artefact out: `from counterlens.export import export_onnx, trace`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from counterlens.export.errors import ExportError

if TYPE_CHECKING:
    from counterlens.export.onnx import export_onnx
    from counterlens.export.store import Store

__all__ = ["ExportError", "Store", "export_onnx"]

# From 1.29 on onnxruntime writes a device id and events into the user's cache and sends them as soon as it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {"export_onnx": ".onnx", "Store": ".store"}


def __getattr__(name: str) -> Any:
    # onnx is an optional dependency, and torch takes seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
