"""Perturbed images: every threshold of every sample in one pass, hard for measuring and soft for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from counterlens.kernels.dispatch import (
    FLOATING,
    any_requires_grad,
    choose_backend,
    compute_dtype,
    cpu_module,
    define_op,
    environment_reasons,
    interpreting,
    tensor_reasons,
    values_readable,
)
from counterlens.kernels.perturb import reference as _reference
from counterlens.kernels.thresholds import check_thresholds

Keep = Literal["above", "below", "both"]
Order = Literal["value", "rank"]
SCALAR_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3, torch.int32: 4}

__all__ = ["Keep", "Order", "not_supported_reasons", "perturb", "rank_counts", "rank_pixels", "soft_perturb"]

rank_counts = _reference.rank_counts


def not_supported_reasons(
    backend: str,
    image: Tensor,
    *others: Tensor,
) -> list[str]:
    """Why `backend` cannot run `perturb` on `image`; `others` are its other tensors. Empty when it can."""
    return tensor_reasons(backend, "image", image, others)


def soft_not_supported_reasons(
    backend: str,
    image: Tensor,
    saliency: Tensor,
    baseline: Tensor,
) -> list[str]:
    """Why `backend` cannot run `soft_perturb`; empty when it can."""
    reasons = environment_reasons(backend)
    if backend == "cpp":
        if image.device.type != "cpu":
            reasons.append(f"image is on {image.device}, cpp needs the CPU")
        if image.dtype not in (torch.float32, torch.float64):
            reasons.append(f"image is {image.dtype}, cpp takes float32 and float64")
        if saliency.dtype != image.dtype:
            reasons.append(f"saliency is {saliency.dtype}, cpp needs the image's {image.dtype}")
    if backend == "triton":
        if not reasons and not image.is_cuda and not interpreting():
            reasons.append(f"image is on {image.device}, triton needs CUDA")
        if torch.float64 in (image.dtype, saliency.dtype):
            reasons.append("image or saliency is float64, triton takes float16, bfloat16 and float32")
    if backend != "reference" and any_requires_grad(baseline):
        reasons.append(f"baseline requires a gradient, which only reference gives ({backend}: image and saliency)")
    return reasons


def rank_pixels(
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Rank of every pixel in its sample, descending, 0 most salient: [N, H, W] int64.

    Ties are broken by a permutation drawn on the CPU from the sample's own seed (one number for all samples, or one
    each): breaking them by index would favour one corner.

    Raises:
        ValueError: shapes or the number of seeds do not fit, or saliency holds NaN.
    """
    saliency = _planes("saliency", saliency, None)
    _refuse_nan(saliency)
    n, h, w = saliency.shape
    seeds = [seed] * n if isinstance(seed, int) else list(seed)
    if len(seeds) != n:
        raise ValueError(f"seed: expected a number or {n} of them, got {len(seeds)}")
    permutations = [torch.randperm(h * w, generator=torch.Generator().manual_seed(s)) for s in seeds]
    stacked = torch.stack(permutations) if n else torch.empty((0, h * w), dtype=torch.long)
    return _reference.rank_pixels(saliency, stacked.to(saliency.device))


def _planes(name: str, x: Tensor, image: Tensor | None) -> Tensor:
    """[N, H, W] from [N, H, W] or [N, 1, H, W], of the image's size where there is one."""
    planes = x[:, 0] if x.ndim == 4 and x.shape[1] == 1 else x
    if planes.ndim != 3 or (image is not None and planes.shape != (image.shape[0], *image.shape[2:])):
        beside = "" if image is None else f" beside image {list(image.shape)}"
        raise ValueError(f"{name}: expected [N, H, W] or [N, 1, H, W]{beside}, got {list(x.shape)}")
    if image is not None and x.device != image.device:
        raise ValueError(f"{name}: expected image's device {image.device}, got {x.device}")
    return planes


def _nan_error(saliency: Tensor) -> ValueError:
    return ValueError(f"saliency: expected no NaN, got some in {list(saliency.shape)}")


