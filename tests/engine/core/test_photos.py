"""Photographs of any shape through an engine: what the classifier sees is what it sees in its own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from counterlens.engine import Config, Engine
from counterlens.engine.cli.main import app
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.image_classifiers import open_classifier
from counterlens.engine.models.preprocessing import from_processor
from counterlens.engine.models.processors import find_processor, geometry_of
from counterlens.engine.outputs import LOG
from tests import tiny
from tests.engine.cli.test_cli import one_line_error, run
from tests.engine.images.test_fitting import picture

SHORT = {"preset": "imagenet-text", "steps": 4}
SAVED = {
    "resnet": (tiny.save_resnet, "crop"), "vit": (tiny.save_vit, "squash"), "clip": (tiny.save_clip, "crop"),
    "siglip": (tiny.save_siglip, "squash"), "dino": (tiny.save_dino, "crop"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_stable_diffusion(folder / "sd")
    for name, (save, _) in SAVED.items():
        save(folder / name)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, shape in {"land": (96, 64), "port": (50, 100), "square": (40, 40), "other": (90, 60)}.items():
        picture(*shape, seed=len(name)).save(folder / f"{name}.png")
    return folder


def opened(models: Path, classifier: str, size: int = tiny.IMAGE_SIZE) -> object:
    given = {} if classifier in ("resnet", "vit") else {"labels": tiny.LABELS, "prompts": "a photo of {label}"}
    if classifier == "dino":
        given = {"labels": tiny.LABELS, "head": models / "dino" / "head.safetensors"}
    return open_classifier(models / classifier, image_size=size, **given)


@pytest.fixture(scope="module")
def engine(models: Path) -> Engine:
    return Engine.from_pretrained(models / "sd", models / "resnet", Config(**SHORT))


@pytest.mark.parametrize("name", SAVED)
def test_the_processors_geometry_is_found(name: str, models: Path) -> None:
    classifier = opened(models, name)
    assert geometry_of(classifier) == SAVED[name][1]
    preprocessing, process = classifier.module.preprocessing, find_processor(classifier)
    for shape in [(53, 31), (31, 53), (48, 16)]:
        smooth = picture(*shape).resize((shape[0] // 3, shape[1] // 3)).resize(shape, 3)
        ours = preprocessing(torch.from_numpy(np.asarray(smooth, dtype=np.float32) / 255).permute(2, 0, 1)[None])[0]
        theirs = process(smooth)
        assert ours.shape == theirs.shape
        # Resized sides and crops may round to another pixel; what is seen is the same.
        assert ((ours - theirs) * preprocessing.std).abs().mean() < 0.02


class Padding:
    """A processor that resizes the longer side and lays grey around, as a letterbox."""

    resample = 2

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep

    def __call__(self, image: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        size, longest = 24, max(image.size)
        if self.keep:
            size, longest = 24, min(image.size)
        sides = [max(1, round(size * side / longest)) for side in image.size]
        out = Image.new("RGB", sides if self.keep else (size, size), (124, 116, 104))
        out.paste(image.resize(sides, 2), tuple(-(-(a - b) // 2) for a, b in zip(out.size, sides, strict=True)))
        return {"pixel_values": torch.from_numpy(np.asarray(out, dtype=np.float32) / 255).permute(2, 0, 1)[None]}


def test_padding_and_whole_pictures_are_found_too() -> None:
    made = from_processor(Padding(), 16)
    assert made.geometry == "pad"
    assert made.colour == pytest.approx((124 / 255, 116 / 255, 104 / 255), abs=1e-4)
    ours = made(torch.full((1, 3, 32, 96), 0.75))[0]
    assert torch.allclose(ours, Padding()(Image.new("RGB", (96, 32), (191,) * 3), "pt")["pixel_values"][0], atol=4e-3)
    assert from_processor(Padding(keep=True), 16).geometry == "whole"


@pytest.mark.slow
def test_auto_shows_what_the_own_pipeline_shows(models: Path, photos: Path) -> None:
    """With images as large as the classifier's, its logits are those of its own processor, up to 8-bit rounding."""
    for name in ("resnet", "vit"):
        size = 24 if name == "vit" else 27  # resized to 27 by the ResNet's, then cropped
        classifier = opened(models, name, size)
        from counterlens.engine.images.files import load_image

        for file in sorted(photos.glob("*.png")):
            image = load_image(
                file, size, interpolation="bicubic" if name == "resnet" else "bilinear", fit=SAVED[name][1]
            )
            ours = classifier.logits(image[None])[0]
            own = classifier.module.of_pixels(find_processor(classifier)(Image.open(file))[None])[0]
            assert (ours - own).abs().max() < 0.05 * own.abs().max(), (name, file.name)
            squashed = classifier.logits(load_image(file, size, fit="squash")[None])[0]
            if name == "resnet" and file.name != "square.png":
                assert (ours - own).abs().max() < (squashed - own).abs().max()


