"""Every operator of the table against ONNX Runtime, in the ways in which exporters write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from counterlens.engine.errors import CounterlensError
from counterlens.engine.models.onnx_file import OnnxFile, open_session, read_onnx
from counterlens.engine.models.onnx_graph import OnnxGraph
from counterlens.engine.models.onnx_operators import CAN, Attributes, NoGradient, Unfit

G = np.random.Generator(np.random.PCG64(0))


def normal(*shape: int) -> np.ndarray:
    return G.standard_normal(shape).astype(np.float32)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int64)


def save(path: Path, nodes: list[Any], constants: dict[str, np.ndarray], shape: list[Any], opset: int = 18) -> Path:
    """A file from `x` to `y`."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    version = 10 if opset < 23 else 11
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)
    onnx.save(model, path)
    return path


def compare(file: OnnxFile, x: np.ndarray, tolerance: float = 2e-6) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": x})[0]
    graph = OnnxGraph(file)
    ours = graph(torch.from_numpy(x)).detach().numpy()
    assert ours.shape == theirs.shape
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= tolerance * scale + 1e-30
    shape, taken = graph.rehearse(tuple(x.shape), torch.float32)
    assert shape == theirs.shape
    assert taken >= theirs.nbytes


ONE = [
    "Abs", "Atan", "Cos", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mish",
    "Neg", "Relu", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Tanh", "ThresholdedRelu", "Celu",
    "GlobalAveragePool", "GlobalMaxPool", "Softmax", "LogSoftmax", "Flatten", "Transpose", "LpNormalization",
]  # fmt: skip


@pytest.mark.parametrize("op", ONE)
def test_operators_of_one_input(op: str, tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["h"]), helper.make_node(op, ["h"], ["z"])]
    nodes.append(helper.make_node("Neg", ["z"], ["y"]))  # a softmax at the end would be left out
    file = read_onnx(save(tmp_path / "m.onnx", nodes, {}, ["B", 3, 7, 6], 20))
    compare(file, normal(2, 3, 7, 6))


