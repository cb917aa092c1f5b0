"""Colours of maps and of changes, and a map over its image, with numpy and pillow alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHOWN = 256  # the least side in pixels of an overlay
STRENGTH = 0.75  # of the heat colours, where saliency is 1
# matplotlib's plasma, evenly spaced: perceptually uniform, and read alike with any colour vision.
PLASMA = (
    "0d0887", "310597", "4c02a1", "6600a7", "7e03a8", "9511a1", "aa2395", "bc3587", "cc4778", "da5a6a", "e66c5c",
    "f0804e", "f89540", "fdac33", "fdc527", "f8df25", "f0f921",
)  # fmt: skip
# ColorBrewer's RdBu, blue first: what became darker and what became brighter, told apart with any colour vision.
RED_BLUE = (
    "053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f",
)  # fmt: skip
FULL_CHANGE = 0.5  # the mean absolute difference that is drawn at full strength
Line = tuple[tuple[int, int], tuple[int, int]]  # from (x, y) to (x, y), corners of pixels


def heat(saliency: NDArray[Any]) -> NDArray[Any]:
    """Saliency [..., H, W] in [0, 1] as colours from dark blue over magenta to yellow: [..., 3, H, W]."""
    return _coloured(saliency, PLASMA)


def change(
    before: NDArray[Any],  # [..., 3, H, W]
    after: NDArray[Any],  # [..., 3, H, W]
) -> NDArray[Any]:
    """Where and how much an image changed: blue where it became darker, red where brighter, near white where not.

    The strength is the mean over channels of the difference without its sign, so that a colour that gave way to another
    of the same brightness is seen as well: [..., 3, H, W].
    """
    difference = after - before
    strength = np.abs(difference).mean(-3) / FULL_CHANGE
    brighter = np.where(difference.mean(-3) < 0, -1, 1)
    return _coloured(((1 + brighter * strength.clip(0, 1)) / 2).astype(before.dtype), RED_BLUE)


def _coloured(values: NDArray[Any], codes: tuple[str, ...]) -> NDArray[Any]:
    """Values [..., H, W] in [0, 1] as colours between evenly spaced ones: [..., 3, H, W]."""
    table = np.array([list(bytes.fromhex(code)) for code in codes], dtype=values.dtype) / 255  # [colours, 3]
    place = values * (len(table) - 1)
    low = np.floor(place).clip(0, len(table) - 2).astype(np.int64)
    colours = table[low] + (place - low)[..., None].astype(values.dtype) * (table[low + 1] - table[low])
    return np.moveaxis(colours, -1, -3)


def outline(
    region: NDArray[Any],  # [H, W] bool
) -> list[Line]:
    """The lines between the pixels of a region and all others, the image's border included."""
    padded = np.pad(region, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    lines: list[Line] = [((int(x), int(y)), (int(x) + 1, int(y))) for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    return lines + [((int(x), int(y)), (int(x), int(y) + 1)) for y, x in zip(rows, columns, strict=True)]


def draw_outline(picture: Image.Image, region: NDArray[Any], corner: tuple[int, int] = (0, 0), times: int = 1) -> None:
    """Draw a region's outline, white between dark lines, on a picture that shows it `times` enlarged at `corner`."""
    draw, (left, top) = ImageDraw.Draw(picture), corner
    lines = [[(left + x * times, top + y * times) for x, y in line] for line in outline(region)]
    for colour, width in (("#101010", max(3, times // 2)), ("white", max(1, times // 4))):
        for line in lines:
            draw.line(line, fill=colour, width=width)


def overlay(
    images: NDArray[Any],  # [..., 3, H, W]
    saliency: NDArray[Any],  # [..., H, W] in [0, 1]
) -> NDArray[Any]:
    """The image in grey, darkened, with heat colours where saliency is: [..., 3, H, W].

    Grey ends at 0.6, below the brightness of the highest colours: white paper is never as bright as what is marked.
    """
    grey = images.mean(-3, keepdims=True)
    weight = STRENGTH * saliency.clip(0, 1)[..., None, :, :]
    return (1 - weight) * (0.1 + 0.5 * grey) + weight * heat(saliency.clip(0, 1))


def side_by_side(image: NDArray[Any], saliency: NDArray[Any], region: NDArray[Any] | None = None) -> Image.Image:
    """The image and its overlay, enlarged without smoothing to 256 pixels at least, a region outlined."""
    h, w = saliency.shape
    times = max(1, -(-SHOWN // max(h, w)))
    tiles = np.concatenate([image, overlay(image, saliency)], axis=2)
    picture = Image.fromarray((tiles.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
    picture = picture.resize((2 * w * times, h * times), Image.Resampling.NEAREST)
    if region is not None:
        draw_outline(picture, region, (w * times, 0), times)
    return picture
