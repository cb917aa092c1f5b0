"""ONNX classifiers opened as differentiable ones: the same gradient as the module that was exported, or a reason."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models import onnx_operators
from counterlens.engine.models.norms import PlainNorms
from counterlens.engine.models.onnx_classifier import conversion_of, natural_images, open_onnx_classifier
from counterlens.engine.models.onnx_operators import NoGradient
from counterlens.engine.models.protocols import probabilities

SIZE = 12
LABELS = ["circle", "square", "cross"]


class Small(nn.Module):
    """Convolutions, a norm, attention over places, a linear layer; `ending` is what its scores go through."""

    def __init__(self, ending: str = "", scores: int = 3, channels: int = 3, mean: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.last, self.ending, self.mean = nn.Linear(8, scores), ending, mean
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        for parameter in self.parameters():
            parameter.data.mul_(2)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.first(x - self.mean)))
        t = x.flatten(2).transpose(1, 2)
        t = t + torch.softmax(self.query(t) @ self.key(t).transpose(1, 2), -1) @ self.value(t)
        out = self.last(t.mean(dim=1))
        if self.ending == "softmax by hand":
            return out.exp() / out.exp().sum(dim=1, keepdim=True)
        return {"softmax": out.softmax(1), "sigmoid": out.sigmoid(), "log": out.log_softmax(1)}.get(self.ending, out)


class Last(nn.Module):
    """Channels last."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.permute(0, 3, 1, 2))


def export(module: nn.Module, path: Path, shape: tuple[int, ...] = (2, 3, SIZE, SIZE), **options: Any) -> Path:
    """By torch's older exporter, which needs no package more; with an open batch unless `fixed`."""
    axes = None if options.pop("fixed", False) else {"pixels": {0: "batch"}}
    dtype = options.pop("dtype", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.zeros(shape, dtype=dtype),), path, dynamo=False, input_names=["pixels"],
            dynamic_axes=axes, **options,
        )  # fmt: skip
    return path


def same_gradient(classifier: Any, module: nn.Module, tolerance: float = 1e-4, batch: int = 3) -> None:
    """Logits up to a constant, and gradients of log-probabilities, are those of a module that gives logits."""
    images = natural_images(SIZE, batch)
    target = torch.arange(batch) % len(classifier.labels)
    leaf, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    mine = torch.autograd.grad(classifier.log_prob(leaf, target).sum(), leaf)[0]
    with PlainNorms():  # torch's own gradient of a batch norm is wrong for one image
        logits = module(other)
    log_p = logits.log_softmax(1) if classifier.link == "softmax" else F.logsigmoid(logits)
    theirs = torch.autograd.grad(log_p.gather(1, target[:, None]).sum(), other)[0]
    assert theirs.abs().max() > 1e-4
    assert ((mine - theirs).abs().max() / theirs.abs().max()).item() <= tolerance


@pytest.mark.parametrize("ending", ["", "softmax", "log", "softmax by hand"])
def test_a_softmax_at_the_end_is_no_part_of_the_logits(ending: str, tmp_path: Path) -> None:
    path = export(Small(ending), tmp_path / "m.onnx")
    classifier = open_onnx_classifier(path, image_size=SIZE, labels=LABELS)
    same_gradient(classifier, Small(), 1e-3 if "hand" in ending else 1e-4)
    images = natural_images(SIZE, 2)
    assert torch.allclose(probabilities(classifier, images), Small()(images).softmax(1), atol=1e-6)
    found = conversion_of(classifier)
    assert found is not None
    assert found.forward < 1e-5
    assert found.gradient < 0.02
    said = " ".join(found.assumed)
    assert {"": "its scores are logits", "softmax": "it ends in a softmax", "log": "it ends in a log-softmax",
            "softmax by hand": "its scores sum to 1"}[ending] in said  # fmt: skip
    assert "pixels are given to it in [0, 1]" in said


def test_a_sigmoid_at_the_end_means_labels_that_do_not_exclude_each_other(tmp_path: Path) -> None:
    classifier = open_onnx_classifier(export(Small("sigmoid"), tmp_path / "m.onnx"), image_size=SIZE, labels=LABELS)
    assert classifier.link == "sigmoid"
    same_gradient(classifier, Small())
    with pytest.raises(UsageError, match="ends in a sigmoid, which does not fit 'softmax'"):
        open_onnx_classifier(tmp_path / "m.onnx", image_size=SIZE, labels=LABELS, output="softmax")


