"""What a denoiser is conditioned on: one tensor, or several (a context, its mask, a pooled text), each batch first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Condition = Tensor | tuple[Tensor, ...]
CONDITION = "condition"


def tensors(condition: Condition) -> tuple[Tensor, ...]:
    """Its tensors, [B, ...] each."""
    return condition if isinstance(condition, tuple) else (condition,)


def grouped(given: Sequence[Tensor]) -> Condition:
    """The inverse of `tensors`: one alone is no tuple."""
    return tuple(given) if len(given) > 1 else given[0]


def each(function: Callable[[Tensor], Tensor], condition: Condition) -> Condition:
    """The function of each tensor: one that indexes, moves or repeats them."""
    return tuple(map(function, condition)) if isinstance(condition, tuple) else function(condition)


def cat(*conditions: Condition) -> Condition:
    """Batches of conditions behind one another."""
    parts = zip(*map(tensors, conditions), strict=True)
    return grouped([torch.cat(part) for part in parts])


def floats_to(condition: Condition, dtype: torch.dtype) -> Condition:
    """Floating tensors in this dtype; class indices and masks of integers as they are."""
    return each(lambda x: x.to(dtype) if x.is_floating_point() else x, condition)


def named(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Names of a graph's values with `condition` said once for each of its tensors: condition, condition_2, ..."""
    own = [CONDITION, *(f"{CONDITION}_{i}" for i in range(2, count + 1))]
    return tuple(name for n in names for name in (own if n == CONDITION else [n]))
