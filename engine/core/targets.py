"""Targets of counterfactuals: by label, by index, or relative to the prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UsageError
from ..labels import find_label

RUNNERS_UP = "runners-up"
# Targets that depend on the prediction: its runner-up, of several answers the likeliest others in turn, the other
# one of two labels, the nearest label of a file.
RELATIVE_TARGETS = ("runner-up", RUNNERS_UP, "opposite", "neighbour")


Targets = str | int | Sequence[str | int] | Tensor


class TargetLabels:
    """A classifier's labels, as targets say them.

    Args:
        labels: names, none twice.
        neighbours: nearest labels of each label, nearest first, for targets `neighbour`.

    Raises:
        UsageError: a neighbour is no label.
    """

    def __init__(self, labels: list[str], neighbours: Mapping[str, Sequence[str]] | None = None) -> None:
        self.labels = labels
        self.neighbours = {
            find_label(k, labels, "neighbours"): [find_label(n, labels, "neighbours") for n in nearest if n != k]
            for k, nearest in (neighbours or {}).items()
        }

    def check(self, target: str | int, count: int = 1) -> int:
        """Index of a label by name or index (see `find_label`); -1 for `RELATIVE_TARGETS`, which depend on the image.

        Raises:
            UsageError: it is no label, or relative to something that this classifier does not have, such as `count`
                runners-up.
        """
        if target == RUNNERS_UP and count >= len(self.labels):
            raise UsageError(
                f"count: {count} answers towards the runners-up need as many other labels, there are "
                f"{len(self.labels) - 1}"
            )
        if target == "opposite" and len(self.labels) != 2:
            raise UsageError(f"target: opposite needs a classifier with two labels, this one has {len(self.labels)}")
        if target == "neighbour" and (lonely := [n for i, n in enumerate(self.labels) if not self.neighbours.get(i)]):
            raise UsageError(f"neighbours: none given for {len(lonely)} labels, {lonely[0]!r} for one")
        if target in RELATIVE_TARGETS:
            return -1
        return find_label(target, self.labels, more=RELATIVE_TARGETS)

    def resolve(
        self,
        target: str | int,
        probabilities: Tensor,  # [labels]
        k: int = 0,
    ) -> int:
        """The label that answer k of an image with these predictions is aimed at.

        Raises:
            UsageError: see `check`.
        """
        index = self.check(target, k + 1)
        if index >= 0:
            return index
        if target == RUNNERS_UP:
            return int(probabilities.topk(k + 2).indices[-1])
        first, second = probabilities.topk(2).indices.tolist()
        # Of two labels, the opposite one is the runner-up.
        return self.neighbours[first][0] if target == "neighbour" else int(second)

    def resolve_all(
        self,
        targets: Targets,
        probabilities: Tensor,  # [B, labels]
    ) -> Tensor:
        """The labels [B] that are meant for B images.

        Raises:
            UsageError: a target is no label, or there are more or fewer targets than images.
        """
        asked = one_each(targets, len(probabilities))
        return torch.tensor([self.resolve(t, p) for t, p in zip(asked, probabilities, strict=True)], dtype=torch.long)


def one_each(targets: Targets, count: int) -> list[str | int]:
    """As many targets as images.

    Raises:
        UsageError: there are more or fewer.
    """
    if isinstance(targets, str | int):
        return [targets] * count
    each: list[str | int] = targets.tolist() if isinstance(targets, Tensor) else list(targets)
    if len(each) != count:
        raise UsageError(f"targets: expected {count}, one per image, got {len(each)}")
    return each
