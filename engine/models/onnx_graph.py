"""An ONNX graph as a torch module, one part for each node, so that it can be differentiated, tapped and compiled.

Why our own: the converters that exist import torchvision, warn where a result may differ, and end at opset 17
(onnx2torch, no release since 2024) or copy their graph in every pass (onnx2pytorch). Operators: `onnx_operators`.
Only what the scores need is built; what follows from constants is computed once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CounterlensError
from .onnx_file import OnnxFile
from .onnx_numbers import NUMPY, of_numbers
from .onnx_operators import CAN, KNOWN, Attributes, NoGradient, TooLarge, Unfit

OWN = ("", "ai.onnx")
CONTROL = {"If", "Loop", "Scan", "SequenceMap"}
QUANTISED = {
    "QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
}  # fmt: skip
FLAT = {
    "ArgMax", "ArgMin", "BitShift", "Ceil", "Floor", "Hardmax", "NonMaxSuppression", "NonZero", "OneHot", "Round",
    "Sign", "TopK",
}  # fmt: skip
UNREAD = {0, 4, 5, 9, 10, 11, 12, 13, 14}  # types of attributes: none, empty tensors, graphs, sparse, types
PASSING = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze"}  # may stand behind a softmax without changing a value
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError)  # of operators that a file misuses
ENDINGS = {"Softmax": "softmax", "LogSoftmax": "log-softmax", "Sigmoid": "sigmoid"}


class Operation(nn.Module):
    """One node: its constants, and the function that computes it from the others."""

    def __init__(self, kind: str, attributes: Attributes, constants: Mapping[int, Any], reads: list[int]) -> None:
        super().__init__()
        self.kind, self.attributes, self.reads = kind, attributes, reads
        self.many = max([*constants, *reads], default=-1) + 1
        self.known: dict[int, np.ndarray] = {}
        self.weights: dict[int, str] = {}
        for place, value in constants.items():
            if isinstance(value, Tensor):
                self.weights[place] = f"input_{place}"
                if value.is_floating_point():
                    self.register_parameter(f"input_{place}", nn.Parameter(value, requires_grad=False))
                else:
                    self.register_buffer(f"input_{place}", value)
            else:
                self.known[place] = value

    def forward(self, *values: Any) -> Any:
        inputs: list[Any] = [None] * self.many
        for place, value in zip(self.reads, values, strict=True):
            inputs[place] = value
        for place, value in self.known.items():
            inputs[place] = value
        for place, name in self.weights.items():
            inputs[place] = getattr(self, name)
        return compute(self.kind, self.attributes, inputs)

    def extra_repr(self) -> str:
        return self.kind


def compute(kind: str, attributes: Attributes, inputs: list[Any]) -> Any:
    """One operator: in numpy where every input is a number that is known, else in torch."""
    like = next((v for v in inputs if isinstance(v, Tensor)), None)
    if like is None and kind in NUMPY:
        return of_numbers(kind, attributes, inputs)
    known = KNOWN[kind]
    given = [v if i in known or v is None or isinstance(v, Tensor) else _beside(v, like) for i, v in enumerate(inputs)]
    return CAN[kind](attributes, *given)


def _beside(value: Any, like: Tensor | None) -> Tensor:
    """Numbers as a tensor on the device, and in the precision, of another."""
    tensor = torch.as_tensor(np.array(value), device=None if like is None else like.device)
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(like.dtype if like is not None and like.is_floating_point() else torch.float32)


class OnnxGraph(nn.Module):
    """From the file's input to its scores; without the softmax or sigmoid that they end in, see `ending`.

    Attributes:
        ending: softmax, log-softmax or sigmoid, that the file's own scores went through; empty where nothing did.
        kinds: the operators that follow from pixels, and how often each.
        halved: weights were of half precision; here they are float32.

    Raises:
        NoGradient: it cannot be built; every reason is named.
    """

    def __init__(self, file: OnnxFile) -> None:
        super().__init__()
        builder = _Builder(file)
        self.input, self.output = file.picture.name, builder.output
        self.ending, self.halved = builder.ending, builder.halved
        self.nodes = nn.ModuleDict()
        self.steps: list[tuple[str, list[str], list[str], list[str]]] = []
        self.kinds: dict[str, int] = {}
        for name, operation, reads, writes in builder.build():
            self.nodes[name] = operation
            self.steps.append((name, reads, writes, []))
            self.kinds[operation.kind] = self.kinds.get(operation.kind, 0) + 1
        last = {read: i for i, (_, reads, _, _) in enumerate(self.steps) for read in reads}
        for name, i in last.items():
            if name != self.output:
                self.steps[i][3].append(name)  # not needed any more

    def forward(
        self,
        x: Tensor,  # as the file takes it
    ) -> Tensor:
        values: dict[str, Any] = {self.input: x}
        for name, reads, writes, done in self.steps:
            made = self.nodes[name](*(values[r] for r in reads))
            if len(writes) == 1 and not isinstance(made, tuple | list):
                values[writes[0]] = made
            else:
                values.update(zip(writes, made, strict=False))
            for old in done:
                values.pop(old, None)
        return values[self.output]

    def rehearse(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], int]:
        """Shape of the scores of an input, and bytes of all that is computed on the way; nothing is allocated.

        Raises:
            Unfit: an operator is used in a way that is not computed here; says which.
        """
        empty = {k: t.to("meta") for k, t in [*self.named_parameters(), *self.named_buffers()]}
        taken = 0

        def add(_: nn.Module, __: Any, made: Any) -> None:
            nonlocal taken
            taken += sum(t.numel() * t.element_size() for t in _tensors(made))

        with _hooked(self.nodes, add):
            try:
                out = torch.func.functional_call(self, empty, (torch.empty(shape, dtype=dtype, device="meta"),))
            except FAILURES as error:
                raise Unfit(" ".join(str(error).split())[:160]) from error
        if not isinstance(out, Tensor):
            raise Unfit("the scores do not follow from pixels")
        return tuple(out.shape), taken


def _tensors(made: Any) -> list[Tensor]:
    return [t for t in (made if isinstance(made, tuple | list) else (made,)) if isinstance(t, Tensor)]


@contextmanager
def _hooked(nodes: nn.ModuleDict, see: Any) -> Iterator[None]:
    def raised(operation: nn.Module) -> Any:
        run = operation.forward

        def forward(*values: Any) -> Any:
            try:
                return run(*values)
            except FAILURES as error:
                raise Unfit(f"{operation.kind}: {' '.join(str(error).split())[:160]}") from error

        return forward

    handles = [node.register_forward_hook(see) for node in nodes.values()]
    for node in nodes.values():
        setattr(node, "forward", raised(node))  # noqa: B010 (mypy takes no method for a variable)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for node in nodes.values():
            delattr(node, "forward")


def makers(graph: Any) -> dict[str, Any]:
    """The node that makes each value."""
    return {name: node for node in graph.node for name in node.output if name}


def find_ending(made: Mapping[str, Any], output: str) -> tuple[str, Any]:
    """What an output went through last, softmax, log-softmax or sigmoid, and its node; empty and None where nothing."""
    name = output
    while (node := made.get(name)) is not None and node.domain in OWN and node.op_type in PASSING and node.input:
        name = node.input[0]
    if node is None or node.domain not in OWN or node.op_type not in ENDINGS or not node.input:
        return "", None
    return ENDINGS[node.op_type], node


class _Builder:
    """Reads a file's graph: constants, the nodes that the scores need, and what they end in."""

    def __init__(self, file: OnnxFile) -> None:
        import onnx

        model = file.model
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        self.file, self.output, self.ending, self.halved = file, file.output, "", False
        self.opset = next((o.version for o in model.opset_import if o.domain in OWN), 1)
        self.wide = file.picture.dtype == "float64"
        if not 7 <= self.opset <= 25:
            raise NoGradient(file.path, [f"it is of opset {self.opset}; 7 to 25 are known"])
        if model.graph.sparse_initializer:
            raise NoGradient(file.path, ["its weights are sparse"])
        self.made = makers(model.graph)
        self.constants: dict[str, Any] = {}
        self.protos = {tensor.name: tensor for tensor in model.graph.initializer}
        self.renamed: dict[str, str] = {}
        self.folded = 0  # bytes of constants that were computed
        self._find_ending()
        self.nodes = [node for node in model.graph.node if id(node) in self._needed()]

    def _find_ending(self) -> None:
        """Leave out the last softmax or sigmoid: its input is the logits."""
        self.ending, node = find_ending(self.made, self.file.output)
        if node is not None and self.ending != "log-softmax":  # what it gives are logits as well
            self.renamed[node.output[0]] = node.input[0]
            self.output = self.renamed.get(self.output, self.output)

    def _needed(self) -> set[int]:
        if not hasattr(self, "_kept"):
            self._kept: set[int] = set()
            pending = [self.output]
            while pending:
                node = self.made.get(pending.pop())
                if node is not None and id(node) not in self._kept:
                    self._kept.add(id(node))
                    pending += [self.renamed.get(name, name) for name in node.input]
        return self._kept

    def build(self) -> Iterator[tuple[str, Operation, list[str], list[str]]]:
        """Name, operation, inputs and outputs of every node that follows from pixels, in order."""
        steps: list[tuple[str, Operation, list[str], list[str]]] = []
        numbers: set[str] = set()  # values that follow from shapes alone
        reasons: dict[str, set[str]] = {}
        names: set[str] = set()
        for node in self.nodes:
            inputs = [self.renamed.get(name, name) for name in node.input]
            fixed = {i: self._constant(name) for i, name in enumerate(inputs) if name and self._is_constant(name)}
            reads = [i for i, name in enumerate(inputs) if name and i not in fixed]
            outputs = list(node.output)
            while outputs and not outputs[-1]:
                outputs.pop()
            attributes = self._attributes(node, len(outputs))
            if not reads and self._fold(node, attributes, inputs, fixed, outputs):
                continue
            shaped = node.op_type in ("Shape", "Size") or (
                node.op_type in NUMPY and all(inputs[i] in numbers for i in reads)
            )
            if (said := self._reason(node, shaped)) is not None:
                reasons.setdefault(said, set()).add(node.op_type)
                continue
            if shaped:
                numbers.update(outputs)
            known = range(len(inputs)) if shaped else KNOWN[node.op_type]
            constants = {i: v if i in known else _weight(v) for i, v in fixed.items()}
            name = base = re.sub(r"\W+", "_", node.name).strip("_") or f"{node.op_type}_{len(steps)}"
            while name in names or hasattr(nn.ModuleDict, name):
                name = f"{base}_{len(names)}"
            names.add(name)
            operation = Operation(node.op_type, attributes, constants, reads)
            steps.append((name, operation, [inputs[i] for i in reads], list(node.output)))
        if reasons:
            raise NoGradient(self.file.path, [f"{why} ({', '.join(sorted(ops))})" for why, ops in reasons.items()])
        if not steps:
            raise NoGradient(self.file.path, ["its scores do not follow from its input"])
        return iter(steps)

    def _reason(self, node: Any, shaped: bool) -> str | None:
        """Why a node that follows from pixels cannot be differentiated; None where it can."""
        kind = node.op_type
        if node.domain not in OWN:
            return f"operators of another domain, {node.domain}"
        if kind in CONTROL:
            return "control flow"
        if kind in QUANTISED:
            return "it is quantised, and rounding has no gradient"
        if kind in NUMPY and shaped:
            return None
        if kind in FLAT:
            return "steps, whose gradient is zero everywhere"
        return None if kind in CAN else "operators that are not differentiated here"

    def _is_constant(self, name: str) -> bool:
        return name in self.constants or name in self.protos

    def _constant(self, name: str) -> np.ndarray:
        if name not in self.constants:
            self.constants[name] = self._cast(self.file.tensor(self.protos[name]))
        return self.constants[name]

    def _cast(self, value: np.ndarray) -> np.ndarray:
        """Half precision as float32, and all of one precision: gradients of log p fall below what float16 holds."""
        if value.dtype.kind in "OSU":
            raise NoGradient(self.file.path, ["it computes with texts"])
        if value.dtype.name in ("int4", "uint4"):  # which torch has not
            return value.astype(np.int8)
        if value.dtype.kind == "f" or value.dtype.name == "bfloat16":
            self.halved |= value.dtype.itemsize == 2
            return value.astype(np.float64 if self.wide else np.float32, copy=False)
        return value

    def _attributes(self, node: Any, outputs: int) -> Attributes:
        import onnx

        given: dict[str, Any] = {}
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type != onnx.TensorProto.UNDEFINED:
                given[attribute.name] = self._cast(self.file.tensor(attribute.t))
            elif attribute.type not in UNREAD:
                try:
                    value = onnx.helper.get_attribute_value(attribute)
                except ValueError as error:
                    raise CounterlensError(
                        f"classifier: {self.file.path}: not a valid ONNX file: {attribute.name} of {node.op_type}"
                    ) from error
                given[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else value
        return Attributes(given, self.opset, outputs)

    def _fold(self, node: Any, a: Attributes, inputs: list[str], fixed: dict[int, Any], outputs: list[str]) -> bool:
        """Compute a node of constants once; False where it cannot be."""
        kind = node.op_type
        if node.domain not in OWN:
            return False
        if kind == "Constant":
            value = next((v for k, v in a.items() if k.startswith("value")), None)
            if value is None:
                raise CounterlensError(f"classifier: {self.file.path}: not a valid ONNX file: a constant has no value")
            self.constants[outputs[0]] = self._cast(np.asarray(value))
            return True
        if kind not in CAN and kind not in NUMPY:
            return False
        values = [fixed.get(i) for i in range(len(inputs))]
        try:
            made: Any = None
            self._check_folded(0)
            if kind in NUMPY:
                with suppress(*([TooLarge] if kind in CAN else [])):
                    made = of_numbers(kind, a, values)
            if made is None:
                if kind not in CAN:
                    return False
                made = self._compute(kind, a, values)
        except TooLarge as error:
            raise CounterlensError(f"classifier: {self.file.path}: refused: {kind} of its weights: {error}") from error
        except FAILURES as error:
            raise NoGradient(self.file.path, [f"{kind} of its weights: {error}"]) from error
        several = made if isinstance(made, tuple | list) else (made,)
        for name, value in zip(outputs, several, strict=False):
            self.constants[name] = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
            self.folded += self.constants[name].nbytes
        return True

    def _check_folded(self, more: int) -> None:
        """Bound what is made of a file's weights in all: each node may double what the one before it made."""
        weights = 4 * sum(math.prod(proto.dims) for proto in self.protos.values())
        if self.folded + more > max(16 * weights, 1 << 28):
            raise TooLarge(f"{weights} bytes would become {self.folded + more}")

    def _compute(self, kind: str, a: Attributes, values: list[Any]) -> Any:
        """A node of constants in torch, once it is known that its result is no larger than a file's weights may be."""
        known = KNOWN[kind]
        real = [v if v is None or i in known else _weight(v) for i, v in enumerate(values)]
        rehearsed = [v.to("meta") if isinstance(v, Tensor) else v for v in real]
        size = sum(t.numel() * t.element_size() for t in _tensors(CAN[kind](a, *rehearsed)))
        held = sum(v.nbytes for v in values if v is not None)
        if size > max(64 * held, 1 << 24):
            raise TooLarge(f"{held} bytes would become {size}")
        self._check_folded(size)
        return CAN[kind](a, *real)


def _weight(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value))  # a copy: arrays of a file cannot be written to
