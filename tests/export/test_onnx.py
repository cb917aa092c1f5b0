"""ONNX files of functions that differentiate, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from counterlens.export import ExportError, export_onnx
from counterlens.export import onnx as our_onnx


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(out) for out in session.run(None, feed)]


def input_gradient(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The function and its vector-Jacobian product with a cotangent of varying entries."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y, pull = torch.func.vjp(net, x)
        return y, pull(torch.cos(y.detach()))[0]

    return fn


def assert_matches(
    fn: Callable[..., Any], make: Callable[[int], list[Tensor]], folder: Path, tolerance: float = 1e-4
) -> onnx.ModelProto:
    """Export once, compare at batch 1, 3 and 8 relative to each output's largest magnitude."""
    path = export_onnx(fn, make(2), folder / "model.onnx")
    for batch in (1, 3, 8):
        torch.manual_seed(batch)
        inputs = make(batch)
        expected = fn(*inputs)
        for a, b in zip(run(path, *inputs), expected, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30), f"batch {batch}"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "softmax along another than the last axis": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Softmax(1)), (3, 5)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1), nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1), nn.Upsample(scale_factor=2),
            nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.LogSoftmax(1),
        ),
        (3, 17, 15),
    ),
    "attention": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8),
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True),
            nn.Tanh(), nn.Linear(8, 3), nn.Softmax(-1),
        ),
        (5, 6),
    ),
    "resampling": (
        lambda: nn.Sequential(
            nn.Upsample(size=(9, 7), mode="bilinear"), nn.Conv2d(2, 3, 3), nn.Softplus(),
            nn.Upsample(size=(5, 4), mode="bicubic"), nn.ConstantPad2d((1, -1, 2, 0), 0.5), nn.LeakyReLU(0.1),
            nn.Upsample(size=(8, 6), mode="nearest"), nn.Hardswish(),
        ),
        (2, 6, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_gradients_match_at_every_batch(name: str, tmp_path: Path) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make().eval().requires_grad_(False)
    assert_matches(input_gradient(net), lambda b: [torch.randn(b, *shape)], tmp_path)


def test_indexing_and_its_gradient(tmp_path: Path) -> None:
    table = torch.randn(7, 4)

    def net(x: Tensor, i: Tensor) -> Tensor:
        picked = x.gather(1, i[:, None])[:, 0] + table[i].sum(1)
        return (x[:, 1:4:2] * x.flip(1)[:, :2]).sum(1) + x.roll(1, 1)[:, 0] * picked + x.cumsum(1)[:, -1]

    def fn(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        y, pull = torch.func.vjp(lambda v: net(v, i), x)
        return y, pull(torch.ones_like(y))[0]

    assert_matches(fn, lambda b: [torch.randn(b, 5), torch.randint(0, 5, (b,))], tmp_path)


def test_comparisons_and_whole_numbers(tmp_path: Path) -> None:
    def fn(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        positive = (x > 0) & ~(x >= 1) | (x == 0)
        return (
            torch.where(positive, x, -1.0), i // 3 + i * 2, x.clamp(-0.5, 0.5), x.amax(1), x.argmax(1).float(),
            positive.any(1).float(), torch.full_like(x, 2.0) / (i[:, None] + 1), x.remainder(0.7),
        )  # fmt: skip

    assert_matches(fn, lambda b: [torch.randn(b, 5), torch.randint(0, 9, (b,))], tmp_path)


def test_hessian_vector_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Tanh())
    net.requires_grad_(False)

    def fn(x: Tensor, v: Tensor) -> tuple[Tensor]:
        gradient = torch.func.grad(lambda y: net(y).square().sum())
        return (torch.func.jvp(gradient, (x,), (v,))[1],)

    assert_matches(fn, lambda b: [torch.randn(b, 2, 7, 7), torch.randn(b, 2, 7, 7)], tmp_path)


def test_gradient_of_the_weights(tmp_path: Path) -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        loss = lambda v: nn.functional.conv2d(x, v, stride=2, padding=1).square().sum()  # noqa: E731
        return (torch.func.grad(loss)(w),)

    weight = torch.randn(5, 3, 3, 3)
    assert_matches(fn, lambda b: [torch.randn(b, 3, 8, 8), weight], tmp_path)


def test_names_metadata_and_open_batch(tmp_path: Path) -> None:
    path = export_onnx(
        lambda image, scale: image * scale[:, None], [torch.ones(2, 3), torch.ones(2)], tmp_path / "a" / "m.onnx",
        output_names=["scaled"], metadata={"made": "here"},
    )  # fmt: skip
    model = onnx.load(path)
    assert [i.name for i in model.graph.input] == ["image", "scale"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].name == "scaled"
    assert [(p.key, p.value) for p in model.metadata_props] == [("made", "here")]
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.onnx"]


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_onnx, "EXTERNAL_ABOVE", 4000)
    net = nn.Linear(40, 30).requires_grad_(False)
    path = export_onnx(net, [torch.randn(2, 40)], tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size >= 4800
    x = torch.randn(3, 40)
    torch.testing.assert_close(run(path, x)[0], net(x))


def test_half_precision(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()).half().requires_grad_(False)
    path = export_onnx(input_gradient(net), [torch.randn(2, 8).half()], tmp_path / "m.onnx")
    x = torch.randn(3, 8).half()
    y, g = net.float()(x.float()), input_gradient(net)(x.float())[1]
    got = run(path, x)
    torch.testing.assert_close(got[0].float(), y, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(got[1].float(), g, atol=1e-2, rtol=1e-2)


def test_an_operation_without_onnx_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"aten\.linalg_qr\S* has no ONNX form here, at .*test_onnx\.py:\d+.*qr"):
        export_onnx(lambda x: torch.linalg.qr(x)[0], [torch.randn(2, 3, 3)], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_masks_as_indices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="value"):
        export_onnx(lambda x: x[x > 0], [torch.randn(2, 3)], tmp_path / "m.onnx")


def test_bad_names_and_opset(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset: expected 18 to 21, got 9"):
        export_onnx(lambda x: x * 2, [torch.randn(2)], tmp_path / "m.onnx", opset=9)
    with pytest.raises(ExportError, match="input_names: expected 1 different names"):
        export_onnx(lambda x: x * 2, [torch.randn(2)], tmp_path / "m.onnx", input_names=["a", "b"])
    with pytest.raises(ExportError, match="output_names: expected 1 names"):
        export_onnx(lambda x: x * 2, [torch.randn(2)], tmp_path / "m.onnx", output_names=["x"])
