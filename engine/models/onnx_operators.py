"""ONNX operators over torch: one table, from an operator's name to a function of its attributes and inputs.

What an operator needs as numbers (sizes, axes, pads) comes as numpy: constants, and what follows from shapes. What
follows from pixels is a tensor. Meaning and defaults: onnx's operator specification, opset 7 to 24.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CounterlensError

MANY = 1 << 22  # numbers in one computation of shapes: masks of windows have some, most have a handful
CAN: dict[str, Callable[..., Any]] = {}
KNOWN: dict[str, tuple[int, ...]] = {}  # places of the inputs that have to be numbers


class NoGradient(CounterlensError):
    """A model has no gradient that could be trusted; it can only be asked for answers, as a black box.

    Attributes:
        reasons: why, each a short phrase.
    """

    def __init__(self, path: object, reasons: Sequence[str]) -> None:
        super().__init__(f"classifier: {path} cannot be differentiated: {'; '.join(reasons)}")
        self.reasons = list(reasons)


class Attributes(dict[str, Any]):
    """A node's attributes, with the version of the operators and how many outputs are used."""

    def __init__(self, given: dict[str, Any], opset: int, outputs: int) -> None:
        super().__init__(given)
        self.opset, self.outputs = opset, outputs


class Unfit(ValueError):
    """An operator is used in a way that is not computed here; says how."""


class TooLarge(Unfit):
    """A few bytes of a file would become very many."""


