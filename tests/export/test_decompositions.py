"""Every decomposition of ours against the operator itself, in float64."""

from __future__ import annotations

import math
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


def labels(*shape: int, high: int = 5) -> torch.Tensor:
    return torch.randint(0, high, shape)


def pool_3d_backward(kind: str, *shape: Any) -> tuple[Any, ...]:
    x = r(2, 3, 7, 6, 5)
    if kind == "avg":
        return torch.randn_like(aten.avg_pool3d(x, *shape)), x, *shape
    y, indices = aten.max_pool3d_with_indices(x, *shape)
    return torch.randn_like(y), x, *shape, indices


def adaptive_max_backward(*size: int) -> tuple[Any, ...]:
    x = r(2, 3, 7, 6, 5)[..., : len(size) + 2] if len(size) == 3 else r(2, 3, 7, 5)
    pool = aten.adaptive_max_pool3d if len(size) == 3 else aten.adaptive_max_pool2d
    y, indices = pool(x, list(size))
    return torch.randn_like(y), x, indices


def cdist_backward(p: float) -> tuple[Any, ...]:
    a, b = r(2, 4, 3), r(2, 5, 3)
    b[:, 0] = a[:, 1]
    return r(2, 4, 5), a, b, p, aten._cdist_forward(a, b, p, None)


def both(kind: str, dims: int, size: list[int], *rest: Any) -> list[tuple[Any, Any]]:
    """A resizing operator and its backward, with the scales left out and given."""
    held, forward = [7, 5, 6][:dims], getattr(aten, kind).default
    backward, given = getattr(aten, f"{kind}_backward").default, [n * 1.01 / m for n, m in zip(size, held, strict=True)]
    return [
        (operator, lambda start=start, scales=scales: (*start(), *rest, *scales))
        # PyTorch's own backward operator of this one forgets the scales: it is not the adjoint of what it runs forward.
        for scales in ([], given)[: 1 if kind == "upsample_nearest3d" else 2]
        for operator, start in (
            (forward, lambda: (r(2, 3, *held), size)),
            (backward, lambda: (r(2, 3, *size), size, [2, 3, *held])),
        )
    ]


def padding(kind: str, pads: list[int]) -> list[tuple[Any, Any]]:
    dims = len(pads) // 2
    operator = f"{kind}_pad{dims}d"
    size = [n + pads[2 * i] + pads[2 * i + 1] for i, n in zip(range(dims - 1, -1, -1), [6, 5, 4][:dims], strict=True)]
    return [
        (getattr(aten, operator).default, lambda: (r(2, 3, *[6, 5, 4][:dims]), pads)),
        (getattr(aten, f"{operator}_backward").default, lambda: (r(2, 3, *size), r(2, 3, *[6, 5, 4][:dims]), pads)),
    ]


