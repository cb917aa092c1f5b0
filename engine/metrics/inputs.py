"""Images, maps and baselines of a perturbation metric, checked and brought to one form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from counterlens.kernels.dispatch import FLOATING, compute_dtype
from counterlens.kernels.perturb import rank_pixels as _rank_seeded
from counterlens.kernels.perturb.reference import rank_pixels as _rank_by_permutation

from ..errors import NotFinite, UsageError

Baseline = Literal["mean", "zero", "blur", "noise"] | float | Tensor
Channels = Literal["together", "apart"]
Normalize = Literal["minmax", "none"]
Ties = Literal["random", "first", "last"]
NOISE_STREAM = 2**41  # beside the stream that breaks ties with the same seed
CONSTANT = "saliency: {count} of {all} maps are constant; they mark nothing (S = 0), their order is that of ties"


class ConstantMaps(UserWarning):
    """Maps, or counterfactuals, say nothing of where."""


said: ContextVar[bool] = ContextVar("said", default=False)  # this thread warned of these constant maps before


def check_images(images: Tensor) -> None:
    """Raise UsageError unless images are [N, C, H, W] of a floating dtype, finite, with at least one pixel."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.dtype not in FLOATING:
        got = f"{list(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"images: expected [N, C, H, W] of a floating dtype, got {got}")
    if 0 in images.shape[1:]:
        raise UsageError(f"images: expected at least one channel and pixel, got {list(images.shape)}")
    check_finite("images", images)


def check_finite(
    name: str,
    values: Tensor,  # [N, ...]
) -> None:
    """Raise UsageError where a sample holds NaN or infinity; the message says which ones."""
    bad = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise UsageError(f"{name}: expected finite values, got NaN or infinity in sample {shown}")


def check_computed(
    what: str,
    values: Tensor,  # [N, ...]
    samples: Tensor | None = None,  # [N] whose they are; each its own without it
) -> None:
    """Raise NotFinite where something that was computed is NaN or infinite: a map of it would look empty."""
    wrong = ~values.isfinite()
    bad = (wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong).nonzero().flatten().cpu()
    if len(bad):
        raise NotFinite(what, (bad if samples is None else samples.cpu()[bad].unique()).tolist())


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    """Raise UsageError unless mean and std are both there, of one number per channel and std above 0, or neither is."""
    if mean is None and std is None:
        return
    if mean is None or std is None:
        raise UsageError(f"{'mean' if mean is None else 'std'}: expected both mean and std, or neither")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise UsageError(f"{name}: expected {channels} numbers, one per channel, got {len(values)}")
    if not all(v > 0 for v in std):
        raise UsageError(f"std: expected numbers above 0, got {list(std)}")


def sample_seeds(seeds: int | Sequence[int], samples: int) -> list[int]:
    """One seed per sample.

    Raises:
        UsageError: their number is not that of the samples.
    """
    chosen = [seeds] * samples if isinstance(seeds, int) else [int(s) for s in seeds]
    if len(chosen) != samples:
        raise UsageError(f"seeds: expected a number or {samples} of them, got {len(chosen)}")
    return chosen


def saliency_planes(
    saliency: Tensor,
    images: Tensor,  # [N, C, H, W]
    channels: Channels,
) -> Tensor:
    """Maps as [N, H, W], or with channels apart as [N, C * H, W]: what is ranked together is one plane.

    Raises:
        UsageError: sizes do not fit (both are named), a value is not finite, or `channels` is unknown.
    """
    if channels not in ("together", "apart"):
        raise UsageError(f"channels: expected together or apart, got {channels!r}")
    n, c, h, w = images.shape
    if not isinstance(saliency, Tensor) or not saliency.is_floating_point():
        got = saliency.dtype if isinstance(saliency, Tensor) else type(saliency).__name__
        raise UsageError(f"saliency: expected a tensor of a floating dtype, got {got}")
    shapes: list[tuple[int, ...]] = [(n, h, w), (n, 1, h, w)]
    if channels == "apart":
        shapes.append((n, c, h, w))
    if tuple(saliency.shape) not in shapes:
        expected = " or ".join(str(list(s)) for s in shapes)
        hint = "; sum it over channels, or use channels='apart'" if tuple(saliency.shape) == (n, c, h, w) else ""
        raise UsageError(
            f"saliency: expected {expected} beside images {list(images.shape)}, got {list(saliency.shape)}{hint}"
        )
    if saliency.device != images.device:
        raise UsageError(f"saliency: expected the images' device {images.device}, got {saliency.device}")
    planes = saliency.detach().to(compute_dtype(saliency.dtype))
    planes = planes[:, None] if planes.ndim == 3 else planes
    planes = planes.expand(n, c, h, w).reshape(n, c * h, w) if channels == "apart" else planes[:, 0]
    check_finite("saliency", planes)
    return planes


def constant_maps(
    planes: Tensor,  # [N, H, W]
    message: str = CONSTANT,
) -> Tensor:
    """Which maps are constant: [N] bool; one warning for all of them."""
    flat = planes.flatten(1)
    constant = flat.amax(1) == flat.amin(1)
    if (count := int(constant.sum())) and not said.get():
        warnings.warn(message.format(count=count, all=len(planes)), ConstantMaps, stacklevel=3)
    return constant


