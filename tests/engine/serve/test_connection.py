"""Connections of callers who are slow or send too much, over real sockets."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench import hostile
from counterlens.engine.core.core import EngineCore
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.connection import FILES, HEADER_BYTES, SPARE, Connection, http_server
from counterlens.engine.serve.guard import Keys, Limits
from counterlens.engine.serve.worker import Worker
from tests.engine.serve.test_http import picture
from tests.engine.serve.test_worker import Gate, working

BODY = json.dumps({"image": base64.b64encode(picture()).decode()}).encode()
ASYNC = {"Prefer": "respond-async"}
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n"
SECONDS = 0.4


class Quick(Connection):
    seconds = SECONDS


@contextmanager
def listening(app: Any, connection: type[Connection] = Connection, most: int = 1000) -> Iterator[int]:
    """The port of a server that runs meanwhile."""
    server = http_server(app, 1, connection, most)
    with socket.create_server(("127.0.0.1", 0)) as held:
        thread = threading.Thread(target=server.run, args=([held],))
        thread.start()
        try:
            yield held.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def port(engine: EngineCore, worker: Worker) -> Iterator[int]:
    """Of a server whose callers have little time."""
    with listening(make_app(engine, worker, limits=Limits(body_seconds=SECONDS)), Quick) as found:
        yield found


@pytest.fixture(scope="module")
def patient(engine: EngineCore, worker: Worker) -> Iterator[int]:
    """Of a server as it is."""
    with listening(make_app(engine, worker)) as found:
        yield found


def drip(port: int, first: bytes, rest: bytes = b"") -> tuple[bytes, float]:
    """All that comes back until the server closes, and after how long; `rest` goes byte by byte, again and again."""
    began, said = time.perf_counter(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as held:
        held.sendall(first)
        held.settimeout(0.05)
        while time.perf_counter() - began < 10:
            try:
                if not (more := held.recv(65536)):
                    return said, time.perf_counter() - began
                said += more
            except TimeoutError:
                pass
            except ConnectionError:
                return said, time.perf_counter() - began
            if rest:
                try:
                    held.sendall(rest[:1])
                except ConnectionError:
                    return said, time.perf_counter() - began
                rest = rest[1:] + rest[:1]
    raise AssertionError(f"still open after 10 s: {said!r}")


def problem(said: bytes) -> tuple[str, dict[str, Any]]:
    """Status line and problem details of an answer."""
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    return head.split(b"\r\n")[0].decode(), json.loads(body)


SLOW = {
    "headers": (GET, b"X-More: 1\r\n"), "second": (GET + b"\r\n" + GET, b"X-More: 1\r\n"), "nothing": (b"", b""),
    "body": (POST + b"{", b" "),
}  # fmt: skip


@pytest.fixture(scope="module")
def slow(port: int) -> dict[str, tuple[bytes, float]]:
    """What callers who never come to an end get, at the same time, and after how long."""
    with ThreadPoolExecutor(len(SLOW)) as pool:
        told = {name: pool.submit(drip, port, *sent) for name, sent in SLOW.items()}
    return {name: one.result() for name, one in told.items()}


def test_headers_that_never_end_are_cut_off(slow: dict[str, tuple[bytes, float]]) -> None:
    said, seconds = slow["headers"]
    line, told = problem(said)
    assert " 408 " in line
    assert told["detail"] == "headers: not there after 0.4 s"
    assert told["field"] == "headers"
    assert SECONDS <= seconds < SECONDS + 3


def test_so_are_those_of_a_second_request_and_connections_without_one(slow: dict[str, tuple[bytes, float]]) -> None:
    said, _ = slow["second"]
    first, _, second = said.partition(b'{"status":"alive"}')
    assert b" 200 " in first
    assert " 408 " in problem(second)[0]
    said, seconds = slow["nothing"]
    assert said == b""
    assert seconds < SECONDS + 3


def test_a_body_that_never_ends_is_answered_and_then_cut_off(slow: dict[str, tuple[bytes, float]]) -> None:
    said, seconds = slow["body"]
    line, told = problem(said)
    assert " 408 " in line
    assert told["detail"] == "body: not there after 0.4 s"
    assert SECONDS <= seconds < 2 * SECONDS + 3  # 90 bytes at this pace would take more


def test_requests_in_time_are_not_cut_off(port: int) -> None:
    """A connection lives longer than the headers of one request may take, and so does a request."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as held:
        while time.perf_counter() - began < 2 * SECONDS:
            held.sendall(GET)
            time.sleep(SECONDS / 4)
            held.sendall(b"\r\n")
            assert b" 200 " in held.recv(65536)


