"""The planner of every perturbation metric: rank once, fold images x masks into full forward batches, copy once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from counterlens.kernels.perturb import perturb, rank_counts
from counterlens.kernels.perturb.reference import normalised

from ..errors import UsageError
from ..models.freezing import frozen
from ..showing import one_line
from .inputs import (
    Baseline,
    Channels,
    Normalize,
    Ties,
    check_computed,
    check_images,
    check_normalisation,
    constant_maps,
    make_baseline,
    rank_planes,
    saliency_planes,
    sample_seeds,
    unit_planes,
)
from .quantities import Explained, QuantityLike, check_targets

Keep = Literal["both", "above", "below"]
Order = Literal["value", "rank"]
CHUNK_BYTES = 1 << 24
# Writes perturbed images: out [n, K, C, H, W], first sample, one past the last, below?, marked pixels [n, K] falling.
Fill = Callable[[Tensor, int, int, bool, Tensor], None]
# What is kept of the logits [B, classes] of perturbed images of samples [B]: [B] or [B, Q].
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Curves:
    """The explained quantity of perturbed images, on the CPU in float64.

    Attributes:
        target: [N] int64, the explained class.
        full: [N], of the whole image.
        abscissae: [N, K], thresholds (order `value`), or one minus the share of pixels shown (order `rank`).
        areas: [N, K], the share of pixels that the saliency map marks at each threshold.
        keep: [N, K], marked pixels shown, the rest hidden (Ins); None where not asked for.
        remove: [N, K], marked pixels hidden (Del); None where not asked for.
        constant: [N] bool, whose map is constant.
        forwards: images that went through the classifier; masks that are equal went once.
        asked: images that would have gone without that.
    """

    target: Tensor
    full: Tensor
    abscissae: Tensor
    areas: Tensor
    keep: Tensor | None
    remove: Tensor | None
    constant: Tensor
    forwards: int
    asked: int

    __repr__ = one_line


@dataclass(frozen=True)
class Plan:
    """Perturbed images to be evaluated, none twice: sorted by side, sample, and marked pixels (descending).

    Attributes:
        sample, marked: [M] int64. below: [M] bool, whether the marked pixels are hidden instead of shown.
        place: [N, sides, K], where each value stands in (whole images, perturbed images): 0 ... N + M - 1.
    """

    sample: Tensor
    below: Tensor
    marked: Tensor
    place: Tensor


def make_plan(
    counts: Tensor,  # [N, K] int64 on the CPU: pixels that the map marks
    pixels: int,
    keep: Keep,
) -> Plan:
    """Name each perturbed image once: equal counts are equal masks, a mask of everything is the image itself."""
    n, _ = counts.shape
    sides = {"both": (False, True), "above": (False,), "below": (True,)}[keep]
    sample = torch.arange(n)[:, None]
    codes = []
    for below in sides:
        marked, side = counts, torch.full_like(counts, int(below))
        if keep == "both" and below:  # all hidden: the same image as none shown
            side, marked = side.masked_fill(counts == pixels, 0), marked.masked_fill(counts == pixels, 0)
        code = (side * n + sample) * (pixels + 1) + (pixels - marked)
        codes.append(torch.where(counts == (0 if below else pixels), sample - n, code))
    stacked = torch.stack(codes, 1)  # [N, sides, K]
    whole = torch.arange(-n, 0)
    unique, place = torch.cat([whole, stacked.flatten()]).unique(return_inverse=True)
    rest = unique[n:]
    sided = rest // (pixels + 1)
    return Plan(
        sample=sided % max(n, 1),
        below=sided >= n,
        marked=pixels - rest % (pixels + 1),
        place=place[n:].reshape(stacked.shape),
    )


def evaluate(
    explained: Explained,
    images: Tensor,  # [N, C, H, W] ready for the classifier
    plan: Plan,
    fill: Fill,
    score: Callable[[Tensor], Score],
    batch_size: int,
) -> Tensor:
    """Run the whole images, then the plan, in batches of `batch_size`; `score` is given the whole images' logits.

    Returns:
        [N + M] or [N + M, Q] on the images' device.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
    n, c, h, w = images.shape
    with torch.no_grad(), frozen(*explained.modules):
        logits = torch.cat([explained.logits(part) for part in images.split(batch_size)])
        scored = score(logits)
        parts = [scored(logits, torch.arange(n, device=images.device))]
        total, size = len(plan.sample), max(1, images[0].nbytes if n else 1)
        # Several batches are written at once where they are small: fewer launches.
        chunk = batch_size * max(1, CHUNK_BYTES // (batch_size * size))
        buffer = images.new_empty((min(chunk, total), c, h, w))
        on_device = plan.sample.to(images.device)
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            for first, rows, last_sample in _rectangles(plan, start, stop):
                here = slice(first, first + rows)
                sample = int(plan.sample[first])
                count = last_sample - sample
                out = buffer[first - start : first - start + rows].view(count, rows // count, c, h, w)
                fill(out, sample, last_sample, bool(plan.below[first]), plan.marked[here].reshape(count, -1))
            logits = torch.cat([explained.logits(part) for part in buffer[: stop - start].split(batch_size)])
            parts.append(scored(logits, on_device[start:stop]))
    return torch.cat(parts)


def _rectangles(plan: Plan, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Cut rows `start` to `stop` into blocks of samples that follow each other with as many masks each.

    Returns:
        (first row, rows, one past the last sample) of each block.
    """
    side_and_sample = torch.stack([plan.below[start:stop].long(), plan.sample[start:stop]], 1)
    runs, lengths = side_and_sample.unique_consecutive(dim=0, return_counts=True)
    blocks: list[tuple[int, int, int]] = []
    row, before = start, (-1, -1, -1)  # side, next sample, masks of the block before
    for (below, sample), length in zip(runs.tolist(), lengths.tolist(), strict=True):
        if before == (below, sample, length):
            first, rows, _ = blocks.pop()
            blocks.append((first, rows + length, sample + 1))
        else:
            blocks.append((row, length, sample + 1))
        row, before = row + length, (below, sample + 1, length)
    return blocks


def perturbing(
    images: Tensor,  # [N, C, H, W]
    baseline: float | Tensor,
    rank: Tensor,  # [N, H, W], or [N, C * H, W] with channels apart
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Fill]:
    """Whole images ready for the classifier, and what writes them with pixels hidden by `baseline`."""
    n, c, h, w = images.shape
    planes = rank.shape[1:]
    pixels = rank[0].numel() if n else 1
    ready = normalised(images, mean or (), std or ()) if mean is not None else images
    source, hidden = images, baseline
    if planes != (h, w):  # channels apart: one tall channel, normalised beforehand
        if isinstance(baseline, Tensor) and baseline.shape == (c,):
            hidden = baseline[None, :, None, None].expand(1, c, h, w)
        if isinstance(hidden, Tensor) and hidden.ndim == 4:
            hidden = (normalised(hidden, mean or (), std or ())).reshape(-1, 1, *planes)
        elif mean is not None:
            number = images.new_full((1, c, h, w), float(hidden))
            hidden = normalised(number, mean, std or ()).reshape(1, 1, *planes)
        source, mean, std = ready.reshape(n, 1, *planes), None, None
    # `perturb` wants a map beside the ranks, and looks for NaN in it.
    blank = torch.zeros((1, 1, 1), device=images.device).expand(n, *planes)

    def fill(out: Tensor, first: int, stop: int, below: bool, marked: Tensor) -> None:
        part = slice(first, stop)
        own = isinstance(hidden, Tensor) and hidden.ndim == 4 and len(hidden) == n
        perturb(
            source[part],
            hidden[part] if own and isinstance(hidden, Tensor) else hidden,
            blank[part],
            1 - marked.double() / pixels,
            keep="below" if below else "above",
            order="rank",
            rank=rank[part],
            mean=mean,
            std=std,
            out=out.view(stop - first, -1, source.shape[1], *planes),
            trusted=True,  # ranks of finite maps
            backend=backend,
        )

    return ready, fill


def marked_counts(
    planes: Tensor,  # [N, H, W]
    constant: Tensor,  # [N] bool
    thresholds: Tensor,  # [N, K] float64 on the CPU
    order: Order,
    normalize: Normalize,
) -> Tensor:
    """How many pixels the map marks at each threshold: [N, K] int64 on the CPU."""
    pixels = planes[0].numel() if len(planes) else 1
    if order == "rank":
        return rank_counts(thresholds, pixels)
    unit = unit_planes(planes, constant, normalize).flatten(1)
    levels = thresholds.to(unit.device, unit.dtype)
    ascending = unit.sort(dim=1).values
    below = torch.searchsorted(ascending, levels.contiguous())  # values under the threshold
    return (pixels - below).masked_fill(constant[:, None], 0).cpu()


def check_levels(thresholds: Tensor | Sequence[float], samples: int) -> Tensor:
    """Thresholds as [N, K] float64 on the CPU, in any order.

    Raises:
        UsageError: there is none, the shape does not fit, or a value is outside [0, 1].
    """
    levels = torch.as_tensor(thresholds, dtype=torch.float64).detach().cpu()
    if levels.ndim not in (1, 2) or levels.shape[-1] == 0 or (levels.ndim == 2 and len(levels) != samples):
        raise UsageError(
            f"thresholds: expected [K] or [{samples}, K] with at least one threshold, got {list(levels.shape)}"
        )
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        raise UsageError(f"thresholds: expected values in [0, 1], got {levels.tolist()}")
    return levels.expand(samples, -1)


def perturbation_curve(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]; with channels apart also [N, C, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    quantity: QuantityLike = "probability",
    baseline: Baseline = "mean",
    order: Order = "value",
    keep: Keep = "both",
    thresholds: Tensor | Sequence[float] | None = None,  # [K] or [N, K]
    counts: Tensor | Sequence[int] | None = None,  # [K] or [N, K]
    normalize: Normalize = "minmax",
    channels: Channels = "together",
    ties: Ties = "random",
    seeds: int | Sequence[int] = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    backend: str = "auto",
) -> Curves:
    """Evaluate a classifier on images of which a saliency map shows or hides more and more.

    Args:
        classifier: see `Explained`; it is run in eval mode and left as it was.
        images: [N, C, H, W] in [0, 1].
        saliency: [N, H, W] or [N, 1, H, W], finite, larger where a pixel matters more; sizes must be the images'.
        target: explained classes, one or N; without it, what the classifier predicts for the whole image.
        quantity: `probability`, `logit`, `log_prob` or a function of logits [B, classes] and targets [B], to [B].
        baseline: what hides a pixel: see `make_baseline`.
        order: `value` marks S >= threshold; `rank` the round((1 - threshold) * H * W) most salient pixels.
        keep: `above` shows the marked pixels (Ins), `below` the others (Del), `both` gives the two.
        thresholds: [K] or [N, K] in [0, 1], in any order; 17 from 0 to 1 by default.
        counts: how many pixels are marked, instead of thresholds (with channels apart: pixels of all channels).
        normalize: `minmax` brings each map to [0, 1] before comparing; `none` takes it as it is. A constant map
            marks nothing in either case, with one warning. Ranks need neither.
        channels: `together` hides all of a pixel's channels, `apart` ranks and hides each on its own.
        ties: equal pixels are ranked by a permutation from the sample's seed (`random`), or by index (`first`, `last`).
        seeds: one, or one per sample (from its id: the place in a batch then does not matter).
        mean, std: for a classifier that wants normalised images: (x - mean) / std per channel, after the baseline.
        batch_size: images in a forward.
        backend: of `kernels.perturb`.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: the classifier gives NaN or infinity for
            an image, or for what is left of it.
    """
    check_images(images)
    check_normalisation(mean, std, images.shape[1])
    if order not in ("value", "rank"):
        raise UsageError(f"order: expected value or rank, got {order!r}")
    if keep not in ("both", "above", "below"):
        raise UsageError(f"keep: expected both, above or below, got {keep!r}")
    explained = Explained(classifier, quantity)
    n = len(images)
    chosen = sample_seeds(seeds, n)
    planes = saliency_planes(saliency, images, channels)
    constant = constant_maps(planes)
    pixels = planes[0].numel() if n else 1
    if counts is not None:
        if thresholds is not None:
            raise UsageError("counts: expected none beside thresholds")
        whole = torch.as_tensor(counts)
        fits = whole.ndim == 1 or (whole.ndim == 2 and len(whole) == n)
        if not fits or whole.shape[-1] == 0 or whole.is_floating_point():
            raise UsageError(
                f"counts: expected [K] or [{n}, K] whole numbers with K at least 1, got {list(whole.shape)}"
            )
        if whole.numel() and not 0 <= int(whole.min()) <= int(whole.max()) <= pixels:
            raise UsageError(f"counts: expected values from 0 to {pixels}, got {whole.tolist()}")
        marked = whole.long().cpu().expand(n, -1)
        abscissae = 1 - marked.double() / pixels
    else:
        levels = check_levels(torch.linspace(0, 1, 17).double() if thresholds is None else thresholds, n)
        marked = marked_counts(planes, constant, levels, order, normalize)
        abscissae = levels if order == "value" else 1 - marked.double() / pixels
    hidden = make_baseline(baseline, images, chosen)
    rank = rank_planes(planes, ties, chosen)
    ready, fill = perturbing(images, hidden, rank, mean=mean, std=std, backend=backend)
    targets, values, plan = run(explained, ready, marked, pixels, keep, fill, target, batch_size)
    sides = values[plan.place]  # [N, sides, K]
    return Curves(
        target=targets,
        full=values[:n],
        abscissae=abscissae,
        areas=marked.double() / pixels,
        keep=sides[:, 0] if keep != "below" else None,
        remove=sides[:, -1] if keep != "above" else None,
        constant=constant.cpu(),
        forwards=len(values),
        asked=n + plan.place.numel(),
    )


def run(
    explained: Explained,
    ready: Tensor,  # [N, C, H, W] for the classifier
    marked: Tensor,  # [N, K] int64 on the CPU
    pixels: int,
    keep: Keep,
    fill: Fill,
    target: Tensor | Sequence[int] | int | None,
    batch_size: int,
) -> tuple[Tensor, Tensor, Plan]:
    """Targets [N], values [N + M] float64 and the plan that says whose they are, all on the CPU."""
    plan = make_plan(marked, pixels, keep)
    targets: list[Tensor] = []

    def score(logits: Tensor) -> Score:
        targets.append(check_targets(target, logits))
        return lambda part, samples: explained(part, targets[0][samples])

    values = evaluate(explained, ready, plan, fill, score, batch_size).double().cpu()
    check_computed("classifier", values, torch.cat([torch.arange(len(ready)), plan.sample]))
    return targets[0].cpu(), values, plan
