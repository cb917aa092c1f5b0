"""A seeded sample of `bench.hostile`: odd values in every field, odd files and odd bytes; the bench sends thousands."""

from __future__ import annotations

import asyncio
import base64
import random
import tempfile
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from bench import hostile
from counterlens.engine.core.core import EngineCore
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.wire import Decoder, Problem, parse_json
from counterlens.engine.serve.worker import Worker
from tests.engine.serve.test_http import picture


def test_odd_requests_are_answered_with_a_problem(client: TestClient) -> None:
    cases = [c for c in hostile.requests(picture()) if not c[0].startswith("file: text")]
    known = [c for c in cases if c[0].startswith(("JSON", "form", "type", "base64"))]
    for what, path, asked in known + random.Random(5).sample(cases, 30):
        content = asked.get("content")
        if isinstance(content, str):  # the bench's pictures are larger than these models take
            asked = asked | {"content": content.replace('"speed": "fast", ', "")}
        answer = client.post(path.replace("digits", "tiny"), **asked)
        assert answer.status_code < 500 or answer.status_code == 504, (what, answer.text)
        assert "Traceback" not in answer.text
        if answer.status_code >= 400:
            problem = answer.json()
            assert problem["status"] == answer.status_code
            assert problem["detail"], what
    good = {"image": base64.b64encode(picture()).decode()}
    assert client.post("/v1/counterfactuals", json=good).status_code == 200


def test_many_lists_are_refused_at_once() -> None:
    started = time.thread_time()
    with pytest.raises(Problem, match="more than 200000 lists") as refused:
        parse_json(b"[" + b"[]," * 3_000_000 + b"[]]")
    assert refused.value.status == 413
    assert time.thread_time() - started < 1  # it was 3 s, and nobody else was answered meanwhile


def test_no_upload_is_written_to_disk(
    engine: EngineCore, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file is opened")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    big = picture() + bytes(1_200_000)  # behind the end of a PNG nobody looks
    with TestClient(make_app(engine, worker)) as client:
        assert client.post("/v1/predictions", files={"image": big}).status_code == 200


def test_large_images_are_decoded_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterlens.engine.serve.wire.LARGE", 100)
    at_once: list[int] = []
    running = 0

    def decode(_: Any) -> None:
        nonlocal running
        running += 1
        at_once.append(running)
        time.sleep(0.02)
        running -= 1

    async def ask(data: bytes) -> int:
        at_once.clear()
        decoder = Decoder(max_pixels=10_000)
        await asyncio.gather(*(decoder.read(data, decode) for _ in range(4)))
        return max(at_once)

    assert asyncio.run(ask(picture())) == 1
    assert asyncio.run(ask(picture(size=8))) > 1


def test_bombs_are_refused_before_they_are_decoded(client: TestClient) -> None:
    files = hostile.files()
    for name in ("30000 x 30000", "2 ** 31 - 1 squared", "7000 x 7000"):
        assert client.post("/v1/predictions", files={"image": files[name]}).status_code in (413, 422), name
    for name in ("text of 200 MB", "0 x 0", "cut off", "zip", "EPS", "SVG"):
        assert client.post("/v1/predictions", files={"image": files[name]}).status_code in (413, 422), name