def operator(*names: str, known: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function `(attributes, *inputs)` into the table; inputs that are left out are None."""

    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            CAN[name], KNOWN[name] = run, known
        return run

    return enter


def numbers(value: Any) -> list[int]:
    """Whole numbers that are known before any pixel is."""
    if isinstance(value, Tensor):
        raise Unfit("a size or axis that depends on pixels")
    return [int(n) for n in np.asarray(value).reshape(-1)]


def number(value: Any) -> Any:
    """One number, known or not."""
    return value if isinstance(value, Tensor) else np.asarray(value).reshape(-1)[0].item()


def either(a: Attributes, name: str, given: Any) -> list[int] | None:
    """Numbers that were an attribute once and are an input since."""
    said = a.get(name) if given is None else numbers(given)
    return None if said is None else list(said)


# Elementwise

PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "And": torch.logical_and, "Asin": torch.asin, "Atan": torch.atan,
    "Cos": torch.cos, "Cosh": torch.cosh, "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Less": torch.lt,
    "LessOrEqual": torch.le, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not,
    "Or": torch.logical_or, "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Sigmoid": torch.sigmoid,
    "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt,
    "Tan": torch.tan, "Tanh": torch.tanh, "Where": torch.where, "Xor": torch.logical_xor,
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "MatMul": torch.matmul,
}  # fmt: skip
for _name, _run in PLAIN.items():
    operator(_name)(lambda a, *x, run=_run: run(*x))

operator("Identity", "Dropout")(lambda a, x, *_: x)
operator("Div")(lambda a, x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc"))
operator("Pow", known=(1,))(lambda a, x, y: torch.pow(x, y if isinstance(y, Tensor) or y.size > 1 else y.item()))
operator("Min")(lambda a, *x: reduce(torch.minimum, x))
operator("Max")(lambda a, *x: reduce(torch.maximum, x))
operator("Sum")(lambda a, *x: reduce(torch.add, x))
operator("Mean")(lambda a, *x: reduce(torch.add, x) / len(x))
operator("LeakyRelu")(lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)))
operator("PRelu")(lambda a, x, slope: torch.where(x < 0, x * slope, x))
operator("Elu")(lambda a, x: F.elu(x, a.get("alpha", 1.0)))
operator("Celu")(lambda a, x: F.celu(x, a.get("alpha", 1.0)))
operator("ThresholdedRelu")(lambda a, x: torch.where(x > a.get("alpha", 1.0), x, torch.zeros_like(x)))
operator("HardSigmoid")(lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1))
operator("Gelu")(lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")))
operator("Swish")(lambda a, x: x * torch.sigmoid(a.get("alpha", 1.0) * x))


@operator("Selu")
def _selu(a: Attributes, x: Tensor) -> Tensor:
    alpha, gamma = a.get("alpha", 1.6732632423543772), a.get("gamma", 1.0507009873554805)
    return gamma * torch.where(x > 0, x, alpha * (x.clamp(max=0).exp() - 1))


@operator("Clip", known=(1, 2))
def _clip(a: Attributes, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low, high = (a.get(name) if v is None else number(v) for name, v in (("min", low), ("max", high)))
    return x if low is None and high is None else x.clamp(low, high)


@operator("DequantizeLinear")
def _dequantise(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if a.get("block_size"):
        raise Unfit("weights quantised in blocks")
    along = [1] * x.ndim
    if scale.numel() > 1:
        along[a.get("axis", 1) if x.ndim > 1 else 0] = -1
    shifted = x.to(scale.dtype) - (0 if zero is None else zero.to(scale.dtype).reshape(along))
    return shifted * scale.reshape(along)


@operator("Cast", "CastLike")
def _cast(a: Attributes, x: Tensor, *_: Any) -> Tensor:
    # Every floating type is that of the run: half precision is computed in float32, and checks compute in float64.
    if a.get("to", 1) in (1, 10, 11, 16):
        return x if x.is_floating_point() else x.float()
    if a["to"] == 9:
        return x.bool()
    raise Unfit("pixels are made whole numbers")


# Layers


@operator("Gemm")
def _gemm(a: Attributes, x: Tensor, w: Tensor, bias: Any = None) -> Tensor:
    x, w = x.mT if a.get("transA") else x, w.mT if a.get("transB") else w
    out = x @ w
    out = out if a.get("alpha", 1.0) == 1.0 else a["alpha"] * out
    return out if bias is None else out + (bias if a.get("beta", 1.0) == 1.0 else a["beta"] * bias)


def _pads(a: Attributes, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Pads before and after each spatial axis."""
    many, auto = len(kernel), a.get("auto_pad", "NOTSET")
    pads = a.get("pads") or [0] * (2 * many)
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return ([0] * many, [0] * many) if auto == "VALID" else (list(pads[:many]), list(pads[many:]))
    strides, dilations = a.get("strides") or [1] * many, a.get("dilations") or [1] * many
    total = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    less = [t // 2 for t in total]
    more = [t - m for t, m in zip(total, less, strict=True)]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def _padded(x: Tensor, before: list[int], after: list[int], value: float = 0.0) -> Tensor:
    flat = [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@operator("Conv")
def _conv(a: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    run: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    before, after = _pads(a, x, w.shape[2:])
    padding: Any = before
    if before != after:
        x, padding = _padded(x, before, after), 0
    stride, dilation = a.get("strides") or 1, a.get("dilations") or 1
    return run(x, w, bias, stride, padding, dilation, a.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(a: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    before, after = _pads(a, x, w.shape[2:])
    if "output_shape" in a or a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or before != after:
        raise Unfit("output_shape, auto_pad or uneven pads")
    run: Any = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[x.ndim]
    stride, dilation, extra = a.get("strides") or 1, a.get("dilations") or 1, a.get("output_padding") or 0
    return run(x, w, bias, stride, before, extra, a.get("group", 1), dilation)


@operator("MaxPool")
def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    if a.outputs > 1:
        raise Unfit("its second output, the places of the largest")
    run: Any = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.ndim]
    kernel = a["kernel_shape"]
    before, after = _pads(a, x, kernel)
    padding: Any = before
    if before != after or any(2 * p > k for p, k in zip(before, kernel, strict=True)):
        x, padding = _padded(x, before, after, -math.inf), 0
    strides = a.get("strides") or [1] * len(kernel)
    return run(x, kernel, strides, padding, a.get("dilations") or 1, bool(a.get("ceil_mode")))


@operator("AveragePool")
def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    if any(n != 1 for n in a.get("dilations") or ()):
        raise Unfit("dilations")
    run: Any = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.ndim]
    kernel = a["kernel_shape"]
    strides, ceil, whole = a.get("strides") or [1] * len(kernel), bool(a.get("ceil_mode")), a.get("count_include_pad")
    before, after = _pads(a, x, kernel)
    if before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True)):
        return run(x, kernel, strides, before, ceil, bool(whole))
    out = run(_padded(x, before, after), kernel, strides, 0, ceil)
    return out if whole else out / run(_padded(torch.ones_like(x), before, after), kernel, strides, 0, ceil)


operator("GlobalAveragePool")(lambda a, x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True))
operator("GlobalMaxPool")(lambda a, x: x.amax(dim=tuple(range(2, x.ndim)), keepdim=True))


@operator("BatchNormalization")
def _batch_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
    if a.get("training_mode"):  # exporters standardise weights with it
        return (F.batch_norm(x, None, None, scale, bias, True, 0.0, a.get("epsilon", 1e-5)),)
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, a.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    if a.outputs > 1:
        raise Unfit("its mean or deviation as an output")
    shape = x.shape[a.get("axis", -1) :]
    fits = scale.shape == shape and (bias is None or bias.shape == shape)
    if fits:
        return F.layer_norm(x, shape, scale, bias, a.get("epsilon", 1e-5))
    out = F.layer_norm(x, shape, eps=a.get("epsilon", 1e-5)) * scale
    return out if bias is None else out + bias


@operator("RMSNormalization")
def _rms_norm(a: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    dims = tuple(range(a.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt((x * x).mean(dim=dims, keepdim=True) + a.get("epsilon", 1e-5)) * scale


@operator("GroupNormalization")
def _group_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = a["num_groups"]
    if a.opset < 21:  # of each group, of each channel since
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, a.get("epsilon", 1e-5))


operator("InstanceNormalization")(
    lambda a, x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=a.get("epsilon", 1e-5))
)
operator("LpNormalization")(lambda a, x: F.normalize(x, a.get("p", 2), a.get("axis", -1), eps=0.0))
operator("LRN")(
    lambda a, x: F.local_response_norm(x, a["size"], a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0))
)


@operator("Softmax", "LogSoftmax")
def _softmax(a: Attributes, x: Tensor, run: Any = torch.softmax) -> Tensor:
    if a.opset >= 13:
        return run(x, a.get("axis", -1))
    return run(x.flatten(a.get("axis", 1)), -1).reshape(x.shape)  # over all axes from there on


CAN["LogSoftmax"] = lambda a, x: _softmax(a, x, torch.log_softmax)


@operator("Attention")
def _attention(a: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *past: Any) -> Tensor:
    if a.outputs > 1 or any(p is not None for p in past) or a.get("softcap"):
        raise Unfit("with a cache or a soft cap")
    flat = q.ndim == 3
    if flat:
        heads = a["q_num_heads"], a["kv_num_heads"], a["kv_num_heads"]
        q, k, v = (x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), heads, strict=True))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(a.get("is_causal")), scale=a.get("scale"), enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2) if flat else out


