"""Reading images that others made, and writing our own."""

from __future__ import annotations

import json
import math
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from .colour import to_srgb
from .fitting import Frame, frame, take

if TYPE_CHECKING:  # reading pixels needs no PyTorch, and `counterlens run` does without it
    from torch import Tensor

MAX_PIXELS = 64_000_000
T = TypeVar("T")
TIMES = ("started", "seconds", "path")
MAX_BYTES = 2**29  # of a file; some decoders hold all of it
# What Pillow may open. Not all that it can: some of its formats start other programs (EPS) or hold no picture.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "PCX")
HEIC = tuple(b"ftyp" + kind for kind in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"))
DARK = 16  # of 255: an image of more than 8 bits without a brighter pixel was made for another range, such as 12 bits
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation
# Pillow warns of large images on its own (the limit here is lower and an error) and of damaged metadata.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@contextmanager
def decoding(name: object, what: str = "cannot be read as an image") -> Iterator[None]:
    """Turn whatever a decoder raises on a broken file into one error of one line that names the file."""
    try:
        yield
    except CounterlensError:
        raise
    # Decoders of untrusted files raise anything: TypeError, RuntimeError, struct.error, OverflowError, MemoryError, ...
    # Whatever it is, this file is broken and the others are not.
    except Exception as error:
        reason = " ".join((str(getattr(error, "strerror", None) or error) or type(error).__name__).split())
        raise CounterlensError(f"{name}: {what} ({reason[:200]})") from error


def load_image(
    file: Path | BytesIO, size: int, name: str | None = None, interpolation: str = "lanczos", fit: str = "squash"
) -> Tensor:
    """Read any common image as RGB at `size` x `size`: [3, size, size] float32 in [0, 1].

    EXIF rotation is applied, colour profiles are converted to sRGB, transparency is laid over white, and pixels of more
    than 8 bits are reduced to 8 by the range of their type (floating point: 0 to 1). Of a file with several pictures
    the first is read, with a warning.

    Args:
        file: a path, or the bytes of a file.
        size: side in pixels.
        name: in messages, instead of the path.
        interpolation: `lanczos`, or `bilinear` as in the authors' code; both antialiased.
        fit: of pictures that are not square: `squash`, `crop` or `pad` (black), see `fitting.frame`. `EngineCore.read`
            knows what a classifier's own processor does.

    Raises:
        CounterlensError: the file is none (a folder, a pipe, a device: it is not opened), cannot be decoded, has more
            than 64 megapixels (refused before decoding), is more than 50 times as long as wide, or uses so little of
            its pixels' range that it would be black; the message names it.
    """
    import torch

    return torch.from_numpy(load_pixels(file, size, name, interpolation, fit)).permute(2, 0, 1).contiguous()


def load_pixels(
    file: Path | BytesIO, size: int, name: str | None = None, interpolation: str = "lanczos", fit: str = "squash"
) -> NDArray[np.float32]:
    """What `load_image` reads, as an array [size, size, 3] in [0, 1]."""
    path = name or file
    picture = open_picture(file, path)
    return as_pixels(take(picture, framed(fit, picture, path, size), interpolation))


def as_pixels(picture: Image.Image) -> NDArray[np.float32]:
    """A picture as an array [height, width, 3] in [0, 1]."""
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def framed(fit: str, picture: Image.Image, name: object, size: int, factor: int = 1, most: float = math.inf) -> Frame:
    """See `fitting.frame`; errors name the file."""
    try:
        return frame(fit, picture.size, size, factor, most)
    except CounterlensError as error:
        raise CounterlensError(f"{name}: {error}") from error


def open_picture(file: Path | BytesIO, name: object, managed: bool = True) -> Image.Image:
    """The picture in a file, upright, in RGB; see `load_image`, errors too.

    Args:
        file: a path, or the bytes of a file.
        name: in messages.
        managed: colour profiles are converted to sRGB; else they are ignored.
    """
    return _opened(file, name, lambda image: _decode(image, name, managed))


def open_both(file: Path | BytesIO, name: object, managed: bool = True) -> tuple[Image.Image, Image.Image]:
    """The picture as `open_picture` gives it, and as other programs read it.

    They turn it by its EXIF and have Pillow convert it to RGB, and nothing else: no profile is followed, transparency
    is dropped, and greys of 16 bits are cut off at 255.
    """
    return _opened(
        file, name, lambda image: (_decode(image, name, managed), _turned(image.convert("RGB"), image))
    )  # fmt: skip


def _opened(file: Path | BytesIO, name: object, decode: Callable[[Image.Image], T]) -> T:
    check_file(file, name)
    with decoding(name):
        try:
            if isinstance(file, BytesIO):
                file.seek(0)
            with Image.open(file, formats=formats_of(file)) as image:
                return decode(image)
        except Image.DecompressionBombError as error:
            raise CounterlensError(f"{name}: more than {MAX_PIXELS // 10**6} megapixels") from error
        except UnidentifiedImageError as error:
            raise CounterlensError(f"{name}: not an image that can be read{_hint(file)}") from error


def formats_of(file: Path | BytesIO) -> tuple[str, ...]:
    """What may be in the file: HEIC as well, where pillow-heif is installed and the file looks like one."""
    if _start(file)[4:12] not in HEIC:
        return FORMATS
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def _start(file: Path | BytesIO) -> bytes:
    if isinstance(file, BytesIO):
        return bytes(file.getbuffer()[:64])
    with open(file, "rb") as opened:
        return opened.read(64)


def check_file(file: Path | str | BytesIO, name: object) -> None:
    """Refuse what is no regular file, unopened (a pipe would hang for ever), and files that are empty or huge.

    Raises:
        CounterlensError: naming it.
    """
    if isinstance(file, BytesIO):
        mode, size = stat.S_IFREG, len(file.getbuffer())
    else:
        try:
            found = Path(file).stat()
        except FileNotFoundError as error:
            raise CounterlensError(f"{name}: no such file") from error
        except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
            raise CounterlensError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        mode, size = found.st_mode, found.st_size
    if stat.S_ISDIR(mode):
        raise CounterlensError(f"{name}: a folder, not a file")
    if not stat.S_ISREG(mode):
        kind = "named pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise CounterlensError(f"{name}: a {kind}, not a file; it is not opened")
    if size == 0:
        raise CounterlensError(f"{name}: an empty file")
    if size > MAX_BYTES:
        raise CounterlensError(f"{name}: {size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f}")


def _hint(file: Path | BytesIO) -> str:
    """What a file that Pillow does not know is, where a person can do something about it."""
    start = _start(file)
    if start[4:12] in HEIC:
        more = "" if "HEIF" in formats_of(file) else ", or install what reads it: pip install pillow-heif"
        return f" (HEIC; save it as JPEG or PNG{more})"
    if start.startswith(b"version https://git-lfs"):
        return " (a pointer of Git LFS; fetch the picture with `git lfs pull`)"
    return ""


def _turned(picture: Image.Image, image: Image.Image) -> Image.Image:
    """A picture as the EXIF of its file says; `ImageOps.exif_transpose` would fail where other entries are broken."""
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return picture if turn is None else picture.transpose(turn)


def _decode(image: Image.Image, path: object, managed: bool) -> Image.Image:
    """The first picture of an open file, upright, in RGB."""
    if image.width * image.height > MAX_PIXELS:
        raise CounterlensError(
            f"{path}: {image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} megapixels"
        )
    if getattr(image, "is_animated", False) and image.format != "MPO":  # cameras keep previews and depth in those
        warnings.warn(f"{path}: {getattr(image, 'n_frames', 'several')} pictures; the first is read", stacklevel=4)
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()  # Pillow turns TIFFs on its own, and then their EXIF says nothing of it
    return _turned(_to_rgb(image, path, deep, managed), image)


def _to_rgb(image: Image.Image, path: object, deep: bool, managed: bool) -> Image.Image:
    profile = image.info.get("icc_profile") if managed else None
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, path)
    elif deep and image.mode in ("L", "LA", "RGB", "RGBA", "RGBX"):
        channels: Any = [image.getchannel(band).getextrema() for band in image.getbands() if band not in "AX"]
        if max(high for _, high in channels) <= DARK:
            raise CounterlensError(f"{path}: 16-bit pixels, all nearly black; save it with 8 bits")
    alpha, grey = None, image.mode in ("L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        bands: Any = image.getextrema()
        if bands[3][1] == 0 and any(low != high for low, high in bands[:3]):
            raise CounterlensError(f"{path}: a picture whose every pixel is transparent; save it without transparency")
        alpha = image.getchannel("A")
    image = image.getchannel(0) if grey else image if image.mode == "CMYK" else image.convert("RGB")
    if profile:
        image.info["icc_profile"] = profile
        image = to_srgb(image, path)
    image = image.convert("RGB")
    if alpha is not None:  # laid over the white of sRGB
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _to_8_bits(image: Image.Image, path: object) -> Image.Image:
    """Greys of integers with more than 8 bits, or of floating point, scaled by the range of their type."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample; PNG, PPM and JPEG 2000 have 16, or were scaled to them
    signed = tags.get(339, (1,))[0] == 2  # SampleFormat
    values: Any = np.asarray(image)
    if image.mode == "F":
        kind, top = "floating-point", 1.0
        if not np.isfinite(values).all():
            raise CounterlensError(f"{path}: floating-point pixels, some of them NaN or infinite")
    else:
        kind, top = f"{bits}-bit integer", float(2 ** (bits - signed) - 1)
        if bits == 32 and not signed:
            values = values.view(np.uint32)  # Pillow holds them as signed
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > top or 0 < high * 255 <= DARK * top:
        raise CounterlensError(
            f"{path}: {kind} pixels from {low:g} to {high:g}, where 0 is black and {top:.0f} white; save it with 8 bits"
        )
    # float32 rounds 16 bits exactly (they are never half way between two of 8 bits) and is half of float64
    grey = (values.astype(np.float32 if bits <= 16 else np.float64) * (255 / top)).round().astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white
        grey = 255 - grey
    elif isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def to_uint8(image: Tensor) -> Tensor:
    """Image in [0, 1] to 8 bits, rounded to nearest, values outside clamped; same shape, uint8."""
    return (image.clamp(0, 1) * 255).round().byte()


def as_saved(image: Tensor) -> Tensor:
    """The image as it comes back from the saved 8-bit file, in the input's dtype."""
    return to_uint8(image).to(image.dtype) / 255


def save_png(
    image: Tensor,  # [3, H, W] in [0, 1]
    path: Path,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write an 8-bit PNG; the file appears whole or not at all. `facts`: see `write_png`.

    Raises:
        CounterlensError: it cannot be written; the message names it.
    """
    write_png(Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy()), path, facts)


def write_png(picture: Image.Image, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a picture as PNG; the file appears whole or not at all.

    Args:
        picture: any that PNG can hold.
        path: of the file.
        facts: what made it, kept in the file as JSON in a text chunk named `counterlens`; without what differs between
            two runs of the same (`TIMES`), so that the same picture is the same file.

    Raises:
        CounterlensError: it cannot be written; the message names it.
    """
    write_atomically(path, lambda file: picture.save(file, format="PNG", pnginfo=png_text(facts or {})))


def png_text(facts: Mapping[str, Any]) -> PngInfo:
    """Facts as a PNG's text chunk named `counterlens`; none where there are none."""
    info = PngInfo()
    if facts:
        info.add_text("counterlens", json.dumps({k: v for k, v in facts.items() if k not in TIMES}))
    return info


def make_folder(path: Path) -> Path:
    """Create an output folder and make sure that files can be written there.

    Raises:
        UsageError: it cannot be; the message names it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # of no name that another process may choose, too
            pass
    except OSError as error:
        raise UsageError(f"out: {path} cannot be written ({error.strerror or error})") from error
    return path
