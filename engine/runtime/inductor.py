"""torch.compile: the traced graph compiled in this process, one static shape for each batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .aoti import OPTIONS
from .cudagraphs import RECORDED_SEED, record
from .registry import Runtime
from .spec import Spec


class Inductor(Runtime):
    """torch.compile; on a GPU recorded as a CUDA graph.

    By ourselves: Inductor's own CUDA graphs belong to the thread that compiled them.
    """

    name = "inductor"

    def prepare(self, spec: Spec, eager: Callable[..., Any]) -> Callable[[int], Callable[..., tuple[Tensor, ...]]]:
        from counterlens.export.tracing import trace

        lock = Lock()  # compiling at the first call is for one thread
        graph = cache(lambda: trace(spec.function(), spec.example(2)))

        def prepare(batch: int) -> Callable[..., tuple[Tensor, ...]]:
            compiled = torch.compile(graph(), fullgraph=True, dynamic=False, options=dict(OPTIONS))

            def run(*inputs: Tensor) -> tuple[Tensor, ...]:
                with lock, torch.no_grad():
                    out = compiled(*inputs)
                    return tuple(out) if isinstance(out, (list, tuple)) else (out,)

            if spec.device.type == "cuda":
                return record(run, spec.example(batch, seed=RECORDED_SEED), self.name)
            return run

        return prepare


RUNTIME = Inductor()
