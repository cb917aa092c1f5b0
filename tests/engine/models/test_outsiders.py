"""A family of diffusion models from outside the package: one file, by `register` or by an entry point."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from counterlens.engine import Config, Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models import load
from counterlens.engine.runtime import artefacts
from counterlens.engine.runtime.spec import Spec
from counterlens.export import Store
from tests.tiny import IMAGE_SIZE, LABELS, save_scheduler, tiny_kl

from .outsider import ToyDenoiser, ToyDiffusion

CONFIG = Config(mode="official", steps=5)
RUN = """
import sys, torch
from pathlib import Path
from tests.engine.models.test_outsiders import counterfactual
assert "outsider" not in sys.modules
images, family = counterfactual(Path(sys.argv[1]))
print(family)
torch.save(images, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    ToyDenoiser().save_pretrained(folder / "unet")
    tiny_kl().save_pretrained(folder / "vae")
    save_scheduler(folder)
    return folder


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "BACKBONES", dict(load.BACKBONES))
    load.register("ToyDenoiser", ToyDiffusion)


def open_engine(folder: Path) -> Engine:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    return Engine.from_pretrained(folder, net, CONFIG, labels=LABELS, runtime="eager", device="cpu")


def counterfactual(folder: Path) -> tuple[torch.Tensor, str]:
    engine = open_engine(folder)
    image = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    kind = type(engine.diffusion)
    return engine.counterfactual(image, targets=["thing 3"]).images, f"{kind.__module__}.{kind.__qualname__}"


def test_a_registered_family_is_opened_exported_and_has_keys_of_its_own(folder: Path, registered, tmp_path) -> None:
    engine = open_engine(folder)
    assert isinstance(engine.diffusion, ToyDiffusion)
    images, _ = counterfactual(folder)
    assert images.isfinite().all()
    spec = Spec(engine.diffusion, engine.classifier)
    built = artefacts.build(spec, "onnx", Store(tmp_path / "store"))
    assert built.report["parity"]["worst"] <= 1e-4
    others = [copy.deepcopy(engine.diffusion) for _ in range(3)]
    others[1].gain = 2.0
    others[2].prediction = "v_prediction"
    keys = [str(Spec(d, engine.classifier).key("onnx")) for d in others]
    assert keys[0] == str(spec.key("onnx"))
    assert len(set(keys)) == 3


def test_an_installed_familys_entry_point_is_enough(folder: Path, registered, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("outsider.py"), site / "toy_outsider.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    points = info / "entry_points.txt"
    points.write_text("[counterlens.backbones]\nToyDenoiser = toy_outsider:ToyDiffusion\n")
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), root])}
    command = [sys.executable, "-c", RUN, str(folder), str(tmp_path / "images.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "toy_outsider.ToyDiffusion"
    assert torch.equal(torch.load(tmp_path / "images.pt"), counterfactual(folder)[0])


def test_families_that_cannot_be_found_or_clash_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"^model: .*: no family that is known \(unet/ is a ToyDenoiser, vae/ is a"):
        load.open_diffusion(folder)
    with pytest.raises(UsageError, match=r"^backbones: VQModel is the name of ldm:"):
        load.register("VQModel", ToyDiffusion)
    with pytest.raises(UsageError, match=r"^backbones: New: expected a subclass of Backbone, got <class"):
        load.register("New", ToyDenoiser)  # type: ignore[arg-type]
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[counterlens.backbones]\nToyDenoiser = not_there_at_all:Toy\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_family.py").write_text("Toy = 1")
    with pytest.raises(CounterlensError, match=r"^counterlens\.backbones: ToyDenoiser = not_there_at_all:Toy"):
        load.open_diffusion(folder)
    (info / "entry_points.txt").write_text("[counterlens.backbones]\nToyDenoiser = no_family:Toy\n")
    with pytest.raises(CounterlensError, match=r"no_family:Toy: expected a subclass of Backbone, got 1$"):
        load.open_diffusion(folder)


def test_a_class_conditional_unet_is_opened_from_a_folder(tiny, tmp_path: Path) -> None:
    diffusion = tiny[0]
    diffusion.unet.save_pretrained(tmp_path / "unet")
    diffusion.vae.save_pretrained(tmp_path / "vae")
    save_scheduler(tmp_path)
    names = [str(d) for d in range(10)]
    (tmp_path / "model_index.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    opened = load.open_diffusion(tmp_path)
    assert type(opened) is type(diffusion)
    assert opened.labels == names
    z, t, c = torch.randn(2, 4, 4, 4), torch.tensor([301, 301]), torch.tensor([1, 10])
    assert torch.equal(opened.predict_noise(z, t, c), diffusion.predict_noise(z, t, c))
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_class_embeds": None}))
    with pytest.raises(CounterlensError, match="class_embedding"):
        load.open_diffusion(tmp_path)
