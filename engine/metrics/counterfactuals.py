"""How good counterfactual images are: flipped, close, confirmed by others, similar, and quick to change the mind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CounterlensError, UsageError
from ..models.freezing import frozen
from ..showing import one_line
from .distribution import Features, extract_features
from .inputs import check_computed, check_finite, check_images
from .intervals import Interval, bootstrap
from .quantities import Explained, check_targets, undefined
from .transition import Transition, cout


@dataclass(frozen=True)
class CounterfactualQuality:
    """Measures of N counterfactuals, on the CPU in float64.

    Attributes:
        flipped: [N] bool, the classifier says the target.
        target_confidence: [N], its probability of the target.
        l1, l2: [N], mean absolute and root mean square difference per pixel and channel, in [0, 1].
        changed_area: [N], share of pixels of which a channel changed by more than `changed_above`.
        transfer: by judge, [N] bool: the judge says the target.
        similarity: [N], cosine between the encoder's features of image and counterfactual; None without an encoder.
        lpips: [N]; None where not asked for.
        transition: COUT and its curves; None where not asked for.
        target, source: [N], the classes.
    """

    flipped: Tensor
    target_confidence: Tensor
    l1: Tensor
    l2: Tensor
    changed_area: Tensor
    transfer: dict[str, Tensor]
    similarity: Tensor | None
    lpips: Tensor | None
    transition: Transition | None
    target: Tensor
    source: Tensor

    __repr__ = one_line

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Interval]:
        """Mean of each measure with its bootstrap interval.

        `transfer/JUDGE` is over all samples, `unconfirmed/JUDGE` the share of flips that the judge does not confirm.
        """
        values = {name: getattr(self, name) for name in ("flipped", "target_confidence", "l1", "l2", "changed_area")}
        for name, agreed in self.transfer.items():
            values[f"transfer/{name}"] = agreed
            values[f"unconfirmed/{name}"] = ~agreed[self.flipped]
        if self.similarity is not None:
            values["similarity"] = self.similarity
        if self.lpips is not None:
            values["lpips"] = self.lpips
        if self.transition is not None:
            values["cout"] = self.transition.score
        return {name: bootstrap(v, confidence=confidence, seed=seed) for name, v in values.items()}


def counterfactual_quality(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    counterfactuals: Tensor,  # [N, C, H, W] in [0, 1]
    target: Tensor | Sequence[int] | int,  # [N]
    *,
    judges: Mapping[str, Any] | None = None,
    encoder: Features | None = None,
    lpips: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    with_cout: bool = True,
    changed_above: float = 0.1,
    batch_size: int = 64,
) -> CounterfactualQuality:
    """Measure counterfactuals as they are given: round them to 8 bits first (`images.as_saved`) if files are meant.

    Distances between sets of images (FID, split FID, KID) are functions of their own: they are no sample's.

    Args:
        classifier: what was to be flipped; see `Explained`.
        target: the classes that were asked for.
        judges: further classifiers by name, with the same classes: does the flip transfer to a model that never saw it?
        encoder: from images in [0, 1] to features [B, D]: a self-supervised network's for S3 (SimSiam).
        lpips: `alex`, `vgg` or `squeeze` of the package lpips (weights are downloaded), or a function of two batches in
            [-1, 1], to [B].
        with_cout: whether to compute COUT, up to 51 forwards per image.
        changed_above: in [0, 1]; what counts as a changed pixel.
        batch_size: images in a forward.

    Raises:
        UsageError: an argument does not fit; the message names it. CounterlensError: lpips is missing. NotFinite: a
            model gives NaN or infinity for an image.

    Source: flip rate, S3 and COUT as in Jeanneret et al., ACE (arXiv 2303.09962); LPIPS: Zhang et al. (1801.03924).
    """
    check_images(images)
    if not isinstance(counterfactuals, Tensor) or counterfactuals.shape != images.shape:
        got = list(counterfactuals.shape) if isinstance(counterfactuals, Tensor) else type(counterfactuals).__name__
        raise UsageError(f"counterfactuals: expected {list(images.shape)} as the images, got {got}")
    check_finite("counterfactuals", counterfactuals)
    if not 0 <= changed_above <= 1:
        raise UsageError(f"changed_above: expected a number in [0, 1], got {changed_above}")
    explained = Explained(classifier)
    before = _logits("classifier", explained, images, batch_size)
    after = _logits("classifier", explained, counterfactuals, batch_size)
    targets, source = check_targets(target, after), before.argmax(1)
    difference = (counterfactuals - images).abs().double()
    transfer = {}
    for name, judge in (judges or {}).items():
        said = _logits(f"judge {name}", Explained(judge), counterfactuals, batch_size)
        transfer[name] = (said.argmax(1) == check_targets(target, said)).cpu()
    similarity = None
    if encoder is not None:
        pairs = [extract_features(x, encoder, batch_size) for x in (images, counterfactuals)]
        similarity = torch.cosine_similarity(pairs[0], pairs[1], dim=1)
    return CounterfactualQuality(
        flipped=(after.argmax(1) == targets).cpu(),
        target_confidence=explained(after, targets).double().cpu(),
        l1=difference.mean((1, 2, 3)).cpu(),
        l2=difference.square().mean((1, 2, 3)).sqrt().cpu(),
        changed_area=(difference.amax(1) > changed_above).double().mean((1, 2)).cpu(),
        transfer=transfer,
        similarity=similarity,
        lpips=None if lpips is None else _lpips(lpips, images, counterfactuals, batch_size),
        transition=cout(classifier, images, counterfactuals, targets, source, batch_size=batch_size)
        if with_cout
        else None,
        target=targets.cpu(),
        source=source.cpu(),
    )


def _logits(name: str, explained: Explained, images: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad(), frozen(*explained.modules):
        logits = torch.cat([explained.logits(part) for part in images.split(batch_size)])
    check_computed(name, torch.zeros(len(logits)).masked_fill(undefined(logits).cpu(), torch.nan))
    return logits


def _lpips(network: str | Callable[[Tensor, Tensor], Tensor], before: Tensor, after: Tensor, batch_size: int) -> Tensor:
    """LPIPS of each pair: [N]."""
    if isinstance(network, str):
        try:
            import lpips
        except ImportError as error:
            raise CounterlensError(
                f"lpips: needs the package lpips ({error}): pip install lpips torchvision"
            ) from error
        if network not in ("alex", "vgg", "squeeze"):
            raise UsageError(f"lpips: expected alex, vgg, squeeze or a function, got {network!r}")
        distance = lpips.LPIPS(net=network, verbose=False).to(before.device).eval()
    else:
        distance = network
    with torch.no_grad():
        parts = [
            distance(a * 2 - 1, b * 2 - 1).reshape(len(a))
            for a, b in zip(before.split(batch_size), after.split(batch_size), strict=True)
        ]
    distances = torch.cat(parts).double().cpu()
    check_computed("lpips", distances)
    return distances
