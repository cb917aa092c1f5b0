"""How a picture of any shape becomes an image of the model's size: which part of it is seen, and how it lies there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..errors import CounterlensError

NARROW = 50  # times as long as wide: what nobody would call a picture, and processors make gigabytes of
BLACK = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Frame:
    """What an image shows of a picture.

    Attributes:
        fit: crop, pad, squash or native.
        picture: width and height of the picture, upright.
        box: left, top, width and height of what the image shows, in the picture's pixels; beyond it where padded.
        size: width and height of the image.
    """

    fit: str
    picture: tuple[int, int]
    box: tuple[float, float, float, float]
    size: tuple[int, int]

    @property
    def whole(self) -> bool:
        """The image shows the picture, all of it and nothing else."""
        return self.box == (0, 0, *self.picture)

    def record(self) -> dict[str, Any]:
        """As results say it."""
        return {
            "fit": self.fit, "photo": list(self.picture), "box": [round(x, 2) for x in self.box],
            "size": list(self.size),
        }  # fmt: skip


def frame(fit: str, picture: tuple[int, int], size: int, factor: int = 1, most: float = math.inf) -> Frame:
    """Lay a picture out.

    Args:
        fit: `crop`: the shorter side becomes `size`, the middle of the longer one is kept. `pad`: the longer side
            becomes `size`, beside the shorter one nothing is. `squash`: both become `size`. `native`: the picture's own
            size, each side rounded to a multiple of `factor`, smaller where it has more than `most` pixels.
        picture: its width and height.
        size: side of the square image.
        factor, most: of `native`.

    Raises:
        CounterlensError: the picture is too narrow, or smaller than `factor`.
    """
    width, height = picture
    short, long = min(picture), max(picture)
    if long > NARROW * short:
        raise CounterlensError(f"{width}x{height} pixels, more than {NARROW} times as long as wide; cut a part out")
    whole = (0.0, 0.0, float(width), float(height))
    if fit == "native":
        if short < factor:
            raise CounterlensError(
                f"{width}x{height} pixels, and fit native takes sides from {factor} on; --fit crop, pad or squash "
                "make it larger"
            )
        scale = min(1.0, math.sqrt(most / (width * height)))
        sides = [max(factor, round(side * scale / factor) * factor) for side in picture]
        while sides[0] * sides[1] > most and max(sides) > factor:  # rounded up
            sides[sides.index(max(sides))] -= factor
        return Frame(fit, picture, whole, (sides[0], sides[1]))
    if short == long or fit == "squash":
        return Frame(fit, picture, whole, (size, size))
    longer: tuple[float, float]
    shorter: tuple[float, float]  # where the box begins and how long it is, along the picture's sides
    if fit == "crop":  # as torchvision's Resize and CenterCrop, rounding included
        resized = int(size * long / short)
        step = long / resized
        longer, shorter = (round((resized - size) / 2.0) * step, size * step), (0.0, float(short))
    else:
        kept = max(1, round(size * short / long))
        step = short / kept
        longer, shorter = (0.0, float(long)), (-math.ceil((size - kept) / 2) * step, size * step)
    (left, across), (top, down) = (longer, shorter) if width > height else (shorter, longer)
    return Frame(fit, picture, (left, top, across, down), (size, size))


def inside(made: Frame) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, in the image, of what is picture and not padding."""
    left, top, width, height = made.box
    across, down = made.size[0] / width, made.size[1] / height
    return (
        max(0, round(-left * across)), max(0, round(-top * down)),
        min(made.size[0], round((made.picture[0] - left) * across)),
        min(made.size[1], round((made.picture[1] - top) * down)),
    )  # fmt: skip


def take(
    picture: Image.Image, made: Frame, interpolation: str = "lanczos", colour: tuple[float, ...] = BLACK
) -> Image.Image:
    """The image of a frame; `colour`, in [0, 1], lies where there is no picture."""
    resample = Image.Resampling[interpolation.upper()]
    if made.fit == "pad" and not made.whole:
        x0, y0, x1, y1 = inside(made)
        out = Image.new("RGB", made.size, tuple(round(255 * c) for c in colour))
        out.paste(picture.resize((x1 - x0, y1 - y0), resample), (x0, y0))
        return out
    if made.whole:
        return picture if picture.size == made.size else picture.resize(made.size, resample)
    left, top, width, height = made.box
    # What lies beside the box counts at its border, as where the whole is resized and then cropped.
    right, bottom = min(left + width, picture.width), min(top + height, picture.height)
    return picture.resize(made.size, resample, box=(left, top, right, bottom))
