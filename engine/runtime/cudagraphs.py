"""CUDA graphs: the eager step recorded once for each batch size and replayed as one launch.

Nothing is compiled, so recording takes seconds; what it saves is the host's time between kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError

from .here import Replay, Turns
from .registry import Runtime
from .spec import Spec

RECORDED_SEED = 1 << 20
WARMUPS = 2  # kernels are built and chosen before they are recorded


@cache
def _pool(device: torch.device) -> tuple[Any, Turns]:
    """The memory that all graphs of a device share, and their turns: no two of them run at the same time, so what one
    holds between its kernels may be another's. Inputs are outside of it, outputs are held and so are nobody else's.
    """
    return torch.cuda.graph_pool_handle(), Turns(device)


def record(function: Callable[..., Any], inputs: Sequence[Tensor], name: str = "cudagraphs") -> Replay:
    """A function of tensors as one CUDA graph. Other threads may use the device meanwhile.

    All graphs of a device share their memory and take turns; `name` is the runtime that asks, for messages.

    Raises:
        ExportError: the function cannot be recorded; most often an operation in it waits for the device.
    """
    held = [x.clone() for x in inputs]
    pool, turns = _pool(held[0].device)
    graph = torch.cuda.CUDAGraph()
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                function(*held)
        current.wait_stream(stream)
        try:
            # Not during another's replay: capturing hands out memory that the replay uses.
            with turns.turn(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                out = function(*held)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise ExportError(f"{name}: cannot be recorded ({why}); use runtime eager") from error
    return Replay(held, out if isinstance(out, (list, tuple)) else [out], graph.replay, turns)


class CudaGraphs(Runtime):
    """Eager's own kernels as one launch."""

    name, recorded = "cudagraphs", True

    def missing(self, device: torch.device) -> list[str]:
        return [] if device.type == "cuda" else [f"the models are on {device}, CUDA graphs need a CUDA device"]

    def prepare(self, spec: Spec, eager: Callable[..., Any]) -> Callable[[int], Replay]:
        # On other numbers than those that it is checked with.
        return lambda batch: record(eager, spec.example(batch, seed=RECORDED_SEED))


RUNTIME = CudaGraphs()
