"""Which types an ONNX operator takes in ONNX Runtime, what stands in for those it lacks, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BOOL, WHOLE = torch.bool, torch.int32
SMALL = (torch.int8, torch.uint8)

# Which inputs hold the data, whose types must agree; all of them where an operator is not here.
DATA: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            "Cast", "Gather", "GatherElements", "GatherND", "Reshape", "Expand", "Tile", "Slice", "Unsqueeze",
            "Squeeze", "Split", "TopK", "CumSum", "Resize", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin",
            "ReduceProd", "Trilu",
        ),
        (0,),
    ),
    "Where": (1, 2),
    "Pad": (0, 2),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
}  # fmt: skip
TO_BOOL = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf", "And", "Or", "Xor", "Not")
TO_INT64 = ("Shape", "ArgMax", "ArgMin")
ARITHMETIC = (
    "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Sign", "Max", "Min", "Pow", "Relu", "Less", "LessOrEqual",
    "Greater", "GreaterOrEqual", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ArgMax", "ArgMin",
    "TopK", "CumSum", "Where", "Range", "Pad", "ScatterElements", "ScatterND", "MatMul", "Gemm", "Resize", "MaxPool",
)  # fmt: skip

# The type to compute in instead. Whole numbers wrap around when they are cast back, as PyTorch's do.
STAND_INS: dict[tuple[str, torch.dtype], torch.dtype] = {
    **{(kind, BOOL): WHOLE for kind in ARITHMETIC},
    **{
        (kind, small): WHOLE
        for small in SMALL
        for kind in ("Neg", "Relu", "Pow", "MatMul", "ReduceSum", "ReduceProd", "CumSum", "Range", "Trilu")
    },
    ("MatMul", BOOL): torch.float32,
    ("Resize", BOOL): torch.float32,
    ("Resize", torch.int64): torch.int32,
    ("MaxPool", BOOL): torch.float32,
    ("IsInf", torch.float16): torch.float32,
}
NOT_IN_FLOAT64 = (
    "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "AveragePool", "Conv", "ConvTranspose", "Cosh", "Erf",
    "InstanceNormalization", "Resize", "Sinh", "Tan",
)  # fmt: skip
NOT_IN_WHOLE = ("AveragePool", "Conv", "ConvTranspose", "Gemm", "MaxPool")


def held(kind: str, count: int) -> list[int]:
    """Which of so many inputs hold the data."""
    return [i for i in DATA.get(kind, range(count)) if i < count]


def data_type(kind: str, types: Sequence[torch.dtype | None]) -> torch.dtype | None:
    """The one type of an operator's data. NotImplementedError where its inputs differ or nothing computes with it."""
    found = {t for i in held(kind, len(types)) if (t := types[i]) is not None}
    if len(found) > 1:
        raise NotImplementedError(f"{kind} of {' and '.join(sorted(map(_name, found)))} together")
    if not found:
        return None
    (one,) = found
    if one == torch.float64 and kind in NOT_IN_FLOAT64:
        raise NotImplementedError(f"runtimes have no {kind} for float64; convert the model to float32")
    if kind in NOT_IN_WHOLE and not one.is_floating_point and (kind, one) not in STAND_INS:
        raise NotImplementedError(f"runtimes have no {kind} for {_name(one)}; convert it to float32 before")
    return one


def result_type(kind: str, data: torch.dtype | None) -> torch.dtype:
    """The type of an operator's first output. NotImplementedError where nothing tells it."""
    if kind in TO_BOOL:
        return BOOL
    if kind in TO_INT64:
        return torch.int64
    if data is None:
        raise NotImplementedError(f"{kind} of nothing")
    return data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