# operator: its constants (inputs after x), attributes, opset
CASES: list[tuple[str, list[np.ndarray | None], dict[str, Any], int]] = [
    ("Conv", [normal(4, 3, 3, 3), normal(4)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}, 18),
    ("Conv", [normal(4, 3, 3, 2)], {"pads": [0, 1, 2, 0], "dilations": [2, 1]}, 18),
    ("Conv", [normal(6, 1, 3, 3)], {"group": 3, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, 18),
    ("Conv", [normal(3, 3, 4, 4)], {"auto_pad": "SAME_LOWER", "strides": [1, 2]}, 18),
    ("Conv", [normal(3, 3, 2, 2)], {"auto_pad": "VALID"}, 18),
    ("ConvTranspose", [normal(3, 2, 3, 3), normal(2)],
     {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, 18),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 18),
    ("MaxPool", [], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, 18),
    ("MaxPool", [], {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1}, 18),
    ("MaxPool", [], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}, 12),
    ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 18),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, 18),
    ("AveragePool", [], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, 18),
    ("BatchNormalization", [normal(3), normal(3), normal(3), np.abs(normal(3)) + 0.5], {"epsilon": 1e-3}, 15),
    ("InstanceNormalization", [normal(3), normal(3)], {}, 18),
    ("LayerNormalization", [normal(6), normal(6)], {}, 17),
    ("LayerNormalization", [normal(1, 6)], {"axis": -2, "epsilon": 1e-2}, 17),
    ("GroupNormalization", [normal(3), normal(3)], {"num_groups": 3}, 21),
    ("RMSNormalization", [normal(6)], {}, 23),
    ("LRN", [], {"size": 3, "alpha": 0.1, "beta": 0.7, "bias": 2.0}, 18),
    ("Gelu", [], {"approximate": "tanh"}, 20),
    ("Add", [normal(3, 1, 1)], {}, 18), ("Sub", [normal(6)], {}, 18), ("Mul", [normal(1)], {}, 18),
    ("Div", [np.float32([2.0])], {}, 18), ("Pow", [np.float32(2)], {}, 18), ("Min", [normal(6), normal(7, 1)], {}, 18),
    ("Max", [normal(6)], {}, 18), ("Sum", [normal(6), normal(6)], {}, 18), ("Mean", [normal(6)], {}, 18),
    ("PRelu", [normal(3, 1, 1)], {}, 18), ("MatMul", [normal(6, 5)], {}, 18),
    ("Clip", [np.float32(-0.5), np.float32(0.7)], {}, 18), ("Clip", [None, np.float32(0.3)], {}, 18),
    ("Clip", [], {"min": -0.2, "max": 0.2}, 7),
    ("ReduceMean", [ints(2, 3)], {"keepdims": 0}, 18), ("ReduceMean", [], {"axes": [-1]}, 13),
    ("ReduceSum", [ints(1)], {}, 13), ("ReduceSum", [], {"noop_with_empty_axes": 1}, 18),
    ("ReduceMax", [ints(-1)], {}, 18), ("ReduceMin", [], {}, 18), ("ReduceL1", [ints(1)], {}, 18),
    ("ReduceL2", [ints(1)], {}, 18), ("ReduceSumSquare", [ints(2)], {}, 18), ("ReduceLogSumExp", [ints(2)], {}, 18),
    ("Softmax", [], {"axis": 1}, 13), ("Softmax", [], {}, 11), ("LogSoftmax", [], {"axis": 2}, 11),
    ("Reshape", [ints(0, -1)], {}, 18), ("Reshape", [ints(0, 7, 3, 6)], {}, 18),
    ("Flatten", [], {"axis": 2}, 18), ("Transpose", [], {"perm": [0, 2, 3, 1]}, 18),
    ("Unsqueeze", [ints(0, -1)], {}, 18), ("Unsqueeze", [], {"axes": [1]}, 11),
    ("Slice", [ints(1, 0), ints(2**40, -1), ints(2, 3), ints(2, 1)], {}, 18),
    ("Slice", [ints(-1), ints(-(2**40)), ints(3), ints(-1)], {}, 18), ("Slice", [ints(1), ints(3)], {}, 18),
    ("Slice", [], {"starts": [1], "ends": [3], "axes": [1]}, 9),
    ("Gather", [np.array(1)], {"axis": 1}, 18), ("Gather", [ints(2, -1, 0)], {"axis": 1}, 18),
    ("Gather", [ints([0, 1], [2, -3])], {"axis": 3}, 18), ("Gather", [np.array(-1)], {"axis": 2}, 18),
    ("GatherElements", [ints(*G.integers(-6, 6, (2, 3, 7, 4)))], {"axis": 3}, 18),
    ("GatherND", [ints([0, 1], [1, 2])], {}, 18),
    ("ScatterND", [ints([0, 1], [1, 2]), normal(2, 7, 6)], {}, 18),
    ("Expand", [ints(5, 1, 1, 1, 1)], {}, 18), ("Tile", [ints(1, 2, 1, 3)], {}, 18),
    ("Pad", [ints(0, 0, 1, 2, 0, 0, 0, 3)], {}, 18), ("Pad", [ints(1, 2), np.float32(0.5), ints(3)], {}, 18),
    ("Pad", [ints(0, 0, 2, 1, 0, 0, 1, 2)], {"mode": "reflect"}, 18),
    ("Pad", [ints(0, 0, 2, 1, 0, 0, 1, 2)], {"mode": "edge"}, 18),
    ("Pad", [ints(0, 0, -1, 0, 0, 0, 0, -2)], {}, 18), ("Pad", [], {"pads": [0, 0, 1, 1, 0, 0, 1, 1]}, 9),
    ("Trilu", [np.array(1)], {"upper": 0}, 18), ("CumSum", [np.array(2)], {"exclusive": 1, "reverse": 1}, 18),
    ("Einsum", [normal(6, 4)], {"equation": "bchw,wd->bhd"}, 18),
    ("Cast", [], {"to": TensorProto.FLOAT}, 18), ("Dropout", [], {}, 13),
]  # fmt: skip


