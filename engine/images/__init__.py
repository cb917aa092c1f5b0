"""Images: files in and out, the sources that commands read, and drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lazy import find

if TYPE_CHECKING:
    from .files import load_image, save_png

_HOMES = {"load_image": ".files", "save_png": ".files"}

__all__ = ["load_image", "save_png"]


def __getattr__(name: str) -> Any:
    # `counterlens --help` reads modules of this folder, and must not wait for torch.
    return find(__name__, _HOMES, name)
