"""Several counterfactuals of one image: each from a start of its own, without duplicates, nearest first.

Answer 0 is the run without `count`, bit by bit. The others have seeds that its seed and their number decide. Where the
start is an inversion, which no seed changes, a share of the noise that it found is renewed from the answer's seed.
Towards the runners-up each answer has another label instead, and is the run towards that label.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..images.files import as_saved
from ..models.freezing import frozen
from ..models.protocols import Classifier
from ..packs import Pack

if TYPE_CHECKING:
    from .result import Counterfactual

# Share of an inversion's noise that is renewed, chosen on the digits' validation split.
RENEWED = 0.7
# Two answers are the same where their 8-bit pixels differ by one level on average, or less.
SAME = 1 / 255


def answer_seed(seed: int, k: int) -> int:
    """The seed of answer k of a sample: its own seed for 0, else one that both decide."""
    if k == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{k}".encode()).digest()
    return int.from_bytes(digest[:6], "little")


def arranged(answers: Sequence[Counterfactual]) -> list[Counterfactual]:
    """The answers of one image without duplicates: those that flip first, then by L1; those with an error last.

    Of duplicates the one that comes first stays.
    """
    falling = sorted(answers, key=lambda a: (a.error is not None, not a.flipped, a.l1 if a.error is None else 0.0, a.k))
    kept: list[Counterfactual] = []
    for answer in falling:
        saved = as_saved(answer.image)
        others = [as_saved(other.image) for other in kept if other.error is None]
        if answer.error is not None or all((saved - other).abs().mean() > SAME for other in others):
            kept.append(answer)
    return kept


def arranged_by_image(answers: Sequence[Counterfactual]) -> list[Counterfactual]:
    """The answers of each image as `arranged`, one image's after the other's."""
    images: dict[int, list[Counterfactual]] = {}
    for answer in answers:
        images.setdefault(answer.sample, []).append(answer)
    return [answer for _, found in sorted(images.items()) for answer in arranged(found)]


class Features:
    """What the last linear layer of a classifier takes of an image; its logits where it has none.

    Attributes:
        name: which classifier, as results say it.
    """

    def __init__(self, classifier: Classifier, name: str) -> None:
        self.classifier, self.name = classifier, name
        layers = [module for module in classifier.module.modules() if isinstance(module, nn.Linear)]
        self.last = layers[-1] if layers else None

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,  # [N, 3, H, W] in [0, 1]
    ) -> Tensor:
        """[N, features] in float32 on the CPU."""
        taken: list[Tensor] = []
        hook = None
        if self.last is not None:
            hook = self.last.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
        try:
            device = next(self.classifier.module.parameters()).device
            with frozen(self.classifier.module):
                logits = self.classifier.logits(images.to(device))
        finally:
            if hook is not None:
                hook.remove()
        return (taken[-1] if taken else logits).reshape(len(images), -1).float().cpu()


def features_of(classifier: Classifier, pack: str | None) -> Features:
    """Those of the pack's judge, which guidance never sees, where there is one; else the explained classifier's own."""
    if pack is not None and "judge" in (opened := Pack(pack)).classifier_names():
        return Features(opened.classifier("judge"), "judge")
    return Features(classifier, "classifier")


def lpips_between(answers: Sequence[Counterfactual], distance: Callable[..., Tensor]) -> float:
    """Mean LPIPS between an image's answers, two by two; NaN with fewer than two."""
    from ..metrics.protocols import mean_apart  # with all of the metrics behind it, which most runs do without

    made = [as_saved(answer.image) for answer in answers if answer.error is None]
    return mean_apart(torch.stack(made), distance) if made else math.nan


def diversity(answers: Sequence[Counterfactual], features: Callable[[Tensor], Tensor]) -> float:
    """Mean distance of the features of an image's answers, pair by pair; NaN with fewer than two."""
    made = [as_saved(answer.image) for answer in answers if answer.error is None]
    if len(made) < 2:
        return math.nan
    return torch.pdist(features(torch.stack(made))).mean().item()
