"""Folders of generators: what does not fit is refused by name, and what they say of themselves is followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from counterlens.engine.chance import carried_over
from counterlens.engine.config import PRESETS, Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.schedule import carried_strength
from counterlens.engine.images.files import save_png
from counterlens.engine.models import prompted
from counterlens.engine.models.load import open_diffusion
from tests.engine.cli.test_cli import run
from tests.engine.models.generators import opened, softmax_classifier
from tests.tiny import IMAGE_SIZE, LABELS


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "part", "fields", "said"),
    [
        ("sana", "transformer", {"guidance_embeds": True}, r"guidance_embeds is True: the guidance scale"),
        ("flux", "vae", {"latent_channels": 4}, "vae"),
        ("pixart", "transformer", {"mystery": 3}, "mystery"),
        ("sd3", "text_encoder_3", {"model_type": "umt5"}, r"text_encoder_3/config\.json: model_type is 'umt5'"),
        ("flux", "scheduler", {"shift_terminal": 0.1}, "shift_terminal"),
        ("sana", "scheduler", {"prediction_type": "mystery"}, "prediction_type"),
        ("sd3", "scheduler", {"invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_fields_that_do_not_fit_are_named(
    folders: dict[str, Path], name: str, part: str, fields: dict[str, object], said: str, tmp_path: Path
) -> None:
    folder = copied(folders[name], tmp_path / name)
    config = "scheduler_config.json" if part == "scheduler" else "config.json"
    edit(folder / part / config, **fields)
    with pytest.raises((UsageError, CounterlensError), match=said) as caught:
        open_diffusion(folder, image_size=IMAGE_SIZE)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_not_its_own_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["sd3"], tmp_path / "sd3")
    shutil.rmtree(folder / "tokenizer_2")
    shutil.rmtree(folder / "text_encoder")
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "text_encoder_3" / "model.safetensors.index.json").write_text(json.dumps(shards))
    (folder / "text_encoder_3" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CounterlensError, match="is not complete") as caught:
        open_diffusion(folder)
    for path in ("text_encoder/config.json", "tokenizer_2/tokenizer_config.json"):
        assert path in str(caught.value)
    assert "text_encoder_3/model-00002-of-00002.safetensors" in str(caught.value)
    assert "00001-of" not in str(caught.value)

    shutil.rmtree(folder)
    folder = copied(folders["sd3"], folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    with pytest.warns(UserWarning, match="no text_encoder_3/.*zeros"):
        open_diffusion(folder, image_size=IMAGE_SIZE)
    with pytest.raises(UsageError, match=r"^image_size: 80 is more than the 64 .*pos_embed_max_size"):
        open_diffusion(folders["sd3-without-t5"], image_size=80)
    with pytest.raises(UsageError, match=r"^image_size: 20 is no multiple of 8"):
        open_diffusion(folders["flux"], image_size=20)

    folder = copied(folders["pixart"], tmp_path / "pixart")
    shutil.rmtree(folder / "vae")
    shutil.copytree(folders["sd3"] / "vae", folder / "vae")
    with pytest.raises(UsageError, match=r"^latent channels: the denoiser takes 4, the VAE makes 16"):
        open_diffusion(folder)
    folder = copied(folders["flux"], tmp_path / "flux")
    for part in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(folder / part)
        shutil.copytree(folders["sd3"] / part.replace("2", "3"), folder / part)
    with pytest.raises(UsageError, match=r"^text_encoder_2: its 40 channels are not the denoiser's 24 \(joint"):
        open_diffusion(folder, image_size=IMAGE_SIZE)
    diffusion = opened(folders["pixart"])
    with pytest.raises(UsageError, match=r"^prompts: .* tokens, text_encoder reads 300"):
        diffusion.describe(["a"], prompts=["word " * 400])
    with pytest.raises(UsageError, match=r"^classes: this model is text-conditional"):
        diffusion.describe(["a"], classes=[1])


def test_models_that_take_an_image_beside_the_latents_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["flux"], tmp_path / "flux")
    edit(folder / "model_index.json", _class_name="FluxKontextPipeline")
    with pytest.raises(UsageError, match=r"model_index\.json: _class_name is 'FluxKontextPipeline': .*an image beside"):
        open_diffusion(folder)


def test_files_that_are_no_models_are_refused_by_name(tmp_path: Path) -> None:
    files = {"flux1-dev-Q4.gguf": "GGUF", "pytorch_lora_weights.safetensors": "LoRA", "sd3.safetensors": "convert"}
    for name, said in files.items():
        folder = tmp_path / said
        folder.mkdir()
        (folder / name).touch()
        for given in (folder, folder / name):
            with pytest.raises(UsageError, match=rf"^model: .*{name}.*{said}"):
                open_diffusion(given)


def test_a_gated_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args: object, **options: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CounterlensError, match=r"^model: 'black-forest-labs/FLUX.1-dev' is gated: accept its terms"):
        open_diffusion("black-forest-labs/FLUX.1-dev")


def test_encoders_are_read_again_for_other_prompts(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompted, "AT_ONCE", 2)
    diffusion = open_diffusion(folders["pixart"], image_size=IMAGE_SIZE)
    before = diffusion.null_condition(1)
    diffusion.describe(LABELS)
    assert set(diffusion._embeddings) == {""}
    many = diffusion.condition(torch.tensor([2, 5, 2]))
    assert diffusion.text.held == {}
    assert len(diffusion._embeddings) == 3
    diffusion.describe(["thing 2"], prompts=["a photo of a thing 2."])
    for one, other in zip(diffusion.condition(torch.tensor([0])), many, strict=True):
        assert torch.equal(one, other[:1])
        assert torch.equal(other[0], other[2])
    assert all(map(torch.equal, before, diffusion.null_condition(1)))


def test_a_counterfactual_by_command_says_its_angle(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    save_png(torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)), tmp_path / "photo.png")
    result = run(
        "counterfactual", tmp_path / "photo.png", "--model", folders["sd3"], "--classifier", folders["clip"],
        "--labels", tmp_path / "labels.txt", "--image-size", IMAGE_SIZE, "--steps", 6, "--strength", 0.5,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["target"] in LABELS
    settings = (tmp_path / "out" / "run.json").read_text()
    assert '"strength_asked": 0.5' in settings  # of a flow, whose run begins at another share of its steps
    assert '"strength": 0.5' not in settings
    assert f'"angle": {carried_over(PRESETS["imagenet-text"].angle, 16)}' in settings


def test_fast_is_four_steps_where_the_generator_is_distilled(folders: dict[str, Path]) -> None:
    """What a folder says of itself: LCM's scheduler, or trailing timesteps of a model that predicts noise."""
    classifier = softmax_classifier()
    for name in ("sdxl", "sd-turbo", "lcm", "sdxl-turbo"):
        diffusion = open_diffusion(folders[name], image_size=IMAGE_SIZE)
        diffusion.describe(LABELS)
        assert diffusion.distilled == (name != "sdxl")
        engine = Engine(diffusion, classifier)
        settings = engine.settings(Config.make(speed="fast"))
        assert settings.steps == (4 if diffusion.distilled else 7)
        assert settings.noise == ("random" if diffusion.distilled else "inversion")
    made = engine.counterfactual(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5), config=Config.make(speed="fast"))
    assert made.errors == [None]