def test_one_score_is_a_binary_classifier(tmp_path: Path) -> None:
    path = export(Small("sigmoid", scores=1), tmp_path / "m.onnx")
    classifier = open_onnx_classifier(path, image_size=SIZE, labels=["no", "yes"])
    images = natural_images(SIZE, 2)
    assert torch.allclose(probabilities(classifier, images)[:, 1:], Small(scores=1)(images).sigmoid(), atol=1e-6)


def test_channels_last_and_other_sizes(tmp_path: Path) -> None:
    path = export(Last(Small()), tmp_path / "m.onnx", (2, SIZE, SIZE, 3))
    same_gradient(open_onnx_classifier(path, image_size=SIZE, labels=LABELS), Small())
    # Images of another size are resized to the file's.
    assert open_onnx_classifier(path, image_size=16, labels=LABELS).logits(torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_grey_pictures(tmp_path: Path) -> None:
    path = export(Small(channels=1), tmp_path / "m.onnx", (2, 1, SIZE, SIZE))
    classifier = open_onnx_classifier(path, image_size=SIZE, labels=LABELS)
    images = natural_images(SIZE, 2)
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(classifier.logits(images), Small(channels=1)(grey), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_runs_at_any(batch: int, tmp_path: Path) -> None:
    """The exporter writes the batch into the graph's shapes."""
    path = export(Small(), tmp_path / "m.onnx", (batch, 3, SIZE, SIZE), fixed=True)
    classifier = open_onnx_classifier(path, image_size=SIZE, labels=LABELS)
    for count in (1, 3):
        same_gradient(classifier, Small(), batch=count)


def test_shapes_that_hold_the_batch_are_mapped_over_the_images(tmp_path: Path) -> None:
    class Rows(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(1, 3, SIZE, SIZE)).reshape(1, 3)

    path = export(Rows(), tmp_path / "m.onnx", (1, 3, SIZE, SIZE), fixed=True)
    classifier = open_onnx_classifier(path, image_size=SIZE, labels=LABELS)
    same_gradient(classifier, Small())
    found = conversion_of(classifier)
    assert found is not None
    assert any("batches of 1 alone" in said for said in found.assumed)


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    path = export(Small().half(), tmp_path / "m.onnx", dtype=torch.float16)
    classifier = open_onnx_classifier(path, image_size=SIZE, labels=LABELS)
    assert {p.dtype for p in classifier.module.parameters()} == {torch.float32}
    same_gradient(classifier, Small().half().float(), 2e-2)


def test_preprocessing_is_given_or_lies_beside_the_file(tmp_path: Path) -> None:
    path = export(Small(mean=0.5), tmp_path / "m.onnx", (2, 3, 10, 10))
    options: Any = {"image_size": SIZE, "labels": LABELS}
    given = open_onnx_classifier(
        path, preprocessing={"resize": 10, "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3}, **options
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 10, "width": 10},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3,
    }))  # fmt: skip
    beside = open_onnx_classifier(path, **options)
    images = natural_images(SIZE, 2)
    assert torch.allclose(given.logits(images), beside.logits(images), atol=1e-4)
    assert not torch.allclose(given.logits(images), Small(mean=0.5)(images), atol=1e-2)
    with pytest.raises(UsageError, match=r"takes 10x10 pixels, what stands before it makes 8x8"):
        open_onnx_classifier(path, preprocessing={"resize": 8}, **options)


def test_labels_are_in_the_file_or_beside_it(tmp_path: Path) -> None:
    path = export(Small(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"labels: .* names none; give 3, one for each of its scores"):
        open_onnx_classifier(path, image_size=SIZE)
    with pytest.raises(UsageError, match="labels: 2 names for the 3"):
        open_onnx_classifier(path, image_size=SIZE, labels=["a", "b"])
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "x", "1": "y", "2": "z"}}))
    assert open_onnx_classifier(path, image_size=SIZE).labels == ["x", "y", "z"]
    (tmp_path / "onnx").mkdir()
    below = export(Small(), tmp_path / "onnx" / "m.onnx")
    assert open_onnx_classifier(below, image_size=SIZE).labels == ["x", "y", "z"]
    model = onnx.load(path)
    for text in ("{0: 'a', 1: 'b', 2: 'c'}", '["a", "b", "c"]', "a, b, c", "a\nb\nc", '{"2": "c", "0": "a", "1": "b"}'):
        del model.metadata_props[:]
        helper.set_model_props(model, {"names": text})
        onnx.save(model, path)
        assert open_onnx_classifier(path, image_size=SIZE).labels == ["a", "b", "c"]


