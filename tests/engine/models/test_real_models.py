"""Engine.from_pretrained and the command line on models from disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from counterlens.engine.config import PRESETS, Config, default_settings, preset_misfit
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images.files import save_png
from counterlens.engine.models.files import find_folder
from counterlens.engine.models.image_classifiers import open_classifier
from counterlens.engine.models.load import open_diffusion
from tests import tiny
from tests.engine.cli.test_cli import one_line_error, run
from tests.engine.models.test_classifiers import Plain
from tests.engine.models.test_convert import make_ldm, make_sd

pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
QUICK = ["--steps", "6", "--strength", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("real")
    for name, save in tiny.DIFFUSIONS.items():
        save(base / name)
    for save in (tiny.save_resnet, tiny.save_clip, tiny.save_dino):
        save(base / save.__name__.removeprefix("save_"))
    tiny.save_resnet(base / "binary", labels=1)
    g = torch.Generator().manual_seed(0)
    (base / "photos").mkdir()
    for i in range(3):
        save_png(torch.rand(3, 20, 24, generator=g), base / "photos" / f"{i}.png")
    (base / "labels.txt").write_text("\n".join(tiny.LABELS))
    return base


def test_class_conditional_model_by_manifest_with_neighbours(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        f"image,target\n{folder / 'photos' / '0.png'},thing 1\n{folder / 'photos' / '1.png'},\n"
    )
    nearest = {label: [f"thing {(i + 1) % 10}"] for i, label in enumerate(tiny.LABELS)}
    (tmp_path / "near.json").write_text(json.dumps(nearest))
    result = run(
        "counterfactual", "--manifest", tmp_path / "list.csv", "--model", folder / "ldm", "--classifier",
        folder / "resnet", "--target", "neighbour", "--neighbours", tmp_path / "near.json", "--out", tmp_path / "o",
        "--checkpointing", "--memory-budget", 1, "--json", *QUICK,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["target"] == "thing 1"
    assert second["target"] == nearest[second["source"]][0]


def test_zero_shot_linear_head_and_binary_by_command(folder: Path, tmp_path: Path) -> None:
    image = folder / "photos" / "2.png"
    common = ["counterfactual", image, "--json", "--overwrite", "--out", tmp_path, *QUICK]
    for options in (
        ["--model", folder / "dit", "--classifier", folder / "clip", "--labels", folder / "labels.txt"],
        ["--model", folder / "sd-eps", "--classifier", folder / "dino", "--labels", folder / "labels.txt",
         "--head", folder / "dino" / "head.safetensors", "--prompts", "pets", "--dtype", "bfloat16"],
        ["--model", folder / "sd-eps", "--classifier", folder / "binary", "--labels", "old,young", "--prompts", "age",
         "--target", "opposite", "--preset", "celeba-text", "--image-size", "32"],
        ["--model", folder / "ldm", "--classifier", folder / "binary", "--labels", "old,young", "--classes", "3,8"],
        ["--model", "digits", "--classifier", folder / "resnet", "--mode", "audit"],
    ):  # fmt: skip
        result = run(*common, *options)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["target"] != json.loads(result.stdout)["source"]


def test_usage_errors(folder: Path, tmp_path: Path) -> None:
    image, sd, ldm, resnet = folder / "photos" / "0.png", folder / "sd-eps", folder / "ldm", folder / "resnet"
    for options, words in [
        (["--model", ldm], ["classifier: --model needs one"]),
        (["--labels", "a,b"], ["labels: needs --model"]),
        (["--dtype", "bfloat16"], ["dtype: needs --model"]),
        (["--preset", "imagenet-text"], ["imagenet-text", "class-conditional", "pairs-class"]),
        (["--model", sd, "--classifier", resnet, "--preset", "imagenet-class"], ["imagenet-class", "text-conditional"]),
        (["--model", sd, "--classifier", resnet, "--preset", "celeba-text"], ["prompts", "smile or age"]),
        (
            ["--model", sd, "--classifier", resnet, "--preset", "celeba-text", "--prompts", "pets"],
            ["binary", "10 labels"],
        ),
        (["--model", sd, "--classifier", folder / "clip"], ["labels", "zero-shot"]),
        (["--model", sd, "--classifier", resnet, "--labels", "a,b"], ["labels: 2 names for 10 logits"]),
        (["--model", sd, "--classifier", resnet, "--image-size", "30"], ["image_size: 30", "24 or 32"]),
        (["--model", ldm, "--classifier", resnet, "--image-size", "32"], ["image_size", "has one image size"]),
        (["--model", ldm, "--classifier", resnet, "--classes", "1,x"], ["classes"]),
        (["--model", ldm, "--classifier", resnet, "--classes", ",".join(["11"] * 10)], ["classes: 11 is out of range"]),
        (["--model", ldm, "--classifier", resnet, "--dtype", "int4"], ["dtype"]),
        (["--model", ldm, "--classifier", resnet, "--memory-budget", "1e-6"], ["memory_budget: one sample needs"]),
        (["--model", ldm, "--classifier", resnet, "--target", "opposite"], ["two labels"]),
        (["--model", ldm, "--classifier", resnet, "--target", "neighbour"], ["neighbours"]),
        (["--model", folder / "nowhere", "--classifier", resnet], ["neither a folder nor a hub id"]),
        (["--model", folder / "photos", "--classifier", resnet], ["none of unet/"]),
    ]:
        one_line_error(run("counterfactual", image, "--out", tmp_path, *options), 2, *words)
    one_line_error(run("counterfactual", "--out", tmp_path), 2, "images: none given")


def test_offline_says_what_to_do(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CounterlensError, match=r"^model: 'nobody/nothing'.*hf download nobody/nothing --local-dir FOLDER"
    ):
        find_folder("nobody/nothing", "model")


def test_modules_need_labels_and_presets_must_fit(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^labels: a module has none"):
        Engine.from_pretrained(folder / "dit", Plain())
    engine = Engine.from_pretrained(folder / "dit", Plain(), labels=tiny.LABELS)
    assert engine.settings(Config()) == PRESETS["imagenet-class"]
    assert engine.settings(Config(mode="audit")).angle == 90
    assert engine.settings(Config(mode="official")) == PRESETS["imagenet-class"]
    with pytest.raises(UsageError, match=r"^preset: pets-text was published for text-conditional models"):
        engine.counterfactual(torch.rand(1, 3, 16, 16), config=Config(preset="pets-text"))
    assert default_settings("text")["realistic"] == PRESETS["imagenet-text"].model_dump()
    assert preset_misfit("celeba-text", "text", 2) is None


def test_engine_from_parts(folder: Path) -> None:
    diffusion = open_diffusion(folder / "sd-v")
    classifier = open_classifier(folder / "resnet", image_size=diffusion.image_size)
    with pytest.raises(UsageError, match=r"diffusion\.describe\(labels\)"):
        Engine(diffusion=diffusion, classifier=classifier)
    diffusion.describe(classifier.labels, prompts="a drawing of a {label}")
    engine = Engine(diffusion=diffusion, classifier=classifier, config=Config.make(steps=6, strength=0.5))
    assert engine.counterfactual(torch.rand(2, 3, 16, 16)).errors == [None, None]


def test_convert_command(tmp_path: Path) -> None:
    save_file(make_ldm()[3], tmp_path / "cin.safetensors")
    (tmp_path / "classes.txt").write_text("\n".join(tiny.LABELS))
    result = run(
        "convert", tmp_path / "cin.safetensors", "--out", tmp_path / "cin", "--image-size", 16, "--labels",
        tmp_path / "classes.txt", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == "ldm"
    assert open_diffusion(tmp_path / "cin").names == tiny.LABELS
    save_file(make_sd(False)[3], tmp_path / "sd.safetensors")
    one_line_error(run("convert", tmp_path / "sd.safetensors", "--out", tmp_path / "sd"), 2, "tokenizer")
    one_line_error(run("convert", tmp_path / "none.ckpt", "--out", tmp_path / "no"), 1, "none.ckpt: no such file")
    assert "Example: counterlens convert" in " ".join(run("convert", "--help").stdout.split())


def test_the_packs_own_models_through_the_public_door_give_the_same_pictures() -> None:
    """A trained classifier wrapped as any module would be, with the trained generator: the pack's counterfactuals."""
    from counterlens.engine.packs import Pack

    pack = Pack("digits")
    x = pack.samples("test", count=3).images
    expected = Engine.from_pack("digits", "clean").counterfactual(x)
    module = pack.classifier("clean").module
    engine = Engine.from_pretrained("digits", module, labels=[str(d) for d in range(10)])
    result = engine.counterfactual(x)
    assert result.flipped.tolist() == expected.flipped.tolist()
    torch.testing.assert_close(result.images, expected.images, rtol=1e-4, atol=1e-4)


def test_labels_alone_are_no_model_to_export(tmp_path: Path) -> None:
    one_line_error(run("export", "--labels", "a,b", "--store", tmp_path), 2, "needs --model")


@pytest.mark.slow
def test_a_part_of_a_model_from_disk_is_exported(folder: Path, tmp_path: Path) -> None:
    models = ["--model", folder / "ldm", "--classifier", folder / "resnet", "--what", "unet"]
    done = run("export", *models, "--store", tmp_path / "store", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["what"] == "unet"
    assert report["parity"]["worst"] <= 1e-4
    assert (tmp_path / "out" / "model.onnx").is_file()
