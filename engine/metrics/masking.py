"""Images with any sets of pixels hidden, for metrics that hide others than the most salient ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..errors import UsageError
from ..showing import one_line
from .curves import Plan, Score, evaluate
from .inputs import Baseline, Channels, check_computed, check_images, make_baseline, saliency_planes, sample_seeds
from .quantities import Explained, QuantityLike, check_targets

# Which pixels are hidden: first sample, one past the last, mask numbers [n, k], to [n, k, 1 or C, H, W] bool.
Masks = Callable[[int, int, Tensor], Tensor]


class MaskOptions(TypedDict, total=False):
    """Conventions of a metric that hides sets of pixels.

    Keys:
        quantity, baseline, seeds, batch_size: as for `perturbation_curve`.
        channels: `together` hides all of a pixel's channels, `apart` each on its own.
        absolute: whether maps are taken without their sign: no.
        normalize: `none`, or `max`: maps are divided by the largest magnitude in all of them, as Quantus does.
    """

    quantity: QuantityLike
    baseline: Baseline
    channels: Channels
    seeds: int | Sequence[int]
    batch_size: int
    absolute: bool
    normalize: Literal["none", "max"]


@dataclass(frozen=True)
class Masked:
    """The explained quantity of images with pixels hidden, on the CPU in float64.

    Attributes:
        full: [N], of the whole image. values: [N, K], with each mask. target: [N] int64.
    """

    full: Tensor
    values: Tensor
    target: Tensor

    __repr__ = one_line


@dataclass(frozen=True)
class Case:
    """What a metric was given, checked.

    Attributes:
        images, hidden: [N, C, H, W], the second what stands in place of hidden pixels.
        planes: [N, H, W], or [N, C * H, W] with channels apart: the maps.
        seeds: one per sample.
    """

    classifier: Any
    explained: Explained
    images: Tensor
    hidden: Tensor
    planes: Tensor
    seeds: list[int]
    batch_size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the masks: [N, 1 or C, H, W]."""
        n, _, h, w = self.images.shape
        return n, self.planes.shape[1] // h, h, w

    def grouped(self, groups: Tensor) -> Masks:
        """Masks of which number k hides group k; groups are [N, 1 or C, H, W] or [N, H, W] whole numbers."""
        groups = groups.reshape(self.shape)
        return lambda first, stop, which: groups[first:stop, None] == which[:, :, None, None, None].to(groups.device)

    def run(self, masks: Masks, count: int, target: Tensor | Sequence[int] | int | None) -> Masked:
        """Whole images, and every image under `count` masks.

        Raises:
            UsageError: the target does not fit. NotFinite: the classifier gives NaN or infinity.
        """
        n = len(self.images)
        plan = Plan(
            sample=torch.arange(n).repeat_interleave(count),
            below=torch.zeros(n * count, dtype=torch.bool),
            marked=torch.arange(count).repeat(n),
            place=torch.empty(0),
        )
        targets: list[Tensor] = []

        def fill(out: Tensor, first: int, stop: int, _below: bool, which: Tensor) -> None:
            part = slice(first, stop)
            hide = masks(first, stop, which)  # [n, k, 1 or C, H, W]
            torch.where(hide, self.hidden[part, None], self.images[part, None], out=out)

        def score(logits: Tensor) -> Score:
            targets.append(check_targets(target, logits))
            return lambda part, samples: self.explained(part, targets[0][samples])

        values = evaluate(self.explained, self.images, plan, fill, score, self.batch_size).double().cpu()
        check_computed("classifier", values, torch.cat([torch.arange(n), plan.sample]))
        return Masked(values[:n], values[n:].reshape(n, count), targets[0].cpu())


def make_case(classifier: Any, images: Tensor, saliency: Tensor, options: MaskOptions) -> Case:
    """Check a metric's arguments.

    Raises:
        UsageError: one does not fit; the message names it.
    """
    check_images(images)
    if unknown := sorted(set(options) - set(MaskOptions.__annotations__)):
        raise UsageError(f"unknown option {', '.join(unknown)}; there are {', '.join(MaskOptions.__annotations__)}")
    seeds = sample_seeds(options.get("seeds", 0), len(images))
    hidden = make_baseline(options.get("baseline", "mean"), images, seeds)
    if not isinstance(hidden, Tensor):
        hidden = images.new_tensor(hidden)
    if hidden.ndim == 1:
        hidden = hidden[:, None, None]
    maps = standardised(saliency, options.get("absolute", False), options.get("normalize", "none"))
    return Case(
        classifier,
        Explained(classifier, options.get("quantity", "probability")),
        images,
        hidden.expand_as(images),
        saliency_planes(maps, images, options.get("channels", "together")),
        seeds,
        options.get("batch_size", 64),
    )


def standardised(saliency: Tensor, absolute: bool = False, normalize: str = "none") -> Tensor:
    """Maps by the conventions of `MaskOptions`: without their sign, divided by the largest magnitude in all of them.

    Raises:
        UsageError: `normalize` is unknown.
    """
    if normalize not in ("none", "max"):
        raise UsageError(f"normalize: expected none or max, got {normalize!r}")
    maps = saliency.abs() if absolute else saliency
    largest = maps.abs().max() if maps.numel() else maps.new_ones(())
    return maps / largest if normalize == "max" and largest > 0 else maps


def pearson(
    a: Tensor,  # [N, K]
    b: Tensor,  # [N, K]
) -> Tensor:
    """Pearson's correlation of each row: [N] float64; NaN where a row is constant."""
    a, b = (x.double().cpu() - x.double().cpu().mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def spearman(
    a: Tensor,  # [N, K]
    b: Tensor,  # [N, K]
) -> Tensor:
    """Spearman's correlation of each row, equal values sharing their mean rank: [N] float64."""
    return pearson(mean_ranks(a), mean_ranks(b))


def mean_ranks(
    values: Tensor,  # [N, K]
) -> Tensor:
    """Ranks from 1, the smallest first, equal values sharing their mean: [N, K] float64."""
    ascending = values.sort(dim=1).values
    below = torch.searchsorted(ascending, values.contiguous())
    return (below + torch.searchsorted(ascending, values.contiguous(), right=True) + 1).double() / 2
