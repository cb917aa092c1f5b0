"""What is kept for callers that come back is bounded: in number, in time and in size."""

from __future__ import annotations

import asyncio
import time

import pytest
from starlette.testclient import TestClient

from counterlens.engine.core.core import EngineCore
from counterlens.engine.serve import app, server, tasks
from counterlens.engine.serve.tasks import Tasks
from tests.engine.serve.test_http import picture
from tests.engine.serve.test_worker import Gate, working

ASYNC = {"Prefer": "respond-async"}


def run(client: TestClient) -> str:
    """The address of a finished task."""
    where: str = client.post("/v1/counterfactuals", files={"image": picture()}, headers=ASYNC).headers["location"]
    while client.get(where).status_code == 202:
        time.sleep(0.005)
    return where


def test_results_are_kept_for_a_while(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks.KEPT_S == 600
    monkeypatch.setattr(tasks, "KEPT_S", 0.5)
    where = run(client)
    assert client.get(where).status_code == 200
    end = time.monotonic() + 20
    while (gone := client.get(where)).status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert gone.status_code == 404
    assert gone.json()["detail"] == "counterfactual: there is none of this name, or none any more (600 s)"


def test_the_oldest_finished_one_makes_room_and_none_that_runs(
    engine: EngineCore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tasks.KEPT == 256
    monkeypatch.setattr(tasks, "KEPT", 2)
    monkeypatch.setattr(server, "KEPT", 2)
    with working(engine, slots=2) as made, TestClient(app.make_app(engine, made)) as there:
        done = [run(there) for _ in range(3)]
        assert [there.get(where).status_code for where in done] == [404, 200, 200]
        with Gate(made):
            asked = [there.post("/v1/counterfactuals", files={"image": picture()}, headers=ASYNC) for _ in range(3)]
            assert [answer.status_code for answer in asked] == [202, 202, 429]
            assert asked[2].json()["detail"] == "tasks: 2 run already"
            assert asked[2].headers["retry-after"] == "5"
            assert [there.get(where).status_code for where in done] == [404] * 3
        assert there.delete(asked[0].headers["location"]).status_code == 204
        assert there.post("/v1/counterfactuals", files={"image": picture()}, headers=ASYNC).status_code == 202


def test_images_are_kept_up_to_a_size_in_all() -> None:
    """Of 100 million characters each, two fit, also of runs that go on; the newest stays whatever its size."""
    assert tasks.KEPT_CHARACTERS == 256_000_000
    picture = "x" * 100_000_000  # one text in all of them

    async def kept() -> list[list[str]]:
        there, found = Tasks(), []
        for name in ("one", "two", "running", "three", "four"):
            assert await there.open(name, lambda: None)
            there.say(name, "progress", {"step": 1, "image": picture})
            if name != "running":
                there.say(name, "result", {"image": picture if name == "four" else ""})
            found.append([*there.tasks])
        return found

    assert asyncio.run(kept()) == [
        ["one"], ["one", "two"], ["two", "running"], ["running", "three"], ["running", "four"],
    ]  # fmt: skip
