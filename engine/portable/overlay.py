"""Heat colours of a saliency map, and the map over its image, with numpy and pillow alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHOWN = 256  # the least side in pixels of an overlay
STRENGTH = 0.75  # of the heat colours, where saliency is 1
# matplotlib's plasma, evenly spaced: perceptually uniform, and read alike with any colour vision.
PLASMA = (
    "0d0887", "310597", "4c02a1", "6600a7", "7e03a8", "9511a1", "aa2395", "bc3587", "cc4778", "da5a6a", "e66c5c",
    "f0804e", "f89540", "fdac33", "fdc527", "f8df25", "f0f921",
)  # fmt: skip


def heat(saliency: NDArray[Any]) -> NDArray[Any]:
    """Saliency [..., H, W] in [0, 1] as colours from dark blue over magenta to yellow: [..., 3, H, W]."""
    table = np.array([list(bytes.fromhex(code)) for code in PLASMA], dtype=saliency.dtype) / 255  # [17, 3]
    place = saliency * (len(table) - 1)
    low = np.floor(place).clip(0, len(table) - 2).astype(np.int64)
    colours = table[low] + (place - low)[..., None].astype(saliency.dtype) * (table[low + 1] - table[low])
    return np.moveaxis(colours, -1, -3)


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


def side_by_side(image: NDArray[Any], saliency: NDArray[Any]) -> Image.Image:
    """The image and its overlay, enlarged without smoothing to 256 pixels at least."""
    h, w = saliency.shape
    times = max(1, -(-SHOWN // max(h, w)))
    tiles = np.concatenate([image, overlay(image, saliency)], axis=2)
    picture = Image.fromarray((tiles.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
    return picture.resize((2 * w * times, h * times), Image.Resampling.NEAREST)
