"""Distances between sets of images in a feature space: FID and split FID, computed by torchmetrics, and KID."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CounterlensError, UsageError, install_hint
from ..models.freezing import frozen
from .inputs import check_computed, check_images

Features = Callable[[Tensor], Tensor]


def fid(
    real: Tensor,  # [N, C, H, W] in [0, 1]
    fake: Tensor,  # [M, C, H, W] in [0, 1]
    features: Features,
    *,
    batch_size: int = 64,
) -> float:
    """Fréchet distance between Gaussians fitted to two sets' features; biased upwards, the more so with few images.

    Counterfactuals beside their own originals share most pixels, which lowers it: see `sfid`.

    Args:
        features: a function or module from images [B, C, H, W] in [0, 1] to features [B, D]. With Inception's (2048)
            this is the FID of the literature, with another network's it can be compared only with itself.

    Raises:
        UsageError: fewer than two images, or shapes do not fit. CounterlensError: torchmetrics is missing.
        Warns (UserWarning) where there are fewer images than features: the covariances are singular then.

    Source: Heusel et al. (arXiv 1706.08500).
    """
    a, b = extract_features(real, features, batch_size), extract_features(fake, features, batch_size)
    warn_of_few(min(len(a), len(b)), a.shape[1], "FID")
    return frechet(a, b)


def sfid(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    counterfactuals: Tensor,  # [N, C, H, W] in [0, 1], of the images in their order
    features: Features,
    *,
    splits: int = 10,
    kept: Tensor | None = None,  # [N] bool
    groups: Tensor | None = None,  # [N]
    seed: int = 0,
    batch_size: int = 64,
) -> float:
    """Split FID: counterfactuals of one half against the originals of the other, both ways, averaged over splits.

    A counterfactual keeps most of its original; only across halves does FID ask whether it looks real. ACE's paper
    describes such halvings and its scripts make one: `splits=1`, with `kept` the counterfactuals that flip.

    Args:
        features: as for `fid`. splits: random halvings, drawn from `seed`.
        kept, groups: see `split_frechet`.

    Raises:
        UsageError, CounterlensError, warnings: as for `fid`; at least four images.

    Source: Jeanneret et al., ACE (arXiv 2303.09962), section 4.
    """
    if images.shape != counterfactuals.shape or len(images) < 4 or splits < 1:
        raise UsageError(
            f"counterfactuals: expected those of at least four images, and a split: {list(images.shape)}, "
            f"{list(counterfactuals.shape)}, splits {splits}"
        )
    a = extract_features(images, features, batch_size)
    b = extract_features(counterfactuals, features, batch_size)
    warn_of_few(len(a) // 2, a.shape[1], "split FID")
    return split_frechet(a, b, splits=splits, kept=kept, groups=groups, seed=seed)


def split_frechet(
    before: Tensor,  # [N, D] features of the images
    after: Tensor,  # [N, D] of their counterfactuals
    *,
    splits: int = 1,
    kept: Tensor | None = None,  # [N] bool
    groups: Tensor | None = None,  # [N] integers
    seed: int = 0,
) -> float:
    """`sfid` of features themselves; float64.

    Args:
        kept: of which images the counterfactuals count; all originals do. All without it.
        groups: halve each group in the order of the images, as LDCE's authors halve the classes: one split, not random.

    Raises:
        UsageError: groups and several splits, or a half has fewer than two images, or counterfactuals that are kept.
    """
    if groups is not None and splits != 1:
        raise UsageError(f"splits: groups are halved in one way, got {splits}")
    chosen = torch.ones(len(before), dtype=torch.bool) if kept is None else kept.cpu()
    g = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(splits):
        if groups is None:
            one, other = torch.randperm(len(before), generator=g).tensor_split([len(before) // 2])
        else:
            places = [(groups.cpu() == group).nonzero()[:, 0] for group in groups.unique().cpu()]
            one, other = (torch.cat(h) for h in zip(*(p.tensor_split([len(p) // 2]) for p in places), strict=True))
        for real, made in ((one, other), (other, one)):
            distances.append(frechet(before[real], after[made[chosen[made]]], "sFID"))
    return sum(distances) / len(distances)


def kid(
    real: Tensor,  # [N, C, H, W] in [0, 1]
    fake: Tensor,  # [M, C, H, W] in [0, 1]
    features: Features,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under a cubic kernel, without bias: mean and standard deviation over subsets.

    Args:
        features: as for `fid`. subset_size: images in a subset; 1000, or all where there are fewer.
        seed: of the subsets.

    Raises:
        UsageError: fewer than two images, or than a subset; shapes do not fit.

    Source: Binkowski et al. (arXiv 1801.01401).
    """
    a, b = extract_features(real, features, batch_size), extract_features(fake, features, batch_size)
    fewest = min(len(a), len(b))
    size = min(1000, fewest) if subset_size is None else subset_size
    if not 2 <= size <= fewest or subsets < 1:
        raise UsageError(f"subset_size: expected 2 to {fewest} (the images), got {size}; subsets: {subsets}")
    g = torch.Generator().manual_seed(seed)

    def subset(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=g)[:size]]

    found = torch.stack([kernel_distance(subset(a), subset(b)) for _ in range(subsets)])
    return _number("KID", found.mean()), _number("KID", found.std(unbiased=False))


