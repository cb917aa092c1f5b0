"""ROAD: removed pixels are filled in from their neighbours, so that the mask itself tells the classifier nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from counterlens.kernels.perturb.reference import normalised

from ..errors import CounterlensError, UsageError
from .curves import Fill, run
from .inputs import NOISE_STREAM, Ties, check_images, constant_maps, rank_planes, saliency_planes, sample_seeds
from .paths import Faithfulness, check_shares, score_of
from .quantities import Explained, Quantity

NEIGHBOURS = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=torch.float64) / 12
SHARES = tuple(i / 10 for i in range(1, 10))
TOLERANCE = 1e-10  # of the residual, relative to the right-hand side
MOST_ITERATIONS = 20_000


def impute(
    images: Tensor,  # [N, C, H, W]
    removed: Tensor,  # [N, H, W] bool
) -> Tensor:
    """Fill removed pixels so that each is the weighted mean of its eight neighbours: [N, C, H, W].

    Weights are 1/6 for direct and 1/12 for diagonal neighbours, renormalised at the border. The sparse system is
    symmetric and positive definite wherever a pixel is known, and solved for all images at once by conjugate gradients
    in float64, from a coarse-to-fine guess. Where no pixel is known, the result is the image's mean colour.

    Raises:
        CounterlensError: no solution within 20,000 iterations.

    Source: Rong, Leemann et al., ROAD (arXiv 2202.00449), section 4.
    """
    h, w = images.shape[2:]
    hole = removed[:, None].to(torch.float64)  # [N, 1, H, W]
    known = 1 - hole
    x = images.double()
    kernel = NEIGHBOURS.to(x.device)[None, None]
    weight = F.conv2d(torch.ones(1, 1, h, w, dtype=x.dtype, device=x.device), kernel, padding=1)

    def neighbours(v: Tensor) -> Tensor:
        return F.conv2d(v.reshape(-1, 1, h, w), kernel, padding=1).view_as(v)

    def system(v: Tensor) -> Tensor:  # v is 0 outside the holes
        return hole * (weight * v - neighbours(v))

    right = hole * neighbours(known * x)
    v = hole * _coarse_fill(known * x, known)
    residual = right - system(v)
    # Diagonal preconditioner: only the border's differs from 1.
    z = residual / weight
    direction, squared = z, (residual * z).sum((2, 3), keepdim=True)
    limit = (TOLERANCE**2) * (right * right / weight).sum((2, 3), keepdim=True)
    for step in range(MOST_ITERATIONS):
        # Looking costs a wait for the device: every eighth step.
        if step % 8 == 0 and bool((squared <= limit).all()):
            break
        product = system(direction)
        curvature = (direction * product).sum((2, 3), keepdim=True)
        length = torch.where(curvature > 0, squared / curvature, 0)
        v = v + length * direction
        residual = residual - length * product
        z = residual / weight
        before, squared = squared, (residual * z).sum((2, 3), keepdim=True)
        direction = z + torch.where(before > 0, squared / before, 0) * direction
    else:
        raise CounterlensError(
            f"impute: no solution within {MOST_ITERATIONS} iterations for images {list(images.shape)}"
        )
    nothing = removed.flatten(1).all(1)[:, None, None, None]
    filled = torch.where(nothing, x.mean((2, 3), keepdim=True), v)
    return torch.where(removed[:, None], filled, x).to(images.dtype)


def _coarse_fill(
    values: Tensor,  # [N, C, H, W], 0 where unknown
    known: Tensor,  # [N, 1, H, W], 1 where known
) -> Tensor:
    """Means of known pixels in ever larger squares, wherever the smaller one holds none: [N, C, H, W]."""
    h, w = values.shape[2:]
    if h == 1 and w == 1:
        return values
    pad = (0, w % 2 if w > 1 else 0, 0, h % 2 if h > 1 else 0)
    kernel = (min(h, 2), min(w, 2))
    share = F.avg_pool2d(F.pad(known, pad), kernel)
    mean = F.avg_pool2d(F.pad(values, pad), kernel) / share.clamp(min=1e-12)
    coarse = _coarse_fill(mean * (share > 0), (share > 0).to(values.dtype))
    return torch.where(known > 0, values, F.interpolate(coarse, size=(h + pad[3], w + pad[1]))[:, :, :h, :w])


def road(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    first: Literal["most", "least"] = "most",
    shares: Sequence[float] | None = None,
    noise: float = 0.01,
    quantity: Quantity | None = None,
    compat: Literal["quantus"] | None = None,
    ties: Ties | None = None,
    seeds: int | Sequence[int] = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
) -> Faithfulness:
    """Remove and debias: hide a share of the pixels by noisy linear imputation, and ask again.

    Args:
        first: `most` salient pixels are removed first (MoRF: the score is the better, the lower), or the `least` (LeRF:
            the higher).
        shares: of the pixels to remove; 0.1, 0.2, ... 0.9, the paper's.
        noise: standard deviation of what is added to filled pixels; one field per sample, from its seed.
        quantity: `correct` by default: whether the target is still predicted, so that the mean score is an accuracy.
        compat: `quantus` removes 1, 3, ... 99 % with the fraction cut off, ties by index. Its own ROAD takes images of
            one channel only (0.6.0).
        classifier, images, saliency, target, ties, seeds, mean, std, batch_size: as for `perturbation_curve`.

    Returns:
        The score is the mean of the values over the shares.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: Rong, Leemann et al., A consistent and efficient evaluation strategy for attribution methods (ROAD, arXiv
        2202.00449).
    """
    check_images(images)
    if first not in ("most", "least"):
        raise UsageError(f"first: expected most or least, got {first!r}")
    if compat not in (None, "quantus"):
        raise UsageError(f"compat: road has quantus, got {compat!r}")
    if not noise >= 0:
        raise UsageError(f"noise: expected 0 or more, got {noise}")
    explained = Explained(classifier, quantity or "correct")
    n, c, h, w = images.shape
    chosen = sample_seeds(seeds, n)
    planes = saliency_planes(saliency, images, "together")
    constant_maps(planes)
    pixels = h * w
    if compat == "quantus" and shares is None:
        removed = torch.tensor([int(pixels * percent / 100) for percent in range(1, 100, 2)])
    else:
        removed = check_shares(SHARES if shares is None else shares, pixels)
    rank = rank_planes(planes, ties or ("first" if compat == "quantus" else "random"), chosen)
    field = torch.stack(
        [torch.randn(c, h, w, generator=torch.Generator().manual_seed(s + NOISE_STREAM)) for s in chosen]
        or [torch.empty(c, h, w)]
    ).to(images.device, images.dtype)  # fmt: skip
    normalise = (mean or (), std or ()) if mean is not None else ((), ())

    def fill(out: Tensor, start: int, stop: int, below: bool, marked: Tensor) -> None:
        part, count = slice(start, stop), marked.shape[1]
        top = rank[part, None] < marked.to(rank.device)[:, :, None, None]  # [n, K, H, W]
        gone = (top if below else ~top).flatten(0, 1)
        whole = images[part].repeat_interleave(count, 0)
        filled = impute(whole, gone) + noise * field[part].repeat_interleave(count, 0) * gone[:, None]
        out.copy_(normalised(filled, *normalise).view_as(out))

    counts = (removed if first == "most" else pixels - removed).expand(n, -1)
    filler: Fill = fill
    targets, values, plan = run(
        explained, normalised(images, *normalise), counts, pixels, "below" if first == "most" else "above", filler,
        target, batch_size,
    )  # fmt: skip
    curve = values[plan.place][:, 0]
    along = removed.double() / pixels
    score = score_of(curve, along, values[:n], "mean")
    return Faithfulness(score, curve, along, values[:n], targets, len(values), n + plan.place.numel())
