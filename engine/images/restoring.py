"""A counterfactual's change, laid over the picture that it was made of, at the picture's own size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..files import write_atomically
from .files import png_text
from .fitting import Frame, inside

if TYPE_CHECKING:
    from collections.abc import Mapping

FEATHER = 1 / 16  # of the box's side: how far the change fades in where the box ends inside the picture


def restore(
    picture: Image.Image,
    before: NDArray[np.float32],  # [h, w, 3] in [0, 1], the image that a frame showed of the picture
    after: NDArray[np.float32],  # [h, w, 3] in [0, 1], its counterfactual
    made: Frame,
    region: NDArray[np.bool_] | None = None,  # [h, w] of the image, or [H, W] of the picture
) -> Image.Image:
    """The picture with the change of the image in it, in RGB, at the picture's own size.

    The change, after less before, is enlarged (bicubic) and added where the image showed the picture; what the image
    did not show keeps its pixels. Where the box ends inside the picture the change fades in, so that no seam is seen.
    Outside a region, where alone the image could change, pixels are the picture's own: enlarged, it would spread.
    """
    left, top, right, bottom = inside(made)
    change = (after - before)[top:bottom, left:right]
    box_left, box_top, width, height = made.box
    x0, x1 = max(0, round(box_left)), min(picture.width, round(box_left + width))
    y0, y1 = max(0, round(box_top)), min(picture.height, round(box_top + height))
    weight = (
        _fade(y1 - y0, y0 > 0, y1 < picture.height)[:, None] * _fade(x1 - x0, x0 > 0, x1 < picture.width)[None]
    )  # [y1 - y0, x1 - x0]
    if region is not None:
        if region.shape == (picture.height, picture.width):
            may = region[y0:y1, x0:x1]
        else:
            seen = Image.fromarray(region[top:bottom, left:right].astype(np.uint8))
            may = np.asarray(seen.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST))
        weight = weight * may.astype(np.float32)
    out = np.array(picture.convert("RGB"))
    for channel in range(3):
        small = Image.fromarray(np.ascontiguousarray(change[..., channel], dtype=np.float32))
        large = np.asarray(small.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC))
        part = out[y0:y1, x0:x1, channel]
        part[...] = np.clip(np.rint(part + 255 * weight * large), 0, 255).astype(np.uint8)
    return Image.fromarray(out)


def _fade(length: int, at_start: bool, at_end: bool) -> NDArray[np.float32]:
    """Weights [length]: 1, but rising from 0 at an end that lies inside the picture."""
    ramp = max(1, round(length * FEATHER))
    rise = (0.5 - 0.5 * np.cos(np.pi * (np.arange(ramp) + 0.5) / ramp)).astype(np.float32)
    out = np.ones(length, dtype=np.float32)
    if at_start:
        out[:ramp] = rise
    if at_end:
        out[length - ramp :] = np.minimum(out[length - ramp :], rise[::-1])
    return out


def save_restored(picture: Image.Image, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a restored picture as PNG in sRGB, upright; none of the photo's EXIF, such as its place, is in it.

    Raises:
        CounterlensError: it cannot be written; the message names it.
    """
    info = png_text(facts)
    info.add(b"sRGB", b"\1")
    write_atomically(path, lambda file: picture.save(file, format="PNG", pnginfo=info, compress_level=3))