def unit_planes(
    planes: Tensor,  # [N, H, W]
    constant: Tensor,  # [N] bool
    normalize: Normalize,
) -> Tensor:
    """Maps with values in [0, 1], to be compared with thresholds: [N, H, W]. A constant map is 0 everywhere.

    Raises:
        UsageError: `none` with values outside [0, 1], or another name.
    """
    if normalize == "minmax":
        low = planes.amin((1, 2), keepdim=True)
        span = planes.amax((1, 2), keepdim=True) - low
        unit = (planes - low) / torch.where(span > 0, span, 1)
    elif normalize == "none":
        unit = planes
        low_value, high_value = (float(planes.min()), float(planes.max())) if planes.numel() else (0.0, 0.0)
        if low_value < 0 or high_value > 1:
            raise UsageError(
                f"saliency: expected values in [0, 1] with normalize='none', got {low_value:g} to {high_value:g}"
            )
    else:
        raise UsageError(f"normalize: expected minmax or none, got {normalize!r}")
    return unit.masked_fill(constant[:, None, None], 0)


def rank_planes(
    planes: Tensor,  # [N, H, W]
    ties: Ties,
    seeds: list[int],
    finer: Tensor | None = None,  # [N, H, W]
) -> Tensor:
    """Rank of each pixel, 0 most salient: [N, H, W] int32.

    Equal pixels are ordered by `finer`, where that is given; what is equal then by a permutation from the sample's seed
    (`random`), or by index from the `first` or `last`.

    Raises:
        UsageError: `ties` is unknown.
    """
    if finer is not None:
        order = rank_planes(finer, ties, seeds).flatten(1).argsort(1)
        return _rank_by_permutation(planes, order).int()
    n, pixels = len(planes), planes[0].numel() if len(planes) else 0
    if ties == "random":
        return _rank_seeded(planes, seeds).int()
    if ties not in ("first", "last"):
        raise UsageError(f"ties: expected random, first or last, got {ties!r}")
    index = torch.arange(pixels, device=planes.device)
    order = index if ties == "first" else index.flip(0)
    return _rank_by_permutation(planes, order.expand(n, -1)).int()


def make_baseline(
    baseline: Baseline,
    images: Tensor,  # [N, C, H, W]
    seeds: list[int],
) -> float | Tensor:
    """What hides a pixel, as `kernels.perturb` takes it.

    Args:
        baseline: `mean` (each image's own mean colour), `zero`, `blur` (Gaussian, sigma = H / 8), `noise` (uniform in
            [0, 1], from the sample's seed), a number, or a tensor: [C] (the training set's mean colour, say), or
            [1 or N, C, H, W] (a counterfactual, say).

    Raises:
        UsageError: the name or the tensor's shape or dtype does not fit.
    """
    n, c, h, w = images.shape
    if isinstance(baseline, Tensor):
        if baseline.shape not in ((), (c,), (1, c, h, w), (n, c, h, w)):
            raise UsageError(
                f"baseline: expected a number, [{c}] or [1 or {n}, {c}, {h}, {w}] beside images {list(images.shape)}, "
                f"got {list(baseline.shape)}"
            )
        if not baseline.is_floating_point() or not bool(baseline.isfinite().all()):
            raise UsageError(f"baseline: expected finite values of a floating dtype, got {baseline.dtype}")
        return baseline.detach().to(images.device, images.dtype)
    if isinstance(baseline, int | float) and not isinstance(baseline, bool) and math.isfinite(baseline):
        return float(baseline)
    if baseline == "zero":
        return 0.0
    if baseline == "mean":
        return images.detach().mean((2, 3), keepdim=True).expand(n, c, h, w)
    if baseline == "blur":
        return blur(images.detach(), h / 8)
    if baseline == "noise":
        drawn = [torch.rand(c, h, w, generator=torch.Generator().manual_seed(s + NOISE_STREAM)) for s in seeds]
        stacked = torch.stack(drawn) if drawn else torch.empty(0, c, h, w)
        return stacked.to(images.device, images.dtype)
    raise UsageError(f"baseline: expected mean, zero, blur, noise, a number or a tensor, got {baseline!r}")


def blur(
    images: Tensor,  # [N, C, H, W]
    sigma: float,  # pixels
) -> Tensor:
    """Gaussian blur, cut at three sigma, edges mirrored: [N, C, H, W]."""
    n, c, h, w = images.shape
    compute = compute_dtype(images.dtype)
    out = images.to(compute).reshape(n * c, 1, h, w)
    for size, shape in ((h, (1, 1, -1, 1)), (w, (1, 1, 1, -1))):
        radius = min(max(1, round(3 * sigma)), size - 1)
        steps = torch.arange(-radius, radius + 1, dtype=compute, device=images.device)
        weights = torch.exp(-0.5 * (steps / sigma) ** 2)
        pad = (0, 0, radius, radius) if shape[2] == -1 else (radius, radius, 0, 0)
        out = F.conv2d(F.pad(out, pad, mode="reflect"), (weights / weights.sum()).reshape(shape))
    return out.reshape(n, c, h, w).to(images.dtype)
