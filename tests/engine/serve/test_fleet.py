"""Replicas on Ray Serve: what they share, and that one address answers while one of them is killed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("prometheus_client", reason="needs the extra `serve`")
from prometheus_client.parser import text_string_to_metric_families

from bench.serve import Served, pictures
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.serve import fleet
from counterlens.engine.serve.fleet import Board, Fleet, SharedTasks, merged
from counterlens.engine.serve.sizing import free_bytes
from tests.engine.cli.test_cli import one_line_error, run


class Near:
    """A board in this process, called as an actor is."""

    def __init__(self) -> None:
        self.board = Board([b"key"])

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.board, name)
        return type("Method", (), {"remote": staticmethod(lambda *given: asyncio.ensure_future(method(*given)))})


def test_any_replica_answers_for_a_task_and_deletes_it() -> None:
    pytest.importorskip("ray", reason="needs ray (the extra `serve-ray`)")

    async def go() -> None:
        near, cancelled = Near(), []
        mine, other = SharedTasks(near, "a"), SharedTasks(near, "b")
        assert await mine.open("task", lambda: cancelled.append("task"))
        mine.say("task", "progress", {"step": 1})
        assert await other.events("task", 0, 1) == [("progress", {"step": 1})]
        waiting = asyncio.create_task(other.events("task", 1, 5))
        await asyncio.sleep(0.01)
        mine.say("task", "result", {"status": "done"})
        assert await waiting == [("result", {"status": "done"})]
        await asyncio.sleep(0.01)
        assert not mine.watching
        assert await other.forget("task")
        assert await mine.events("task", 0, 0) is None
        assert cancelled == []  # it was done
        assert await mine.open("long", lambda: cancelled.append("long"))
        await asyncio.sleep(0.01)
        assert await other.forget("long")
        await asyncio.sleep(0.01)
        assert cancelled == ["long"]
        assert not await other.forget("long")

    asyncio.run(go())


def test_what_a_dead_replica_ran_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def go() -> None:
        board = Board([b"one"])
        assert await board.beat("a", b"") == ([b"one"], None)
        assert await board.open("task", "a")
        await board.renew([b"two"])
        await board.stop(3.0)
        clock[0] = fleet.GONE_S + 0.1
        assert await board.beat("b", b"") == ([b"two"], 3.0)
        assert list(await board.metrics()) == ["b"]
        ((kind, said),) = await board.events("task", 0, 0) or []
        assert (kind, said["status"]) == ("error", 503)
        assert "is gone; ask again" in said["detail"]
        assert await board.is_forgotten("task") is False

    asyncio.run(go())


def test_metrics_of_replicas_side_by_side() -> None:
    one = b'# HELP n_total Of a thing.\n# TYPE n_total counter\nn_total{kind="x"} 2.0\n'
    text = merged({"a": one, "b": one.replace(b"2.0", b"5.0")}).decode()
    (family,) = text_string_to_metric_families(text)
    assert {(s.labels["replica"], s.labels["kind"], s.value) for s in family.samples} == {("a", "x", 2), ("b", "x", 5)}
    assert text.count("# TYPE") == 1


def test_a_replicas_own_error_is_told() -> None:
    text = "Deploying failed\nTraceback\n  File x\ncounterlens.engine.errors.UsageError: pack: there is no 'x'\nmore"
    told = fleet._told(text)
    assert isinstance(told, UsageError)
    assert str(told) == "pack: there is no 'x'"
    assert type(fleet._told("first\nlast\n")) is CounterlensError
    assert str(fleet._told("first\nlast\n")) == "ray: last"


@pytest.mark.parametrize(
    ("cpus", "gpus", "node", "count"),
    [(2, 0.0, 8.0, 4), (2, 0.0, 5.0, 2), (2, 0.0, 1.0, 1), (2, 0.5, 64, 2), (2, 1, 64, 1)],
)
def test_so_many_replicas_share_memory(cpus: int, gpus: float, node: float, count: int) -> None:
    assert Fleet(most=4, cpus=cpus, gpus=gpus).neighbours(node) == count


def test_what_it_does_not_take() -> None:
    with pytest.raises(UsageError, match=r"^replicas: expected MIN\.\.MAX with 1 <= MIN <= MAX, got 3\.\.1"):
        Fleet(least=3, most=1)
    one_line_error(run("serve", "--ray", "local", "--replicas", "x"), 2, "replicas: expected MIN..MAX such as 1..4")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    pytest.importorskip("ray.serve", reason="needs ray[serve] (the extra `serve-ray`)")
    with Served("--ray", "local", "--replicas", "2", "--slots", "2") as made:
        yield made


@pytest.mark.slow
def test_two_replicas_of_which_one_is_killed(served: Served) -> None:
    """Tasks, streams, callers who leave, limits, a replica that dies, and the end: Ray takes its time to start."""
    from bench.serve_ray import killed

    image = pictures(1)[0]
    with httpx.Client(base_url=served.url, timeout=60) as client:
        made = client.post("/v1/counterfactuals", files={"image": image}, headers={"X-Request-Id": "mine"})
        assert made.json()["status"] in ("done", "skipped")
        assert made.headers.get_list("x-request-id") == ["mine"]
        memory = client.get("/v1/models").json()["models"][0]["memory"]
        assert memory["of"].endswith(", shared by 2 replicas")
        assert memory["free_bytes"] < free_bytes(torch.device("cpu"))[0] * 0.75
        missing = client.post("/v1/counterfactuals", data={"target": "3"}, files={"other": b""})
        assert missing.status_code == 400
        assert missing.json()["field"] == "image"
        assert client.post("/v1/counterfactuals", content=b"x" * 33_000_000).status_code in (413, 415)

        slow = {"data": {"speed": "exact", "config": '{"steps": 900, "strength": 0.9}'}, "files": {"image": image}}
        where = client.post("/v1/counterfactuals", headers={"Prefer": "respond-async"}, **slow).headers["location"]
        assert {client.get(where).status_code for _ in range(12)} == {202}  # whichever replica is asked
        assert client.delete(where).status_code == 204
        assert {client.get(where).status_code for _ in range(6)} == {404}

        with client.stream("POST", "/v1/counterfactuals", headers={"Accept": "text/event-stream"}, **slow) as told:
            assert "event: progress" in told.iter_lines()
        with pytest.raises(httpx.TimeoutException):
            client.post("/v1/counterfactuals", timeout=0.2, **slow)
        end = time.monotonic() + 60
        free = 0  # times in a row that no slot was busy: what a replica says is half a second old
        while free < 10 and time.monotonic() < end:
            free = 0 if total(client, "counterlens_slots_busy") else free + 1
            time.sleep(0.1)
        assert free == 10
        assert total(client, "counterlens_run_seconds_count") == 1  # none of the long ones ran to its end
    answered = killed(served, 40, 8.0, speed="fast")
    assert answered["answered"] == 40
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=60) == 0


def total(client: httpx.Client, name: str) -> float:
    """A sample of all replicas together."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(s.value for f in families for s in f.samples if s.name == name)
