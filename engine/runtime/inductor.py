"""torch.compile: the traced graph compiled in this process, one static shape for each batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from counterlens.export.trace import trace

from .aoti import OPTIONS
from .parity import check_parity
from .spec import Spec


class InductorStep:
    """Compiles on the first call with a batch size, and checks it against eager before its result is used.

    On a GPU the steps run as CUDA graphs; their outputs are cloned, because the next replay overwrites them.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._lock = Lock()
        self.reports: dict[int, dict[str, Any]] = {}
        self._compiled: dict[int, Callable[..., Sequence[Tensor]]] = {}
        self._graph: torch.fx.GraphModule | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        batch = inputs[0].shape[0]
        with self._lock:  # on a GPU the buffers are those of every thread
            if batch not in self._compiled:
                self.compile(batch)
            return self._run(batch, *inputs)

    def compile(self, batch: int) -> None:
        """Compile for one batch size now. ExportError if the result does not agree with eager."""
        if self._graph is None:
            self._graph = trace(self.spec.function(), self.spec.example(2))
        options: dict[str, Any] = dict(OPTIONS)
        if self.spec.device.type == "cuda":
            options["triton.cudagraphs"] = True
        compiled = torch.compile(self._graph, fullgraph=True, dynamic=False, options=options)
        self._compiled[batch] = compiled
        try:
            self.reports[batch] = check_parity(self.spec, lambda *x: self._run(batch, *x), batches=(batch,))
        except Exception:
            del self._compiled[batch]
            raise

    def _run(self, batch: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = self._compiled[batch](*inputs)
        outputs = out if isinstance(out, (list, tuple)) else (out,)
        return tuple(t.clone() for t in outputs) if inputs[0].is_cuda else tuple(outputs)
