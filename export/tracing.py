"""From a function that may differentiate inside to one graph of core ATen operations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from counterlens.export.capture import capture, rehearse, source_of
from counterlens.export.check import call, compare, free_memory, peak_bytes, sample, tolerance_of
from counterlens.export.errors import ExportError, NodeError
from counterlens.export.simplify import Shape, Size, simplify
from counterlens.export.state import State, forget_fakes, preserved

aten = torch.ops.aten
BATCHES = (4, 7)  # traced at both; coprime, so that halves of the batch are told from multiples
LATER = 23  # traced once more: squares of the batch, and limits on it up to here, show themselves
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)


def trace(
    fn: Callable[..., Any],
    example_inputs: Sequence[Tensor],
    *,
    dynamic_batch: bool = True,
) -> GraphModule:
    """Trace `fn` into a flat graph of core ATen operations: no autograd, no backward operator, no mutation.

    With `dynamic_batch` the batch is the first size of the first input; every input with the same first size shares it.
    The function is traced at two batch sizes and the two graphs are unified: numbers in which they differ are functions
    of the batch, which a third size has to confirm. Every tensor of the graph has its shape in `node.meta["shape"]`,
    batch-dependent sizes as `Size`. The function runs for real before each trace, so that no tensor without values
    stays in a cache that it fills; afterwards everything that it reaches (attributes, buffers, containers, globals,
    random generators) is what it was before.

    Args:
        fn: a module or function of tensors; it may call `torch.func.vjp`, `grad`, `jacrev` or `vmap` inside.
        example_inputs: tensors of the right shapes and dtypes with values that `fn` can take.
        dynamic_batch: otherwise the shapes of the examples are the only ones.

    Returns:
        A GraphModule that can be called like `fn`; parameters and constants are its attributes.

    Raises:
        ExportError: `fn` fails on the examples, control flow depends on values, an input, parameter or buffer is
            changed in place, a dtype is not supported, or the graph's structure depends on the batch; the message holds
            the source line.
    """
    examples = list(example_inputs)
    for i, x in enumerate(examples):
        if not isinstance(x, Tensor):
            raise ExportError(f"example_inputs[{i}]: expected a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise ExportError(f"example_inputs[{i}]: {x.dtype} is not supported; use one of {_names(DTYPES)}")
    with preserved(fn, devices_of(examples)) as state:
        try:
            graph, doubt = _trace(fn, examples, dynamic_batch, state)
            _check(graph)
            simplify(graph)
        except NodeError as error:
            raise located(error, fn, examples, dynamic_batch) from None
        if doubt is not None:
            forget_fakes()  # of the last trace, for which nothing was rehearsed
        if doubt is not None and not _same_result(graph, fn, examples):
            raise located(doubt, fn, examples, dynamic_batch)
    return graph


def _trace(
    fn: Callable[..., Any], examples: list[Tensor], dynamic_batch: bool, state: State
) -> tuple[GraphModule, NodeError | None]:
    """The graph, and where it is another at a later batch."""
    if not dynamic_batch:
        graph = _at_sizes(fn, examples, state)
        for node in graph.graph.nodes:
            node.meta["shape"] = _shape(node)
        return graph, None
    batched = batched_inputs(examples)
    graph, other = (_at_sizes(fn, at_batch(examples, batched, b), state) for b in BATCHES)
    symbols = _unify(graph, other, batched)
    later = capture(fn, at_batch(examples, batched, LATER))  # with what the function has kept from its last run
    state.restore()
    return graph, _difference(graph, symbols, later, LATER)


def _same_result(graph: GraphModule, fn: Callable[..., Any], examples: list[Tensor]) -> bool:
    """Whether a graph that is another at a later batch comes to the same there: by another way, that is."""
    found = [n for node in graph.graph.nodes for n in node.meta["shape"] or () if isinstance(n, Size)]
    if any(n.offset and n.scale != 1 for n in found):
        return False  # a line through two points
    if peak_bytes(graph, LATER) > free_memory(examples[0].device):
        return True  # too large to be run; the batches that fit are compared later
    inputs = sample(examples, batched_inputs(examples), LATER, seed=0)
    try:
        got = call(graph, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):  # sizes that do not fit
        return False
    return not compare(got, fn, inputs, tolerance_of(graph)).fault


def _at_sizes(fn: Callable[..., Any], examples: list[Tensor], state: State) -> GraphModule:
    state.restore()
    rehearse(fn, examples)
    graph = capture(fn, examples)
    changed = state.changed()
    for node in graph.graph.nodes:
        # A buffer that the function filled while it ran is emptied again afterwards.
        if node.op == "get_attr" and id(constant := getattr(graph, node.target)) in changed:
            delattr(graph, node.target)
            graph.register_buffer(node.target, constant.detach().clone())
    return graph


def located(
    error: NodeError, fn: Callable[..., Any], examples: Sequence[Tensor], dynamic_batch: bool = True
) -> ExportError:
    """The error with the line of code that made its node, found by tracing once more with every call recorded."""
    inputs = at_batch(examples, batched_inputs(examples), BATCHES[0]) if dynamic_batch else list(examples)
    with preserved(fn, devices_of(examples)):
        rehearse(fn, inputs)
        graph = capture(fn, inputs, record=True)
    node = next((n for n in graph.graph.nodes if n.name == error.node), None)
    return ExportError(error.message.replace("{where}", source_of(node) if node else f"node {error.node}"))


def batch_dependence(fn: Callable[..., Any], examples: Sequence[Tensor], batch: int) -> ExportError | None:
    """Where the function does something else at this batch than at those that were traced, if it does."""
    batched = batched_inputs(examples)
    with preserved(fn, devices_of(examples)) as state:
        graph, other = (_at_sizes(fn, at_batch(examples, batched, b), state) for b in BATCHES)
        try:
            symbols = _unify(graph, other, batched)
            error = _difference(graph, symbols, _at_sizes(fn, at_batch(examples, batched, batch), state), batch)
        except NodeError as found:
            error = found
    return None if error is None else located(error, fn, examples)


def traced_alone(fn: Callable[..., Any], examples: Sequence[Tensor]) -> GraphModule:
    """The function at these sizes only, in core ATen operations."""
    with preserved(fn, devices_of(examples)) as state:
        return _at_sizes(fn, list(examples), state)


def devices_of(examples: Sequence[Tensor]) -> list[int]:
    """The CUDA devices of the inputs."""
    return sorted({x.device.index or 0 for x in examples if x.is_cuda})


def batched_inputs(examples: Sequence[Tensor]) -> list[int]:
    """Indices of the inputs that share the batch: those with the first input's first size. ExportError without one."""
    if not examples or examples[0].ndim == 0:
        raise ExportError("dynamic_batch: the first input has no batch dimension; pass dynamic_batch=False")
    batch = examples[0].shape[0]
    return [i for i, x in enumerate(examples) if x.ndim and x.shape[0] == batch]


