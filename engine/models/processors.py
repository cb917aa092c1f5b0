"""What classifiers' own pipelines make of a picture, kept beside the classifiers: it takes no part in guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from .norms import PlainNorms
from .preprocessing import Geometry
from .protocols import Classifier

C = TypeVar("C", bound=Classifier)
Process = Callable[[Image.Image], Tensor]
# Not attributes of the classifiers, whose attributes decide what is compiled.
_PROCESSORS: WeakKeyDictionary[nn.Module, Process] = WeakKeyDictionary()


def keep_processor(classifier: C, process: Process) -> C:
    """The classifier, whose own pipeline makes pixels [3, h, w] of a picture by this function."""
    _PROCESSORS[classifier.module] = process
    return classifier


def find_processor(classifier: Classifier) -> Process | None:
    """What makes pixels [3, h, w] of a picture in the classifier's own pipeline; None where it has none."""
    return _PROCESSORS.get(classifier.module)


def geometry_of(classifier: Classifier) -> Geometry | None:
    """What the classifier's own pipeline does with pictures that are not square; None where that is none of ours.

    One without preprocessing takes images of one size, and pictures are squashed to it.
    """
    preprocessing: Any = getattr(classifier.module, "preprocessing", None)
    return getattr(preprocessing, "geometry", "squash")


def card_fit(classifier: Classifier) -> str:
    """How who runs a file without the classifier is to fit pictures: as its pipeline does, where that needs no more."""
    geometry = geometry_of(classifier)
    return geometry if geometry == "crop" or (geometry == "pad" and not any(padding_of(classifier))) else "squash"


def padding_of(classifier: Classifier) -> tuple[float, ...]:
    """The colour that its pipeline lays beside a picture, in [0, 1]; black without one."""
    preprocessing: Any = getattr(classifier.module, "preprocessing", None)
    return tuple(getattr(preprocessing, "colour", (0.0, 0.0, 0.0)))


@torch.no_grad()
def logits_of_pixels(
    classifier: Classifier,
    pixels: Tensor,  # [B, 3, h, w], as the pipeline makes them
) -> Tensor:
    """Logits [B, labels] of what `find_processor` made."""
    module: Any = classifier.module
    with PlainNorms():
        out: Tensor = module.of_pixels(pixels)
    return out
