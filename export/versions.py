"""Versions of the packages that made something or that it runs with, and of ONNX's operators."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

NONE = "not installed"
OPSET = 18  # of the ONNX files that are written


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package, by its name as it is installed; `not installed` where there is none."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = NONE
    return found


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are there."""
    return {package: found for package, found in versions(packages).items() if found != NONE}
