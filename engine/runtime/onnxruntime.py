"""ONNX Runtime: our ONNX file on the CPU, or on CUDA and TensorRT through onnxruntime-gpu."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from counterlens.export.errors import ExportError, onnxruntime_errors
from counterlens.export.versions import OPSET

from ..errors import install_hint
from .registry import Runtime, Timed
from .spec import Spec

FILE = "model.onnx"

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def write(graph: GraphModule, spec: Spec, path: Path) -> Path:
    """Write a traced spec as an ONNX file that says what it is."""
    from counterlens.export.onnx import write_onnx

    metadata = {"counterlens": json.dumps(spec.key("onnx"))}
    write_onnx(graph, path, input_names=spec.inputs, output_names=spec.outputs, metadata=metadata)
    return path


class OnnxRuntime(Runtime):
    """Our ONNX file, on the CPU or through onnxruntime-gpu."""

    name, file, packages = "onnxruntime", FILE, ("onnxruntime", "onnxruntime-gpu")
    portable = True

    def missing(self, device: torch.device) -> list[str]:
        if find_spec("onnx") is None:
            return [f"onnx cannot be imported; {install_hint('cpu')}"]
        return missing(provider_for(device))

    def key(self, spec: Spec) -> dict[str, Any]:
        return {"opset": OPSET}

    def build(self, graph: GraphModule, spec: Spec, path: Path, timed: Timed) -> None:
        timed("writing ONNX", "write", lambda: write(graph, spec, path))

    def load(self, path: Path, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
        return load(path, provider=provider_for(device))


RUNTIME = OnnxRuntime()


def provider_for(device: torch.device) -> str:
    """The provider that runs on a device."""
    return "cuda" if device.type == "cuda" else "cpu"


def missing(provider: str = "cpu") -> list[str]:
    """Why ONNX Runtime cannot run with this provider here; empty when it can."""
    try:
        import onnxruntime
    except ImportError as error:
        return [f"onnxruntime cannot be imported ({error}); {install_hint('cpu')}"]
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        return [f"this onnxruntime has no {PROVIDERS[provider]}; pip install onnxruntime-gpu in its place"]
    if provider != "cpu" and not torch.cuda.is_available():
        return ["there is no CUDA device"]
    return []


def load(path: Path, *, provider: str = "cpu", threads: int | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """Open an ONNX file as a function of its inputs in order, float32 and int64 tensors on the provider's device.

    Args:
        path: of the file.
        provider: `cpu`, `cuda` or `tensorrt`.
        threads: for one operator (CPU); torch's number of threads without it.

    Raises:
        ExportError: the provider is missing, or the file cannot be read.
    """
    if reasons := missing(provider):
        raise ExportError(f"onnxruntime on {provider}: {'; '.join(reasons)}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # With an open batch the planner compares symbolic shapes of all pairs of tensors: 13 s for a guided step, against
    # 0.4 s without. The arena reuses the memory anyway; neither time nor peak changes (bench.runtimes --memory).
    options.enable_mem_reuse = False
    # Waiting threads would spin on the cores that torch needs between two calls: 1.2 times slower runs on two cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    chosen: list[Any] = [PROVIDERS[provider]]
    if provider != "cpu":
        if hasattr(onnxruntime, "preload_dlls"):  # CUDA's libraries that PyTorch brought: nobody else may know the way
            onnxruntime.preload_dlls()
        stream = torch.cuda.current_stream()
        options_there: dict[str, Any] = {
            "user_compute_stream": str(stream.cuda_stream), "device_id": torch.cuda.current_device()
        }  # fmt: skip
        if provider == "cuda":
            options_there["use_tf32"] = 0  # float32 is float32
        chosen = [(PROVIDERS[provider], options_there)]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
    except failures() as error:
        raise ExportError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]})") from error
    if provider != "cpu" and session.get_providers()[0] != PROVIDERS[provider]:
        raise ExportError(f"onnxruntime did not take {PROVIDERS[provider]} but {session.get_providers()[0]}")
    names = [i.name for i in session.get_inputs()]
    if provider == "cpu":
        return lambda *inputs: _run_cpu(session, names, inputs)
    return lambda *inputs: _run_bound(session, names, inputs, stream)


def failures() -> tuple[type[Exception], ...]:
    """What is raised of a file that ONNX Runtime cannot open, inputs that it does not take, outputs of no tensor."""
    return (TypeError, *onnxruntime_errors())


def _run_cpu(session: Any, names: list[str], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if len(names) != len(inputs):
        raise ValueError(f"it has the inputs {', '.join(names)}, and {len(inputs)} were given")
    feed = {name: tensor.detach().contiguous().numpy() for name, tensor in zip(names, inputs, strict=True)}
    return tuple(torch.from_numpy(out) for out in session.run(None, feed))


def _run_bound(session: Any, names: list[str], inputs: Sequence[Tensor], stream: Any) -> tuple[Tensor, ...]:
    """Inputs and outputs stay on the device and torch owns every buffer. Not yet run on a GPU.

    The session runs on the `stream` that it was opened on; a caller on another one waits for it there, and it for them.
    """
    binding = session.io_binding()
    kept = [tensor.detach().contiguous() for tensor in inputs]
    batch, device = kept[0].shape[0], kept[0].device
    for name, tensor in zip(names, kept, strict=True):
        kind = np.int64 if tensor.dtype == torch.int64 else np.float32
        binding.bind_input(name, "cuda", device.index or 0, kind, list(tensor.shape), tensor.data_ptr())
    outputs = []
    for output in session.get_outputs():
        shape = [batch if isinstance(n, str) else n for n in output.shape]
        outputs.append(torch.empty(shape, device=device))
        binding.bind_output(output.name, "cuda", device.index or 0, np.float32, shape, outputs[-1].data_ptr())
    stream.wait_stream(torch.cuda.current_stream())
    session.run_with_iobinding(binding)
    torch.cuda.current_stream().wait_stream(stream)
    return tuple(outputs)
