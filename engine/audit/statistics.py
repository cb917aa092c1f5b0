"""What a shortcut that is nowhere in particular does to the whole picture: tints, frames and textures.

At every guided step the classifier's score and the generator's class direction say how to move the latents. Their means
over the steps are decoded: two pictures of what would change, the push's and the evidence's. Of each picture's energy,
a statistic is the share that is

    colour   a hue: red against blue, or green against magenta, brightness left out
    ring     the mean of a ring along the border, or of one side's edge: what makes it lighter, darker or of a colour
    band     in patterns of so many pixels (octaves of the Fourier transform), or the same in every square of so many

What the push has beyond FACTOR times the evidence is tested together with the places, under the same null (see
`disagreement`): differences up to DEAD count as none, and no sample counts for more than CAP (shares of the energy).

Factors, bands and widths were chosen on renderings of the digits' validation split; `python -m bench.audit detector`
measures others. A model that sees in patches may push in a grid of its own, which is a repeating pattern, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..core.core import EngineCore

STEP = 0.05  # of the latents' length, by which they are moved to see what changes
HUES = {"red-blue": (1, 0, -1), "green-magenta": (-1, 2, -1)}  # of red, green and blue
COLOURS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "cyan": (0, 1, 1),
    "magenta": (1, 0, 1),
}  # fmt: skip


@torch.no_grad()
def moved(
    engine: EngineCore,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    field: np.ndarray,  # [N, C, h, w]
) -> Tensor:
    """What changes in the pictures as their latents move along a field: [N, 3, H, W] float64, up to a factor each."""
    with engine.frozen():
        z = engine.diffusion.encode(images.to(engine.device))
        v = torch.from_numpy(field).to(z)
        length = v.flatten(1).norm(dim=1)
        step = STEP * z.flatten(1).norm(dim=1) / torch.where(length == 0, 1.0, length)
        ahead, behind = (engine.diffusion.decode(z + s * step.reshape(-1, 1, 1, 1) * v) for s in (1, -1))
    return (ahead - behind).double().cpu()


@dataclass(frozen=True)
class Statistic:
    """One share of a picture's energy.

    Attributes:
        name: in results.
        family: colour, ring or band.
        says: what the push does, in words that go on "the model pushes".
    """

    name: str
    family: str
    says: str


SIDES = ("top", "bottom", "left", "right")
RINGS = (1 / 16, 1 / 8)  # how far from the border, in shares of a side
BANDS = ((0.25, 0.75), (0.125, 0.25), (0.0625, 0.125))  # frequencies, in cycles a pixel
REPEAT = 4  # side of the squares, in pixels
STATISTICS = [
    Statistic("colour red-blue", "colour", "the whole image between red and blue"),
    Statistic("colour green-magenta", "colour", "the whole image between green and magenta"),
    Statistic("ring 0", "ring", "the border all around"),
    Statistic("ring 1", "ring", "a frame inside of the border"),
    *(Statistic(f"side {s}", "ring", f"the {s} edge as a whole") for s in SIDES),
    *(
        Statistic(f"band {k}", "band", f"patterns of {1 / b:.2g} to {1 / a:.2g} pixels")
        for k, (a, b) in enumerate(BANDS)
    ),
    Statistic(f"repeat {REPEAT}", "repeat", f"a pattern that repeats every {REPEAT} pixels"),
]
FACTOR = {"colour": 1.5, "ring": 1.5, "band": 1.5, "repeat": 1.25}
DEAD = {"colour": 0.045, "ring": 0.005, "band": 0.1, "repeat": 0.0025}
CAP = {"colour": 0.18, "ring": 0.015, "band": 0.3, "repeat": 0.025}


def energy(pictures: Tensor) -> Tensor:
    """Shares of the energy of pictures [N, 3, H, W] by pixel: [N, H, W]."""
    e = pictures.square().sum(dim=1)
    total = e.sum(dim=(1, 2), keepdim=True)
    return e / torch.where(total == 0, 1.0, total)


def _widths(h: int, w: int) -> list[int]:
    """How far from the border the rings begin and end, in pixels."""
    return [0, *(max(k + 1, round(r * min(h, w))) for k, r in enumerate(RINGS))]


@lru_cache(maxsize=4)
def _masks(h: int, w: int) -> tuple[Tensor, Tensor]:
    """Which pixels rings and sides have [R, h, w], and which frequencies the bands have [B, h, w]."""
    y, x = torch.arange(h)[:, None], torch.arange(w)[None]
    from_border = torch.minimum(torch.minimum(y, h - 1 - y), torch.minimum(x, w - 1 - x))
    edges = _widths(h, w)
    masks = [(from_border >= a) & (from_border < b) for a, b in pairwise(edges)]
    masks += [(d < edges[1]).expand(h, w) for d in (y, h - 1 - y, x, w - 1 - x)]
    f = (torch.fft.fftfreq(h)[:, None] ** 2 + torch.fft.fftfreq(w)[None] ** 2).sqrt()
    return torch.stack(masks).double(), torch.stack([(f >= a) & (f < b) for a, b in BANDS]).double()


def measure(
    pictures: Tensor,  # [N, 3, H, W] float64
) -> np.ndarray:
    """The statistics of pictures: [N, K] shares of their energy; of a picture without any, nothing."""
    h, w = pictures.shape[2:]
    total = pictures.square().sum(dim=(1, 2, 3))
    total = torch.where(total == 0, 1.0, total)[:, None]
    hues = torch.tensor([*HUES.values()], dtype=pictures.dtype)
    hues = hues / hues.norm(dim=1, keepdim=True)
    colour = torch.einsum("kc,nchw->nkhw", hues, pictures).square().sum(dim=(2, 3))
    near, bands = _masks(h, w)
    sizes = near.sum(dim=(1, 2)).clamp_min(1)  # a ring of a tiny picture may be empty
    ring = torch.einsum("nchw,khw->nkc", pictures, near).square().sum(dim=2) / sizes
    spectrum = torch.fft.fft2(pictures, norm="ortho").abs().square().sum(dim=1)
    band = torch.einsum("nhw,khw->nk", spectrum, bands)
    repeat = (_repeated(pictures, REPEAT) - _repeated(pictures, REPEAT // 2)).clamp_min(0)  # and in no smaller ones
    return (torch.cat([colour, ring, band, repeat[:, None]], dim=1) / total).numpy()


def _repeated(pictures: Tensor, side: int) -> Tensor:
    """Energy of what is the same in every square of that side, from the top left: [N]."""
    h, w = (max(1, s // side) for s in pictures.shape[2:])
    cut = pictures[:, :, : h * side, : w * side]
    if cut.shape[2:] != (h * side, w * side):  # smaller than one square
        return pictures.new_zeros(len(pictures))
    return h * w * cut.unflatten(3, (w, side)).unflatten(2, (h, side)).mean(dim=(2, 4)).square().sum(dim=(1, 2, 3))


def contrasts(push: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """push - FACTOR x evidence of every statistic [N, K], nothing within the dead band, at most the cap; odd in it."""
    factor, dead, cap = (np.array([t[s.family] for s in STATISTICS]) for t in (FACTOR, DEAD, CAP))
    d = push - factor * evidence
    return np.sign(d) * np.clip(np.abs(d) - dead, 0, cap)


def mean_colour(pictures: Tensor) -> np.ndarray:
    """Where each picture [N, 3, H, W] goes as a whole, red, green and blue: [N, 3], in shares of its length."""
    h, w = pictures.shape[2:]
    length = pictures.square().sum(dim=(1, 2, 3)).sqrt()
    return (pictures.mean(dim=(2, 3)) * (h * w) ** 0.5 / torch.where(length == 0, 1.0, length)[:, None]).numpy()


def colours(
    colour: np.ndarray,  # [n, 3]
    target: np.ndarray,  # [n]
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Along which line of colours the pushes towards the labels differ most, and which label goes where.

    Returns:
        `poles`, the names of the line's two ends; `labels`, those that are pushed to either; `axis` [3], the first end.
    """
    hue = colour - colour.mean(axis=1, keepdims=True)
    weights = {t: (target == t).sum() ** 0.5 for t in np.unique(target).tolist()}
    if len(weights) > 1:  # what the push has towards every label alike says nothing
        hue = hue - hue.mean(axis=0)
    means = {t: w * hue[target == t].mean(axis=0) for t, w in weights.items()}
    axis = np.linalg.svd(np.stack([*means.values()]), full_matrices=False)[2][0]
    axis = axis * (1.0 if axis[np.abs(axis).argmax()] >= 0 else -1.0)
    ends: list[list[str]] = [[], []]
    for t, mean in means.items():
        ends[int(mean @ axis < 0)].append(names[t])
    return {"poles": [_named(axis), _named(-axis)], "labels": ends, "axis": axis.tolist()}


