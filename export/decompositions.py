"""Backward operators, and forward ones that few runtimes know, as operations that every runtime knows.

`table` extends PyTorch's core ATen decompositions. Every entry computes what its operator computes, gradients of
weights included where autograd may ask for them; tests/export/test_decompositions.py holds each to autograd. Sums and
statistics of half-precision tensors are taken in float32. Each family has a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions

from counterlens.export import decompose_indexing, decompose_layers, decompose_pointwise, decompose_resampling
from counterlens.export.decomposing import OWN, decomposes

__all__ = [
    "CALLS",
    "OWN",
    "decompose_indexing",
    "decompose_layers",
    "decompose_pointwise",
    "decompose_resampling",
    "table",
]

aten = torch.ops.aten

# PyTorch's own decompositions leave some of its primitives behind

prims = torch.ops.prims
for _primitive, _operator in (
    (prims.mul.default, torch.mul),
    (prims.add.default, torch.add),
    (prims.sub.default, torch.sub),
    (prims.div.default, torch.div),
    (prims.neg.default, torch.neg),
    (prims.exp.default, torch.exp),
    (prims.tanh.default, torch.tanh),
    (prims.where.default, torch.where),
    (prims.convert_element_type.default, lambda x, dtype: x.to(dtype)),
):
    decomposes(_primitive)(_operator)


# Memory that is written later


@decomposes(aten.empty.memory_format)
def empty(size: Sequence[int], **options: Any) -> Tensor:
    return torch.full(tuple(size), 0.0, dtype=options.get("dtype"), device=options.get("device"))


@decomposes(aten.empty_permuted.default)
def empty_permuted(size: Sequence[int], physical_layout: Sequence[int], **options: Any) -> Tensor:
    return torch.full(tuple(size), 0.0, dtype=options.get("dtype"), device=options.get("device"))


@decomposes(aten.new_empty_strided.default, aten.empty_strided.default)
def empty_strided(*arguments: Any, **options: Any) -> Tensor:
    size = arguments[1] if isinstance(arguments[0], Tensor) else arguments[0]
    like = arguments[0] if isinstance(arguments[0], Tensor) else None
    dtype = options.get("dtype") or (like.dtype if like is not None else None)
    return torch.full(tuple(size), 0.0, dtype=dtype, device=options.get("device"))


# Functions that PyTorch takes apart, before they reach an operator, in a way that no graph can follow or that rounds


def one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    """Class indices [...] as [..., num_classes] zeros and ones. RuntimeError where the number is not given."""
    if num_classes < 1:
        raise RuntimeError("one_hot looks at the values for the number of classes: give num_classes")
    return (x.unsqueeze(-1) == torch.arange(num_classes, device=x.device)).long()


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """Sampling grids [N, H, W, 2] of affine maps [N, 2, 3]; PyTorch's own pullback writes into memory of its own."""
    if len(size) != 4:
        return F.affine_grid(theta, list(size), align_corners)
    ends = []
    for n in size[:1:-1]:
        steps = torch.arange(n, dtype=theta.dtype, device=theta.device)
        ends.append(steps * (2 / max(1, n - 1)) - 1 if align_corners else (2 * steps + 1) / n - 1)
    if align_corners:
        ends = [e if n > 1 else e + 1 for e, n in zip(ends, size[:1:-1], strict=True)]
    x, y = ends[0].expand(size[2], -1), ends[1][:, None].expand(-1, size[3])
    base = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3)  # [H * W, 3]
    return (base @ theta.transpose(1, 2)).reshape(-1, size[2], size[3], 2)


def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: None = None) -> Tensor:
    """PyTorch's own pullback writes into memory of its own."""
    return decompose_pointwise.cumprod(x, dim, dtype=dtype)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """PyTorch's own clamps the norms in place."""
    # Broadcast first: an axis of one that the other stretches has another norm.
    both = torch.broadcast_tensors(x1, x2)
    a, b = (x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp(min=eps) for x in both)
    return (a * b).sum(dim)


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    reduce: bool | None = None, reduction: str = "mean", pos_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """From log1p, so that the loss of a confident right answer does not vanish."""
    log_sigmoid = input.clamp(max=0) - torch.log1p(torch.exp(-input.abs()))
    loss = (1 - target) * input - (1 if pos_weight is None else (pos_weight - 1) * target + 1) * log_sigmoid
    loss = loss if weight is None else loss * weight
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


CALLS: dict[Any, Callable[..., Any]] = {
    F.one_hot: one_hot,
    F.affine_grid: affine_grid,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    F.cosine_similarity: cosine_similarity,
    torch.cumprod: cumprod,
    Tensor.cumprod: cumprod,
}


@cache
def table() -> dict[Any, Callable[..., Any]]:
    """PyTorch's core ATen decompositions with ours over them."""
    return {**core_aten_decompositions(), **OWN}
