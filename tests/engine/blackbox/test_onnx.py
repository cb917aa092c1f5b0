"""ONNX files that are called: layouts, types, sizes and batches as the file has them."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from counterlens.engine.blackbox.box import as_box, open_box
from counterlens.engine.blackbox.opening import open_called
from counterlens.engine.blackbox.options import BoxOptions
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.onnx_file import read_onnx
from counterlens.engine.models.preprocessing import Preprocessing
from counterlens.engine.models.processors import geometry_of
from counterlens.engine.models.protocols import probabilities
from tests.engine.blackbox.test_box import some
from tests.engine.models.test_onnx_classifier import Small, bomb, damaged, export, looped, outside, untrusted

pytestmark = pytest.mark.filterwarnings("ignore:.*pixels are given to it in")
RGB = ["red", "green", "blue"]


def write(
    path: Path,
    shape: list[int | str],
    kind: int = TensorProto.FLOAT,
    *,
    softmax: bool = True,
    end: str = "",
    more: list[onnx.NodeProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
) -> Path:
    """A file that says how red, green and blue an image is: the softmax of its channels' means, or another `end`.

    `more` nodes follow, and `outputs` instead of that one.
    """
    axes, end = [1, 2] if shape[-1] == 3 else [2, 3], end or ("Softmax" if softmax else "Identity")
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=axes, keepdims=0),
        helper.make_node(end, ["mean"], ["p"], **({"axis": 1} if "Softmax" in end else {})),
        *(more or []),
    ]
    graph = helper.make_graph(
        nodes, "rgb", [helper.make_tensor_value_info("image", kind, shape)],
        outputs or [helper.make_tensor_value_info("p", TensorProto.FLOAT, [shape[0], 3])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
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
    model = onnx.load(write(tmp_path / "rgb.onnx", ["n", 3, "h", "w"], softmax=False))
    model.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["n", 3]))
    onnx.save(model, tmp_path / "two.onnx")
    asked = [("p", 8), ("mean", 8), ("p", 9)]
    boxes = [open_box(tmp_path / "two.onnx", RGB, image_size=n, scores=s, output="logits") for s, n in asked]
    assert len({box.identity for box in boxes}) == 3


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"labels: 2 names for the 3 of .*a\.onnx"):
        open_box(write(tmp_path / "a.onnx", ["n", 3, 8, 8]), RGB[:2], image_size=8)
    with pytest.raises(CounterlensError, match="--classifier-output logits"):
        open_box(write(tmp_path / "b.onnx", ["n", 3, 8, 8], softmax=False), RGB, image_size=8)
    assert open_box(tmp_path / "b.onnx", RGB, image_size=8, output="logits").answer(some(2)).shape == (2, 3)
    with pytest.raises(UsageError, match="takes pixels of 8 bits as they are"):
        open_box(write(tmp_path / "c.onnx", ["n", 8, 8, 3], TensorProto.UINT8), RGB, image_size=8, mean="0,0,0")
    with pytest.raises(UsageError, match=r"its input is image int64 \[\?, 3, 8, 8\]; expected pictures as"):
        open_box(write(tmp_path / "d.onnx", ["n", 3, 8, 8], TensorProto.INT64), RGB, image_size=8)
    (tmp_path / "e.onnx").write_bytes(b"no model")
    with pytest.raises(CounterlensError, match=r"e\.onnx: not an ONNX file"):
        open_box(tmp_path / "e.onnx", RGB, image_size=8)
    with pytest.raises(UsageError, match="classifier_retries: has no use"):
        open_box(tmp_path / "a.onnx", RGB, image_size=8, retries=2)


CONFIG = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 6, "width": 6}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.2] * 3,
}  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("shape", "kind", "end", "said"),
    [
        (["n", 3, 6, 6], TensorProto.FLOAT, "Softmax", None),
        ([4, 6, 6, 3], TensorProto.FLOAT, "Sigmoid", None),
        (["n", 6, 6, 3], TensorProto.DOUBLE, "LogSoftmax", None),
        ([1, 3, 6, 6], TensorProto.FLOAT16, "Identity", "logits"),
        (["n", 3, 6, 6], TensorProto.FLOAT, "Neg", "independent"),
    ],
)
def test_a_file_that_is_asked_means_what_it_means_as_one_that_guides(
    shape: list[int | str], kind: int, end: str, said: Any, beside: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "rgb.onnx", shape, kind, end=end)
    model = onnx.load(path)
    helper.set_model_props(model, {"names": "red, green, blue"})
    onnx.save(model, path)
    if beside:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    options = {} if said is None else {"output": said}
    pixels = torch.from_numpy(some(5)).permute(0, 3, 1, 2) / 255
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        box, guides = (
            open_called(path, [], image_size=8, options=BoxOptions(convert=convert, **options))
            for convert in ("never", "always")
        )
    assert as_box(box) is not None
    assert box.labels == guides.labels == RGB
    assert box.link == guides.link
    half = kind == TensorProto.FLOAT16
    assert torch.allclose(probabilities(box, pixels), probabilities(guides, pixels), atol=2e-3 if half else 1e-5)


def test_pictures_that_are_not_square_are_fitted_as_for_one_that_guides(tmp_path: Path) -> None:
    path, cut = write(tmp_path / "rgb.onnx", ["n", 3, 6, 6]), {"resize": 8, "crop": 6}
    box, guides = (
        open_called(path, RGB, image_size=8, options=BoxOptions(convert=convert), preprocessing=cut)
        for convert in ("never", "always")
    )
    assert geometry_of(box) == geometry_of(guides) == "crop"
    wide = torch.rand(2, 3, 8, 13, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(probabilities(box, wide), probabilities(guides, wide), atol=2e-3)  # rounded to 8 bits


def test_pixels_of_8_bits_are_resized_and_left_to_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rgb.onnx", ["n", 6, 6, 3], TensorProto.UINT8)
    resized = (Preprocessing(8, resize=6)(torch.from_numpy(some(3)).permute(0, 3, 1, 2) / 255) * 255).round()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    with pytest.warns(UserWarning, match="it takes 8-bit pixels, so mean and std of its preprocessor_config.json"):
        box = open_box(path, RGB, image_size=8)
    assert torch.allclose(torch.from_numpy(box.answer(some(3))), resized.mean((2, 3)).softmax(1), atol=1e-3)


def values(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def test_maps_and_labels_alone_as_scikit_learn_exports_them(tmp_path: Path) -> None:
    choice = helper.make_node("ArgMax", ["p"], ["place"], axis=1, keepdims=0)
    label = values("place", TensorProto.INT64, "n")
    for n, names in enumerate(({"classlabels_strings": ["blue", "red", "green"]}, {"classlabels_int64s": [0, 1, 2]})):
        kind = TensorProto.STRING if n == 0 else TensorProto.INT64
        zipped = helper.make_node("ZipMap", ["p"], ["maps"], domain="ai.onnx.ml", **names)
        of = helper.make_map_type_proto(kind, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        maps = helper.make_value_info("maps", helper.make_sequence_type_proto(of))
        path = write(tmp_path / f"{n}.onnx", [2, 3, 8, 8], more=[choice, zipped], outputs=[label, maps])
        with pytest.warns(UserWarning, match=r"as a black box: it answers with maps of labels to scores"):
            box = as_box(open_called(path, RGB, image_size=8))
        assert box is not None
        assert not box.hard
        order = [1, 2, 0] if n == 0 else [0, 1, 2]
        assert torch.allclose(torch.from_numpy(box.answer(some(5))), expected(some(5))[:, order], atol=1e-5)
    with pytest.warns(UserWarning, match="as a black box: it answers with labels alone"):
        box = as_box(open_called(write(tmp_path / "c.onnx", ["n", 3, 8, 8], more=[choice], outputs=[label]), RGB,
                                 image_size=8))  # fmt: skip
    assert box is not None
    assert box.hard
    assert box.answer(some(5)).argmax(1).tolist() == expected(some(5)).argmax(1).tolist()
    # Where there are scores as well, these are asked for.
    both = write(tmp_path / "d.onnx", ["n", 3, 8, 8], more=[choice], outputs=[label, values("p", 1, "n", 3)])
    assert not open_box(both, RGB, image_size=8).hard
    assert open_box(both, RGB, image_size=8, scores="place").hard


def test_a_size_that_is_open_is_no_number_of_labels(tmp_path: Path) -> None:
    twice = helper.make_node("Concat", ["p", "p"], ["features"], axis=1)
    outputs = [values("p", 1, "n", 3), values("features", 1, "n", "k")]
    path = write(tmp_path / "m.onnx", ["n", 3, 8, 8], more=[twice], outputs=outputs)
    with pytest.raises(UsageError, match=r"m\.onnx has the outputs .*; say which holds a score for each label"):
        read_onnx(path)
    assert read_onnx(path, labels=3).output == "p"


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_logits_of_any_size_are_probabilities(tmp_path: Path) -> None:
    far = helper.make_node("Mul", ["p", "thousand"], ["far"])
    thousand = helper.make_node("Constant", [], ["thousand"], value_float=-1000.0)
    path = write(tmp_path / "m.onnx", ["n", 3, 8, 8], end="Identity", more=[thousand, far],
                 outputs=[values("far", 1, "n", 3)])  # fmt: skip
    box = open_box(path, RGB, image_size=8, output="independent")
    assert (box.answer(some(2) // 2 + 100) == 0).all()


def test_preprocessing_stays_where_a_file_turns_out_to_be_a_box(tmp_path: Path) -> None:
    choice = helper.make_node("ArgMax", ["p"], ["place"], axis=1, keepdims=0)
    path = write(tmp_path / "m.onnx", ["n", 3, 8, 8], more=[choice], outputs=[values("place", TensorProto.INT64, "n")])
    with pytest.warns(UserWarning, match="as a black box"):
        box = as_box(open_called(path, RGB, image_size=8, preprocessing={"mean": [9, 0, 9], "std": [1, 1, 1]}))
    assert box is not None
    assert box.answer(some(5)).argmax(1).tolist() == [1] * 5
    with pytest.raises(UsageError, match="preprocessing: of an ONNX file"):
        open_box(lambda x: x, RGB, image_size=8, preprocessing={"mean": [9, 0, 9]})


def test_what_scores_are_is_said_of_both_alike(tmp_path: Path) -> None:
    soft, plain = write(tmp_path / "soft.onnx", ["n", 3, 8, 8]), tmp_path / "plain.onnx"
    write(plain, ["n", 3, 8, 8], end="Identity")
    sigmoid = write(tmp_path / "sigmoid.onnx", ["n", 3, 8, 8], end="Sigmoid")
    for path, output, message in (
        (soft, "logits", "ends in a softmax, so its answers are probabilities, not logits"),
        (soft, "independent", "ends in a softmax, so its answers are probabilities, not independent"),
        (sigmoid, "probabilities", "ends in a sigmoid, so its answers are independent, not probabilities"),
        (plain, "probabilities", "which are no probabilities; where that is meant, say --classifier-output logits"),
    ):
        for convert in ("never", "auto"):
            asked = BoxOptions(convert=convert, output=output)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match=message):
                open_called(path, RGB, image_size=8, options=asked)
    one = helper.make_node("ReduceSum", ["p"], ["one"], keepdims=1)
    score = write(tmp_path / "one.onnx", [1, 3, 8, 8], end="Identity", more=[one],
                  outputs=[values("one", TensorProto.FLOAT, 1, 1)])  # fmt: skip
    with pytest.raises(UsageError, match=r"nothing says whether the one score of .* is a probability"):
        open_box(score, ["no", "yes"], image_size=8)
    assert open_box(score, ["no", "yes"], image_size=8, output="logits").answer(some(2)).shape == (2, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: outside(m, "../secret"), "refused: '../secret' lies outside the model's folder"),
        (bomb, r"refused: Expand of its weights: \d+ bytes would become \d+"),
        (looped, "not a valid ONNX file: nothing makes 'nothing that anybody makes'"),
    ],
)
def test_a_file_that_is_only_asked_is_not_trusted_either(change: Any, said: str, tmp_path: Path) -> None:
    path = untrusted(change, tmp_path)
    with pytest.raises(CounterlensError, match=said) as caught:
        open_box(path, RGB, image_size=12)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_asked_or_refused_in_one_line(tmp_path: Path) -> None:
    whole, path = export(Small("softmax"), tmp_path / "m.onnx").read_bytes(), tmp_path / "damaged.onnx"
    refused = []
    for seed in [*range(30), 266, 284, 320]:  # the last ones say that a batch is of 2**31 images
        path.write_bytes(damaged(whole, seed))
        try:
            open_box(path, RGB, image_size=12)
        except CounterlensError as error:
            refused.append(str(error))
    assert sum("MB of pixels at once" in said for said in refused) >= 3
    assert not [said for said in refused if "\n" in said]


def test_weights_beside_a_file_are_part_of_what_it_is(tmp_path: Path) -> None:
    path = export(Small("softmax"), tmp_path / "m.onnx")
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    before = open_box(path, RGB, image_size=12).identity
    assert open_box(path, RGB, image_size=12).identity == before
    data = bytearray((tmp_path / "m.onnx.data").read_bytes())
    data[:4] = np.float32(0.5).tobytes()
    (tmp_path / "m.onnx.data").write_bytes(data)
    assert open_box(path, RGB, image_size=12).identity != before


def test_without_package_onnx_a_box_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rgb.onnx", ["n", 3, 8, 8])
    for module in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(CounterlensError, match=r"ONNX files need .*pip install .*onnxruntime.*\[cpu\]"):
                open_box(path, RGB, image_size=8)
