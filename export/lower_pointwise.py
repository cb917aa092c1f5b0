"""Pointwise operations as ONNX operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from .builder import Builder, Value, lowers, meta, operands, scalar

aten = torch.ops.aten


def _elementwise(kind: str, *operators: Any) -> None:
    @lowers(*operators)
    def lower(g: Builder, node: Node, *values: Any, **_: Any) -> Value:
        return g.op(kind, *operands(g, node, meta(node).dtype, values))


for _kind, *_operators in (
    ("Mul", aten.mul.Tensor, aten.mul.Scalar),
    ("Neg", aten.neg.default),
    ("Abs", aten.abs.default),
    ("Sign", aten.sign.default, aten.sgn.default),
    ("Sqrt", aten.sqrt.default),
    ("Exp", aten.exp.default),
    ("Log", aten.log.default),
    ("Sin", aten.sin.default),
    ("Cos", aten.cos.default),
    ("Acos", aten.acos.default),
    ("Asin", aten.asin.default),
    ("Atan", aten.atan.default),
    ("Tanh", aten.tanh.default),
    ("Sinh", aten.sinh.default),
    ("Cosh", aten.cosh.default),
    ("Sigmoid", aten.sigmoid.default),
    ("Erf", aten.erf.default),
    ("Relu", aten.relu.default),
    ("Reciprocal", aten.reciprocal.default),
    ("Floor", aten.floor.default),
    ("Ceil", aten.ceil.default),
    ("Round", aten.round.default),
    ("Max", aten.maximum.default),
    ("Min", aten.minimum.default),
    ("Pow", aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar),
    ("And", aten.logical_and.default),
    ("Or", aten.logical_or.default),
    ("Xor", aten.logical_xor.default),
    ("Not", aten.logical_not.default),
):
    _elementwise(_kind, *_operators)


def _bitwise(kind: str, *operators: Any) -> None:
    @lowers(*operators)
    def lower(g: Builder, node: Node, *values: Any) -> Value:
        if meta(node).dtype != torch.bool:
            raise NotImplementedError("bitwise operations are exported for bool only")
        return g.op(kind, *operands(g, node, torch.bool, values))


_bitwise("And", aten.bitwise_and.Tensor, aten.bitwise_and.Scalar)
_bitwise("Or", aten.bitwise_or.Tensor, aten.bitwise_or.Scalar)
_bitwise("Xor", aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar)
_bitwise("Not", aten.bitwise_not.default)


def _scaled_sum(kind: str, *operators: Any) -> None:
    @lowers(*operators)
    def lower(g: Builder, node: Node, a: Any, b: Any, alpha: float = 1) -> Value:
        dtype = meta(node).dtype
        left, right = operands(g, node, dtype, (a, b))
        if alpha != 1:
            right = g.op("Mul", right, g.constant(alpha, dtype))
        return g.op(kind, left, right)


_scaled_sum("Add", aten.add.Tensor, aten.add.Scalar)
_scaled_sum("Sub", aten.sub.Tensor, aten.sub.Scalar)


@lowers(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default)
def div(g: Builder, node: Node, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    dtype = meta(node).dtype
    if node.target is aten.floor_divide.default:
        rounding_mode = "floor"
    if rounding_mode is None or dtype.is_floating_point:
        out = g.op("Div", *operands(g, node, dtype, (a, b)))
        return out if rounding_mode is None else g.op("Floor", out) if rounding_mode == "floor" else _truncate(g, out)
    wide = g.op("Div", *operands(g, node, torch.float64, (a, b)))
    whole = g.op("Floor", wide) if rounding_mode == "floor" else _truncate(g, wide)
    return g.cast(whole, torch.float64, dtype)


def _truncate(g: Builder, x: Value) -> Value:
    return g.op("Mul", g.op("Sign", x), g.op("Floor", g.op("Abs", x)))


@lowers(aten.remainder.Scalar, aten.remainder.Tensor)
def remainder(g: Builder, node: Node, a: Any, b: Any) -> Value:
    x, y = operands(g, node, meta(node).dtype, (a, b))
    if not meta(node).dtype.is_floating_point:
        return g.op("Mod", x, y)
    return g.op("Sub", x, g.op("Mul", y, g.op("Floor", g.op("Div", x, y))))


@lowers(aten.tan.default)
def tan(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Div", g.op("Sin", x), g.op("Cos", x))  # ONNX Runtime has no Tan for every type


@lowers(aten.rsqrt.default)
def rsqrt(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Reciprocal", g.op("Sqrt", x))


@lowers(aten.log1p.default)
def log1p(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Log", g.op("Add", x, g.constant(1, meta(node).dtype)))


@lowers(aten.expm1.default)
def expm1(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Sub", g.op("Exp", x), g.constant(1, meta(node).dtype))


@lowers(aten.gelu.default)
def gelu(g: Builder, node: Node, x: Value, approximate: str = "none") -> Value:
    dtype = meta(node).dtype
    half, one = g.constant(0.5, dtype), g.constant(1, dtype)
    if approximate == "none":
        inner = g.op("Erf", g.op("Mul", x, g.constant(math.sqrt(0.5), dtype)))
    else:
        cube = g.op("Mul", g.op("Mul", x, x), x)
        bent = g.op("Add", x, g.op("Mul", cube, g.constant(0.044715, dtype)))
        inner = g.op("Tanh", g.op("Mul", bent, g.constant(math.sqrt(2 / math.pi), dtype)))
    return g.op("Mul", g.op("Mul", x, half), g.op("Add", inner, one))


@lowers(aten.leaky_relu.default)
def leaky_relu(g: Builder, node: Node, x: Value, slope: float = 0.01) -> Value:
    return g.op("LeakyRelu", x, alpha=float(slope))


@lowers(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default)
def clamp(g: Builder, node: Node, x: Value, *limits: Any) -> Value:
    # Max and Min, not Clip: like PyTorch they let NaN through.
    dtype = meta(node).dtype
    low, high = (*limits, None, None)[:2]
    if node.target is aten.clamp_max.default:
        low, high = None, low
    if node.target is aten.hardtanh.default:
        low, high = -1 if low is None else low, 1 if high is None else high
    x = g.cast(x, meta(node.args[0]).dtype, dtype)
    for kind, limit, position in (("Max", low, 1), ("Min", high, 2)):
        argument = node.args[position] if position < len(node.args) else None
        if isinstance(argument, Node) and isinstance(argument.meta["val"], torch.Tensor):
            x = g.op(kind, x, g.cast(limit, meta(argument).dtype, dtype))
        elif limit is not None:
            x = g.op(kind, x, scalar(g, limit, dtype))
    return x


def _comparison(kind: str, name: str, negate: bool = False) -> None:
    packet = getattr(aten, name)

    @lowers(packet.Tensor, packet.Scalar)
    def lower(g: Builder, node: Node, a: Any, b: Any) -> Value:
        known: list[Any] = [n.meta["val"] if isinstance(n, Node) else n for n in node.args[:2]]
        dtype = torch.result_type(*known)
        if dtype == torch.bool and kind != "Equal":
            dtype = torch.int32
        out = g.op(kind, *operands(g, node, dtype, (a, b)))
        return g.op("Not", out) if negate else out


_comparison("Equal", "eq")
_comparison("Equal", "ne", negate=True)
_comparison("Less", "lt")
_comparison("LessOrEqual", "le")
_comparison("Greater", "gt")
_comparison("GreaterOrEqual", "ge")


@lowers(aten.isnan.default)
def isnan(g: Builder, node: Node, x: Value) -> Value:
    return g.op("IsNaN", x)


@lowers(aten.isinf.default)
def isinf(g: Builder, node: Node, x: Value) -> Value:
    return g.op("IsInf", x)


@lowers(aten.where.self)
def where(g: Builder, node: Node, condition: Value, a: Value, b: Value) -> Value:
    dtype = meta(node).dtype
    values = [g.cast(v, meta(n).dtype, dtype) for v, n in zip((a, b), node.args[1:], strict=True)]
    return g.op("Where", condition, *values)