def _refuse_nan(saliency: Tensor) -> None:
    # C++ looks for itself: torch's threads spin for a while after their work, and would be in its threads' way.
    # amin passes NaN on, and needs no buffer of the map's size.
    if saliency.numel() and values_readable(saliency) and bool(saliency.detach().amin().isnan()):
        raise _nan_error(saliency)


def _check_image(image: Tensor) -> None:
    if image.ndim != 4:
        raise ValueError(f"image: expected [N, C, H, W], got {list(image.shape)}")
    if image.dtype not in FLOATING:
        raise TypeError(f"image: expected a floating dtype, got {image.dtype}")


def _expand_baseline(baseline: float | Tensor, image: Tensor) -> Tensor:
    """The baseline as a view of the image's shape."""
    n, c, h, w = image.shape
    if not isinstance(baseline, Tensor):
        return torch.full((1, 1, 1, 1), float(baseline), dtype=image.dtype, device=image.device).expand(n, c, h, w)
    if baseline.dtype != image.dtype:
        raise TypeError(f"baseline: expected image's dtype {image.dtype}, got {baseline.dtype}")
    if baseline.device != image.device:
        raise ValueError(f"baseline: expected image's device {image.device}, got {baseline.device}")
    if baseline.ndim == 0 or baseline.shape == (c,):
        return baseline.reshape(1, -1, 1, 1).expand(n, c, h, w)
    if baseline.shape not in ((1, c, h, w), (n, c, h, w)):
        raise ValueError(f"baseline: expected a number, [{c}] or [1 or {n}, {c}, {h}, {w}], got {list(baseline.shape)}")
    return baseline.expand(n, c, h, w)


def _check_normalisation(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    channels: int,
) -> tuple[list[float], list[float]]:
    if (mean is None) != (std is None):
        raise ValueError("mean, std: expected both or neither")
    if mean is None or std is None:
        return [], []
    means, stds = [float(v) for v in mean], [float(v) for v in std]
    if len(means) != channels or len(stds) != channels:
        raise ValueError(f"mean, std: expected {channels} values each, got {len(means)} and {len(stds)}")
    if not all(s > 0 for s in stds):
        raise ValueError(f"std: expected values above 0, got {stds}")
    return means, stds


def _addresses(arguments: Sequence[Any]) -> list[Any]:
    """Arguments for C++: tensors by their address (0 for an empty one); the caller keeps them alive."""
    return [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]


def _perturb(
    image: Tensor,
    baseline: Tensor,
    key: Tensor,
    limits: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out: Tensor,
    above: bool,
    below: bool,
    backend: str,
) -> None:
    """The compiled versions, into out [N, sides, K, C, H, W]; arguments are checked."""
    if backend == "triton":
        from counterlens.kernels.perturb import triton as _triton

        return _triton.perturb(image, baseline, key, limits, mean, std, out, above, below)
    n, c, h, w = image.shape
    means, stds = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    arguments = [
        image, SCALAR_CODES[image.dtype], image.stride(), baseline, baseline.stride(), key, SCALAR_CODES[key.dtype],
        key.stride(), limits, means, stds, out, SCALAR_CODES[out.dtype], out.stride()[:4], above, below, n,
        limits.shape[1], c, h, w, torch.get_num_threads(),
    ]  # fmt: skip
    if not cpu_module().perturb(*_addresses(arguments)):
        raise _nan_error(key)
    return None


define_op(
    "perturb(Tensor image, Tensor baseline, Tensor key, Tensor limits, float[] mean, float[] std, Tensor(a!) out, "
    "bool above, bool below, str backend) -> ()",
    _perturb,
    lambda *arguments: None,
)


