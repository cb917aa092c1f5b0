"""HTTP connections: how many there are, and how large and how late a request's headers may be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .guard import CROWDED
from .wire import Problem

HEADER_BYTES = 32_768
SPARE = 64  # connections beyond the limit whose requests hear of it, and over which probes are answered
FILES = 128  # that the process may need beside connections: models, uploads, answers kept


class Connection(H11Protocol):
    """One connection, closed if the headers of a request take longer than `seconds`.

    So is one that sends the rest of a body for as long after its request was answered. While a request has no answer
    yet the application's own limits hold (`guard.Limits.body_seconds`), and between two requests the keep-alive.
    """

    seconds: ClassVar[float] = 10.0
    most: ClassVar[int] = 1000  # that are open at once
    closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most + SPARE:
            self.transport.abort()
            return
        if len(self.connections) > self.most:
            self.app = crowded(self.app)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock where the caller has the word, unless it runs; stop it where the application has."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self.closing is None:
            self.closing = self.loop.call_later(self.seconds, self._close)

    def _forget(self) -> None:
        if self.closing is not None:
            self.closing.cancel()
            self.closing = None

    def _close(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:  # else nothing was asked
            body = json.dumps(Problem(408, f"headers: not there after {self.seconds:g} s", "headers").body()).encode()
            headers = [("content-type", "application/problem+json"), ("content-length", str(len(body))),
                       ("connection", "close")]  # fmt: skip
            events = (h11.Response(status_code=408, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


def crowded(app: Any) -> Any:
    """The application as connections beyond the limit have it: its guard answers their probes alone."""

    async def marked(scope: Any, receive: Any, send: Any) -> None:
        scope[CROWDED] = True
        await app(scope, receive, send)

    return marked


def room_for(most: int) -> int:
    """Let this process hold so many connections beside its files, or as many as the system allows; at least one."""
    needed = most + SPARE + FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return max(1, needed - SPARE - FILES)


def http_server(
    app: Any, grace_s: float, connection: type[Connection] = Connection, most: int = Connection.most
) -> uvicorn.Server:
    """An HTTP server of the application with `most` connections at once; signals are the caller's to handle."""
    connection = type("Limited", (connection,), {"most": most})
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=connection, ws="none", log_level="error", access_log=False, timeout_keep_alive=5, lifespan="off",
            h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=max(1, int(grace_s)),
        )
    )  # fmt: skip
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]
    return server
