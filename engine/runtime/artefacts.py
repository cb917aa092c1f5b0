"""Builds compiled steps into the store, checked, and opens them again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError
from counterlens.export.store import Artefact, Store
from counterlens.export.versions import versions

from . import registry
from .compiled import CompiledStep, as_json, expected_inputs, from_json
from .parity import check_parity
from .record import read_record, write_record
from .spec import STEP, Spec

Say = Callable[[str], None]
CPU = torch.device("cpu")


def key_of(spec: Spec, target: str) -> dict[str, Any]:
    """The store's key: what the graph depends on, and the machine and versions where those decide as well."""
    return spec.key(target) | registry.of_format(target).key(spec)


def build(
    spec: Spec, target: str, store: Store | None = None, *, force: bool = False, say: Say = lambda _: None
) -> Artefact:
    """Take an artefact from the store, or build it, check it against eager and put it there.

    Args:
        spec: what to compile.
        target: a format of `registry.formats()`, such as `onnx`.
        store: the default store without one.
        force: build it again.
        say: told what is being done.

    Raises:
        ExportError: something that is needed is missing, the function cannot be exported, or the result is wrong.
    """
    key = key_of(spec, target)
    if reasons := registry.of_format(target).missing(spec.device):
        raise ExportError(f"{target}: {'; '.join(reasons)}")
    built: list[dict[str, Any]] = []

    def make(folder: Path) -> dict[str, Any]:
        built.append(_build(spec, target, folder, say))
        return built[0]

    artefact = (store or Store()).get(key, make, force=force)
    if built:
        write_record(artefact, spec.device, real=spec.images is not None, parity=built[0]["parity"])
    return artefact


def _build(spec: Spec, target: str, folder: Path, say: Say) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    runtime = registry.of_format(target)
    path = folder / runtime.file
    example = spec.example(4)

    def timed(what: str, label: str, work: Callable[[], Any]) -> Any:
        say(what)
        started = time.perf_counter()
        out = work()
        seconds[label] = round(time.perf_counter() - started, 2)
        return out

    from counterlens.export.check import BATCHES, fitting, free_memory
    from counterlens.export.tracing import trace

    graph = timed(f"tracing the {spec.what}", "trace", lambda: trace(spec.function(), example))
    nodes = sum(n.op == "call_function" for n in graph.graph.nodes)
    runtime.build(graph, spec, path, timed)
    run = timed("loading it", "load", lambda: runtime.load(path, spec.device))
    batches, beyond = fitting(graph, BATCHES, free_memory(spec.device))
    parity = timed("comparing with eager", "check", lambda: check_parity(spec, run, batches=batches or (1,)))
    parity["beyond_memory"] = beyond
    inputs: dict[str, Tensor] = dict(zip(spec.inputs, example, strict=True))
    return {
        "what": spec.what,
        "target": target,
        "dtype": spec.dtype,
        "operations": nodes,
        "seconds": seconds,
        "parity": parity,
        "inputs": as_json(expected_inputs(inputs)),
        "versions": versions(("torch", "onnx", "counterlens", *runtime.packages)),
    }


def open_checked(artefact: Artefact, spec: Spec, say: Say = lambda _: None) -> Callable[..., tuple[Tensor, ...]]:
    """An artefact of this spec as a function of its inputs, held to eager first if it never was on this machine.

    Raises:
        ExportError: it cannot run here, or does not agree with eager.
    """
    run, real = open_function(artefact, spec.device), spec.images is not None
    if read_record(artefact, spec.device, real=real) is None:
        say("comparing with eager, once on this machine")
        write_record(artefact, spec.device, real=real, parity=check_parity(spec, run))
    return run


def open_function(artefact: Artefact, device: torch.device = CPU) -> Callable[..., tuple[Tensor, ...]]:
    """An artefact as a function of its inputs in order, on `device`. ExportError if it cannot run here."""
    runtime = registry.of_format(artefact.report["target"])
    return runtime.load(artefact.file(runtime.file), device)


def open_step(
    artefact: Artefact, device: torch.device = CPU, run: Callable[..., tuple[Tensor, ...]] | None = None
) -> CompiledStep:
    """An artefact of the guided step, called like a GuidedStep, on `device`. No model is loaded for it.

    Args:
        artefact: of the store, or a copy of one.
        device: where it runs.
        run: the artefact if it is open already, as `open_checked` opens it.

    Raises:
        ExportError: it is no guided step, or cannot run here.
    """
    if artefact.report["what"] != STEP:
        raise ExportError(f"{artefact.folder}: holds the {artefact.report['what']}, not the guided step")
    return CompiledStep(
        run or open_function(artefact, device),
        runtime=artefact.report["target"],
        dtype=artefact.report["dtype"],
        expected=from_json(artefact.report["inputs"]),
    )
