"""Several traced functions as one ONNX graph with loops: a whole run in one file.

A program is a sequence of steps over named values: `Call` computes some from others, `Loop` repeats its body a fixed
number of times over carried values, `If` takes one of two ways. `run` executes it in eager PyTorch, which is the oracle
of what `write_program` writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from counterlens.export.errors import ExportError, NodeError
from counterlens.export.onnx import TYPES, OnnxBuilder, appearing, tensor_bytes, write_model
from counterlens.export.store import tensors_digest
from counterlens.export.tracing import located, trace
from counterlens.export.versions import OPSET

Storage = Literal["lossless", "float16", "float32"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
Share = Literal["local", "outer"]
SHARES: tuple[Share, ...] = get_args(Share)
SMALL = 64  # elements of a constant that every graph keeps for itself
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """`outputs` = `function(*inputs)`, all of them names of tensors; the first input has the batch in front."""

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """`body`, `count` times.

    It reads what is known outside, and `index`, the number of the round as int64 [1]. `carried` names keep what the
    body gives them; of `scans` every round's value is kept, stacked behind the batch: [B, count, ...].
    """

    count: int
    index: str
    carried: tuple[str, ...]
    body: tuple[Step, ...]
    scans: tuple[str, ...] = ()


@dataclass(frozen=True)
class If:
    """`then` where the value `condition` (bool, one element) holds, else `otherwise`; both give `outputs`."""

    condition: str
    then: tuple[Step, ...]
    otherwise: tuple[Step, ...]
    outputs: tuple[str, ...]


Step = Call | Loop | If


def run(steps: Sequence[Step], values: Mapping[str, Tensor]) -> Values:
    """All values after the program, in eager PyTorch.

    Raises:
        KeyError: a step reads a name that nothing gave.
    """
    known = dict(values)
    for step in steps:
        if isinstance(step, Call):
            known |= zip(step.outputs, _results(step, known), strict=True)
        elif isinstance(step, If):
            way = step.then if bool(known[step.condition]) else step.otherwise
            after = run(way, known)
            known |= {name: after[name] for name in step.outputs}
        else:
            rounds: dict[str, list[Tensor]] = {name: [] for name in step.scans}
            for i in range(step.count):
                after = run(step.body, known | {step.index: torch.tensor([i])})
                known |= {name: after[name] for name in step.carried}
                for name, kept in rounds.items():
                    kept.append(after[name])
            known |= {name: torch.stack(kept, dim=1) for name, kept in rounds.items()}
    return known


def _results(call: Call, known: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    result = call.function(*(known[name] for name in call.inputs))
    return result if isinstance(result, tuple) else (result,)


def write_program(
    steps: Sequence[Step],
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: str | os.PathLike[str],
    *,
    storage: Storage = "lossless",
    share: Share = "local",
    dynamic_batch: bool = True,
    metadata: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write a program to one ONNX file; weights that several parts hold are stored once.

    Args:
        steps: the program; its functions take no gradient of parameters and run under `no_grad`.
        inputs: example tensors by name, with one batch in front of all of them; where the batch is open, of a size that
            no other dimension in the program has.
        outputs: names of the values that the file gives.
        path: of the file; beside it `<name>.data` above 2 GB of weights. Whole or not at all.
        storage: of float32 weights: `lossless` keeps those as float16 that come back unchanged, `float16` all of them
            (smaller and no longer the same model), `float32` none.
        share: `local` brings weights into each loop by an operator that ONNX Runtime folds at loading, so that it lays
            them out for the processor (one copy in memory for each part that uses them); `outer` reads them outside.
        dynamic_batch: leave the batch open; else that of the examples is the only one.
        metadata: strings to keep in the file.
        say: told which part is being traced.

    Raises:
        ExportError: a function cannot be traced, or holds an operation that has no ONNX form, with its line; or the
            file cannot be written.
    """
    for option, value, allowed in (("storage", storage, STORAGES), ("share", share, SHARES)):
        if value not in allowed:
            raise ExportError(f"{option}: expected one of {', '.join(allowed)}, got {value!r}")
    target = Path(path)
    sizes = {x.shape[0] for x in inputs.values()}
    if len(sizes) != 1:
        raise ExportError(f"inputs: expected one batch in front of all, got {sorted(sizes)}")
    writer = _Writer(storage, share, sizes.pop() if dynamic_batch else None, say)
    graph = _Graph("", {name: name for name in inputs})
    with torch.no_grad():
        known = writer.steps(steps, graph, dict(inputs))
    for name in outputs:
        graph.nodes.append(helper.make_node("Identity", [graph.names[name]], [f"{name}"], name=f"output_{name}"))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "counterlens",
            [writer.info(name, x) for name, x in inputs.items()],
            [writer.info(name, known[name]) for name in outputs],
            initializer=graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
        producer_name="counterlens",
    )
    helper.set_model_props(model, dict(metadata or {}))
    try:
        with appearing(target) as unfinished:
            write_model(model, {w.name: w.tensor.to(w.stored) for w in writer.shared.values()}, unfinished)
    except OSError as error:
        raise ExportError(f"{target.name}: cannot be written ({error.strerror or error}); nothing was kept") from error
    return target


