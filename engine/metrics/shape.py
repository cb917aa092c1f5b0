"""How maps look, whatever they say: no model is asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .inputs import check_finite
from .masking import mean_ranks

TOP = 0.1  # share of pixels of which islands are made


def sparseness(
    saliency: Tensor,  # [N, ...]
) -> Tensor:
    """Gini coefficient of each map's magnitudes: [N] in [0, 1], 0 for a constant map, the higher the sparser.

    Raises:
        UsageError: maps are not finite.

    Source: Chalasani et al., Concise explanations of neural networks (arXiv 1810.06583). quantus.Sparseness.
    """
    ascending = (_magnitudes(saliency) + 1e-7).sort(dim=1).values
    n = ascending.shape[1]
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return (weights * ascending).sum(1) / (n * ascending.sum(1))


def complexity(
    saliency: Tensor,  # [N, ...]
) -> Tensor:
    """Entropy in nats of each map's magnitudes as shares of their sum: [N], the lower the simpler; NaN for a zero map.

    Raises:
        UsageError: maps are not finite.

    Source: Bhatt et al., Evaluating and aggregating feature-based model explanations (arXiv 2005.00631), section 4.
        quantus.Complexity.
    """
    magnitudes = _magnitudes(saliency)
    shares = magnitudes / magnitudes.sum(1, keepdim=True)
    return -(shares * (shares + 1e-12).log()).sum(1)


def effective_complexity(
    saliency: Tensor,  # [N, ...]
    threshold: float = 1e-5,
) -> Tensor:
    """How many values of each map exceed a threshold in magnitude: [N], the lower the simpler.

    Args:
        threshold: Quantus', for maps of magnitude 1.

    Raises:
        UsageError: maps are not finite.

    Source: Nguyen and Rodriguez Martinez, On quantitative aspects of model interpretability (arXiv 2007.07584),
        section 3.2. quantus.EffectiveComplexity.
    """
    return (_magnitudes(saliency) > threshold).sum(1).double()


def islands(
    scores: Tensor,  # [N, H, W]
    share: float = TOP,
) -> Tensor:
    """Median size in pixels of the connected parts of each map's largest values: [N].

    Args:
        share: of pixels that count as largest, in (0, 1]; at least one. Pixels that touch by a side or a corner are
            connected; equal values count from the top left.

    Raises:
        UsageError: the share is out of range.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share: expected a number in (0, 1], got {share}")
    n, h, w = scores.shape
    flat = scores.detach().flatten(1).cpu()
    top = flat.argsort(dim=1, descending=True, stable=True)[:, : max(1, round(share * h * w))]
    marked = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, top, value=True).reshape(n, 1, h, w)
    # Each marked pixel takes the largest number among its neighbours until nothing changes: one number per part.
    numbers = torch.arange(1, h * w + 1, dtype=torch.float64).reshape(1, 1, h, w) * marked
    while True:
        spread = F.max_pool2d(numbers, 3, 1, 1) * marked
        if torch.equal(spread, numbers):
            break
        numbers = spread
    sizes = [part[part > 0].unique(return_counts=True)[1].double() for part in numbers.flatten(1)]
    return torch.stack([own.quantile(0.5) for own in sizes]) if sizes else torch.zeros(0, dtype=torch.float64)


def rank_variation(
    scores: Tensor,  # [N, H, W]
) -> Tensor:
    """Mean difference in rank of neighbouring pixels, as a share of all ranks: [N] in [0, 1]; a third for noise."""
    n, h, w = scores.shape
    ranks = mean_ranks(scores.detach().flatten(1).cpu()).reshape(n, h, w) / (h * w)
    steps = torch.cat([ranks.diff(dim=1).abs().flatten(1), ranks.diff(dim=2).abs().flatten(1)], 1)
    return steps.mean(1) if steps.shape[1] else torch.zeros(n, dtype=torch.float64)


def _magnitudes(saliency: Tensor) -> Tensor:
    if not isinstance(saliency, Tensor) or saliency.ndim < 2 or not saliency.is_floating_point():
        raise UsageError(f"saliency: expected maps [N, ...] of a floating dtype, got {type(saliency).__name__}")
    check_finite("saliency", saliency)
    return saliency.detach().abs().double().flatten(1).cpu()