# Reductions


def _reduction(name: str, run: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    @operator(name, known=(1,))
    def reduced(a: Attributes, x: Tensor, axes: Any = None) -> Tensor:
        dims = either(a, "axes", axes)
        if not dims and a.get("noop_with_empty_axes"):
            return x
        return run(x, dims or list(range(x.ndim)), bool(a.get("keepdims", 1)))


_reduction("ReduceMean", lambda x, d, keep: x.mean(d, keep))
_reduction("ReduceSum", lambda x, d, keep: x.sum(d, keep))
_reduction("ReduceMax", lambda x, d, keep: x.amax(d, keep))
_reduction("ReduceMin", lambda x, d, keep: x.amin(d, keep))
_reduction("ReduceL1", lambda x, d, keep: x.abs().sum(d, keep))
_reduction("ReduceL2", lambda x, d, keep: torch.linalg.vector_norm(x, dim=d, keepdim=keep))
_reduction("ReduceSumSquare", lambda x, d, keep: (x * x).sum(d, keep))
_reduction("ReduceLogSumExp", lambda x, d, keep: x.logsumexp(d, keep))
_reduction("ReduceLogSum", lambda x, d, keep: x.sum(d, keep).log())

# Shapes

operator("Transpose")(lambda a, x: x.permute(a.get("perm") or list(range(x.ndim))[::-1]))
operator("Concat")(lambda a, *x: torch.cat(x, dim=a["axis"]))
operator("Expand", known=(1,))(lambda a, x, s: x.expand(torch.broadcast_shapes(x.shape, numbers(s))))
operator("Tile", known=(1,))(lambda a, x, s: x.repeat(numbers(s)))
operator("Einsum")(lambda a, *x: torch.einsum(a["equation"], *x))
operator("CumSum", known=(1,))(lambda a, x, axis: _cumulated(a, x, numbers(axis)[0]))
operator("Size")(lambda a, x: np.asarray(math.prod(x.shape)))
operator("Shape")(lambda a, x: np.asarray(tuple(x.shape)[a.get("start", 0) : a.get("end")], np.int64))


def _cumulated(a: Attributes, x: Tensor, axis: int) -> Tensor:
    x = x.flip(axis) if a.get("reverse") else x
    out = x.cumsum(axis) - (x if a.get("exclusive") else 0)
    return out.flip(axis) if a.get("reverse") else out


@operator("Reshape", known=(1,))
def _reshape(a: Attributes, x: Tensor, shape: Any = None) -> Tensor:
    sizes = either(a, "shape", shape) or []
    if not a.get("allowzero"):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Squeeze", known=(1,))
def _squeeze(a: Attributes, x: Tensor, axes: Any = None) -> Tensor:
    dims = either(a, "axes", axes)
    return x.squeeze([i for i, n in enumerate(x.shape) if n == 1] if dims is None else dims)


@operator("Unsqueeze", known=(1,))
def _unsqueeze(a: Attributes, x: Tensor, axes: Any = None) -> Tensor:
    dims = either(a, "axes", axes) or []
    for axis in sorted(d % (x.ndim + len(dims)) for d in dims):
        x = x.unsqueeze(axis)
    return x


@operator("Split", known=(1,))
def _split(a: Attributes, x: Tensor, split: Any = None) -> Sequence[Tensor]:
    axis, sizes = a.get("axis", 0), either(a, "split", split)
    size = -(-x.shape[axis] // (a.get("num_outputs") or a.outputs))
    return x.split(sizes or size, dim=axis)


@operator("Slice", known=(1, 2, 3, 4))
def _slice(a: Attributes, x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Any:
    first, last = either(a, "starts", starts) or [], either(a, "ends", ends) or []
    dims = either(a, "axes", axes) or list(range(len(first)))
    by = numbers(steps) if steps is not None else [1] * len(first)
    for axis, start, end, step in zip(dims, first, last, by, strict=True):
        taken = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            x = x.narrow(axis, taken.start, max(taken.stop - taken.start, 0))
            x = x if step == 1 else x[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(taken), device=x.device))
    return x


def _indices(value: Any, size: int, x: Tensor) -> Tensor:
    """Known indices without negative ones, as a tensor beside `x`."""
    if isinstance(value, Tensor):
        raise Unfit("an index that depends on pixels")
    whole = np.asarray(value, np.int64)
    return torch.as_tensor(np.where(whole < 0, whole + size, whole), device=x.device)


@operator("Gather", known=(1,))
def _gather(a: Attributes, x: Tensor, index: Any) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    taken = _indices(index, x.shape[axis], x)
    if taken.ndim == 0:
        return x.select(axis, int(np.asarray(index)))
    return x.index_select(axis, taken.reshape(-1)).unflatten(axis, taken.shape or (1,))


@operator("GatherElements", known=(1,))
def _gather_elements(a: Attributes, x: Tensor, index: Any) -> Tensor:
    axis = a.get("axis", 0)
    return x.gather(axis, _indices(index, x.shape[axis], x))


@operator("GatherND", known=(1,))
def _gather_nd(a: Attributes, x: Tensor, index: Any) -> Tensor:
    if a.get("batch_dims"):
        raise Unfit("batch_dims")
    return x[tuple(_indices(index, 0, x).unbind(-1))]


@operator("ScatterND", known=(1,))
def _scatter_nd(a: Attributes, x: Tensor, index: Any, values: Tensor) -> Tensor:
    if a.get("reduction", "none") not in ("none", "add"):
        raise Unfit(f"reduction {a['reduction']}")
    where = tuple(_indices(index, 0, x).unbind(-1))
    return x.index_put(where, values, accumulate=a.get("reduction") == "add")


@operator("Pad", known=(1, 2, 3))
def _pad(a: Attributes, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    said = either(a, "pads", pads) or []
    dims = [d % x.ndim for d in numbers(axes)] if axes is not None else list(range(x.ndim))
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        a.get("mode", "constant")
    ]
    around = [(0, 0)] * x.ndim
    for i, d in enumerate(dims):
        around[d] = (said[i], said[i + len(dims)])
    used = around if mode == "constant" else around[2:]
    if mode != "constant" and any(map(any, around[:2])):
        raise Unfit(f"mode {a['mode']} over images or channels")
    flat = [n for pair in reversed(used) for n in pair]
    fill = float(a.get("value", 0.0) if value is None else number(value))
    return F.pad(x, flat, value=fill) if mode == "constant" else F.pad(x, flat, mode=mode)


@operator("Trilu", known=(1,))
def _trilu(a: Attributes, x: Tensor, k: Any = None) -> Tensor:
    by = 0 if k is None else numbers(k)[0]
    return x.triu(by) if a.get("upper", 1) else x.tril(by)


@operator("DepthToSpace")
def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    n = a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, n)
    b, c, h, w = x.shape
    return x.reshape(b, n, n, c // n**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // n**2, h * n, w * n)


@operator("SpaceToDepth")
def _space_to_depth(a: Attributes, x: Tensor) -> Tensor:
    n, (b, c, h, w) = a["blocksize"], x.shape
    return x.reshape(b, c, h // n, n, w // n, n).permute(0, 3, 5, 1, 2, 4).reshape(b, c * n * n, h // n, w // n)


# Resampling: linear in the pixels, so along each axis a matrix


@operator("Resize", "Upsample", known=(1, 2, 3))
def _resize(a: Attributes, x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    if scales is None and sizes is None and roi is not None:
        scales = roi  # opset 10 and before: no region
    if a.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Unfit("tf_crop_and_resize")
    if a.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unfit("keep_aspect_ratio_policy")
    axes = [d % x.ndim for d in a.get("axes") or range(x.ndim)]
    wanted = numbers(sizes) if sizes is not None and np.size(sizes) else None
    by: Any = a.get("scales") if scales is None or wanted else np.asarray(scales, np.float64).reshape(-1).tolist()
    # Before opset 11 pixels were points at whole coordinates.
    where = a.get("coordinate_transformation_mode", "half_pixel" if a.opset > 10 else "asymmetric")
    for i, axis in enumerate(axes):
        old = x.shape[axis]
        new = wanted[i] if wanted else math.floor(old * by[i])
        scale = new / old if wanted else by[i]
        if new != old or scale != 1:
            matrix = _resampling(
                old, new, scale, a.get("mode", "nearest"), where, a.get("nearest_mode", "round_prefer_floor"),
                a.get("cubic_coeff_a", -0.75), bool(a.get("exclude_outside")), bool(a.get("antialias")),
            )  # fmt: skip
            x = (x.movedim(axis, -1) @ torch.as_tensor(matrix, device=x.device).to(x.dtype).T).movedim(-1, axis)
    return x


@lru_cache(maxsize=64)
def _resampling(
    old: int, new: int, scale: float, mode: str, where: str, nearest: str, cubic: float, exclude: bool, antialias: bool
) -> np.ndarray:
    """The matrix [new, old] that resamples one axis."""
    if new < 1:
        raise Unfit(f"to {new} pixels")
    if new > 1 << 16 or new * old > 16 * MANY:
        raise TooLarge(f"from {old} to {new} pixels")
    i = np.arange(new, dtype=np.float64)
    if where == "align_corners":
        at = i * (old - 1) / (new - 1) if new > 1 else np.zeros(1)
    elif where == "asymmetric":
        at = i / scale
    elif where == "pytorch_half_pixel" and new == 1:
        at = np.zeros(1)
    elif where in ("half_pixel", "pytorch_half_pixel"):
        at = (i + 0.5) / scale - 0.5
    elif where == "half_pixel_symmetric":
        at = old / 2 * (1 - new / (scale * old)) + (i + 0.5) / scale - 0.5
    else:
        raise Unfit(f"coordinate_transformation_mode {where}")
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": np.ceil(at - 0.5), "round_prefer_ceil": np.floor(at + 0.5), "floor": np.floor(at),
            "ceil": np.ceil(at),
        }[nearest]  # fmt: skip
        picked = np.zeros((new, old))
        picked[np.arange(new), rounded.clip(0, old - 1).astype(int)] = 1
        return picked
    stretch = max(1.0, 1 / scale) if antialias else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) * stretch) + 1
    taps = np.floor(at)[:, None] + np.arange(-reach, reach + 1)  # [new, taps]
    d = np.abs(taps - at[:, None]) / stretch
    if mode == "linear":
        weights = np.clip(1 - d, 0, None)
    else:
        near = ((cubic + 2) * d - (cubic + 3)) * d * d + 1
        far = ((cubic * d - 5 * cubic) * d + 8 * cubic) * d - 4 * cubic
        weights = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    if exclude:
        weights = np.where((taps >= 0) & (taps < old), weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    out = np.zeros((new, old))
    np.add.at(out, (np.arange(new)[:, None], taps.clip(0, old - 1).astype(int)), weights)
    return out
