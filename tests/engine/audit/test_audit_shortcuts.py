"""Shortcuts that are nowhere in particular: statistics by hand, planted and honest pushes, batches put together."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from counterlens.engine import Config, Engine
from counterlens.engine.audit.disagreement import FACTS, LACKS, MAPS, alarms, family, find, judge, read_facts, verdict
from counterlens.engine.audit.looks import Look, joined, look_files, read_look, write_look
from counterlens.engine.audit.merge import merge
from counterlens.engine.audit.report import write_report
from counterlens.engine.audit.results import Results
from counterlens.engine.audit.statistics import STATISTICS, boxes, colours, measure, moved
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack
from tests.engine.audit.test_audit import make_engine, run, source  # noqa: F401

PLACE = {s.name: k for k, s in enumerate(STATISTICS)}


def picture(values: Tensor | float = 0.0, channel: int | None = None) -> Tensor:
    """One picture [1, 3, 32, 32] with these values in a channel, or in all."""
    out = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    out[0, slice(None) if channel is None else channel] = values
    return out


def shares(p: Tensor) -> dict[str, float]:
    return dict(zip(PLACE, measure(p)[0].tolist(), strict=True))


def test_statistics_by_hand() -> None:
    """Shares of energy that anyone can count: hues, rings two pixels wide, stripes and what repeats."""
    grey, red = shares(picture(1.0)), shares(picture(1.0, 0))
    assert grey["colour red-blue"] == pytest.approx(0)
    assert red["colour red-blue"] == pytest.approx(1 / 2)  # (1, 0, 0) on (1, 0, -1) / sqrt 2
    assert red["colour green-magenta"] == pytest.approx(1 / 6)  # on (-1, 2, -1) / sqrt 6
    assert grey["ring 0"] == pytest.approx((32**2 - 28**2) / 32**2)
    assert grey["ring 1"] == pytest.approx((28**2 - 24**2) / 32**2)
    assert grey["side top"] == grey["side left"] == pytest.approx(2 / 32)
    line = torch.zeros(32, 32)
    line[:2] = 1
    top = shares(picture(line))
    assert (top["side top"], top["side bottom"]) == pytest.approx((1, 0))
    assert top["ring 0"] == pytest.approx((64 / 240) ** 2 * 240 / 64)  # the ring's mean, of 64 in 240 pixels
    line[:, ::2] *= -1
    assert shares(picture(line))["side top"] == pytest.approx(0)  # neither lighter nor darker
    assert boxes("side top", 32) == [(0, 0, 2, 32)]
    assert boxes("ring 1", 32) == [(2, 2, 30, 30), (4, 4, 28, 28)]
    assert boxes("band 0", 32) == []
    names = [f"band {k}" for k in range(3)] + ["repeat 4"]
    for period, found in ((2, {"band 0"}), (4, {"band 0", "repeat 4"}), (8, {"band 1"}), (16, {"band 2"})):
        wave = torch.cos(2 * torch.pi * (torch.arange(32) + 0.3) / period)
        for stripes in (wave.expand(32, 32), wave[:, None].expand(32, 32)):
            said = shares(picture(stripes))
            assert {name: said[name] for name in names} == pytest.approx(
                {n: float(n in found) for n in names}, abs=1e-9
            )
    assert not measure(picture()).any()
    for size in ((7, 5), (3, 3), (1, 9)):
        assert np.isfinite(measure(torch.rand(2, 3, *size, dtype=torch.float64))).all()


def drawn(n: int, seed: int, tint: float = 0.0, frame: float = 0.0) -> dict[str, np.ndarray]:
    """Push and evidence of n samples from one law; a tint or a frame is added to the push."""
    rng = torch.Generator().manual_seed(seed)
    push, evidence = (torch.randn(n, 3, 32, 32, generator=rng, dtype=torch.float64) for _ in range(2))
    push[:, 0] += tint
    push[:, 2] -= tint
    push[:, :, :2] += frame / 5
    even = np.full((n, 8, 8), 1 / 64)
    return {
        "push": even, "removed": even * 0, "evidence": even, "push statistics": measure(push),
        "evidence statistics": measure(evidence),
    }  # fmt: skip


def test_planted_is_found_and_a_null_is_not() -> None:
    found = [{s["name"] for s in judge(drawn(40, s, tint=2.0), 32)["statistics"] if s["found"]} for s in range(5)]
    assert all("colour red-blue" in names for names in found)
    found = [{s["name"] for s in judge(drawn(40, s, frame=5.0), 32)["statistics"] if s["found"]} for s in range(5)]
    assert all({"side top"} <= names for names in found)
    assert not [s for s in range(20) if judge(drawn(40, s), 32)["smallest_p"] < 0.05]
    assert family(drawn(3, 0)).shape == (3, 64 + len(STATISTICS))


def test_colours_are_named() -> None:
    push = np.array([[0.3, 0.1, -0.1], [0.32, 0.1, -0.1], [-0.1, 0.1, 0.3], [-0.1, 0.12, 0.3]])
    found = colours(push, np.array([7, 7, 2, 2]), {7: "seven", 2: "two"})
    assert found["poles"] == ["red", "blue"]
    assert found["labels"] == [["seven"], ["two"]]
    facts = {"colours": found, "all": judge(drawn(40, 0, tint=2.0), 32)}
    said = verdict(facts, 32)
    assert "pushes the whole image towards red (for seven) or towards blue (for two): look for a tint" in said
    assert "Tints, borders" not in said
    facts["all"].pop("statistics")
    assert LACKS in verdict(facts, 32)
    assert alarms(facts) == []


class Tinted(torch.nn.Module):
    """The pack's honest classifier, and beside it: the redder the image, the more a digit is five or more."""

    def __init__(self, strength: float = 40.0) -> None:
        super().__init__()
        self.inner, self.strength = Pack("digits").classifier("clean").module, strength

    def forward(self, x: Tensor) -> Tensor:
        red = (x[:, 0] - x[:, 2]).mean(dim=(1, 2))
        upper = torch.tensor([-1.0] * 5 + [1.0] * 5)
        return self.inner(x) + self.strength * red[:, None] * upper


