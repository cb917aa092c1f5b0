# mypy: allow-untyped-defs, allow-incomplete-defs
"""Scores of perturbation curves as one Triton kernel. Follows reference.py; see README.md for the edge cases."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # logits a program holds at a time


@triton.jit
def curve_kernel(
    logits, targets, thresholds, probability, insertion, deletion,
    stride_n, stride_side, stride_k, stride_class,
    classes, K,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program n: softmax at the target for both curves of sample n, then both trapezoids."""
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + n)
    # Nobody may have looked: of a target that is no class the scores are NaN, and no memory of others is read.
    unknown = ((target < 0) | (target >= classes)).to(tl.int32)
    target = tl.where(unknown == 0, target, 0)
    k = tl.arange(0, K_PAD)
    alpha = thresholds + n * K
    here = tl.load(alpha + k, mask=k < K, other=0.0)
    after = tl.load(alpha + tl.minimum(k + 1, K - 1), mask=k < K, other=0.0)
    before = tl.load(alpha + tl.maximum(k - 1, 0), mask=k < K, other=0.0)
    span = tl.load(alpha + K - 1) - tl.load(alpha)
    # The trapezoid rule as weights: each value counts for half the way to its neighbours.
    first = tl.where(k == 0, 1.0, 0.0)
    weight = tl.where(span > 0, ((after - here) + (here - before)) / 2 / tl.where(span > 0, span, 1.0), first)
    weight = (first + weight) / 2
    logits += n * stride_n
    for side in range(2):
        rows = logits + k.to(tl.int64)[:, None] * stride_k
        logits += stride_side
        largest = tl.full([K_PAD, BLOCK], float("-inf"), tl.float32)
        nan = tl.zeros([K_PAD, BLOCK], tl.int32) + unknown
        for at in range(0, classes, BLOCK):
            i = (at + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
            valid = (k < K)[:, None] & (i < classes)
            x = tl.load(rows + i * stride_class, mask=valid, other=float("-inf")).to(tl.float32)
            largest = tl.maximum(largest, x)
            nan |= (x != x).to(tl.int32)
        top = tl.max(largest, 1)[:, None]  # [K_PAD, 1]
        total = tl.zeros([K_PAD, BLOCK], tl.float32)
        for at in range(0, classes, BLOCK):
            i = (at + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
            valid = (k < K)[:, None] & (i < classes)
            x = tl.load(rows + i * stride_class, mask=valid, other=float("-inf")).to(tl.float32)
            total += tl.where(valid, tl.exp(tl.where(x == top, 0.0, x - top)), 0.0)
        chosen = tl.load(rows + target * stride_class, mask=(k < K)[:, None], other=0.0).to(tl.float32)
        p = tl.exp(tl.where(chosen == top, 0.0, chosen - top)) / tl.sum(total, 1)[:, None]
        p = tl.where(tl.max(nan, 1)[:, None] > 0, float("nan"), p)
        tl.store(probability + (n * 2 + side) * K + k[:, None], p, mask=(k < K)[:, None])
        score = tl.sum(tl.sum(tl.where((k < K)[:, None], p * weight[:, None], 0.0), 1), 0)
        if side == 0:
            tl.store(insertion + n, score)
        else:
            tl.store(deletion + n, score)


def curve_scores(
    logits: Tensor,  # [N, 2, K, classes]
    targets: Tensor,  # [N] int64
    thresholds: Tensor,  # [N, K] float32, contiguous
) -> tuple[Tensor, Tensor, Tensor]:
    """See `counterlens.kernels.curve.curve_scores`, which checks the arguments."""
    n, _, k, classes = logits.shape
    k_pad = triton.next_power_of_2(k)
    block = min(triton.next_power_of_2(classes), max(1, TILE // k_pad))
    probability = torch.empty((n, 2, k), dtype=torch.float32, device=logits.device)
    insertion, deletion = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    curve_kernel[(n,)](
        logits, targets, thresholds, probability, insertion, deletion, *logits.stride(), classes, k,
        K_PAD=k_pad, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return probability, insertion, deletion
