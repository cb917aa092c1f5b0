"""The UNet for few steps: a change beside the pack's own, its recipe, and the speed `turbo` that runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from counterlens.engine import Config, Engine
from counterlens.engine.config import FEW_STEP_SPEEDS, SPEEDS, Settings
from counterlens.engine.core.core import EngineCore
from counterlens.engine.core.factory import EngineFactory
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.sampler import invert
from counterlens.engine.guidance.schedule import schedule_of
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.low_rank import attach
from counterlens.engine.packs import FEW_STEPS, Pack, few_steps
from counterlens.engine.packs.few_steps import Lessons, Said, run

TURBO = Config(speed="turbo")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pack("digits", runtime="eager", device="cpu")


def test_turbo_is_the_same_setting_in_at_most_four_steps(engine: Engine) -> None:
    turbo, exact = engine.settings(TURBO), engine.settings(Config(speed="exact"))
    assert turbo.steps <= 4
    assert turbo.denoiser == "distilled"
    for name in ("strength", "guidance_scale", "class_scale", "distance_scale", "angle", "filter"):
        assert getattr(turbo, name) == getattr(exact, name)


def test_it_flips_with_weights_of_its_own(engine: Engine) -> None:
    """... and everything else is the pack's: VAE, classes, noise levels, and the UNet itself."""
    own, other = engine.diffusion, engine.distilled
    assert other is not None
    assert other.vae is own.vae  # type: ignore[attr-defined]
    assert other.alphas_cumprod is own.alphas_cumprod
    stored = Pack("digits").diffusion().denoiser.state_dict()
    changed = other.denoiser.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in own.denoiser.state_dict().items())  # type: ignore[attr-defined]
    assert {name.rpartition(".")[2] for name in stored if not torch.equal(stored[name], changed[name])} == {"weight"}
    samples = Pack("digits").samples("validation", count=24, marker="random")
    result = engine.counterfactual(samples.images, config=TURBO)
    assert result.flipped.double().mean() >= 0.8
    assert result.l1.mean() < 0.1
    assert len(result[0].kept_fraction) == engine.settings(TURBO).steps


def test_runs_of_both_denoisers_share_a_session_only_apart(engine: Engine) -> None:
    image = Pack("digits").samples("validation", count=1).images[0]
    with (
        engine.session(TURBO, slots=1) as session,
        pytest.raises(UsageError, match="denoiser: samples in the same slots need the same one"),
    ):
        session.submit(image, config=Config(speed="fast", guidance_decoder="tiny"))


def test_an_engine_without_one_says_what_to_take(engine: Engine) -> None:
    without = EngineCore(engine.diffusion, engine.classifier, guidance_decoder=engine.guidance_decoder)
    with pytest.raises(UsageError, match=r"^denoiser: this engine has no distilled one, .* take speed fast, or give"):
        without.settings(TURBO)
    assert EngineFactory.of(engine)().distilled is engine.distilled
    with pytest.raises(UsageError, match=r"^speed: this model has no turbo; it has exact, balanced or fast$"):
        TURBO.settings(engine.pack_settings, FEW_STEP_SPEEDS)


def test_the_students_run_is_the_engines(engine: Engine) -> None:
    """What is trained is what will run: with no change yet, both end at the same latents."""
    pack = Pack("digits")
    settings = Settings(**engine.settings(TURBO).model_dump() | {"denoiser": "own", "guidance_decoder": "tiny"})
    images = pack.samples("train", count=3, marker="random").images
    targets = torch.tensor([7, 7, 7])
    student = pack.diffusion()
    changes = attach(student.denoiser, 2, torch.Generator().manual_seed(0))
    step = GuidedStep(
        Said(student), engine.classifier, settings.graph.model_copy(update={"guidance_every": 2}),  # type: ignore[arg-type]
        decoder=engine.guidance_decoder,
    )  # fmt: skip
    with torch.no_grad():
        start = invert(student, student.encode(images), schedule_of(settings, student.alphas_cumprod))
    lesson = Lessons(images, targets, torch.full((3,), settings.angle), start, torch.zeros_like(start))
    z = run(student, step, lesson, settings)
    made = engine.counterfactual(images, targets, config=Config(**settings.model_dump()))
    with torch.no_grad():
        assert ((student.decode(z) + 1) / 2).clamp(0, 1).sub(made.images).abs().max() < 1e-3
    z.square().mean().backward()
    assert all(change.up.grad is not None and change.up.grad.abs().max() > 0 for change in changes.values())


@pytest.mark.slow
def test_the_recipe_writes_a_change_that_the_manifest_knows(tmp_path: Path) -> None:
    shutil.copytree(Pack("digits").folder, tmp_path / "pack")
    (tmp_path / "pack" / FEW_STEPS).unlink()
    with pytest.raises(CounterlensError, match="missing from the pack"):
        Pack(str(tmp_path / "pack"))
    manifest = json.loads((tmp_path / "pack" / "pack.json").read_text())
    del manifest["files"][FEW_STEPS]
    (tmp_path / "pack" / "pack.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="no distilled one"):
        Engine.from_pack(str(tmp_path / "pack"), config=TURBO, runtime="eager").settings(TURBO)
    app = Typer()
    app.command()(few_steps.main)
    told = CliRunner().invoke(app, ["--pack", str(tmp_path / "pack"), "--steps", "3", "--count", "16"])
    assert told.exit_code == 0, told.output
    made = Pack(str(tmp_path / "pack"))
    assert made.manifest["few_steps"]["steps"] == 3
    assert made.manifest["speeds"] == manifest["speeds"]
    own = made.diffusion()
    other = made.distilled(own)
    assert other is not None
    assert not torch.equal(other.denoiser.conv_in.weight, own.denoiser.conv_in.weight)


@pytest.mark.slow
def test_a_whole_run_of_it_is_one_file(engine: Engine, tmp_path: Path) -> None:
    card = engine.export_counterfactual(tmp_path / "whole", Config(speed="turbo", steps=2), measure=False)
    assert card["speed"] == "turbo"
    assert card["parity"]["predictions_equal"] >= 0.98
    assert SPEEDS["turbo"]["denoiser"] == card["settings"]["denoiser"]
