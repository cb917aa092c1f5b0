"""Models, guided sampling and the command line; `from counterlens.engine import Engine`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .lazy import find

# A sample must have the same bits in every slot. Without this, MKL's products can differ in the last bit by a row's
# place in the batch (an AMD EPYC, two threads). It is read at the first product, and costs no time.
os.environ.setdefault("MKL_CBWR", "AUTO")
# From 1.29 on onnxruntime writes a device id and events into the user's cache and sends them as soon as it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .config import Config
    from .core.result import Counterfactuals
    from .engine import Engine
    from .images.files import load_image

__all__ = ["Config", "Counterfactuals", "Engine", "load_image"]

_HOMES = {"Config": ".config", "Counterfactuals": ".core.result", "Engine": ".engine", "load_image": ".images.files"}


def __getattr__(name: str) -> Any:
    # Importing torch and diffusers takes seconds; `counterlens --help` must not.
    return find(__name__, _HOMES, name)