def kernel_distance(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
) -> Tensor:
    """KID of features themselves, all of them as one subset; float64."""
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


class _AsGiven(nn.Module):
    """torchmetrics' feature network, where the images given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    name: str = "FID",
) -> float:
    """`fid` of features themselves; float64.

    Raises:
        UsageError: a set has fewer than two rows, which have no covariance. CounterlensError: torchmetrics is missing.
    """
    for rows, what in ((a, "images"), (b, "counterfactuals")):
        if len(rows) < 2:
            raise UsageError(f"{name}: a covariance needs two {what} at least, there {_are(len(rows))}")
    a, b = a.double(), b.double()
    try:
        from torchmetrics.image import fid as theirs
    except ImportError as error:
        raise CounterlensError(
            f"FID needs torchmetrics ({error}): {install_hint('quality')}; torchvision is not needed"
        ) from error
    metric: Any = theirs.FrechetInceptionDistance(_AsGiven(a.shape[1]))
    metric.update(a, real=True)
    metric.update(b, real=False)
    return _number(name, metric.compute())


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _number(name: str, value: Any) -> float:
    if not math.isfinite(value):
        raise CounterlensError(f"{name}: the features are too large for it, it comes to {float(value)}")
    return float(value)


def extract_features(
    images: Tensor,  # [N, C, H, W]
    features: Features,
    batch_size: int = 64,
) -> Tensor:
    """Features [N, D] in float64 on the CPU, batch by batch.

    Raises:
        UsageError: fewer than two images, or the function does not return [B, D]. NotFinite: it gives NaN or infinity.
    """
    check_images(images)
    if len(images) < 2:
        raise UsageError(f"images: expected at least two, got {list(images.shape)}")
    with torch.no_grad(), frozen(*([features] if isinstance(features, nn.Module) else [])):
        parts = [encoded("features", features, batch) for batch in images.split(batch_size)]
    everything = torch.cat(parts)
    check_computed("features", everything)
    return everything


def encoded(
    name: str,
    features: Features,
    images: Tensor,  # [B, C, H, W]
) -> Tensor:
    """Features of one batch, [B, D] in float64 on the CPU; NaN passes.

    Raises:
        UsageError: the function does not return [B, D]; the message begins with its name.
    """
    out = features(images)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"{name}: expected [{len(images)}, D] of images {list(images.shape)}, got {got}")
    return out.double().cpu()


def warn_of_few(images: int, features: int, name: str) -> None:
    """Warn where covariances are singular, in which case a Fréchet distance says little."""
    if images <= features:
        warnings.warn(
            f"{name}: {images} images for {features} features; the covariances are singular and the distance is "
            "unreliable: use more images, fewer features, or KID",
            stacklevel=3,
        )