def test_flows_that_are_distilled_are_known_by_their_config_or_their_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    hub = tmp_path / "models--stabilityai--stable-diffusion-3.5-large-turbo" / "snapshots"
    hub.mkdir(parents=True)
    (hub / "abc").symlink_to(folders["sd3.5"])
    (tmp_path / "turbo").mkdir()  # of other folders the names say nothing
    (tmp_path / "turbo" / "sd3.5").symlink_to(folders["sd3.5"])
    for folder, distilled in (
        (folders["flux"], False), (folders["flux-schnell"], True), (tmp_path / "turbo" / "sd3.5", False),
        (hub / "abc", True),
    ):  # fmt: skip
        assert open_diffusion(folder, image_size=IMAGE_SIZE).distilled == distilled
    diffusion = open_diffusion(hub / "abc", image_size=IMAGE_SIZE)
    diffusion.describe(LABELS)
    engine = Engine(diffusion, softmax_classifier())
    settings = engine.settings(Config.make(speed="fast"))
    assert (settings.steps, settings.noise) == (4, "random")
    made = engine.counterfactual(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5), config=Config.make(speed="fast"))
    assert made.errors == [None]


def test_sdxl_keeps_its_vae_in_float32_and_its_null_condition_as_its_folder_says(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    half = open_diffusion(folders["sdxl"], dtype="float16", image_size=IMAGE_SIZE)
    assert (half.vae.dtype, half.unet.dtype) == (torch.float32, torch.float16)
    assert all(not part.any() for part in half.null_condition(2))
    folder = tmp_path / "sdxl"
    shutil.copytree(folders["sdxl"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert all(part.any() for part in open_diffusion(folder, image_size=IMAGE_SIZE).null_condition(1))
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_aesthetics_score": True}))
    with pytest.raises(UsageError, match=r"model_index\.json: requires_aesthetics_score is true: a refiner"):
        open_diffusion(folder, image_size=IMAGE_SIZE)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_of_many_labels_a_prompt_that_is_too_long_is_refused_at_once(name: str, folders: dict[str, Path]) -> None:
    diffusion = open_diffusion(folders[name], image_size=IMAGE_SIZE)
    labels = [*(f"thing {i}" for i in range(80)), " ".join(["thing"] * 400), "a thing"]
    with pytest.raises(UsageError, match=r"^prompts: .* tokens, text_encoder"):
        diffusion.describe(labels, prompts="a photo of {label}")
    diffusion.describe(labels[:80], prompts="a photo of {label}")
    assert not diffusion.text.held  # the encoders are not kept for labels that nobody asked for yet
    assert diffusion.condition(torch.tensor([79, 3]))[0].shape[0] == 2


def test_strengths_are_carried_over_to_linear_betas(folders: dict[str, Path]) -> None:
    classifier = softmax_classifier()
    for name, carried in (("pixart", True), ("sdxl", False)):
        diffusion = open_diffusion(folders[name], image_size=IMAGE_SIZE)
        diffusion.describe(LABELS)
        engine = Engine(diffusion, classifier)
        used = engine.settings(Config(strength=0.382)).strength
        wanted = carried_strength(0.382, diffusion.alphas_cumprod) if carried else 0.382
        assert used == wanted
        assert (engine.facts(Config(strength=0.382)).get("strength_asked") == 0.382) == carried


def changed(folder: Path, tmp_path: Path, file: str, **fields: Any) -> Path:
    """A copy of a model's folder with other fields in one of its files; None takes one out."""
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / file
    said = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
def test_a_flows_denoiser_with_another_familys_scheduler_is_refused(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders[name], tmp_path, "model_index.json")
    shutil.copytree(folders["sdxl"] / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    with pytest.raises(UsageError, match=r"scheduler_config\.json: _class_name is .* trained on a flow; take the") as e:
        open_diffusion(folder, image_size=IMAGE_SIZE)
    assert "\n" not in str(e.value)


def test_a_tokenizer_that_names_no_length_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["sdxl"], tmp_path, "tokenizer/tokenizer_config.json", model_max_length=None)
    with pytest.raises(UsageError, match=r"tokenizer_config\.json says no model_max_length; expected"):
        open_diffusion(folder, image_size=IMAGE_SIZE)
