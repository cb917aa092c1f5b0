"""What stands between an image in [0, 1] and a classifier: resize, centre crop, normalise, all differentiable.

Of images that are not square a processor does one of several things, its `geometry`, which is measured as well.

What others' processors do is measured, not read from their fields: fields have names and meanings of their own in
every class (`crop_pct`, `rescale_offset`, `include_top`, 256/224 in LeViT's code). Whatever is built is held to the
processor on pictures before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UsageError

# Processors round resized pixels to 8 bits: how far ours may be from theirs, at most and on average.
MOST, MEAN = 3 / 255, 0.75 / 255
# Of images that are not square. crop: the shorter side is resized, the middle kept. squash: both sides are. pad: the
# longer side is resized, a colour lies beside the shorter one. whole: the shorter side is resized, everything is kept.
Geometry = Literal["crop", "squash", "pad", "whole"]
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
    """Resize, centre crop and normalise images: square ones of one size, others by their geometry.

    Args:
        image_size: side of the square images that come in.
        resize: side or (height, width) to resize to; None keeps the size.
        crop: side or (height, width) of the centre crop; None keeps everything.
        mean, std: for each channel, of images in [0, 1].
        interpolation: Pillow's `nearest`, `bilinear`, `bicubic`, `lanczos`, `box` or `hamming`.
        order: which channel of RGB each channel is; (2, 1, 0) for models of BGR.
        pad: a crop that is larger than the image has black around it, as in transformers; else it is an error.
        geometry: of images that are not square; None is unknown, and they are squashed.
        colour: of the geometry `pad`, in [0, 1].

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
        order: Sequence[int] = (0, 1, 2),
        pad: bool = False,
        geometry: Geometry | None = "squash",
        colour: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> None:
        super().__init__()
        self.geometry, self.colour, self.interpolation = geometry, tuple(colour), interpolation
        self.resize = height, width = _pair(image_size if resize is None else resize)
        crop_height, crop_width = _pair((height, width) if crop is None else crop)
        if (crop_height > height or crop_width > width) and not pad:
            raise UsageError(
                f"crop: {crop_height}x{crop_width} is larger than the image, {height}x{width} once resized"
            )
        if len(mean) != 3 or len(std) != 3 or not min(std) > 0 or not all(map(math.isfinite, [*mean, *std])):
            raise UsageError(f"mean, std: expected three values each, std positive, got {list(mean)} and {list(std)}")
        # The crop is part of the matrices: rows that nobody looks at are not computed, rows of black are zero.
        rows, top = _cropped(resampling_matrix(image_size, height, interpolation), crop_height)
        columns, left = _cropped(resampling_matrix(image_size, width, interpolation), crop_width)
        self.square = image_size
        self.same_size = height == width == image_size and min(top, left) >= 0
        self.crop = (slice(top, top + crop_height), slice(left, left + crop_width))
        self.size = (crop_height, crop_width)
        self.order = tuple(order)
        self.register_buffer("rows", rows.contiguous(), persistent=False)
        self.register_buffer("columns", columns.T.contiguous(), persistent=False)
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).reshape(3, 1, 1), persistent=False)
        # A buffer too, so that whatever hashes a model sees it.
        self.register_buffer("channels", torch.tensor(list(order)), persistent=False)

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        if image.shape[2:] != (self.square, self.square):
            image = self._of_other_size(image)
        else:
            image = image[:, :, self.crop[0], self.crop[1]] if self.same_size else self.rows @ image @ self.columns
        if self.order != (0, 1, 2):
            image = torch.cat([image[:, c : c + 1] for c in self.order], dim=1)
        return (image - self.mean) / self.std  # [B, 3, *size]

    def _of_other_size(
        self,
        image: Tensor,  # [B, 3, H, W]
    ) -> Tensor:
        resized, window = self.layout(image.shape[2], image.shape[3])
        rows, columns = (
            _window(size, new, self.interpolation, count).to(self.rows)
            for size, new, count in zip(image.shape[2:], resized, window, strict=True)
        )
        out = rows @ image @ columns.T
        if any(self.colour):
            empty = 1 - (rows.sum(dim=1)[:, None] * columns.sum(dim=1)).round()
            out = out + empty * out.new_tensor(self.colour).reshape(3, 1, 1)
        return out  # [B, 3, *window]

    def layout(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of images of a size: what they are resized to, and what is cut out of their middle, (height, width) each."""
        short, long = min(height, width), max(height, width)
        resized = self.resize
        if self.geometry in ("crop", "whole"):
            side = resized[0]
            longer = int(side * long / short)
            resized = (longer, side) if height > width else (side, longer)
        elif self.geometry == "pad":
            shorter = max(1, round(resized[0] * short / long))
            resized = (resized[0], shorter) if height > width else (shorter, resized[0])
        return resized, resized if self.geometry == "whole" else self.size

    def of_picture(self, picture: Image.Image) -> Tensor:
        """What a pipeline of Pillow's makes of a picture of any size: [3, h, w]; not differentiable."""
        resized, window = self.layout(picture.height, picture.width)
        picture = picture.convert("RGB").resize((resized[1], resized[0]), Image.Resampling(FILTERS[self.interpolation]))
        pixels = as_tensor(picture)[0]
        for dim, (size, count) in enumerate(zip(resized, window, strict=True), start=1):
            first = (size - count) // 2 if count <= size else -math.ceil((count - size) / 2)
            pixels = pixels.narrow(dim, max(first, 0), min(count, size))
        down, across = (n - m for n, m in zip(window, pixels.shape[1:], strict=True))
        before = math.ceil(down / 2), math.ceil(across / 2)
        out = pixels.new_tensor(self.colour).reshape(3, 1, 1).expand(3, *window).clone()
        out[:, before[0] : before[0] + pixels.shape[1], before[1] : before[1] + pixels.shape[2]] = pixels
        return (out[list(self.order)] - self.mean.to(out)) / self.std.to(out)


@lru_cache(maxsize=32)
def _window(size: int, new_size: int, interpolation: str, count: int) -> Tensor:
    return _cropped(resampling_matrix(size, new_size, interpolation), count)[0].contiguous()


def _cropped(matrix: Tensor, size: int) -> tuple[Tensor, int]:
    """The middle `size` rows of a resampling matrix and the first one's place; negative where rows of black stand."""
    height = len(matrix)
    if size <= height:
        first = (height - size) // 2
        return matrix[first : first + size], first
    before = math.ceil((size - height) / 2)
    return torch.nn.functional.pad(matrix, (0, 0, before, size - height - before)), -before


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(pair) < 1:
        raise UsageError(f"size: expected positive numbers, got {pair}")
    return pair


def from_processor(processor: Any, image_size: int) -> Preprocessing:
    """The same preprocessing as a Hugging Face image processor's, for square images in [0, 1].

    Sizes and colours are measured on the processor itself; the result is held to it on two pictures. The processor
    rounds resized pixels to 8 bits; here they stay real numbers, which is what a gradient needs.

    Raises:
        UsageError: the processor does something that cannot be done here; the message names it.
    """
    name = _name(processor)
    number = getattr(processor, "resample", None)
    number = getattr(number, "value", 2 if number is None else number)
    interpolation = number if number in FILTERS else next((k for k, v in FILTERS.items() if v == number), None)
    if interpolation is None:
        raise UsageError(f"preprocessing: {name} has resample {number!r}; expected one of {list(FILTERS.values())}")

    def process(image: Image.Image, **steps: bool) -> Tensor:
        return _pixels(processor, name, image, steps)

    plain = {step: False for step in ("do_center_crop", "do_pad") if hasattr(processor, step)}
    one = _pictures(image_size, image_size)[0]
    final = process(one)
    resized = process(one, **plain)
    scale, offset, order = _colours(process, image_size, name)
    sizes = [(resized.shape[1], resized.shape[2])]
    if share := getattr(processor, "crop_pct", None):  # resized a little larger, then cropped, in one step
        sizes.append((int(sizes[0][0] / share), int(sizes[0][1] / share)))
    found = []
    for size in sizes:
        made = Preprocessing(
            image_size, resize=size, crop=(final.shape[1], final.shape[2]), interpolation=interpolation, order=order,
            mean=[-o / s for o, s in zip(offset, scale, strict=True)], std=[1 / s for s in scale], pad=True,
        )  # fmt: skip
        found.append(difference(made, process, image_size))
        if not found[-1]:
            made.geometry = measured_geometry(made, process, image_size)
            return made
    raise UsageError(
        f"preprocessing: {name} does more than resize, centre crop and normalise ({found[0]}), with "
        f"{_said(processor)}; it cannot be differentiated here: wrap the module with resize=, crop=, mean=, std= of "
        "your own"
    )


def pixels_of(processor: Any) -> Callable[[Image.Image], Tensor]:
    """A Hugging Face processor as a function of one picture: [3, h, w]; raises a `UsageError` where it fails."""
    return lambda picture: _pixels(processor, _name(processor), picture, {})


def _name(processor: Any) -> str:
    return type(processor).__name__.removesuffix("Pil").removesuffix("Fast")


def measured_geometry(
    made: Preprocessing, process: Callable[[Image.Image], Tensor], image_size: int
) -> Geometry | None:
    """What another's pipeline does with pictures that are not square; None where it is something else.

    `made` is the same on square ones; its geometry is tried out, and its colour set.
    """
    pictures = [*_pictures(image_size, 3 * image_size), *_pictures(3 * image_size, image_size)]
    try:
        expected = {id(picture): process(picture) for picture in pictures}
        corner = process(Image.new("RGB", pictures[0].size, "white"))[:, 0, 0]
    except UsageError:
        return None
    black = made.colour
    for geometry in get_args(Geometry):
        made.geometry = geometry
        colour = (corner * made.std.flatten() + made.mean.flatten())[torch.tensor(made.order).argsort()]
        made.colour = tuple(colour.clamp(0, 1).tolist()) if geometry == "pad" else black
        if not difference(made, lambda picture: expected[id(picture)], image_size, pictures):
            return geometry
    made.colour = black
    return None


def difference(
    made: Preprocessing,
    process: Callable[[Image.Image], Tensor],
    image_size: int,
    pictures: Sequence[Image.Image] | None = None,
) -> str:
    """How pixels that a preprocessing makes differ from another's [3, h, w]; empty where rounding alone does it."""
    for picture in _pictures(image_size, image_size) if pictures is None else pictures:
        expected = process(picture)
        got = made(as_tensor(picture))[0]
        if got.shape != expected.shape:
            return f"{expected.shape[1]}x{expected.shape[2]} pixels, not {got.shape[1]}x{got.shape[2]}"
        apart = ((got - expected) * made.std).abs()  # in [0, 1], whatever the normalisation
        if not (apart.max() <= MOST and apart.mean() <= MEAN):  # NaN is different
            return f"pixels differ by {apart.mean() * 255:.1f} of 255 on average, by {apart.max() * 255:.0f} at most"
    return ""


def as_tensor(picture: Image.Image) -> Tensor:
    """A picture as [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 255


def _pixels(processor: Any, name: str, image: Image.Image, steps: dict[str, bool]) -> Tensor:
    """What a processor makes of one image: [3, h, w]."""
    try:
        out = processor(image, return_tensors="pt", **steps)["pixel_values"]
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"preprocessing: {name} fails on one image of {image.width}x{image.height} ({type(error).__name__}: {line})"
        ) from error
    if not isinstance(out, Tensor) or out.ndim != 4 or out.shape[:2] != (1, 3) or not out.is_floating_point():
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"preprocessing: {name} makes {got} of one image; expected [1, 3, height, width]")
    return out[0].float()


def _colours(
    process: Callable[[Image.Image], Tensor], size: int, name: str
) -> tuple[list[float], list[float], list[int]]:
    """What a processor does to colours: each channel's factor, offset, and the channel of RGB that it is."""

    def middle(*colour: int) -> Tensor:
        out = process(Image.new("RGB", (size, size), colour))
        return out[:, out.shape[1] // 2, out.shape[2] // 2].double()

    black = middle(0, 0, 0)
    parts = torch.stack([middle(255, 0, 0), middle(0, 255, 0), middle(0, 0, 255)], dim=1) - black[:, None]  # [out, in]
    order = parts.abs().argmax(dim=1)
    scale = parts.gather(1, order[:, None])[:, 0]
    rest = parts.scatter(1, order[:, None], 0.0).abs().amax(dim=1)
    grey = black + scale * 51 / 255
    if not (scale > 0).all() or (rest > 1e-4 * scale).any() or ((middle(51, 51, 51) - grey).abs() > 1e-3 * scale).any():
        raise UsageError(f"preprocessing: {name} mixes or bends colours, not a factor and an offset for each channel")
    return scale.tolist(), black.tolist(), order.tolist()


def _pictures(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """Two pictures that tell preprocessings apart: shapes and texture of mid tones, and the same in a light frame."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5, generator=g), size=(height, width), mode="bicubic")
    # Mid tones: processors clip at black and white what filters overshoot, a gradient must not be.
    full = ((0.6 * coarse + 0.4 * torch.rand(1, 3, height, width, generator=g)) * 0.5 + 0.25).clamp(0.2, 0.8)
    rows, columns = slice(height // 6, height - height // 4), slice(width // 5, width - width // 6)
    framed = torch.full_like(full, 0.85)
    framed[:, :, rows, columns] = full[:, :, rows, columns]
    one, two = ((x[0].permute(1, 2, 0) * 255).round().byte().numpy() for x in (full, framed))
    return Image.fromarray(one), Image.fromarray(two)


# Fields of every processor that cannot be the reason of other pixels, or are understood.
USUAL = {
    "resample", "rescale_factor", "image_mean", "image_std", "do_resize", "do_rescale", "do_normalize",
    "do_convert_rgb", "data_format", "input_data_format", "return_tensors", "model_input_names", "default_to_square",
    "do_reduce_labels", "disable_grouping", "device", "image_processor_type", "feature_extractor_type",
}  # fmt: skip


def _said(processor: Any) -> str:
    """A processor's own fields, for a message."""
    fields = {k: v for k, v in vars(processor).items() if not k.startswith("_") and k not in USUAL}
    said = [f"{k}={_short(v)}" for k, v in fields.items() if v is not None and v is not False]
    return ", ".join(said[:8]) or "no field that would tell"


def _short(value: Any) -> str:
    sizes = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    return repr({k: v for k, v in sizes.items() if v is not None} if sizes else value)[:60]
