"""What is compiled or recorded in this process, for each batch size at its first call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .parity import check_parity
from .spec import Spec


class Here:
    """What `prepare` makes of a batch size, held to eager before its result is used; safe from several threads.

    Args:
        spec: what is run.
        prepare: from a batch size to a function of the spec's inputs in order. It is called once for each, by whichever
            thread comes first; the others wait.
    """

    def __init__(self, spec: Spec, prepare: Callable[[int], Callable[..., Any]]) -> None:
        self.spec = spec
        self.prepare = prepare
        self.reports: dict[int, dict[str, Any]] = {}
        self._ready: dict[int, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        batch = inputs[0].shape[0]
        self.record(batch)
        return tuple(self._ready[batch](*inputs))

    def record(self, batch: int) -> None:
        """Prepare for a batch size, unless it is. ExportError if that cannot be done, or it does not agree."""
        with self._lock:
            if batch not in self._ready:
                run = self.prepare(batch)
                self.reports[batch] = check_parity(self.spec, run, batches=(batch,))
                self._ready[batch] = run


class Replay:
    """Fixed buffers that one launch reads and writes, such as a CUDA graph's, as a function of tensors.

    Several threads may call it: the whole of copying in, launching and copying out is one caller's at a time, and on a
    GPU the next caller's stream waits until the one before has copied its outputs.
    """

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], launch: Callable[[], object]) -> None:
        self.inputs, self.outputs, self.launch = list(inputs), list(outputs), launch
        self._lock = threading.Lock()
        self._copied = torch.cuda.Event() if self.inputs[0].is_cuda else None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._lock:
            if self._copied is not None:
                self._copied.wait()
            for held, given in zip(self.inputs, inputs, strict=True):
                held.copy_(given)
            self.launch()
            outputs = tuple(t.clone() for t in self.outputs)
            if self._copied is not None:
                self._copied.record()
            return outputs