def _named(direction: np.ndarray) -> str:
    """The colour whose direction from grey is nearest: [3]."""
    ways = np.array(list(COLOURS.values()), dtype=float)
    return list(COLOURS)[int((ways @ direction / np.linalg.norm(ways, axis=1)).argmax())]


def sentence(statistic: Mapping[str, Any], colour: Mapping[str, Any], samples: int) -> str:
    """What a statistic that stands out says to a person, and what to look for."""
    share = f"{statistic['push']:.0%} of its push, {statistic['evidence']:.0%} of what the classes are made of"
    chance = f"chance: p = {statistic['p']:.3f}, {samples} images"
    if statistic["family"] == "colour":
        ways = [
            f"towards {pole} (for {_listed(labels)})"
            for pole, labels in zip(colour["poles"], colour["labels"], strict=True)
            if labels
        ]
        return (
            f"Possible shortcut: again and again the model pushes the whole image {' or '.join(ways)}: look for a "
            f"tint, a lighting or a camera that goes with the labels ({share}; {chance})."
        )
    where = {s.name: s.says for s in STATISTICS}[statistic["name"]]
    look = {
        "ring": "a line, a border or padding", "band": "a texture, noise or sharpening",
        "repeat": "a texture or the traces of a file format",
    }  # fmt: skip
    return (
        f"Possible shortcut: again and again the model pushes {where}: look for {look[statistic['family']]} that goes "
        f"with the labels ({share}; {chance})."
    )


def boxes(name: str, size: int) -> list[tuple[int, int, int, int]]:
    """What a statistic of the border looks at, of an image of that side: row, column, row, column; else nothing."""
    widths = _widths(size, size)
    if name.startswith("ring"):
        k = int(name.split()[1])
        return [(a, a, size - a, size - a) for a in widths[k : k + 2]]
    w = widths[1]
    sides = {"top": (0, 0, w, size), "bottom": (size - w, 0, size, size), "left": (0, 0, size, w),
             "right": (0, size - w, size, size)}  # fmt: skip
    return [sides[name.split()[1]]] if name.startswith("side") else []


def _listed(labels: Sequence[str], most: int = 6) -> str:
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")
