"""Choosing a backend for an operation: what was asked for runs, or the error says why it cannot."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

BACKENDS = ("triton", "cpp", "reference")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LIBRARY = torch.library.Library("counterlens", "FRAGMENT")


class BackendError(ValueError):
    """A backend that was asked for cannot run; the message holds every reason."""


def missing_cpp() -> list[str]:
    """Why the compiled CPU module cannot be used at all; empty when it can."""
    try:
        from counterlens.kernels import _cpu  # noqa: F401
    except ImportError as error:
        return [f"the compiled module counterlens.kernels._cpu cannot be imported ({error})"]
    return []


@functools.cache
def cpu_module() -> Any:
    """The compiled CPU module: the twin with the longest vectors that the processor can run. All give the same bits."""
    from counterlens.kernels import _cpu

    return import_module(f"counterlens.kernels.{[*_cpu.twins(), '_cpu'][0]}")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1 before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_triton() -> list[str]:
    """Why Triton kernels cannot be used at all; empty when they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return [f"triton cannot be imported ({error})"]
    if not torch.cuda.is_available() and not interpreting():
        return ["there is no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"]
    return []


def environment_reasons(backend: str) -> list[str]:
    """Why `backend` cannot run here whatever the tensors; empty when it can."""
    return {"cpp": missing_cpp, "triton": missing_triton}.get(backend, list)()


def tensor_reasons(backend: str, name: str, tensor: Tensor, others: Sequence[Tensor | None] = ()) -> list[str]:
    """Why `backend` cannot run on `tensor`, called `name` in the message; empty when it can.

    `others` are the further inputs: none of the operations that call this has a backward of its own.
    """
    reasons = environment_reasons(backend)
    if backend == "cpp" and tensor.device.type != "cpu":
        reasons.append(f"{name} is on {tensor.device}, cpp needs the CPU")
    if backend == "triton":
        if not reasons and not tensor.is_cuda and not interpreting():
            reasons.append(f"{name} is on {tensor.device}, triton needs CUDA")
        if tensor.dtype == torch.float64:
            reasons.append(f"{name} is float64, triton takes float16, bfloat16 and float32")
    if backend != "reference" and any_requires_grad(tensor, *others):
        reasons.append(f"an input requires a gradient and {backend} has no backward (use torch.no_grad or reference)")
    return reasons


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would want to differentiate through any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def exporting() -> bool:
    """Whether a graph for another runtime is being traced (`torch.export` or `counterlens.export.trace`)."""
    # Dynamo cannot read the mode, and keeps custom operators.
    return torch.compiler.is_exporting() or (not torch.compiler.is_dynamo_compiling() and get_proxy_mode() is not None)


def choose_backend(
    operation: str,
    requested: str,
    tensor: Tensor,
    not_supported_reasons: Callable[[str], list[str]],
) -> str:
    """Name the backend that runs `operation` on `tensor`.

    `auto` reads COUNTERLENS_BACKEND; without it, triton is tried on CUDA tensors and cpp on CPU tensors, and reference
    runs where those cannot. A backend that was named, by argument or variable, runs or raises. While a graph is
    exported, `auto` is reference: the graph must hold operations that other runtimes know.

    Raises:
        BackendError: the named backend is unknown or cannot run here; the message holds its reasons.
    """
    if requested == "auto" and exporting():
        return "reference"
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


def define_op(
    schema: str,
    function: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Register a custom operation `counterlens::...` so that torch.compile can trace past it.

    `fake` makes outputs of the right shape and dtype without computing them; `backward` and `setup_context` are those
    of an autograd.Function.
    """
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"counterlens::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"counterlens::{name}", backward, setup_context=setup_context, lib=LIBRARY)


@functools.lru_cache(maxsize=64)
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A few numbers on a device, copied there once: a copy in every call would stall it, and cannot be captured."""
    with torch.inference_mode(False):
        return torch.tensor(values or (0.0,), dtype=torch.float32, device=device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def values_readable(tensor: Tensor) -> bool:
    """Whether a check may look at the values: not while a graph is traced or captured, or where there are none."""
    if torch.compiler.is_compiling() or exporting() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
