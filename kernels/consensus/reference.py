"""The consensus filter in plain torch, to be read next to LDCE section 3.2: the oracle for every other version."""

from __future__ import annotations

import torch
from torch import Tensor


def to_chunks(
    x: Tensor,  # [B, C, H, W]
    chunk: int,
) -> Tensor:
    """Gather every chunk x chunk patch, all channels, into one vector: [B, H/chunk, W/chunk, C*chunk*chunk]."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // chunk, chunk, w // chunk, chunk)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h // chunk, w // chunk, c * chunk * chunk)


def from_chunks(
    v: Tensor,  # [B, H/chunk, W/chunk, C*chunk*chunk]
    chunk: int,
) -> Tensor:
    """Undo `to_chunks`."""
    b, rows, columns, d = v.shape
    c = d // (chunk * chunk)
    v = v.reshape(b, rows, columns, c, chunk, chunk).permute(0, 3, 1, 4, 2, 5)
    return v.reshape(b, c, rows * chunk, columns * chunk)  # [B, C, H, W]


def _unit_scale(v: Tensor) -> Tensor:
    """Divide vectors by their largest magnitude, so that squares neither overflow nor vanish; zero stays zero."""
    largest = v.abs().amax(-1, keepdim=True)
    return v / torch.where(largest == 0, 1.0, largest)


def cosine(
    s: Tensor,  # [..., D]
    r: Tensor,  # [..., D]
) -> Tensor:
    """Cosine of the angle between vectors, in [-1, 1]; NaN where there is no angle (a zero vector, NaN, inf): [...]."""
    s, r = _unit_scale(s), _unit_scale(r)
    # One root of the product: for r = -s it is exact, so that antiparallel gives exactly -1.
    return ((s * r).sum(-1) / ((s * s).sum(-1) * (r * r).sum(-1)).sqrt()).clamp(-1, 1)


def outside(
    cos: Tensor,  # [...]
    cos_limit: Tensor,  # broadcastable to cos
) -> Tensor:
    """Whether the angle exceeds the limit. False for NaN, true for exactly antiparallel vectors at any limit: [...]."""
    return (cos < cos_limit) | (cos <= -1)


def rotate(
    s: Tensor,  # [..., D]
    r: Tensor,  # [..., D]
    tan_limit: Tensor,  # broadcastable to [..., 1]
) -> Tensor:
    """s + |s| tan(limit) n with n the unit vector of r's part orthogonal to s; s itself where that part is nothing."""
    largest = s.abs().amax(-1, keepdim=True)
    s_scaled, r_scaled = _unit_scale(s), _unit_scale(r)
    s_norm = (s_scaled * s_scaled).sum(-1, keepdim=True).sqrt()
    r_norm = (r_scaled * r_scaled).sum(-1, keepdim=True).sqrt()
    s_hat = s_scaled / s_norm
    n = r_scaled - (r_scaled * s_hat).sum(-1, keepdim=True) * s_hat
    n_norm = (n * n).sum(-1, keepdim=True).sqrt()
    # What is left of antiparallel vectors is rounding error, which has no direction.
    nothing = n_norm <= 8 * torch.finfo(s.dtype).eps * r_norm
    turned = (s_scaled + s_norm * tan_limit * n / torch.where(nothing, 1.0, n_norm)) * largest
    return torch.where(nothing, s, turned)


def consensus_filter(
    score: Tensor,  # [B, C, H, W] float32 or float64
    reference: Tensor,  # [B, C, H, W]
    cos_limit: Tensor,  # [B]
    tan_limit: Tensor,  # [B]
    mode: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """See `counterlens.kernels.consensus.consensus_filter`, which checks the arguments."""
    b, _, h, w = score.shape
    grid = (b, h // chunk, w // chunk)
    if mode == "off":
        return score.clone(), torch.ones(grid, dtype=torch.bool, device=score.device)
    if mode == "global":
        s, r = score.reshape(b, -1), reference.reshape(b, -1)  # [B, D]
        unit = _unit_scale(s)
        norm = (unit * unit).sum(-1, keepdim=True).sqrt()
        s = unit / torch.where(norm == 0, 1.0, norm)
        drop = outside(cosine(s, r), cos_limit)  # [B]
        filtered = torch.where(drop[:, None], rotate(s, r, tan_limit[:, None]), s)
        return filtered.reshape(score.shape), ~drop[:, None, None].expand(grid)
    s, r = to_chunks(score, chunk), to_chunks(reference, chunk)  # [B, H/chunk, W/chunk, D]
    drop = outside(cosine(s, r), cos_limit[:, None, None])  # [B, H/chunk, W/chunk]
    replacement = torch.zeros_like(s) if mode == "zero" else rotate(s, r, tan_limit[:, None, None, None])
    return from_chunks(torch.where(drop[..., None], replacement, s), chunk), ~drop
