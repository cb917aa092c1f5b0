"""A whole counterfactual as one file: the runner without PyTorch, bad input, and (slow) the file against the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from counterlens.engine.core.whole_run import MODEL, OUTPUTS
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.portable.file import CARD, CounterfactualFile
from counterlens.export.hashing import file_digest
from counterlens.export.program import Call, write_program

SIZE = 4
LABELS = ["dark", "bright", "crane", "crane"]


def answer(image: Tensor, target: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """A toy with every output of a run: the label says how bright an image is, and noise is added to get there."""
    usable = ((image >= 0) & (image <= 1)).to(image.dtype).flatten(1).amin(1) > 0
    bright = torch.where(usable[:, None, None, None], image, 0.0).mean((1, 2, 3))
    p = torch.stack([1 - bright, bright, bright * 0, bright * 0], 1)
    source = p.argmax(1)
    wanted = torch.where(target < 0, 1 - source, target)
    level = wanted.to(image.dtype)[:, None, None, None] + noise * 0.001
    changed = (level.clamp(0, 1).expand_as(image) * 255).round() / 255
    after = changed.mean((1, 2, 3))
    q = torch.stack([1 - after, after, after * 0, after * 0], 1)
    said = torch.where(usable, q.argmax(1), -1)
    l1 = (changed - image).abs().mean((1, 2, 3))
    return changed, torch.where(usable, source, -1), p, torch.where(usable, wanted, -1), said, q, l1, p[:, :1]


def write_toy(folder: Path, batch: int | None = None, **changes: Any) -> Path:
    count = batch or 5
    inputs = {
        "image": torch.rand(count, 3, SIZE, SIZE), "target": torch.zeros(count, dtype=torch.long),
        "noise": torch.randn(count, 1, SIZE, SIZE),
    }  # fmt: skip
    path = write_program(
        [Call(answer, tuple(inputs), tuple(OUTPUTS))],
        inputs,
        list(OUTPUTS),
        folder / MODEL,
        dynamic_batch=batch is None,
    )
    card = {
        "schema_version": 1, "what": "counterfactual", "sha256": file_digest(path), "labels": LABELS, "steps": 1,
        "image_size": SIZE, "classifier": "toy", "mode": "realistic", "speed": "fast", "settings": {}, "weights": "0",
        "versions": {}, "inputs": [{"name": n, "shape": [batch or "batch", *x.shape[1:]]} for n, x in inputs.items()],
    }  # fmt: skip
    (folder / CARD).write_text(json.dumps(card | changes))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> CounterfactualFile:
    return CounterfactualFile(write_toy(tmp_path_factory.mktemp("toy")))


def pictures(*levels: float) -> Any:
    return np.stack([np.full((3, SIZE, SIZE), level, dtype=np.float32) for level in levels])


def test_answers_and_reasons_of_a_batch(toy: CounterfactualFile) -> None:
    images = pictures(0.1, 0.9, np.nan, 1.5, 0.2)
    answers = toy.run(images, ["runner-up", "dark", "bright", 1, "dark"])
    assert answers.source.tolist() == [0, 1, -1, -1, 0]
    assert answers.prediction.tolist() == [1, 0, -1, -1, 0]
    assert answers.errors == [
        None, None, "the image holds NaN or infinite values", "pixels from 1.5 to 1.5; expected 0 to 1",
        "target 'dark' is already the prediction",
    ]  # fmt: skip
    alone = toy.run(images[:1])
    assert np.array_equal(alone.counterfactual[0], answers.counterfactual[0])  # noise is the image's own
    assert not np.array_equal(toy.run(images[:1], seed=1).counterfactual, alone.counterfactual)


def test_a_file_of_one_batch_size_takes_any_number(tmp_path: Path, toy: CounterfactualFile) -> None:
    fixed = CounterfactualFile(write_toy(tmp_path, batch=2))
    images = pictures(0.1, 0.9, 0.3)
    assert np.array_equal(fixed.run(images).counterfactual, toy.run(images).counterfactual)


@pytest.mark.parametrize(
    ("images", "targets", "said"),
    [
        (pictures(0.5)[:, :, :3], "dark", r"images: expected \[B, 3, 4, 4\], got \[1, 3, 3, 4\]"),
        (pictures(0.5).astype(np.uint8), "dark", "images: expected floating point in"),
        (pictures(0.5), ["dark", "dark"], "targets: expected 1, one for each image, got 2"),
        (pictures(0.5), "grey", "target: 'grey' is no label; expected runner-up, an index or one of dark"),
        (pictures(0.5), 4, "target: 4 is no label"),
        (pictures(0.5), -2, "target: -2 is no label"),
        (pictures(0.5), "crane", r"target: 2 labels are named 'crane'; use 2 or 3"),
        (pictures(0.5)[:0], "dark", "images: expected one or more, got none"),
    ],
)
def test_what_does_not_fit_is_said(toy: CounterfactualFile, images: Any, targets: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        toy.run(images, targets)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        CounterfactualFile(tmp_path / "none.onnx")
    path = write_toy(tmp_path, schema_version=2)
    with pytest.raises(UsageError, match=r"written by a newer counterlens \(schema 2; this one knows 1\): update"):
        CounterfactualFile(path)
    for what in ("saliency", "recipe"):
        write_toy(tmp_path, what=what)
        with pytest.raises(UsageError, match=f"the card of '{what}'"):
            CounterfactualFile(path)
    write_toy(tmp_path, settings={"class_scale": 3.5})
    with pytest.raises(
        UsageError, match=r"class_scale: this file has its own \(3\.5\); export it with --inputs scales"
    ):
        CounterfactualFile(path).run(pictures(0.5), scales={"class_scale": 2.0})
    (tmp_path / CARD).write_text("{")
    with pytest.raises(UsageError, match="not the card of a counterfactual"):
        CounterfactualFile(path)
    (tmp_path / CARD).unlink()
    with pytest.raises(UsageError, match=r"it belongs beside counterfactual\.onnx"):
        CounterfactualFile(path)
    write_toy(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CounterlensError, match=r"not the file that counterfactual\.json describes"):
        CounterfactualFile(path)


def test_run_needs_no_pytorch_and_writes_what_counterfactual_writes(tmp_path: Path) -> None:
    path = write_toy(tmp_path)
    for name, level in (("a", 20), ("b", 240)):
        Image.new("RGB", (SIZE, SIZE), (level, level, level)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    code = (
        "import sys; from counterlens.engine.cli.main import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    files = [str(tmp_path / f"{n}.png") for n in "abc"]
    command = [sys.executable, "-c", code, "run", str(path), *files, "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr  # c.png
    assert done.stderr.rstrip().endswith("False"), done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("prediction") for row in rows] == ["bright", "dark", None]
    assert "cannot be read" in rows[2]["error"] or "not an image" in rows[2]["error"]
    assert np.asarray(Image.open(tmp_path / "out" / "a.png")).min() > 250
    logged = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in logged] == ["a", "b", "c"]
    assert {line["file_sha256"] for line in logged} == {file_digest(path)}
