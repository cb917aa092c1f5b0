"""One run of a function at fixed sizes as a graph of core ATen operations, and what to say where that fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    _wrap_functional_tensor,
    current_level,
    is_functorch_wrapped_tensor,
    unwrap_if_dead,
)
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, make_fx
from torch.fx.traceback import preserve_node_meta
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from counterlens.export import decompositions
from counterlens.export.errors import ExportError

INTERNAL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")
MEMORY = ("numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__")
READS = (*MEMORY, "tolist", "item")
VIEWS = ("T", "mT", "H", "mH", "data", "real", "imag")


class _Mutated(RuntimeError):
    """An input or a constant is changed in place."""


@contextmanager
def without_onednn() -> Iterator[None]:
    """Without oneDNN's recurrent layers, which nobody else knows and whose pullback fails under `no_grad`."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def rehearse(fn: Callable[..., Any], examples: Sequence[Tensor]) -> None:
    """Run the function for real, so that what it keeps for later are tensors with values."""
    try:
        with torch.no_grad(), without_onednn():
            fn(*(x.clone() for x in examples))
    except Exception as error:  # the user's code may raise anything
        raise ExportError(f"the function fails on inputs {shapes_of(examples)}: {explain(error)}") from error


def capture(fn: Callable[..., Any], examples: Sequence[Tensor], record: bool = False) -> GraphModule:
    """Trace at the shapes of the examples; `record` notes where each node was made, which takes twice the time.

    Raises:
        ExportError: it cannot be traced; the message holds the line of the user's code.
    """

    def call(*inputs: Tensor) -> Any:  # whatever fn is, make_fx counts these arguments
        with _Functional(inputs, every_call=record) as mode:
            out = fn(*inputs)
        mode.check()
        return out

    tracer = make_fx(
        torch.func.functionalize(call, remove="mutations"),
        decomposition_table=decompositions.table(),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
        record_stack_traces=record,
    )
    # By default make_fx keeps lines in functions called "forward" only.
    keep = patch.object(PythonKeyTracer, "_filter_traceback_frames", lambda self, frames: frames)
    try:
        # Fused attention has no backward that other runtimes know; plain matrix products do.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), without_onednn(), keep if record else nullcontext():
            graph = tracer(*examples)
            if any(_changes_in_place(node) for node in graph.graph.nodes):
                # Some operators of PyTorch (circular padding, RMSNorm) change tensors of their own in place where
                # `functionalize` cannot see it. Written out as simple operators it can.
                fn = Interpreter(graph).run
                with preserve_node_meta(record):
                    graph = tracer(*examples)
    except _Mutated as error:
        if not record:
            capture(fn, examples, record=True)  # raises at the line
        raise ExportError(f"{error}, at {line_of(error) or 'a line that is not known'}; work on a copy") from error
    except ExportError:
        raise
    except Exception as error:  # the user's code and PyTorch's tracing may raise anything
        raise ExportError(f"cannot trace: {explain(error)}") from error
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(graph, node.target), FakeTensor):
            raise ExportError("cannot trace: a tensor is copied past the trace (copy.deepcopy, pickle); use clone")
    graph.graph.eliminate_dead_code()  # what nobody reads may depend on the batch as it likes
    return graph


def _changes_in_place(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _Functional(TorchFunctionMode):
    """Stands in for weights and constants where they meet an operation, so that changes in place are written as values.

    `functionalize` does that for its arguments only; a position bias computed from weights may be changed in place too.
    """

    def __init__(self, inputs: Sequence[Tensor], every_call: bool) -> None:
        super().__init__()
        self.level = current_level()
        self.inputs = [(torch._from_functional_tensor(x), x) for x in inputs]
        self.constants: dict[int, tuple[Tensor, Tensor]] = {}
        self.every_call = every_call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What is asked of a tensor (its shape, its numbers) is asked of itself.
        asked = func.__name__ in READS or (func.__name__ == "__get__" and func.__self__.__name__ not in VIEWS)
        # PyTorch would read memory where there is none.
        if func.__name__ in MEMORY and torch._is_functional_tensor(args[0]):
            raise RuntimeError(f"the function looks at a tensor's value ({func.__name__}); use operations of PyTorch")
        if not asked:
            args, kwargs = tree_map_only(Tensor, self._wrap, (args, kwargs))
        out = decompositions.CALLS.get(func, func)(*args, **kwargs)
        if self.every_call:
            self.check()
        return out

    def _wrap(self, tensor: Tensor) -> Tensor:
        constant = unwrap_if_dead(tensor)  # a cache that was filled inside `torch.func.grad` holds such
        if (
            is_functorch_wrapped_tensor(constant)
            or torch._is_functional_tensor(constant)
            or type(constant) not in (Tensor, nn.Parameter, nn.Buffer)
        ):
            return tensor
        if id(constant) not in self.constants:
            self.constants[id(constant)] = (constant, _wrap_functional_tensor(constant, self.level))
        return self.constants[id(constant)][1]

    def check(self) -> None:
        """Raises _Mutated once an input or a constant has another value than it came with."""
        for what, pairs in (("an input", self.inputs), ("a parameter or buffer", self.constants.values())):
            for original, wrapped in pairs:
                torch._sync(wrapped)  # type: ignore[attr-defined]
                if torch._from_functional_tensor(wrapped) is not original:
                    raise _Mutated(f"{what} is changed in place")


def explain(error: Exception) -> str:
    """The error's first line, where in the user's code it came up, and what to do about it."""
    where = line_of(error)
    text = str(error).strip().split("\n")[0][:300] or "no message"
    kind = type(error).__name__
    if (
        "DataDependent" in kind
        or "data-dependent" in text
        or "value out of a tracing tensor" in text
        or "unallocated storage" in text
    ):
        text = f"the function looks at a tensor's value ({text}); a graph has no such branches: use torch.where"
    elif not isinstance(error, RuntimeError):
        text = f"{kind}: {text}"
    return text + (f", at {where}" if where else "")


def line_of(error: BaseException) -> str:
    """The innermost line of the user's code that an error passed through: "file:line", or nothing."""
    where, step = "", error.__traceback__
    while step is not None:
        if not internal(file := step.tb_frame.f_code.co_filename):
            where = f"{file}:{step.tb_lineno}"
        step = step.tb_next
    return where


def internal(file: str) -> bool:
    """Whether a file is PyTorch's or this package's."""
    return file.startswith(INTERNAL)


def source_of(node: Node) -> str:
    """The line of the user's code that made a recorded node: "file:line: text", or its name."""
    lines = (node.meta.get("stack_trace") or "").strip().split("\n")
    best = ""
    for i, line in enumerate(lines):
        if line.strip().startswith("File "):
            file = line.split('"')[1]
            text = lines[i + 1].strip() if i + 1 < len(lines) else ""
            at = f"{file}:{line.split('line ')[1].split(',')[0]}: {text}"
            if not internal(file) and not line.rstrip().endswith("__torch_function__"):  # a mode
                best = at
    return best or f"node {node.name}"


def shapes_of(examples: Sequence[Tensor]) -> str:
    """Their shapes, for a message."""
    return ", ".join(str(list(x.shape)) for x in examples)
