"""`export_onnx`: any function of tensors, gradients inside included, as one ONNX file."""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.fx import GraphModule, Node

from counterlens.export.dtypes import STAND_INS, TO_BOOL, data_type, held, result_type
from counterlens.export.errors import ExportError, NodeError
from counterlens.export.files import cannot_write
from counterlens.export.lowering import LOWERINGS, Value
from counterlens.export.simplify import Size, aten
from counterlens.export.tracing import located, trace
from counterlens.export.verify import SMALL, check_file, check_structure
from counterlens.export.versions import OPSET

OPSETS = range(18, 22)  # what the lowerings are right for, and TensorRT 10 reads
EXTERNAL_ABOVE = 2_000_000_000  # bytes of weights that a protobuf still holds
TYPES = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
DTYPES = {number: dtype for dtype, number in TYPES.items()}


def export_onnx(
    fn: Callable[..., Any],
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    memory: int | None = None,
    report: dict[str, Any] | None = None,
) -> Path:
    """Write `fn` to an ONNX file; it may call `torch.func.vjp`, `grad`, `jacrev` or `vmap` inside.

    Parameters become initializers, beside the file (`<name>.data`) when there are over 2 GB of them. The file appears
    when it is complete and checked, or not at all: onnx's checker and full shape inference, loaded by ONNX Runtime and
    compared with `fn` on random inputs in the examples' own ranges at batches 1, 3 and 8 (at its own without an open
    batch). A warning says what could not be run.

    Args:
        fn: a module or function from tensors to a tensor or a tuple of tensors.
        example_inputs: tensors of the right shapes and dtypes with values that `fn` can take.
        path: of the file.
        input_names, output_names: default to the parameters' names and `output_0`, ...
        dynamic_batch: leave the batch open, see `counterlens.export.tracing.trace`.
        opset: 18 (the default) to 21.
        metadata: strings to keep in the file.
        memory: bytes of activations that the comparison may take (half of what is free without it); batches beyond it
            are left out.
        report: filled with what was compared, see `counterlens.export.verify.check_file`.

    Returns:
        The path.

    Raises:
        ExportError: `fn` cannot be traced, an operation has no ONNX form, the result is not what `fn` gives, or the
            file cannot be written; the message holds the source line.
    """
    target = Path(path)
    opset = _checked_opset(opset)
    traced = trace(fn, example_inputs, dynamic_batch=dynamic_batch)
    found: dict[str, Any] = {}

    def check(file: Path, builder: OnnxBuilder) -> None:
        found.update(
            check_file(
                file,
                traced,
                fn,
                example_inputs,
                dynamic_batch=dynamic_batch,
                values=builder.values,
                origins=builder.origins,
                memory=memory,
            )
        )

    names = input_names or _parameter_names(fn, len(example_inputs))
    try:
        _write(traced, target, list(names), output_names, opset, metadata, check)
    except NodeError as error:
        raise located(error, fn, example_inputs, dynamic_batch) from None
    except OSError as error:
        raise ExportError(cannot_write(target, error)) from error
    if left_out := found["left_out"]:
        said = "; ".join(f"{'' if batch == 'all' else f'batch {batch} '}{why}" for batch, why in left_out.items())
        warnings.warn(f"{target}: not compared with the function: {said}", stacklevel=2)
    if report is not None:
        report.update(found)
    return target


def write_onnx(
    graph: GraphModule,
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a graph that `trace` made; see `export_onnx`. Its shapes are checked, running it is left to the caller."""
    _write(graph, Path(path), list(input_names), output_names, _checked_opset(opset), metadata, lambda *_: None)
    return Path(path)


def _checked_opset(opset: int | None) -> int:
    opset = OPSET if opset is None else opset
    if opset not in OPSETS:
        raise ExportError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    return opset


def _write(
    graph: GraphModule,
    target: Path,
    input_names: list[str],
    output_names: Sequence[str] | None,
    opset: int,
    metadata: Mapping[str, str] | None,
    check: Callable[[Path, OnnxBuilder], None],
) -> None:
    builder = OnnxBuilder()
    model = builder.build(graph, input_names, output_names, opset)
    helper.set_model_props(model, dict(metadata or {}))
    builder.check(model)
    with appearing(target) as unfinished:
        builder.write(model, unfinished)
        check(unfinished, builder)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Where to write a model, and data beside it, so that they stand at `target` whole at the end, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        yield Path(work) / target.name
        # The data first: a model without its data would be half a file.
        for part in sorted(Path(work).iterdir(), key=lambda p: p.name == target.name):
            os.replace(part, target.parent / part.name)


def write_model(model: onnx.ModelProto, weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a model with these weights, above 2 GB beside it; one by one, so that memory holds no second copy."""
    external = sum(t.numel() * t.element_size() for t in weights.values()) > EXTERNAL_ABOVE
    data = path.with_name(f"{path.name}.data").open("wb") if external else None
    for weight, tensor in weights.items():
        proto = model.graph.initializer.add(name=weight, data_type=TYPES[tensor.dtype], dims=tensor.shape)
        raw = tensor_bytes(tensor)
        if data is None or len(raw) < 1024:
            proto.raw_data = raw
            continue
        data.write(b"\0" * (-data.tell() % 4096))
        place = {"location": f"{path.name}.data", "offset": data.tell(), "length": len(raw)}
        data.write(raw)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
    if data is not None:
        data.close()
    path.write_bytes(model.SerializeToString(deterministic=True))


def _parameter_names(fn: Callable[..., Any], count: int) -> list[str]:
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn)
    except ValueError:  # a built-in function
        return [f"input_{i}" for i in range(count)]
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names[:count] if len(names) >= count else [f"input_{i}" for i in range(count)]


