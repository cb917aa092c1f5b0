"""Names of a package whose modules are imported when they are asked for: torch and diffusers take seconds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def find(package: str, homes: Mapping[str, str], name: str) -> Any:
    """What a package's `__getattr__` answers for a name, given the relative module that each of its names is in.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(homes[name], package), name)
