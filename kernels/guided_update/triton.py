# mypy: allow-untyped-defs, allow-incomplete-defs
"""One guided denoising step as Triton kernels. Follows reference.py; see README.md for the edge cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterlens.kernels.consensus.triton import (
    MODE_CODES,
    chunk_places,
    consensus_filter,
    filter_tile,
    or_one,
)

ONE_LAUNCH = 4096  # elements of a sample, padded to powers of two, that one program holds in registers without a spill
BLOCK_ELEMENTS = 2048  # elements that a program of the two-phase version handles
PARTIALS = tl.constexpr(8)  # per block: largest and scaled square of class, image and direction; chunks kept; unused


@triton.jit
def scalar(value, b, IS_TENSOR: tl.constexpr):
    """A sample's value of a number or of a tensor [B]."""
    if IS_TENSOR:
        return tl.load(value + b).to(tl.float32)
    else:
        return value


@triton.jit
def load_tile(x, stride_b, stride_c, stride_h, stride_w, b, channel, y, x_at, valid):
    """One latent's tile in float32, 0 where there is none. Indices are 64-bit: strides may pass 2^31 elements."""
    at = b * stride_b + channel * stride_c + y * stride_h + x_at * stride_w
    return tl.load(x + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def scaled_square(x):
    """Largest magnitude of a tile and the squared norm of the tile over it (0 for a zero tile)."""
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    unit = x / or_one(largest)
    return largest, tl.sum(tl.sum(unit * unit, 1), 0)


@triton.jit
def unit_vector(x, largest, square):
    """x at norm 1, given its `scaled_square`; a zero vector stays zero."""
    return x / or_one(largest) / or_one(tl.sqrt_rn(square))


@triton.jit
def power_of_two(largest):
    """The power of two that brings a magnitude to about 2^32, exactly; NaN for inf, and 2^127 at most."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    scale = (tl.minimum(286 - exponent, 254) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, float("nan"), scale)


@triton.jit
def split_four(x):
    """Four numbers from [2, 2], as two joins put them there."""
    first, second = tl.split(x)
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d


@triton.jit
def whole_norms(direction, score, distance, kept):
    """Of three whole samples [D, P] a power of two and the norm at that scale, and how many of `kept` [1, P] are 1.

    All programs of a launch wait for each reduction over the tile: there are two, one for every maximum, one for every
    sum.
    """
    most = tl.join(
        tl.join(tl.max(tl.abs(direction), 0), tl.max(tl.abs(score), 0)),
        tl.join(tl.max(tl.abs(distance), 0), tl.max(tl.abs(distance), 0)),
    )
    like_most, class_most, image_most, _ = split_four(tl.max(most, 0))
    like, towards, image = power_of_two(like_most), power_of_two(class_most), power_of_two(image_most)
    direction, score, distance = direction * like, score * towards, distance * image
    squares = tl.join(
        tl.join(tl.sum(direction * direction, 0), tl.sum(score * score, 0)),
        tl.join(tl.sum(distance * distance, 0), tl.sum(kept, 0)),
    )
    like_square, class_square, image_square, count = split_four(tl.sum(squares, 0))
    return (
        like, tl.sqrt_rn(like_square), towards, or_one(tl.sqrt_rn(class_square)), image,
        or_one(tl.sqrt_rn(image_square)), count,
    )  # fmt: skip


@triton.jit
def combine(largest, square, valid):
    """`scaled_square` of the whole from those of its blocks."""
    whole = tl.max(tl.where(valid, largest, 0.0), 0)
    share = largest / or_one(whole)
    return whole, tl.sum(tl.where(valid, square * share * share, 0.0), 0)


@triton.jit
def step(
    z, eps_uncond, towards_class, towards_image, length, alphas, alphas_prev, guidance, class_scale, distance_scale
):  # fmt: skip
    """DDIM with the combined noise: z_prev, z0. The two directions have norm 1 (or 0)."""
    eps = eps_uncond + guidance * (class_scale * (towards_class * length) + distance_scale * (towards_image * length))
    z0 = (z - tl.sqrt_rn(1.0 - alphas) * eps) / tl.sqrt_rn(alphas)
    return tl.sqrt_rn(alphas_prev) * z0 + tl.sqrt_rn(1.0 - alphas_prev) * eps, z0


@triton.jit
def one_launch_kernel(
    z, eps_uncond, eps_cond, grad_class, grad_distance, z_prev, z0, kept_fraction,
    alphas, alphas_prev, guidance, class_scale, distance_scale, cos_limit, tan_limit,
    z_b, z_c, z_h, z_w, u_b, u_c, u_h, u_w, c_b, c_c, c_h, c_w, g_b, g_c, g_h, g_w, d_b, d_c, d_h, d_w,
    channels, rows, columns,
    T_ALPHAS: tl.constexpr, T_PREV: tl.constexpr, T_GUIDANCE: tl.constexpr, T_CLASS: tl.constexpr,
    T_DISTANCE: tl.constexpr, T_COS: tl.constexpr, T_TAN: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Program b holds sample b whole."""
    b = tl.program_id(0).to(tl.int64)
    channel, y, x, chunk, valid = chunk_places(0, rows, columns, D, D_PAD, BLOCK, CHUNK)
    abar = scalar(alphas, b, T_ALPHAS)
    noise_level = tl.sqrt_rn(1.0 - abar)
    uncond = load_tile(eps_uncond, u_b, u_c, u_h, u_w, b, channel, y, x, valid)
    direction = load_tile(eps_cond, c_b, c_c, c_h, c_w, b, channel, y, x, valid) - uncond
    score = -noise_level * load_tile(grad_class, g_b, g_c, g_h, g_w, b, channel, y, x, valid)
    score, kept = filter_tile(score, direction, scalar(cos_limit, b, T_COS), scalar(tan_limit, b, T_TAN), MODE)
    kept = tl.where(chunk < rows * columns, kept.to(tl.float32), 0.0)
    distance = noise_level * load_tile(grad_distance, d_b, d_c, d_h, d_w, b, channel, y, x, valid)
    latents = load_tile(z, z_b, z_c, z_h, z_w, b, channel, y, x, valid)  # on its way while the norms are made

    like, like_norm, towards, class_norm, image, image_norm, count = whole_norms(direction, score, distance, kept)
    before, clean = step(
        latents, uncond, score * towards * (1.0 / class_norm), distance * image * (1.0 / image_norm), like_norm / like,
        abar, scalar(alphas_prev, b, T_PREV), scalar(guidance, b, T_GUIDANCE), scalar(class_scale, b, T_CLASS),
        scalar(distance_scale, b, T_DISTANCE),
    )  # fmt: skip
    at = ((b * channels + channel) * (rows * CHUNK) + y) * (columns * CHUNK) + x
    tl.store(z_prev + at, before.to(z_prev.dtype.element_ty), mask=valid)
    tl.store(z0 + at, clean.to(z0.dtype.element_ty), mask=valid)
    tl.store(kept_fraction + b, count / (rows * columns))


@triton.jit
def measure_kernel(
    eps_uncond, eps_cond, grad_class, grad_distance, partials,
    alphas, cos_limit, tan_limit,
    u_b, u_c, u_h, u_w, c_b, c_c, c_h, c_w, g_b, g_c, g_h, g_w, d_b, d_c, d_h, d_w,
    rows, columns,
    T_ALPHAS: tl.constexpr, T_COS: tl.constexpr, T_TAN: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """First phase: program (b, i) filters block i of sample b and leaves what the norms need."""
    b = tl.program_id(0).to(tl.int64)
    channel, y, x, chunk, valid = chunk_places(tl.program_id(1) * BLOCK, rows, columns, D, D_PAD, BLOCK, CHUNK)
    noise_level = tl.sqrt_rn(1.0 - scalar(alphas, b, T_ALPHAS))
    direction = load_tile(eps_cond, c_b, c_c, c_h, c_w, b, channel, y, x, valid)
    direction -= load_tile(eps_uncond, u_b, u_c, u_h, u_w, b, channel, y, x, valid)
    score = -noise_level * load_tile(grad_class, g_b, g_c, g_h, g_w, b, channel, y, x, valid)
    score, kept = filter_tile(score, direction, scalar(cos_limit, b, T_COS), scalar(tan_limit, b, T_TAN), MODE)
    distance = noise_level * load_tile(grad_distance, d_b, d_c, d_h, d_w, b, channel, y, x, valid)
    at = partials + (b * tl.num_programs(1) + tl.program_id(1)) * PARTIALS
    largest, square = scaled_square(score)
    tl.store(at, largest)
    tl.store(at + 1, square)
    largest, square = scaled_square(distance)
    tl.store(at + 2, largest)
    tl.store(at + 3, square)
    largest, square = scaled_square(direction)
    tl.store(at + 4, largest)
    tl.store(at + 5, square)
    tl.store(at + 6, tl.sum(tl.sum((kept & (chunk < rows * columns)).to(tl.float32), 1), 0))


@triton.jit
def apply_kernel(
    z, eps_uncond, eps_cond, grad_class, grad_distance, z_prev, z0, kept_fraction, partials,
    alphas, alphas_prev, guidance, class_scale, distance_scale, cos_limit, tan_limit,
    z_b, z_c, z_h, z_w, u_b, u_c, u_h, u_w, c_b, c_c, c_h, c_w, g_b, g_c, g_h, g_w, d_b, d_c, d_h, d_w,
    channels, rows, columns,
    T_ALPHAS: tl.constexpr, T_PREV: tl.constexpr, T_GUIDANCE: tl.constexpr, T_CLASS: tl.constexpr,
    T_DISTANCE: tl.constexpr, T_COS: tl.constexpr, T_TAN: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
):  # fmt: skip
    """Second phase: program (b, i) adds up the sample's norms, filters its block again and makes the step."""
    b = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(1)
    i = tl.arange(0, BLOCKS_PAD)
    at = partials + (b * blocks + i) * PARTIALS
    present = i < blocks
    class_largest, class_square = combine(
        tl.load(at, mask=present, other=0.0), tl.load(at + 1, mask=present, other=0.0), present
    )
    image_largest, image_square = combine(
        tl.load(at + 2, mask=present, other=0.0), tl.load(at + 3, mask=present, other=0.0), present
    )
    like_largest, like_square = combine(
        tl.load(at + 4, mask=present, other=0.0), tl.load(at + 5, mask=present, other=0.0), present
    )
    kept_chunks = tl.sum(tl.load(at + 6, mask=present, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(kept_fraction + b, kept_chunks / (rows * columns))

    channel, y, x, _, valid = chunk_places(tl.program_id(1) * BLOCK, rows, columns, D, D_PAD, BLOCK, CHUNK)
    abar = scalar(alphas, b, T_ALPHAS)
    noise_level = tl.sqrt_rn(1.0 - abar)
    uncond = load_tile(eps_uncond, u_b, u_c, u_h, u_w, b, channel, y, x, valid)
    direction = load_tile(eps_cond, c_b, c_c, c_h, c_w, b, channel, y, x, valid) - uncond
    score = -noise_level * load_tile(grad_class, g_b, g_c, g_h, g_w, b, channel, y, x, valid)
    score, _ = filter_tile(score, direction, scalar(cos_limit, b, T_COS), scalar(tan_limit, b, T_TAN), MODE)
    distance = noise_level * load_tile(grad_distance, d_b, d_c, d_h, d_w, b, channel, y, x, valid)
    towards_class = unit_vector(score, class_largest, class_square)
    towards_image = unit_vector(distance, image_largest, image_square)
    before, clean = step(
        load_tile(z, z_b, z_c, z_h, z_w, b, channel, y, x, valid), uncond, towards_class, towards_image,
        like_largest * tl.sqrt_rn(like_square), abar, scalar(alphas_prev, b, T_PREV),
        scalar(guidance, b, T_GUIDANCE), scalar(class_scale, b, T_CLASS), scalar(distance_scale, b, T_DISTANCE),
    )  # fmt: skip
    at = ((b * channels + channel) * (rows * CHUNK) + y) * (columns * CHUNK) + x
    tl.store(z_prev + at, before.to(z_prev.dtype.element_ty), mask=valid)
    tl.store(z0 + at, clean.to(z0.dtype.element_ty), mask=valid)


def guided_update(
    z: Tensor,  # [B, C, H, W] float16, bfloat16 or float32
    eps_uncond: Tensor,  # [B, C, H, W]
    eps_cond: Tensor,  # [B, C, H, W]
    grad_class: Tensor,  # [B, C, H, W]
    grad_distance: Tensor,  # [B, C, H, W]
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    mode: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `counterlens.kernels.guided_update.guided_update`, which checks the arguments.

    Tensors and numbers: the two alphas, guidance, class and distance scale, cosine and tangent of the limit; each is a
    tensor [B], or None and then the number counts. Numbers travel with the launch and cost none of their own.
    """
    b, c, h, w = z.shape
    rows, columns = h // chunk, w // chunk
    z_prev, z0 = (torch.empty((b, c, h, w), dtype=z.dtype, device=z.device) for _ in range(2))
    kept_fraction = torch.empty(b, dtype=torch.float32, device=z.device)
    scalars = [
        number if tensor is None else tensor.to(z.device, torch.float32).expand(b).contiguous()
        for tensor, number in zip(tensors, numbers, strict=True)
    ]
    alphas, (cos_limit, tan_limit) = scalars[0], scalars[5:]
    names = ("T_ALPHAS", "T_PREV", "T_GUIDANCE", "T_CLASS", "T_DISTANCE", "T_COS", "T_TAN")
    is_tensor = {name: tensor is not None for name, tensor in zip(names, tensors, strict=True)}
    d = c * chunk * chunk
    tile = {"D": d, "D_PAD": triton.next_power_of_2(d), "CHUNK": chunk, "MODE": MODE_CODES[mode]}
    whole = triton.next_power_of_2(rows * columns)
    if tile["D_PAD"] * whole <= ONE_LAUNCH:
        latents = (z, eps_uncond, eps_cond, grad_class, grad_distance)
        one_launch_kernel[(b,)](
            *latents, z_prev, z0, kept_fraction, *scalars, *[s for x in latents for s in x.stride()],
            c, rows, columns, **is_tensor, **tile, BLOCK=whole, num_warps=8 if tile["D_PAD"] * whole > 1024 else 4,
        )  # fmt: skip
        return z_prev, z0, kept_fraction

    within = None
    if mode == "global":  # the whole sample's angle comes first; the two phases then take the result as it is
        grad_class, within = _filter_globally(eps_uncond, eps_cond, grad_class, scalars)
        tile["MODE"] = MODE_CODES["off"]
    block = max(1, BLOCK_ELEMENTS // tile["D_PAD"])
    blocks = triton.cdiv(rows * columns, block)
    partials = torch.empty((b, blocks, PARTIALS.value), dtype=torch.float32, device=z.device)
    latents = (z, eps_uncond, eps_cond, grad_class, grad_distance)
    strides = [s for x in latents for s in x.stride()]
    measure_kernel[(b, blocks)](
        *latents[1:], partials, alphas, cos_limit, tan_limit, *strides[4:], rows, columns,
        **{name: is_tensor[name] for name in ("T_ALPHAS", "T_COS", "T_TAN")}, **tile, BLOCK=block, num_warps=8,
    )  # fmt: skip
    apply_kernel[(b, blocks)](
        *latents, z_prev, z0, kept_fraction, partials, *scalars, *strides, c, rows, columns,
        **is_tensor, **tile, BLOCK=block, BLOCKS_PAD=triton.next_power_of_2(blocks), num_warps=8,
    )  # fmt: skip
    return z_prev, z0, kept_fraction if within is None else within


def _filter_globally(
    eps_uncond: Tensor,  # [B, C, H, W]
    eps_cond: Tensor,  # [B, C, H, W]
    grad_class: Tensor,  # [B, C, H, W]
    scalars: Sequence[Tensor | float],
) -> tuple[Tensor, Tensor]:
    """Mode global for latents beyond one program: minus the filtered score [B, C, H, W] float32, kept_fraction [B].

    The two phases multiply by minus the noise level, a factor that the rescaling takes out again; at noise level 0 it
    leaves 0, as it must.
    """
    b = grad_class.shape[0]
    cos_limit, tan_limit = (
        x if isinstance(x, Tensor) else torch.full((b,), x, dtype=torch.float32, device=grad_class.device)
        for x in scalars[5:]
    )
    score, direction = -grad_class.float(), eps_cond.float() - eps_uncond.float()
    filtered, kept = consensus_filter(score, direction, cos_limit, tan_limit, "global", 1)
    return -filtered, kept[:, 0, 0].float()
