"""Several counterfactuals of an image: the first is the run without `count`, the others start elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.engine.config import Config
from counterlens.engine.core.answers import SAME, Features, answer_seed, arranged, diversity
from counterlens.engine.engine import Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.sampler import renew
from counterlens.engine.images.files import as_saved
from counterlens.engine.outputs import Source, open_run, output_names
from tests.engine.cli.test_cli import one_line_error, run

NUMBERS = {
    "steps": 6, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
    "gradient": "detached", "spacing": "trailing",
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny) -> Engine:
    return Engine(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS})


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)).mul(255).round().div(255)


@pytest.mark.parametrize("kind", [{}, {"noise": "inversion", "solver": "dpm++"}])
def test_the_first_answer_is_the_run_without_count_and_the_others_are_others(
    engine: Engine, kind: dict[str, Any]
) -> None:
    x = images(3)
    predicted = engine.probabilities(x).argmax(1).tolist()
    targets = [(predicted[0] + 1) % 10, predicted[1], (predicted[2] + 1) % 10]  # the second is skipped
    plain = engine.counterfactual(x, targets, config=Config(**kind))
    steps: list[tuple[int, int]] = []
    several = engine.counterfactual(
        x, targets, config=Config(**kind, count=3), on_step=lambda *step: steps.append(step)
    )
    found = several.by_image()
    assert [[a.sample for a in answers] for answers in found] == [[0] * 3, [1], [2] * 3]
    assert several.samples == [0, 0, 0, 1, 2, 2, 2]
    assert found[1][0].status == "skipped"
    for i in (0, 2):
        assert sorted(a.k for a in found[i]) == [0, 1, 2]
        first = next(a for a in found[i] if a.k == 0)
        assert torch.equal(first.image, plain.images[i])
        assert first.seed == plain.seeds[i]
        assert [(not a.flipped, a.l1) for a in found[i]] == sorted((not a.flipped, a.l1) for a in found[i])
        for a in found[i]:
            assert a.seed == answer_seed(plain.seeds[i], a.k)
            assert torch.equal(a.input, x[i])
            assert a.record()["k"] == a.k
            assert a.provenance["count"] == 3
        assert not torch.equal(found[i][0].image, found[i][1].image)
    assert "count" not in plain.provenance[0]
    assert "k" not in plain.record(0)
    assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1] == (len(steps), len(steps))
    again = engine.counterfactual(x, targets, config=Config(**kind, count=3))
    assert torch.equal(again.images, several.images)


@pytest.mark.parametrize("kind", [{}, {"noise": "inversion", "solver": "dpm++"}])
def test_towards_the_runners_up_each_answer_is_the_run_towards_one_of_them(
    engine: Engine, kind: dict[str, Any]
) -> None:
    x = images(2)
    falling = engine.probabilities(x).argsort(dim=1, descending=True)
    several = engine.counterfactual(x, "runners-up", config=Config(**kind, count=3))
    for i, answers in enumerate(several.by_image()):
        assert sorted(a.k for a in answers) == [0, 1, 2]
        for a in answers:
            assert a.target == falling[i, a.k + 1]
            alone = engine.counterfactual(x, a.target, config=Config(**kind))
            torch.testing.assert_close(a.image, alone.images[i], atol=2e-3, rtol=0)  # in a batch of another size
            assert a.seed == alone.seeds[i]
    one = engine.counterfactual(x, "runners-up", config=Config(**kind))
    assert torch.equal(one.images, engine.counterfactual(x, config=Config(**kind)).images)
    with pytest.raises(UsageError, match=r"^count: 10 answers towards the runners-up .* there are 9$"):
        engine.counterfactual(x, ["runner-up", "runners-up"], config=Config(**kind, count=10))


def test_answers_keep_to_regions_and_counts_may_differ_by_image(engine: Engine) -> None:
    x, config = images(2), Config(noise="inversion", count=3)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:9, 3:11] = True
    several = engine.counterfactual(x, [3, 4], config=[config, Config(noise="inversion")], region=mask, seeds=[5, 6])
    assert several.samples == [0, 0, 0, 1]
    for answer in several:
        assert torch.equal(answer.image[:, ~mask], answer.input[:, ~mask])


def test_duplicates_are_dropped_and_what_flips_comes_first(engine: Engine) -> None:
    x = images(1)
    a, b, c = engine.counterfactual(x, [3], config=Config(count=3), seeds=[1])
    a.flipped, b.flipped, c.flipped = False, True, True
    a.l1, b.l1, c.l1 = 0.1, 0.3, 0.2
    b.image = (c.image + SAME / 4).clamp(0, 1)
    assert [answer.k for answer in arranged([a, b, c])] == [c.k, a.k]
    features = Features(engine.classifier, "classifier")
    f = features(as_saved(torch.stack([a.image, c.image])))
    assert diversity([a, c], features) == pytest.approx((f[0] - f[1]).norm().item())


def test_renewed_noise_is_as_large_and_none_of_it_is_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    latents, eps, noise = (torch.randn(4, 64, 64, generator=draw) for _ in range(3))
    abar = torch.tensor(0.3)
    z = abar.sqrt() * latents + (1 - abar).sqrt() * eps
    assert torch.allclose(renew(z, latents, noise, 0.0, abar), z, atol=1e-6)
    fresh = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    assert torch.allclose(renew(z, latents, noise, 1.0, abar), fresh, atol=1e-6)
    own = (renew(z, latents, noise, 0.6, abar) - abar.sqrt() * latents) / (1 - abar).sqrt()
    assert own.std().item() == pytest.approx(1, abs=0.02)
    assert (own * eps).mean().item() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("count", [0, -1, 17, 10**9, 2.5])
def test_counts_that_make_no_sense_are_refused(count: Any) -> None:
    with pytest.raises(UsageError, match=r"^count: "):
        Config(count=count)


def test_what_makes_one_of_an_image_refuses_several(engine: Engine, tmp_path: Path) -> None:
    config = Config(count=2)
    with pytest.raises(UsageError, match=r"^count: a whole run's file"):
        engine.export_counterfactual(tmp_path / "whole", config)
    with pytest.raises(UsageError, match=r"^count: an explanation"):
        engine.explain(images(1), method="ig", counterfactual=True, config=config)
    one_line_error(run("serve", "--count", 2), 2, "count: the service makes one")
    one_line_error(run("export", "--what", "counterfactual", "--count", 2), 2, "count: ")


def test_a_folder_tells_the_truth_about_several(tmp_path: Path) -> None:
    """By the command line: names, lines, going on after some were lost, and another count refused."""
    inputs, out = tmp_path / "in", tmp_path / "out"
    assert run("samples", "--count", 1, "--out", inputs).returncode == 0
    (image,) = inputs.glob("*.png")
    command = ["counterfactual", image, "--out", out, "--speed", "fast", "--count", 2]
    first = run(*command, "--json")
    assert first.returncode == 0
    lines = [json.loads(line) for line in first.stdout.splitlines()]
    assert [Path(line["path"]).name for line in lines] == [image.name, f"{image.stem}.2.png"]
    assert [(line["answer"], line["answers"], line["diversity_by"]) for line in lines] == [
        (1, 2, "judge"), (2, 2, "judge"),
    ]  # fmt: skip
    assert lines[0]["diversity"] > 0
    assert lines[0]["l1"] <= lines[1]["l1"]
    again = run(*command, "--json")
    assert "1 of 1 are done already" in again.stderr
    assert [json.loads(line) for line in again.stdout.splitlines()] == lines
    Path(lines[1]["path"]).unlink()
    assert "done already" not in run(*command).stderr
    log = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in log] == [image.stem, f"{image.stem}.2"]
    assert all(Path(line["path"]).is_file() for line in log)
    one_line_error(run(*command[:-1], 3), 2, "count was 2, is 3")


def test_an_image_that_is_named_like_another_ones_second_answer_gets_a_name_of_its_own(tmp_path: Path) -> None:
    assert output_names(["a", "a.2"], (), (".png", ".2.png")) == ["a", "a.2-2"]
    sources = [Source("a", {"image": "a"}), Source("a.2", {"image": "a.2"})]
    with open_run(tmp_path, {"command": "c"}, sources=sources, endings=[".png"], further=[".2.png"]) as opened:
        assert opened.names == ["a", "a.2-2"]
        assert set(opened.description["files"]) >= {"a.png", "a.2.png", "a.2-2.png", "a.2-2.2.png"}


def test_saving_names_the_answers_of_an_image(engine: Engine, tmp_path: Path) -> None:
    several = engine.counterfactual(images(2), [3, 4], config=Config(count=2), seeds=[1, 2])
    paths = several.save(tmp_path, ["a", "b"])
    assert [path.name for path in paths] == ["a.png", "a.2.png", "b.png", "b.2.png"]
