"""Picture files as an engine's models see them, and what the classifier's own pipeline says of the same file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..blackbox.box import BlackBox
from ..config import Config
from ..errors import CounterlensError, UsageError
from ..guidance.memory import weight_bytes
from ..images.files import as_pixels, as_saved, framed, open_both, open_picture
from ..images.fitting import Frame, frame, take
from ..images.restoring import restore
from ..models.freezing import frozen
from ..models.placing import computing_on
from ..models.processors import find_processor, geometry_of, logits_of_pixels, padding_of
from ..models.protocols import Classifier, Diffusion
from ..runtime.registry import AUTO, EAGER
from ..showing import one_line

SHRINKS = 4  # times that a size is measured and made smaller, until a step fits into the memory budget


class Models(Protocol):
    """What reading needs of `EngineCore`."""

    box: BlackBox | None
    classifier: Classifier
    diffusion: Diffusion
    memory_budget: float | None
    runtime: str

    @property
    def device(self) -> torch.device: ...
    @property
    def image_size(self) -> int: ...
    @property
    def labels(self) -> list[str]: ...
    @property
    def multiple(self) -> int | None: ...
    def modules(self) -> list[nn.Module]: ...
    def step_bytes(self, sides: tuple[int, int], config: Config | None = None) -> int: ...
    def probabilities(self, images: Tensor, sizes: Sequence[int] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Photo:
    """A picture file as the models see it.

    Attributes:
        image: [3, H, W] in [0, 1].
        frame: what it shows of the picture.
        own: what the classifier's own processor makes of the untouched file, [3, h, w]; None without a processor.
    """

    image: Tensor
    frame: Frame
    own: Tensor | None = None

    __repr__ = one_line


@dataclass(frozen=True)
class Said:
    """A classifier's answer: its label, the label's probability, and all probabilities [labels]."""

    label: str
    confidence: float
    probabilities: Tensor


def read(engine: Models, file: Path | BytesIO, name: str | None, config: Config, *, own: bool = True) -> Photo:
    """Read a file as the fit of a config lays it out, see `images.fitting.frame`.

    `auto` does what the classifier's own processor does with pictures that are not square: it crops, squashes or pads
    to the square that the models take. A classifier without preprocessing, as those of a pack, squashes.

    Args:
        engine: whose models see it.
        file, name: see `images.files.load_image`.
        config: says the fit.
        own: run the classifier's own processor as well, if it has one.

    Raises:
        UsageError: the models take square images alone, or the processor does something else. CounterlensError: see
            `load_image`.
    """
    path, managed = name or file, not config.match_official
    process = find_processor(engine.classifier) if own else None
    if process is None:
        picture, plain = open_picture(file, path, managed), None
    else:
        picture, plain = open_both(file, path, managed)
    fit: str = config.fit_name
    if fit == "auto":
        fit = own_fit(engine.classifier, square=picture.width == picture.height)
    factor, most = 1, math.inf
    if fit == "native":
        factor = check_native(engine)
        framed(fit, picture, path, engine.image_size, factor)  # refused before anything is measured
        most = _most_pixels(engine, config, picture.size, factor)
    made = framed(fit, picture, path, engine.image_size, factor, most)
    if (longest := getattr(engine.diffusion, "longest", None)) is not None and max(made.size) > longest:
        width, height = made.size
        raise CounterlensError(
            f"{path}: {width}x{height} pixels under fit native, and this model has places for {longest} a side; "
            "--fit crop, pad or squash"
        )
    colour = padding_of(engine.classifier)
    image = torch.from_numpy(as_pixels(take(picture, made, config.interpolation, colour))).permute(2, 0, 1)
    return Photo(image.contiguous(), made, None if process is None or plain is None else process(plain))


def seen_by(classifier: Classifier, size: int, file: Path | BytesIO, name: str | None, fit: str) -> Tensor:
    """A file as a classifier alone sees it, without a generator: [3, size, size] in [0, 1].

    Args:
        classifier: whose own pipeline `auto` follows.
        size: side of the square.
        file, name: see `images.files.load_image`.
        fit: auto, crop, pad or squash.

    Raises:
        UsageError, CounterlensError: see `read`.
    """
    path = name or file
    picture = open_picture(file, path)
    if fit == "auto":
        fit = own_fit(classifier, square=picture.width == picture.height)
    made = take(picture, framed(fit, picture, path, size), colour=padding_of(classifier))
    return torch.from_numpy(as_pixels(made)).permute(2, 0, 1).contiguous()


def own_fit(classifier: Classifier, square: bool = False) -> str:
    """The fit that shows a square model what the classifier's own pipeline shows it; of square pictures any does.

    Raises:
        UsageError: there is none.
    """
    geometry = geometry_of(classifier)
    if geometry in (None, "whole"):
        if square:
            return "squash"
        does = "keeps a picture's own ratio" if geometry else "neither crops, squashes nor pads in a way known here"
        raise UsageError(
            f"fit: this classifier's own processor {does}, which auto cannot do for pictures that are not square; say "
            "--fit crop, pad, squash or native"
        )
    assert geometry is not None
    return geometry


def check_native(engine: Models) -> int:
    """What sides are multiples of under the fit `native`.

    Raises:
        UsageError: the diffusion model takes square images of one size, or a runtime was named, which compiles for one.
    """
    if engine.multiple is None:
        size, what = engine.image_size, type(engine.diffusion).__name__ if engine.box is None else "a surrogate"
        raise UsageError(
            f"fit: native needs a model that takes any shape; {what} takes {size}x{size} "
            "alone; say --fit auto, crop, pad or squash"
        )
    if engine.runtime not in (AUTO, EAGER):
        raise UsageError(
            f"fit: what runtime {engine.runtime} runs is compiled for images of {engine.image_size}x{engine.image_size}"
            "; native needs runtime eager or auto"
        )
    return engine.multiple


def _most_pixels(engine: Models, config: Config, picture: tuple[int, int], factor: int) -> float:
    """Pixels that a picture may have: those of the model's own images, or what fits into the memory budget."""
    own = float(engine.image_size**2)
    if engine.memory_budget is None:
        return own
    left = engine.memory_budget - weight_bytes(engine.modules())
    most = (
        own * left / engine.step_bytes((engine.image_size, engine.image_size), config)
    )  # grows with pixels, or faster
    for _ in range(SHRINKS):
        width, height = frame("native", picture, engine.image_size, factor, most).size
        if (needs := engine.step_bytes((height, width), config)) <= left:
            break
        most = 0.95 * width * height * left / needs
    return most


