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
from ..portable import overlay as colours
from .drawing import CAPTION, CELL, FAINT, GAP, INK, LEFT
from .files import to_uint8, write_png


def heat(saliency: Tensor) -> Tensor:
    """See `portable.overlay.heat`, for tensors."""
    return torch.from_numpy(colours.heat(saliency.cpu().numpy()))


def overlay(
    images: Tensor,  # [..., 3, H, W]
    saliency: Tensor,  # [..., H, W] in [0, 1]
) -> Tensor:
    """See `portable.overlay.overlay`, for tensors."""
    return torch.from_numpy(colours.overlay(images.cpu().numpy(), saliency.cpu().numpy()))


def save_overlay(
    image: Tensor,
    saliency: Tensor,
    path: Path,
    facts: Mapping[str, Any] | None = None,
    region: Tensor | None = None,  # [H, W] bool
) -> None:
    """Write the image and its overlay side by side, enlarged without smoothing to 256 pixels at least.

    A region is outlined; `facts` go into the file, see `images.write_png`.

    Raises:
        CounterlensError: the file cannot be written.
    """
    outlined = None if region is None else region.cpu().numpy()
    write_png(colours.side_by_side(image.cpu().numpy(), saliency.cpu().numpy(), outlined), path, facts)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy())


def draw_methods(
    images: Tensor,  # [N, 3, H, W]
    captions: Sequence[str],
    maps: Mapping[str, Tensor],  # method to [N, H, W] in [0, 1]
    notes: Mapping[str, Sequence[str]],  # method to N texts under its maps
    regions: Mapping[str, Tensor] | None = None,  # method to [N, H, W] bool
) -> Image.Image:
    """Inputs in the first row, one row of overlays for each method, regions outlined."""
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
            if regions is not None and name in regions and (times := CELL // max(tile.shape[1:])):
                colours.draw_outline(picture, regions[name][c].cpu().numpy(), (x, y), times)
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
