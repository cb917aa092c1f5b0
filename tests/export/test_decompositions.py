"""Every decomposition of ours against the operator itself, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterlens.export.decompositions import OWN

aten = torch.ops.aten


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def conv_backward(
    x: tuple[int, ...], w: tuple[int, ...], stride: int, padding: int, dilation: int, groups: int,
    transposed: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    a, b = r(*x), r(*w)
    extra = [stride - 1, 0] if transposed else [0, 0]
    y = aten.convolution(a, b, None, [stride] * 2, [padding] * 2, [dilation] * 2, transposed, extra, groups)
    channels = w[1] * groups if transposed else w[0]
    return (
        torch.randn_like(y), a, b, [channels], [stride] * 2, [padding] * 2, [dilation] * 2, transposed, extra, groups,
        [True, True, True],
    )  # fmt: skip


def group_norm_backward(weight: bool) -> tuple[Any, ...]:
    x, w = r(2, 6, 5, 3), (r(6) if weight else None)
    _, mean, rstd = aten.native_group_norm(x, w, None, 2, 6, 15, 3, 1e-5)
    return torch.randn_like(x), x, mean, rstd, w, 2, 6, 15, 3, [True, weight, weight]


def layer_norm_backward() -> tuple[Any, ...]:
    x, w, b = r(2, 5, 7), r(7), r(7)
    _, mean, rstd = aten.native_layer_norm(x, [7], w, b, 1e-5)
    return torch.randn_like(x), x, [7], mean, rstd, w, b, [True, True, True]


def max_pool_backward(kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> tuple[Any, ...]:
    # Whole numbers: many ties, which must go to the first of the window.
    x = torch.randint(0, 4, (2, 3, 11, 9)).double()
    shape = ([kernel] * 2, [stride] * 2, [padding] * 2, [dilation] * 2, ceil)
    y, indices = aten.max_pool2d_with_indices(x, *shape)
    return torch.randn_like(y), x, *shape, indices


def avg_pool_backward(kernel: int, stride: int, padding: int, ceil: bool, include: bool, divisor: Any) -> Any:
    x = r(2, 3, 11, 9)
    shape = ([kernel] * 2, [stride] * 2, [padding] * 2, ceil, include, divisor)
    return torch.randn_like(aten.avg_pool2d(x, *shape)), x, *shape


CASES: list[tuple[Any, Any]] = [
    (aten.convolution_backward.default, lambda: conv_backward((2, 4, 9, 8), (6, 4, 3, 3), 1, 1, 1, 1)),
    (aten.convolution_backward.default, lambda: conv_backward((2, 4, 9, 8), (6, 2, 3, 3), 1, 2, 2, 2)),
    (aten.convolution_backward.default, lambda: conv_backward((2, 4, 9, 8), (6, 4, 3, 3), 2, 1, 1, 1)),
    (aten.convolution_backward.default, lambda: conv_backward((2, 4, 9, 8), (4, 1, 3, 3), 2, 0, 1, 4)),
    (aten.convolution_backward.default, lambda: conv_backward((2, 4, 9, 8), (6, 4, 1, 1), 1, 1, 1, 1)),
    (aten.convolution_backward.default, lambda: conv_backward((2, 4, 5, 4), (4, 3, 3, 3), 2, 1, 1, 1, transposed=True)),
    (aten.native_group_norm.default, lambda: (r(2, 6, 5, 3), r(6), r(6), 2, 6, 15, 3, 1e-5)),
    (aten.native_group_norm.default, lambda: (r(2, 6, 5), None, None, 2, 6, 5, 2, 1e-5)),
    (aten.native_group_norm_backward.default, lambda: group_norm_backward(True)),
    (aten.native_group_norm_backward.default, lambda: group_norm_backward(False)),
    (aten.native_layer_norm.default, lambda: (r(2, 5, 7), [7], r(7), r(7), 1e-5)),
    (aten.native_layer_norm.default, lambda: (r(2, 5, 7), [5, 7], None, None, 1e-5)),
    (aten.native_layer_norm_backward.default, layer_norm_backward),
    (aten.native_batch_norm.default, lambda: (r(2, 3, 4, 5), r(3), r(3), r(3), r(3).exp(), False, 0.1, 1e-5)),
    (aten.native_batch_norm.default, lambda: (r(2, 3, 4, 5), None, None, r(3), r(3).exp(), False, 0.1, 1e-5)),
    (aten.silu_backward.default, lambda: (r(3, 4), r(3, 4))),
    (aten._safe_softmax.default, lambda: (r(3, 4).masked_fill(torch.tensor([[True], [False], [False]]), -1e400), 1)),
    (aten.upsample_bilinear2d.default, lambda: (r(2, 3, 7, 5), [11, 4], False)),
    (aten.upsample_bilinear2d.default, lambda: (r(2, 3, 7, 5), [14, 10], True)),
    (aten.upsample_bilinear2d_backward.default, lambda: (r(2, 3, 11, 4), [11, 4], [2, 3, 7, 5], False)),
    (aten._upsample_bilinear2d_aa.default, lambda: (r(2, 3, 17, 15), [6, 4], False)),
    (aten._upsample_bilinear2d_aa_backward.default, lambda: (r(2, 3, 6, 4), [6, 4], [2, 3, 17, 15], False)),
    (aten.upsample_bicubic2d.default, lambda: (r(2, 3, 7, 5), [11, 4], False)),
    (aten.upsample_bicubic2d_backward.default, lambda: (r(2, 3, 11, 4), [11, 4], [2, 3, 7, 5], False)),
    (aten._upsample_bicubic2d_aa.default, lambda: (r(2, 3, 17, 15), [6, 4], False)),
    (aten._upsample_bicubic2d_aa_backward.default, lambda: (r(2, 3, 6, 4), [6, 4], [2, 3, 17, 15], False)),
    (aten.upsample_nearest2d.default, lambda: (r(2, 3, 4, 6), [7, 5])),
    (aten.upsample_nearest2d_backward.default, lambda: (r(2, 3, 8, 18), [8, 18], [2, 3, 4, 6])),
    (aten.upsample_nearest2d_backward.default, lambda: (r(2, 3, 7, 5), [7, 5], [2, 3, 4, 6])),
    (aten.avg_pool2d_backward.default, lambda: avg_pool_backward(2, 2, 0, False, True, None)),
    (aten.avg_pool2d_backward.default, lambda: avg_pool_backward(3, 2, 1, True, False, None)),
    (aten.avg_pool2d_backward.default, lambda: avg_pool_backward(3, 2, 1, False, True, 5)),
    (aten._adaptive_avg_pool2d.default, lambda: (r(2, 3, 11, 9), [4, 5])),
    (aten._adaptive_avg_pool2d.default, lambda: (r(2, 3, 11, 9), [1, 1])),
    (aten._adaptive_avg_pool2d_backward.default, lambda: (r(2, 3, 4, 5), r(2, 3, 11, 9))),
    (aten._adaptive_avg_pool2d_backward.default, lambda: (r(2, 3, 1, 1), r(2, 3, 11, 9))),
    (aten.max_pool2d_with_indices_backward.default, lambda: max_pool_backward(3, 2, 1, 1, False)),
    (aten.max_pool2d_with_indices_backward.default, lambda: max_pool_backward(2, 2, 0, 1, True)),
    (aten.max_pool2d_with_indices_backward.default, lambda: max_pool_backward(2, 1, 1, 2, False)),
    (aten.select_backward.default, lambda: (r(2, 4), [2, 3, 4], 1, -1)),
    (aten.slice_backward.default, lambda: (r(2, 2, 4), [2, 7, 4], 1, 1, 5, 2)),
    (aten.slice_backward.default, lambda: (r(2, 3, 4), [2, 7, 4], 1, -4, 6, 1)),
    (aten.slice_scatter.default, lambda: (r(2, 7, 4), r(2, 3, 4), 1, 2, 5)),
    (aten.scatter_add.default, lambda: (r(2, 5), 1, torch.tensor([[1, 1], [4, 0]]), r(2, 2))),
    (aten.embedding_dense_backward.default, lambda: (r(2, 3, 4), torch.tensor([[1, 1, 0], [4, 2, 2]]), 5, 2, False)),
    (aten.as_strided.default, lambda: (r(3, 5, 7), [3, 1, 35], [35, 99, 1])),
    (aten.as_strided.default, lambda: (r(3, 5, 7).permute(2, 0, 1), [7, 5, 3], [1, 7, 35])),
    (aten.as_strided_scatter.default, lambda: (r(3, 5, 7), r(3, 35), [3, 35], [35, 1])),
    (aten.as_strided_scatter.default, lambda: (r(3, 5, 7).permute(2, 0, 1), r(5, 1, 21), [5, 1, 21], [1, 99, 5], 0)),
    (aten.roll.default, lambda: (r(3, 5, 7), [2, -3], [1, 2])),
    (aten.roll.default, lambda: (r(3, 5), [4])),
]


@pytest.mark.parametrize(
    ("operator", "make"), CASES, ids=[f"{c[0]}-{i}".removeprefix("aten.") for i, c in enumerate(CASES)]
)
def test_equals_the_operator(operator: Any, make: Any) -> None:
    torch.manual_seed(0)
    arguments = make()
    expected, got = operator(*arguments), OWN[operator](*arguments)
    pairs = zip(expected, got, strict=True) if isinstance(expected, tuple) else [(expected, got)]
    for a, b in pairs:
        if a is None or b is None:
            assert a is None or a.numel() == 0 or b is None
            continue
        torch.testing.assert_close(b.reshape(a.shape), a, rtol=1e-10, atol=1e-10)


def test_every_decomposition_has_a_case() -> None:
    memory = {aten.empty_permuted.default, aten.new_empty_strided.default, aten.empty_strided.default}
    own = {operator for operator in OWN if operator.namespace == "aten"}
    assert own - memory == {operator for operator, _ in CASES}


def test_statistics_of_half_precision_are_taken_in_float32() -> None:
    x = (torch.randn(1, 4, 64, 64) * 100 + 3000).half()
    out, mean, _ = OWN[aten.native_group_norm.default](x, None, None, 1, 4, 4096, 1, 1e-5)
    expected = torch.nn.functional.group_norm(x.double(), 1)
    assert out.dtype == torch.float16
    assert mean.dtype == torch.float32
    assert (out.double() - expected).abs().max() < 2e-2