def _key_and_limits(
    saliency: Tensor,  # [N, H, W]
    thresholds: Tensor,  # [N, K]
    order: str,
    rank: Tensor | None,
    seed: int | Sequence[int],
    image: Tensor,
    trusted: bool,
) -> tuple[Tensor, Tensor]:
    """What is compared: key >= limit shows the image. Key [N, H, W], limits [N, K] contiguous, of one dtype."""
    if order == "value":
        dtype = compute_dtype(saliency.dtype)
        return saliency.to(dtype), thresholds.to(dtype).contiguous()
    pixels = saliency.shape[1] * saliency.shape[2]
    if rank is None:
        rank = rank_pixels(saliency, seed)
    else:
        rank = _planes("rank", rank, image)
        if rank.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rank: expected int32 or int64, got {rank.dtype}")
        if rank.numel() and not trusted and values_readable(rank):
            lowest, highest = int(rank.amin()), int(rank.amax())
            if lowest < 0 or highest >= pixels:
                raise ValueError(f"rank: expected values from 0 to {pixels - 1}, got {lowest} to {highest}")
    # rank < count, written with the sign turned: -rank >= 1 - count
    return -rank.to(torch.int32), (1 - rank_counts(thresholds, pixels)).to(torch.int32).contiguous()


def perturb(
    image: Tensor,  # [N, C, H, W]
    baseline: float | Tensor,  # a number, [C] or [1 or N, C, H, W]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    thresholds: Tensor | Sequence[float],  # [K] or [N, K]
    *,
    keep: Keep = "both",
    order: Order = "value",
    rank: Tensor | None = None,  # [N, H, W] or [N, 1, H, W]
    seed: int | Sequence[int] = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,  # as the result
    trusted: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Show the image where the saliency reaches a threshold and the baseline elsewhere, or the other way round.

    Every threshold of every sample in one pass, normalised on the way. The output is all that is allocated; a map given
    as float16 or bfloat16 is compared in float32. With a counterfactual as the baseline this is COUT's mixing.

    Args:
        image: [N, C, H, W].
        baseline: what hides a pixel: a number, [C] or [1 or N, C, H, W] in the image's dtype, before normalisation.
        saliency: [N, H, W] or [N, 1, H, W], any floating dtype.
        thresholds: [K] or [N, K], strictly increasing in [0, 1].
        keep: `above` shows the image where saliency >= threshold, `below` where it is less; `both` gives the two.
        order: `value` compares saliency with the threshold; `rank` shows the (1 - threshold) * H * W pixels (halves
            rounded up) of highest rank, ties broken by a permutation drawn from `seed`.
        rank: ranks to use instead, 0 most salient: [N, H, W] or [N, 1, H, W], int32 or int64.
        seed: for ties: one number, or one per sample (from the sample's id, so that its place does not matter).
        mean, std: per channel; the result is (x - mean) / std.
        out_dtype: the result's dtype; the image's by default.
        out: where to write; every [H, W] plane contiguous.
        trusted: saliency is known to hold no NaN, rank to be in range, and thresholds on a GPU to be right: looking
            would wait for the device. A NaN is then below every threshold.
        backend: `auto`, `triton`, `cpp` or `reference`. Only reference can be differentiated through.

    Returns:
        [N, K, C, H, W] for `above` or `below`; [N, 2, K, C, H, W] for `both`, index 0 the image shown above.

    Raises:
        ValueError: shapes, devices, thresholds, rank, seed, mean, std or out do not fit, or saliency holds NaN.
        TypeError: dtypes do not fit.
        BackendError: the named backend cannot run; the message says why.

    Values of tensors are not checked while a graph is traced or captured.

    Source: MSI (arXiv 2605.18681): Ins and Del with M = [S >= threshold]; the area form with ranks is ours.
    """
    _check_image(image)
    n, c, h, w = image.shape
    if keep not in ("above", "below", "both"):
        raise ValueError(f"keep: expected above, below or both, got {keep!r}")
    if order not in ("value", "rank"):
        raise ValueError(f"order: expected value or rank, got {order!r}")
    if rank is not None and order != "rank":
        raise ValueError("rank: expected none with order='value'")
    if not saliency.is_floating_point():
        raise TypeError(f"saliency: expected a floating dtype, got {saliency.dtype}")
    planes = _planes("saliency", saliency, image)
    hidden = _expand_baseline(baseline, image)
    levels = check_thresholds(thresholds, image.shape[0], image.device, trusted)
    means, stds = _check_normalisation(mean, std, c)
    dtype = out_dtype or (image.dtype if out is None else out.dtype)
    if dtype not in FLOATING:
        raise TypeError(f"out_dtype: expected a floating dtype, got {dtype}")
    above, below = keep in ("above", "both"), keep in ("below", "both")
    shape = (n, 2, levels.shape[1], c, h, w) if keep == "both" else (n, levels.shape[1], c, h, w)
    if out is not None:
        _check_out(out, shape, dtype, image)
    others = [hidden, planes] if out is None else [hidden, planes, out]
    chosen = choose_backend("perturb", backend, image, lambda name: not_supported_reasons(name, image, *others))
    if not trusted and (chosen != "cpp" or order == "rank"):
        _refuse_nan(planes)
    key, limits = _key_and_limits(planes, levels, order, rank, seed, image, trusted)
    if chosen == "reference":
        compute = compute_dtype(image.dtype)
        result = _reference.perturb(
            image.to(compute), hidden.to(compute), key, limits, means, stds, above, below
        ).reshape(shape)
        return result.to(dtype) if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=image.device)
    if out.numel():
        six = out if keep == "both" else out.unsqueeze(1)
        torch.ops.counterlens.perturb(image, hidden, key, limits, means, stds, six, above, below, chosen)
    return out


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, image: Tensor) -> None:
    if out.shape != shape:
        raise ValueError(f"out: expected {list(shape)}, got {list(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"out: expected {dtype}, got {out.dtype}")
    if out.device != image.device:
        raise ValueError(f"out: expected image's device {image.device}, got {out.device}")
    plane_is_dense = (out.shape[-1] < 2 or out.stride(-1) == 1) and (out.shape[-2] < 2 or out.stride(-2) == shape[-1])
    if not plane_is_dense or any(step == 0 and size > 1 for step, size in zip(out.stride(), shape, strict=True)):
        raise ValueError(f"out: expected dense [H, W] planes that do not overlap, got strides {list(out.stride())}")


def _soft_arguments(
    image: Tensor,
    baseline: Tensor,
    saliency: Tensor,
    thresholds: Tensor,
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Any]:
    """The arguments that C++ takes in both directions, tensors still as tensors."""
    n, c, h, w = image.shape
    means, stds = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return [
        image, image.stride(), baseline, baseline.stride(), saliency.contiguous(), thresholds, means, stds, temperature,
        n, thresholds.shape[1], c, h, w,
    ]  # fmt: skip


def _soft_perturb(
    image: Tensor,
    baseline: Tensor,
    saliency: Tensor,
    thresholds: Tensor,
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
    backend: str,
) -> Tensor:
    """The compiled forward pass; arguments are checked."""
    if backend == "triton":
        from counterlens.kernels.perturb import triton as _triton

        return _triton.soft_perturb(image, baseline, saliency, thresholds, temperature, mean, std)
    n, c, h, w = image.shape
    out = torch.empty((n, 2, thresholds.shape[1], c, h, w), dtype=image.dtype)
    function = cpu_module().soft_perturb_f64 if image.dtype == torch.float64 else cpu_module().soft_perturb_f32
    arguments = [*_soft_arguments(image, baseline, saliency, thresholds, temperature, mean, std), out]
    if not function(*_addresses(arguments), torch.get_num_threads()):
        raise _nan_error(saliency)
    return out


def _soft_perturb_backward(
    grad: Tensor,
    image: Tensor,
    baseline: Tensor,
    saliency: Tensor,
    thresholds: Tensor,
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
    image_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The compiled backward pass: gradients with respect to saliency and image (empty unless wanted)."""
    grad = grad.contiguous()
    if backend == "triton":
        from counterlens.kernels.perturb import triton as _triton

        return _triton.soft_perturb_backward(
            grad, image, baseline, saliency, thresholds, temperature, mean, std, image_wanted
        )
    grad_saliency = torch.empty(saliency.shape, dtype=saliency.dtype)
    grad_image = torch.empty(image.shape if image_wanted else 0, dtype=image.dtype)
    function = (
        cpu_module().soft_perturb_backward_f64
        if image.dtype == torch.float64
        else cpu_module().soft_perturb_backward_f32
    )
    arguments = _soft_arguments(image, baseline, saliency, thresholds, temperature, mean, std)
    arguments += [grad, grad_saliency, grad_image]
    function(*_addresses(arguments), torch.get_num_threads())
    return grad_saliency, grad_image


def _soft_fake(image: Tensor, baseline: Tensor, saliency: Tensor, thresholds: Tensor, *rest: Any) -> Tensor:
    n, c, h, w = image.shape
    return image.new_empty((n, 2, thresholds.shape[1], c, h, w))


def _soft_backward_fake(grad: Tensor, image: Tensor, baseline: Tensor, saliency: Tensor, *rest: Any) -> Any:
    image_wanted = rest[-2]
    return saliency.new_empty(saliency.shape), image.new_empty(image.shape if image_wanted else 0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, baseline, saliency, thresholds, *ctx.rest = inputs
    ctx.save_for_backward(image, baseline, saliency, thresholds)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image_wanted, saliency_wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    *numbers, backend = ctx.rest
    to_saliency, to_image = torch.ops.counterlens.soft_perturb_backward(
        grad, *ctx.saved_tensors, *numbers, image_wanted, backend
    )
    return (to_image if image_wanted else None, None, to_saliency if saliency_wanted else None, *[None] * 5)


_INPUTS = (
    "Tensor image, Tensor baseline, Tensor saliency, Tensor thresholds, float temperature, float[] mean, float[] std"
)
define_op(f"soft_perturb({_INPUTS}, str backend) -> Tensor", _soft_perturb, _soft_fake, _differentiate, _remember)
define_op(
    f"soft_perturb_backward(Tensor grad, {_INPUTS}, bool image_wanted, str backend) -> (Tensor, Tensor)",
    _soft_perturb_backward,
    _soft_backward_fake,
)


def soft_perturb(
    image: Tensor,  # [N, C, H, W]
    baseline: float | Tensor,  # a number, [C] or [1 or N, C, H, W]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    thresholds: Tensor | Sequence[float],  # [K] or [N, K]
    *,
    temperature: float,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trusted: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mix image and baseline by m = sigmoid((saliency - threshold) / temperature), and the other way round.

    Differentiable once, with respect to saliency and image. Masks are made again in the backward pass: no buffer of
    their size exists (the reference, plain torch, keeps them).

    Args:
        image, baseline, saliency, thresholds, mean, std, trusted: as for `perturb`; a NaN stays in its pixel.
        temperature: above 0; the smaller, the closer to `perturb`.
        backend: `auto`, `triton`, `cpp` (float32 and float64) or `reference`.

    Returns:
        [N, 2, K, C, H, W] in the image's dtype: index 0 is m * image + (1 - m) * baseline, 1 the reverse; normalised.

    Raises:
        ValueError: shapes, devices, thresholds, temperature, mean or std do not fit, or saliency holds NaN.
        TypeError: dtypes do not fit.
        BackendError: the named backend cannot run; the message says why.

    Source: LAX (arXiv 2605.18681), the differentiable approximation of MSI.
    """
    _check_image(image)
    if not saliency.is_floating_point():
        raise TypeError(f"saliency: expected a floating dtype, got {saliency.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    planes = _planes("saliency", saliency, image)
    hidden = _expand_baseline(baseline, image)
    levels = check_thresholds(thresholds, image.shape[0], image.device, trusted)
    means, stds = _check_normalisation(mean, std, image.shape[1])
    chosen = choose_backend(
        "soft_perturb", backend, image, lambda name: soft_not_supported_reasons(name, image, planes, hidden)
    )
    if chosen != "cpp" and not trusted:
        _refuse_nan(planes)
    compute = torch.promote_types(compute_dtype(image.dtype), compute_dtype(saliency.dtype))
    levels = levels.to(compute).contiguous()
    if chosen == "reference" or image.numel() == 0:
        mixed = _reference.soft_perturb(
            image.to(compute), hidden.to(compute), planes.to(compute), levels, float(temperature), means, stds
        )
        return mixed.to(image.dtype)
    result: Tensor = torch.ops.counterlens.soft_perturb(
        image, hidden, planes, levels, float(temperature), means, stds, chosen
    )
    return result
