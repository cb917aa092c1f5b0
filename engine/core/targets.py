"""Targets of counterfactuals: by label, by index, or relative to the prediction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Targets that depend on the prediction: its runner-up, the other one of two labels, the nearest label of a file.
RELATIVE_TARGETS = ("runner-up", "opposite", "neighbour")


Targets = str | int | Sequence[str | int] | Tensor