def at_batch(examples: Sequence[Tensor], batched: list[int], batch: int) -> list[Tensor]:
    """The examples with their rows repeated up to this batch."""
    return [
        x[torch.arange(batch, device=x.device) % max(1, x.shape[0])] if i in batched else x
        for i, x in enumerate(examples)
    ]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _shape(node: Node) -> Shape | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    if any(not isinstance(n, int) for n in value.shape):
        raise NodeError("a size depends on a tensor's value, at {where}; use torch.where or a fixed size", node.name)
    return tuple(value.shape)


def _unify(graph: GraphModule, other: GraphModule, batched: list[int]) -> dict[Node, Size]:
    """Make `graph` hold at any batch: numbers that differ from `other`'s become multiples of the batch (returned)."""
    nodes, twins = list(graph.graph.nodes), list(other.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    with graph.graph.inserting_after(inputs[-1]):
        batch = graph.graph.call_function(aten.sym_size.int, (inputs[batched[0]], 0))
    batch.meta.update(val=BATCHES[0], shape=None, symbol=True)
    after = [batch]
    symbols: dict[Size, Node] = {Size(1, 0): batch}

    def symbol(size: Size) -> Node:
        if size not in symbols:
            node, value = batch, BATCHES[0]
            for function, number in ((operator.mul, size.scale), (operator.add, size.offset)):
                if number == (1 if function is operator.mul else 0):
                    continue
                with graph.graph.inserting_after(after[-1]):
                    node = graph.graph.call_function(function, (node, number))
                value = function(value, number)
                node.meta.update(val=value, shape=None, symbol=True)
                after.append(node)
            symbols[size] = node
        return symbols[size]

    def size(a: int, b: int, node: Node) -> int | Size:
        if a == b:
            return a
        scale, rest = divmod(b - a, BATCHES[1] - BATCHES[0])
        offset = a - scale * BATCHES[0]
        if rest:
            raise _no_multiple({BATCHES[0]: a, BATCHES[1]: b}, node)
        return Size(scale, offset)

    same: dict[Node, Node] = {}

    def unify(a: Any, b: Any, node: Node) -> Any:
        if isinstance(a, Node):
            if same.get(a) is not b:
                raise _differs(node)
            return a
        if type(a) is not type(b):
            raise _differs(node)
        if isinstance(a, (list, tuple)):
            if len(a) != len(b):
                raise _differs(node)
            return type(a)(unify(x, y, node) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return {k: unify(v, b[k], node) for k, v in a.items()}
        if isinstance(a, int) and not isinstance(a, bool):
            n = size(a, b, node)
            return symbol(n) if isinstance(n, Size) else n
        if a != b and not (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
            raise _no_multiple({BATCHES[0]: a, BATCHES[1]: b}, node) if isinstance(a, float) else _differs(node)
        return a

    if len(nodes) != len(twins):
        raise _differs(next((a for a, b in zip(nodes, twins, strict=False) if a.target != b.target), nodes[-1]))
    for node, twin in zip(nodes, twins, strict=True):
        if node.op != twin.op or (node.op == "call_function" and node.target != twin.target):
            raise _differs(node)
        if node.op == "get_attr":
            a, b = getattr(graph, node.target), getattr(other, twin.target)
            if _row_for_all(a, b):
                same[_repeat_row(graph, node, a[:1], symbol(Size(1, 0)))] = twin
                continue
            if not _same_constant(a, b):
                raise NodeError(
                    f"dynamic_batch: the function keeps a tensor that is {list(a.shape)} at batch {BATCHES[0]} and "
                    f"{list(b.shape)} at {BATCHES[1]}"
                    + (", with other values (a random one?)" if a.shape == b.shape else "")
                    + ", at {where}; pass dynamic_batch=False or keep it for one sample",
                    node.name,
                )
        if node.op in ("call_function", "output"):
            node.args, node.kwargs = (
                unify(node.args, twin.args, node),
                unify(dict(node.kwargs), dict(twin.kwargs), node),
            )
        same[node] = twin
        shapes = _shape(node), _shape(twin)
        both = None not in shapes
        node.meta["shape"] = tuple(size(a, b, node) for a, b in zip(*shapes, strict=True)) if both else None  # type: ignore[arg-type]
    return {node: size for size, node in symbols.items()}


def _difference(graph: GraphModule, symbols: dict[Node, Size], other: GraphModule, batch: int) -> NodeError | None:
    """The first place where a graph that `_unify` made is not what was traced at this batch."""
    # Copies come and go with the layout that PyTorch takes at a batch.
    own = [n for n in graph.graph.nodes if "symbol" not in n.meta and n.target is not aten.clone.default]
    twins = [n for n in other.graph.nodes if n.target is not aten.clone.default]
    same: dict[Node, Node] = {}

    def equal(a: Any, b: Any, node: Node) -> bool:
        a = symbols.get(a, a) if isinstance(a, Node) else a
        if isinstance(a, Size):
            if isinstance(b, int) and b != a.at(batch):
                raise _no_multiple({**{n: a.at(n) for n in BATCHES}, batch: b}, node)
            return isinstance(b, int)
        if isinstance(a, Node):
            return isinstance(b, Node) and same.get(_copied(a)) is _copied(b)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(equal(*v, node) for v in zip(a, b, strict=True))
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k], node) for k in a)
        return type(a) is type(b) and (a == b or (a != a and b != b))

    try:
        for node, twin in zip(own, twins, strict=False):
            agree = node.op == twin.op and equal(node.meta["shape"], _shape(twin), node)
            if agree and node.op == "get_attr":
                agree = _same_constant(getattr(graph, node.target), getattr(other, twin.target))
            elif agree and node.op in ("call_function", "output"):
                agree = node.target == twin.target and equal(node.args, twin.args, node)
                agree = agree and equal(dict(node.kwargs), dict(twin.kwargs), node)
            if not agree:
                return _differs(node, BATCHES[0], batch)
            same[node] = twin
    except NodeError as error:
        return error
    return None if len(own) == len(twins) else _differs(own[-1], BATCHES[0], batch)


