"""Where an image may change: a mask's file, a folder of them, or a box in pixels."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterlens.export.hashing import file_digest

from ..errors import CounterlensError, UsageError
from .files import FORMATS, check_file, decoding, open_picture
from .fitting import Frame, take

if TYPE_CHECKING:  # reading pixels needs no PyTorch
    from torch import Tensor

    from .sources import Sample

AUTO = "auto"
BOX = re.compile(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*")
NUMBERS = re.compile(r"[\d\s,;x.+-]*")
HALF = 128  # of 255: from here on a grey pixel of a mask lies in the region
Mask = NDArray[np.bool_]


def parse_box(text: str) -> tuple[int, int, int, int] | None:
    """Left, top, width and height of text such as 12,4,100,80; None where it is no box but a path.

    Raises:
        UsageError: it is meant to be a box and is none.
    """
    found = BOX.fullmatch(text)
    if found is None:
        if NUMBERS.fullmatch(text):
            raise UsageError(f"region: expected auto, x,y,w,h in whole pixels or a mask's file, got {text!r}")
        return None
    x, y, w, h = map(int, found.groups())
    if w < 1 or h < 1:
        raise UsageError(f"region: the box {text} is empty; its width and height are its last two numbers")
    return x, y, w, h


def box_mask(box: tuple[int, int, int, int], size: tuple[int, int], name: str = "region") -> Mask:
    """A box as a mask of an image of this width and height: [H, W].

    Raises:
        UsageError: the box reaches beyond the image.
    """
    (x, y, w, h), (width, height) = box, size
    if x + w > width or y + h > height:
        raise UsageError(f"{name}: the box {x},{y},{w},{h} reaches beyond the image of {width}x{height} pixels")
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[y : y + h, x : x + w] = True
    return mask


def read_mask(file: Path | BytesIO, name: object) -> Mask:
    """A mask's file at its own size, upright: [H, W]; white, or lighter than half, is the region.

    Raises:
        CounterlensError: it is no image, has transparent pixels (which side of it is meant?), or is black everywhere.
    """
    check_file(file, name)
    with decoding(name), Image.open(file, formats=FORMATS) as image:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            raise CounterlensError(f"{name}: a mask with transparent pixels; save it as black and white, without them")
    rgb = open_picture(file, name, managed=False)
    grey = np.asarray(rgb.convert("L"))
    if grey.max() < HALF:
        raise CounterlensError(
            f"{name}: an empty mask; nothing in it is lighter than half (its largest value is {grey.max()} of 255)"
        )
    return np.asarray(grey >= HALF)


def framed(mask: Mask, made: Frame, name: object) -> Mask:
    """A mask of the picture's own size as the image shows it: pixels of which at least half lies in the region: [H, W].

    Raises:
        CounterlensError: none does.
    """
    if mask.shape[::-1] != made.size or not made.whole:
        picture = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
        mask = np.asarray(take(picture, made, "box").convert("L")) >= HALF
    if not mask.any():
        raise CounterlensError(f"{name}: nothing of the region is left in what the model sees of the picture")
    return mask


def fitted(mask: Mask, made: Frame, name: object) -> Mask:
    """A mask's file, of the picture's own size or of the image's, as the image shows it: [H, W].

    Raises:
        CounterlensError: it has another size, or nothing of it is left.
    """
    if mask.shape[::-1] == made.picture:
        return framed(mask, made, name)
    if mask.shape[::-1] != made.size:
        own, photo, seen = ("x".join(map(str, s)) for s in (mask.shape[::-1], made.picture, made.size))
        raise CounterlensError(
            f"{name} has {own} pixels; a mask has the picture's own {photo}, or {seen}, as the model sees"
        )
    return mask


@dataclass(frozen=True)
class Masks:
    """What `--region` says, for files: `auto`, a box, a mask, or a folder of masks that are named like the images.

    Raises:
        UsageError: there is no such file, or the text is none of these.
    """

    text: str

    def __post_init__(self) -> None:
        if self.text != AUTO and self.box is None and not self.path.exists():
            raise UsageError(f"region: {self.text} is neither auto, nor x,y,w,h, nor a file or folder that is there")
        if self.path.is_file() and self.box is None:
            try:
                self._read(self.path)
            except CounterlensError as error:
                raise UsageError(f"region: {error}") from error

    @cached_property
    def box(self) -> tuple[int, int, int, int] | None:
        """Left, top, width and height, in pixels of the picture."""
        return parse_box(self.text)

    @property
    def path(self) -> Path:
        return Path(self.text)

    @property
    def files(self) -> list[Path]:
        """What it reads."""
        if self.text == AUTO or self.box is not None:
            return []
        return [self.path] if self.path.is_file() else [p for p in sorted(self.path.rglob("*")) if p.is_file()]

    def facts(self) -> dict[str, Any]:
        """What was asked for, and what the files hold: what must not change under a run that goes on."""
        if self.text == AUTO or self.box is not None:
            return {"region": self.text}
        if self.path.is_file():
            return {"region": self.text, "region_sha256": file_digest(self.path)}
        found = [(file.relative_to(self.path).as_posix(), file_digest(file)) for file in self.files]
        return {"region": self.text, "region_sha256": hashlib.sha256(repr(found).encode()).hexdigest()}

    def of(self, sample: Sample, made: Frame) -> Tensor | str:
        """Where a sample may change: `auto`, or a mask [H, W] of the image, which is what `made` says of its picture.

        A mask has the picture's own size, or that of the image.

        Raises:
            CounterlensError: there is none for it, or it does not fit; the message names the mask.
        """
        import torch

        if self.text == AUTO:
            return AUTO
        if self.box is not None:
            return torch.from_numpy(framed(box_mask(self.box, made.picture), made, f"region: {self.text}"))
        path = self.path if self.path.is_file() else self._named_like(sample)
        return torch.from_numpy(fitted(self._read(path), made, f"region: {path}"))

    def of_photo(self, sample: Sample, made: Frame) -> Tensor | None:
        """The region in the picture's own pixels, [H, W] bool; None where it was not said in them."""
        import torch

        if self.text == AUTO:
            return None
        if self.box is not None:
            return torch.from_numpy(box_mask(self.box, made.picture))
        mask = self._read(self.path if self.path.is_file() else self._named_like(sample))
        return torch.from_numpy(mask) if mask.shape[::-1] == made.picture else None

    def _named_like(self, sample: Sample) -> Path:
        # A path of the image itself, absolute or leading out of the folder, would name no mask but some other file.
        inside = not Path(sample.id).is_absolute() and ".." not in Path(sample.id).parts
        for name in ((sample.id,) if inside else ()) + (sample.path.name,):
            for wanted in (self.path / name, (self.path / name).with_suffix(".png")):
                if wanted.is_file():
                    return wanted
        raise CounterlensError(f"region: {self.path} has no {sample.path.with_suffix('.png').name}")

    def _read(self, path: Path) -> Mask:
        known: dict[Path, Mask] = self.__dict__.setdefault("_known", {})
        if path == self.path and path in known:
            return known[path]
        mask = read_mask(path, path)
        if path == self.path:  # one for all
            known[path] = mask
        return mask
