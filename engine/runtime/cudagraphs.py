"""CUDA graphs: the eager step recorded once for each batch size and replayed as one launch.

Nothing is compiled, so recording takes seconds; what it saves is the host's time between kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError

from .parity import check_parity
from .spec import Spec

RECORDED_SEED = 1 << 20
WARMUPS = 2  # kernels are built and chosen before they are recorded


def missing(device: torch.device) -> list[str]:
    """Why nothing can be recorded on this device; empty when it can."""
    return [] if device.type == "cuda" else [f"the models are on {device}, CUDA graphs need a CUDA device"]


class Recorded:
    """A function of tensors as one CUDA graph; inputs are copied in, outputs out: the next replay overwrites them.

    Raises:
        ExportError: the function cannot be recorded; most often an operation in it waits for the device.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        self._lock = Lock()  # the buffers are those of every thread
        self.graph = torch.cuda.CUDAGraph()
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        with torch.no_grad():
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    function(*self.inputs)
            current.wait_stream(stream)
            try:
                with torch.cuda.graph(self.graph):
                    out = function(*self.inputs)
            except RuntimeError as error:
                why = str(error).strip().splitlines()[0]
                raise ExportError(f"cudagraphs: cannot be recorded ({why}); use runtime eager or inductor") from error
        self.outputs: tuple[Tensor, ...] = tuple(out) if isinstance(out, (list, tuple)) else (out,)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._lock:
            for held, given in zip(self.inputs, inputs, strict=True):
                held.copy_(given)
            self.graph.replay()
            return tuple(t.clone() for t in self.outputs)


class CudaGraphStep:
    """Records on the first call with a batch size, and checks the graph against eager before its result is used."""

    def __init__(self, spec: Spec, function: Callable[..., Any]) -> None:
        if reasons := missing(spec.device):
            raise ExportError(f"cudagraphs: {'; '.join(reasons)}")
        self.spec = spec
        self.function = function
        self.reports: dict[int, dict[str, Any]] = {}
        self._recorded: dict[int, Recorded] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        batch = inputs[0].shape[0]
        self.record(batch)
        return self._recorded[batch](*inputs)

    def record(self, batch: int) -> None:
        """Record one batch size, unless it is. ExportError if that cannot be done, or it does not agree with eager."""
        if batch in self._recorded:
            return
        # On other numbers than those that it is checked with.
        recorded = Recorded(self.function, self.spec.example(batch, seed=RECORDED_SEED))
        self.reports[batch] = check_parity(self.spec, recorded, batches=(batch,))
        self._recorded[batch] = recorded
