# mypy: allow-untyped-defs, allow-incomplete-defs
"""The consensus filter as Triton kernels. Follows reference.py; see README.md for the edge cases."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ZERO = tl.constexpr(0)
GLOBAL = tl.constexpr(2)
OFF = tl.constexpr(3)
MODE_CODES = {"zero": 0, "project": 1, "global": 2, "off": 3}

NOTHING = tl.constexpr(8 * torch.finfo(torch.float32).eps)  # below this share of its norm, a vector is rounding error


@triton.jit
def or_one(x):
    """x, or 1 where it is 0."""
    return tl.where(x == 0, 1.0, x)


@triton.jit
def outside(cos, cos_limit):
    """Whether the angle exceeds the limit. False for NaN, true for exactly antiparallel vectors at any limit."""
    return (cos < cos_limit) | (cos <= -1.0)


@triton.jit
def cosine(ss, rr, sr):
    """Cosine from the products of scaled vectors; both roundings are exact, as antiparallel needs them to be."""
    return tl.div_rn(sr, tl.sqrt_rn(ss * rr))


@triton.jit
def total(x, WHOLE: tl.constexpr):
    """The sum of every column [1, P], or of the whole tile."""
    if WHOLE:
        return tl.sum(tl.sum(x, 1), 0)
    else:
        return tl.sum(x, 0, keep_dims=True)


@triton.jit
def over_largest(x, WHOLE: tl.constexpr):
    """x over its largest magnitude in every column [1, P], or in the whole tile; and that magnitude."""
    largest = or_one(tl.max(tl.max(tl.abs(x), 1), 0)) if WHOLE else or_one(tl.max(tl.abs(x), 0, keep_dims=True))
    return tl.div_rn(x, largest), largest


@triton.jit
def filter_tile(
    s,  # [D, P] float32: a column per chunk, rows beyond the chunk's size hold 0; in mode global a whole sample
    r,  # [D, P]
    cos_limit,
    tan_limit,
    MODE: tl.constexpr,
):
    """Filtered [D, P], in mode global at unit norm; and which chunks were kept: [1, P], there one answer for all."""
    WHOLE: tl.constexpr = MODE == GLOBAL
    s_scaled, s_largest = over_largest(s, WHOLE)
    r_scaled, _ = over_largest(r, WHOLE)
    ss, rr = total(s_scaled * s_scaled, WHOLE), total(r_scaled * r_scaled, WHOLE)
    sr = total(s_scaled * r_scaled, WHOLE)
    drop = outside(cosine(ss, rr, sr), cos_limit)
    if MODE == OFF:
        drop = drop & False
        filtered = s
    elif MODE == ZERO:
        filtered = tl.where(drop, 0.0, s)
    else:
        s_norm = tl.sqrt_rn(ss)
        if WHOLE:
            s_norm = or_one(s_norm)
        s_hat = s_scaled / s_norm
        along = sr / s_norm if WHOLE else total(r_scaled * s_hat, WHOLE)
        n = r_scaled - along * s_hat
        n_norm = tl.sqrt_rn(total(n * n, WHOLE))
        turn = drop & (n_norm > tl.sqrt_rn(rr) * NOTHING)
        if WHOLE:
            filtered = tl.where(turn, s_hat + tan_limit * n / n_norm, s_hat)
        else:
            filtered = tl.where(turn, (s_scaled + s_norm * tan_limit * n / n_norm) * s_largest, s)
    return filtered, drop == 0


@triton.jit
def chunk_places(
    first,
    rows,
    columns,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Where the components of the chunks from `first` on lie: channel, y, x, chunk index, which of them exist."""
    k = tl.arange(0, D_PAD)[:, None]  # [D_PAD, 1]
    chunk = (first + tl.arange(0, BLOCK))[None, :]  # [1, BLOCK]
    y = chunk // columns * CHUNK + k // CHUNK % CHUNK
    x = chunk % columns * CHUNK + k % CHUNK
    channel = k // (CHUNK * CHUNK)
    return channel.to(tl.int64), y.to(tl.int64), x.to(tl.int64), chunk, (k < D) & (chunk < rows * columns)


