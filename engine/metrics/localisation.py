"""Whether maps lie where a given mask says that the evidence is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .inputs import check_finite
from .masking import mean_ranks


def pointing_game(
    saliency: Tensor,  # [N, H, W]
    masks: Tensor,  # [N, H, W] bool
) -> Tensor:
    """Whether a largest value of each map is inside its mask: [N], 1 or 0.

    Raises:
        UsageError: sizes do not fit, a map is not finite, or a mask has no pixel.

    Source: Zhang et al., Top-down neural attention by excitation backprop (arXiv 1608.00507). quantus.PointingGame.
    """
    maps, inside = _checked(saliency, masks)
    return ((maps == maps.amax(1, keepdim=True)) & inside).any(1).double()


def relevance_mass(
    saliency: Tensor,  # [N, H, W], not negative
    masks: Tensor,  # [N, H, W] bool
) -> Tensor:
    """Share of each map's sum that is inside its mask: [N] in [0, 1]; NaN for a map that is zero everywhere.

    Raises:
        UsageError: sizes do not fit, a map is not finite, or a mask has no pixel.

    Source: Arras et al., CLEVR-XAI (arXiv 2003.07258), section 3.2. quantus.RelevanceMassAccuracy.
    """
    maps, inside = _checked(saliency, masks)
    return (maps * inside).sum(1) / maps.sum(1)


def relevance_rank(
    saliency: Tensor,  # [N, H, W]
    masks: Tensor,  # [N, H, W] bool
) -> Tensor:
    """Share of the k largest values that are inside the mask of k pixels: [N] in [0, 1].

    Raises:
        UsageError: sizes do not fit, a map is not finite, or a mask has no pixel.

    Source: Arras et al., CLEVR-XAI (arXiv 2003.07258), section 3.2. quantus.RelevanceRankAccuracy.
    """
    maps, inside = _checked(saliency, masks)
    places = inside.gather(1, (-maps).argsort(dim=1, stable=True))
    sizes = inside.sum(1)
    first = torch.arange(maps.shape[1]) < sizes[:, None]
    return (places & first).sum(1) / sizes.double()


def mask_auc(
    saliency: Tensor,  # [N, H, W]
    masks: Tensor,  # [N, H, W] bool
) -> Tensor:
    """Area under the ROC curve of each map as a score of being inside its mask: [N] in [0, 1].

    Raises:
        UsageError: sizes do not fit, a map is not finite, or a mask has no pixel or all of them.

    Source: Fawcett, An introduction to ROC analysis (2006), by the mean rank of what is inside. quantus.AUC.
    """
    maps, inside = _checked(saliency, masks)
    if full := inside.all(1).nonzero().flatten().tolist():
        raise UsageError(f"masks: mask {full[0]} has all pixels: nothing is outside")
    positive = inside.sum(1).double()
    negative = maps.shape[1] - positive
    ranks = (mean_ranks(maps) * inside).sum(1)
    return (ranks - positive * (positive + 1) / 2) / (positive * negative)


def top_k_intersection(
    saliency: Tensor,  # [N, H, W]
    masks: Tensor,  # [N, H, W] bool
    k: int = 1000,
    relative: bool = False,
) -> Tensor:
    """Share of the k largest values that are inside the mask: [N].

    Args:
        relative: divided by the mask's share of all pixels (Quantus' `concept_influence`).

    Raises:
        UsageError: sizes or k do not fit, a map is not finite, or a mask has no pixel.

    Source: Theiner et al., Interpretable semantic photo geolocation (arXiv 2104.14995). quantus.TopKIntersection.
    """
    maps, inside = _checked(saliency, masks)
    if not 1 <= k <= maps.shape[1]:
        raise UsageError(f"k: expected 1 to {maps.shape[1]}, the pixels of a map, got {k}")
    share = inside.gather(1, (-maps).argsort(dim=1, stable=True)[:, :k]).double().mean(1)
    return share * maps.shape[1] / inside.sum(1) if relative else share


def _checked(saliency: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [N, P] float64 and masks [N, P] bool on the CPU."""
    if not isinstance(saliency, Tensor) or saliency.ndim != 3 or not saliency.is_floating_point():
        raise UsageError("saliency: expected maps [N, H, W] of a floating dtype")
    if not isinstance(masks, Tensor) or masks.shape != saliency.shape or masks.is_floating_point():
        got = f"{list(masks.shape)} of {masks.dtype}" if isinstance(masks, Tensor) else type(masks).__name__
        raise UsageError(f"masks: expected {list(saliency.shape)} bool, as the maps, got {got}")
    check_finite("saliency", saliency)
    inside = masks.bool().flatten(1).cpu()
    if empty := (~inside.any(1)).nonzero().flatten().tolist():
        raise UsageError(f"masks: mask {empty[0]} has no pixel inside: nothing can be found there")
    return saliency.detach().double().flatten(1).cpu(), inside
