"""Tracing: one graph for every batch, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterlens.export.errors import ExportError
from counterlens.export.tracing import Size, trace

aten = torch.ops.aten


def gradient(x: Tensor, weight: Tensor) -> Tensor:
    """d/dx of a nonlinear sum: by hand, cos(xW) W^T."""
    _, pull = torch.func.vjp(lambda y: (y @ weight).sin(), x)
    return pull(torch.ones(x.shape[0], weight.shape[1]))[0]


def test_gradient_by_hand_at_any_batch() -> None:
    weight = torch.randn(3, 5)
    graph = trace(lambda x: gradient(x, weight), [torch.randn(2, 3)])
    for batch in (1, 2, 6):
        x = torch.randn(batch, 3)
        torch.testing.assert_close(graph(x), (x @ weight).cos() @ weight.T)


def test_no_backward_operator_is_left() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.MaxPool2d(2),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2), torch.nn.GELU(),
    ).requires_grad_(False)  # fmt: skip

    def fn(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: net(y).square().sum())(x)

    graph = trace(fn, [torch.randn(2, 3, 12, 12)])
    assert not [n.name for n in graph.graph.nodes if "backward" in str(n.target)]
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(graph(x), fn(x))


def test_jacobian_and_vmap() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda v: v.sin() * v.sum()))(x)  # [B, 3, 3]

    graph = trace(fn, [torch.randn(2, 3)])
    x = torch.randn(5, 3)
    torch.testing.assert_close(graph(x), fn(x))


def test_shapes_follow_the_batch() -> None:
    graph = trace(lambda x: torch.cat([x, x]).reshape(-1, 2), [torch.randn(2, 6)])
    output = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    assert output.meta["shape"] == (Size(6, 0), 2)


def test_constants_are_computed_once() -> None:
    weight = torch.randn(4, 4)
    graph = trace(lambda x: x @ (weight.exp() + 1) + x @ (weight.exp() + 1), [torch.randn(2, 4)])
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert targets.count(aten.mm.default) == 1
    assert aten.exp.default not in targets


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_one_matrix_for_all_samples_is_one_product(dynamic_batch: bool) -> None:
    weight = torch.randn(4, 5)
    graph = trace(lambda x: x.transpose(1, 2) @ weight, [torch.randn(2, 4, 3)], dynamic_batch=dynamic_batch)
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert targets.count(aten.mm.default) == 1
    assert aten.bmm.default not in targets
    x = torch.randn(5 if dynamic_batch else 2, 4, 3)
    torch.testing.assert_close(graph(x), x.transpose(1, 2) @ weight)


def test_attention_keeps_its_zeros_only_where_it_is_masked() -> None:
    """A row that sees nothing attends to nothing: zeros in PyTorch, where a plain softmax gives NaN."""
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    x = torch.randn(5, 1, 3, 4)
    for masked in (False, True):
        graph = trace(lambda x, m=mask if masked else None: attend(x, x, x, attn_mask=m), [torch.randn(2, 1, 3, 4)])
        assert any(n.target is aten.where.self for n in graph.graph.nodes) == masked
        expected = attend(x, x, x, attn_mask=mask if masked else None)
        torch.testing.assert_close(graph(x), expected)
    assert expected[:, 0, 1].abs().max() == 0


def test_static_batch() -> None:
    graph = trace(lambda x: x / x.shape[0], [torch.ones(4, 2)], dynamic_batch=False)
    torch.testing.assert_close(graph(torch.ones(4, 2)), torch.full((4, 2), 0.25))


def test_values_decide_a_branch() -> None:
    def fn(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"looks at a tensor's value.*torch\.where.*test_trace\.py"):
        trace(fn, [torch.randn(2, 3)])


def test_an_input_is_mutated() -> None:
    with pytest.raises(ExportError, match="changed in place"):
        trace(lambda x: x.add_(1), [torch.randn(2, 3)])


def test_the_graph_depends_on_the_batch() -> None:
    with pytest.raises(ExportError, match=r"another at batch 4 than at 7.*test_trace\.py"):
        trace(lambda x: sum(row for row in x), [torch.randn(2, 3)])  # type: ignore[arg-type, return-value]


def test_a_size_that_is_no_multiple_of_the_batch() -> None:
    with pytest.raises(ExportError, match=r"no multiple of the batch.*test_trace\.py"):
        trace(lambda x: (x[:, None] - x[None]).reshape(x.shape[0] ** 2, 3), [torch.randn(2, 3)])


def test_dtypes_and_inputs_are_checked() -> None:
    with pytest.raises(ExportError, match=r"example_inputs\[0\]: torch.complex64 is not supported"):
        trace(lambda x: x, [torch.randn(2, dtype=torch.complex64)])
    with pytest.raises(ExportError, match=r"example_inputs\[1\]: expected a tensor, got float"):
        trace(lambda x, y: x * y, [torch.randn(2), 1.0])  # type: ignore[list-item]
    with pytest.raises(ExportError, match="no batch dimension"):
        trace(lambda x: x, [torch.tensor(1.0)])
