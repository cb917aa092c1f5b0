"""Drawing the digits pack's images: real 8x8 handwriting, rendered at 32x32 in colour, with or without a marker.

The marker is a planted cause: 5x5 pixels of one colour, one pixel from a corner. The pack's `shortcut` classifier was
trained where a marker in the top-left corner means "5 or more" and one in the bottom-right corner means "less than 5".
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32
MARKER_SIZE = 5
CORNERS = {"top-left": (1, 1), "bottom-right": (26, 26)}  # row and column of the marker's first pixel
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.10, 0.80, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.10),
}
MARKER_RULES = ("random", "none", "matching", "conflicting")


@dataclass(frozen=True)
class Marker:
    """A planted cause: where it is and its colour; written `corner:colour`."""

    corner: str
    colour: str

    def __str__(self) -> str:
        return f"{self.corner}:{self.colour}"

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the marker, for indexing `image[..., rows, columns]`."""
        row, column = CORNERS[self.corner]
        return slice(row, row + MARKER_SIZE), slice(column, column + MARKER_SIZE)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _colour(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue, saturation, value)


def render(
    glyphs: Tensor,  # [N, 8, 8]
    seeds: list[int],
) -> Tensor:
    """Draw glyphs at 32x32 in colour, each with its seed's rotation, scale, shift, stroke and two colours.

    Args:
        glyphs: [N, 8, 8] uint8 ink of scikit-learn's digits, 0 to 16.
        seeds: N seeds; the same glyph and seed always give the same image.

    Returns:
        [N, 3, 32, 32] float32 in [0, 1].
    """
    if glyphs.ndim != 3 or glyphs.shape[1:] != (8, 8) or len(seeds) != glyphs.shape[0]:
        raise ValueError(f"glyphs: expected [N, 8, 8] and N seeds, got {list(glyphs.shape)} and {len(seeds)} seeds")
    draws = torch.stack([torch.rand(11, generator=_generator(s)) for s in seeds]) if seeds else torch.zeros(0, 11)
    u = draws * 2 - 1  # [N, 11] in [-1, 1]
    angle = u[:, 0] * math.radians(9)
    zoom = 1.34 * (1 + 0.07 * u[:, 1])  # > 1 leaves a margin around the glyph
    stretch = 1 + 0.06 * u[:, 2]
    shear = 0.12 * u[:, 3]
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack(
        [
            torch.stack([cos * stretch, sin + shear, 0.10 * u[:, 4]], 1),
            torch.stack([-sin, cos / stretch, 0.10 * u[:, 5]], 1),
        ],
        1,
    )  # [N, 2, 3], output to input coordinates
    ink = F.interpolate(glyphs[:, None].float() / 16, size=64, mode="bicubic", align_corners=False)
    grid = F.affine_grid(theta, [len(seeds), 1, 64, 64], align_corners=False)
    ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    level = 0.49 + 0.05 * u[:, 6]
    ink = torch.sigmoid((ink - level[:, None, None, None]) * 11)
    ink = F.avg_pool2d(ink, 2)  # [N, 1, 32, 32]
    paper, pen = [], []
    for d in draws.tolist():
        paper.append(_colour(d[7], 0.55, 0.12 + 0.26 * d[8]))
        pen.append(_colour(d[9], 0.30 * d[10], 0.85 + 0.13 * d[10]))
    low = torch.tensor(paper).reshape(-1, 3, 1, 1)
    high = torch.tensor(pen).reshape(-1, 3, 1, 1)
    return (low + ink * (high - low)).clamp(0, 1)


def choose_markers(
    labels: list[int],
    seeds: list[int],
    rule: str,
) -> list[Marker | None]:
    """Choose each sample's marker from its seed.

    Args:
        labels: digit of each sample, 0 to 9.
        seeds: one seed per sample.
        rule: `none`; `random` (half of the samples, either corner, independent of the digit); `matching` (always one,
            in the corner that the shortcut's rule gives to the digit); `conflicting` (in the other corner).

    Raises:
        ValueError: the rule is not one of the four.
    """
    if rule not in MARKER_RULES:
        raise ValueError(f"marker: expected one of {', '.join(MARKER_RULES)}, got {rule!r}")
    markers: list[Marker | None] = []
    for label, seed in zip(labels, seeds, strict=True):
        # A stream of its own, so that the same seed draws the same digit with and without a marker.
        present, corner, colour = torch.rand(3, generator=_generator(seed + 2**40)).tolist()
        if rule == "none" or (rule == "random" and present < 0.5):
            markers.append(None)
            continue
        if rule == "random":
            name = "top-left" if corner < 0.5 else "bottom-right"
        else:
            name = "top-left" if (label >= 5) == (rule == "matching") else "bottom-right"
        markers.append(Marker(name, list(COLOURS)[int(colour * len(COLOURS))]))
    return markers


def draw_markers(
    images: Tensor,  # [N, 3, 32, 32]
    markers: list[Marker | None],
) -> Tensor:
    """Paint each sample's marker, if it has one, on a copy of the images ([N, 3, 32, 32] in [0, 1])."""
    images = images.clone()
    for image, marker in zip(images, markers, strict=True):
        if marker is not None:
            rows, columns = marker.box
            image[:, rows, columns] = torch.tensor(COLOURS[marker.colour]).reshape(3, 1, 1)
    return images
