"""`counterlens serve` as a process: it answers, is stopped, and says what it does not take."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from counterlens.engine.cli import serve
from counterlens.engine.cli.main import app
from counterlens.engine.config import Config
from counterlens.engine.errors import UsageError
from counterlens.engine.serve.wire import png
from tests.engine.cli.test_cli import one_line_error, run

COMMAND = [sys.executable, "-m", "counterlens.engine.cli.main", "serve", "--port", "0", "--slots", "2"]


def test_it_answers_and_finishes_what_runs_when_it_is_stopped(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    said = tmp_path / "said"
    with said.open("w") as log:
        process = subprocess.Popen([*COMMAND, "--api-key-file", str(keys)], stderr=log)
    try:
        while (found := re.search(r"serving at (\S+)", said.read_text())) is None:
            assert process.poll() is None, said.read_text()
            time.sleep(0.05)
        key = {"Authorization": "Bearer secret"}
        image = png(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)))
        with httpx.Client(base_url=found[1], timeout=60) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.05)
            assert client.get("/v1/models").status_code == 401
            keys.write_text("other\n")
            process.send_signal(signal.SIGHUP)
            while client.get("/v1/models", headers=key).status_code != 401:
                time.sleep(0.05)
            key = {"Authorization": "Bearer other"}
            done = client.post("/v1/counterfactuals", files={"image": image}, headers=key)
            assert done.json()["status"] in ("done", "skipped")
            assert client.get("/docs", headers=key).status_code == 200
            task = client.post("/v1/counterfactuals", files={"image": image}, headers=key | {"Prefer": "respond-async"})
            assert task.status_code == 202
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert "stopping: what runs is finished" in said.read_text()
        assert "secret" not in said.read_text()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 is beyond this machine; give --api-key-file"),
        (["--slots", "3"], "slots: expected auto or one of 1, 2, 4, 8, 16"),
        (["--slots", "x"], "slots: expected auto or a number"),
        (["--api-key-file", "nowhere"], "api-key-file: nowhere cannot be read"),
        (["--preload-speeds", "warp"], "speed"),
        (["--max-queue", "0"], "max-queue"),
        (["--allow-host", "https://lens.example/"], "allow-host: expected a name such as lens.example"),
        (["--allow-host", "*"], "allow-host: expected a name"),
        (["--ray", "local", "--max-connections", "50"], "max-connections: has no use with --ray"),
    ],
)
def test_what_it_does_not_take(options: list[str], word: str) -> None:
    one_line_error(run("serve", *options), 2, word)


def test_the_speeds_that_are_named_are_warm_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the slots that its first requests take; and requests that name no speed get the first one."""
    made: list[Any] = []
    monkeypatch.setattr(serve, "_run", lambda *given: made.append(given))
    options = ["serve", "--port", "0", "--runtime", "eager", "--preload-speeds", "balanced,exact", "--slots", "2"]
    runner = CliRunner()
    result = runner.invoke(app, options)
    assert result.exit_code == 0, result.output
    (_, worker, listening, *_, warm, _) = made[0]
    listening.close()
    engine, ran = worker.engine, []
    prepare = engine.runners.prepare

    def noted(settings: Any, slots: int, measure: bool | None) -> Any:
        ran.append((settings.graph, settings.steps, slots))
        return prepare(settings, slots, measure)

    monkeypatch.setattr(engine.runners, "prepare", noted)
    warm()
    said = [engine.settings(Config(speed=speed)) for speed in ("balanced", "exact")]
    assert said[0].graph != said[1].graph
    assert ran == [(s.graph, s.steps, 2) for s in said]
    assert engine.config.speed == "balanced"
    assert "Requests get the first, or --speed's" in re.sub(
        r"[\s│]+", " ", runner.invoke(app, ["serve", "--help"]).output
    )


def test_the_speed_of_requests_is_warm_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def opened(*given: Any) -> None:
        asked.append(given)
        raise UsageError("enough is seen")

    monkeypatch.setattr(serve, "_open", opened)
    assert CliRunner().invoke(app, ["serve", "--port", "0", "--speed", "exact"]).exit_code != 0
    ((config, _, configs, *_),) = asked
    assert config.speed == "exact"
    assert [one.speed for one in configs] == ["exact", "fast"]


def test_a_warm_up_that_fails_ends_it() -> None:
    one_line_error(run("serve", "--port", "0", "--runtime", "tensorrt"), 1, "tensorrt: ")


def test_a_port_that_is_taken() -> None:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        one_line_error(run("serve", "--port", held.getsockname()[1]), 1, "port: ")
