"""The consensus filter: keep a classifier's gradient only where the generator's own class direction agrees with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from counterlens.kernels.consensus import reference as _reference
from counterlens.kernels.dispatch import (
    FLOATING,
    choose_backend,
    compute_dtype,
    constants,
    cpu_module,
    define_op,
    exporting,
    tensor_reasons,
    values_readable,
)

Mode = Literal["zero", "project", "global", "off"]
MODES: tuple[Mode, ...] = ("zero", "project", "global", "off")

__all__ = ["MODES", "Mode", "angle_limits", "check_chunk", "check_mode", "consensus_filter", "not_supported_reasons"]


def check_mode(mode: str) -> None:
    """Raise ValueError for a mode that there is not."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")


def check_chunk(chunk: int, height: int, width: int) -> None:
    """Raise ValueError unless `chunk` divides height and width."""
    if chunk < 1 or height % chunk or width % chunk:
        raise ValueError(f"chunk: expected a divisor of height {height} and width {width}, got {chunk}")


def _check_angles(values: list[float], mode: str) -> None:
    if mode == "off":
        return
    if any(not 0 <= v <= 180 for v in values):
        raise ValueError(f"angle_deg: expected degrees in [0, 180], got {values}")
    if mode in ("project", "global") and any(v >= 90 for v in values):
        raise ValueError(f"angle_deg: mode {mode!r} needs a limit below 90 degrees, got {values}")


def limit_numbers(angle_deg: float, mode: str = "zero") -> tuple[float, float]:
    """Cosine and tangent of one angle limit in degrees. Raises as `angle_limits` does."""
    _check_angles([float(angle_deg)], mode)
    radians = float(angle_deg) * (math.pi / 180)
    return 0.0 if angle_deg == 90 else math.cos(radians), math.tan(radians)


def angle_limits(
    angle_deg: float | Tensor,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    mode: str = "zero",
) -> tuple[Tensor, Tensor]:
    """Cosine and tangent of the angle limit, each [B]; a number or [B] degrees in [0, 180].

    The cosine of exactly 90 degrees is 0, so that orthogonal vectors are kept there. Angles in a tensor are checked
    where reading them costs nothing: on the CPU, outside a traced graph.

    Raises:
        ValueError: a limit is outside [0, 180], or at least 90 for `project` or `global`, or of the wrong shape.
    """
    if not isinstance(angle_deg, Tensor):
        cos_number, tan_number = limit_numbers(angle_deg, mode)
        cos = torch.full((batch,), cos_number, dtype=dtype, device=device)
        return cos, torch.full((batch,), tan_number, dtype=dtype, device=device)
    if angle_deg.ndim > 0 and angle_deg.shape != (batch,):
        raise ValueError(f"angle_deg: expected a number or [{batch}], got {list(angle_deg.shape)}")
    if not angle_deg.is_cuda and values_readable(angle_deg):
        _check_angles(angle_deg.reshape(-1).tolist(), mode)
    # A graph for another runtime stays in the tensors' own precision: TensorRT has no float64.
    angle = angle_deg.to(device, dtype if exporting() else torch.float64).expand(batch)
    radians = angle * (math.pi / 180)
    cos = torch.where(angle == 90, 0.0, torch.cos(radians))
    return cos.to(dtype), torch.tan(radians).to(dtype)


def not_supported_reasons(
    backend: str,
    score: Tensor,
    reference: Tensor | None = None,
) -> list[str]:
    """Why `backend` cannot filter `score`; empty when it can."""
    return tensor_reasons(backend, "score", score, [reference])