def test_frames_say_what_was_seen(engine: Engine, photos: Path) -> None:
    photo = engine.read(photos / "land.png")
    assert photo.image.shape == (3, 16, 16)
    assert photo.frame.record() == {"fit": "crop", "photo": [96, 64], "box": [16.0, 0.0, 64.0, 64.0], "size": [16, 16]}
    assert photo.own.shape == (3, 24, 24)
    assert engine.read(photos / "land.png", config=Config(fit="squash")).frame.fit == "squash"
    official = engine.read(photos / "land.png", config=Config(match_official=True))
    assert official.frame.fit == "crop"
    with pytest.raises(UsageError, match=r"^match_official: the authors' code crops; leave fit pad out"):
        engine.settings(Config(match_official=True, fit="pad"))


def test_native_runs_rectangles(engine: Engine, photos: Path) -> None:
    config = Config(**SHORT, fit="native")
    read = {name: engine.read(photos / f"{name}.png", config=config) for name in ("port", "square")}
    assert read["port"].frame.size == (8, 24)
    wide = torch.stack([torch.rand(3, 16, 40), torch.rand(3, 16, 40), torch.rand(3, 16, 40)])
    together = engine.counterfactual(wide, targets=[3, 5, 6], config=config)
    alone = engine.counterfactual(wide[1:2], targets=[5], config=config, seeds=[together.seeds[1]])
    assert together.images.shape == (3, 3, 16, 40)
    assert together.errors == [None] * 3
    assert (together.images[1] - alone.images[0]).abs().max() < 1e-4
    assert together.provenance[0]["runtime"] == "eager"
    with engine.session(config) as session:
        session.submit(wide[0], 3)
        with pytest.raises(UsageError, match=r"^images: one of 16x16 among those of 40x16; .* run them apart"):
            session.submit(torch.rand(3, 16, 16), 3)
    with pytest.raises(
        UsageError, match=r"^images: expected \[B, 3, 16, 16\], or other multiples of 8, got \[1, 3, 20"
    ):
        engine.counterfactual(torch.rand(1, 3, 20, 16))


def test_native_rectangles_are_the_square_step_where_they_are_square(engine: Engine) -> None:
    """The rectangular path is another sampler and another preprocessing; a square run through both is the same."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    preprocessing = engine.classifier.module.preprocessing
    assert torch.allclose(preprocessing._of_other_size(image), preprocessing.rows @ image @ preprocessing.columns)


@pytest.mark.slow
def test_native_respects_the_memory_budget(models: Path, engine: Engine, tmp_path: Path) -> None:
    from counterlens.engine.guidance.memory import weight_bytes

    picture(400, 300).save(tmp_path / "a.png")
    own = engine.step_bytes((16, 16))
    budget = weight_bytes(engine.modules()) + 4 * own
    tight = Engine.from_pretrained(
        models / "sd", models / "resnet", Config(**SHORT, fit="native"), memory_budget=budget
    )
    photo = tight.read(tmp_path / "a.png")
    height, width = photo.image.shape[1:]
    assert 16 * 16 < height * width <= 6 * 16 * 16
    assert tight.step_bytes((height, width)) <= 4 * own
    assert tight.slots_of((height, width)) == (1,)
    result = tight.counterfactual(photo.image[None], targets=[2])
    assert result.errors == [None]


def test_native_is_refused_by_name_where_it_cannot_be(models: Path, tiny_pack: Engine) -> None:
    with pytest.raises(UsageError, match=r"^fit: native needs a model that takes any shape; ClassConditionalLatent"):
        tiny_pack.settings(Config(fit="native"))
    compiled = Engine.from_pretrained(models / "sd", models / "resnet", Config(**SHORT), runtime="onnxruntime")
    with pytest.raises(UsageError, match=r"^fit: what runtime onnxruntime runs is compiled for images of 16x16"):
        compiled.settings(Config(fit="native"))
    with pytest.raises(
        UsageError, match=r"^runtime: what onnxruntime runs is compiled for images of 16x16, these are 24x8"
    ):
        compiled.counterfactual(torch.rand(1, 3, 8, 24))


@pytest.fixture(scope="module")
def tiny_pack() -> Engine:
    return Engine.from_pack("digits")


def test_a_packs_pictures_are_squashed_as_ever(tiny_pack: Engine, photos: Path) -> None:
    from counterlens.engine import load_image

    photo = tiny_pack.read(photos / "land.png")
    assert photo.frame.fit == "squash"
    assert torch.equal(photo.image, load_image(photos / "land.png", 32))
    assert photo.own is None


def lines(folder: Path) -> dict[str, dict[str, object]]:
    made = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return {Path(line["image"]).name: line for line in made}


SLOW = [pytest.param(fit, marks=pytest.mark.slow) for fit in ("pad", "native")]


@pytest.mark.parametrize("fit", ["auto", *SLOW])
def test_the_command(fit: str, models: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for file in photos.glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (1, 5000)).save(folder / "narrow.png")
    (folder / "cut.png").write_bytes((photos / "land.png").read_bytes()[:500])
    # What other programs see in it is white, and the profile-less rest is as they see it.
    Image.fromarray(np.asarray(picture(60, 60).convert("L"), dtype=np.uint16) * 120).save(folder / "deep.png")
    result = run(
        "counterfactual", folder, "--model", models / "sd", "--classifier", models / "resnet", "--preset",
        "imagenet-text", "--steps", 4, "--fit", fit, "--restore", "--out", tmp_path / "out", "--target", "thing 9",
    )  # fmt: skip
    one_line_error(result, 1, "2 of 7 images failed")
    made = lines(tmp_path / "out")
    assert "more than 50 times as long as wide" in made["narrow.png"]["error"]
    assert made["cut.png"]["status"] == "failed"
    land = made["land.png"]
    assert land["fit"] == {"auto": "crop"}.get(fit, fit)
    assert land["photo"] == [96, 64]
    if fit == "auto":
        assert land["box"] == [16.0, 0.0, 64.0, 64.0]
    assert 0 < land["own_confidence"] <= 1
    with Image.open(tmp_path / "out" / "land.restored.png") as restored:
        assert restored.size == (96, 64)
        before, after = (np.asarray(x, dtype=int) for x in (Image.open(photos / "land.png"), restored))
    assert np.abs(after - before)[:, 16:80].mean() > 0.5
    assert (fit == "auto") == (np.abs(after - before)[:, :16].max() == 0)
    assert isinstance(land["restored_flipped"], bool)
    assert 0 <= land["restored_target_confidence"] <= 1
    deep = made["deep.png"]
    if deep["own_prediction"] != deep["source"]:
        said = result.stderr.replace("\n", "")
        assert f"deep.png: the classifier's own processor gets '{deep['own_prediction']}' (" in said
        assert f"here it says '{deep['source']}' (" in said


def test_every_other_pipeline_is_said_once_it_differs(models: Path, tmp_path: Path) -> None:
    """A 16-bit grey is white to other programs: the classifier's own answer is that to white."""
    engine = Engine.from_pretrained(models / "sd", models / "vit", Config(**SHORT))
    Image.fromarray(np.asarray(picture(60, 60).convert("L"), dtype=np.uint16) * 200).save(tmp_path / "a.png")
    Image.new("RGB", (60, 60), "white").save(tmp_path / "white.png")
    deep, white = (engine.read(tmp_path / name) for name in ("a.png", "white.png"))
    assert torch.equal(deep.own, white.own)
    assert not torch.equal(deep.image, white.image)
    said = engine.own_answers([deep, white])
    assert said[0].label == said[1].label


