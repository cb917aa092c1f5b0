"""What the parts of a guided step cost on paper, and what this machine could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..guidance.memory import PeakMemory
from ..guidance.spans import listening


@dataclass
class Cost:
    """Of one part of a step.

    Attributes:
        flops: floating point operations of matrix products and convolutions, a multiply-add counted as two.
        bytes: read and written if every operation goes to memory; fused kernels move less.
        peak_bytes: of the step's tensors alive at once within the part, weights left out.
    """

    flops: int = 0
    bytes: int = 0
    peak_bytes: int = 0


class _Counter(TorchDispatchMode):
    """Adds FLOPs and bytes of every operation to the part that is open."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = {}
        self._names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._names:
            cost = self.costs[self._names[-1]]
            if (count := flop_registry.get(func._overloadpacket)) is not None:
                cost.flops += count(*args, **(kwargs or {}), out_val=out)
            if not func.is_view:
                moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
                cost.bytes += sum(t.numel() * t.element_size() for t in moved)
        return out

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.costs.setdefault(name, Cost())
        self._names.append(name)
        try:
            yield
        finally:
            self._names.pop()


class _Peaks:
    """The peak of memory within each part."""

    def __init__(self, memory: PeakMemory) -> None:
        self.memory = memory
        self.peaks: dict[str, int] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.memory.peak = self.memory.now
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), self.memory.peak)


@torch.no_grad()
def count_costs(step: Callable[..., Any], inputs: tuple[Tensor, ...]) -> dict[str, Cost]:
    """Costs of an eager step's parts, by name; runs it twice.

    Args:
        step: a function of `inputs` that opens spans.
        inputs: tensors of the batch that is asked about.
    """
    counter = _Counter()
    with counter, listening(counter):
        step(*inputs)
    memory = PeakMemory()
    peaks = _Peaks(memory)
    with memory, listening(peaks):
        step(*inputs)
    for name, cost in counter.costs.items():
        cost.peak_bytes = peaks.peaks[name]
    return counter.costs


@dataclass
class Limits:
    """What this machine did best in a large matrix product and in a large copy: FLOP/s and bytes/s (read + written)."""

    flops: float
    bandwidth: float


def measure_limits(device: torch.device, dtype: torch.dtype = torch.float32) -> Limits:
    """Measure for about a second."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    source = torch.empty((1 << 30 if device.type == "cuda" else 1 << 26), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    flops = 2 * n**3 / _best(lambda: torch.mm(a, a), device)
    return Limits(flops, 2 * source.numel() / _best(lambda: target.copy_(source), device))


def _best(call: Callable[[], Any], device: torch.device, seconds: float = 0.5) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    call()
    while best == float("inf") or time.perf_counter() < end:  # once, however busy the machine is
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