@pytest.mark.parametrize("head", [b"X-Long: " + b"a" * 2 * HEADER_BYTES, b"X-A: b\r\n" * (HEADER_BYTES // 4)])
def test_headers_that_are_too_large_are_refused(patient: int, head: bytes) -> None:
    said, seconds = drip(patient, GET + head)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert seconds < Connection.seconds / 2  # it is not waited for more


def test_connections_beyond_the_limit_are_told_and_probes_are_answered(
    engine: EngineCore, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("counterlens.engine.serve.connection.SPARE", 1)
    models = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    with listening(make_app(engine, worker), most=2) as there:
        held = []
        for _ in range(2):
            held.append(socket.create_connection(("127.0.0.1", there), timeout=10))
            held[-1].sendall(models)
            assert held[-1].recv(65536).startswith(b"HTTP/1.1 200 ")
        said, _ = drip(there, models)  # and it is closed
        line, told = problem(said)
        assert " 503 " in line
        assert told["detail"].startswith("connections: too many are open")
        assert b"retry-after: 1" in said
        for probe in (b"/healthz", b"/readyz", b"/metrics", b"/v2/health/ready"):
            said, _ = drip(there, GET.replace(b"/healthz", probe) + b"\r\n")
            assert said.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in said
        with socket.create_connection(("127.0.0.1", there), timeout=10):
            time.sleep(0.05)
            assert drip(there, models)[0] == b""  # beyond the spare ones: nothing
        held[0].sendall(models)
        assert held[0].recv(65536).startswith(b"HTTP/1.1 200 ")  # those of before go on
        held.pop().close()
        with httpx.Client(base_url=f"http://127.0.0.1:{there}") as client:
            end = time.perf_counter() + 10
            while client.get("/v1/models").status_code == 503:
                assert time.perf_counter() < end
            assert [client.get("/v1/models").status_code for _ in range(2)] == [200, 200]
        held.pop().close()


def test_the_limit_on_open_files_makes_room_for_connections() -> None:
    """As far as the hard one goes, which a child is given."""
    code = """
import os, resource as r
from counterlens.engine.serve.connection import room_for

for limits in (512, 2048), (512, 700), (100, 100):
    if not os.fork():
        r.setrlimit(r.RLIMIT_NOFILE, limits)
        print(room_for(1000), r.getrlimit(r.RLIMIT_NOFILE)[0], flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert said == [(1000, 1000 + SPARE + FILES), (700 - SPARE - FILES, 700), (1, 100)]


def test_a_key_runs_so_many_requests_at_once_and_one_that_leaves_makes_room(
    engine: EngineCore,
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    post = POST.replace(b"predictions", b"counterfactuals").replace(b"90\r\n", b"%d\r\nAuthorization: Bearer one\r\n")
    asked = post % len(BODY) + BODY
    with working(engine, slots=1) as worker:
        app = make_app(engine, worker, keys=Keys(file), limits=Limits(per_key=2))
        with listening(app) as there, httpx.Client(base_url=f"http://127.0.0.1:{there}", timeout=20) as client:
            one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))

            def soon(status: int) -> httpx.Response:
                """What key one is told, once it has this status."""
                end = time.perf_counter() + 10
                while (said := client.get("/v1/models", headers=one)).status_code != status:
                    assert time.perf_counter() < end, said.text
                    time.sleep(0.01)
                return said

            callers = [socket.create_connection(("127.0.0.1", there), timeout=20) for _ in range(2)]
            with Gate(worker):
                for caller in callers:
                    caller.sendall(asked)
                refused = soon(429)
                assert refused.json()["detail"] == "key: 2 requests of it run already"
                assert refused.headers["retry-after"] == "1"
                assert client.get("/v1/models", headers=two).status_code == 200
                assert client.get("/healthz", headers=one).status_code == 200
                callers[0].close()
                soon(200)
                later = client.post("/v1/counterfactuals", files={"image": picture()}, headers=one | ASYNC)
                assert later.status_code == 202
                soon(429)  # it runs on
                assert client.get(later.headers["Location"], headers=one).status_code == 202  # and is to be had
            assert callers[1].recv(65536).startswith(b"HTTP/1.1 200 ")
            soon(200)
            callers[1].close()


def test_nobody_is_let_in_without_the_key(engine: EngineCore, worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("the-key\nother\n")
    with listening(make_app(engine, worker, keys=Keys(file))) as there:
        assert hostile.keys(f"http://127.0.0.1:{there}", "the-key") == []
