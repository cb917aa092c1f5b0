"""What every decomposition needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

OWN: dict[Any, Callable[..., Any]] = {}


def decomposes(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function, with the operators' own arguments, as what they are made of."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            OWN[operator] = function
        return function

    return register


def wide(x: Tensor) -> Tensor:
    """In float32 if x is of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def derived(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """The pullback of `forward(*inputs, *others)` to the inputs, as operations of the graph that is being traced."""
    shapes = [(tuple(x.shape), x.dtype) for x in (grad, *inputs, *others)]

    def pull(cotangent: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        rest = values[len(inputs) :]
        out: tuple[Tensor, ...] = torch.func.vjp(lambda *v: forward(*v, *rest), *values[: len(inputs)])[1](cotangent)
        return out

    def trace() -> Callable[..., tuple[Tensor, ...]]:
        examples = [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]
        pure = torch.func.functionalize(pull, remove="mutations")
        return make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)

    # In a thread of its own: the modes and transforms that are active belong to a thread, and none may see this trace.
    with ThreadPoolExecutor(1) as alone:
        graph = alone.submit(trace).result()
    return graph(grad, *inputs, *others)
