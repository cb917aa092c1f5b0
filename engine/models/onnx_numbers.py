"""ONNX operators over numbers: what shapes are computed with, before any pixel is known; in numpy, and bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from .onnx_operators import MANY, Attributes, TooLarge, either, numbers


def _whole_division(a: Any, b: Any) -> Any:
    x, y = np.asarray(a), np.asarray(b)
    return x / y if "f" in (x.dtype.kind, y.dtype.kind) else np.trunc(x / y).astype(np.int64)


def _known_slice(a: Attributes, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, by: Any = None) -> Any:
    first, last = either(a, "starts", starts) or [], either(a, "ends", ends) or []
    dims, steps = either(a, "axes", axes), [1] * len(first) if by is None else numbers(by)
    taken = [slice(None)] * np.ndim(x)
    for axis, start, end, step in zip(dims or range(len(first)), first, last, steps, strict=True):
        taken[axis] = slice(start, end, step)
    return np.asarray(x)[tuple(taken)]


BROADCAST = {
    "Add", "Sub", "Mul", "Div", "Mod", "Pow", "Min", "Max", "Equal", "Less", "Greater", "LessOrEqual",
    "GreaterOrEqual", "And", "Or", "Where",
}  # fmt: skip


def of_numbers(kind: str, a: Attributes, inputs: Sequence[Any]) -> Any:
    """An operator whose inputs are all known, and few, in numpy."""
    sizes = [np.shape(v) for v in inputs if v is not None]
    if kind in BROADCAST:
        _bounded(np.broadcast_shapes(*sizes))
    elif kind == "Gather":
        _bounded([math.prod(sizes[0]) // max(1, sizes[0][a.get("axis", 0)]), math.prod(sizes[1])])
    elif kind != "Cast":
        _bounded([sum(map(math.prod, sizes))])
    return NUMPY[kind](a, *inputs)


def _bounded(shape: Sequence[int]) -> tuple[int, ...]:
    if math.prod(shape) > MANY or min(shape, default=0) < 0:
        raise TooLarge(f"{list(shape)} is no shape")
    return tuple(shape)


def _range(a: Attributes, start: Any, end: Any, step: Any) -> np.ndarray:
    first, last, by = (np.asarray(v).reshape(-1)[0] for v in (start, end, step))
    if by == 0 or (last - first) / by > MANY:
        raise TooLarge("a range of too many numbers")
    return np.arange(first, last, by)


def _filled(a: Attributes, shape: Any) -> np.ndarray:
    value = a.get("value", np.zeros(1, np.float32))
    return np.full(_bounded(numbers(shape)), value.reshape(-1)[0], value.dtype)


TYPES: dict[int, Any] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float32, 11: np.float64, 12: np.uint32, 13: np.uint64, 16: np.float32,
}  # fmt: skip
NUMPY: dict[str, Callable[..., Any]] = {
    "Cast": lambda a, x: np.asarray(x).astype(TYPES[a["to"]]),
    "Add": lambda a, x, y: x + y, "Sub": lambda a, x, y: x - y, "Mul": lambda a, x, y: x * y,
    "Div": lambda a, x, y: _whole_division(x, y), "Neg": lambda a, x: -x, "Abs": lambda a, x: np.abs(x),
    "Mod": lambda a, x, y: np.fmod(x, y) if a.get("fmod") else np.mod(x, y), "Sqrt": lambda a, x: np.sqrt(x),
    "Pow": lambda a, x, y: np.power(x, y), "Floor": lambda a, x: np.floor(x), "Ceil": lambda a, x: np.ceil(x),
    "Round": lambda a, x: np.round(x), "Reciprocal": lambda a, x: 1 / x,
    "Min": lambda a, *x: reduce(np.minimum, x), "Max": lambda a, *x: reduce(np.maximum, x),
    "Equal": lambda a, x, y: x == y, "Less": lambda a, x, y: x < y, "Greater": lambda a, x, y: x > y,
    "LessOrEqual": lambda a, x, y: x <= y, "GreaterOrEqual": lambda a, x, y: x >= y,
    "And": lambda a, x, y: x & y, "Or": lambda a, x, y: x | y, "Not": lambda a, x: ~x,
    "Where": lambda a, c, x, y: np.where(c, x, y), "Identity": lambda a, x: x,
    "Concat": lambda a, *x: np.concatenate(x, axis=a["axis"]),
    "Gather": lambda a, x, i: np.take(x, i, axis=a.get("axis", 0)),
    "Unsqueeze": lambda a, x, axes=None: np.expand_dims(x, tuple(either(a, "axes", axes) or ())),
    "Squeeze": lambda a, x, axes=None: np.squeeze(
        x, None if (d := either(a, "axes", axes)) is None else tuple(d)
    ),
    "Slice": _known_slice,
    "Shape": lambda a, x: np.asarray(np.shape(x)[a.get("start", 0) : a.get("end")], np.int64),
    "Reshape": lambda a, x, s: np.reshape(
        x, [np.shape(x)[i] if n == 0 and not a.get("allowzero") else n for i, n in enumerate(numbers(s))]
    ),
    "Transpose": lambda a, x: np.transpose(x, a.get("perm")),
    "Expand": lambda a, x, s: np.broadcast_to(x, _bounded(np.broadcast_shapes(np.shape(x), tuple(numbers(s))))),
    "Tile": lambda a, x, r: np.tile(x, numbers(r)) if math.prod(numbers(r)) * np.size(x) <= MANY else _bounded([-1]),
    "Range": _range, "ConstantOfShape": _filled,
    "ReduceProd": lambda a, x, axes=None: np.prod(
        x, axis=None if (d := either(a, "axes", axes)) is None else tuple(d), keepdims=bool(a.get("keepdims", 1))
    ),
}  # fmt: skip