@pytest.mark.parametrize(("op", "constants", "attributes", "opset"), CASES, ids=lambda v: str(v)[:40])
def test_operators(op: str, constants: list[Any], attributes: dict[str, Any], opset: int, tmp_path: Path) -> None:
    named = {f"c{i}": np.asarray(value) for i, value in enumerate(constants) if value is not None}
    inputs = ["x", *("" if value is None else f"c{i}" for i, value in enumerate(constants))]
    nodes = [helper.make_node(op, inputs, ["z"], **attributes), helper.make_node("Neg", ["z"], ["y"])]
    file = read_onnx(save(tmp_path / "m.onnx", nodes, named, ["B", 3, 7, 6], opset))
    compare(file, normal(2, 3, 7, 6), 1e-5)


RESIZES: list[dict[str, Any]] = [
    {"mode": mode, "coordinate_transformation_mode": where, **more}
    for mode in ("nearest", "linear", "cubic")
    for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    for more in (
        [{"nearest_mode": n} for n in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")]
        if mode == "nearest"
        else [{}, {"exclude_outside": 1, "cubic_coeff_a": -0.5}]
        if mode == "cubic"
        else [{}]
    )
] + [{"mode": mode, "antialias": 1} for mode in ("linear", "cubic")]


@pytest.mark.parametrize("attributes", RESIZES, ids=lambda a: "-".join(map(str, a.values())))
def test_resampling(attributes: dict[str, Any], tmp_path: Path) -> None:
    for name, value in (("scales", np.float32([1, 1, 2.0, 1.5])), ("sizes", ints(2, 3, 5, 4))):
        inputs = ["x", "", "", name] if name == "sizes" else ["x", "", name]
        node = helper.make_node("Resize", inputs, ["y"], **attributes)
        file = read_onnx(save(tmp_path / f"{name}.onnx", [node], {name: value}, [2, 3, 8, 6]))
        compare(file, normal(2, 3, 8, 6), 1e-5)


DOUBLING = [helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(40)]
HOSTILE = {
    "each node doubles what the one before it made": (
        [*DOUBLING, helper.make_node("ReduceMax", ["c40"], ["most"]), helper.make_node("Mul", ["x", "most"], ["y"])],
        r"refused: Concat of its weights: \d+ bytes would become \d+",
    ),
    "endless": ([helper.make_node("Resize", ["x", "", "endless"], ["y"])], "Resize: cannot convert float infinity"),
    "no blocks": ([helper.make_node("DepthToSpace", ["x"], ["y"], blocksize=0)], "DepthToSpace: "),
    "long": ([helper.make_node("Resize", ["x", "", "long"], ["y"], mode="linear")], "Resize: from 8 to 8000000 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_grow_or_divide_by_nothing_is_refused(name: str, tmp_path: Path) -> None:
    nodes, said = HOSTILE[name]
    scales = {"endless": np.float32([1, 1, np.inf, 1]), "long": np.float32([1, 1, 1, 1e6])}
    file = read_onnx(save(tmp_path / "m.onnx", nodes, {"c0": np.zeros(1 << 20, np.float32), **scales}, ["B", 3, 8, 8]))
    with pytest.raises((CounterlensError, Unfit), match=said):
        OnnxGraph(file).rehearse((1, 3, 8, 8), torch.float32)


@pytest.mark.parametrize("location", [None, "weights.bin"])
def test_weights_of_four_bits(location: str | None, tmp_path: Path) -> None:
    weight = onnx.TensorProto(name="w4", data_type=TensorProto.INT4, dims=[18], raw_data=bytes(range(100, 109)))
    nodes = [
        helper.make_node("DequantizeLinear", ["w4", "scale"], ["w"]), helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Mul", ["flat", "w"], ["y"]),  # a product of matrices ONNX Runtime rounds
    ]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, {"scale": np.array(0.1, np.float32)}, ["B", 2, 3, 3], 21)
    model = onnx.load(path)
    model.graph.initializer.append(weight)
    onnx.save(model, path, save_as_external_data=location is not None, location=location, size_threshold=0)
    compare(read_onnx(path), normal(2, 2, 3, 3))


def test_resampling_takes_no_more_memory_than_its_result() -> None:
    def resized(pixels: int, scale: float, **attributes: Any) -> torch.Tensor:
        x = torch.zeros(1, 1, 1, pixels, device="meta")
        return CAN["Resize"](Attributes(attributes, 18, 1), x, None, np.array([1, 1, 1, scale]))

    assert resized(1 << 22, 2.0**-22).shape[3] == 1  # a square matrix of so many pixels would be 128 TB
    with pytest.raises(Unfit, match="to 0 pixels"):
        resized(8, 1e-12, mode="linear", antialias=1)


def test_what_follows_from_shapes(tmp_path: Path) -> None:
    """A batch that is left open, as the older exporter writes it: Shape, Gather, Concat, Where, Expand, Range."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["b"]),
        helper.make_node("Unsqueeze", ["b", "axis"], ["b1"]),
        helper.make_node("Concat", ["b1", "rest"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["four"], ["ones"], value=numpy_helper.from_array(ints(1))),
        helper.make_node("Mul", ["ones", "minus"], ["negative"]),
        helper.make_node("Equal", ["shape", "negative"], ["open"]),
        helper.make_node("Where", ["open", "ones", "shape"], ["sizes"]),
        helper.make_node("Expand", ["token", "sizes"], ["tokens"]),
        helper.make_node("Concat", ["tokens", "x"], ["joined"], axis=1),
        helper.make_node("Shape", ["joined"], ["s2"]),
        helper.make_node("Slice", ["s2", "axis", "two"], ["front"]),
        helper.make_node("ReduceProd", ["front"], ["many"], keepdims=1),
        helper.make_node("Cast", ["many"], ["many_f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["joined", "many_f"], ["scaled"]),
        helper.make_node("Concat", ["front", "minus"], ["flat"], axis=0),
        helper.make_node("Reshape", ["scaled", "flat"], ["y"]),
    ]
    constants = {
        "zero": np.array(0), "axis": ints(0), "rest": ints(1, 7, 6), "four": ints(4), "minus": ints(-1), "two": ints(2),
        "token": normal(1, 1, 7, 6),
    }  # fmt: skip
    file = read_onnx(save(tmp_path / "m.onnx", nodes, constants, ["B", 3, 7, 6]))
    for batch in (1, 3):
        compare(file, normal(batch, 3, 7, 6))


def test_what_follows_from_constants_is_computed_once(tmp_path: Path) -> None:
    """Weights of 8 bits, transposed and scaled, are plain weights."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "scale", "point"], ["w"], axis=0),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "wt", "bias"], ["y"], alpha=0.5, beta=2.0),
    ]
    constants = {
        "w8": G.integers(-128, 128, (5, 3)).astype(np.int8), "scale": np.abs(normal(5)), "bias": normal(5),
        "point": G.integers(-9, 9, 5).astype(np.int8), "axes": ints(2, 3),
    }  # fmt: skip
    file = read_onnx(save(tmp_path / "m.onnx", nodes, constants, ["B", 3, 7, 6]))
    compare(file, normal(2, 3, 7, 6))
    assert OnnxGraph(file).kinds == {"ReduceMean": 1, "Gemm": 1}


def test_weights_standardised_by_a_norm_in_training_mode(tmp_path: Path) -> None:
    """As exporters write it; what the norm keeps besides is not used."""
    nodes = [
        helper.make_node(
            "BatchNormalization", ["w", "one", "zero", "zero", "one"], ["n", "mean", "var"], training_mode=1
        ),
        helper.make_node("Reshape", ["n", "shape"], ["k"]),
        helper.make_node("Conv", ["x", "k"], ["y"]),
    ]
    constants = {
        "w": normal(1, 4, 27), "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32),
        "shape": ints(4, 3, 3, 3),
    }  # fmt: skip
    file = read_onnx(save(tmp_path / "m.onnx", nodes, constants, ["B", 3, 7, 6], 15))
    compare(file, normal(2, 3, 7, 6), 1e-5)
    assert OnnxGraph(file).kinds == {"Conv": 1}


def test_splits(tmp_path: Path) -> None:
    for i, (opset, constants, attributes) in enumerate(
        [(18, {}, {"num_outputs": 2}), (13, {"sizes": ints(2, 5)}, {}), (11, {}, {"split": [3, 4]})]
    ):
        nodes = [
            helper.make_node("Split", ["x", *constants], ["a", "b"], axis=2, **attributes),
            helper.make_node("Concat", ["b", "a"], ["y"], axis=2),
        ]
        compare(read_onnx(save(tmp_path / f"{i}.onnx", nodes, constants, ["B", 3, 7, 6], opset)), normal(2, 3, 7, 6))


@pytest.mark.parametrize(("mode", "op"), [("DCR", "DepthToSpace"), ("CRD", "DepthToSpace"), ("", "SpaceToDepth")])
def test_depth_and_space(mode: str, op: str, tmp_path: Path) -> None:
    attributes = {"blocksize": 2} | ({"mode": mode} if mode else {})
    node = helper.make_node(op, ["d"], ["y"], **attributes)
    widen = helper.make_node("Tile", ["x", "r"], ["d"])
    file = read_onnx(save(tmp_path / "m.onnx", [widen, node], {"r": ints(1, 4, 1, 1)}, ["B", 3, 4, 6]))
    compare(file, normal(2, 3, 4, 6))


def test_attention_of_opset_23(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["t"]),
        helper.make_node("Attention", ["t", "t", "t"], ["y"], q_num_heads=2, kv_num_heads=2),
    ]
    file = read_onnx(save(tmp_path / "m.onnx", nodes, {"flat": ints(0, -1, 6)}, ["B", 3, 7, 6], 23))
    compare(file, normal(2, 3, 7, 6), 1e-5)


