"""Regions as callers give them: `auto`, a box or a mask's file as text, a tensor or an array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CounterlensError, UsageError
from ..guidance.region import Region
from ..images.masks import AUTO, HALF, box_mask, parse_box, read_mask

RegionLike = str | Path | Tensor | NDArray[Any]


def check_region(region: RegionLike | None, image: Tensor) -> Region | None:
    """A region of an image [3, H, W]: `auto`, or a mask [H, W] bool on the CPU; None: anywhere.

    Args:
        region: `auto`; x,y,w,h in pixels of the image; a mask's file of the image's size; or a mask [H, W] or
            [1, H, W], of truth values, of 0 and 1, in [0, 1], or of 8 bits: from half on a pixel lies in the region.
        image: whose region it is.

    Raises:
        UsageError: it is none, of another size, or empty.
    """
    if region is None:
        return None
    height, width = image.shape[-2:]
    if isinstance(region, str | Path):
        text = str(region)
        if text == AUTO:
            return "auto"
        if (box := parse_box(text)) is not None:
            return torch.from_numpy(box_mask(box, (width, height)))
        try:
            given: Any = read_mask(Path(text), text)
        except CounterlensError as error:
            raise UsageError(f"region: {error}") from error
    else:
        given = region
    mask = torch.as_tensor(np.asarray(given) if not isinstance(given, Tensor) else given).detach().cpu()
    if mask.ndim == 3 and len(mask) == 1:
        mask = mask[0]
    if mask.shape != (height, width):
        raise UsageError(f"region: expected a mask of the image's size, [{height}, {width}], got {list(mask.shape)}")
    if mask.is_floating_point():
        if not ((mask >= 0) & (mask <= 1)).all():
            raise UsageError("region: expected a mask in [0, 1]")
        mask = mask >= 0.5
    elif mask.dtype != torch.bool:
        if mask.min() < 0 or mask.max() > 255:
            raise UsageError(f"region: expected a mask of 0 and 1, or of 8 bits, got {mask.min()} to {mask.max()}")
        mask = mask >= (1 if mask.max() <= 1 else HALF)
    if not mask.any():
        raise UsageError("region: an empty mask; nothing could change")
    return mask


def one_region_each(region: RegionLike | Sequence[RegionLike | None] | None, images: Tensor) -> list[RegionLike | None]:
    """A region for each image [B, 3, H, W]: one for all, a sequence, or masks [B, H, W] or [B, 1, H, W].

    Raises:
        UsageError: there are more or fewer than images.
    """
    count = len(images)
    many = isinstance(region, Sequence) and not isinstance(region, str)
    if isinstance(region, Tensor | np.ndarray):
        many = region.ndim == 4 or (region.ndim == 3 and region.shape[0] != 1)
        if many and len(region) == 1:
            region, many = region[0], False
    if not many:
        return [region] * count  # type: ignore[list-item]
    if len(region) != count:  # type: ignore[arg-type]
        raise UsageError(f"region: expected one for all or {count}, one per image, got {len(region)}")  # type: ignore[arg-type]
    return list(region)  # type: ignore[arg-type]
