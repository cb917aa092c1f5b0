"""Connections of callers who are slow or send too much, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from counterlens.engine.core.core import EngineCore
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.connection import HEADER_BYTES, Connection, http_server
from counterlens.engine.serve.guard import Limits
from counterlens.engine.serve.worker import Worker
from tests.engine.serve.test_http import engine, worker  # noqa: F401  # fixtures

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n"
SECONDS = 0.4


class Quick(Connection):
    seconds = SECONDS


@pytest.fixture(scope="module")
def port(engine: EngineCore, worker: Worker) -> Iterator[int]:  # noqa: F811
    """Of a server whose callers have little time."""
    server = http_server(make_app(engine, worker, limits=Limits(body_seconds=SECONDS)), 1, Quick)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


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


def test_headers_that_never_end_are_cut_off(port: int) -> None:
    said, seconds = drip(port, GET, b"X-More: 1\r\n")
    line, told = problem(said)
    assert " 408 " in line
    assert told["detail"] == "headers: not there after 0.4 s"
    assert told["field"] == "headers"
    assert SECONDS <= seconds < SECONDS + 3


def test_so_are_those_of_a_second_request_and_connections_without_one(port: int) -> None:
    said, _ = drip(port, GET + b"\r\n" + GET, b"X-More: 1\r\n")
    first, _, second = said.partition(b'{"status":"alive"}')
    assert b" 200 " in first
    assert " 408 " in problem(second)[0]
    said, seconds = drip(port, b"")
    assert said == b""
    assert seconds < SECONDS + 3


def test_a_body_that_never_ends_is_answered_and_then_cut_off(port: int) -> None:
    said, seconds = drip(port, POST + b"{", b" ")
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
def test_headers_that_are_too_large_are_refused(port: int, head: bytes) -> None:
    said, seconds = drip(port, GET + head)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert seconds < SECONDS
