"""Choosing a backend for an operation: what was asked for runs, or the error says why it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

BACKENDS = ("triton", "cpp", "reference")


class BackendError(ValueError):
    """A backend that was asked for cannot run; the message holds every reason."""


def missing_cpp() -> list[str]:
    """Why the compiled CPU module cannot be used at all; empty when it can."""
    try:
        from counterlens.kernels import _cpu  # noqa: F401
    except ImportError as error:
        return [f"the compiled module counterlens.kernels._cpu cannot be imported ({error})"]
    return []


def choose_backend(
    operation: str,
    requested: str,
    tensor: Tensor,
    not_supported_reasons: Callable[[str], list[str]],
) -> str:
    """Name the backend that runs `operation` on `tensor`.

    `auto` reads COUNTERLENS_BACKEND; without it, triton is tried on CUDA tensors and cpp on CPU tensors, and reference
    runs where those cannot. A backend that was named, by argument or variable, runs or raises.

    Raises:
        BackendError: the named backend is unknown or cannot run here; the message holds its reasons.
    """
    if requested == "auto":
        requested = os.environ.get("COUNTERLENS_BACKEND", "auto")
    if requested == "auto":
        preferred = "triton" if tensor.is_cuda else "cpp"
        return "reference" if not_supported_reasons(preferred) else preferred
    if requested not in BACKENDS:
        raise BackendError(f"backend: expected auto, {', '.join(BACKENDS)}, got {requested!r}")
    if reasons := not_supported_reasons(requested):
        raise BackendError(f"{operation}: backend {requested!r} cannot run: {'; '.join(reasons)}")
    return requested
