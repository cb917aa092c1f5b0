"""OpenTelemetry spans of requests where `opentelemetry-api` is installed; nothing without it.

A request is one span, a child of the caller's where `traceparent` says so; what it waited for are spans in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    HERE = False
else:
    HERE = True
# Not the current span: frameworks between this and a route may make their own from the same headers.
_request: ContextVar[Any] = ContextVar("request", default=None)


@contextmanager
def request_span(method: str, path: str, headers: Mapping[bytes, bytes], request_id: str) -> Iterator[dict[str, Any]]:
    """A request; attributes that are put into the yielded dictionary are those that are known at its end."""
    late: dict[str, Any] = {}
    if not HERE:
        yield late
        return
    carrier = {name: headers[name.encode()].decode("latin-1") for name in ("traceparent", "tracestate")
               if name.encode() in headers}  # fmt: skip
    known = {"http.request.method": method, "url.path": path[:200], "counterlens.request_id": request_id}
    with trace.get_tracer("counterlens").start_as_current_span(
        f"{method} request", propagate.extract(carrier), trace.SpanKind.SERVER, known
    ) as span:
        token = _request.set(span)
        try:
            yield late
        finally:
            _request.reset(token)
            span.set_attributes({name: value for name, value in late.items() if value is not None})
            if "http.route" in late:
                span.update_name(f"{method} {late['http.route']}")


def past_spans(stages: Sequence[tuple[str, float, float]], attributes: Mapping[str, Any]) -> None:
    """Spans of what is over, in the request's: names with `time.perf_counter` at their start and end."""
    if not HERE or (request := _request.get()) is None:
        return
    above = trace.set_span_in_context(request)
    tracer, offset = trace.get_tracer("counterlens"), time.time_ns() - time.perf_counter_ns()
    for name, start, end in stages:
        span = tracer.start_span(name, above, attributes=dict(attributes), start_time=offset + int(start * 1e9))
        span.end(offset + int(end * 1e9))
