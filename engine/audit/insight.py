"""Patterns in a model's errors: which classes it confuses, and where in the image the way to the truth lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .rows import GRID

NAMES = (
    ("at the top left", "at the top", "at the top right"),
    ("at the left", "in the middle", "at the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
SPREAD = "all over the image"
FOCUS = 1.6  # a third of the image is named if it has that many times its area's share of the change
COLUMNS = [
    "number", "id", "label", "prediction", "confidence", "correct", "image", "true_flipped", "true_l1", "true_grid",
    "true_counterfactual", "away_prediction", "away_l1", "away_grid", "away_counterfactual",
]  # fmt: skip


@dataclass
class Pattern:
    """Errors of one kind: the true label, what the model said, where the change to the truth lies, and the rows."""

    label: str
    prediction: str
    place: str
    rows: list[dict[str, Any]]

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The rows with the smallest change to the truth first."""
        return sorted(self.rows, key=lambda r: (r["true_l1"] is None, r["true_l1"] or 0.0))


def place_of(grid: Sequence[float]) -> str:
    """Which ninth of the image a change lies in: [GRID * GRID] means by cell, row by row."""
    cells = np.array(grid).reshape(GRID, GRID)
    if not cells.sum() > 0:
        return "nowhere"
    ninth = np.arange(GRID) * 3 // GRID
    best, name = 0.0, SPREAD
    for r in range(3):
        for c in range(3):
            inside = np.outer(ninth == r, ninth == c)
            focus = cells[inside].mean() / cells.mean()
            if focus > max(best, FOCUS):
                best, name = focus, NAMES[r][c]
    return name


def patterns(rows: Iterable[dict[str, Any]]) -> list[Pattern]:
    """Group wrong predictions by class pair and by where the change to the truth lies, the largest group first.

    Where there is no counterfactual to the true label, the one away from the prediction says where.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["correct"] is not False:
            continue
        grid = row["true_grid"] or row["away_grid"]
        place = place_of(grid) if grid else "not explained"
        groups[row["label"], row["prediction"], place].append(row)
    found = [Pattern(*key, group) for key, group in groups.items()]
    return sorted(found, key=lambda p: (-len(p.rows), p.label, p.prediction, p.place))
