"""Files that blocks of the documentation find in their working directory, and looks at what they wrote."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from counterlens.engine.images.files import load_image, save_png
from tests import tiny, tiny_generators
from tests.engine.cli.test_cli import run
from tests.engine.models import outsider
from tests.engine.models.test_convert import make_ldm

if TYPE_CHECKING:
    from tests.docs.blocks import Block

NETWORK = (
    "import torch\n"
    "torch.manual_seed(0)\n"
    "network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 7, stride=4), torch.nn.AdaptiveAvgPool2d(1),\n"
    "                              torch.nn.Flatten(), torch.nn.Linear(8, 2))\n"
)


def digits(folder: Path) -> None:
    """Two digits of the test split."""
    if not (folder / "digits").exists():
        assert run("samples", "--count", "2", "--out", folder / "digits").returncode == 0


def photos(folder: Path) -> None:
    """A photograph, a folder of it, and a project with a classifier."""
    picture = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
    (folder / "photos").mkdir(exist_ok=True)
    save_png(picture, folder / "photos" / "0.png")
    save_png(picture, folder / "photo.png")
    (folder / "my_project.py").write_text(NETWORK)


PIPELINE = """
from sklearn.linear_model import LogisticRegression
from counterlens.engine.packs import Pack

train = Pack("digits").samples("train", count=200)
pixels = (train.images * 255).round().byte().permute(0, 2, 3, 1).numpy()

def features(images):  # few: BLAS spins on cores that others need
    return images[:, ::4, ::4].reshape(len(images), -1) / 255

pipeline = LogisticRegression(solver="newton-cg").fit(features(pixels), train.labels)

def classify(images):
    return pipeline.predict_proba(features(images))
"""


def pipeline(folder: Path) -> None:
    """A scikit-learn pipeline that can be called."""
    (folder / "my_pipeline.py").write_text(PIPELINE)


def sd(folder: Path) -> None:
    """A tiny Stable Diffusion."""
    link(folder / "sd", "sd")


def sd3(folder: Path) -> None:
    """A tiny Stable Diffusion 3."""
    link(folder / "sd3", "sd3")


def resnet(folder: Path) -> None:
    """A tiny ResNet in a Hugging Face folder."""
    link(folder / "resnet", "resnet")


def network64(folder: Path) -> None:
    """A classifier of 64x64 pixels and images for it."""
    images = "images, held_out = torch.rand(8, 3, 64, 64), torch.rand(3, 3, 64, 64)\n"
    (folder / "my_images.py").write_text(NETWORK + images)


def toy(folder: Path) -> None:
    """A family of diffusion models that nobody knows, and a model of it."""
    (folder / "my_networks.py").write_text(Path(outsider.__file__).read_text())
    torch.manual_seed(0)
    outsider.ToyDenoiser().save_pretrained(folder / "toy" / "unet")
    tiny.tiny_kl().save_pretrained(folder / "toy" / "vae")
    tiny.save_scheduler(folder / "toy")


def checkpoint(folder: Path) -> None:
    """An original checkpoint of a class-conditional model."""
    save_file(make_ldm()[3], folder / "model.safetensors")


@cache
def saved(name: str) -> Path:
    """A tiny model's folder, made once."""
    save = {"sd": tiny.save_stable_diffusion, "sd3": tiny_generators.save_sd3, "resnet": tiny.save_resnet}[name]
    return save(Path(mkdtemp()) / name)


def link(path: Path, name: str) -> None:
    """Lay a tiny model beside the others."""
    if not path.exists():
        path.symlink_to(saved(name))


def own_python(block: Block, namespace: dict[str, Any]) -> None:
    """One's own classifier in Python: short, and an opposite that is one."""
    assert len(block.code.splitlines()) <= 10
    prompts = ["a photo of a cat, a type of pet.", "a photo of a dog, a type of pet."]
    assert namespace["engine"].diffusion.prompts == prompts
    record = json.loads(Path("opposite/results.jsonl").read_text())
    assert record["target"] != record["source"]
    assert load_image(Path("opposite/0000.png"), tiny.IMAGE_SIZE).shape == (3, 16, 16)


def onnx_file(block: Block, namespace: dict[str, Any]) -> None:
    """A counterfactual of a file: one that flips it."""
    record = json.loads(Path("by-file/results.jsonl").read_text().splitlines()[0])
    assert record["flipped"]
    assert record["classifier"] == "model.onnx"


def own_cli(block: Block, namespace: dict[str, Any]) -> None:
    """One's own classifier by command: one picture, of the model's size."""
    records = [json.loads(line) for line in Path("own/results.jsonl").read_text().splitlines()]
    assert [Path(r["image"]).name for r in records] == ["0.png"]
    assert load_image(Path(records[0]["path"]), 16).shape == (3, 16, 16)