def _copied(node: Node) -> Node:
    while node.target is aten.clone.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _no_multiple(numbers: dict[int, float], node: Node) -> NodeError:
    found = " and ".join(f"{n:g} at batch {batch}" for batch, n in numbers.items())
    return NodeError(
        f"dynamic_batch: a number is {found}, no multiple of the batch, at {{where}}; pass dynamic_batch=False or "
        "write it per sample",
        node.name,
    )


def _differs(node: Node, first: int = BATCHES[0], second: int = BATCHES[1]) -> NodeError:
    return NodeError(
        f"dynamic_batch: the graph is another at batch {first} than at {second}, first at {{where}}; pass "
        "dynamic_batch=False or write it per sample",
        node.name,
    )


def _row_for_all(a: Tensor, b: Tensor) -> bool:
    """Whether two constants have the batch in front and the same in each row, as a cache by shape holds them."""
    if a.ndim == 0 or b.ndim == 0 or (a.shape[0], b.shape[0]) != BATCHES or a.shape[1:] != b.shape[1:]:
        return False
    return torch.equal(a, a[:1].expand_as(a)) and torch.equal(b, a[:1].expand_as(b))


def _repeat_row(graph: GraphModule, node: Node, row: Tensor, batch: Node) -> Node:
    """Make a constant one row, repeated for every sample; the node to use instead."""
    value, shape = node.meta["val"], tuple(row.shape[1:])
    node.target = f"{node.target}_row"
    graph.register_buffer(node.target, row.detach().clone())
    with graph.graph.inserting_after(node):
        wide = graph.graph.call_function(aten.expand.default, (node, [batch, *shape]))
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    node.meta.update(val=value[:1], shape=(1, *shape))
    wide.meta.update(val=value, shape=(Size(1, 0), *shape))
    return wide


def _same_constant(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _check(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                raise NodeError("an input is changed in place, at {where}; work on a copy", node.name)
            if node.target is aten._local_scalar_dense.default:
                raise NodeError("the function looks at a tensor's value, at {where}; use operations on it", node.name)
            if node.target.namespace != "aten":
                raise NodeError(f"{node.target} is no operation that other runtimes know, at {{where}}", node.name)
        if isinstance(value := node.meta.get("val"), Tensor) and value.dtype not in (*DTYPES, torch.uint8, torch.int8):
            raise NodeError(f"{value.dtype} is not supported, at {{where}}", node.name)