@pytest.mark.parametrize(
    ("node", "constants", "said"),
    [
        (("Round", ["x"]), {}, "steps, whose gradient is zero everywhere (Round)"),
        (("QuantizeLinear", ["x", "s"]), {"s": np.float32(0.1)}, "it is quantised, and rounding has no gradient"),
        (("Det", ["x"]), {}, "operators that are not differentiated here (Det)"),
    ],
)
def test_what_has_no_gradient_is_named(
    node: tuple[str, list[str]], constants: dict[str, np.ndarray], said: str, tmp_path: Path
) -> None:
    kind, inputs = node
    path = save(tmp_path / "m.onnx", [helper.make_node(kind, inputs, ["y"])], constants, ["B", 3, 7, 6])
    with pytest.raises(NoGradient) as caught:
        OnnxGraph(read_onnx(path))
    assert any(said in reason for reason in caught.value.reasons)


def test_every_operator_of_the_table_is_one_of_onnx() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert set(CAN) <= known


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    node = helper.make_node("Flatten", ["x"], ["y"])
    file = read_onnx(save(tmp_path / "m.onnx", [node], {}, [2, 3, 7, 6]))
    x = normal(5, 3, 7, 6)
    assert np.array_equal(open_session(file)(x), x.reshape(5, -1))
