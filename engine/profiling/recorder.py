"""Times spans on the clock of the device that does the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Span:
    """One part of a run: seconds since the recorder was made, on the device's clock; `parent` is an index or -1."""

    name: str
    parent: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


class Recorder:
    """Collects spans (see `guidance.spans`); on a CUDA device by events in the stream, which wait for nothing.

    Args:
        device: where the models run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[int] = []
        self._spans: list[tuple[str, int, Any, Any]] = []
        self._origin = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        index, parent = len(self._spans), self._open[-1] if self._open else -1
        self._spans.append((name, parent, self._now(), None))
        self._open.append(index)
        try:
            yield
        finally:
            self._open.pop()
            self._spans[index] = (name, parent, self._spans[index][2], self._now())

    def spans(self) -> list[Span]:
        """All finished spans in the order in which they began; waits for a CUDA device."""
        if self._cuda:
            torch.cuda.synchronize()

        def seconds(moment: Any) -> float:
            return self._origin.elapsed_time(moment) / 1e3 if self._cuda else moment - self._origin

        return [Span(name, parent, seconds(a), seconds(b)) for name, parent, a, b in self._spans if b is not None]
