"""Before any route: request ids, keys, limits of bodies and time, one log line, and errors as problem details."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .telemetry import Metrics, log
from .tracing import request_span
from .wire import Problem

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PROBES = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
OPEN = (*PROBES, "/", "/page.css", "/page.js")  # need no key
CROWDED = "counterlens.crowded"  # in the scope of a request over a connection beyond those that the server holds
REQUEST_ID = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """What one request may ask of the server.

    Attributes:
        body_bytes: of a request's body.
        body_seconds: until a body has to be there.
        pixels: of an image, before it is decoded.
        per_key: requests of one key at once, those that run on after a 202 included; 0: any number.
        hosts: that a request's Host header may name, as `host_name` has them; empty: any. A page of another site can
            have its own name resolve to this machine, and its browser then takes us for its server.
    """

    body_bytes: int = 32_000_000
    body_seconds: float = 30.0
    pixels: int = 64_000_000
    per_key: int = 0
    hosts: tuple[str, ...] = ()


def host_name(said: str) -> str:
    """The name in a Host header: in small letters, without port and last dot; an IPv6 address in its brackets."""
    said = said.strip().lower()
    return said[: said.find("]") + 1] if said.startswith("[") else said.partition(":")[0].rstrip(".")


class Keys:
    """Bearer keys, one a line of a file; empty without one, and then everybody is let in."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.keys: list[bytes] = []
        self.read()

    def read(self) -> None:
        """Read the file again.

        Raises:
            UsageError: it cannot be read or holds none.
        """
        if self.path is None:
            return
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"api-key-file: {self.path} cannot be read ({error})") from error
        keys = [line.strip().encode() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise UsageError(f"api-key-file: {self.path} holds no key; one a line")
        self.keys = keys

    def check(self, header: bytes) -> bytes:
        """The key that an Authorization header holds; nothing where no key is asked for.

        Raises:
            Problem: 401.
        """
        if not self.keys:
            return b""
        scheme, _, given = header.partition(b" ")
        # Compared with all of them, in a time that says nothing of where they differ.
        found = [key for key in self.keys if hmac.compare_digest(key, given.strip())]
        if scheme.lower() != b"bearer" or not found:
            raise Problem(
                401, "authorization: a bearer key is asked for", "authorization", {"WWW-Authenticate": "Bearer"}
            )
        return found[0]


def own_name(scope: Scope) -> str:
    """A name that nobody can guess, for what the request's key alone may ask for later."""
    name = uuid.uuid4().hex
    return name + _mark(scope, name)


def is_own(scope: Scope, name: str) -> bool:
    """Whether a name was made for this request's key."""
    return hmac.compare_digest(name[32:].encode(), _mark(scope, name[:32]).encode())


def _mark(scope: Scope, name: str) -> str:
    key = scope.get("key", b"")
    return hmac.digest(key, name.encode(), hashlib.sha256).hex()[:16] if key else ""


class Guard:
    """The ASGI application around the routes.

    Args:
        app: what answers.
        keys, limits, metrics: see there.
    """

    def __init__(self, app: Any, keys: Keys, limits: Limits, metrics: Metrics) -> None:
        self.app, self.keys, self.limits, self.metrics = app, keys, limits, metrics
        self.running: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        started, status, begun = time.perf_counter(), 0, False
        crowded = CROWDED in scope

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if crowded:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        key: bytes | None = None
        asks = False
        try:
            if scope["path"] not in PROBES:  # which orchestrators ask by a container's address
                if crowded:
                    raise Problem(503, "connections: too many are open; try again", None, {"Retry-After": "1"})
                self._check_host(headers.get(b"host"))
            if scope["path"] not in OPEN:
                key = self.keys.check(headers.get(b"authorization", b""))
                # What is only asked about or given up costs nothing: whoever has as many as it may still comes back.
                asks = not scope["path"].startswith("/v1/counterfactuals/")
                if asks and key and self.limits.per_key and self.running[key] >= self.limits.per_key:
                    key = None
                    raise Problem(
                        429, f"key: {self.limits.per_key} requests of it run already", None, {"Retry-After": "1"}
                    )
                self.running[key] += asks
                scope["key"], scope["hold_key"] = key, functools.partial(self._hold, key)
            with request_span(scope["method"], scope["path"], headers, request_id) as said:
                try:
                    await self.app(scope, self._limited(headers, receive), answer)
                finally:
                    said["http.route"] = getattr(scope.get("route"), "path", "other")
                    said["http.response.status_code"] = status or None
        except Problem as problem:
            if not begun:
                await send_problem(problem, answer, scope["path"])
        finally:
            if key is not None:
                self.running[key] -= asks
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            if status >= 400:
                self.metrics.errors.labels(str(status)).inc()
            log("request", id=request_id, method=scope["method"], path=scope["path"][:200], status=status,
                seconds=round(time.perf_counter() - started, 4))  # fmt: skip

    def _check_host(self, header: bytes | None) -> None:
        """Refuse a request that is meant for another server.

        Raises:
            Problem: 400.
        """
        if not self.limits.hosts or header is None:  # HTTP/1.0 has none, and browsers do not speak it
            return
        said = header.decode("latin-1")
        if host_name(said) not in self.limits.hosts:
            raise Problem(
                400,
                f"host: {said[:60]!r} is not this server; --allow-host takes the name that a proxy passes on",
                "host",
            )

    def _hold(self, key: bytes) -> Callable[[], None]:
        """Count one more request of a key until what comes back is called: work that goes on after its answer."""
        self.running[key] += 1

        def release() -> None:
            self.running[key] -= 1

        return release

    def _limited(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Receive a body of limited size within a limited time."""
        limit, end = self.limits.body_bytes, time.perf_counter() + self.limits.body_seconds
        said = headers.get(b"content-length", b"0")
        total, whole = 0, False

        async def limited() -> Message:
            nonlocal total, whole
            if said.isdigit() and int(said) > limit:
                raise Problem(413, f"body: {int(said)} bytes, more than {limit}", "body")
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.perf_counter()))
            except asyncio.TimeoutError as error:
                raise Problem(408, f"body: not there after {self.limits.body_seconds:g} s", "body") from error
            total += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if total > limit:
                raise Problem(413, f"body: more than {limit} bytes", "body")
            return message

        return limited


def guarded(app: Any, keys: Keys, limits: Limits, metrics: Metrics, cors_origins: list[str] | None) -> Any:
    """The application behind a `Guard`, which pages of these origins may ask."""
    inner = Guard(app, keys, limits, metrics)
    if not cors_origins:
        return inner
    from starlette.middleware.cors import CORSMiddleware

    # Outermost: browsers ask without a key first, and pages are to read refusals too.
    return CORSMiddleware(
        inner, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"],
        expose_headers=["Location", "Retry-After", "X-Request-Id", "X-Prediction", "X-Flipped"],
    )  # fmt: skip


async def send_problem(problem: Problem, send: Send, path: str = "") -> None:
    """Answer with problem details."""
    body = json.dumps(problem.body(path)).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
