"""What `--classifier` names, as a classifier: with a gradient where it has one that can be trusted, else as a box."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..models.onnx_classifier import conversion_of, open_onnx_classifier
from ..models.onnx_operators import NoGradient
from ..models.protocols import Classifier
from .box import no_gradient, open_box
from .kinds import may_convert
from .options import BoxOptions, normalising
from .sources import check_kind

# Images of the user's, or what reads some of them at a size.
Shown = Tensor | Callable[[int], Tensor | None]
# Who bounds or counts queries means a box.
COUNTED = {"max_queries", "rate", "concurrency", "batch"}


def open_called(
    name: str | Path | Callable[..., Any],
    labels: Sequence[str],
    *,
    image_size: int,
    options: BoxOptions | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    images: Shown | None = None,
) -> Classifier:
    """Open what can be called: an ONNX file as a differentiable classifier where that is shown to be right, else a box.

    A warning says what was assumed of the file, or why it is a box.

    Args:
        name, labels, image_size, options: see `box.open_box`; an ONNX file may bring its labels.
        preprocessing: of an ONNX file, see `models.onnx_classifier.open_onnx_classifier`.
        images: [B, 3, H, W] in [0, 1] of the user's, or what reads them at a size: what was made of an ONNX file is
            held to ONNX Runtime on the first of them as well.

    Raises:
        UsageError: an option does not fit, or a gradient has to be had (`convert`) and there is none.
        CounterlensError: it cannot be opened, or does not answer.
    """
    chosen = options or BoxOptions()
    wanted = chosen.convert != "never" and (chosen.convert == "always" or not COUNTED & chosen.model_fields_set)
    if callable(name) or not may_convert(name) or not wanted:
        return open_box(name, labels, image_size=image_size, options=chosen, preprocessing=preprocessing)
    check_kind(name, chosen)
    try:
        made = open_onnx_classifier(
            name, image_size=image_size, labels=labels or None, scores=chosen.scores,
            said=chosen.output if "output" in chosen.model_fields_set else None,
            preprocessing=normalising(chosen, preprocessing), images=images(image_size) if callable(images) else images,
        )  # fmt: skip
    except NoGradient as error:
        reasons = "; ".join(error.reasons)
        if chosen.convert == "always":
            raise UsageError(f"classifier: {no_gradient(str(name))} ({reasons})") from error
        box = open_box(name, labels, image_size=image_size, options=chosen, preprocessing=preprocessing)
        warnings.warn(f"{name} is asked as a black box: {reasons}", stacklevel=2)
        return box
    if (found := conversion_of(made)) and found.assumed:
        warnings.warn(f"{name}: {'; '.join(found.assumed)}", stacklevel=2)
    return made
