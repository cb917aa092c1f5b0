"""Whether a map says what hiding pixels does: the field's metrics beside insertion, deletion, MSI and ROAD.

Images and masks are folded into full forward batches. Where a definition agrees with Quantus', so do the numbers, with
`channels="apart"`, the baseline `darkest(images)` and the conventions that each docstring names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ..errors import UsageError
from .curves import perturbation_curve
from .inputs import rank_planes
from .masking import Case, MaskOptions, make_case, pearson, spearman
from .paths import Faithfulness

SUBSET_STREAM = 2**42  # beside the streams of ties and of noise
Segments = Tensor | Callable[[Tensor], Tensor] | Literal["grid"]
SIMILARITIES = {"pearson": pearson, "spearman": spearman}


def darkest(
    images: Tensor,  # [N, C, H, W]
) -> Tensor:
    """Quantus' "black": each image's own smallest value, as a baseline [N, C, H, W]."""
    return images.amin((1, 2, 3), keepdim=True).expand_as(images)


def faithfulness_correlation(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W]; with channels apart also [N, C, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    subset_size: int = 224,
    runs: int = 100,
    subsets: Tensor | None = None,  # [N, R, S]
    similarity: Literal["pearson", "spearman"] = "pearson",
    **options: Unpack[MaskOptions],
) -> Tensor:
    """Correlation of the map's sum over random pixels with what hiding them takes away, the higher the better: [N].

    Args:
        subset_size: pixels in a subset. runs: subsets of each image, from its seed.
        subsets: the subsets themselves, as indices of pixels (of all channels, with channels apart).
        options: see `MaskOptions`; the rest as for `perturbation_curve`.

    Returns:
        [N] float64 in [-1, 1]; NaN where the map or the effect is the same in every subset.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: the classifier gives NaN or infinity.

    Source: Bhatt et al., Evaluating and aggregating feature-based model explanations (arXiv 2005.00631), section 4.
        quantus.FaithfulnessCorrelation with `absolute`, and `subsets` as it draws them.
    """
    case = make_case(classifier, images, saliency, options)
    flat = case.planes.flatten(1)
    pixels = flat.shape[1]
    if subsets is None:
        if not 1 <= subset_size <= pixels or runs < 2:
            raise UsageError(
                f"subset_size, runs: expected 1 to {pixels} pixels and 2 runs or more, got {subset_size} and {runs}"
            )
        generators = (torch.Generator().manual_seed(seed + SUBSET_STREAM) for seed in case.seeds)
        drawn = [torch.rand(runs, pixels, generator=g).topk(subset_size, dim=1).indices for g in generators]
        subsets = torch.stack(drawn) if drawn else torch.empty(0, runs, subset_size, dtype=torch.long)
    within = ((subsets >= 0) & (subsets < pixels)).all()
    if subsets.ndim != 3 or len(subsets) != len(flat) or not within:
        raise UsageError(f"subsets: expected [{len(flat)}, R, S] of indices below {pixels}, got {list(subsets.shape)}")
    chosen = subsets.to(images.device)
    _, c, h, w = case.shape

    def masks(first: int, stop: int, which: Tensor) -> Tensor:
        here = chosen[first:stop].gather(1, which[:, :, None].to(chosen.device).expand(-1, -1, chosen.shape[2]))
        hide = torch.zeros(*here.shape[:2], pixels, dtype=torch.bool, device=images.device)
        return hide.scatter_(2, here, value=True).reshape(*here.shape[:2], c, h, w)

    found = case.run(masks, chosen.shape[1], target)
    sums = flat.double().gather(1, chosen.flatten(1)).reshape(chosen.shape).sum(2)
    return _similarity(similarity)(sums.cpu(), found.full[:, None] - found.values)


def faithfulness_estimate(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W]; with channels apart also [N, C, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    per_step: int = 1,
    similarity: Literal["pearson", "spearman"] = "pearson",
    **options: Unpack[MaskOptions],
) -> Tensor:
    """Correlation of the map with what hiding its pixels one after the other (each alone) takes away: [N] in [-1, 1].

    Args:
        per_step: neighbours in the map's order that are hidden together.
        options: see `MaskOptions`.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: the classifier gives NaN or infinity.

    Source: Alvarez-Melis and Jaakkola, Towards robust interpretability (arXiv 1806.07538), section 5.1.
        quantus.FaithfulnessEstimate with `normalize="max"`.
    """
    case = make_case(classifier, images, saliency, options)
    _positive("per_step", per_step)
    groups = rank_planes(case.planes, "random", case.seeds).flatten(1).long() // per_step
    count = math.ceil(groups.shape[1] / per_step)
    found = case.run(case.grouped(groups), count, target)
    return _similarity(similarity)(_sums(case.planes, groups, count), found.full[:, None] - found.values)


def monotonicity(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W]; with channels apart also [N, C, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    per_step: int = 1,
    rule: Literal["all", "share"] = "all",
    **options: Unpack[MaskOptions],
) -> Tensor:
    """Whether the quantity never falls while pixels are shown, least salient first: [N], 1 or 0; `share`: how often.

    Quantus' Monotonicity is not this: it fills pixels with the baseline that they have already, and is always true.

    Args:
        per_step: pixels shown at once. options: see `MaskOptions`.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: the classifier gives NaN or infinity.

    Source: Arya et al., One explanation does not fit all (arXiv 1909.03012), section 5.
    """
    case = make_case(classifier, images, saliency, options)
    _positive("per_step", per_step)
    if rule not in ("all", "share"):
        raise UsageError(f"rule: expected all or share, got {rule!r}")
    pixels = case.planes[0].numel() if len(case.planes) else 1
    counts = torch.arange(0, pixels + per_step, per_step).clamp(max=pixels)
    values = _path(case, -case.planes, counts, target, keep="above")[0]
    rises = values.diff(dim=1) >= 0
    return rises.all(1).double() if rule == "all" else rises.double().mean(1)


def region_perturbation(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, C, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    patch: int = 8,
    regions: int = 100,
    order: Literal["morf", "lerf"] = "morf",
    **options: Unpack[MaskOptions],
) -> Faithfulness:
    """Hide square patches, those of the largest sum first; the score is the mean drop of the quantity (AOPC).

    Args:
        patch: side in pixels; patches at the border are smaller where the side does not divide the image's.
        regions: how many patches are hidden at most.
        order: `morf`, or `lerf`: those of the smallest sum first.
        options: see `MaskOptions`; channels are always together here.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: the classifier gives NaN or infinity.

    Source: Samek et al., Evaluating the visualization of what a DNN has learned (arXiv 1509.06321), section 4.
        quantus.RegionPerturbation gives the drops, `full - values`.
    """
    if order not in ("morf", "lerf"):
        raise UsageError(f"order: expected morf or lerf, got {order!r}")
    _positive("patch", patch)
    _positive("regions", regions)
    case = make_case(classifier, images, _over_channels(saliency), options | {"channels": "together"})
    groups, count = _patches(case.images, patch), _patch_count(case.images, patch)
    sums = _sums(case.planes, groups, count)
    place = (-sums if order == "morf" else sums).argsort(dim=1, stable=True).argsort(dim=1)  # of each patch
    values, full, chosen, areas = _groups_path(case, groups, place, min(regions, count), target)
    return Faithfulness(
        (full[:, None] - values).mean(1), values, areas.mean(0), full, chosen, values.numel(), values.numel()
    )


def irof(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, C, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    segments: Segments = "grid",
    patch: int = 8,
    **options: Unpack[MaskOptions],
) -> Tensor:
    """Area over the curve of the quantity, as a share of the whole image's, while segments are hidden: [N].

    Segments go by the mean of the map in them, largest first; the higher, the better. At most their number.

    Args:
        segments: [N, H, W] whole numbers from 0 without gaps; a function of one image [C, H, W] that makes [H, W] of
            them (scikit-image's `slic`, say); or `grid`: squares of `patch` pixels.
        options: see `MaskOptions`; channels are always together here.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: the classifier gives NaN or infinity.

    Source: Rieger and Hansen, IROF (arXiv 2003.08747), section 3. quantus.IROF, one image at a time (in a batch it adds
        half of the last value to images of fewer segments than the batch's most).
    """
    case = make_case(classifier, images, _over_channels(saliency), options | {"channels": "together"})
    groups = _segments(case, segments, patch)
    counts = groups.flatten(1).amax(1) + 1  # of each image
    most = int(counts.max()) if len(counts) else 1
    sizes = _sums(torch.ones_like(case.planes), groups, most)
    means = _sums(case.planes, groups, most) / sizes.clamp(min=1)
    means = means.masked_fill(sizes == 0, -torch.inf)  # segments that an image does not have come last
    place = (-means).argsort(dim=1, stable=True).argsort(dim=1)
    values, full, _, _ = _groups_path(case, groups, place, most, target)
    shares = values / full[:, None]
    areas = [torch.trapezoid(row[: int(count)]) for row, count in zip(shares, counts, strict=True)]
    return counts.double().cpu() - torch.stack(areas) if areas else torch.zeros(0, dtype=torch.float64)


def infidelity(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, C, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    patches: Sequence[int] = (4,),
    scaled: bool = False,
    cumulative: bool = False,
    **options: Unpack[MaskOptions],
) -> Tensor:
    """Mean squared error of the map as a linear model of what hiding squares takes away, the lower the better: [N].

    Args:
        patches: sides of the squares; the mean over them.
        scaled: whether each map is first multiplied by the number that suits it best, as the paper allows: for maps
            whose values have no unit.
        cumulative: whether squares stay hidden, as in Quantus, or are hidden one at a time.
        options: see `MaskOptions`; channels are always together here.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: the classifier gives NaN or infinity.

    Source: Yeh et al., On the (in)fidelity and sensitivity of explanations (arXiv 1901.09392), definition 2.1, with
        square removal. quantus.Infidelity with `cumulative`.
    """
    n, c, h, w = images.shape
    if isinstance(saliency, Tensor) and saliency.ndim == 3:
        saliency = saliency[:, None]
    case = make_case(classifier, images, saliency.expand(n, c, h, w), options | {"channels": "apart"})
    linear = (case.planes.reshape(n, c, h, w) * (images - case.hidden)).double().sum(1)  # [N, H, W]
    errors = []
    for side in patches:
        _positive("patches", side)
        groups, count = _patches(images, side), _patch_count(images, side)
        expected = _sums(linear, groups, count)
        apart = groups[:, None].expand(n, c, h, w)

        def hidden_so_far(first: int, stop: int, which: Tensor, apart: Tensor = apart) -> Tensor:
            return apart[first:stop, None] <= which[:, :, None, None, None].to(apart.device)

        found = case.run(hidden_so_far if cumulative else case.grouped(apart), count, target)
        expected = expected.cumsum(1) if cumulative else expected
        drop = found.full[:, None] - found.values
        if scaled:
            square = expected.square().sum(1, keepdim=True)
            expected = expected * (expected * drop).sum(1, keepdim=True) / torch.where(square > 0, square, 1)
        errors.append((drop - expected).square().mean(1))
    return torch.stack(errors).mean(0)


def _similarity(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name not in SIMILARITIES:
        raise UsageError(f"similarity: expected {' or '.join(SIMILARITIES)}, got {name!r}")
    return SIMILARITIES[name]


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}: expected at least 1, got {value}")


def _over_channels(saliency: Tensor) -> Tensor:
    """Maps [N, H, W]: their sum over channels, where there are several."""
    many = isinstance(saliency, Tensor) and saliency.ndim == 4 and saliency.shape[1] > 1
    return saliency.sum(1) if many else saliency


def _patches(images: Tensor, side: int) -> Tensor:
    """The square that each pixel is in: [N, H, W]; what is missing of a whole number is cut off at both borders."""
    n, _, h, w = images.shape
    row, column = (
        (torch.arange(size, device=images.device) + (-size % side) // 2) // side for size in (h, w)
    )  # Quantus pads so
    return (row[:, None] * (int(column[-1]) + 1) + column).expand(n, h, w)


def _patch_count(images: Tensor, side: int) -> int:
    return math.prod(-(-size // side) for size in images.shape[2:])


def _segments(case: Case, segments: Segments, patch: int) -> Tensor:
    """Segments [N, H, W], checked."""
    n, _, h, w = case.images.shape
    if isinstance(segments, str):
        if segments != "grid":
            raise UsageError(f"segments: expected grid, a tensor or a function, got {segments!r}")
        _positive("patch", patch)
        return _patches(case.images, patch)
    made = (
        segments if isinstance(segments, Tensor) else torch.stack([torch.as_tensor(segments(x)) for x in case.images])
    )
    if made.shape != (n, h, w) or made.is_floating_point():
        raise UsageError(f"segments: expected [{n}, {h}, {w}] whole numbers, got {list(made.shape)} of {made.dtype}")
    for i, own in enumerate(made):
        if not torch.equal(found := own.unique(), torch.arange(len(found), device=found.device)):
            raise UsageError(f"segments: expected numbers from 0 without gaps, got {found[:8].tolist()} in sample {i}")
    return made.to(case.images.device).long()


def _sums(planes: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums of maps over groups of pixels: [N, count] float64 on the CPU."""
    flat = planes.flatten(1).double()
    sums = flat.new_zeros(len(flat), count)
    return sums.scatter_add_(1, groups.flatten(1), flat).cpu()


def _groups_path(
    case: Case, groups: Tensor, place: Tensor, steps: int, target: Tensor | Sequence[int] | int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [N, steps] while groups are hidden in their order `place` [N, groups]; full [N], target, areas."""
    place = place.to(groups.device)
    order = place.gather(1, groups.flatten(1)).reshape(groups.shape)  # [N, H, W]
    sizes = F.one_hot(order.flatten(1), place.shape[1]).sum(1) if order.numel() else place  # [N, groups]
    return _path(case, -order.double(), sizes.cumsum(1)[:, :steps].cpu(), target, keep="below")


def _path(
    case: Case,
    scores: Tensor,  # as `case.planes`
    counts: Tensor,  # [K] or [N, K]
    target: Tensor | Sequence[int] | int | None,
    keep: Literal["above", "below"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, c, h, w = case.shape
    curves = perturbation_curve(
        case.classifier, case.images, scores.reshape(-1, c, h, w), target, quantity=case.explained.quantity,
        baseline=case.hidden, order="rank", keep=keep, counts=counts, channels="apart" if c > 1 else "together",
        seeds=case.seeds, batch_size=case.batch_size,
    )  # fmt: skip
    values = curves.keep if keep == "above" else curves.remove
    assert values is not None
    return values, curves.full, curves.target, curves.areas
