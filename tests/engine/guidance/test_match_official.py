"""What the authors' code does otherwise: one switch for all of it, and OpenAI's names of ImageNet's classes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from counterlens.engine.config import OFFICIAL_CHOICES, Config
from counterlens.engine.core.result import noise_seed
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images.files import load_image
from counterlens.engine.models.stable_diffusion import make_prompts
from tests.engine.cli.test_cli import one_line_error, run
from tests.tiny import IMAGE_SIZE, LABELS, save_stable_diffusion

NAMES = [f"beast{chr(97 + i // 676)}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)} (of prey)" for i in range(1000)]
QUICK = ["--steps", "4", "--strength", "0.5"]
QUICK_CONFIG = {"steps": 4, "strength": 0.5}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package that ships a list as open_clip_torch does, and cannot be imported: it must only be read."""
    folder = tmp_path / "site" / "open_clip"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "zero_shot_metadata.py").write_text(f"IMAGENET_CLASSNAMES = {tuple(NAMES)!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return NAMES


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert run("samples", "--count", 3, "--out", folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("sd"))


def classifier(labels: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, labels))


def test_openai_names_replace_the_labels(names: list[str]) -> None:
    labels = [f"{name.split()[0].upper()}, of latin name" for name in names]
    assert make_prompts(labels, "openai-imagenet")[3] == f"a photo of a {names[3]}."
    assert make_prompts(labels, "imagenet")[3] == f"a photo of a {labels[3]}."


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS, "1000 classes, this classifier 10"),
        (NAMES[::-1], "order"),
        ([f"LABEL_{i}" for i in range(1000)], "order"),
    ],
)
def test_labels_that_are_not_imagenets_are_refused(names: list[str], labels: list[str], said: str) -> None:
    labels = [label.replace(" (of prey)", "") for label in labels]
    with pytest.raises(UsageError, match=said):
        make_prompts(labels, "openai-imagenet")


def test_names_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with pytest.raises(CounterlensError, match="pip install --no-deps open_clip_torch"):
        make_prompts(NAMES, "openai-imagenet")


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip_torch")
def test_the_real_list() -> None:
    prompts = make_prompts(["great white shark, white shark"] * 1000, "{label}")
    assert len(prompts) == 1000
    with pytest.raises(UsageError, match="'tench'"):
        make_prompts(prompts, "openai-imagenet")


def test_config_says_what_it_sets() -> None:
    config = Config(match_official=True)
    assert config.mode_name == "official"
    assert config.interpolation == "bilinear"
    assert Config().interpolation == "lanczos"
    image = torch.rand(3, 8, 8)
    assert noise_seed(image, config.model_copy(update={"seed": 7})) == 7
    assert noise_seed(image, Config(seed=7)) != noise_seed(image + 0.1, Config(seed=7))


@pytest.mark.parametrize("fields", [{"mode": "audit"}, {"mode": "realistic"}, {"speed": "fast"}, {"speed": "balanced"}])
def test_what_the_authors_code_has_not_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="match_official"):
        Engine.from_pack("digits", "clean", Config(match_official=True, **fields)).settings(
            Config(match_official=True, **fields)
        )


def test_a_whole_run_in_one_file_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="match_official"):
        Engine.from_pack("digits", "clean").export_counterfactual(tmp_path, Config(match_official=True, **QUICK_CONFIG))
    assert list(tmp_path.iterdir()) == []


def test_one_noise_and_no_skipping() -> None:
    engine = Engine.from_pack("digits", "clean")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    predicted = engine.probabilities(images).argmax(1).tolist()
    ours = engine.counterfactual(images, predicted, config=Config(mode="official", **QUICK_CONFIG))
    theirs = engine.counterfactual(images, predicted, config=Config(match_official=True, seed=3, **QUICK_CONFIG))
    assert all(error is not None for error in ours.errors)
    assert theirs.errors == [None, None]
    assert theirs.seeds == [3, 3]
    assert len({*engine.counterfactual(images, config=Config(mode="official", **QUICK_CONFIG)).seeds}) == 2