def test_of_several_outputs_one_is_named(tmp_path: Path) -> None:
    class Two(Small):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), super().forward(-x)

    path = export(Two(), tmp_path / "m.onnx", output_names=["one", "two"])
    options: Any = {"image_size": SIZE, "labels": LABELS}
    with pytest.raises(UsageError, match=r"scores: .* has the outputs one float32 \[.*\], two .*; say which"):
        open_onnx_classifier(path, **options)
    with pytest.raises(UsageError, match="has no output 'three'; it has one, two"):
        open_onnx_classifier(path, scores="three", **options)
    classifier = open_onnx_classifier(path, scores="two", **options)
    images = natural_images(SIZE, 2)
    assert torch.allclose(classifier.logits(images), Small()(-images), atol=1e-5)


def test_eight_bit_pixels_are_a_black_box(tmp_path: Path) -> None:
    class Bytes(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    path = export(Bytes(), tmp_path / "m.onnx", dtype=torch.uint8)
    with pytest.raises(NoGradient, match="it takes 8-bit pixels, and rounding to them has no gradient"):
        open_onnx_classifier(path, image_size=SIZE, labels=LABELS)


def test_quantised_files_and_labels_alone_are_black_boxes(tmp_path: Path) -> None:
    class Choice(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1, keepdim=True).float()

    path = export(Choice(), tmp_path / "m.onnx")
    with pytest.raises(NoGradient, match=r"steps, whose gradient is zero everywhere \(ArgMax\)"):
        open_onnx_classifier(path, image_size=SIZE, labels=["a", "b"])
    plain = onnx.load(export(Small(), tmp_path / "plain.onnx"))
    plain.graph.initializer.append(numpy_helper.from_array(np.float32(0.02), "scale"))
    plain.graph.initializer.append(numpy_helper.from_array(np.int8(0), "point"))
    plain.graph.node.insert(0, helper.make_node("QuantizeLinear", ["pixels", "scale", "point"], ["q"]))
    plain.graph.node.insert(1, helper.make_node("DequantizeLinear", ["q", "scale", "point"], ["dq"]))
    conv = next(node for node in plain.graph.node if node.op_type == "Conv")
    conv.input[0] = "dq"
    onnx.save(plain, path)
    with pytest.raises(NoGradient, match=r"it is quantised, and rounding has no gradient \(QuantizeLinear\)"):
        open_onnx_classifier(path, image_size=SIZE, labels=LABELS)


def test_a_wrong_operator_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime is the oracle: of the scores, and of a gradient whose scores are right."""
    path = export(Small(), tmp_path / "m.onnx")
    right = onnx_operators.CAN["Gelu"]
    monkeypatch.setitem(onnx_operators.CAN, "Gelu", lambda a, *x: 1.1 * right(a, *x))
    with pytest.raises(NoGradient, match="what was made of it differs from ONNX Runtime by"):
        open_onnx_classifier(path, image_size=SIZE, labels=LABELS)

    def cut(a: Any, *x: Any) -> Tensor:
        out = right(a, *x)
        return out + 0.3 * (x[0] - x[0].detach())

    monkeypatch.setitem(onnx_operators.CAN, "Gelu", cut)
    with pytest.raises(NoGradient, match="along one direction, where ONNX Runtime's scores say"):
        open_onnx_classifier(path, image_size=SIZE, labels=LABELS)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = export(Small(), tmp_path / "m.onnx")
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    options: Any = {"image_size": SIZE, "labels": LABELS}
    same_gradient(open_onnx_classifier(path, **options), Small())
    (tmp_path / "m.onnx.data").write_bytes((tmp_path / "m.onnx.data").read_bytes()[:-40])
    with pytest.raises(CounterlensError, match=r"external data of '.*': m.onnx.data has \d+ bytes, not \d+"):
        open_onnx_classifier(path, **options)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(CounterlensError, match="is missing; keep it beside the model"):
        open_onnx_classifier(path, **options)


def outside(model: Any, location: str) -> None:
    weight = model.graph.initializer[0]
    weight.ClearField("float_data")
    weight.raw_data = b""
    onnx.external_data_helper.set_external_data(weight, location, length=32)
    weight.ClearField("raw_data")


def swollen(model: Any) -> None:
    model.graph.initializer[0].dims[0] = 2**40


def bomb(model: Any) -> None:
    """A few bytes that constant folding would make 4 TB of."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**20, 2**20]), "huge"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    model.graph.node.insert(0, helper.make_node("Expand", ["zero", "huge"], ["swollen"]))
    model.graph.node.insert(1, helper.make_node("ReduceMax", ["swollen"], ["small"]))
    last = model.graph.node[-1]
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Add", ["before", "small"], [model.graph.output[0].name]))


def looped(model: Any) -> None:
    next(node for node in model.graph.node if node.input).input[0] = "nothing that anybody makes"


def untrusted(change: Callable[[Any], object], tmp_path: Path) -> Path:
    """A file that was changed, in a folder beside which something secret lies."""
    (tmp_path / "secret").write_bytes(bytes(32))
    (tmp_path / "sub").mkdir()
    model = onnx.load(export(Small(), tmp_path / "m.onnx"))
    change(model)
    path = tmp_path / "sub" / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: outside(m, "../secret"), "refused: '../secret' lies outside the model's folder"),
        (lambda m: outside(m, "/etc/passwd"), "refused: '/etc/passwd' lies outside the model's folder"),
        (swollen, r"would be \d+ bytes, the file holds"),
        (bomb, r"Expand of its weights: \d+ bytes would become \d+"),
        (looped, "not a valid ONNX file: nothing makes 'nothing that anybody makes'"),
    ],
)
def test_files_that_nobody_should_trust(change: Any, said: str, tmp_path: Path) -> None:
    path = untrusted(change, tmp_path)
    with pytest.raises(CounterlensError, match=said) as caught:
        open_onnx_classifier(path, image_size=SIZE, labels=LABELS)
    assert not isinstance(caught.value, NoGradient)
    assert "\n" not in str(caught.value)


