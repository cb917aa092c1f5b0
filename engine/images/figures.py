"""Results as matplotlib figures, for notebooks and papers: a row for each image, captions that a person understands."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import CounterlensError
from .drawing import BAD, FAINT, GOOD, INK, change_map
from .maps import check_charts, overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL, TITLE = 2.1, 0.3  # inches
SHOWN, HIDDEN = "#2166ac", "#b2182b"  # of curves, told apart with any colour vision
OUTLINE = (("#101010", 2.6), ("white", 1.2))  # colour and width in points, the wider below


class Explained(Protocol):
    """What is drawn of `saliency.Explanations`."""

    images: Tensor
    saliency: Tensor
    target: Tensor
    probability: Tensor
    msi: Any
    labels: list[str]
    method: str

    @property
    def regions(self) -> Tensor:
        """[B, H, W] bool."""
        ...

    def __len__(self) -> int: ...


class Changed(Protocol):
    """What is drawn of `core.Counterfactuals`."""

    images: Tensor
    inputs: Tensor
    source: Tensor
    target: Tensor
    prediction: Tensor
    confidence: Tensor
    flipped: Tensor
    errors: list[str | None]
    labels: list[str]

    def __len__(self) -> int: ...


class Drawable(Protocol):
    """A result that draws itself."""

    def figure(self, most: int = 8) -> Figure:
        """Its first images."""
        ...

    def __len__(self) -> int: ...


def explanations_figure(found: Explained, most: int = 8) -> Figure:
    """Image, map and MSI's curves of each explanation.

    Raises:
        CounterlensError: matplotlib is missing.
    """
    from matplotlib.collections import LineCollection

    from ..portable.overlay import outline

    count = min(most, len(found))
    figure, rows = _grid(count, ("image", f"where the evidence is ({found.method})", "how good that answer is"), 1.5)
    regions = found.regions.cpu().numpy()
    for i in range(count):
        picture, marked, chart = rows[i]
        label, p = found.labels[int(found.target[i])], float(found.probability[i])
        _show(picture, found.images[i], f"“{label}”, {p:.0%}")
        area = float(found.msi.sufficient_area[i])
        decides = f"outlined: {area:.1%} of the pixels decide" if area < 1 else "no part of the image decides"
        _show(marked, overlay(found.images[i], found.saliency[i]), decides)
        lines = [[(x - 0.5, y - 0.5) for x, y in line] for line in outline(regions[i])]
        for colour, width in OUTLINE:
            marked.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="round"))
        curves = found.msi.curves
        chart.plot(curves.abscissae[i], curves.keep[i], color=SHOWN, label="only what is marked is shown")
        chart.plot(
            curves.abscissae[i], curves.remove[i], color=HIDDEN, linestyle="--", label="what is marked is hidden"
        )
        chart.set_ylim(-0.03, 1.03)
        chart.set_xlabel("marked from this value of the map on", fontsize=7, color=FAINT)
        chart.set_ylabel(f"probability of “{label}”", fontsize=7, color=FAINT)
        chart.tick_params(labelsize=7, colors=FAINT)
        chart.grid(alpha=0.25)
        chart.set_title(f"MSI {float(found.msi.score[i]):.2f} (1 is best)", fontsize=9, color=INK)
        if i == 0:
            chart.legend(fontsize=7, frameon=False, loc="center right")
    return figure


def counterfactuals_figure(found: Changed, most: int = 8) -> Figure:
    """Input, counterfactual and signed change of each sample; one that failed says why.

    Raises:
        CounterlensError: matplotlib is missing.
    """
    count = min(most, len(found))
    figure, rows = _grid(count, ("what the model saw", "what would change its mind", "blue: darker, red: brighter"), 1)
    for i in range(count):
        before, after, change = rows[i]
        source = int(found.source[i])
        _show(before, found.inputs[i], f"“{found.labels[source]}”" if source >= 0 else "")
        if (error := found.errors[i]) is not None:
            for axes in (after, change):
                axes.axis("off")
            after.text(0, 0.5, error, wrap=True, fontsize=8, color=BAD, va="center", transform=after.transAxes)
            continue
        said = f"“{found.labels[int(found.prediction[i])]}”, {float(found.confidence[i]):.0%}"
        wanted = "" if found.flipped[i] else f", not “{found.labels[int(found.target[i])]}”"
        _show(after, found.images[i], said + wanted, GOOD if found.flipped[i] else BAD)
        _show(change, change_map(found.inputs[i][None], found.images[i][None])[0], "")
    return figure


def drawn(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    return Image.open(BytesIO(_png(figure))).convert("RGB")


def as_html(result: Drawable, most: int = 4) -> str | None:
    """A result for notebooks: its first images and what it says of itself; None without matplotlib (then its text)."""
    try:
        figure = result.figure(most)
    except CounterlensError:
        return None  # a notebook shows the text in place of it
    more = f"; {len(result) - most} more are not shown" if len(result) > most else ""
    code = base64.b64encode(_png(figure)).decode()
    text = html.escape(repr(result) + more)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{code}"/><figcaption>{text}</figcaption></figure>'


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _grid(count: int, titles: Sequence[str], last: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows below their titles; the last column is `last` times as wide as the others."""
    width, height = CELL * (len(titles) - 1 + last) + 0.6, (CELL + 0.45) * max(1, count) + TITLE
    figure = check_charts()(figsize=(width, height), dpi=110, layout="constrained")
    if not count:
        figure.text(0.5, 0.5, "no images", ha="center", color=FAINT)
        return figure, []
    axes = figure.subplots(
        count + 1, len(titles), squeeze=False, width_ratios=[*[1] * (len(titles) - 1), last],
        height_ratios=[TITLE, *[CELL + 0.45] * count],
    )  # fmt: skip
    for place, title in zip(axes[0], titles, strict=True):
        place.axis("off")
        place.text(0.5, 0.2, title, ha="center", fontsize=10, fontweight="bold", color=INK)
    return figure, [list(row) for row in axes[1:]]


def _show(axes: Axes, image: Tensor, title: str, colour: str = INK) -> None:
    pixels = image.detach().float().clamp(0, 1).nan_to_num().permute(1, 2, 0).cpu()
    axes.imshow(pixels.to(torch.float32).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, color=colour)
