"""AOTInductor: the traced graph compiled ahead of time, loaded without tracing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from counterlens.export.errors import ExportError

from .registry import Runtime, Timed
from .spec import Spec, machine

# layout_optimization: torch 2.13 returned a wrong VJP on the CPU with it (tests/engine/runtime/test_inductor.py).
OPTIONS = {"layout_optimization": False}
LARGEST = 64  # batch


def compile_package(graph: GraphModule, example: Sequence[Tensor], path: Path, *, dynamic_batch: bool = True) -> Path:
    """Compile a graph that `trace` made into an AOTInductor package.

    Raises:
        ExportError: Inductor cannot compile it.
    """
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch", min=1, max=LARGEST)
        first = example[0].shape[0]
        shapes = tuple({0: batch} if x.ndim and x.shape[0] == first else None for x in example)
    try:
        exported = torch.export.export(graph, tuple(example), dynamic_shapes=shapes, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=OPTIONS)
    except (RuntimeError, torch._dynamo.exc.UserError) as error:
        raise ExportError(f"AOTInductor cannot compile it: {str(error).strip().splitlines()[0]}") from error
    return path


def load(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """Open a package as a function of its inputs in order.

    Raises:
        ExportError: it cannot be loaded here.
    """
    try:
        package: Any = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise ExportError(f"{path}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = package(*inputs)
        return tuple(out) if isinstance(out, (list, tuple)) else (out,)

    return run


class AotInductor(Runtime):
    """A package of AOTInductor, for this machine and this torch."""

    name, file = "aoti", "model.pt2"

    def key(self, spec: Spec) -> dict[str, Any]:
        return {"torch": torch.__version__, "machine": machine(), "device": spec.device.type}

    def build(self, graph: GraphModule, spec: Spec, path: Path, timed: Timed) -> None:
        timed("compiling with AOTInductor", "compile", lambda: compile_package(graph, spec.example(4), path))

    def load(self, path: Path, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
        return load(path)


RUNTIME = AotInductor()
