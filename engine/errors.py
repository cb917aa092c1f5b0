"""Errors that a person can act on: one clear line, no traceback on the command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

MAX_SEED = 2**63 - 1  # what fits into a signed number of 64 bits: generators, Parquet and JSON readers take it


class CounterlensError(Exception):
    """Something failed (exit code 1)."""

    exit_code = 1


class UsageError(CounterlensError, ValueError):
    """Something was asked for that does not make sense (exit code 2)."""

    exit_code = 2


class NotFinite(CounterlensError, ArithmeticError):
    """A model or a method gave NaN or infinity.

    Attributes:
        what: gave it. samples: for which images of the call, from 0.
    """

    def __init__(self, what: str, samples: Sequence[int]) -> None:
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        super().__init__(f"{what}: NaN or infinity for image {shown}")
        self.what, self.samples = what, list(samples)


def install_hint(extra: str) -> str:
    """How to install what one of this package's extras holds; by the packages' names, for ours is on no index."""
    from importlib.metadata import requires

    marks = (f"extra == '{extra}'", f'extra == "{extra}"')
    lines = [line.split(";") for line in requires("counterlens") or ()]
    packages = [line[0].strip() for line in lines if len(line) > 1 and any(mark in line[1] for mark in marks)]
    return f"pip install {shlex.join(packages)} (or, where this project lies: pip install '.[{extra}]')"
