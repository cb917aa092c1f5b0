"""Spans of a request, as OpenTelemetry's SDK gets them."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from tests.engine.serve.test_http import picture

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk")


def test_a_request_is_a_span_with_what_it_waited_for(client: TestClient) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    caller = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    headers = {"traceparent": caller, "X-Request-Id": "abc"}
    answer = client.post("/v1/counterfactuals", files={"image": picture()}, headers=headers)
    spans = {span.name: span for span in kept.get_finished_spans()}
    assert spans.keys() >= {"POST /v1/counterfactuals", "queue", "prepare", "steps", "decode", "encode"}
    whole = spans["POST /v1/counterfactuals"]
    assert format(whole.context.trace_id, "032x") == caller[3:35]
    assert format(whole.parent.span_id, "016x") == caller[36:52]
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["counterlens.request_id"] == "abc"
    assert spans["steps"].attributes["counterlens.slots"] == answer.json()["slots"]
    stages = [spans[name] for name in ("queue", "prepare", "steps", "decode", "encode")]
    for one in stages:
        assert one.parent.span_id == whole.context.span_id
        assert whole.start_time - 1_000_000 <= one.start_time <= one.end_time <= whole.end_time + 1_000_000
    for one, two in itertools.pairwise(stages):
        assert one.end_time <= two.start_time + 1_000_000
    kept.clear()
    client.post("/v1/counterfactuals", files={"image": b""})
    (refused,) = [span for span in kept.get_finished_spans() if "counterlens.request_id" in span.attributes]
    assert refused.attributes["http.response.status_code"] == 400


def test_it_works_without_the_package() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from counterlens.engine.serve.tracing import HERE, past_spans, request_span\n"
        "assert not HERE; past_spans([('queue', 0.0, 1.0)], {})\n"
        "with request_span('GET', '/', {}, 'x') as late: late['http.route'] = '/'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
