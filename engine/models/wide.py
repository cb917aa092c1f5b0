"""float64 where diffusers' modules compute in float32 whatever their weights: norms, rotations, linear attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .files import dtype_of


class WideFloats(TorchFunctionMode):
    """While it is active, float64 tensors that are asked for as float32 stay as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.Tensor.float, torch.Tensor.to) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            given = {key: torch.float64 if value is torch.float32 else value for key, value in given.items()}
        return func(*args, **given)


def exact(module: nn.Module) -> AbstractContextManager[Any]:
    """Float64 throughout where a module's weights are float64; nothing else changes."""
    return WideFloats() if dtype_of(module) == torch.float64 else nullcontext()
