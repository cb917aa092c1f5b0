"""Pointwise operations as ONNX operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from counterlens.export.builder import Builder, Value, lowers, meta, operands, scalar

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
    ("And", aten.logical_and.default),
    ("Or", aten.logical_or.default),
    ("Xor", aten.logical_xor.default),
    ("Not", aten.logical_not.default),
):
    _elementwise(_kind, *_operators)


def _bitwise(kind: str, *operators: Any) -> None:
    @lowers(*operators)
    def lower(g: Builder, node: Node, *values: Any) -> Value:
        dtype = meta(node).dtype
        return g.op(kind if dtype == torch.bool else f"Bitwise{kind}", *operands(g, node, dtype, values))


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


@lowers(aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar)
def power(g: Builder, node: Node, a: Any, b: Any) -> Value:
    dtype = meta(node).dtype
    if not dtype.is_floating_point and a not in (1, 2, 4, 16):  # ONNX Runtime computes it in float64, exact for these
        raise NotImplementedError("runtimes round powers of whole numbers; convert them to floating point before")
    return g.op("Pow", *operands(g, node, dtype, (a, b)))


@lowers(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default)
def div(g: Builder, node: Node, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    dtype = meta(node).dtype
    x, y = operands(g, node, dtype, (a, b))
    out = g.op("Div", x, y)  # whole numbers: towards zero
    if node.target is aten.floor_divide.default:
        rounding_mode = "floor"
    if rounding_mode is None or (rounding_mode == "trunc" and not dtype.is_floating_point):
        return out
    if rounding_mode == "trunc":
        return _truncate(g, out)
    if not dtype.is_floating_point:
        return g.op("Sub", out, g.cast(_turned(g, g.op("Sub", x, g.op("Mul", y, out)), y, dtype), torch.bool, dtype))
    # As PyTorch: from the exact remainder, because the quotient may be rounded up to a whole number.
    rest = g.op("Mod", x, y, fmod=1)
    whole = g.op("Div", g.op("Sub", x, rest), y)
    whole = g.op("Round", g.op("Sub", whole, g.cast(_turned(g, rest, y, dtype), torch.bool, dtype)))
    return g.op("Where", g.op("Equal", y, g.constant(0, dtype)), out, whole)


def _truncate(g: Builder, x: Value) -> Value:
    return g.op("Mul", g.op("Sign", x), g.op("Floor", g.op("Abs", x)))


def _turned(g: Builder, rest: Value, y: Value, dtype: torch.dtype) -> Value:
    """Where a remainder is not zero and has another sign than the divisor."""
    zero = g.constant(0, dtype)
    other = g.op("Xor", g.op("Less", rest, zero), g.op("Less", y, zero))
    return g.op("And", g.op("Not", g.op("Equal", rest, zero)), other)


@lowers(aten.trunc.default)
def trunc(g: Builder, node: Node, x: Value) -> Value:
    return _truncate(g, x) if meta(node).dtype.is_floating_point else x


@lowers(aten.remainder.Scalar, aten.remainder.Tensor, aten.remainder.Scalar_Tensor)
def remainder(g: Builder, node: Node, a: Any, b: Any) -> Value:
    dtype = meta(node).dtype
    x, y = operands(g, node, dtype, (a, b))
    if not dtype.is_floating_point:
        return g.op("Mod", x, y)
    rest = g.op("Mod", x, y, fmod=1)
    return g.op("Where", _turned(g, rest, y, dtype), g.op("Add", rest, y), rest)


@lowers(aten.fmod.Scalar, aten.fmod.Tensor)
def fmod(g: Builder, node: Node, a: Any, b: Any) -> Value:
    return g.op("Mod", *operands(g, node, meta(node).dtype, (a, b)), fmod=1)


@lowers(aten.tan.default)
def tan(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Div", g.op("Sin", x), g.op("Cos", x))  # ONNX Runtime has no Tan for every type


@lowers(aten.rsqrt.default)
def rsqrt(g: Builder, node: Node, x: Value) -> Value:
    return g.op("Reciprocal", g.op("Sqrt", x))


@lowers(aten.log1p.default)
def log1p(g: Builder, node: Node, x: Value) -> Value:
    """log(u) of u = 1 + x, and what rounding took from u: right for tiny x, where log(1 + x) has no digit left."""
    dtype = meta(node).dtype
    x = operands(g, node, dtype, (x,))[0]
    u = g.op("Add", x, g.constant(1, dtype))
    lost = g.op("Sub", x, g.op("Sub", u, g.constant(1, dtype)))
    # Nothing is lost at x = -1, where u is zero, and nothing that counts where x is huge or infinite.
    none = g.op("Or", g.op("Equal", u, x), g.op("Equal", lost, g.constant(0, dtype)))
    return g.op("Add", g.op("Log", u), g.op("Where", none, g.constant(0, dtype), g.op("Div", lost, u)))


@lowers(aten.expm1.default)
def expm1(g: Builder, node: Node, x: Value) -> Value:
    """2 t / (1 - t) of t = tanh(x / 2), which keeps the digits of small x that exp(x) - 1 loses."""
    dtype = meta(node).dtype
    x = operands(g, node, dtype, (x,))[0]
    one, two = g.constant(1, dtype), g.constant(2, dtype)
    t = g.op("Tanh", g.op("Div", x, two))
    near = g.op("Div", g.op("Mul", two, t), g.op("Sub", one, t))
    return g.op("Where", g.op("Less", g.op("Abs", x), one), near, g.op("Sub", g.op("Exp", x), one))


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


@lowers(
    aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default,
    aten.clamp_min.Tensor, aten.clamp_max.Tensor,
)  # fmt: skip
def clamp(g: Builder, node: Node, x: Value, *limits: Any, **named: Any) -> Value:
    # Max and Min, not Clip: like PyTorch they let NaN through.
    dtype = meta(node).dtype
    low, high = (*limits, None, None)[:2]
    low_node, high_node = (*node.args[1:], None, None)[:2]
    low, high = named.get("min", low), named.get("max", high)
    low_node, high_node = node.kwargs.get("min", low_node), node.kwargs.get("max", high_node)
    if node.target in (aten.clamp_max.default, aten.clamp_max.Tensor):
        low, high, low_node, high_node = None, low, None, low_node
    if node.target is aten.hardtanh.default:
        low, high = -1 if low is None else low, 1 if high is None else high
    x = g.cast(x, meta(node.args[0]).dtype, dtype)
    for kind, limit, argument in (("Max", low, low_node), ("Min", high, high_node)):
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
