"""The consensus filter: keep a classifier's gradient only where the generator's own class direction agrees with it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..dispatch import choose_backend, missing_cpp
from . import reference as _reference

Mode = Literal["zero", "project", "global", "off"]
MODES: tuple[Mode, ...] = ("zero", "project", "global", "off")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

__all__ = ["MODES", "Mode", "angle_limits", "consensus_filter", "not_supported_reasons"]


def angle_limits(
    angle_deg: float | Tensor,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    mode: str = "zero",
) -> tuple[Tensor, Tensor]:
    """Cosine and tangent of the angle limit, each [B]; a number or [B] degrees in [0, 180].

    The cosine of exactly 90 degrees is 0, so that orthogonal vectors are kept there.

    Raises:
        ValueError: a limit is outside [0, 180], or at least 90 for `project` or `global`, or of the wrong shape.
    """
    if isinstance(angle_deg, Tensor) and angle_deg.ndim > 0 and angle_deg.shape != (batch,):
        raise ValueError(f"angle_deg: expected a number or [{batch}], got {list(angle_deg.shape)}")
    if isinstance(angle_deg, Tensor):
        angle = angle_deg.to(device, torch.float64).expand(batch)
        # Reading values would break a traced graph; numbers inside one are checked by whoever made the tensor.
        values = [] if torch.compiler.is_compiling() else angle.tolist()
    else:
        angle = torch.full((batch,), float(angle_deg), dtype=torch.float64, device=device)
        values = [float(angle_deg)]
    if mode != "off":
        if any(not 0 <= v <= 180 for v in values):
            raise ValueError(f"angle_deg: expected degrees in [0, 180], got {angle_deg}")
        if mode in ("project", "global") and any(v >= 90 for v in values):
            raise ValueError(f"angle_deg: mode {mode!r} needs a limit below 90 degrees, got {angle_deg}")
    radians = angle * (math.pi / 180)
    cos = torch.where(angle == 90, 0.0, torch.cos(radians))
    return cos.to(dtype), torch.tan(radians).to(dtype)


def not_supported_reasons(
    backend: str,
    score: Tensor,
) -> list[str]:
    """Why `backend` cannot filter `score`; empty when it can."""
    reasons = []
    if backend == "cpp":
        reasons += missing_cpp()
        if score.device.type != "cpu":
            reasons.append(f"score is on {score.device}, cpp needs the CPU")
        if score.dtype not in (torch.float32, torch.float64):
            reasons.append(f"score is {score.dtype}, cpp takes float32 and float64")
    elif backend == "triton":
        reasons.append("there is no Triton version of this operation yet")
    return reasons


def consensus_filter(
    score: Tensor,  # [B, C, H, W]
    reference: Tensor,  # [B, C, H, W]
    angle_deg: float | Tensor,  # a number or [B]
    *,
    mode: Mode = "zero",
    chunk: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Remove or turn the chunks of a classifier score that point away from the generator's class direction.

    A chunk is the vector of all channels over a `chunk` x `chunk` patch. Chunks without an angle (a zero vector) are
    kept; NaN is kept and propagates. Sums are float32, or float64 for float64 inputs.

    Args:
        score: [B, C, H, W], minus sqrt(1 - alphas_cumprod) times the gradient of log p(target).
        reference: [B, C, H, W], conditional minus unconditional noise prediction.
        angle_deg: limit in degrees, [0, 180]; below 90 for `project` and `global`.
        mode: `zero` removes chunks beyond the limit; `project` turns them by the limit towards the reference, growing
            the norm by 1/cos; `global` does so with the whole sample, at unit norm; `off` keeps all.
        chunk: side of a chunk; must divide H and W.
        backend: `auto`, `triton`, `cpp` or `reference`.

    Returns:
        filtered [B, C, H, W] in score's dtype, and kept, bool [B, H/chunk, W/chunk]: where the angle was within the
        limit.

    Raises:
        ValueError: shapes, mode, angle or chunk do not fit. TypeError: dtypes do not fit.
        BackendError: the named backend cannot run; the message says why.

    Source: LDCE (arXiv 2310.06668), section 3.2. Deviation: the cosine is clamped to [-1, 1] and antiparallel chunks
    are removed; the official code's unclamped acos keeps some of them by rounding.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if score.ndim != 4 or score.shape != reference.shape:
        raise ValueError(
            f"reference: expected score's shape [B, C, H, W], got {list(reference.shape)} beside {list(score.shape)}"
        )
    if score.dtype not in DTYPES or score.dtype != reference.dtype:
        raise TypeError(f"score, reference: expected one floating dtype, got {score.dtype} and {reference.dtype}")
    if score.device != reference.device:
        raise ValueError(f"reference: expected score's device {score.device}, got {reference.device}")
    b, c, h, w = score.shape
    if chunk < 1 or h % chunk or w % chunk:
        raise ValueError(f"chunk: expected a divisor of height {h} and width {w}, got {chunk}")
    chosen = choose_backend("consensus_filter", backend, score, lambda name: not_supported_reasons(name, score))
    compute = torch.float64 if score.dtype == torch.float64 else torch.float32
    cos_limit, tan_limit = angle_limits(angle_deg, b, compute, score.device, mode)
    if score.numel() == 0:
        return torch.empty_like(score), torch.ones((b, h // chunk, w // chunk), dtype=torch.bool, device=score.device)
    if chosen == "cpp":
        from counterlens.kernels import _cpu

        score, reference = score.contiguous(), reference.contiguous()
        filtered = torch.empty_like(score)
        kept = torch.empty((b, h // chunk, w // chunk), dtype=torch.bool)
        function = _cpu.consensus_f64 if compute == torch.float64 else _cpu.consensus_f32
        function(
            score.data_ptr(), reference.data_ptr(), cos_limit.data_ptr(), tan_limit.data_ptr(), filtered.data_ptr(),
            kept.data_ptr(), b, c, h, w, chunk, MODES.index(mode),
        )  # fmt: skip
        return filtered, kept
    filtered, kept = _reference.consensus_filter(
        score.to(compute), reference.to(compute), cos_limit, tan_limit, mode, chunk
    )
    return filtered.to(score.dtype), kept
