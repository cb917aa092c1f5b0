"""Regions: outside, pixels are the image's own; samples without a region know nothing of those with one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.jobs import Job, seeded_noise
from counterlens.engine.guidance.region import Held, compose, free_latents, narrow, weights
from counterlens.engine.guidance.schedule import add_noise
from counterlens.engine.images.fitting import frame
from counterlens.engine.images.masks import Masks
from counterlens.engine.images.sources import Sample
from tests.engine.cli.test_cli import one_line_error, run

NUMBERS = {
    "steps": 6, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
    "gradient": "detached", "spacing": "trailing",
}  # fmt: skip
KINDS: list[dict[str, Any]] = [{}, {"noise": "inversion", "solver": "dpm++"}, {"solver": "unipc"}]


@pytest.fixture(scope="module")
def engine(tiny) -> Engine:
    return Engine(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS})


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)).mul(255).round().div(255)


def corner() -> Tensor:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:9, 3:11] = True
    return mask


@pytest.mark.parametrize("kind", KINDS)
def test_outside_is_the_image_bit_by_bit_and_neighbours_are_as_alone(engine: Engine, kind: dict[str, Any]) -> None:
    x, config, mask = images(4), Config(**kind), corner()
    targets = [(int(p) + 1) % 10 for p in engine.probabilities(x).argmax(1)]
    plain = engine.counterfactual(x, targets, config=config)
    mixed = engine.counterfactual(x, targets, config=config, region=[None, mask, None, "auto"])
    assert mixed.errors == [None] * 4
    assert torch.equal(mixed.images[[0, 2]], plain.images[[0, 2]])
    assert mixed.regions[0] is None
    for i in (1, 3):
        region = mixed.regions[i]
        assert region is not None
        assert torch.equal(mixed.images[i][:, ~region], x[i][:, ~region])
        assert not torch.equal(mixed.images[i][:, region], x[i][:, region])
        said = mixed.record(i)
        assert said["l1_outside"] == 0
        assert said["l1_inside"] * said["region_area"] == pytest.approx(said["l1"], abs=2e-6)
    assert torch.equal(mixed.regions[1], mask)
    whole = engine.counterfactual(x, targets, config=config, region=torch.ones(16, 16))
    assert torch.equal(whole.images, plain.images)  # a region that holds all is none


@pytest.mark.parametrize("kind", KINDS)
def test_latents_outside_are_the_noised_original_at_every_step(engine: Engine, kind: dict[str, Any]) -> None:
    x, mask, settings = images(1)[0], corner(), engine.settings(Config(**kind))
    with engine.frozen(), torch.no_grad():
        sampler = engine.sampler(Config(**kind), 1)
        sampler.submit(Job(x, 3, 7, settings, region=mask))
        z = engine.diffusion.encode(x[None])
        noise = seeded_noise(engine.diffusion.latent_shape, [7], z)
        free = free_latents(mask, (z.shape[-2], z.shape[-1]))
        assert free.any()
        assert not free.all()
        levels = engine.diffusion.alphas_cumprod.to(z)
        seen = 0
        while sampler.busy:
            sampler.tick()
            sample = sampler._running[0]
            if sample is None or not sample.kept:
                continue
            arrived = sample.schedule.timesteps_prev[len(sample.kept) - 1]
            held = sample.region
            assert held is not None
            there = add_noise(z, noise, levels[arrived][None])[0]
            if settings.noise == "inversion":
                there = held.trajectory[len(sample.kept) - 1]
            assert torch.equal(sampler._z[0][:, ~free], there[:, ~free])
            assert torch.equal(sampler.z0[0][:, ~free], z[0][:, ~free])
            assert not torch.equal(sampler._z[0][:, free], there[:, free])
            seen += 1
    assert seen == len(sample.schedule) - 1 if sample is not None else seen > 3


def test_the_edge_fades_inside_and_the_image_border_is_none() -> None:
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[:, :40] = True
    w = weights(mask)
    assert torch.equal(w > 0, mask)
    assert w[5, :41].tolist() == [*[1.0] * 38, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0]
    made = torch.ones(3, 128, 128)
    assert torch.equal(compose(torch.zeros(3, 128, 128), made, mask)[0], w)


@pytest.mark.parametrize(("side", "reach"), [(32, 2), (128, 3)])
def test_auto_keeps_what_changed_most_and_the_faded_edge_lies_beyond_it(side: int, reach: int) -> None:
    image = torch.full((3, side, side), 0.2)
    made = image.clone()
    made[0, 10:13, 10:13] += 0.6
    made[1, 20, 20] += 0.29  # less than half as much
    whole = torch.ones(side, side, dtype=torch.bool)
    held, given = (Held(whole, 2 * image - 1, auto=auto) for auto in (True, False))
    same = Held(whole, 2 * image - 1, auto=True)
    narrow({0: held, 1: given, 2: same}, torch.stack([made, made, image]), lambda z: z)
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[10 - reach : 13 + reach, 10 - reach : 13 + reach] = True
    assert held.mask is not None
    assert torch.equal(held.mask, expected)
    assert (weights(held.mask)[10:13, 10:13] == 1).all()
    assert given.mask is whole  # a mask that was given stays
    assert same.mask is whole  # as does one where nothing changed


@pytest.mark.parametrize(
    ("region", "says"),
    [
        (torch.zeros(16, 16), "empty"), (torch.ones(8, 8), r"\[16, 16\], got \[8, 8\]"), ("1,2,3", "x,y,w,h"),
        ("3,3,0,2", "is empty"), ("10,10,7,2", "beyond the image of 16x16"), (torch.full((16, 16), 2.0), r"\[0, 1\]"),
        ("missing.png", "no such file"), ([corner(), corner()], "expected one for all or 1"),
    ],
)  # fmt: skip
def test_what_is_no_region_is_refused(engine: Engine, region: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"^region: .*{says}"):
        engine.counterfactual(images(1), region=region)


def test_masks_of_files_have_the_photos_size_or_the_models(tmp_path: Path) -> None:
    made = frame("crop", (64, 32), 16)
    grey = np.zeros((32, 64), np.uint8)
    grey[8:16, 24:40] = 200
    Image.fromarray(grey).save(tmp_path / "a.png")
    sample = Sample("a.jpg", tmp_path / "a.jpg")
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 4:12] = True
    for text in (tmp_path / "a.png", tmp_path, "24,8,16,8"):
        assert torch.equal(Masks(str(text)).of(sample, made), expected)
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "a.png")
    assert Masks(str(tmp_path)).of(sample, made).all()
    Image.fromarray(np.full((20, 16), 255, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(CounterlensError, match="has 16x20 pixels; a mask has the picture's own 64x32, or 16x16"):
        Masks(str(tmp_path)).of(sample, made)
    with pytest.raises(CounterlensError, match=r"has no b\.png"):
        Masks(str(tmp_path)).of(Sample("b.jpg", tmp_path / "b.jpg"), made)
    with pytest.raises(CounterlensError, match="nothing of the region is left"):
        Masks("0,0,8,8").of(sample, made)  # cropped away
    Image.fromarray(np.ones((16, 16), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(UsageError, match=r"an empty mask.*largest value is 1 of 255"):
        Masks(str(tmp_path / "black.png"))


def test_a_folder_of_masks_is_never_the_image_itself(tmp_path: Path) -> None:
    made = frame("squash", (16, 16), 16)
    for folder in ("masks", "in"):
        (tmp_path / folder).mkdir()
    light = np.full((16, 16), 255, np.uint8)
    Image.fromarray(light).save(tmp_path / "in" / "a.png")
    Image.fromarray(light).save(tmp_path / "masks" / "b.png")
    masks = Masks(str(tmp_path / "masks"))
    for id in (str(tmp_path / "in" / "a.png"), "../in/a.png"):  # as images are called on a command line
        with pytest.raises(CounterlensError, match=r"masks has no a\.png"):
            masks.of(Sample(id, tmp_path / "in" / "a.png"), made)
    assert masks.of(Sample(str(tmp_path / "in" / "b.png"), tmp_path / "in" / "b.png"), made).all()
    assert masks.files == [tmp_path / "masks" / "b.png"]  # which no output may replace


def test_auto_looks_at_what_guidance_added_to_the_denoiser_that_was_guided(engine: Engine, tiny: Any) -> None:
    own, classifier = tiny
    other = copy.copy(own)
    other.denoiser = copy.deepcopy(own.denoiser)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.denoiser.parameters():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=g) if weight.numel() > 1 else 0
    settings = {"realistic": NUMBERS, "audit": NUMBERS}
    both = Engine(own, classifier, distilled=other, pack_settings=settings)
    alone = Engine(other, classifier, pack_settings=settings)  # from noise it takes the same guided run
    x = images(4)
    targets = [(int(p) + 1) % 10 for p in engine.probabilities(x).argmax(1)]
    expected = alone.counterfactual(x, targets, region="auto")
    made = both.counterfactual(x, targets, config=Config(denoiser="distilled"), region="auto")
    assert torch.equal(torch.stack(made.regions), torch.stack(expected.regions))
    assert torch.equal(made.images, expected.images)


@pytest.mark.parametrize("command", ["serve", "profile", "export"])
def test_commands_that_have_no_picture_of_a_region_refuse_it(command: str) -> None:
    one_line_error(run(command, "--region", "0,0,4,4"), 2, "region: ")


def test_auto_of_a_run_that_ends_early_is_a_region_too(engine: Engine) -> None:
    """The budget ends it after the first step, before `auto` has seen all that it waits for."""
    x, settings = images(1)[0], engine.settings(Config(steps=8))
    seconds = iter(range(10_000))
    with engine.frozen(), torch.no_grad():
        sampler = engine.sampler(Config(steps=8), 1)
        sampler.clock = lambda: float(next(seconds))
        sampler.submit(Job(x, 3, 7, settings, budget_s=6.0, region="auto"))
        outcomes = []
        while sampler.busy:
            outcomes += sampler.tick()
    assert not outcomes[0].complete
    assert 1 <= len(outcomes[0].kept) < 3
    region = outcomes[0].region
    assert region is not None
    assert 0 < region.float().mean() < 1


def test_a_folder_whose_masks_were_changed_is_another_one(tmp_path: Path) -> None:
    """Files of the same size, too: a run that goes on would else mix both."""
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[0] = 255
    Image.fromarray(mask).save(tmp_path / "a.bmp")
    before, size = Masks(str(tmp_path)).facts(), (tmp_path / "a.bmp").stat().st_size
    Image.fromarray(mask.T.copy()).save(tmp_path / "a.bmp")
    assert (tmp_path / "a.bmp").stat().st_size == size
    assert Masks(str(tmp_path)).facts() != before
    Image.fromarray(mask).save(tmp_path / "a.bmp")
    assert Masks(str(tmp_path)).facts() == before