@pytest.mark.slow
def test_a_planted_tint_is_found_in_the_digits() -> None:
    """Counterfactuals of real models; the honest classifier on the same images raises no alarm."""
    pack = Pack("digits")
    images = pack.samples("validation", count=20, seed=3).images
    for module, planted in ((Tinted(), True), (pack.classifier("clean").module, False)):
        classifier = SoftmaxClassifier(module, pack.classifier("clean").labels)
        settings = pack.manifest["settings"]
        engine = Engine(pack.diffusion(), classifier, Config(), pack_settings=settings, runtime="eager")
        facts, _ = find(engine, images, [str(i) for i in range(20)], engine.config)
        assert (alarms(facts) != []) == planted, facts["all"]["statistics"]
        if planted:
            assert facts["all"]["statistics"][0]["name"] == "colour red-blue"  # what stands out most
            assert facts["colours"]["poles"][0] == "red"
            assert all(int(label) >= 5 for label in facts["colours"]["labels"][0])


def test_what_changes_is_linear_in_the_field(tiny) -> None:
    engine = make_engine(tiny)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    field = np.random.default_rng(0).standard_normal((3, 4, 4, 4))
    field[2] = 0
    changed = moved(engine, images, field)
    assert changed[:2].flatten(1).norm(dim=1).min() > 0
    assert not changed[2].any()
    torch.testing.assert_close(moved(engine, images, -2 * field), -changed, rtol=1e-3, atol=1e-6)


# Batches


def facts_of(folder: Path) -> tuple[str, bytes]:
    return (folder / FACTS).read_text(), (folder / MAPS).read_bytes()


@pytest.fixture(scope="module")
def single(tiny, source: Path, tmp_path_factory) -> Results:  # noqa: F811
    return run(make_engine(tiny), source, tmp_path_factory.mktemp("single"), shortcuts=9)


