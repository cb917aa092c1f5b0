"""Every ONNX file is checked before it is there: its shapes, that it loads, and its results against the function's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.checker
import onnx.shape_inference
import torch
from onnx import helper
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from counterlens.export.capture import explain, shapes_of
from counterlens.export.check import BATCHES, Comparison, call, compare, fitting, free_memory, sample, tolerance_of
from counterlens.export.errors import ExportError, NodeError, onnxruntime_errors
from counterlens.export.state import preserved
from counterlens.export.tracing import batch_dependence, batched_inputs, devices_of, traced_alone
from counterlens.export.versions import versions

MISFITS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    IndexError,
    TypeError,
)  # of operations on sizes that do not fit
SMALL = 1024  # bytes of a constant whose value shapes may depend on

Origins = Mapping[str, str]  # the graph's node that an operator was written for


def check_structure(model: onnx.ModelProto, weights: Mapping[str, tuple[int, Sequence[int]]], origins: Origins) -> None:
    """onnx's checker and full shape inference, on a model whose large weights are elsewhere.

    Args:
        model: with its small constants; it is changed.
        weights: type and shape of the others.

    Raises:
        NodeError: it is no valid model.
    """
    # As inputs, so that no second copy of the weights is made.
    model.graph.input.extend(helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in weights.items())
    try:
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, TypeError) as error:
        raise _at_operator("onnx finds the file invalid", error, origins) from error


def check_file(
    path: Path,
    graph: GraphModule,
    fn: Callable[..., Any],
    examples: Sequence[Tensor],
    *,
    dynamic_batch: bool,
    values: Mapping[Node, Any],
    origins: Origins,
    memory: int | None = None,
) -> dict[str, Any]:
    """Load a file in ONNX Runtime and compare it with its function on random inputs, at batches 1, 3 and 8 where open.

    Returns:
        `batches` that were compared, `worst` relative error, `tolerance`, share of `unstable` samples that rounding
        decides, `left_out`: why a batch (or all) was not run, `eager`: batches at which PyTorch's own kernels disagree
        with the operations that the function is made of, and `versions`.

    Raises:
        ExportError: the file does not load or does not agree; the message holds the source line.
    """
    report: dict[str, Any] = {
        "batches": [], "worst": 0.0, "tolerance": tolerance_of(graph), "unstable": 0.0, "left_out": {}, "eager": [],
        "versions": versions(("torch", "onnx", "onnxruntime")),
    }  # fmt: skip
    try:
        import onnxruntime
    except ImportError:
        report["left_out"]["all"] = "onnxruntime is not installed"
        return report
    session = _session(onnxruntime, path, origins)
    batched = batched_inputs(examples) if dynamic_batch else list(range(len(examples)))
    own = examples[0].shape[0] if examples and examples[0].ndim else 1
    allowed = free_memory(examples[0].device if examples else torch.device("cpu")) if memory is None else memory
    sizes, report["left_out"] = fitting(graph, BATCHES if dynamic_batch else (own,), allowed)
    with preserved(fn, devices_of(examples), traced=False) as state:
        for size in sizes:
            batch = size if dynamic_batch else None
            inputs = sample(examples, batched, batch, seed=size)
            try:
                want = call(fn, inputs)
            except Exception as error:  # noqa: BLE001 (it is the user's: it may take no such batch)
                report["left_out"][str(size)] = f"cannot be run by the function itself ({explain(error)})"
                state.restore()
                continue
            state.restore()
            try:
                got = _run(session, inputs)
            except onnxruntime_errors() as error:
                found = Comparison(float("nan"), 0, f"ONNX Runtime fails ({_first_line(error)})")
            else:
                found = compare(got, fn, inputs, report["tolerance"], want)
                # PyTorch has kernels that are wrong at one shape. Then the same rows in a larger batch decide, and its
                # own operations one by one.
                if found.fault and batch and _agrees(got, fn, inputs, batched, report["tolerance"]):
                    report["eager"].append(size)
                    found = compare(got, traced_alone(fn, inputs), inputs, report["tolerance"])
            state.restore()
            if found.fault:
                raise _reason(found.fault, graph, fn, examples, inputs, batch, onnxruntime, path, values)
            report["batches"].append(size)
            report["worst"] = max(report["worst"], found.worst)
            report["unstable"] = max(report["unstable"], found.unstable)
    return report


def _agrees(
    got: Sequence[Tensor], fn: Callable[..., Any], inputs: Sequence[Tensor], batched: Sequence[int], tolerance: float
) -> bool:
    """Whether results are what the function gives for these rows beside as many others."""
    wide = [torch.cat([x, x]) if i in batched else x for i, x in enumerate(inputs)]
    rows = [v[: len(v) // 2] if v.ndim else v for v in call(fn, wide)]
    return not compare(got, fn, inputs, tolerance, rows).fault


def _session(onnxruntime: Any, path: Path, origins: Origins) -> Any:
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except onnxruntime_errors() as error:
        raise _at_operator("ONNX Runtime cannot load the file", error, origins) from error


def _run(session: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    feed = {i.name: x.detach().cpu().numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(v.copy()) for v in session.run(None, feed)]


def _reason(
    fault: str, graph: GraphModule, fn: Callable[..., Any], examples: Sequence[Tensor], inputs: Sequence[Tensor],
    batch: int | None, onnxruntime: Any, path: Path, values: Mapping[Node, Any],
) -> ExportError:  # fmt: skip
    """What to say of a file that does not agree: the line where the function depends on the batch, or the operation."""
    try:
        traced_well = not compare(call(graph, inputs), fn, inputs, tolerance_of(graph)).fault
    except MISFITS:
        traced_well = False
    at = f"at batch {batch}" if batch else f"for inputs {shapes_of(inputs)}"
    if not traced_well and batch and (error := batch_dependence(fn, examples, batch)) is not None:
        return ExportError(f"{error} ({at} {fault})")
    if node := _first_wrong(graph, inputs, onnxruntime, path, values):
        return NodeError(f"{node.target} comes out differently in ONNX Runtime, {{where}}; {at} {fault}", node.name)
    return ExportError(f"the file does not agree with the function: {at} {fault}; not written")


def _first_wrong(
    graph: GraphModule, inputs: Sequence[Tensor], onnxruntime: Any, path: Path, values: Mapping[Node, Any]
) -> Node | None:
    """The first operation that gives something else in ONNX Runtime, with every value as an output."""
    expected: dict[Node, Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            out = super().run_node(n)
            if n.op == "call_function" and isinstance(out, Tensor) and isinstance(values.get(n), str):
                expected[n] = out.detach().cpu()
            return out

    model = onnx.load(str(path))
    known = {o.name for o in model.graph.output} | {v for n in model.graph.node for v in n.output}
    try:
        with torch.no_grad():
            Recorder(graph).run(*inputs)
        nodes = [n for n in expected if str(values[n]) in known]
        model.graph.output.extend(onnx.ValueInfoProto(name=str(n)) for n in dict.fromkeys(values[n] for n in nodes))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        results = dict(zip(names, _run(session, inputs), strict=True))
    except MISFITS + onnxruntime_errors():  # nothing but a better message hangs on it
        return None
    tolerance = 10 * tolerance_of(graph)
    for node in nodes:
        want = expected[node]
        if compare([results[str(values[node])]], lambda *_, v=want: v, inputs, tolerance).fault:
            return node
    return None


def _at_operator(what: str, error: Exception, origins: Origins) -> NodeError:
    """The error with the node that the operator it names was written for."""
    text = _first_line(error)
    operator = next((name for name in re.findall(r"\w+_\d+", str(error)) if name in origins), "")
    return NodeError(f"{what} ({text})" + (", {where}" if operator else ""), origins.get(operator, ""))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else explain(error)