def _filter(
    score: Tensor,
    reference: Tensor,
    limits: Sequence[Tensor],
    numbers: Sequence[float],
    mode: str,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The compiled versions; arguments are checked. Cosines and tangents [B], or two numbers."""
    b, c, h, w = score.shape
    if backend == "triton":
        from counterlens.kernels.consensus import triton as _triton

        # Made once and kept: filling two small tensors takes longer than the kernel.
        cos_limit, tan_limit = limits or (constants((number,) * b, score.device) for number in numbers)
        return _triton.consensus_filter(score, reference, cos_limit, tan_limit, mode, chunk)
    compute = compute_dtype(score.dtype)
    cos_limit, tan_limit = limits or (torch.full((b,), number, dtype=compute) for number in numbers)
    s, r = score.to(compute).contiguous(), reference.to(compute).contiguous()
    filtered = torch.empty((b, c, h, w), dtype=compute)
    kept = torch.empty((b, h // chunk, w // chunk), dtype=torch.bool)
    function = cpu_module().consensus_f64 if compute == torch.float64 else cpu_module().consensus_f32
    function(
        s.data_ptr(), r.data_ptr(), cos_limit.data_ptr(), tan_limit.data_ptr(), filtered.data_ptr(), kept.data_ptr(),
        b, c, h, w, chunk, MODES.index(mode), torch.get_num_threads(),
    )  # fmt: skip
    return filtered.to(score.dtype), kept


def _fake(
    score: Tensor,
    reference: Tensor,
    limits: Sequence[Tensor],
    numbers: Sequence[float],
    mode: str,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    b, _, h, w = score.shape
    kept = score.new_empty((b, h // chunk, w // chunk), dtype=torch.bool)
    return torch.empty_like(score, memory_format=torch.contiguous_format), kept


define_op(
    "consensus_filter(Tensor score, Tensor reference, Tensor[] limits, float[] numbers, str mode, int chunk, "
    "str backend) -> (Tensor, Tensor)",
    _filter,
    _fake,
)


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
    kept; NaN is kept and propagates. Sums are float32, or float64 for float64 inputs; half types are rounded once.

    Args:
        score: [B, C, H, W], minus sqrt(1 - alphas_cumprod) times the gradient of log p(target).
        reference: [B, C, H, W], conditional minus unconditional noise prediction.
        angle_deg: limit in degrees, [0, 180]; below 90 for `project` and `global`.
        mode: `zero` removes chunks beyond the limit; `project` turns them by the limit towards the reference, growing
            the norm by 1/cos; `global` does so with the whole sample, at unit norm; `off` keeps all.
        chunk: side of a chunk; must divide H and W.
        backend: `auto`, `triton`, `cpp` or `reference`. Only reference can be differentiated through.

    Returns:
        filtered [B, C, H, W] in score's dtype, and kept, bool [B, H/chunk, W/chunk]: where the angle was within the
        limit.

    Raises:
        ValueError: shapes, mode, angle or chunk do not fit. TypeError: dtypes do not fit.
        BackendError: the named backend cannot run; the message says why.

    Source: LDCE (arXiv 2310.06668), section 3.2. Deviation: the cosine is clamped to [-1, 1] and antiparallel chunks
    are removed; the official code's unclamped acos keeps some of them by rounding.
    """
    check_mode(mode)
    if score.ndim != 4 or score.shape != reference.shape:
        raise ValueError(
            f"reference: expected score's shape [B, C, H, W], got {list(reference.shape)} beside {list(score.shape)}"
        )
    if score.dtype not in FLOATING or score.dtype != reference.dtype:
        raise TypeError(f"score, reference: expected one floating dtype, got {score.dtype} and {reference.dtype}")
    if score.device != reference.device:
        raise ValueError(f"reference: expected score's device {score.device}, got {reference.device}")
    b, _, h, w = score.shape
    check_chunk(chunk, h, w)
    chosen = choose_backend(
        "consensus_filter", backend, score, lambda name: not_supported_reasons(name, score, reference)
    )
    compute = compute_dtype(score.dtype)
    limits: Sequence[Tensor] = ()
    numbers: Sequence[float] = ()
    if isinstance(angle_deg, Tensor) or chosen == "reference":
        cos_limit, tan_limit = limits = angle_limits(angle_deg, b, compute, score.device, mode)
    else:
        numbers = limit_numbers(angle_deg, mode)
    if score.numel() == 0:
        return torch.empty_like(score), torch.ones((b, h // chunk, w // chunk), dtype=torch.bool, device=score.device)
    if chosen == "reference":
        filtered, kept = _reference.consensus_filter(
            score.to(compute), reference.to(compute), cos_limit, tan_limit, mode, chunk
        )
        return filtered.to(score.dtype), kept
    filtered, kept = torch.ops.counterlens.consensus_filter(score, reference, limits, numbers, mode, chunk, chosen)
    return filtered, kept