def test_shards_resumed_and_merged_are_one_run(tiny, source: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("counterlens.engine.audit.disagreement.BATCH", 4)
    whole = run(make_engine(tiny), source, tmp_path / "whole", shortcuts=9)
    assert len(look_files(whole.folder)) == 3
    shards = [tmp_path / "a", tmp_path / "b"]
    for k, folder in enumerate(shards):
        run(make_engine(tiny), source, folder, shortcuts=9, shard=(k + 1, 2))
        assert read_facts(folder) is None
    said: list[str] = []
    merge(shards[:1] * 1 + shards[1:], tmp_path / "merged", said.append)
    assert facts_of(tmp_path / "merged") == facts_of(whole.folder)
    # Fewer samples, into the same folder.
    fewer = run(make_engine(tiny), source, tmp_path / "fewer", shortcuts=4)
    for k, folder in enumerate(shards):
        run(make_engine(tiny), source, folder, shortcuts=4, shard=(k + 1, 2))
    merge(shards, tmp_path / "merged", said.append)
    assert said == []
    assert facts_of(tmp_path / "merged") == facts_of(fewer.folder)
    for k, folder in enumerate(shards):
        run(make_engine(tiny), source, folder, shortcuts=9, shard=(k + 1, 2))
    # A batch is lost: it alone is made again.
    kept = [p.stat().st_mtime_ns for p in look_files(whole.folder)]
    before = facts_of(whole.folder)
    look_files(whole.folder)[1].unlink()
    (whole.folder / FACTS).unlink()
    run(make_engine(tiny), source, whole.folder, shortcuts=9)
    assert facts_of(whole.folder) == before
    now = [p.stat().st_mtime_ns for p in look_files(whole.folder)]
    assert (now[0], now[2]) == (kept[0], kept[2])
    assert now[1] != kept[1]
    # A shard that looked at none.
    look_files(shards[1])[0].unlink()
    merge(shards, tmp_path / "less", said.append)
    assert said[-1].startswith("shortcuts: 1 of 3 batches are missing")
    assert read_facts(tmp_path / "less") is None
    other = read_look(look_files(shards[0])[0])
    other.facts["asked"] = 7
    write_look(shards[0], 0, other, "")
    with pytest.raises(UsageError, match="run all shards with the same --shortcuts"):
        merge(shards, tmp_path / "mixed")


def test_another_number_of_samples_is_another_search(tiny, source: Path, single: Results, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(single.folder, tmp_path / "out")
    run(make_engine(tiny), source, tmp_path / "out", shortcuts=4)
    facts = read_facts(tmp_path / "out")
    assert facts is not None
    assert facts["asked"] == facts["all"]["samples"] == 4
    before = facts_of(tmp_path / "out")
    (tmp_path / "out" / MAPS).unlink()  # as a message about a damaged one says
    run(make_engine(tiny), source, tmp_path / "out", shortcuts=4)
    assert facts_of(tmp_path / "out") == before


def test_older_audits_open_and_say_what_they_lack(tiny, source: Path, single: Results, tmp_path: Path) -> None:  # noqa: F811
    """Made before there were statistics: the report says so, and the same command makes them."""
    folder = tmp_path / "out"
    shutil.copytree(single.folder, folder)
    assert "Tints, borders and textures by rank" in write_report(Results.open(folder)).read_text()
    facts = json.loads((folder / FACTS).read_text())
    del facts["colours"], facts["size"], facts["all"]["statistics"]
    (folder / FACTS).write_text(json.dumps(facts))
    with np.load(folder / MAPS) as maps:
        np.savez_compressed(folder / MAPS, **{k: v for k, v in maps.items() if "picture" not in k})
    shutil.rmtree(folder / "disagreement")
    page = write_report(Results.open(folder)).read_text()
    assert LACKS in page
    assert "by rank" in page
    run(make_engine(tiny), source, folder, shortcuts=9)
    assert (folder / FACTS).read_text() == (single.folder / FACTS).read_text()


def test_the_report_says_what_stands_out_of_a_class(single: Results, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(single.folder, folder)
    facts = json.loads((folder / FACTS).read_text())
    facts["by_class"] = {"2": judge(drawn(40, 0, tint=2.0), 32), "3": judge(drawn(40, 0), 32)}
    facts["all"] |= {"places": [], "smallest_p_of_places": 0.123}
    (folder / FACTS).write_text(json.dumps(facts))
    page = write_report(Results.open(folder)).read_text()
    row = re.findall("<tr><td>2</td><td>40</td>.*", page)[0]
    assert "the whole image between red and blue" in row
    assert "green" not in row  # of each family what stands out most
    assert "<tr><td>3</td><td>40</td><td>none</td>" in page
    assert re.search(r"No place stands out</strong> .*smallest p\s+0.12\)", page)


def test_batches_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_look(tmp_path, 3, Look({"counts": {"lost": 2}}, {"push": np.ones((2, 1))}, {"lost": np.ones((4, 4))}), "")
    look = read_look(tmp_path / "disagreement" / "000003.npz")
    assert joined([look, look])[0]["push"].shape == (4, 1)
    assert joined([look, look])[1]["lost"].mean() == 0.5
    path = look_files(tmp_path)[0]
    whole = path.read_bytes()
    for damaged in (
        whole[:40],
        b"",
        b"text",
        *(whole[:k] + bytes([whole[k] ^ 16]) + whole[k + 1 :] for k in range(300)),
    ):
        path.write_bytes(damaged)
        try:
            read_look(path)  # of some bytes nothing depends
        except CounterlensError as error:
            assert re.search(r"000003.npz: .*made again", str(error))  # noqa: PT017
        else:
            assert len(damaged) == len(whole)
