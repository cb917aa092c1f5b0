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
from .inputs import (
    NOISE_STREAM,
    Ties,
    check_finite,
    check_images,
    check_normalisation,
    constant_maps,
    rank_planes,
    saliency_planes,
    sample_seeds,
)
from .paths import Faithfulness, check_shares, score_of
from .quantities import Explained, QuantityLike

SHARES = tuple(i / 10 for i in range(1, 10))
TOLERANCE = 1e-10  # of the largest residual, relative to the right-hand side's largest value
MOST_ITERATIONS = 1_000
DAMPING = 0.8  # of Jacobi steps


def impute(
    images: Tensor,  # [N, C, H, W]
    removed: Tensor,  # [N, H, W] bool
    *,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Fill removed pixels so that each is the weighted mean of its eight neighbours: [N, C, H, W].

    Weights are 1/6 for direct and 1/12 for diagonal neighbours, renormalised at the border. The sparse system is
    symmetric and positive definite wherever a pixel is known. It is solved for all images and channels at once, in
    float64, by conjugate gradients preconditioned with a multigrid cycle: holes of any size take about as many
    iterations. Where no pixel is known, the result is the image's mean colour.

    Args:
        tolerance: of the largest residual, relative to the right-hand side's largest value.

    Raises:
        CounterlensError: no solution within 1,000 iterations.

    Source: Rong, Leemann et al., ROAD (arXiv 2202.00449), section 4.
    """
    check_finite("images", images)
    x = images.double()
    holes = [removed[:, None].double()]  # [N, 1, h, w] of every grid
    while max(holes[-1].shape[2:]) > 2:
        # A coarse pixel is removed where all that it stands for is: some pixel stays known.
        holes.append(-F.max_pool2d(-holes[-1], 2, ceil_mode=True))
    weights = [neighbours(torch.ones_like(hole[:1])) for hole in holes]
    right = holes[0] * neighbours(x - holes[0] * x)
    v, residual = torch.zeros_like(right), right
    direction, squared = torch.zeros_like(right), torch.zeros_like(right[..., :1, :1])
    limit = tolerance * right.abs().amax((2, 3), keepdim=True)
    for _ in range(MOST_ITERATIONS):
        if bool((residual.abs().amax((2, 3), keepdim=True) <= limit).all()):
            break
        z = _cycle(holes, weights, residual)
        before, squared = squared, (residual * z).sum((2, 3), keepdim=True)
        direction = z + torch.where(before > 0, squared / before, 0) * direction
        product = _system(holes[0], weights[0], direction)
        curvature = (direction * product).sum((2, 3), keepdim=True)
        length = torch.where(curvature > 0, squared / curvature, 0)
        v = v + length * direction
        residual = residual - length * product
    else:
        raise CounterlensError(f"impute: {list(images.shape)}: no solution within {MOST_ITERATIONS} iterations")
    nothing = removed.flatten(1).all(1)[:, None, None, None]
    filled = torch.where(nothing, x.mean((2, 3), keepdim=True), v)
    return torch.where(removed[:, None], filled, x).to(images.dtype)


def neighbours(
    v: Tensor,  # [N, C, H, W]
) -> Tensor:
    """Weighted sum of each pixel's eight neighbours, 0 beyond the border: [N, C, H, W]."""
    # The weights are the outer product of (1, 2, 1) with itself but for the middle, over 12.
    padded = F.pad(v, (1, 1, 1, 1))
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:] - 4 * v) / 12


def _system(hole: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """What the removed pixels `v` (0 elsewhere) lack of being the mean of their neighbours."""
    return hole * (weight * v - neighbours(v))


def _cycle(holes: list[Tensor], weights: list[Tensor], residual: Tensor) -> Tensor:
    """One symmetric multigrid V-cycle: Jacobi steps, a correction from the grid of half the size, Jacobi steps."""
    hole, weight = holes[0], weights[0]
    v = DAMPING * residual / weight
    v = v + DAMPING * (residual - _system(hole, weight, v)) / weight
    if len(holes) > 1:
        rest = residual - _system(hole, weight, v)
        h, w = rest.shape[2:]
        rest = F.pad(rest, (0, w % 2, 0, h % 2))
        coarse = holes[1] * _halve(_halve(rest, 2), 3)
        v = v + hole * _double(_double(_cycle(holes[1:], weights[1:], coarse), 2), 3)[:, :, :h, :w]
    for _ in range(2):
        v = v + DAMPING * (residual - _system(hole, weight, v)) / weight
    return v


def _double(v: Tensor, dim: int) -> Tensor:
    """Linear interpolation to twice the size along a dimension, constant beyond the border."""
    size = v.shape[dim]
    before = torch.cat([v.narrow(dim, 0, 1), v.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([v.narrow(dim, 1, size - 1), v.narrow(dim, size - 1, 1)], dim)
    return torch.stack([0.75 * v + 0.25 * before, 0.75 * v + 0.25 * after], dim + 1).flatten(dim, dim + 1)


def _halve(v: Tensor, dim: int) -> Tensor:
    """The transpose of `_double`, which keeps the cycle symmetric."""
    even, odd = v.unflatten(dim, (-1, 2)).unbind(dim + 1)
    size = even.shape[dim]
    out = 0.75 * (even + odd)
    out.narrow(dim, 0, size - 1).add_(even.narrow(dim, 1, size - 1), alpha=0.25)
    out.narrow(dim, 1, size - 1).add_(odd.narrow(dim, 0, size - 1), alpha=0.25)
    out.narrow(dim, 0, 1).add_(even.narrow(dim, 0, 1), alpha=0.25)
    out.narrow(dim, size - 1, 1).add_(odd.narrow(dim, size - 1, 1), alpha=0.25)
    return out


def road(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    first: Literal["most", "least"] = "most",
    shares: Sequence[float] | None = None,
    noise: float = 0.01,
    quantity: QuantityLike | None = None,
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
    check_normalisation(mean, std, images.shape[1])
    if first not in ("most", "least"):
        raise UsageError(f"first: expected most or least, got {first!r}")
    if compat not in (None, "quantus"):
        raise UsageError(f"compat: road has quantus, got {compat!r}")
    if not 0 <= noise < torch.inf:
        raise UsageError(f"noise: expected a number from 0 on, got {noise}")
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
