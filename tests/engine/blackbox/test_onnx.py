"""ONNX files that are called: layouts, types, sizes and batches as the file has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from counterlens.engine.blackbox.box import open_box
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.preprocessing import Preprocessing
from tests.engine.blackbox.test_box import some

RGB = ["red", "green", "blue"]


def write(path: Path, shape: list[int | str], kind: int = TensorProto.FLOAT, *, softmax: bool = True) -> Path:
    """A file that says how red, green and blue an image is: the softmax of its channels' means."""
    axes = [1, 2] if shape[-1] == 3 else [2, 3]
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=axes, keepdims=0),
        helper.make_node("Softmax" if softmax else "Identity", ["mean"], ["p"], **({"axis": 1} if softmax else {})),
    ]
    graph = helper.make_graph(
        nodes, "rgb", [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [shape[0], 3])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def expected(images: np.ndarray, scale: float = 255.0) -> torch.Tensor:
    return torch.from_numpy(images).float().div(scale).mean((1, 2)).softmax(1)


@pytest.mark.parametrize(
    ("shape", "kind", "scale"),
    [
        (["n", 3, "h", "w"], TensorProto.FLOAT, 255.0),
        ([1, 3, 8, 8], TensorProto.FLOAT, 255.0),
        ([4, 8, 8, 3], TensorProto.FLOAT16, 255.0),
        (["n", 8, 8, 3], TensorProto.UINT8, 1.0),
    ],
)
def test_the_input_is_made_as_the_file_wants_it(
    shape: list[int | str], kind: int, scale: float, tmp_path: Path
) -> None:
    box = open_box(write(tmp_path / "rgb.onnx", shape, kind), RGB, image_size=8, batch=5)
    x = some(7)
    assert torch.allclose(torch.from_numpy(box.answer(x)), expected(x, scale), atol=1e-3)
    assert box.queries.requests == 2 + 2


def test_images_are_resized_and_normalised_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rgb.onnx", ["n", 3, 5, 5])
    box = open_box(path, RGB, image_size=8, mean="0.5,0.4,0.3", std="0.1,0.2,0.3")
    pixels = torch.from_numpy(some(3)).permute(0, 3, 1, 2) / 255
    made = Preprocessing(8, resize=5, mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.3])(pixels)
    assert torch.allclose(torch.from_numpy(box.answer(some(3))), made.mean((2, 3)).softmax(1), atol=1e-5)


def test_another_output_or_size_is_another_box(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path / "rgb.onnx", ["n", 3, "h", "w"]))
    model.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["n", 3]))
    onnx.save(model, tmp_path / "two.onnx")
    asked = [("p", 8), ("mean", 8), ("p", 9)]
    boxes = [open_box(tmp_path / "two.onnx", RGB, image_size=n, scores=s, output="logits") for s, n in asked]
    assert len({box.identity for box in boxes}) == 3


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CounterlensError, match=r"\[3\] scores, there are 2 labels"):
        open_box(write(tmp_path / "a.onnx", ["n", 3, 8, 8]), RGB[:2], image_size=8)
    with pytest.raises(CounterlensError, match="--classifier-output logits"):
        open_box(write(tmp_path / "b.onnx", ["n", 3, 8, 8], softmax=False), RGB, image_size=8)
    assert open_box(tmp_path / "b.onnx", RGB, image_size=8, output="logits").answer(some(2)).shape == (2, 3)
    with pytest.raises(UsageError, match="takes pixels of 8 bits as they are"):
        open_box(write(tmp_path / "c.onnx", ["n", 8, 8, 3], TensorProto.UINT8), RGB, image_size=8, mean="0,0,0")
    with pytest.raises(UsageError, match=r"expected one input of images \[N, 3, H, W\]"):
        open_box(write(tmp_path / "d.onnx", ["n", 3, 8, 8], TensorProto.INT64), RGB, image_size=8)
    (tmp_path / "e.onnx").write_bytes(b"no model")
    with pytest.raises(CounterlensError, match=r"e\.onnx: ONNX Runtime cannot open it"):
        open_box(tmp_path / "e.onnx", RGB, image_size=8)
    with pytest.raises(UsageError, match="classifier_retries: has no use"):
        open_box(tmp_path / "a.onnx", RGB, image_size=8, retries=2)
