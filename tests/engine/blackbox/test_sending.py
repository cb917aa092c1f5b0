"""Servers that keep a request waiting, a byte at a time: it ends at its deadline."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from counterlens.engine.blackbox.box import open_box
from counterlens.engine.blackbox.sending import Late, Sender
from counterlens.engine.errors import CounterlensError
from tests.engine.blackbox.conftest import LABELS

SECONDS, PAUSE = 0.2, 0.04
BEGUN = {
    "nothing": b"",
    "headers": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
    "half": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@contextmanager
def dripping(what: str, reads: bool = True) -> Iterator[str]:
    """A server that begins an answer and goes on with a byte now and then."""
    held, done = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                if reads:
                    connection.recv(65536)
                connection.sendall(BEGUN[what])
                if what == "half":
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # closed with a request unread, the answer would be lost
                        pass
                while what != "half" and not done.wait(PAUSE):
                    connection.sendall(b"1\r\nx\r\n" if what == "chunks" else b"x" if BEGUN[what] else b"")
            except OSError:
                pass  # they went away

    def accept() -> None:
        while not done.is_set():
            try:
                connection, _ = held.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{held.getsockname()[1]}/v1/models/box:predict"
    finally:
        done.set()
        held.shutdown(socket.SHUT_RDWR)
        held.close()


@pytest.mark.parametrize("what", ["nothing", "headers", "a body", "chunks"])
def test_a_server_that_drips_is_left_at_the_deadline(what: str) -> None:
    with dripping(what) as address:
        started = time.perf_counter()
        finish = "finish its answer" if what in ("a body", "chunks") else "answer"
        with pytest.raises(CounterlensError, match=rf"did not {finish} within 0\.2 s"):
            open_box(address, LABELS, image_size=32, timeout=SECONDS, retries=0)
        assert SECONDS <= time.perf_counter() - started < SECONDS + 1.5


def test_a_body_that_is_cut_is_no_answer() -> None:
    with dripping("half") as address, pytest.raises(CounterlensError, match="without sending complete message body"):
        open_box(address, LABELS, image_size=32, retries=0)


def test_a_server_that_reads_nothing_is_left_too() -> None:
    with dripping("nothing", reads=False) as address:
        sender = Sender(1, SECONDS, 1 << 20)
        with pytest.raises(Late) as late:
            sender.send("POST", address, bytes(64 << 20), {})
        assert not late.value.began


def test_a_sender_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with dripping("headers") as address:
        sender = Sender(1, SECONDS, 1 << 20)
        with pytest.raises(Late):
            sender.send("GET", address, None, {})
        del sender
        gc.collect()
    deadline = time.monotonic() + 5
    while any(t.name == "counterlens-http" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + 2  # the server's own end by themselves