def test_files_are_resized_as_asked(tmp_path: Path) -> None:
    read = {}
    Image.effect_noise((100, 60), 90).convert("RGB").save(tmp_path / "a.png")
    for name, filter in (("bilinear", Image.Resampling.BILINEAR), ("lanczos", Image.Resampling.LANCZOS)):
        with Image.open(tmp_path / "a.png") as image:
            pixels = np.asarray(image.resize((32, 32), filter))
        read[name] = load_image(tmp_path / "a.png", 32, interpolation=name)
        assert np.array_equal((read[name] * 255).round().permute(1, 2, 0).numpy(), pixels)
    assert not torch.equal(read["bilinear"], read["lanczos"])


@pytest.mark.parametrize(
    ("config", "prompts", "expected"),
    [
        (Config(), None, f"a photo of a {LABELS[0]}."),
        (Config(match_official=True), "a picture of {label}", f"a picture of {LABELS[0]}"),
        (Config(match_official=True, preset="pets-text"), None, f"a photo of a {LABELS[0]}, a type of pet."),
    ],
)
def test_prompts_that_match(text_model: Path, config: Config, prompts: str | None, expected: str) -> None:
    engine = Engine.from_pretrained(text_model, classifier(10), config, labels=LABELS, prompts=prompts)
    assert engine.diffusion.prompts[0] == expected


def test_prompts_of_the_authors(text_model: Path, names: list[str]) -> None:
    config = Config(match_official=True)
    engine = Engine.from_pretrained(text_model, classifier(1000), config, labels=[n.split()[0] for n in names])
    assert engine.diffusion.prompts[999] == f"a photo of a {names[999]}."
    with pytest.raises(UsageError, match="prompts: openai-imagenet has 1000 classes"):
        Engine.from_pretrained(text_model, classifier(10), config, labels=LABELS)
    two = Config(match_official=True, preset="celeba-text")
    engine = Engine.from_pretrained(text_model, classifier(2), two, labels=["old", "young"], prompts="age")
    assert engine.diffusion.prompts[0] == "a photo of a old person"


def test_commands_say_and_record_it(digits: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    result = run("counterfactual", digits, "--match-official", *QUICK, "--out", first, "--json")
    assert result.returncode == 0, result.stderr
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: match-official: ")]
    assert [n.removeprefix("note: match-official: ") for n in notes] == list(OFFICIAL_CHOICES)
    assert json.loads((first / "run.json").read_text())["match_official"] is True
    assert {json.loads(line)["seed"] for line in result.stdout.splitlines()} == {0}
    one_line_error(run("counterfactual", digits, *QUICK, "--mode", "official", "--out", first), 2, "match_official")
    one_line_error(run("counterfactual", digits, "--match-official", "--mode", "audit", "--out", tmp_path), 2, "match")


def test_audit_does_not_mix_it(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    command = ["audit", digits, *QUICK, "--shortcuts", 0, "--no-report", "--out", tmp_path / "a"]
    result = run(*command, "--match-official")
    assert result.returncode == 0, result.stderr
    one_line_error(run(*command, "--mode", "official"), 2, "match_official")


def test_prompts_from_a_file(text_model: Path, tmp_path: Path) -> None:
    from counterlens.engine.cli.opening import EngineOptions, open_engine
    from tests.tiny import save_resnet

    said = [f"one of {i // 2}" for i in range(10)]
    (tmp_path / "said.txt").write_text("\n".join(said) + "\n")
    resnet = save_resnet(tmp_path / "resnet")
    models = {"model": str(text_model), "classifier": str(resnet)}
    engine = open_engine(Config(**QUICK_CONFIG), EngineOptions(**models, prompts=str(tmp_path / "said.txt")))
    assert engine.diffusion.prompts == said
    assert engine.image_size == IMAGE_SIZE
    with pytest.raises(UsageError, match=r"prompts: .*none\.txt cannot be read"):
        open_engine(Config(), EngineOptions(**models, prompts=str(tmp_path / "none.txt")))
