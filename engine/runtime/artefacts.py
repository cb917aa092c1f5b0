"""Builds compiled steps into the store, checked, and opens them again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError
from counterlens.export.store import Artefact, Store

from ..errors import UsageError, install_hint
from . import aoti, onnxruntime, tensorrt
from .compiled import CompiledStep, as_json, expected_inputs, from_json
from .parity import check_parity
from .record import installed, read_record, write_record
from .spec import STEP, Spec, machine

TARGETS = ("onnx", "aoti", "tensorrt")
FILES = {"onnx": "model.onnx", "aoti": "model.pt2", "tensorrt": "model.engine"}
Say = Callable[[str], None]


CPU = torch.device("cpu")


def missing(target: str, device: torch.device = CPU) -> list[str]:
    """Why artefacts of this target cannot be built and checked on this device; empty when they can."""
    if target == "onnx":
        try:
            import onnx  # noqa: F401
        except ImportError as error:
            return [f"onnx cannot be imported ({error}); {install_hint('cpu')}"]
        return onnxruntime.missing(onnxruntime.provider_for(device))
    return tensorrt.missing() if target == "tensorrt" else []


def key_of(spec: Spec, target: str) -> dict[str, Any]:
    """The store's key: what the graph depends on, and the machine and versions where those decide as well."""
    if target not in TARGETS:
        raise UsageError(f"format: expected one of {', '.join(TARGETS)}, got {target!r}")
    key = spec.key(target)
    if target == "onnx":
        from counterlens.export.onnx import OPSET

        key["opset"] = OPSET
    elif target == "aoti":
        key |= {"torch": torch.__version__, "machine": machine(), "device": spec.device.type}
    else:
        key |= tensorrt.identity()
    return key


def build(
    spec: Spec, target: str, store: Store | None = None, *, force: bool = False, say: Say = lambda _: None
) -> Artefact:
    """Take an artefact from the store, or build it, check it against eager and put it there.

    Args:
        spec: what to compile.
        target: `onnx`, `aoti` or `tensorrt`.
        store: the default store without one.
        force: build it again.
        say: told what is being done.

    Raises:
        ExportError: something that is needed is missing, the function cannot be exported, or the result is wrong.
    """
    key = key_of(spec, target)
    if reasons := missing(target, spec.device):
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
    path = folder / FILES[target]
    example = spec.example(4)

    def timed(what: str, label: str, work: Callable[[], Any]) -> Any:
        say(what)
        started = time.perf_counter()
        out = work()
        seconds[label] = round(time.perf_counter() - started, 2)
        return out

    from counterlens.export.check import BATCHES, fitting, free_memory
    from counterlens.export.trace import trace

    graph = timed(f"tracing the {spec.what}", "trace", lambda: trace(spec.function(), example))
    nodes = sum(n.op == "call_function" for n in graph.graph.nodes)
    if target == "aoti":
        timed("compiling with AOTInductor", "compile", lambda: aoti.compile_package(graph, example, path))
        run = timed("loading it", "load", lambda: aoti.load(path))
    else:
        from counterlens.export.onnx import write_onnx

        model = folder / FILES["onnx"]
        metadata = {"counterlens": json.dumps(spec.key(target))}
        names: dict[str, Any] = {"input_names": spec.inputs, "output_names": spec.outputs, "metadata": metadata}
        timed("writing ONNX", "write", lambda: write_onnx(graph, model, **names))
        if target == "tensorrt":
            timed("building with TensorRT", "compile", lambda: tensorrt.build(model, path, spec))
            run = timed("loading it", "load", lambda: tensorrt.load(path))
        else:
            provider = onnxruntime.provider_for(spec.device)
            run = timed("loading it", "load", lambda: onnxruntime.load(path, provider=provider))
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
        "versions": {name: installed(name) for name in ("torch", "onnx", "onnxruntime", "counterlens")},
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
    target = artefact.report["target"]
    path = artefact.file(FILES[target])
    if target == "onnx":
        return onnxruntime.load(path, provider=onnxruntime.provider_for(device))
    return {"aoti": aoti.load, "tensorrt": tensorrt.load}[target](path)


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
