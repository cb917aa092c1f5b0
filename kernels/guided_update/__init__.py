"""One guided denoising step: consensus filter, renormalisation, combination and DDIM in one pass over the latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from counterlens.kernels.consensus import MODES, Mode, angle_limits, check_chunk, check_mode, limit_numbers
from counterlens.kernels.dispatch import (
    FLOATING,
    choose_backend,
    compute_dtype,
    cpu_module,
    define_op,
    tensor_reasons,
    values_readable,
)
from counterlens.kernels.guided_update import reference as _reference

__all__ = ["guided_update", "not_supported_reasons"]

LATENTS = ("eps_uncond", "eps_cond", "grad_class", "grad_distance")  # beside z
SCALARS = ("alphas_cumprod_t", "alphas_cumprod_prev", "guidance_scale", "class_scale", "distance_scale")


def not_supported_reasons(
    backend: str,
    z: Tensor,
    *others: Tensor,
) -> list[str]:
    """Why `backend` cannot update `z`; `others` are the other latents. Empty when it can."""
    return tensor_reasons(backend, "z", z, others)


def _columns(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Every scalar as [B]: its tensor, or its number repeated."""
    return [
        torch.full((batch,), number, dtype=dtype, device=device)
        if tensor is None
        else tensor.to(device, dtype).expand(batch)
        for tensor, number in zip(tensors, numbers, strict=True)
    ]


