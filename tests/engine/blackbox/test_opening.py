"""`--classifier model.onnx`: guides where its gradient is shown to be right, is asked where it is not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterlens.engine import Config, Engine
from counterlens.engine.blackbox.box import as_box, open_box
from counterlens.engine.blackbox.opening import open_called
from counterlens.engine.blackbox.options import BoxOptions
from counterlens.engine.cli.opening import EngineOptions
from counterlens.engine.cli.serve import _open
from counterlens.engine.errors import UsageError
from counterlens.engine.images.files import save_png
from counterlens.engine.models.onnx_classifier import conversion_of
from counterlens.engine.packs import Pack
from tests.engine.blackbox.conftest import LABELS
from tests.engine.cli.test_cli import one_line_error, run


def export(module: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.zeros(2, 3, 32, 32, dtype=dtype),), path, dynamo=False, input_names=["pixels"],
            dynamic_axes={"pixels": {0: "batch"}},
        )  # fmt: skip
    return path


class Bytes(nn.Module):
    """Takes pixels of 8 bits and says probabilities."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float() / 255).softmax(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack's `clean` as a file, and as one that takes pixels of 8 bits."""
    out = tmp_path_factory.mktemp("onnx")
    clean = Pack("digits").classifier("clean").module
    export(clean, out / "clean.onnx")
    export(Bytes(clean), out / "bytes.onnx", torch.uint8)
    return out


def test_a_file_guides_as_the_module_that_it_was(folder: Path) -> None:
    """A whole counterfactual through the file, and through the pack's own module."""
    with pytest.warns(UserWarning, match=r"clean\.onnx: pixels are given to it in \[0, 1\].*its scores are logits"):
        engine = Engine.from_pretrained("digits", folder / "clean.onnx")
    assert as_box(engine.classifier) is None
    own = Engine.from_pack("digits")
    images = Pack("digits").samples("test", count=3).images
    config = engine.config.model_copy(update={"speed": "fast"})
    for mine, theirs in zip(
        engine.counterfactual(images, config=config), own.counterfactual(images, config=config), strict=True
    ):
        assert (mine.target, mine.flipped) == (theirs.target, theirs.flipped)
        assert (mine.image - theirs.image).abs().max() <= 2 / 255


def test_what_has_no_gradient_is_asked_and_says_why(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"bytes\.onnx is asked as a black box: it takes 8-bit pixels"):
        opened = open_called(folder / "bytes.onnx", LABELS, image_size=32)
    assert as_box(opened) is not None
    with pytest.raises(UsageError, match=r"bytes\.onnx can only be called.* \(it takes 8-bit pixels"):
        open_called(folder / "bytes.onnx", LABELS, image_size=32, options=BoxOptions(convert="always"))


