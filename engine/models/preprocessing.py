"""What stands between an image in [0, 1] and a classifier: resize, centre crop, normalise, all differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UsageError

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers


def resampling_matrix(size: int, new_size: int, interpolation: str = "bilinear") -> Tensor:
    """The matrix [new_size, size] by which Pillow resamples one dimension, antialiased where it shrinks.

    Resampling is linear, so its matrix is what it makes of the unit vectors. Two matrix products are differentiated
    and exported by everything, which cannot be said of antialiased interpolation.

    Raises:
        UsageError: there is no such interpolation.
    """
    if interpolation not in FILTERS:
        raise UsageError(f"interpolation: expected one of {', '.join(FILTERS)}, got {interpolation!r}")
    unit = Image.fromarray(np.eye(size, dtype=np.float32))
    resized = unit.resize((size, new_size), Image.Resampling(FILTERS[interpolation]))
    return torch.from_numpy(np.array(resized))


class Preprocessing(nn.Module):
    """Resize, centre crop and normalise square images.

    Args:
        image_size: side of the images that come in.
        resize: side or (height, width) to resize to; None keeps the size.
        crop: side or (height, width) of the centre crop; None keeps everything.
        mean, std: for each channel, of images in [0, 1].
        interpolation: Pillow's `nearest`, `bilinear`, `bicubic`, `lanczos`, `box` or `hamming`.

    Raises:
        UsageError: the crop is larger than the image, or a value makes no sense.
    """

    rows: Tensor
    columns: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_size: int,
        *,
        resize: int | tuple[int, int] | None = None,
        crop: int | tuple[int, int] | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        height, width = _pair(image_size if resize is None else resize)
        crop_height, crop_width = _pair((height, width) if crop is None else crop)
        if crop_height > height or crop_width > width:
            raise UsageError(
                f"crop: {crop_height}x{crop_width} is larger than the image, {height}x{width} once resized"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UsageError(f"mean, std: expected three values each, std positive, got {list(mean)} and {list(std)}")
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        # The crop is part of the matrices: rows that nobody looks at are not computed.
        rows = resampling_matrix(image_size, height, interpolation)[top : top + crop_height]
        columns = resampling_matrix(image_size, width, interpolation)[left : left + crop_width]
        self.same_size = height == width == image_size
        self.crop = (slice(top, top + crop_height), slice(left, left + crop_width))
        self.size = (crop_height, crop_width)
        self.register_buffer("rows", rows.contiguous(), persistent=False)
        self.register_buffer("columns", columns.T.contiguous(), persistent=False)
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).reshape(3, 1, 1), persistent=False)

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        image = image[:, :, self.crop[0], self.crop[1]] if self.same_size else self.rows @ image @ self.columns
        return (image - self.mean) / self.std  # [B, 3, *size]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(pair) < 1:
        raise UsageError(f"size: expected positive numbers, got {pair}")
    return pair


def from_processor(processor: Any, image_size: int) -> Preprocessing:
    """The same preprocessing as a Hugging Face image processor's, for square images in [0, 1].

    The processor rounds resized pixels to 8 bits; here they stay real numbers, which is what a gradient needs.

    Raises:
        UsageError: the processor does something that is not known here; the message names it.
    """
    name = type(processor).__name__
    if getattr(processor, "do_pad", None):
        raise UsageError(f"preprocessing: {name} pads images, which is not supported; give resize=, crop=, mean=, std=")
    factor = getattr(processor, "rescale_factor", 1 / 255)
    if not getattr(processor, "do_rescale", True) or abs(factor * 255 - 1) > 1e-3:
        raise UsageError(f"preprocessing: {name} rescales by {factor:g} instead of 1/255; give mean= and std= instead")
    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    if getattr(processor, "do_resize", False):
        edge = _field(processor.size, "shortest_edge")
        resize = (edge, edge) if edge else (_field(processor.size, "height"), _field(processor.size, "width"))
        if not all(resize):
            raise UsageError(f"preprocessing: {name} resizes to {processor.size}, which is not supported")
        share = getattr(processor, "crop_pct", None)
        if share and edge and edge < 384:  # ConvNeXt: resize a little larger, then crop
            crop, resize = resize, (int(edge / share), int(edge / share))
    if getattr(processor, "do_center_crop", False):
        crop = (_field(processor.crop_size, "height"), _field(processor.crop_size, "width"))
    normal = bool(getattr(processor, "do_normalize", False))
    number = int(processor.resample if getattr(processor, "resample", None) is not None else 2)
    return Preprocessing(
        image_size,
        resize=resize,
        crop=crop,
        mean=processor.image_mean if normal else (0.0, 0.0, 0.0),
        std=processor.image_std if normal else (1.0, 1.0, 1.0),
        interpolation=next(k for k, v in FILTERS.items() if v == number),
    )


def _field(size: Any, name: str) -> int:
    """A field of a processor's size, which is a dict or an object; 0 where there is none."""
    value = size.get(name) if hasattr(size, "get") else getattr(size, name, None)
    return int(value or 0)