def say(engine: Models, pixels: Sequence[Tensor]) -> list[Said]:
    """The classifier's answers to what its own processor made; pixels [3, h, w] of any sizes."""
    out = []
    with torch.no_grad(), computing_on(engine.device), frozen(engine.classifier.module):
        for one in pixels:
            logits = logits_of_pixels(engine.classifier, one[None].to(engine.device))[0].cpu()
            p = torch.softmax(logits, dim=0) if engine.classifier.link == "softmax" else torch.sigmoid(logits)
            best = int(p.argmax())
            out.append(Said(engine.labels[best], p[best].item(), p))
    return out


def restored(
    engine: Models,
    file: Path | BytesIO,
    photo: Photo,
    after: Tensor,  # [3, H, W] in [0, 1]
    name: str | None,
    config: Config,
    region: Tensor | None = None,  # [H, W] bool, or of the photo's size
) -> tuple[Image.Image, Said]:
    """A counterfactual's change, enlarged and laid over the photo, see `images.restoring.restore`; what is said of it.

    The answer is that of the classifier's own pipeline; of one without, that to the fit `auto`.

    Args:
        engine: whose classifier is asked.
        file, name: of the photo; it is read again.
        photo: as `read` gave it.
        after: the counterfactual.
        config: as for `read`.
        region: where alone the image could change; outside it the photo keeps its pixels.

    Raises:
        CounterlensError: the classifier gives no answer for it.
    """
    path = name or file
    picture = open_picture(file, path, managed=not config.match_official)
    before, changed = (x.permute(1, 2, 0).cpu().float().numpy() for x in (photo.image, as_saved(after)))
    may = None if region is None else region.cpu().numpy()
    out = restore(picture, before, changed, photo.frame, may)
    process = find_processor(engine.classifier)
    if process is not None:
        return out, say(engine, [process(out)])[0]
    fit = own_fit(engine.classifier, square=out.width == out.height)
    seen = take(out, framed(fit, out, path, engine.image_size), config.interpolation, padding_of(engine.classifier))
    p = engine.probabilities(torch.from_numpy(as_pixels(seen)).permute(2, 0, 1)[None])[0]
    if not p.isfinite().all():
        raise CounterlensError(f"{path}: the classifier gives no answer for the restored photo")
    return out, Said(engine.labels[int(p.argmax())], p.max().item(), p)


Answer = tuple[str | None, float | None]  # a label and its probability


def disagreement(own: Answer, ours: Answer, fit: str | None) -> str:
    """Says that the classifier's own pipeline has another label for a file than we; labels with their probabilities."""
    return (
        f"the classifier's own processor gets {own[0]!r} ({own[1] or 0:.3f}) from this file, and here it says "
        f"{ours[0]!r} ({ours[1] or 0:.3f}; fit {fit})"
    )