def damaged(whole: bytes, seed: int) -> bytes:
    """A file with a few bytes changed, or with one thing in its graph that makes no sense."""
    chance = random.Random(seed)
    if seed % 2:
        content = bytearray(whole)
        for _ in range(chance.choice([1, 2, 8])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        return bytes(content)
    model = onnx.load_from_string(whole)
    node, weight = chance.choice(model.graph.node), chance.choice(model.graph.initializer)
    match chance.randrange(6):
        case 0:
            node.op_type = chance.choice(["Relu", "Conv", "Split", "Slice", "Loop", "Foo", "TopK", "Pad", "Constant"])
        case 1 if node.input:
            node.input.remove(chance.choice(node.input))
        case 2 if node.attribute:
            del node.attribute[0]
        case 3 if node.attribute and node.attribute[0].ints:
            node.attribute[0].ints[0] = chance.choice([-1, 0, 7, 2**40])
        case 4:
            weight.dims[0] = chance.choice([0, 1, -1, 2**50])
        case _:
            size = model.graph.input[0].type.tensor_type.shape.dim[chance.randrange(4)]
            size.dim_value = chance.choice([1, 3, 7, 2**31])
    return model.SerializeToString()


def test_damaged_files_open_or_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = export(Small(), tmp_path / "m.onnx").read_bytes()
    path, refused = tmp_path / "damaged.onnx", list[str]()
    for seed in range(40):
        path.write_bytes(damaged(whole, seed))
        try:
            open_onnx_classifier(path, image_size=SIZE, labels=LABELS)
        except CounterlensError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert not [said for said in refused if "\n" in said]


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    whole = export(Small(), tmp_path / "m.onnx").read_bytes()
    path = tmp_path / "bad.onnx"
    for content in (b"", b"\x89PNG\r\n" * 40, whole[: len(whole) // 2], b"{}", bytes(500)):
        path.write_bytes(content)
        with pytest.raises(CounterlensError, match=r"bad\.onnx") as caught:
            open_onnx_classifier(path, image_size=SIZE, labels=LABELS)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no such file"):
        open_onnx_classifier(tmp_path / "none.onnx", image_size=SIZE, labels=LABELS)


def test_inputs_that_are_no_pictures(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["B", 7])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["B", 7])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"its input is x int64 \[\?, 7\]; expected pictures"):
        open_onnx_classifier(tmp_path / "m.onnx", image_size=SIZE, labels=LABELS)