far = torch.tensor([-3e5, -30.0, -2.0, -1e-9, -0.0, 0.0, 1e-12, 0.5, 7.0, 2e12], dtype=torch.float64)
images = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
i = torch.tensor
FEW: list[tuple[Any, Any]] = [
    (aten.exp2.default, lambda: (r(9),)),
    (aten.log2.default, lambda: (r(9).exp(),)),
    (aten.log10.default, lambda: (r(9).exp(),)),
    (aten.asinh.default, lambda: (far,)),
    (aten.acosh.default, lambda: (far.abs() + 1,)),
    (aten.atanh.default, lambda: (far.tanh(),)),
    (aten.sinh.default, lambda: (far.clamp(-20, 20),)),
    (aten.atan2.default, lambda: (far[:, None], far)),
    (aten.hypot.default, lambda: (far[:, None], far)),
    (aten.copysign.Tensor, lambda: (far[:, None], far)),
    (aten.copysign.Scalar, lambda: (far, -0.0)),
    (aten.fmax.default, lambda: (far[:, None], torch.cat([far, far[:1] * math.nan]))),
    (aten.fmin.default, lambda: (far[:, None], torch.cat([far, far[:1] * math.nan]))),
    (aten.elu.default, lambda: (far, 0.7, 1.3, 0.4)),
    (aten.elu_backward.default, lambda: (r(10), 0.7, 1.3, 0.4, False, far)),
    (aten.elu_backward.default, lambda: (r(10), 0.7, 1.3, 0.4, True, r(10))),
    (aten.dist.default, lambda: (r(2, 3), r(2, 3), 3)),
    (aten.unfold.default, lambda: (r(2, 9, 4), 1, 3, 2)),
    (aten.hardshrink_backward.default, lambda: (r(9), r(9), 0.5)),
    (aten.softshrink_backward.default, lambda: (r(9), r(9), 0.5)),
    (aten.rrelu_with_noise_backward.default, lambda: (r(9), r(9), r(9), 0.1, 0.3, False, False)),
    (aten.__lshift__.Scalar, lambda: (labels(9), 3)),
    (aten.__rshift__.Scalar, lambda: (labels(9) - 40, 3)),
    (aten.bitwise_left_shift.Tensor_Scalar, lambda: (labels(9), 3)),
    (aten.bitwise_right_shift.Tensor_Scalar, lambda: (labels(9) - 40, 3)),
    (aten.pow.Tensor_Scalar, lambda: (labels(9) - 2, 41)),
    (aten.pow.Tensor_Scalar, lambda: (labels(9), 0)),
    (aten.mse_loss_backward.default, lambda: (i(2.0), r(3, 4), r(3, 4), 1)),
    (aten.mse_loss_backward.default, lambda: (r(3, 4), r(3, 4), r(3, 4), 0)),
    (aten.huber_loss_backward.default, lambda: (r(), r(3, 4), r(3, 4), 1, 0.7)),
    (aten.smooth_l1_loss_backward.default, lambda: (i(2.0), r(3, 4), r(3, 4), 2, 0.7)),
    (aten.soft_margin_loss_backward.default, lambda: (i(2.0), r(3, 4), r(3, 4).sign(), 1)),
    (aten.multi_margin_loss_backward.default, lambda: (r(3), r(3, 5), labels(3), 1, 1.0, None, 0)),
    *((aten.linalg_vector_norm.default, lambda p=p: (images, p, [1, -1])) for p in (0, 1, 2, 3.5, math.inf, -math.inf)),
    (aten.linalg_vector_norm.default, lambda: (images, 2)),
    (aten.var_mean.correction, lambda: (images, [0, 2])),
    (aten.var.correction, lambda: (images,)),
    (aten.std.correction, lambda: (images, [1])),
    (aten.max.default, lambda: (images,)),
    (aten.min.default, lambda: (images,)),
    (aten._cdist_forward.default, lambda: (r(2, 4, 3), r(2, 5, 3), 2.0, None)),
    *((aten._cdist_backward.default, lambda p=p: cdist_backward(p)) for p in (1.0, 2.0, 3.0, math.inf)),
    (aten._trilinear.default, lambda: (r(4, 3), r(6, 3, 5), r(4, 5), [1, 3], [0], [1, 2], [2, 3])),
    (aten.cumprod.default, lambda: (images, 1)),
    (aten.logcumsumexp.default, lambda: (images, 2)),
    (aten.cummax.default, lambda: (labels(3, 9).double(), 1)),
    (aten.cummin.default, lambda: (labels(3, 9).double(), 1)),
    (aten.kthvalue.default, lambda: (images, 2, 1)),
    (aten.median.dim, lambda: (images, 2, True)),
    (aten.median.default, lambda: (images,)),
    (aten.bucketize.Tensor, lambda: (labels(9, high=7), i([1, 3, 3, 5]))),
    (aten.searchsorted.Tensor, lambda: (r(2, 5).sort().values, r(2, 3))),
    *both("upsample_nearest1d", 1, [11]), *both("_upsample_nearest_exact1d", 1, [11]),
    *both("_upsample_nearest_exact2d", 2, [11, 4]), *both("_upsample_nearest_exact3d", 3, [11, 4, 6]),
    *both("upsample_nearest3d", 3, [11, 4, 6]), *both("upsample_linear1d", 1, [11], False),
    *both("upsample_linear1d", 1, [4], True), *both("upsample_trilinear3d", 3, [11, 4, 6], False),
    *padding("reflection", [2, 3]), *padding("reflection", [1, 0, 3, 2]), *padding("reflection", [1, 0, 2, 2, 3, 1]),
    *padding("replication", [2, 3]), *padding("replication", [1, 0, 3, 2]), *padding("replication", [1, 0, 2, 2, 3, 1]),
    *(
        (aten.avg_pool2d.default, lambda a=a: (r(2, 3, 12, 13), *a))
        for a in (
            ([3], [2], [1], True), ([3], [2], [1], True, False), ([3], [2], [1], True, True, 5), ([2], [3], [1], True),
            ([4, 3], [3, 2], [2, 0], False, True, 7),
        )
    ),
    (aten.avg_pool2d_backward.default, lambda: avg_pool_backward(3, 2, 1, True, True, 5)),
    (aten.avg_pool3d.default, lambda: (r(2, 3, 7, 6, 5), [3], [2], [1], True)),
    (aten.avg_pool3d_backward.default, lambda: pool_3d_backward("avg", [3], [2], [1], True, False, None)),
    (aten.avg_pool3d_backward.default, lambda: pool_3d_backward("avg", [3, 2, 1], [2], [0], False, True, 4)),
    (aten._adaptive_avg_pool3d.default, lambda: (r(2, 3, 7, 6, 5), [3, 2, 4])),
    (aten._adaptive_avg_pool3d_backward.default, lambda: (r(2, 3, 3, 2, 4), r(2, 3, 7, 6, 5))),
    (aten.adaptive_max_pool2d.default, lambda: (r(2, 3, 7, 5), [3, 4])),
    (aten.adaptive_max_pool3d.default, lambda: (r(2, 3, 7, 6, 5), [3, 2, 4])),
    (aten.adaptive_max_pool2d_backward.default, lambda: adaptive_max_backward(3, 4)),
    (aten.adaptive_max_pool3d_backward.default, lambda: adaptive_max_backward(3, 2, 4)),
    (aten.max_pool2d_with_indices_backward.default, lambda: max_pool_backward(2, 3, 1, 1, True)),
    (aten.max_pool3d_with_indices_backward.default, lambda: pool_3d_backward("max", [2], [2], [1], [1], True)),
    *(
        (aten.grid_sampler_2d_backward.default, lambda m=m: (r(2, 3, 4, 5), r(2, 3, 6, 7), r(2, 4, 5, 2), *m))
        for m in ((0, 0, False, [True] * 2), (1, 1, True, [True] * 2), (2, 2, False, [True] * 2))
    ),
    (aten.grid_sampler_2d.default, lambda: (r(2, 3, 6, 7), r(2, 4, 5, 2), 0, 1, False)),
    (aten.native_batch_norm.default, lambda: (r(2, 3, 4, 5), r(3), r(3), None, None, True, 0.1, 1e-5)),
    (aten.slice_scatter.default, lambda: (r(2, 7, 4), r(2, 3, 4), 1, 1, 7, 2)),
    (aten.select_scatter.default, lambda: (r(2, 7, 4), r(2, 4), 1, -2)),
    (aten.diagonal.default, lambda: (r(2, 5, 4), -1, 2, 1)),
    (aten.diagonal_scatter.default, lambda: (r(2, 5, 4), r(2, 3), 1, 1, 2)),
    (aten.diagonal_backward.default, lambda: (r(2, 3), [2, 5, 4], 1, 1, 2)),
    (aten.index.Tensor, lambda: (r(2, 3, 4, 5), [None, i([2, 0]), i([[1], [-1]])])),
    (aten.index.Tensor, lambda: (r(2, 3, 4, 5), [None, i([2, 0]), None, i([[1], [-1]])])),
    (aten._unsafe_index.Tensor, lambda: (r(2, 3, 4, 5), [None, None, i([2, 0])])),
    *(
        (aten.index_put.default, lambda a=a: (r(2, 3, 4, 5), *a))
        for a in (
            ([None, i([2, 0]), i([[1], [-1]])], r(2, 2, 2, 5), True),
            ([None, i([2, 0]), None, i([[1], [3]])], r(2, 1, 4)),
            ([None, None, i([1, -1, 1])], r(3, 5), True), ([torch.ones(2, 3).triu().bool()], r()),
        )
    ),
    (aten._unsafe_index_put.default, lambda: (r(2, 3, 4), [None, i([2, 0]), i([1, 1])], r(2))),
    (aten.as_strided.default, lambda: (r(3, 5, 7), [3, 2, 3], [35, 14, 2], 3)),
    (aten.as_strided_scatter.default, lambda: (r(3, 5, 7), r(3, 2, 3), [3, 2, 3], [35, 14, 2], 3)),
]  # fmt: skip
CASES += FEW


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
    memory = {
        aten.empty_permuted.default, aten.new_empty_strided.default, aten.empty_strided.default,
        aten.empty.memory_format,
    }  # fmt: skip
    one_form = {  # what another overload of them is tested for
        aten.__lshift__.Tensor, aten.__rshift__.Tensor, aten.bitwise_left_shift.Tensor, aten.bitwise_right_shift.Tensor,
        aten.rrelu_with_noise_functional.default, aten.erfc.default, aten.round.decimals,
    }  # fmt: skip
    own = {operator for operator in OWN if operator.namespace == "aten"}
    assert own - memory - one_form == {operator for operator, _ in CASES}


def test_statistics_of_half_precision_are_taken_in_float32() -> None:
    x = (torch.randn(1, 4, 64, 64) * 100 + 3000).half()
    out, mean, _ = OWN[aten.native_group_norm.default](x, None, None, 1, 4, 4096, 1, 1e-5)
    expected = torch.nn.functional.group_norm(x.double(), 1)
    assert out.dtype == torch.float16
    assert mean.dtype == torch.float32
    assert (out.double() - expected).abs().max() < 2e-2
