"""A function of tensors in, a compiled artefact out: `from counterlens.export import export_onnx, trace`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ExportError

if TYPE_CHECKING:
    from .onnx import export_onnx
    from .store import Store

__all__ = ["ExportError", "Store", "export_onnx"]

_HOMES = {"export_onnx": ".onnx", "Store": ".store"}


def __getattr__(name: str) -> Any:
    # onnx is an optional dependency, and torch takes seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
