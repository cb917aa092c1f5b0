"""What an engine refuses before anything runs: models, ways of running and images that do not fit."""

from __future__ import annotations

from torch import Tensor, nn

from ..blackbox.box import as_box, no_gradient
from ..errors import UsageError
from ..models.attention import ATTENTIONS, not_supported_reasons
from ..models.predictions import FLOW
from ..models.protocols import Classifier, Diffusion
from ..runtime.registry import AUTO, EAGER, check


def check_models(diffusion: Diffusion, classifier: Classifier) -> None:
    """Refuse models that do not belong together.

    Raises:
        UsageError: the classifier is a plain module, labels differ, or the noise levels are none.
    """
    if isinstance(classifier, nn.Module) and not hasattr(classifier, "log_prob"):
        raise UsageError(
            f"classifier: {type(classifier).__name__} is a plain module; Engine.from_pretrained(model, module, "
            "labels=...) or models.image_classifiers.wrap_classifier(module, labels, image_size=...) wraps it"
        )
    if list(diffusion.labels) != list(classifier.labels):
        raise UsageError(
            f"classifier: its {len(classifier.labels)} labels are not the diffusion model's "
            f"{len(diffusion.labels)}; diffusion.describe(labels) names them"
        )
    levels = diffusion.alphas_cumprod
    first = 1 if getattr(diffusion, "prediction", None) == FLOW else 0  # a flow begins without noise
    if not ((levels > 0) & (levels <= 1)).all() or not (levels[first:] < 1).all() or not (levels.diff() < 0).all():
        raise UsageError("diffusion: alphas_cumprod must fall from below 1 and end above 0")


def check_guides(classifier: Classifier) -> None:
    """Refuse a classifier that can only be called where it has to guide.

    Raises:
        UsageError: says what does.
    """
    if (box := as_box(classifier)) is not None:
        raise UsageError(f"classifier: {no_gradient(box.name)}")


def check_running(
    diffusion: Diffusion, classifier: Classifier, runtime: str, checkpointing: bool, attention: str
) -> None:
    """Refuse ways of running that there are not, or that exclude each other.

    Raises:
        UsageError: names the option.
    """
    check(runtime)
    if (box := as_box(classifier)) is not None and runtime not in (AUTO, EAGER):
        raise UsageError(f"runtime: {runtime} compiles guided steps; {box.name} can only be called and guides none")
    if checkpointing and runtime not in (AUTO, EAGER):
        raise UsageError(f"checkpointing: recomputes in eager; runtime {runtime!r} cannot")
    if attention not in ATTENTIONS:
        raise UsageError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if attention == "xformers":
        if runtime not in (AUTO, EAGER):
            raise UsageError(f"attention: xformers runs in eager; runtime {runtime!r} cannot")
        if reasons := not_supported_reasons(diffusion.modules()):
            raise UsageError(f"attention: xformers cannot be used: {'; '.join(reasons)}")


def check_images(images: Tensor, size: int, multiple: int | None = None, longest: int | None = None) -> None:
    """Refuse what is no batch of images in [0, 1], [B, 3, size, size] or with sides that are multiples; NaN passes.

    Raises:
        UsageError: says what does not fit.
    """
    sides = images.shape[2:] if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3 else ()
    others = multiple is not None and len(sides) == 2 and min(sides) > 0 and not any(n % multiple for n in sides)
    if sides != (size, size) and not others:
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        more = "" if multiple is None else f", or other multiples of {multiple}"
        raise UsageError(f"images: expected [B, 3, {size}, {size}]{more}, got {shape}; load_image resizes files")
    if longest is not None and max(sides) > longest:
        raise UsageError(
            f"images: a side of {max(sides)} pixels is longer than the {longest} that this model has places for"
        )
    if not images.is_floating_point():
        raise UsageError(f"images: expected floating point in [0, 1], got {images.dtype}")
    if images.numel() and (images.min() < 0 or images.max() > 1):
        raise UsageError(f"images: expected [0, 1], got {images.min().item():g} to {images.max().item():g}")
