"""The profiler: what it times, what it counts, what it writes."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from counterlens.engine import Config, Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.spans import STEP_PARTS, listening, span
from counterlens.engine.profiling.costs import count_costs
from counterlens.engine.profiling.profile import Profile, profile
from counterlens.engine.profiling.recorder import Recorder
from counterlens.engine.profiling.report import page, perfetto
from tests.engine.cli.test_cli import one_line_error, run

NUMBERS = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 45.0, "steps": 10}
SETTINGS = {mode: NUMBERS | {"strength": 0.3, "gradient": "exact"} for mode in ("realistic", "audit")}


@pytest.fixture(scope="module")
def engine(tiny: Any) -> Engine:
    return Engine(*tiny, Config(), pack_settings=SETTINGS, runtime="eager")


@pytest.fixture(scope="module")
def result(engine: Engine) -> Profile:
    torch.manual_seed(0)
    return profile(engine, torch.rand(5, 3, 16, 16), batch=2)


def test_spans_nest_and_cost_nothing_without_a_listener() -> None:
    assert isinstance(span("a"), nullcontext)
    recorder = Recorder(torch.device("cpu"))
    with listening(recorder):
        with span("a"), span("b"):
            pass
        with pytest.raises(ValueError, match="no"), span("c"):
            raise ValueError("no")
    assert isinstance(span("a"), nullcontext)
    spans = recorder.spans()
    assert [(s.name, s.parent) for s in spans] == [("a", -1), ("b", 0), ("c", -1)]
    assert spans[0].start <= spans[1].start <= spans[1].end <= spans[0].end <= spans[2].start


def test_costs_on_paper() -> None:
    """A product of 2x3 and 3x5 matrices is 60 operations on (6 + 15 + 10) floats; a view is free."""

    def step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with span("product"):
            return (a @ b.t()).view(10)

    costs = count_costs(step, (torch.ones(2, 3), torch.ones(5, 3)))
    assert (costs["product"].flops, costs["product"].bytes, costs["product"].peak_bytes) == (60, 31 * 4, 10 * 4)


def test_every_part_and_stage_is_there(result: Profile) -> None:
    assert set(result.parts) == set(STEP_PARTS) - {"UNet, both"}
    assert {name: p.calls for name, p in result.parts.items() if p.calls != 1} == {
        "classifier and distance": 2, "classifier and distance, VJP": 2, "decoder, VJP": 2, "UNet, VJP": 2,
    }  # fmt: skip
    assert (result.images, result.batch, result.slots, result.steps) == (4, 2, 2, 3)
    assert len(result.per_step) == 3
    assert {"predictions", "encode", "guided step", "decode", "bookkeeping", "unattributed"} == set(result.stages)
    # Stages add up to the calls, parts and the gaps between them to the step.
    assert sum(result.stages.values()) == pytest.approx(result.latency["mean"] / result.batch)
    assert sum(p.share for p in result.parts.values()) + result.gap_share == pytest.approx(1)
    assert 0 <= result.gap_share < 0.5
    assert 0 <= result.unattributed_share < 0.5
    assert result.step["p50"] <= result.step["p95"] <= result.step["p99"]
    assert result.overhead["step"] > 1
    assert result.overhead["guided_image"] > result.overhead["unguided_image"]
    # Both predictions are the same arithmetic; pulling back costs about as much again for each of two cotangents.
    parts = result.parts
    assert parts["UNet, conditional"].gflop == parts["UNet, unconditional"].gflop > 0
    assert parts["UNet, VJP"].gflop == pytest.approx(2 * parts["UNet, unconditional"].gflop, rel=0.3)


def test_reports_stand_alone(result: Profile) -> None:
    html = page(result)
    assert not re.search(r"https?://|<script|<link|src=", html)
    assert all(name in html for name in result.parts)
    assert "nan" not in html
    trace = json.loads(perfetto(result.spans))["traceEvents"]
    assert sum(e["name"] == "guided step" for e in trace) == 2 * 3
    assert json.loads(json.dumps(result.as_json()))["parts"]["decoder"]["share"] > 0


def test_bad_input(engine: Engine) -> None:
    with pytest.raises(UsageError, match="batch: expected 1 to 2, the number of images, got 3"):
        profile(engine, torch.rand(2, 3, 16, 16), batch=3)


def test_command(tmp_path: Path) -> None:
    done = run("profile", "--count", 1, "--steps", 4, "--runtime", "eager", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {"profile.html", "profile.json", "run.json", "trace.json"} <= {p.name for p in tmp_path.iterdir()}
    assert report["parts"]["decoder"]["gflop"] > 0.1
    one_line_error(run("profile", "--model", "nowhere", "--out", tmp_path), 2, "images: none given")
    one_line_error(run("profile", "--count", 1, "--batch", 2, "--out", tmp_path / "b"), 2, "batch: expected 1 to 1")
