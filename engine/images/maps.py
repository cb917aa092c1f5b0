"""Pictures of saliency: overlays, methods side by side, curves and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import CounterlensError, install_hint
from ..files import write_atomically
from .drawing import CAPTION, CELL, FAINT, GAP, INK, LEFT
from .files import to_uint8, write_png

SHOWN = 256  # the least side in pixels of an overlay
STRENGTH = 0.75  # of the heat colours, where saliency is 1
# matplotlib's plasma, evenly spaced: perceptually uniform, and read alike with any colour vision.
PLASMA = (
    "0d0887",
    "310597",
    "4c02a1",
    "6600a7",
    "7e03a8",
    "9511a1",
    "aa2395",
    "bc3587",
    "cc4778",
    "da5a6a",
    "e66c5c",
    "f0804e",
    "f89540",
    "fdac33",
    "fdc527",
    "f8df25",
    "f0f921",
)


def heat(saliency: Tensor) -> Tensor:
    """Saliency [..., H, W] in [0, 1] as colours from dark blue over magenta to yellow: [..., 3, H, W]."""
    table = torch.tensor([list(bytes.fromhex(code)) for code in PLASMA]).to(saliency) / 255  # [17, 3]
    place = saliency * (len(table) - 1)
    low = place.floor().clamp(0, len(table) - 2).long()
    return torch.lerp(table[low], table[low + 1], (place - low)[..., None]).movedim(-1, -3)


def overlay(
    images: Tensor,  # [..., 3, H, W]
    saliency: Tensor,  # [..., H, W] in [0, 1]
) -> Tensor:
    """The image in grey, darkened, with heat colours where saliency is: [..., 3, H, W].

    Grey ends at 0.6, below the brightness of the highest colours: white paper is never as bright as what is marked.
    """
    grey = images.mean(-3, keepdim=True).expand_as(images)
    weight = STRENGTH * saliency.clamp(0, 1)[..., None, :, :]
    return (1 - weight) * (0.1 + 0.5 * grey) + weight * heat(saliency.clamp(0, 1))


def save_overlay(image: Tensor, saliency: Tensor, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write the image and its overlay side by side, enlarged without smoothing to 256 pixels at least.

    `facts` go into the file, see `images.write_png`.

    Raises:
        CounterlensError: the file cannot be written.
    """
    h, w = saliency.shape
    times = max(1, -(-SHOWN // max(h, w)))
    tiles = torch.cat([image, overlay(image, saliency)], dim=2)
    picture = _picture(tiles)
    write_png(picture.resize((2 * w * times, h * times), Image.Resampling.NEAREST), path, facts)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy())


def draw_methods(
    images: Tensor,  # [N, 3, H, W]
    captions: Sequence[str],
    maps: Mapping[str, Tensor],  # method to [N, H, W] in [0, 1]
    notes: Mapping[str, Sequence[str]],  # method to N texts under its maps
) -> Image.Image:
    """Inputs in the first row, one row of overlays for each method."""
    rows: list[tuple[str, Tensor, Sequence[str]]] = [("input", images, captions)]
    rows += [(name, overlay(images, maps[name]), notes[name]) for name in maps]
    height = CELL + CAPTION
    picture = Image.new("RGB", (LEFT + len(images) * (CELL + GAP) + GAP, len(rows) * height + GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for r, (name, tiles, texts) in enumerate(rows):
        y = GAP + r * height
        draw.text((8, y + CELL // 2 - 8), name, fill=INK, font=font)
        for c, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
            x = LEFT + c * (CELL + GAP)
            picture.paste(_picture(tile).resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
            draw.text((x + CELL // 2, y + CELL + 3), text, fill=FAINT, font=font, anchor="ma")
    return picture


def check_charts() -> Any:
    """matplotlib's figure class, without its windows.

    Raises:
        CounterlensError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CounterlensError(
            f"matplotlib cannot be imported ({error}); charts need it: {install_hint('explain')}"
        ) from error
    return Figure


def draw_charts(
    charts: Sequence[tuple[str, str, str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]],
    path: Path,
) -> None:
    """Write line charts side by side as PNG: title, name of x, name of y, and label to (x, y).

    Raises:
        CounterlensError: matplotlib is missing, or the file cannot be written.
    """
    figure = check_charts()(figsize=(5.2 * len(charts), 4), dpi=110, layout="constrained")
    for place, (title, x_name, y_name, lines) in enumerate(charts, 1):
        axes = figure.add_subplot(1, len(charts), place)
        for number, (label, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, label=label, linewidth=2 if number == 0 else 1.2, marker="o" if len(x) < 12 else None)
        axes.set(title=title, xlabel=x_name, ylabel=y_name)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
