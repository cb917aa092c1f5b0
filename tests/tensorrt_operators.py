"""What TensorRT documents of ONNX operators, as far as our lowerings use them.

Source: onnx-tensorrt, operators.md in its docs, "TensorRT 10.15 supports operators in the inclusive range of opset 9 to
opset 24". Only full-precision and half-precision, integer and boolean columns are kept; DOUBLE is cast down there and
counts as unsupported here. TensorRT itself was not run.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
INTEGERS = {TensorProto.INT32, TensorProto.INT64}
BOOL = {TensorProto.BOOL}
ANY = FLOATS | INTEGERS | BOOL
NUMBERS = FLOATS | INTEGERS

SUPPORTED: dict[str, set[int]] = {
    **dict.fromkeys(("Abs", "Add", "ArgMax", "ArgMin", "Div", "Equal", "Greater", "GreaterOrEqual"), NUMBERS),
    **dict.fromkeys(("Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Pad", "Pow", "Range"), NUMBERS),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu"), NUMBERS),
    **dict.fromkeys(("ScatterElements", "ScatterND", "Sign", "Sub", "TopK"), NUMBERS),
    **dict.fromkeys(("Acos", "Asin", "Atan", "AveragePool", "Ceil", "Conv", "ConvTranspose", "Cos", "Cosh"), FLOATS),
    **dict.fromkeys(
        ("CumSum", "Erf", "Exp", "Floor", "Gemm", "InstanceNormalization", "IsInf", "IsNaN", "LeakyRelu", "Log"), FLOATS
    ),
    **dict.fromkeys(("LogSoftmax", "MatMul", "MaxPool", "Reciprocal", "Resize", "Round", "Sigmoid", "Softmax"), FLOATS),
    **dict.fromkeys(("Sin", "Sinh", "Sqrt", "Tanh"), FLOATS),
    **dict.fromkeys(("Cast", "Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity"), ANY),
    **dict.fromkeys(("Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"), ANY),
    **dict.fromkeys(("And", "Or", "Not", "Xor"), BOOL),
}
# Which inputs must be initializers, by position.
CONSTANT_INPUTS = {
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), (1,)),
    **dict.fromkeys(("Squeeze", "Unsqueeze", "CumSum"), (1,)),
    "InstanceNormalization": (1, 2),  # and 3 to 5 axes; read in the edition of TensorRT 8.4
}
SHAPES = {"Shape"}  # any input


def unsupported(model: onnx.ModelProto) -> list[str]:
    """Every operator of a model that the documentation does not cover, with its reason; empty when all are."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.input)}
    types |= {v.name: v.type.tensor_type.elem_type for v in inferred.graph.output}
    types |= {w.name: w.data_type for w in model.graph.initializer}
    constants = {w.name for w in model.graph.initializer}
    problems = []
    (opset,) = [o.version for o in model.opset_import if o.domain == ""]
    if not 9 <= opset <= 24:
        problems.append(f"opset {opset}")
    for node in model.graph.node:
        if node.op_type not in SUPPORTED:
            problems.append(f"{node.name}: operator {node.op_type}")
            continue
        seen = {types[n] for n in (node.input[0], node.output[0]) if n in types}
        if node.op_type == "Where":
            seen = {types[n] for n in node.input[1:] if n in types}
        elif node.op_type in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf"):
            seen = {types[n] for n in node.input if n in types}
        elif node.op_type in ("ArgMax", "ArgMin"):
            seen = {types[node.input[0]]}
        if wrong := seen - SUPPORTED[node.op_type]:
            names = ", ".join(TensorProto.DataType.Name(t) for t in wrong)
            problems.append(f"{node.name}: {node.op_type} of {names}")
        for position in CONSTANT_INPUTS.get(node.op_type, ()):
            if len(node.input) > position and node.input[position] not in constants:
                problems.append(f"{node.name}: input {position} must be an initializer")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("MaxPool", "AveragePool"):
            if any(d != 1 for d in attributes.get("dilations", [1])):
                problems.append(f"{node.name}: dilations")
            if len(node.output) > 1 and node.output[1]:
                problems.append(f"{node.name}: Indices output")
        if node.op_type == "ScatterND" and attributes.get("reduction", b"none") != b"none":
            problems.append(f"{node.name}: reduction")
        if node.op_type == "Resize" and (
            attributes.get("mode") not in (b"nearest", b"linear")
            or attributes.get("coordinate_transformation_mode") not in (b"asymmetric", b"half_pixel", b"align_corners")
        ):
            problems.append(f"{node.name}: Resize mode")
    return problems
