"""Means of per-sample values with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError

CHUNK = 1 << 22  # resampled values held at once
DRAWS = 2000  # in summaries of many intervals


@dataclass(frozen=True)
class Interval:
    """A mean and the percentile bootstrap interval around it; NaN where there was no value."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(
    values: Tensor,  # [N]
    *,
    confidence: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Interval:
    """Mean of per-sample values (a rate, if they are 0 and 1) with its percentile bootstrap interval.

    Samples are resampled whole, so N is the number of independent images. Values that are all equal have an interval
    of length 0: a rate of 0 or 1 says nothing here about how sure it is.

    Args:
        values: [N] numbers or bools, finite. confidence: share of resampled means inside, in (0, 1).
        draws: resamples. seed: the same values and seed give the same interval.

    Raises:
        UsageError: values are not [N], one is NaN or infinite, or a number is out of range.
    """
    if values.ndim != 1:
        raise UsageError(f"values: expected [N], got {list(values.shape)}")
    if not 0 < confidence < 1 or draws < 1:
        raise UsageError(f"bootstrap: expected confidence in (0, 1) and draws of at least 1: {confidence}, {draws}")
    values = values.detach().double().cpu()
    if bad := int((~values.isfinite()).sum()):
        raise UsageError(f"values: {bad} of {len(values)} are NaN or infinite; leave those samples out")
    n = len(values)
    if n == 0:
        return Interval(torch.nan, torch.nan, torch.nan, 0)
    g = torch.Generator().manual_seed(seed)
    if bool(((values == 0) | (values == 1)).all()):  # how many ones n draws hold is binomial
        count = torch.full((draws,), n, dtype=torch.float64)
        means = torch.binomial(count, values.mean().expand(draws), generator=g) / n
    else:
        rows = max(1, CHUNK // n)
        parts = (torch.randint(n, (min(rows, draws - i), n), generator=g) for i in range(0, draws, rows))
        means = torch.cat([values[part].mean(1) for part in parts])
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(values.mean().item(), low, high, n)