def check_file(path: str | os.PathLike[str]) -> None:
    """Hold a file to the ONNX standard, with the shapes of every value inferred.

    Raises:
        ExportError: it is no valid model.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: no valid ONNX model ({str(error).splitlines()[0]})") from error


@dataclass
class _Graph:
    """The main graph, or the body of a loop, while it is being made."""

    prefix: str
    names: dict[str, str]  # of the program's values, in the graph
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)  # of shared weights, as this graph has brought them in


@dataclass(frozen=True)
class _Weight:
    name: str
    tensor: Tensor
    stored: torch.dtype


class _Writer:
    def __init__(self, storage: Storage, share: Share, batch: int | None, say: Callable[[str], None]) -> None:
        self.storage, self.share, self.say = storage, share, say
        self.batch = batch  # of the examples where it is open
        self.shared: dict[str, _Weight] = {}  # by hash
        self.count = 0

    def info(self, name: str, x: Tensor) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TYPES[x.dtype], ["batch" if n == self.batch else n for n in x.shape])

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def steps(self, steps: Sequence[Step], graph: _Graph, known: Values) -> Values:
        """Append the steps to a graph and return the example values after them."""
        for step in steps:
            if isinstance(step, Call):
                known = known | self._call(step, graph, known)
            elif isinstance(step, Loop):
                known = known | self._loop(step, graph, known)
            else:
                known = known | self._if(step, graph, known)
        return known

    def _call(self, call: Call, graph: _Graph, known: Values) -> Values:
        label = getattr(call.function, "__name__", "function")
        self.say(f"tracing {label.replace('_', ' ')}")
        examples = [known[name] for name in call.inputs]
        traced = trace(call.function, examples, dynamic_batch=self.batch is not None)
        prefix = self.fresh("c") + "/"
        # An operator's input may be one name twice, a function's inputs may not: names of its own, then the graph's.
        own = {f"{prefix}in/{i}": graph.names[name] for i, name in enumerate(call.inputs)}
        given = [f"{prefix}{name}" for name in call.outputs]
        builder = OnnxBuilder()
        try:
            model = builder.build(traced, list(own), given, OPSET)
        except NodeError as error:
            raise located(error, call.function, examples) from None
        used = {name for node in model.graph.node for name in node.input}
        names = own | {name: name for name in given} | {"": ""}
        for name, tensor in builder.weights.items():
            if name in used:
                names[name] = self._constant(f"{prefix}{name}", tensor, graph)
        for node in model.graph.node:
            for list_of in (node.input, node.output):
                list_of[:] = [names.get(name, prefix + name) for name in list_of]
            node.name = prefix + node.name
            graph.nodes.append(node)
        graph.names |= dict(zip(call.outputs, given, strict=True))
        return dict(zip(call.outputs, _results(call, known), strict=True))

    def _loop(self, loop: Loop, graph: _Graph, known: Values) -> Values:
        prefix = self.fresh("loop") + "/"
        body = _Graph(prefix, dict(graph.names))
        index = torch.zeros(1, dtype=torch.int64)
        inside = known | {loop.index: index}
        body.constants.append(_proto(f"{prefix}one", torch.tensor([1])))
        body.nodes.append(helper.make_node("Reshape", [f"{prefix}round", f"{prefix}one"], [f"{prefix}index"]))
        body.nodes.append(helper.make_node("Identity", [f"{prefix}on"], [f"{prefix}still_on"]))
        body.names |= {loop.index: f"{prefix}index"} | {name: f"{prefix}{name}" for name in loop.carried}
        after = self.steps(loop.body, body, inside)
        results = [*loop.carried, *loop.scans]
        for name in loop.carried:
            if after[name].shape != known[name].shape or after[name].dtype != known[name].dtype:
                raise ExportError(f"loop: {name} leaves a round as {_described(after[name])}, it came as "
                                  f"{_described(known[name])}")  # fmt: skip
        given = [f"{prefix}out/{name}" for name in results]
        for name, out in zip(results, given, strict=True):
            body.nodes.append(helper.make_node("Identity", [body.names[name]], [out]))
        takes = [
            helper.make_tensor_value_info(f"{prefix}round", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"{prefix}on", TensorProto.BOOL, []),
            *(self.info(f"{prefix}{name}", known[name]) for name in loop.carried),
        ]
        gives = [
            helper.make_tensor_value_info(f"{prefix}still_on", TensorProto.BOOL, []),
            *(self.info(out, after[name]) for name, out in zip(results, given, strict=True)),
        ]
        inner = helper.make_graph(body.nodes, prefix.strip("/"), takes, gives, initializer=body.constants)
        graph.constants += [
            _proto(f"{prefix}count", torch.tensor(loop.count)), _proto(f"{prefix}begin", torch.tensor(True))
        ]  # fmt: skip
        outside = [f"{prefix}after/{name}" for name in results]
        start = [graph.names[name] for name in loop.carried]
        graph.nodes.append(
            helper.make_node("Loop", [f"{prefix}count", f"{prefix}begin", *start], outside, body=inner, name=prefix)
        )
        graph.names |= dict(zip(results, outside, strict=True))
        for name in loop.scans:  # ONNX stacks them in front of the batch
            order = [1, 0, *range(2, after[name].ndim + 1)]
            turned = f"{prefix}turned/{name}"
            graph.nodes.append(helper.make_node("Transpose", [graph.names[name]], [turned], perm=order))
            graph.names[name] = turned
        values = {name: after[name] for name in loop.carried}
        return values | {name: torch.stack([after[name]] * loop.count, dim=1) for name in loop.scans}

    def _if(self, step: If, graph: _Graph, known: Values) -> Values:
        prefix = self.fresh("if") + "/"
        ways, values = [], known
        for side, steps in (("else", step.otherwise), ("then", step.then)):
            way = _Graph(f"{prefix}{side}/", dict(graph.names))
            values = self.steps(steps, way, dict(known))
            gives = []
            for name in step.outputs:
                out = f"{prefix}{side}/out/{name}"
                way.nodes.append(helper.make_node("Identity", [way.names[name]], [out]))
                gives.append(self.info(out, values[name]))
            ways.append(helper.make_graph(way.nodes, f"{prefix}{side}", [], gives, initializer=way.constants))
        outside = [f"{prefix}{name}" for name in step.outputs]
        condition = f"{prefix}condition"
        graph.constants.append(_proto(f"{prefix}scalar", torch.zeros(0, dtype=torch.int64)))
        graph.nodes += [
            helper.make_node("Reshape", [graph.names[step.condition], f"{prefix}scalar"], [condition]),
            helper.make_node("If", [condition], outside, else_branch=ways[0], then_branch=ways[1], name=prefix),
        ]
        graph.names |= dict(zip(step.outputs, outside, strict=True))
        return {name: values[name] for name in step.outputs}

    def _constant(self, name: str, tensor: Tensor, graph: _Graph) -> str:
        """The name under which a graph has a constant: its own if small, else one that all graphs share."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() <= SMALL:
            graph.constants.append(_proto(name, tensor))
            return name
        digest = tensors_digest(tensor)
        if digest not in self.shared:
            self.shared[digest] = _Weight(f"w{len(self.shared)}", tensor, self._stored(tensor))
        weight = self.shared[digest]
        if digest not in graph.weights:
            graph.weights[digest] = self._bring_in(weight, name, graph)
        return graph.weights[digest]

    def _stored(self, tensor: Tensor) -> torch.dtype:
        if tensor.dtype != torch.float32 or self.storage == "float32":
            return tensor.dtype
        if self.storage == "float16" or torch.equal(tensor.half().float(), tensor):
            return torch.float16
        return torch.float32

    def _bring_in(self, weight: _Weight, name: str, graph: _Graph) -> str:
        """A weight inside a graph: by an operator on constants alone, which a runtime folds where it stands."""
        if weight.stored != weight.tensor.dtype:
            graph.nodes.append(helper.make_node("Cast", [weight.name], [name], to=TYPES[weight.tensor.dtype]))
            return name
        if self.share == "outer":
            return weight.name
        shape = torch.tensor(weight.tensor.shape, dtype=torch.int64)
        graph.constants.append(_proto(f"{name}/shape", shape))
        graph.nodes.append(helper.make_node("Reshape", [weight.name, f"{name}/shape"], [name]))
        return name


def _described(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


def _proto(name: str, tensor: Tensor) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape, raw_data=tensor_bytes(tensor))
