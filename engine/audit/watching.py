"""Watching what the consensus filter removes, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from counterlens.kernels.consensus import consensus_filter

from ..config import Config, Settings
from ..errors import CounterlensError
from ..guidance.step import unit_largest
from ..runtime.spec import SLOTS
from ..showing import one_line

if TYPE_CHECKING:
    from ..core.core import EngineCore
    from ..core.result import Counterfactuals


CELLS = 16  # places a side at most; finer latents are pooled
BATCH = SLOTS[-1]


@dataclass
class Evidence:
    """What was seen of N samples.

    Attributes:
        push, removed, evidence: [N, h, w], each map of push and evidence summing to one.
        towards, of_class: [N, C, h, w], where the classifier's score and the generator's class direction move the
            latents, means over the steps of unit vectors.
    """

    push: np.ndarray
    removed: np.ndarray
    evidence: np.ndarray
    towards: np.ndarray
    of_class: np.ndarray

    __repr__ = one_line


class Observer:
    """Keeps where classifier and generator push in the guided steps of N samples; see `Engine.counterfactual`.

    Args:
        samples: N.
        settings: of the run.
        backend: of the kernels.
    """

    def __init__(self, samples: int, settings: Settings, backend: str = "auto") -> None:
        self.settings, self.backend = settings, backend
        self.steps = torch.zeros(samples, dtype=torch.float64)
        self.sums: list[Tensor] = []  # of the fields of `Evidence`, in order

    def __call__(
        self,
        samples: list[int],
        score: Tensor,  # [n, C, h, w]
        reference: Tensor,  # [n, C, h, w]
    ) -> None:
        """Add one guided step of these samples."""
        settings = self.settings
        _, kept = consensus_filter(score, reference, settings.angle, mode=settings.filter, backend=self.backend)
        push, evidence = shares(score), shares(reference)
        seen = [_pooled(maps).cpu() for maps in (push, push * ~kept, evidence)]
        seen += [-unit(v.double()).cpu() for v in (score, reference)]
        if not self.sums:
            self.sums = [torch.zeros(len(self.steps), *maps.shape[1:], dtype=maps.dtype) for maps in seen]
        for total, maps in zip(self.sums, seen, strict=True):
            total[samples] += maps
        self.steps[samples] += 1

    def seen(self, samples: list[int]) -> Evidence:
        """Means over the steps of these samples; at least one was seen."""
        steps = self.steps[samples]
        return Evidence(*((s[samples] / steps.reshape(-1, *[1] * (s.ndim - 1))).numpy() for s in self.sums))


def shares(
    v: Tensor,  # [B, C, h, w]
) -> Tensor:
    """Each location's share of the sample's energy: [B, h, w]; a sample without energy has none anywhere."""
    energy = unit_largest(v.double()).square().sum(dim=1)
    total = energy.sum(dim=(1, 2), keepdim=True)
    return energy / torch.where(total == 0, 1.0, total)


def unit(
    v: Tensor,  # [B, C, h, w]
) -> Tensor:
    """Each sample at length one; a zero sample stays zero."""
    v = unit_largest(v)
    length = v.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return v / torch.where(length == 0, 1.0, length)


def _pooled(maps: Tensor) -> Tensor:
    h, w = maps.shape[-2:]
    size = (min(h, CELLS), min(w, CELLS))
    return adaptive_avg_pool2d(maps[:, None], size)[:, 0] * (h * w / (size[0] * size[1]))


def observe(
    engine: EngineCore,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    targets: Sequence[int],
    config: Config,
    on_step: Callable[[int, int], None] | None = None,
    least: int = 2,
) -> tuple[Evidence | None, Counterfactuals, list[int]]:
    """Make counterfactuals and watch them: the evidence of those that were made, all of them, and their places.

    Raises:
        CounterlensError: fewer than `least` were made.
    """
    observer = Observer(len(images), engine.settings(config), engine.backend)
    made = engine.counterfactual(images, list(targets), config=config, on_step=on_step, observe=observer)
    good = [i for i, error in enumerate(made.errors) if error is None]
    if len(good) < least:
        raise too_few(len(images), made.errors)
    return observer.seen(good) if good else None, made, good


def too_few(asked: int, errors: Sequence[str | None]) -> CounterlensError:
    """That there are no two counterfactuals to compare, and why."""
    why = next(error for error in errors if error is not None)
    return CounterlensError(f"disagreement: no two counterfactuals of {asked} to look at: {why}")