@triton.jit
def filter_kernel(
    score, reference, cos_limit, tan_limit, filtered, kept,
    score_b, score_c, score_h, score_w,
    reference_b, reference_c, reference_h, reference_w,
    channels, rows, columns,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Modes zero, project and off. Program (b, i) filters the BLOCK chunks from i * BLOCK on of sample b."""
    b = tl.program_id(0).to(tl.int64)
    channel, y, x, chunk, valid = chunk_places(tl.program_id(1) * BLOCK, rows, columns, D, D_PAD, BLOCK, CHUNK)
    at = b * score_b + channel * score_c + y * score_h + x * score_w
    s = tl.load(score + at, mask=valid, other=0.0).to(tl.float32)
    at = b * reference_b + channel * reference_c + y * reference_h + x * reference_w
    r = tl.load(reference + at, mask=valid, other=0.0).to(tl.float32)
    result, keep = filter_tile(s, r, tl.load(cos_limit + b), tl.load(tan_limit + b), MODE)
    at = ((b * channels + channel) * (rows * CHUNK) + y) * (columns * CHUNK) + x
    tl.store(filtered + at, result.to(filtered.dtype.element_ty), mask=valid)
    tl.store(kept + b * rows * columns + chunk, keep.to(tl.int8), mask=chunk < rows * columns)


@triton.jit
def load_numbers(sample, stride_c, stride_h, stride_w, height, width, i, n):
    """The i-th numbers of a sample as float32, 0 from n on."""
    c, y, x = (i // (height * width)).to(tl.int64), (i // width % height).to(tl.int64), (i % width).to(tl.int64)
    return tl.load(sample + c * stride_c + y * stride_h + x * stride_w, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def global_kernel(
    score, reference, cos_limit, tan_limit, filtered, kept,
    score_b, score_c, score_h, score_w,
    reference_b, reference_c, reference_h, reference_w,
    height, width, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mode global. Program b reads sample b four times: magnitudes, products, the orthogonal part, the result."""
    b = tl.program_id(0).to(tl.int64)
    score += b * score_b
    reference += b * reference_b
    s_largest = tl.zeros([BLOCK], tl.float32)
    r_largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = load_numbers(score, score_c, score_h, score_w, height, width, i, n)
        r = load_numbers(reference, reference_c, reference_h, reference_w, height, width, i, n)
        s_largest = tl.maximum(s_largest, tl.abs(s))
        r_largest = tl.maximum(r_largest, tl.abs(r))
    s_max, r_max = or_one(tl.max(s_largest, 0)), or_one(tl.max(r_largest, 0))

    ss = tl.zeros([BLOCK], tl.float32)
    rr = tl.zeros([BLOCK], tl.float32)
    sr = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = load_numbers(score, score_c, score_h, score_w, height, width, i, n)
        r = load_numbers(reference, reference_c, reference_h, reference_w, height, width, i, n)
        s, r = tl.div_rn(s, s_max), tl.div_rn(r, r_max)
        ss += s * s
        rr += r * r
        sr += s * r
    s_square, r_square, product = tl.sum(ss, 0), tl.sum(rr, 0), tl.sum(sr, 0)
    drop = outside(cosine(s_square, r_square, product), tl.load(cos_limit + b))
    s_norm = or_one(tl.sqrt_rn(s_square))
    along = product / s_norm

    nn = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = load_numbers(score, score_c, score_h, score_w, height, width, i, n)
        r = load_numbers(reference, reference_c, reference_h, reference_w, height, width, i, n)
        orthogonal = tl.div_rn(r, r_max) - along * (tl.div_rn(s, s_max) / s_norm)
        nn += orthogonal * orthogonal
    n_norm = tl.sqrt_rn(tl.sum(nn, 0))
    turn = drop & (n_norm > tl.sqrt_rn(r_square) * NOTHING)
    tan = tl.load(tan_limit + b)

    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = load_numbers(score, score_c, score_h, score_w, height, width, i, n)
        r = load_numbers(reference, reference_c, reference_h, reference_w, height, width, i, n)
        s_hat = tl.div_rn(s, s_max) / s_norm
        orthogonal = tl.div_rn(r, r_max) - along * s_hat
        result = tl.where(turn, s_hat + tan * orthogonal / n_norm, s_hat)
        tl.store(filtered + b * n + i, result.to(filtered.dtype.element_ty), mask=i < n)
    tl.store(kept + b, (drop == 0).to(tl.int8))


def consensus_filter(
    score: Tensor,  # [B, C, H, W] float16, bfloat16 or float32
    reference: Tensor,  # [B, C, H, W]
    cos_limit: Tensor,  # [B] float32
    tan_limit: Tensor,  # [B] float32
    mode: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """See `counterlens.kernels.consensus.consensus_filter`, which checks the arguments."""
    b, c, h, w = score.shape
    filtered = torch.empty((b, c, h, w), dtype=score.dtype, device=score.device)
    rows, columns = h // chunk, w // chunk
    strides = (*score.stride(), *reference.stride())
    if mode == "global":
        within = torch.empty(b, dtype=torch.int8, device=score.device)
        global_kernel[(b,)](
            score, reference, cos_limit, tan_limit, filtered, within, *strides, h, w, c * h * w,
            BLOCK=1024, num_warps=8,
        )  # fmt: skip
        return filtered, within.bool()[:, None, None].expand(b, rows, columns).contiguous()
    kept = torch.empty((b, rows, columns), dtype=torch.bool, device=score.device)
    d = c * chunk * chunk
    d_pad = triton.next_power_of_2(d)
    block = max(1, min(triton.next_power_of_2(rows * columns), 2048 // d_pad))
    filter_kernel[(b, triton.cdiv(rows * columns, block))](
        score, reference, cos_limit, tan_limit, filtered, kept.view(torch.int8), *strides, c, rows, columns,
        D=d, D_PAD=d_pad, BLOCK=block, CHUNK=chunk, MODE=MODE_CODES[mode], num_warps=4,
    )  # fmt: skip
    return filtered, kept
