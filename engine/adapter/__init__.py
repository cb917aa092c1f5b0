"""The former name of `counterlens.engine.saliency`, for scripts that still import from it."""

from __future__ import annotations

import sys
from importlib import import_module

for _name in ("evaluation", "explain", "lax", "methods", "recipes", "taps", "training"):
    sys.modules[f"{__name__}.{_name}"] = import_module(f"..saliency.{_name}", __name__)
sys.modules[f"{__name__}.quantities"] = import_module("..metrics.quantities", __name__)
