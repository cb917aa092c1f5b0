"""The page at `/`: its files and routes over HTTP, and what a person sees in a browser."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from counterlens.engine.core.core import EngineCore
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.guard import Keys
from counterlens.engine.serve.wire import png
from counterlens.engine.serve.worker import Worker
from tests.engine.serve.test_http import NUMBERS, events, picture, pixels
from tests.engine.serve.test_worker import working


@pytest.fixture(scope="module")
def engine(tiny: Any) -> EngineCore:
    made = EngineCore(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS}, runtime="eager")
    made.names = {"model": "tiny"}
    return made


@pytest.fixture(scope="module")
def worker(engine: EngineCore) -> Iterator[Worker]:
    with working(engine, slots=2, max_queue=8) as made:
        yield made


@pytest.fixture(scope="module")
def client(engine: EngineCore, worker: Worker) -> Iterator[TestClient]:
    with TestClient(make_app(engine, worker)) as made:
        yield made


def test_the_page_and_its_files_need_no_key_and_the_interface_does(
    engine: EngineCore, worker: Worker, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    with TestClient(make_app(engine, worker, keys=Keys(file))) as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert 'data-key="yes"' in page.text  # the page asks for one before it is refused
        assert "@" not in page.text
        linked = re.findall(r'(?:href|src)="((?!data:|#)[^"]+)"', page.text)
        assert [re.sub(r"\?v=\w{16}$", "", name) for name in linked] == ["page.css", "page.js"]
        kinds = ["text/css; charset=utf-8", "text/javascript; charset=utf-8"]
        for name, kind in zip(linked, kinds, strict=True):
            answer = client.get(f"/{name}")
            assert answer.headers["content-type"] == kind
            assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
            assert not re.search(r"https?://", answer.text)
        for path in ("/v1/models", "/v1/samples", "/v1/counterfactuals/x"):
            assert client.get(path).status_code == 401
        assert client.post("/v1/predictions", files={"image": picture()}).status_code == 401


def test_the_page_lets_nothing_in_and_is_asked_for_again(client: TestClient) -> None:
    page = client.get("/")
    assert 'data-key="no"' in page.text
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page.text)
    assert page.headers["cache-control"] == client.get("/page.js?v=old").headers["cache-control"] == "no-cache"
    same = client.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    assert client.head("/").status_code == 200


def test_the_events_of_a_stream_say_how_sure_the_model_is(client: TestClient, engine: EngineCore) -> None:
    answer = client.post("/v1/counterfactuals", files={"image": picture()}, headers={"Accept": "text/event-stream"})
    *steps, (_, result) = events(answer.text)
    source, target = engine.labels.index(result["source"]), engine.labels.index(result["target"])
    for _, step in steps:
        seen = torch.from_numpy(pixels(base64.b64decode(step["image"])).copy()).permute(2, 0, 1)[None].float() / 255
        p = engine.probabilities(seen)[0]  # of 8 bits
        assert abs(step["source_confidence"] - float(p[source])) < 0.02
        assert abs(step["target_confidence"] - float(p[target])) < 0.02


def test_who_comes_back_for_a_task_gets_its_image_too(client: TestClient) -> None:
    asks = {"Accept": "text/event-stream"}
    where = client.post("/v1/counterfactuals", files={"image": picture()}, headers=asks).headers["location"]
    assert (pixels(base64.b64decode(client.get(where).json()["input"])) == pixels(picture())).all()


def test_a_model_without_a_pack_has_no_samples_and_no_adapter(client: TestClient) -> None:
    assert client.get("/v1/samples").json() == {"samples": []}
    (model,) = client.get("/v1/models").json()["models"]
    assert "lax" in model["methods"]
    assert "lax" not in model["usable_methods"]
    assert "rise" in model["usable_methods"]
    assert model["kept_s"] > 0
    assert model["default_mode"] in model["modes"]
    found = client.post("/v1/saliency", files={"image": png(torch.rand(3, 16, 16))}, data={"method": "rise"}).json()
    assert len(found["areas"]) == len(found["keep_area"]) == len(found["remove_area"])
