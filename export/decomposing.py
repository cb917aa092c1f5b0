"""What every decomposition needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OWN: dict[Any, Callable[..., Any]] = {}


def decomposes(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            OWN[operator] = function
        return function

    return register


def wide(x: Tensor) -> Tensor:
    """In float32 if x is of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def pair_of(v: Sequence[int] | int) -> tuple[int, int]:
    values = (v,) if isinstance(v, int) else tuple(v)
    return (values[0], values[-1]) if values else (0, 0)
