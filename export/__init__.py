"""A function of tensors in, a compiled artefact out: `from counterlens.export import export_onnx, trace`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from counterlens.export.errors import ExportError

if TYPE_CHECKING:
    from counterlens.export.onnx import export_onnx
    from counterlens.export.store import Store
    from counterlens.export.tracing import trace

__all__ = ["ExportError", "Store", "export_onnx", "trace"]

# From 1.29 on onnxruntime writes a device id and events into the user's cache and sends them as soon as it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# No module may have the name of one of these: importing it would put it in the function's place.
_HOMES = {"export_onnx": ".onnx", "Store": ".store", "trace": ".tracing"}


def __getattr__(name: str) -> Any:
    # onnx is an optional dependency, and torch takes seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