@pytest.mark.slow
def test_an_audit_says_it_in_its_rows(engine: Engine, photos: Path, tmp_path: Path) -> None:
    for fit, expected in (("auto", "crop"), ("native", "native")):
        results = engine.audit(photos, tmp_path / fit, Config(**SHORT, fit=fit), shortcuts=2, insight=False)
        rows = {row["id"]: row for row in results.rows()}
        assert [row["status"] for row in rows.values() if row["status"] == "failed"] == []
        assert rows["land.png"]["fit"] == expected
        assert rows["land.png"]["photo"] == [96, 64]
        assert rows["port.png"]["own_prediction"] in tiny.LABELS
        with Image.open(tmp_path / fit / rows["port.png"]["image"]) as image:
            assert image.size == ((16, 16) if fit == "auto" else (8, 24))


def test_a_map_is_of_what_the_classifier_sees_of_a_photo(models: Path, photos: Path, tmp_path: Path) -> None:
    """Its own processor crops; what is squashed gets another answer."""
    said = {}
    for fit in ("auto", "crop", "squash"):
        options = ["--classifier", models / "resnet", "--image-size", 24, "--method", "gradxinput", "--json"]
        asked = ["saliency", photos / "land.png", *options, "--fit", fit, "--out", tmp_path / fit]
        result = CliRunner().invoke(app, [str(part) for part in asked])
        assert result.exit_code == 0, result.output
        said[fit] = json.loads(result.stdout)["probability"]
    assert said["auto"] == said["crop"] != said["squash"]


def test_unknown_geometry_is_refused_by_name(models: Path, photos: Path) -> None:
    engine = Engine.from_pretrained(models / "sd", models / "resnet", Config(**SHORT))
    engine.classifier.module.preprocessing.geometry = None
    assert engine.read(photos / "square.png").image.shape == (3, 16, 16)
    with pytest.raises(
        CounterlensError, match=r"^fit: this classifier's own processor neither crops, .* say --fit crop"
    ):
        engine.read(photos / "land.png")
    assert engine.read(photos / "land.png", config=Config(fit="crop")).frame.fit == "crop"
