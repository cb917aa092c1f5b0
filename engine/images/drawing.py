"""Pictures of counterfactuals: input, counterfactual and where it changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..portable import overlay as colours
from .files import to_uint8

CELL = 96
CAPTION = 20
LEFT = 124
TITLE = 34
GAP = 4
INK, FAINT, GOOD, BAD = "#1c1c1c", "#707070", "#1b7f3b", "#b3261e"


@dataclass(frozen=True)
class Strip:
    """One block of a picture: B images, their counterfactuals, and captions.

    Attributes:
        title: above the block.
        inputs, images: [B, 3, H, W] in [0, 1].
        captions_before, captions_after: B texts each.
        good: B, whether the caption after is drawn as a success.
    """

    title: str
    inputs: Tensor
    images: Tensor
    captions_before: list[str]
    captions_after: list[str]
    good: list[bool]


def change_map(
    before: Tensor,  # [B, 3, H, W]
    after: Tensor,  # [B, 3, H, W]
) -> Tensor:
    """See `portable.overlay.change`, for tensors: [B, 3, H, W]."""
    return torch.from_numpy(colours.change(before.cpu().numpy(), after.cpu().numpy()))


def _paste(picture: Image.Image, image: Tensor, corner: tuple[int, int]) -> None:
    tile = Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy())
    picture.paste(tile.resize((CELL, CELL), Image.Resampling.NEAREST), corner)


def draw_strips(strips: list[Strip]) -> Image.Image:
    """Lay the blocks under one another, one column for each image."""
    columns = max(len(s.inputs) for s in strips)
    row_height = CELL + CAPTION
    block = TITLE + 3 * row_height
    picture = Image.new("RGB", (LEFT + columns * (CELL + GAP) + GAP, len(strips) * block + GAP), "white")
    draw = ImageDraw.Draw(picture)
    text, heading = ImageFont.load_default(size=13), ImageFont.load_default(size=17)
    for number, strip in enumerate(strips):
        top = number * block
        draw.text((8, top + 9), strip.title, fill=INK, font=heading)
        changes = change_map(strip.inputs, strip.images)
        rows = (
            ("input", strip.inputs, strip.captions_before, [FAINT] * len(strip.inputs)),
            ("counterfactual", strip.images, strip.captions_after, [GOOD if g else BAD for g in strip.good]),
            ("darker, brighter", changes, [""] * len(changes), [FAINT] * len(changes)),
        )
        for r, (name, tiles, captions, inks) in enumerate(rows):
            y = top + TITLE + r * row_height
            draw.text((8, y + CELL // 2 - 8), name, fill=INK, font=text)
            for c, (tile, caption, colour) in enumerate(zip(tiles, captions, inks, strict=True)):
                x = LEFT + c * (CELL + GAP)
                _paste(picture, tile, (x, y))
                draw.text((x + CELL // 2, y + CELL + 3), caption, fill=colour, font=text, anchor="ma")
    return picture
