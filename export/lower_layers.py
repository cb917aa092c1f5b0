"""Products, convolutions, normalisation and pooling as ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from counterlens.export.builder import Builder, Value, fixed, lowers, meta
from counterlens.export.decompose_resampling import windows

aten = torch.ops.aten


# Products, convolutions, pooling


@lowers(aten.mm.default, aten.bmm.default)
def matmul(g: Builder, node: Node, a: Value, b: Value) -> Value:
    return g.op("MatMul", a, b)


@lowers(aten.addmm.default)
def addmm(g: Builder, node: Node, bias: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    return g.op("Gemm", a, b, bias, alpha=float(alpha), beta=float(beta))


@lowers(aten.baddbmm.default)
def baddbmm(g: Builder, node: Node, bias: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    dtype = meta(node).dtype
    product = g.op("MatMul", a, b)
    if alpha != 1:
        product = g.op("Mul", product, g.constant(alpha, dtype))
    if beta == 0:
        return product
    return g.op("Add", product, bias if beta == 1 else g.op("Mul", bias, g.constant(beta, dtype)))


@lowers(aten.native_group_norm.default)
def native_group_norm(
    g: Builder, node: Node, x: Value, weight: None, bias: None, n: Any, c: int, inner: int, groups: int, eps: float
) -> tuple[Value, Value | None, Value | None]:
    """Rows [N, G, D] that are normalised each on its own, which is all that our decompositions leave of it."""
    if isinstance(groups, Value):
        raise NotImplementedError("a number of groups that depends on the batch")
    dtype, (size,) = meta(node.args[0]).dtype, fixed(node.args[0], 2)
    used = {user.args[1] for user in node.users}
    if dtype == torch.float64:  # ONNX Runtime normalises in float32 only
        average = g.op("ReduceMean", x, g.constant([2]), keepdims=0)
        centred = g.op("Sub", x, g.op("Unsqueeze", average, g.constant([2])))
        square = g.op("ReduceMean", g.op("Mul", centred, centred), g.constant([2]), keepdims=0)
        rstd = g.op("Reciprocal", g.op("Sqrt", g.op("Add", square, g.constant(eps, dtype))))
        return g.op("Mul", centred, g.op("Unsqueeze", rstd, g.constant([2]))), average, rstd
    mean = g.op("ReduceMean", x, g.constant([2]), keepdims=0) if 1 in used else None
    ones, zeros = g.constant(torch.ones(groups)), g.constant(torch.zeros(groups))
    normed = g.op("InstanceNormalization", x, ones, zeros, epsilon=eps)
    if 2 not in used:
        return normed, mean, None
    # With r = rstd, the mean of x * normed is s = 1/r - eps r; solved for r without cancellation.
    rows, columns = (g.op("Unsqueeze", v, g.constant([2])) for v in (x, normed))
    dots = g.op("MatMul", rows, g.op("Transpose", columns, perm=[0, 1, 3, 2]))
    s = g.op("Div", g.op("Squeeze", dots, g.constant([2, 3])), g.constant(float(size), dtype))
    root = g.op("Sqrt", g.op("Add", g.op("Mul", s, s), g.constant(4 * eps, dtype)))
    return normed, mean, g.op("Div", g.constant(2.0, dtype), g.op("Add", s, root))


@lowers(aten.convolution.default)
def convolution(
    g: Builder, node: Node, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    dims = meta(node.args[1]).ndim - 2
    stride, padding, dilation = (list(v) * dims if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    inputs = [x, weight] if bias is None else [x, weight, bias]
    attributes = {
        "strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups,
        "kernel_shape": fixed(node.args[1], *range(2, dims + 2)),
    }  # fmt: skip
    if not transposed:
        return g.op("Conv", *inputs, **attributes)
    return g.op("ConvTranspose", *inputs, **attributes, output_padding=list(output_padding))


def _several(values: Sequence[int], dims: int) -> list[int]:
    return list(values) * dims if len(values) == 1 else list(values)


@lowers(aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    g: Builder, node: Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    """What our decompositions leave of it: no ceil_mode and no divisor, about which ONNX and PyTorch differ."""
    dims = 2 if node.target is aten.avg_pool2d.default else 3
    return g.op(
        "AveragePool", x, kernel_shape=_several(kernel, dims), strides=_several(stride or kernel, dims),
        pads=_several(padding, dims) * 2, count_include_pad=int(count_include_pad),
    )  # fmt: skip


@lowers(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool(
    g: Builder, node: Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), ceil_mode: bool = False,
) -> tuple[Value, Value | None]:  # fmt: skip
    """With padding for exactly PyTorch's windows instead of ONNX's ceil_mode, which may have one more."""
    dims = 2 if node.target is aten.max_pool2d_with_indices.default else 3
    shape = fixed(node.args[0], *range(-dims, 0))
    k, s, p, d = (_several(v, dims) for v in (kernel, stride or kernel, padding, dilation))
    ends = [
        max(0, (windows(n, size, step, pad, spread, ceil_mode) - 1) * step + spread * (size - 1) + 1 - n - pad)
        for n, size, step, pad, spread in zip(shape, k, s, p, d, strict=True)
    ]
    if any(end >= size for end, size in zip(ends, k, strict=True)):
        raise NotImplementedError("windows that reach so far behind the image")
    flat = meta(node.args[0]).ndim == dims + 1
    x = g.op("Unsqueeze", x, g.constant([0])) if flat else x

    def flattened(value: Value) -> Value:
        return g.op("Squeeze", value, g.constant([0])) if flat else value

    used = any(user.args[1] == 1 and user.users for user in node.users)
    out: Any = g.op(
        "MaxPool", x, kernel_shape=k, strides=s, pads=[*p, *ends], dilations=d, outputs=1 + used,
    )  # fmt: skip
    if not used:
        return flattened(out), None
    # ONNX counts through all planes, PyTorch through one.
    return flattened(out[0]), flattened(g.op("Mod", out[1], g.constant(math.prod(shape))))


@lowers(aten.upsample_nearest2d.default)
def upsample_nearest2d(
    g: Builder, node: Node, x: Value, size: Sequence[int], scale_h: float | None = None, scale_w: float | None = None
) -> Value:
    scales = [1.0, 1.0, *(out / n for out, n in zip(fixed(node, 2, 3), fixed(node.args[0], 2, 3), strict=True))]
    modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.op("Resize", x, Value(""), g.constant(scales, torch.float32), **modes)