def test_a_file_is_a_box_where_one_is_asked_for(folder: Path) -> None:
    options: dict[str, Any] = {"output": "logits"}
    for more in ({"convert": "never"}, {"max_queries": 1000}):
        asked = BoxOptions(**options, **more)
        assert as_box(open_called(folder / "clean.onnx", LABELS, image_size=32, options=asked)) is not None
    box = open_box(folder / "clean.onnx", LABELS, image_size=32, options=BoxOptions(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_called(folder / "clean.onnx", LABELS, image_size=32)
    images = Pack("digits").samples("test", count=5).images
    assert torch.allclose(opened.logits(images).softmax(1), box.logits(images).softmax(1), atol=1e-4)
    assert conversion_of(box) is None


def test_a_server_keeps_no_answers_of_a_file_that_is_not_asked(folder: Path, tmp_path: Path) -> None:
    opening = EngineOptions(classifier=str(folder / "clean.onnx"))
    refused = pytest.raises(UsageError, match=r"answers: .* --classifier-convert never")
    with pytest.warns(UserWarning, match="its scores are logits"), refused:
        _open(Config(), opening, [], BoxOptions(), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_mean_and_std_are_of_the_pixels(folder: Path) -> None:
    asked = BoxOptions(mean="0.1,0.2,0.3", std="0.5,0.5,0.5")
    with pytest.warns(UserWarning, match="its scores are logits") as warned:
        opened = open_called(folder / "clean.onnx", LABELS, image_size=32, options=asked)
    assert "pixels are given" not in str(warned[0].message)  # nothing is assumed of them
    images = Pack("digits").samples("test", count=2).images
    normal = (images - torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1)) / 0.5
    assert torch.allclose(opened.logits(images), Pack("digits").classifier("clean").module(normal), atol=1e-4)


@pytest.mark.slow
def test_a_judge_of_an_audit_is_read_as_the_classifier_is(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow (pip install '.[audit]')")
    assert run("samples", "--count", 2, "--out", tmp_path / "digits").returncode == 0
    done = run("audit", tmp_path / "digits", "--judge", folder / "clean.onnx", "--no-report", "--shortcuts", 0,
               "--no-insight", "--speed", "turbo", "--out", tmp_path / "audit")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "judge confirms: 100.0%" in done.stdout + done.stderr


def test_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    assert run("samples", "--count", 2, "--out", tmp_path / "digits").returncode == 0
    words = ["counterfactual", tmp_path / "digits", "--speed", "fast", "--out", tmp_path / "out", "--classifier"]
    one_line_error(run(*words, folder / "none.onnx"), 2, "none.onnx", "no such file")
    one_line_error(run(*words, folder / "bytes.onnx"), 2, "can only be called", "8-bit pixels", "surrogate")
    one_line_error(run(*words, folder / "clean.onnx", "--labels", "a,b"), 2, "labels: 2 names for the 10")
    one_line_error(run(*words, folder / "clean.onnx", "--classifier-convert", "never"), 2, "can only be called")
    one_line_error(run(*words, folder / "clean.onnx", "--classifier-scores", "x"), 2, "no output 'x'")
    one_line_error(run(*words, folder / "clean.onnx", "--classifier-timeout", 3), 2, "classifier_timeout: has no use")
    assert not (tmp_path / "out").exists()
    done = run(*words, folder / "clean.onnx")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["flipped"] for row in rows] == [True, True]
    assert rows[0]["classifier"].endswith("clean.onnx")


class Half(nn.Module):
    """Computes a part in half precision, as mixed precision is exported: bright channels go beyond what that holds."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.mean(dim=(2, 3)) * 90_000).half().float() * 1e-5
        return (4 * torch.tanh(bright)).softmax(1)


class Contrast(nn.Module):
    """Divides by the contrast around, whose root has no slope where an image is flat."""

    def forward(self, x: Tensor) -> Tensor:
        around = nn.functional.avg_pool2d(x, 4)
        contrast = (nn.functional.avg_pool2d(x.square(), 4) - around.square()).clamp_min(0).sqrt()
        return 5 * (around / (contrast + 0.1)).mean(dim=(2, 3))


RGB = ["red", "green", "blue"]


def test_what_differs_on_the_users_images_alone_is_a_box(tmp_path: Path) -> None:
    red = torch.zeros(2, 3, 32, 32)
    red[:, 0] = 0.97
    half, contrast = export(Half(), tmp_path / "half.onnx"), export(Contrast(), tmp_path / "contrast.onnx")
    for path, said in (
        (half, r"what was made of it differs from ONNX Runtime by .*% of its scores on your images"),
        (contrast, "its gradient is NaN or infinite on your images"),
    ):
        for images in (None, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))):
            with pytest.warns(UserWarning, match="pixels are given"):
                assert as_box(open_called(path, RGB, image_size=32, images=images)) is None
        with pytest.raises(UsageError, match=f"can only be called.*{said}"):
            open_called(path, RGB, image_size=32, images=red, options=BoxOptions(convert="always"))
    with pytest.warns(
        UserWarning, match=r"half\.onnx is asked as a black box: what was made of it differs .* on your images"
    ):
        box = as_box(open_called(half, RGB, image_size=32, images=lambda size: red[:, :, :size, :size]))
    assert box is not None
    red[1] = torch.nan  # an image of which the file itself says nothing
    with pytest.warns(UserWarning, match="pixels are given"):
        opened = open_called(half, RGB, image_size=32, images=red[1:])
    assert as_box(opened) is None
    found = conversion_of(opened)
    assert found is not None
    assert found.images == 4


def test_commands_compare_on_their_own_images(tmp_path: Path) -> None:
    half, photos = export(Half(), tmp_path / "half.onnx"), tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"no picture")
    save_png(torch.tensor([0.97, 0.1, 0.2]).reshape(3, 1, 1).expand(3, 32, 32), photos / "b.png", {})
    of = ["--classifier", half, "--labels", "red,green,blue"]
    done = run("saliency", photos, *of, "--image-size", 32, "--method", "ablation", "--out", tmp_path / "out")
    assert done.returncode == 1  # of a.png alone
    assert "half.onnx is asked as a black box" in done.stderr
    assert "on your images" in done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()
              if '"done"' in line]  # fmt: skip
    assert Path(row["image"]).name == "b.png"
    for command, *more in (
        ["counterfactual", photos, "--labels", "0,1,2"],
        ["evaluate", "--images", photos, *of[2:], "--image-size", 32, "--methods", "gradcam"],
        ["audit", photos, "--labels", "0,1,2", "--no-counterfactuals", "--saliency", "ig"],
    ):
        other = half.with_name(f"{command}.onnx")  # one warning is shown once in a process
        other.write_bytes(half.read_bytes())
        done = run(command, *more, "--classifier", other, "--out", tmp_path / "more")
        assert done.returncode == 2, done.stderr
        assert "on your images" in done.stderr
