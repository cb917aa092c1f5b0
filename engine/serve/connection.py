"""HTTP connections: how large and how late a request's headers may be, before any application hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .wire import Problem

HEADER_BYTES = 32_768


class Connection(H11Protocol):
    """One connection, closed if the headers of a request take longer than `seconds`.

    So is one that sends the rest of a body for as long after its request was answered. While a request has no answer
    yet the application's own limits hold (`guard.Limits.body_seconds`), and between two requests the keep-alive.
    """

    seconds: ClassVar[float] = 10.0
    closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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


def http_server(app: Any, grace_s: float, connection: type[Connection] = Connection) -> uvicorn.Server:
    """An HTTP server of the application; signals are the caller's to handle."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=connection, ws="none", log_level="error", access_log=False, timeout_keep_alive=5, lifespan="off",
            h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=max(1, int(grace_s)),
        )
    )  # fmt: skip
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]
    return server
