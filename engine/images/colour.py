"""Colour profiles: what a picture's numbers mean becomes sRGB, which models were trained on."""

from __future__ import annotations

import warnings
from functools import cache
from io import BytesIO
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

LARGEST = 2**24  # bytes of a profile
SAME = 1  # of 255: profiles that move no colour by more are sRGB, and pixels stay as they are


def to_srgb(image: Image.Image, path: object) -> Image.Image:
    """A picture in the colours of its own profile as sRGB, in RGB; as it is where it has none, or that is sRGB.

    Relative colorimetric, with black point compensation. A profile that cannot be read, or is of other colours than
    the picture's, is a warning that names the file, and the pixels are taken for sRGB.

    Args:
        image: in mode L, RGB or CMYK.
        path: in warnings.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("L", "RGB", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(bytes(profile[:LARGEST])))
        if source.profile.xcolor_space.strip() == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        transform = _transform(source, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(
            f"{path}: its colour profile cannot be used ({why[:120]}); its pixels are taken for sRGB", stacklevel=2
        )
        return image
    if transform is None:
        return image
    return cast("Image.Image", ImageCms.applyTransform(image, transform))  # None where it changes the image in place


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _transform(source: ImageCms.ImageCmsProfile, mode: str) -> Any:
    """What brings pixels of a mode to sRGB; None where the profile is sRGB already."""
    made: Any = ImageCms.buildTransform(
        source, _srgb(), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )  # fmt: skip
    if mode == "CMYK":
        return made
    side = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "L":
        ramp = np.arange(256, dtype=np.uint8)[None]
        expected = np.repeat(ramp[..., None], 3, axis=2)
    else:
        ramp = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(1, -1, 3)
        expected = ramp
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(ramp), made), dtype=np.int16)
    return None if np.abs(moved - expected).max() <= SAME else made
