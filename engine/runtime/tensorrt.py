"""TensorRT: an engine built from our ONNX file, run on torch's stream with torch's buffers.

Written against the documented API of TensorRT 10; the builder could not be installed where this was written, so it has
not been run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from counterlens.export.errors import ExportError

from ..errors import install_hint
from . import onnxruntime
from .here import Replay
from .registry import Runtime, Timed
from .spec import SLOTS, STEP, Spec

WORKSPACE = 4 << 30  # bytes


def missing() -> list[str]:
    """Why TensorRT cannot run here; empty when it can."""
    reasons = []
    try:
        import tensorrt  # noqa: F401
    except ImportError as error:
        reasons.append(f"tensorrt cannot be imported ({error}); {install_hint('tensorrt')}")
    if not torch.cuda.is_available():
        reasons.append("there is no CUDA device")
    return reasons


def identity() -> dict[str, Any]:
    """What an engine is only right for: the TensorRT version and the GPU. ExportError without them."""
    if reasons := missing():
        raise ExportError(f"tensorrt: {'; '.join(reasons)}")
    import tensorrt

    capability = torch.cuda.get_device_capability()
    return {"tensorrt": tensorrt.__version__, "gpu": torch.cuda.get_device_name(), "capability": list(capability)}


def _logger() -> Any:
    import tensorrt

    return tensorrt.Logger(tensorrt.Logger.WARNING)


def build(model: Path, path: Path, spec: Spec, *, timing_cache: Path | None = None) -> Path:
    """Build an engine from an ONNX file, with one optimisation profile for each of `SLOTS`.

    Types are those of the file (a strongly typed network): half-precision weights and activations with float32 sums
    come from the export, not from the builder's choice.

    Raises:
        ExportError: the parser or the builder refuses; the message holds the parser's reasons.
    """
    import tensorrt

    logger = _logger()
    builder = tensorrt.Builder(logger)
    flags = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(f"{model}: TensorRT does not take it: {reasons}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, WORKSPACE)
    timing_cache = timing_cache or path.parent.parent / "tensorrt.timing"
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    shapes = {name: tuple(x.shape[1:]) for name, x in zip(spec.inputs, spec.example(1), strict=True)}
    for slots in SLOTS:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, min=(slots, *shape), opt=(slots, *shape), max=(slots, *shape))
        config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ExportError(f"{model}: TensorRT built no engine; its log says why")
    timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    path.write_bytes(bytes(serialized))
    (path.parent / "tensorrt.json").write_text(json.dumps(identity() | {"slots": SLOTS, "step": spec.what == STEP}))
    return path


def load(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """Open an engine as a function of its inputs in order.

    Raises:
        ExportError: it was built by another TensorRT or for another GPU, or cannot be read.
    """
    built = json.loads((path.parent / "tensorrt.json").read_text())
    for field, mine in identity().items():
        if built[field] != mine:
            raise ExportError(f"{path}: built for {field} {built[field]}, this is {mine}; build it here again")
    import tensorrt

    engine = tensorrt.Runtime(_logger()).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ExportError(f"{path}: TensorRT cannot read it; build it again")
    return _EngineRunner(engine, built["slots"])


class _EngineRunner:
    """Runs an engine; for each slot count its own context, buffers and CUDA graph. Safe from several threads."""

    def __init__(self, engine: Any, slots: Sequence[int]) -> None:
        import tensorrt

        self.engine = engine
        self.slots = list(slots)
        tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {n: engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT for n in tensors}
        self.inputs = [n for n in tensors if is_input[n]]
        self.outputs = [n for n in tensors if not is_input[n]]
        self._replays: dict[int, Replay] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        batch = inputs[0].shape[0]
        if batch not in self.slots:
            known = ", ".join(map(str, self.slots))
            raise ExportError(f"tensorrt: z: a batch of {batch} is in no profile; this engine takes {known}")
        with self._lock:
            if batch not in self._replays:
                self._replays[batch] = self._prepare(batch, inputs)
        return self._replays[batch](*inputs)

    def _prepare(self, batch: int, inputs: Sequence[Tensor]) -> Replay:
        context = self.engine.create_execution_context()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            context.set_optimization_profile_async(self.slots.index(batch), stream.cuda_stream)
            held = [x.clone() for x in inputs]
            for name, x in zip(self.inputs, held, strict=True):
                context.set_input_shape(name, tuple(x.shape))
            shapes = [tuple(context.get_tensor_shape(name)) for name in self.outputs]
            outputs = [torch.empty(shape, device=inputs[0].device) for shape in shapes]
            for name, x in zip([*self.inputs, *self.outputs], [*held, *outputs], strict=True):
                context.set_tensor_address(name, x.data_ptr())
            context.execute_async_v3(stream.cuda_stream)  # a first run outside the graph, as documented
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                context.execute_async_v3(stream.cuda_stream)
        torch.cuda.current_stream().wait_stream(stream)

        def launch(context: Any = context) -> None:  # which the graph needs as long as it is launched
            graph.replay()

        return Replay(held, outputs, launch)


class TensorRt(Runtime):
    """An engine for this GPU and this TensorRT."""

    name, file, packages = "tensorrt", "model.engine", ("tensorrt",)

    def missing(self, device: torch.device) -> list[str]:
        return missing()

    def key(self, spec: Spec) -> dict[str, Any]:
        return identity()

    def build(self, graph: GraphModule, spec: Spec, path: Path, timed: Timed) -> None:
        model = path.with_name(onnxruntime.FILE)
        timed("writing ONNX", "write", lambda: onnxruntime.write(graph, spec, model))
        timed("building with TensorRT", "compile", lambda: build(model, path, spec))

    def load(self, path: Path, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
        return load(path)


RUNTIME = TensorRt()
