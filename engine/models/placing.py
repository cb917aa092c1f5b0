"""Which device the models run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from ..errors import UsageError
from .holding import Shared
from .protocols import Diffusion


def choose_device(name: str | torch.device) -> torch.device:
    """A device by its name; `auto` is the first CUDA device, and the CPU where there is none.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        built = "sees no device" if torch.version.cuda else "is built without CUDA"
        raise UsageError(f"device: {name} is not here: this PyTorch ({torch.__version__}) {built}; use cpu")
    if (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UsageError(f"device: {name} is not here: there are {torch.cuda.device_count()}, the first is cuda:0")
    return device


def place(diffusion: Diffusion, device: torch.device) -> None:
    """Move a diffusion model, its noise levels and its null condition, in place."""
    for module in diffusion.modules():
        module.to(device)
    # A step recorded or compiled on the device must find them there.
    diffusion.alphas_cumprod = diffusion.alphas_cumprod.to(device)
    if (times := getattr(diffusion, "times", None)) is not None:
        diffusion.times = times.to(device)  # type: ignore[attr-defined]
    diffusion.null_condition(1)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Make a device the current one, where kernels are launched and recorded, and compute in `full_precision`."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, full_precision():
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions of float32 in float32 on every device: cuDNN rounds them to TF32 by default, with 10 bits."""
    with _exact([torch.backends.cudnn]):
        yield


def _without_tf32(cudnn: Any) -> Callable[[], None]:  # its parts have no types
    if cudnn.conv.fp32_precision != "tf32":
        return lambda: None
    if cudnn.rnn.fp32_precision == "tf32":  # as it is from the start; the older switch keeps its readers working
        cudnn.allow_tf32 = False
        return partial(setattr, cudnn, "allow_tf32", True)
    cudnn.conv.fp32_precision = "ieee"
    return partial(setattr, cudnn.conv, "fp32_precision", "tf32")


_exact = Shared(_without_tf32)  # the switches are the process's
