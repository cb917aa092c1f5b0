"""torch.compile: the traced graph compiled in this process, one static shape for each batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .aoti import OPTIONS
from .registry import Runtime
from .spec import Spec


class Inductor(Runtime):
    """torch.compile; on a GPU as CUDA graphs, whose outputs are cloned, because the next replay overwrites them."""

    name = "inductor"

    def prepare(self, spec: Spec, eager: Callable[..., Any]) -> Callable[[int], Callable[..., tuple[Tensor, ...]]]:
        from counterlens.export.tracing import trace

        options: dict[str, Any] = dict(OPTIONS)
        if spec.device.type == "cuda":
            options["triton.cudagraphs"] = True
        lock = Lock()  # on a GPU the buffers are those of every thread
        graph = cache(lambda: trace(spec.function(), spec.example(2)))

        def prepare(batch: int) -> Callable[..., tuple[Tensor, ...]]:
            compiled = torch.compile(graph(), fullgraph=True, dynamic=False, options=options)

            def run(*inputs: Tensor) -> tuple[Tensor, ...]:
                with lock, torch.no_grad():
                    out = compiled(*inputs)
                    outputs = out if isinstance(out, (list, tuple)) else (out,)
                    return tuple(t.clone() for t in outputs) if inputs[0].is_cuda else tuple(outputs)

            return run

        return prepare


RUNTIME = Inductor()
