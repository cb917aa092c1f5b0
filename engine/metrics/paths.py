"""Insertion, deletion and their relatives: pixels change one group after the other, in the order of a saliency map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from ..errors import UsageError
from ..showing import one_line
from .curves import perturbation_curve
from .inputs import Baseline, Channels, Ties, check_images
from .quantities import QuantityLike

Rule = Literal["trapezoid", "even", "steps", "mean", "drop"]
RULES = ("trapezoid", "even", "steps", "mean", "drop")
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # ERASER's bins
PASSED = ("quantity", "baseline", "channels", "ties", "seeds", "mean", "std", "batch_size", "backend")


@dataclass(frozen=True)
class Faithfulness:
    """Scores and curves of N saliency maps, on the CPU in float64.

    Attributes:
        score: [N], by the metric's rule.
        values: [N, K], the explained quantity along the path.
        shares: [K], the share of pixels that were inserted or removed.
        full: [N], the quantity of the whole image. target: [N].
        forwards: images that went through the classifier. asked: without leaving out equal masks.
    """

    score: Tensor
    values: Tensor
    shares: Tensor
    full: Tensor
    target: Tensor
    forwards: int
    asked: int

    __repr__ = one_line

    @property
    def mean(self) -> tuple[list[float], list[float]]:
        """The shares, and the mean over the maps of the values there."""
        return self.shares.tolist(), self.values.mean(0).tolist()


class PathOptions(TypedDict, total=False):
    """Conventions of a path; what is not given is the metric's, or that of the project named by `compat`.

    Keys:
        compat: `quantus` (PixelFlipping: deletion, morf) or `xplique` (insertion, deletion).
        steps: groups of pixels of (nearly) equal size, 20. per_step: pixels in a group instead.
        max_share: share of pixels at the path's end, 1.
        start: whether the path's start, before the first group, is part of the curve: yes.
        rule: how values become a score: `trapezoid` over the true shares divided by their span; `even`, as if they were
            evenly spaced; `steps`, the trapezoid with one unit per step; `mean` of the values; `drop`, the mean of
            whole image minus value (AOPC).
        quantity, baseline, channels, ties, seeds, mean, std, batch_size, backend: as for `perturbation_curve`.
    """

    compat: Literal["quantus", "xplique"] | None
    steps: int
    per_step: int
    max_share: float
    start: bool
    rule: Rule
    quantity: QuantityLike
    baseline: Baseline
    channels: Channels
    ties: Ties
    seeds: int | Sequence[int]
    mean: Sequence[float] | None
    std: Sequence[float] | None
    batch_size: int
    backend: str


def insertion(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    **options: Unpack[PathOptions],
) -> Faithfulness:
    """Show pixels on the baseline, most salient first; the area under the curve is the better, the higher.

    Args: see `perturbation_curve` and `PathOptions`.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: Petsiuk et al., RISE (arXiv 1806.07421). compat `xplique`: xplique.metrics.Insertion.
    """
    return _path("insertion", ("xplique",), classifier, images, saliency, target, options)


def deletion(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    **options: Unpack[PathOptions],
) -> Faithfulness:
    """Hide pixels, most salient first; the area under the curve is the better, the lower.

    Args: see `perturbation_curve` and `PathOptions`.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: Petsiuk et al., RISE (arXiv 1806.07421). compat `xplique`: xplique.metrics.Deletion; `quantus`:
        quantus.PixelFlipping (channels apart, black is the image's own minimum, the start left out).
    """
    return _path("deletion", ("xplique", "quantus"), classifier, images, saliency, target, options)


def morf(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    **options: Unpack[PathOptions],
) -> Faithfulness:
    """Hide the most relevant pixels first; the score is the mean drop of the quantity (AOPC), the higher the better.

    Args: see `perturbation_curve` and `PathOptions`.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: Samek et al., Evaluating the visualization of what a DNN has learned (arXiv 1509.06321), single pixels.
    """
    return _path("morf", ("quantus",), classifier, images, saliency, target, options)


def lerf(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    **options: Unpack[PathOptions],
) -> Faithfulness:
    """Hide the least relevant pixels first; the score is the mean drop of the quantity (AOPC), the lower the better.

    Args: see `perturbation_curve` and `PathOptions`.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: Samek et al., Evaluating the visualization of what a DNN has learned (arXiv 1509.06321).
    """
    return _path("lerf", (), classifier, images, saliency, target, options)


def sufficiency(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    shares: Sequence[float] = SHARES,
    **options: Unpack[PathOptions],
) -> Faithfulness:
    """What is lost where only the most salient pixels are shown: mean of whole image minus value, the lower the better.

    ERASER's term; neither Quantus' Sufficiency nor MSI's term of that name.

    Args:
        shares: how much is shown each time. The rest: see `perturbation_curve` and `PathOptions`.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: DeYoung et al., ERASER (arXiv 1911.03429), section 4.3, with pixels for tokens.
    """
    return _path("sufficiency", (), classifier, images, saliency, target, options, shares)


def comprehensiveness(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    saliency: Tensor,  # [N, H, W] or [N, 1, H, W]
    target: Tensor | Sequence[int] | int | None = None,  # [N]
    *,
    shares: Sequence[float] = SHARES,
    **options: Unpack[PathOptions],
) -> Faithfulness:
    """What is lost where the most salient pixels are hidden: mean of whole image minus value, the higher the better.

    Args:
        shares: how much is hidden each time. The rest: see `perturbation_curve` and `PathOptions`.

    Raises:
        UsageError: an argument does not fit; the message names it.

    Source: DeYoung et al., ERASER (arXiv 1911.03429), section 4.3, with pixels for tokens.
    """
    return _path("comprehensiveness", (), classifier, images, saliency, target, options, shares)


def _path(
    metric: str,
    compatible: tuple[str, ...],
    classifier: Any,
    images: Tensor,
    saliency: Tensor,
    target: Tensor | Sequence[int] | int | None,
    options: PathOptions,
    shares: Sequence[float] | None = None,
) -> Faithfulness:
    check_images(images)
    if unknown := sorted(set(options) - set(PathOptions.__annotations__)):
        raise UsageError(
            f"{metric}: unknown option {', '.join(unknown)}; there are {', '.join(PathOptions.__annotations__)}"
        )
    compat = options.get("compat")
    if compat is not None and compat not in compatible:
        raise UsageError(f"compat: {metric} has {', '.join(compatible) or 'none'}, got {compat!r}")
    chosen: dict[str, Any] = {**_conventions(metric, compat, images), **options}
    if compat == "xplique" and isinstance(saliency, Tensor) and saliency.ndim == 4:
        saliency = saliency.mean(1)
    pixels = images[0].numel() if chosen.get("channels") == "apart" else images.shape[2] * images.shape[3]
    changed = _changed(chosen, pixels, compat) if shares is None else check_shares(shares, pixels)
    curves = perturbation_curve(
        classifier,
        images,
        saliency,
        target,
        order="rank",
        keep="below" if metric in ("deletion", "morf", "comprehensiveness") else "above",
        counts=pixels - changed if metric == "lerf" else changed,
        **{name: chosen[name] for name in PASSED if name in chosen},
    )
    values = curves.remove if curves.keep is None else curves.keep
    assert values is not None
    along = changed.double() / pixels
    score = score_of(values, along, curves.full, chosen["rule"])
    return Faithfulness(score, values, along, curves.full, curves.target, curves.forwards, curves.asked)


def _conventions(metric: str, compat: str | None, images: Tensor) -> dict[str, Any]:
    """The options that a metric has by itself, or in the project that it shall agree with."""
    if compat == "quantus":
        # Any channel of any pixel is one feature; "black" is the smallest value in the image.
        black = images.amin((1, 2, 3), keepdim=True).expand_as(images)
        return {"per_step": 1, "start": False, "rule": "steps", "baseline": black, "channels": "apart", "ties": "first"}
    if compat == "xplique":
        # f(x)[y] as it is, and steps taken for even even where rounding made them uneven.
        return {"steps": 10, "rule": "even", "baseline": 0.0, "quantity": "logit", "ties": "last"}
    return {"rule": "trapezoid" if metric in ("insertion", "deletion") else "drop"}


def _changed(chosen: dict[str, Any], pixels: int, compat: str | None) -> Tensor:
    """How many pixels have changed at each point of the curve: [K] int64, ascending, none twice."""
    max_share, per_step = chosen.get("max_share", 1.0), chosen.get("per_step")
    if not 0 < max_share <= 1:
        raise UsageError(f"max_share: expected a number in (0, 1], got {max_share}")
    most = math.floor(pixels * max_share + 1e-9)
    if per_step is not None:
        if "steps" in chosen or per_step < 1:
            raise UsageError(f"per_step: expected at least 1 and no steps beside it, got {per_step}")
        counts = torch.arange(0, most + per_step, per_step).clamp(max=most)
    else:
        steps = chosen.get("steps", 20)
        if steps < 1:
            raise UsageError(f"steps: expected at least 1, got {steps}")
        points = np.linspace(0, most, steps + 1)
        # Xplique cuts the fraction off; a dictionary by count loses what stands twice, as `unique` does.
        counts = torch.from_numpy((points if compat == "xplique" else np.floor(points + 0.5)).astype(np.int64))
    counts = counts.unique()
    return counts if chosen.get("start", True) else counts[counts > 0]


def check_shares(shares: Sequence[float], pixels: int) -> Tensor:
    """Shares of the pixels as counts: [K] int64.

    Raises:
        UsageError: there is none, or one is outside [0, 1].
    """
    values = torch.as_tensor(shares, dtype=torch.float64)
    if values.ndim != 1 or len(values) == 0 or not bool(((values >= 0) & (values <= 1)).all()):
        raise UsageError(f"shares: expected at least one number in [0, 1], got {list(shares)}")
    return torch.floor(values * pixels + 0.5).long()


def score_of(
    values: Tensor,  # [N, K]
    shares: Tensor,  # [K]
    full: Tensor,  # [N]
    rule: Rule,
) -> Tensor:
    """A curve's score [N] by a rule of `PathOptions`.

    One value is its own `trapezoid` and `even`; an area over `steps` is 0 then.

    Raises:
        UsageError: the rule is unknown.
    """
    if rule == "mean":
        return values.mean(1)
    if rule == "drop":
        return (full[:, None] - values).mean(1)
    if rule not in ("trapezoid", "even", "steps"):
        raise UsageError(f"rule: expected {', '.join(RULES)}, got {rule!r}")
    if rule == "steps":
        return torch.trapezoid(values, dim=1)
    if values.shape[1] == 1:
        return values[:, 0]
    if rule == "even":
        return torch.trapezoid(values, dim=1) / (values.shape[1] - 1)
    return torch.trapezoid(values, shares.expand_as(values)) / (shares[-1] - shares[0])
