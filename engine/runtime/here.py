"""What is compiled or recorded in this process, for each batch size at its first call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .parity import check_parity
from .spec import SLOTS, Spec

# On an H200 a step of Stable Diffusion 1.x takes 138 ms of one sample and 167 ms of four: it waits for launches, and
# does so no more from eight on (192 ms).
LAUNCH_BOUND = 4


LARGER_SLOTS = (32, 64)  # where a GPU's memory has room for them
SHARE_OF_MEMORY = 0.8  # of what is free: allocators and libraries take some more than the tensors


def slots_on(device: torch.device, runtime: str) -> tuple[int, ...]:
    """The slot counts that a device may have, if they fit; an engine of TensorRT is built for the usual ones alone."""
    return SLOTS + LARGER_SLOTS if device.type == "cuda" and runtime != "tensorrt" else SLOTS


def memory_of(device: torch.device, held: int) -> float | None:
    """Bytes that models and a step may take on a GPU, of which the models hold so many already; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return held + SHARE_OF_MEMORY * (free + unused)


def together(device: torch.device) -> int:
    """Up to which batch both noise predictions of an exact step are one pass on a device, see `GuidedStep`."""
    return LAUNCH_BOUND if device.type == "cuda" else 0


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


class Turns:
    """Whose turn it is to use memory that several launches share: one caller's at a time, on the device as well."""

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the one before; on a GPU its work is waited for by this caller's stream, not by the host."""
        with self._lock:
            if self._done is not None:
                self._done.wait()
            try:
                yield
            finally:
                if self._done is not None:
                    self._done.record()


class Replay:
    """Fixed buffers that one launch reads and writes, such as a CUDA graph's, as a function of tensors.

    Several threads may call it: copying in, launching and copying out is one turn. `turns` are those of launches that
    share memory with this one, such as graphs of one pool; its own without them.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        launch: Callable[[], object],
        turns: Turns | None = None,
    ) -> None:
        self.inputs, self.outputs, self.launch = list(inputs), list(outputs), launch
        self.turns = turns or Turns(self.inputs[0].device)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self.turns.turn():
            for held, given in zip(self.inputs, inputs, strict=True):
                held.copy_(given)
            self.launch()
            return tuple(t.clone() for t in self.outputs)
