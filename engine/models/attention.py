"""Which attention the UNet and the VAE use: PyTorch's own, or xformers' memory-efficient one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, install_hint
from .holding import Shared, switched

ATTENTIONS = ("sdpa", "xformers")


def not_supported_reasons(modules: Sequence[nn.Module]) -> list[str]:
    """Why xformers' attention cannot run these modules; empty when it can."""
    reasons = []
    if importlib.util.find_spec("xformers") is None:
        reasons.append(f"xformers is not installed; {install_hint('gpu')}")
    parameters = [p for m in modules for p in m.parameters()]
    if any(p.device.type != "cuda" for p in parameters):
        reasons.append(f"the models are on {parameters[0].device}, xformers needs CUDA")
    if any(p.dtype == torch.float64 for p in parameters):
        reasons.append("the weights are float64, xformers takes float16, bfloat16 and float32")
    return reasons or _operator_reasons(parameters[0])


def _operator_reasons(like: torch.Tensor) -> list[str]:
    """Why the xformers that is installed has no operator for tensors like this one; empty when it has."""
    import xformers.ops

    try:
        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.zeros(1, 64, 8, 40, device=like.device, dtype=like.dtype, requires_grad=True)
            xformers.ops.memory_efficient_attention(probe, probe, probe).sum().backward()
    except NotImplementedError as error:
        why = [f"xformers {xformers.__version__} has no operator here: {_one_line(str(error))}"]
        if (library := _unloaded_library()) is not None:
            why.append(library)
        return why
    return []


def _one_line(message: str) -> str:
    """All that xformers says of its operators: each with its reasons, in one line."""
    out = ""
    for line in filter(None, map(str.strip, message.splitlines())):
        operator = line.removesuffix(" is not supported because:")
        out += f"; {operator}: " if operator != line else line if out.endswith(": ") else f", {line}" if out else line
    return out


def _unloaded_library() -> str | None:
    """Why xformers' own operators are not there at all, which it says once, as a warning."""
    lib: Any = importlib.import_module("xformers._cpp_lib")
    cause = getattr(lib, "_cpp_library_load_exception", None)
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is None:
        return None
    hint = "; pip install nvidia-cuda-runtime-cu12 and put its lib folder on LD_LIBRARY_PATH"
    return f"its own library was not loaded ({_one_line(str(cause))}{hint if 'libcudart.so.12' in str(cause) else ''})"


@contextmanager
def memory_efficient_attention(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have diffusers' attention layers call xformers in this thread, and leave them as they were.

    Needs the `autograd` pullback: xformers' Function is a legacy one, which `torch.func` refuses.

    Raises:
        UsageError: there is no such layer, or one's attention has no xformers form.
    """
    from diffusers.models.attention_processor import Attention

    layers = [m for module in modules for m in module.modules() if isinstance(m, Attention)]
    if not layers:
        raise UsageError("attention: no layer of these models can call xformers (of a pack: diffusion(plain=False))")
    with _choosing(layers), switched(_xformers, True):
        yield


def _choose(layer: Any) -> Callable[[], None]:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    own, fast = layer.processor, XFormersAttnProcessor()
    if not isinstance(own, AttnProcessor | AttnProcessor2_0):
        raise UsageError(f"attention: {type(own).__name__} has no xformers form; use sdpa")

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = (fast if _xformers.get() else own)(*args, **kwargs)
        return out

    layer.processor = attend
    return partial(setattr, layer, "processor", own)


_choosing = Shared(_choose)
_xformers = ContextVar("xformers", default=False)  # another thread may run the same layers without
