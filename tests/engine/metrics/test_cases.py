"""The paper's motivating cases: what MSI ranks right and insertion or deletion alone does not; alpha_min's choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.metrics import constructed_cases
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.metrics import calibrate, gradient_maps, load_alpha_min, msi
from tests.engine.cli.test_cli import one_line_error, run
from tests.engine.metrics.models import Linear, Needs, Random, sample


def test_msi_ranks_what_insertion_and_deletion_do_not() -> None:
    scores = constructed_cases()
    value = {metric: {case: s[metric] for case, s in scores.items()} for metric in ("msi", "insertion", "deletion")}
    m = value["msi"]
    assert m["tight"] > m["oversized"]
    assert m["both of two"] >= m["one of two"] > m["irrelevant"]
    assert m["tight"] == pytest.approx(1 - 9 / 256, abs=1e-6)
    assert m["oversized"] == pytest.approx(1 - 81 / 256, abs=1e-6)
    assert m["both of two"] == pytest.approx(1 - 18 / 256, abs=1e-6)
    assert m["one of two"] == pytest.approx(-9 / 256, abs=1e-6)
    assert m["irrelevant"] == pytest.approx(-1 - 9 / 256, abs=1e-6)
    # Insertion and deletion see the order only: a map that also marks the surroundings is as good to them ...
    for metric in ("insertion", "deletion"):
        assert value[metric]["tight"] == pytest.approx(value[metric]["oversized"], abs=1e-9)
    # ... and to insertion, one of two sufficient regions is better than both.
    assert value["insertion"]["one of two"] > value["insertion"]["both of two"]


def test_calibration_reads_every_candidate_off_one_run() -> None:
    images, saliency = sample(6, (8, 8))
    model = Random()
    result = calibrate(model, images, saliency, candidates=[0.75, 0.25, 0.5], steps=5, seeds=list(range(6)))
    assert [c.alpha_min for c in result.candidates] == [0.25, 0.5, 0.75]
    for c in result.candidates:
        own = msi(model, images, saliency, alpha_min=c.alpha_min, steps=5, area=False).score
        target = model(images).argmax(1)
        other = msi(model, images, saliency.roll(-1, 0), target, alpha_min=c.alpha_min, steps=5, area=False).score
        assert c.own == pytest.approx(own.mean().item(), abs=1e-6)
        assert c.other == pytest.approx(other.mean().item(), abs=1e-6)
        assert c.effect == pytest.approx(((own - other).mean() / (own - other).std()).item(), abs=1e-4)
    assert result.alpha_min == max(result.candidates, key=lambda c: c.effect).alpha_min


def test_calibration_finds_the_level_that_makes_sense() -> None:
    # Each image's class hangs on its own pixel, marked 1; a halo of 0.4 around it is marked below 0.4 only, and holds
    # the neighbour's pixel as well: above the halo the maps tell the images apart, below they do not.
    images = torch.zeros(2, 1, 4, 4)
    images[0, 0, 1, 1] = images[1, 0, 2, 2] = 1
    maps = torch.zeros(2, 4, 4)
    maps[:, 1:3, 1:3] = 0.4
    maps[0, 1, 1] = maps[1, 2, 2] = 1
    sets = [torch.zeros(4, 4, dtype=torch.bool) for _ in range(2)]
    sets[0][1, 1] = sets[1][2, 2] = True
    result = calibrate(Needs(*sets), images, maps, 1, candidates=[0.2, 0.6], steps=1, baseline="zero")
    low, high = result.candidates
    assert low.own == pytest.approx(low.other, abs=1e-6)
    assert high.own - high.other == pytest.approx(2, abs=1e-6)


def test_calibration_refuses_maps_that_say_nothing() -> None:
    images, saliency = sample(2)
    with pytest.warns(UserWarning, match="2 of 2 maps are constant") as caught, pytest.raises(UsageError) as refused:
        calibrate(Random(), images, torch.zeros_like(saliency))
    assert len(caught) == 1
    assert "say nothing about the images" in str(refused.value)


def test_gradient_maps_of_a_linear_classifier() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    maps = gradient_maps(Linear(weight), torch.ones(3, 1, 2, 2), quantity="logit", batch_size=2)
    assert torch.equal(maps, weight.abs().expand(3, 2, 2))
    smooth = gradient_maps(Linear(weight), torch.ones(1, 1, 2, 2), quantity="logit", sigma=0.5)
    assert smooth.max() < 3


def test_calibrate_command(tmp_path: Path) -> None:
    common = ["metrics", "calibrate", "--count", "4", "--steps", "2", "--candidates", "0.3,0.6"]
    result = run(*common, "--out", tmp_path / "a", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    path = tmp_path / "a" / "calibration.json"
    assert json.loads(path.read_text()) | {"path": str(path)} == record
    assert record["alpha_min"] in (0.3, 0.6)
    assert (record["split"], record["classifier"], record["images"]) == ("validation", "clean", 4)
    assert "another" in record["rule"] or "other images" in record["rule"]
    assert load_alpha_min(path) == record["alpha_min"]
    maps = tmp_path / "maps.safetensors"
    save_file({"saliency": torch.rand(4, 32, 32)}, maps)
    text = run(*common, "--out", tmp_path / "b", "--maps", maps)
    assert "frozen in" in text.stdout
    assert json.loads((tmp_path / "b" / "calibration.json").read_text())["maps"] == "maps.safetensors"
    save_file({"saliency": torch.rand(3, 32, 32)}, maps)
    one_line_error(run(*common, "--out", tmp_path / "b", "--maps", maps), 2, "[4, 32, 32]", "[3, 32, 32]")
    save_file({"map": torch.rand(3, 32, 32)}, maps)
    one_line_error(run(*common, "--out", tmp_path / "b", "--maps", maps), 2, "no tensor `saliency`", "map")
    one_line_error(run(*common, "--out", tmp_path / "b", "--maps", tmp_path / "none"), 2, "none", "read")
    one_line_error(run("metrics", "calibrate", "--split", "test", "--out", tmp_path / "c"), 2, "split", "test")
    one_line_error(run("metrics", "calibrate", "--candidates", "low", "--out", tmp_path / "c"), 2, "candidates", "low")
    one_line_error(
        run("metrics", "calibrate", "--candidates", "1.5", "--count", "2", "--out", tmp_path / "c"),
        2,
        "alpha_min",
        "1.5",
    )
    one_line_error(run("metrics", "calibrate", "--classifier", "vgg", "--out", tmp_path / "c"), 2, "classifier", "vgg")
    assert not (tmp_path / "c").exists()
    help_text = " ".join(run("metrics", "calibrate", "--help").stdout.split())
    assert "Example: counterlens metrics calibrate" in help_text


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    for content in ("", "[]", '{"alpha_min": 0.5}', '{"format": "counterlens-msi-calibration", "alpha_min": 2}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UsageError, match=r"x\.json"):
            load_alpha_min(tmp_path / "x.json")
    images, saliency = sample(2)
    result = calibrate(Random(), images, saliency, candidates=[1.0])
    assert result.alpha_min == 1
    with pytest.raises(CounterlensError, match="cannot be written"):
        result.save(tmp_path / "missing" / "x.json")
    for arguments, word in (((images[:1], saliency[:1]), "two"), ((images, saliency, None), "candidates")):
        with pytest.raises(UsageError, match=word):
            calibrate(Random(), *arguments, candidates=[] if word == "candidates" else [0.5])