def _update(
    z: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    grad_class: Tensor,
    grad_distance: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    mode: str,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled versions; arguments are checked."""
    latents = (z, eps_uncond, eps_cond, grad_class, grad_distance)
    if backend == "triton":
        from counterlens.kernels.guided_update import triton as _triton

        return _triton.guided_update(*latents, tensors, numbers, mode, chunk)
    double = z.dtype == torch.float64
    compute = torch.float64 if double else torch.float32
    b, c, h, w = z.shape
    # A `to` that does nothing still costs a microsecond.
    inputs = [(x if x.dtype == compute else x.to(compute)).contiguous() for x in latents]
    columns = [None if tensor is None else tensor.to(z.device, compute) for tensor in tensors]
    dense = torch.contiguous_format
    z_prev, z0 = torch.empty_like(inputs[0], memory_format=dense), torch.empty_like(inputs[0], memory_format=dense)
    kept_fraction = torch.empty(b, dtype=compute)
    function = cpu_module().guided_update_f64 if double else cpu_module().guided_update_f32
    function(
        [x.data_ptr() for x in inputs],
        [0 if x is None else x.data_ptr() for x in columns],
        [0 if x is None or x.ndim == 0 else x.stride(0) for x in columns],
        numbers,
        (z_prev.data_ptr(), z0.data_ptr(), kept_fraction.data_ptr()),
        b, c, h, w, chunk, MODES.index(mode), torch.get_num_threads(),
    )  # fmt: skip
    if z.dtype == compute:
        return z_prev, z0, kept_fraction
    return z_prev.to(z.dtype), z0.to(z.dtype), kept_fraction


def _fake(
    z: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    grad_class: Tensor,
    grad_distance: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    mode: str,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    z_prev = torch.empty_like(z, memory_format=torch.contiguous_format)
    return z_prev, torch.empty_like(z_prev), z.new_empty(z.shape[0], dtype=compute_dtype(z.dtype))


define_op(
    "guided_update(Tensor z, Tensor eps_uncond, Tensor eps_cond, Tensor grad_class, Tensor grad_distance, "
    "Tensor?[] tensors, float[] numbers, str mode, int chunk, str backend) -> (Tensor, Tensor, Tensor)",
    _update,
    _fake,
)


def _scalar(name: str, value: float | Tensor, batch: int) -> tuple[Tensor | None, float]:
    """One of SCALARS, checked: (its tensor, 0) or (None, its number)."""
    checked = name.startswith("alphas")
    if not isinstance(value, Tensor):
        tensor, number = None, float(value)
        values = [number] if checked else []
    else:
        if value.ndim > 0 and value.shape != (batch,):
            raise ValueError(f"{name}: expected a number or [{batch}], got {list(value.shape)}")
        tensor, number = value, 0.0
        readable = checked and not value.is_cuda and values_readable(value)
        values = (value.tolist() if value.ndim else [value.item()]) if readable else []
    if any(not 0 < v <= 1 for v in values):
        raise ValueError(f"{name}: expected values in (0, 1], got {values}")
    return tensor, number


def guided_update(
    z: Tensor,  # [B, C, H, W]
    eps_uncond: Tensor,  # [B, C, H, W]
    eps_cond: Tensor,  # [B, C, H, W]
    grad_class: Tensor,  # [B, C, H, W]
    grad_distance: Tensor,  # [B, C, H, W]
    alphas_cumprod_t: float | Tensor,  # a number or [B]
    alphas_cumprod_prev: float | Tensor,  # a number or [B]
    *,
    guidance_scale: float | Tensor,  # a number or [B]
    class_scale: float | Tensor,  # a number or [B]
    distance_scale: float | Tensor,  # a number or [B]
    angle_deg: float | Tensor,  # a number or [B]
    mode: Mode = "zero",
    chunk: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """From z at one timestep to z at the previous one, guided by a class and by a distance.

    The class gradient passes the consensus filter; both gradients are rescaled per sample to the norm of
    eps_cond - eps_uncond (a zero gradient stays zero, one of 1e-30 becomes full-sized). A NaN or inf stays in its
    sample. Sums are float32, or float64 for float64 inputs; half types are rounded once, at the end.

    Args:
        z: [B, C, H, W], the latents at timestep t.
        eps_uncond, eps_cond: [B, C, H, W], noise predictions without and with the condition.
        grad_class: [B, C, H, W], gradient of log p(target) with respect to z, as the pullback gives it.
        grad_distance: [B, C, H, W], gradient of the distance to the original image, likewise.
        alphas_cumprod_t, alphas_cumprod_prev: cumulative product of alphas at t and at the previous timestep, (0, 1].
        guidance_scale, class_scale, distance_scale: weights; guidance_scale multiplies the other two.
        angle_deg, mode, chunk: see `counterlens.kernels.consensus.consensus_filter`.
        backend: `auto`, `triton`, `cpp` or `reference`. Only reference can be differentiated through.

    Returns:
        z_prev and z0 (the predicted clean latents, from the guided noise), [B, C, H, W] in z's dtype; and kept_fraction
        [B], the share of chunks within the angle limit, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, devices, mode, angle, chunk or alphas do not fit. TypeError: dtypes do not fit.
        BackendError: the named backend cannot run; the message says why.

    Source: LDCE (arXiv 2310.06668), sections 3.1 and 3.2; DDIM with eta = 0.
    """
    check_mode(mode)
    if z.ndim != 4:
        raise ValueError(f"z: expected [B, C, H, W], got {list(z.shape)}")
    if z.dtype not in FLOATING:
        raise TypeError(f"z: expected a floating dtype, got {z.dtype}")
    shape, dtype, device = z.shape, z.dtype, z.device
    others = (eps_uncond, eps_cond, grad_class, grad_distance)
    for name, x in zip(LATENTS, others, strict=True):
        if x.shape != shape:
            raise ValueError(f"{name}: expected z's shape {list(shape)}, got {list(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected z's dtype {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected z's device {device}, got {x.device}")
    b, _, h, w = shape
    check_chunk(chunk, h, w)
    scalars = (alphas_cumprod_t, alphas_cumprod_prev, guidance_scale, class_scale, distance_scale)
    pairs = [_scalar(name, value, b) for name, value in zip(SCALARS, scalars, strict=True)]
    tensors, numbers = [tensor for tensor, _ in pairs], [number for _, number in pairs]
    compute = compute_dtype(dtype)
    if isinstance(angle_deg, Tensor):
        tensors += angle_limits(angle_deg, b, compute, device, mode)
        numbers += (0.0, 0.0)
    else:
        tensors += (None, None)
        numbers += limit_numbers(angle_deg, mode)
    chosen = choose_backend(
        "guided_update",
        backend,
        z,
        lambda name: not_supported_reasons(name, z, *others, *[t for t in tensors if t is not None]),
    )
    if z.numel() == 0:
        return torch.empty_like(z), torch.empty_like(z), z.new_ones(b, dtype=compute)
    if chosen == "reference":
        arguments: list[Any] = [x.to(compute) for x in (z, *others)]
        arguments += _columns(tensors, numbers, b, compute, z.device)
        z_prev, z0, kept_fraction = _reference.guided_update(*arguments, mode, chunk)  # type: ignore[call-arg]
        return z_prev.to(z.dtype), z0.to(z.dtype), kept_fraction
    z_prev, z0, kept_fraction = torch.ops.counterlens.guided_update.default(
        z, *others, tensors, numbers, mode, chunk, chosen
    )
    return z_prev, z0, kept_fraction
