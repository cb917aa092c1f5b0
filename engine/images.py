"""Reading images that others made, and writing our own."""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import CounterlensError, UsageError
from .files import write_atomically

MAX_PIXELS = 64_000_000


def load_image(file: Path | BytesIO, size: int, name: str | None = None) -> Tensor:
    """Read any common image as RGB at `size` x `size`: [3, size, size] float32 in [0, 1].

    EXIF rotation is applied, transparency is laid over white, 16-bit greys are reduced to 8 bits, and other sizes are
    resized (Lanczos, directly to the square).

    Args:
        file: a path, or the bytes of a file.
        size: side in pixels.
        name: in messages, instead of the path.

    Raises:
        CounterlensError: the file cannot be read as an image, or has more than 64 megapixels (refused before
            decoding); the message names it.
    """
    path = name or file
    try:
        # Pillow warns of large images on its own; the limit here is lower and an error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise CounterlensError(
                        f"{path}: {image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} megapixels"
                    )
                image.load()
                rgb = _to_rgb(ImageOps.exif_transpose(image), path)
    except Image.DecompressionBombError as error:
        raise CounterlensError(f"{path}: more than {MAX_PIXELS // 10**6} megapixels") from error
    except FileNotFoundError as error:
        raise CounterlensError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        empty = (file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())) == 0
        raise CounterlensError(f"{path}: {'an empty file' if empty else 'not an image that can be read'}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise CounterlensError(f"{path}: cannot be read as an image ({error})") from error
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(rgb, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image, path: object) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys; PNG files of them open as I;16 or I
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise CounterlensError(f"{path}: 32-bit integer pixels are not supported; save it with 8 or 16 bits")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise CounterlensError(f"{path}: floating-point pixels are not supported; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def to_uint8(image: Tensor) -> Tensor:
    """Image in [0, 1] to 8 bits, rounded to nearest, values outside clamped; same shape, uint8."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def as_saved(image: Tensor) -> Tensor:
    """The image as it comes back from the saved 8-bit file, in the input's dtype."""
    return to_uint8(image).to(image.dtype) / 255


def save_png(
    image: Tensor,  # [3, H, W] in [0, 1]
    path: Path,
) -> None:
    """Write an 8-bit PNG; the file appears whole or not at all.

    Raises:
        CounterlensError: it cannot be written; the message names it.
    """
    write_png(Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy()), path)


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG; the file appears whole or not at all.

    Raises:
        CounterlensError: it cannot be written; the message names it.
    """
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def make_folder(path: Path) -> Path:
    """Create an output folder and make sure that files can be written there.

    Raises:
        UsageError: it cannot be; the message names it.
    """
    probe = path / ".counterlens-probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"out: {path} cannot be written ({error.strerror or error})") from error
    return path