class OnnxBuilder:
    """Collects operators and constants; equal ones are made once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Tensor] = {}
        self.types: dict[str, torch.dtype] = {}
        self.values: dict[Node, Any] = {}  # of the graph's nodes
        self.origins: dict[str, str] = {}  # the graph's node that an operator was written for
        self._made: dict[Any, Any] = {}
        self._constants: dict[Any, Value] = {}

    def op(self, kind: str, *inputs: Value, outputs: int = 1, **attributes: Any) -> Any:
        """Append an operator and return the names of its outputs (one: a name, more: a tuple).

        Where runtimes lack it for the type of its data, it computes in another one. NotImplementedError where inputs
        or attributes are not what an operator takes.
        """
        # An attribute is fixed: the name of a value would be written as a text.
        if symbolic := [k for k, v in attributes.items() if _any_value(v)]:
            raise NotImplementedError(f"{', '.join(symbolic)} of {kind} depends on the batch")
        if any(v and v not in self.types for v in inputs):
            raise NotImplementedError(f"{kind} takes no such number")
        types = [self.types.get(v) for v in inputs]
        data = data_type(kind, types)
        if data is not None and (other := STAND_INS.get((kind, data))) is not None:
            inputs = tuple(
                self.cast(v, data, other) if v and i in held(kind, len(inputs)) else v for i, v in enumerate(inputs)
            )
            out = self.op(kind, *inputs, outputs=outputs, **attributes)
            first = out if outputs == 1 else out[0]
            back = first if kind in TO_BOOL or self.types[first] != other else self.cast(first, other, data)
            return back if outputs == 1 else (back, *out[1:])
        key = (kind, inputs, tuple((k, str(v)) for k, v in sorted(attributes.items())))
        if key not in self._made:
            n = len(self.nodes)
            names = [Value(f"{kind.lower()}_{n}" + (f"_{i}" if outputs > 1 else "")) for i in range(outputs)]
            self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"{kind}_{n}", **attributes))
            self._made[key] = names[0] if outputs == 1 else tuple(names)
            cast = DTYPES[attributes["to"]] if kind == "Cast" else result_type(kind, data)
            indices = kind in ("TopK", "MaxPool")
            self.types.update({v: torch.int64 if i and indices else cast for i, v in enumerate(names)})
        return self._made[key]

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> Value:
        """A constant from a number, a list or a tensor (which keeps its own dtype)."""
        if _any_value(value):
            raise NotImplementedError("a number that has to be fixed depends on the batch")
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
        if tensor.numel() <= 64:
            key: Any = (tensor.dtype, tuple(tensor.shape), tensor_bytes(tensor))
        else:
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in self._constants:
            name = Value(f"constant_{len(self.weights)}")
            self.weights[name] = tensor
            self.types[name] = tensor.dtype
            self._constants[key] = name
        return self._constants[key]

    def cast(self, value: Value, source: torch.dtype, dtype: torch.dtype) -> Value:
        """Cast, unless it is of that dtype."""
        return value if source == dtype else self.op("Cast", value, to=TYPES[dtype])

    def shape(self, sizes: Sequence[Any]) -> Value:
        """An int64 vector from whole numbers and values of the graph."""
        if not any(isinstance(n, Value) for n in sizes):
            return self.constant(list(sizes))
        parts = [n if isinstance(n, Value) else self.constant([n]) for n in sizes]
        return self.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def build(
        self, graph: GraphModule, input_names: list[str], output_names: Sequence[str] | None, opset: int
    ) -> onnx.ModelProto:
        """The model without its weights."""
        values = self.values
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        if len(input_names) != len(placeholders) or len(set(input_names)) != len(input_names):
            raise ExportError(f"input_names: expected {len(placeholders)} different names, got {input_names}")
        for name, node in zip(input_names, placeholders, strict=True):
            values[node] = Value(name)
            self.types[name] = node.meta["val"].dtype
        for node in graph.graph.nodes:
            first = len(self.nodes)
            if node.op == "get_attr":
                values[node] = self.constant(getattr(graph, node.target))
            elif node.op == "call_function":
                values[node] = self._lower(node, values)
            self.origins.update({n.name: node.name for n in self.nodes[first:]})
        (result,) = next(n for n in graph.graph.nodes if n.op == "output").args
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        output_names = list(output_names or (f"output_{i}" for i in range(len(results))))
        if len(output_names) != len(results) or {*output_names} & {*input_names}:
            raise ExportError(f"output_names: expected {len(results)} names unlike the inputs', got {output_names}")
        for name, node in zip(output_names, results, strict=True):
            if not isinstance(node, Node):
                raise ExportError(f"output {name}: expected a tensor, got {node!r}")
            self.nodes.append(helper.make_node("Identity", [values[node]], [name], name=f"output_{name}"))
            self.origins[f"output_{name}"] = node.name
        return helper.make_model(
            helper.make_graph(
                self.nodes,
                "counterlens",
                [_info(n, node) for n, node in zip(input_names, placeholders, strict=True)],
                [_info(n, node) for n, node in zip(output_names, results, strict=True)],
            ),
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=10,
            producer_name="counterlens",
        )

    def _lower(self, node: Node, values: dict[Node, Any]) -> Any:
        if node.target is aten.sym_size.int:
            shape = self.op("Shape", values[node.args[0]])  # type: ignore[index]
            return self.op("Gather", shape, self.constant([node.args[1]]), axis=0)
        mapped: Any = torch.fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda v: values[v] if isinstance(v, Node) else v
        )
        args, kwargs = mapped
        target: Any = node.target
        if target.__name__ == "getitem":
            if args[0][args[1]] is None:
                source: Any = node.args[0]
                raise NodeError(f"output {args[1]} of {source.target} has no ONNX form here, at {{where}}", node.name)
            return args[0][args[1]]
        if target.__name__ in ("mul", "add") and not isinstance(target, torch._ops.OpOverload):
            return self.op(target.__name__.capitalize(), args[0], self.constant([args[1]]))
        if target not in LOWERINGS:
            raise NodeError(f"{target} has no ONNX form here, at {{where}}", node.name)
        try:
            out = LOWERINGS[target](self, node, *args, **kwargs)
            if isinstance(out, Value) and self.types[out] != node.meta["val"].dtype:
                raise NotImplementedError(f"its ONNX form gives {self.types[out]}, not {node.meta['val'].dtype}")
            return out
        except NotImplementedError as error:
            raise NodeError(f"{target}: {error}, at {{where}}", node.name) from error
        except (TypeError, ValueError) as error:  # an argument that its lowering does not take, or not as a symbol
            raise NodeError(
                f"{target} has no ONNX form for these arguments ({error}), at {{where}}", node.name
            ) from error

    def _used(self) -> dict[str, Tensor]:
        used = {v for n in self.nodes for v in n.input}
        return {n: t for n, t in self.weights.items() if n in used}

    def check(self, model: onnx.ModelProto) -> None:
        """onnx's checker and full shape inference; NodeError where it is no valid model."""
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        large: dict[str, tuple[int, Sequence[int]]] = {}
        for name, tensor in self._used().items():
            if tensor.numel() * tensor.element_size() > SMALL:
                large[name] = (TYPES[tensor.dtype], tensor.shape)
            else:
                proto = whole.graph.initializer.add(name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape)
                proto.raw_data = tensor_bytes(tensor)
        check_structure(whole, large, self.origins)

    def write(self, model: onnx.ModelProto, path: Path) -> None:
        """Write model and weights."""
        write_model(model, self._used(), path)


def _any_value(value: Any) -> bool:
    return isinstance(value, Value) or (isinstance(value, (list, tuple)) and any(map(_any_value, value)))


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's values as ONNX keeps them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _info(name: str, node: Node) -> onnx.ValueInfoProto:
    sizes = [_dimension(n) for n in node.meta["shape"]]
    return helper.make_tensor_value_info(name, TYPES[node.meta["val"].dtype], sizes)


def _dimension(n: int | Size) -> int | str:
    if isinstance(n, int):
        return n
    return ("batch" if n.scale == 1 else f"{n.scale}*batch") + (f"{n.offset:+d}" if n.offset else "")
