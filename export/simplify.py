"""Smaller graphs that compute the same: what does nothing is dropped, what is constant is computed."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten
FOLD_LIMIT = 1 << 10  # elements of a constant that is made from nothing (zeros, ranges)


@dataclass(frozen=True)
class Size:
    """A size of the form scale * batch + offset."""

    scale: int
    offset: int

    def at(self, batch: int) -> int:
        """The number that it is at this batch."""
        return self.scale * batch + self.offset


Shape = tuple[int | Size, ...]

IDENTITIES = (
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default,
)  # fmt: skip
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
FROM_NOTHING = (aten.full.default, aten.arange.start_step, aten.zeros.default, aten.ones.default)
SCALINGS = (
    aten.reshape.default, aten.permute.default, aten.mul.Scalar, aten.mul.Tensor, aten.div.Scalar, aten.div.Tensor,
    aten._to_copy.default,
)  # fmt: skip
RANDOM = (aten.rand.default, aten.randn.default, aten.bernoulli.p, aten.randperm.default)


def simplify(graph: GraphModule) -> None:
    """Drop what does nothing, compute what is constant, compute what is computed twice once."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and (source := _unchanged(node)) is not None:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # memory layout is the runtime's affair, and clones are gone
    graph.graph.eliminate_dead_code()
    _merge(graph)
    _unmask(graph)
    _share_matrices(graph)
    _fold(graph)
    _straighten(graph)
    _merge(graph)
    _reuse_normalised(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    used = {n.target for n in graph.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in (*graph.named_parameters(), *graph.named_buffers()) if n not in used]:
        delattr(graph, name)
    graph.recompile()


def _unchanged(node: Node) -> Node | None:
    """The node that `node` is equal to, if it does nothing."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    result = node.meta.get("val")
    same_type = isinstance(result, Tensor) and source.meta["val"].dtype == result.dtype
    same = same_type and source.meta["shape"] == node.meta["shape"]
    if node.target in IDENTITIES or (node.target in RESHAPES and same):
        return source
    if node.target is aten._to_copy.default and same and source.meta["val"].device == node.meta["val"].device:
        return source
    if node.target is aten.copy.default and isinstance(value := node.args[1], Node):
        known = value.meta.get("val")
        if (
            known is not None
            and result is not None
            and known.dtype == result.dtype
            and value.meta["shape"] == node.meta["shape"]
        ):
            return value
    return None


def _fold(graph: GraphModule) -> None:
    """Run every operation whose inputs are all constants, and keep its result as a constant."""
    values: dict[Node, Any] = {}
    count = 0
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            values[node] = getattr(graph, node.target)
            continue
        if node.op != "call_function" or node.target in RANDOM or any(n not in values for n in node.all_input_nodes):
            continue
        if node.target is aten.sym_size.int:
            continue
        known = node.meta.get("val")
        if node.target in FROM_NOTHING and isinstance(known, Tensor) and known.numel() > FOLD_LIMIT:
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        values[node] = value
        if not isinstance(value, Tensor) or all(n.op == "output" for n in node.users):
            continue
        name = f"_folded{count}"
        count += 1
        graph.register_buffer(name, value.detach())
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
        constant.meta.update(node.meta)
        values[constant] = value
        node.replace_all_uses_with(constant)
    graph.graph.eliminate_dead_code()


def _straighten(graph: GraphModule) -> None:
    """Write everything that only regroups elements as one reshape, from where the elements come."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _regroups(node):
            continue
        source: Node = node.args[0]
        shape = node.meta["shape"]
        if source.meta["shape"] == shape:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            continue
        if source.target is aten.reshape.default:
            source = source.args[0]  # type: ignore[assignment]
        if source.meta["shape"] == shape:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            continue
        if sum(isinstance(n, Size) for n in shape) < 2 and 0 not in shape:
            node.target = aten.reshape.default
            node.args = (source, [-1 if isinstance(n, Size) else n for n in shape])
            node.kwargs = {}
    graph.graph.eliminate_dead_code()


def _reuse_normalised(graph: GraphModule) -> None:
    """Take what a normalisation returned where its backward pass computes (x - mean) * rstd again."""
    for node in list(graph.graph.nodes):
        if node.target is not aten.mul.Tensor or not all(isinstance(a, Node) for a in node.args):
            continue
        centred, rstd = node.args
        if centred.target is not aten.sub.Tensor or not isinstance(centred.args[1], Node):
            continue
        rows, mean = centred.args
        norm, which = _output_of(mean)
        if which == 1 and _output_of(rstd) == (norm, 2) and norm.args[0] is rows:
            first = next((n for n in norm.users if n.args[1] == 0), None)
            if first is not None and first.meta["shape"] == node.meta["shape"]:
                node.replace_all_uses_with(first)
    graph.graph.eliminate_dead_code()


def _output_of(node: Any) -> tuple[Any, int]:
    """The normalisation that a node is an output of, regrouped or not, and which; (None, -1) for any other."""
    while isinstance(node, Node) and node.target is aten.reshape.default:
        node = node.args[0]
    if isinstance(node, Node) and node.target is operator.getitem:
        source, index = node.args
        if isinstance(source, Node) and source.target is aten.native_group_norm.default:
            return source, index  # type: ignore[return-value]
    return None, -1


def _unmask(graph: GraphModule) -> None:
    """Drop the zeros for rows of nothing but -inf from softmaxes over products, which nothing masked."""
    for node in graph.graph.nodes:
        if node.target is not aten.where.self:
            continue
        nothing, _, soft = node.args
        if not isinstance(soft, Node) or soft.target is not aten._softmax.default:
            continue
        largest = nothing.args[0] if nothing.target is aten.eq.Scalar and nothing.args[1] == -math.inf else None
        if largest is None or largest.target is not aten.amax.default or largest.args[0] is not soft.args[0]:
            continue
        source = soft.args[0]
        while source.target in SCALINGS and not any(isinstance(a, Node) for a in source.args[1:]):
            source = source.args[0]
        if source.target in (aten.bmm.default, aten.mm.default):
            node.replace_all_uses_with(soft)


def _share_matrices(graph: GraphModule) -> None:
    """Write products of a batch with one matrix, repeated for each sample, as one product."""

    def insert(target: Any, args: tuple[Any, ...], shape: Shape) -> Node:
        new = graph.graph.call_function(target, args)
        new.meta.update(val=target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"])), shape=shape)
        return new

    for node in list(graph.graph.nodes):
        if node.target is not aten.bmm.default or node.args[1].target is not aten.expand.default:
            continue
        rows, matrix = node.args[0], node.args[1].args[0]
        batch, count, outer = node.meta["shape"]
        inner = rows.meta["shape"][2]
        if matrix.meta["shape"] not in ((1, inner, outer), (inner, outer)) or isinstance(count, Size):
            continue
        if isinstance(batch, Size) and batch.offset:
            continue
        flat = Size(batch.scale * count, 0) if isinstance(batch, Size) else batch * count
        sizes = [-1 if isinstance(batch, Size) else batch, count, outer]
        with graph.graph.inserting_before(node):
            many = insert(aten.reshape.default, (rows, [-1, inner]), (flat, inner))
            one = insert(aten.reshape.default, (matrix, [inner, outer]), (inner, outer))
            product = insert(aten.mm.default, (many, one), (flat, outer))
            node.replace_all_uses_with(insert(aten.reshape.default, (product, sizes), node.meta["shape"]))
    graph.graph.eliminate_dead_code()


def _regroups(node: Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source.meta.get("shape") is None or node.meta.get("shape") is None:
        return False
    if node.target is aten.select.int:
        return bool(source.meta["shape"][node.args[1]] == 1)
    return node.target in (
        aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    )  # fmt: skip


def _merge(graph: GraphModule) -> None:
    """Give equal operations on equal inputs one node."""
    seen: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            key: Any = ("get_attr", id(getattr(graph, node.target)))
        elif node.op == "call_function" and node.target not in RANDOM:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        else:
            continue
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.graph.erase_node(node)
        else:
            seen[key] = node


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    # 1, 1.0 and True are equal but not the same argument.
    return value if isinstance(value, Node) else (type(value), str(value))
