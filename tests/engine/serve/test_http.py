"""The HTTP interface as its callers see it: answers, streams, tasks, limits, keys and errors that name the field."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import Tensor

from counterlens.engine import Engine
from counterlens.engine.config import Config
from counterlens.engine.core.core import EngineCore
from counterlens.engine.errors import CounterlensError
from counterlens.engine.images.files import to_uint8
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.guard import PROBES, Keys, Limits
from counterlens.engine.serve.wire import MAX_DEPTH, parse_json, png
from counterlens.engine.serve.worker import Worker
from tests import tiny as saved
from tests.engine.serve.test_worker import NUMBERS, working


def picture(seed: int = 3, size: int = 16) -> bytes:
    return png(torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("event")]
    return [(b[0].removeprefix("event: "), json.loads(b[1].removeprefix("data: "))) for b in blocks]


def test_a_form_and_json_answer_alike(client: TestClient, engine: EngineCore) -> None:
    target = 1 if engine.probabilities(_tensor(picture())).argmax() == 0 else 0
    form = client.post("/v1/counterfactuals", files={"image": picture()}, data={"target": str(target), "seed": "5"})
    fields = {"image": base64.b64encode(picture()).decode(), "target": target, "seed": 5}
    plain = client.post("/v1/counterfactuals", json=fields)
    assert form.status_code == plain.status_code == 200
    one, two = form.json(), plain.json()
    times = ("seconds", "waited_s", "total_s")
    assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in two.items() if k not in times}
    with engine.session(Config(seed=5), slots=2) as session:
        session.submit(_tensor(picture())[0], target)
        done: list[Any] = []
        while session.busy:
            done += session.tick()
    assert np.array_equal(pixels(base64.b64decode(one["image"])), to_uint8(done[0].image).permute(1, 2, 0).numpy())
    assert one["target"] == engine.labels[target]
    assert one["slots"] == 2
    assert pixels(base64.b64decode(one["change"])).shape == (16, 16, 3)
    bare = client.post(
        "/v1/counterfactuals", files={"image": picture()}, data={"target": str(target), "seed": "5"},
        headers={"Accept": "image/png"},
    )  # fmt: skip
    assert bare.headers["content-type"] == "image/png"
    assert bare.content == base64.b64decode(one["image"])
    assert bare.headers["x-prediction"] == one["prediction"]


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(pixels(data).copy()).permute(2, 0, 1)[None].float() / 255


def test_a_stream_shows_every_step_and_ends_with_the_result(client: TestClient) -> None:
    answer = client.post("/v1/counterfactuals", files={"image": picture()}, headers={"Accept": "text/event-stream"})
    told = events(answer.text)
    assert [name for name, _ in told] == ["progress"] * (len(told) - 1) + ["result"]
    assert [data["step"] for _, data in told[:-1]] == list(range(1, len(told)))
    assert pixels(base64.b64decode(told[0][1]["image"])).shape == (16, 16, 3)
    assert told[-1][1]["status"] == "done"


def test_a_task_is_fetched_streamed_and_deleted(client: TestClient, engine: EngineCore) -> None:
    asks = {"Prefer": "respond-async"}
    accepted = client.post("/v1/counterfactuals", files={"image": picture()}, headers=asks)
    assert accepted.status_code == 202
    where = accepted.headers["location"]
    assert accepted.json()["Location"] == where
    for _ in range(500):
        got = client.get(where)
        if got.status_code == 200:
            break
        assert got.status_code == 202
        time.sleep(0.02)
    assert got.json()["status"] == "done"
    told = events(client.get(where, headers={"Accept": "text/event-stream"}).text)
    assert told[-1] == ("result", got.json())
    assert client.delete(where).status_code == 204
    gone = client.get(where)
    assert gone.status_code == 404
    assert "none of this name" in gone.json()["detail"]
    long = client.post(
        "/v1/counterfactuals", files={"image": picture(9)}, data={"config": '{"steps": 40, "gradient": "exact"}'},
        headers=asks,
    )  # fmt: skip
    assert client.delete(long.headers["location"]).status_code == 204


def test_saliency_and_predictions(client: TestClient, engine: EngineCore) -> None:
    said = client.post("/v1/predictions", files={"image": picture()}).json()
    p = engine.probabilities(_tensor(picture()))[0]
    assert said["prediction"] == engine.labels[int(p.argmax())]
    assert said["probabilities"] == {n: round(v, 6) for n, v in zip(engine.labels, p.tolist(), strict=True)}
    found = client.post("/v1/saliency", files={"image": picture()}, data={"method": "rise", "target": "2"}).json()
    assert found["target"] == "2"
    assert pixels(base64.b64decode(found["map"])).shape == (16, 16, 3)
    assert len(found["keep"]) == len(found["remove"]) == len(found["thresholds"])


def test_of_labels_with_one_name_none_is_lost(tiny: Any) -> None:
    """Not even where a label is called as another one is told apart from its namesake."""
    diffusion, classifier = tiny
    names = ["crane", "crane", "crane (0)", *map(str, range(7))]
    named = copy.copy(diffusion)
    named.labels = names
    cranes = EngineCore(named, SoftmaxClassifier(classifier.module, names), runtime="eager",
                        pack_settings={"realistic": NUMBERS, "audit": NUMBERS})  # fmt: skip
    expected = cranes.probabilities(_tensor(picture()))[0].tolist()
    with working(cranes, slots=1) as worker, TestClient(make_app(cranes, worker)) as client:
        said = client.post("/v1/predictions", files={"image": picture()}).json()
        assert said["shares"] == pytest.approx(expected, abs=1e-6)
        assert said["index"] == expected.index(max(expected))
        (name,) = [m["name"] for m in client.get("/v1/models").json()["models"]]
        asked = {"instances": [{"b64": base64.b64encode(picture()).decode()}]}
        v1 = client.post(f"/v1/models/{name}:predict", json=asked).json()
        assert v1["probabilities"] == [pytest.approx(expected, abs=1e-6)]
        assert v1["labels"] == cranes.labels
        json_asked = {"image": base64.b64encode(picture()).decode(), "target": (said["index"] + 1) % 10}
        made = client.post("/v1/counterfactuals", json=json_asked).json()
        assert made["indices"]["target"] == json_asked["target"]


def test_a_request_says_where_its_image_may_change(client: TestClient) -> None:
    """As `--region` does; a box is in the pixels of the file, which has twice the model's size here."""
    large = picture(size=32)
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[4:20, 6:22] = 255
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    made = [
        client.post("/v1/counterfactuals", files={"image": large}, data={"region": "6,4,16,16"}),
        client.post("/v1/counterfactuals", files={"image": large, "region": out.getvalue()}),
        client.post("/v1/counterfactuals", json={
            "image": base64.b64encode(large).decode(), "region": base64.b64encode(out.getvalue()).decode(),
        }),
    ]  # fmt: skip
    assert [answer.status_code for answer in made] == [200] * 3, made[0].text
    seen = np.asarray(Image.open(io.BytesIO(large)).resize((16, 16), Image.Resampling.LANCZOS))
    outside = mask[::2, ::2] == 0
    for answer in made:
        got = pixels(base64.b64decode(answer.json()["image"]))
        assert np.array_equal(got[outside], seen[outside])
        assert not np.array_equal(got[~outside], seen[~outside])
        assert answer.json()["l1_outside"] == 0
        assert answer.json()["region_area"] == 0.25
    found = client.post("/v1/counterfactuals", files={"image": picture()}, data={"region": "auto"}).json()
    assert found["l1_outside"] == 0
    assert found["region_area"] < 1


@pytest.mark.parametrize(
    ("region", "status", "detail"),
    [
        ("0,0,99,2", 400, "region: the box 0,0,99,2 reaches beyond the image of 16x16 pixels"),
        ("1,2,3", 400, "region: expected auto, x,y,w,h"),
        ("/etc/hostname", 400, "region: "), ("nowhere", 400, "region: "),
        (base64.b64encode(png(torch.zeros(16, 16))).decode(), 422, "region: an empty mask"),
        (base64.b64encode(png(torch.ones(8, 8))).decode(), 422, "region has 8x8 pixels; a mask has the picture's own"),
        (base64.b64encode(png(torch.ones(64, 64))).decode(), 422, "region: a mask of 4096 pixels"),
        (base64.b64encode(picture()[:40]).decode(), 422, "region: cannot be read"),
    ],
)  # fmt: skip
def test_regions_that_do_not_fit_are_named(client: TestClient, region: str, status: int, detail: str) -> None:
    refused = client.post("/v1/counterfactuals", files={"image": picture()}, data={"region": region})
    assert detail in refused.json()["detail"]
    assert refused.status_code == status


def test_the_interface_is_described_without_anything_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    html5lib.HTMLParser(strict=True).parse(page.text)
    assert not re.search(r"<script|https?://", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for said in ("POST /v1/counterfactuals", "/v2/models/{model}/infer", "budget_s", "multipart/form-data", "429"):
        assert said in page.text
    assert client.get("/redoc").status_code == 404


def test_requests_that_are_meant_for_another_server_are_refused(engine: EngineCore, worker: Worker) -> None:
    limits = Limits(hosts=("127.0.0.1", "localhost", "[::1]", "lens.example"))
    with TestClient(make_app(engine, worker, limits=limits)) as client:
        for host in (
            "localhost",
            "LOCALHOST:8000",
            "127.0.0.1:80",
            "[::1]:8000",
            "[::1]",
            "lens.example",
            "localhost.:1",
        ):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
        for host in ("rebound.example", "localhost.rebound.example:8000", "[::2]:8000", "127.0.0.1.nip.io", "", "[::1"):
            refused = client.get("/v1/models", headers={"Host": host})
            assert refused.status_code == 400, host
            assert refused.json()["field"] == "host"
            assert client.get("/", headers={"Host": host}).status_code == 400
            for probe in PROBES:  # a kubelet and Prometheus ask by the container's address
                assert client.get(probe, headers={"Host": host}).status_code == 200


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("no body", {}, 415, "content-type: expected multipart"),
    ("other type", {"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "got 'text/plain'"),
    ("no image", {"data": {"target": "1"}, "files": {"other": b"x"}}, 400, "image: expected a file"),
    ("text as image", {"data": {"image": "x"}, "files": {"other": b"x"}}, 400, "image: expected a file"),
    ("empty image", {"files": {"image": b""}}, 400, "image: an empty file"),
    ("no picture", {"files": {"image": b"hello"}}, 422, "image: "),
    ("cut off", {"files": {"image": picture()[:80]}}, 422, "image: "),
    ("many pixels", {"files": {"image": picture(size=128)}}, 413, "image: 0.0 megapixels"),
    ("long body", {"content": b"x" * 200_000, "headers": {"content-type": "application/json"}}, 413, "body: 200000"),
    ("no JSON", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "body: not JSON"),
    ("a list", {"json": [1]}, 400, "body: expected a JSON object"),
    ("no base64", {"json": {"image": "%%"}}, 400, "image: not base64"),
    ("number as image", {"json": {"image": 3}}, 400, "image: expected a file in base64"),
    ("deep", {"content": b'{"a":' * 10_000, "headers": {"content-type": "application/json"}}, 400, "nested deeper"),
    ("target", {"files": {"image": picture()}, "data": {"target": "nobody"}}, 400, "target: 'nobody' is no label"),
    ("speed", {"files": {"image": picture()}, "data": {"speed": "warp"}}, 400, "speed: "),
    ("budget", {"files": {"image": picture()}, "data": {"budget_s": "-1"}}, 400, "budget_s: "),
    ("seed", {"files": {"image": picture()}, "data": {"seed": "x"}}, 400, "seed: "),
    ("unknown field", {"files": {"image": picture()}, "data": {"colour": "x"}}, 400, "colour: "),
    ("config no JSON", {"files": {"image": picture()}, "data": {"config": "x"}}, 400, "body: not JSON"),
    ("config field", {"files": {"image": picture()}, "data": {"config": '{"angel": 3}'}}, 400, "angel: "),
    ("config range", {"files": {"image": picture()}, "data": {"config": '{"angle": 300}'}}, 400, "angle: "),
    ("schedule", {"files": {"image": picture()}, "data": {"config": '{"steps": 4000}'}}, 400, "steps: "),
    (
        "config classifier",
        {"files": {"image": picture()}, "data": {"config": '{"classifier": "python:os:system"}'}},
        400,
        "config: classifier",
    ),
    ("config pack", {"files": {"image": picture()}, "data": {"config": '{"pack": "/etc"}'}}, 400, "config: pack"),
]


@pytest.mark.parametrize(("asked", "status", "detail"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_does_not_fit_is_named(client: TestClient, asked: dict[str, Any], status: int, detail: str) -> None:
    answer = client.post("/v1/counterfactuals", **asked)
    assert answer.status_code == status
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert detail in problem["detail"]
    assert problem["status"] == status
    assert "Traceback" not in answer.text
    if status == 400:
        assert problem["field"] == detail.partition(":")[0] or problem["field"] in ("body", "config")


def test_a_text_without_an_end_is_refused_at_once() -> None:
    started = time.thread_time()
    with pytest.raises(CounterlensError, match="not JSON"):
        parse_json(b'"' + b'\\"' * 500_000)
    assert time.thread_time() - started < 5


def test_a_caller_who_leaves_stops_nobody_else(engine: EngineCore) -> None:
    body = json.dumps({"image": base64.b64encode(picture()).decode(), "config": {"steps": 60, "gradient": "exact"}})
    told = iter([{"type": "http.request", "body": body.encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        return next(told, {"type": "http.disconnect"})

    async def send(_: Any) -> None: ...

    scope = {
        "type": "http", "method": "POST", "path": "/v1/counterfactuals", "query_string": b"", "http_version": "1.1",
        "headers": [(b"content-type", b"application/json")], "server": ("here", 80), "scheme": "http",
    }  # fmt: skip
    with working(engine, slots=2) as worker:
        asyncio.run(make_app(engine, worker)(scope, receive, send))
        assert worker.call(lambda: 3).result(timeout=60) == 3
        assert worker.submit(_tensor(picture())[0]).future.result(timeout=60).error is None
        assert worker.busy_slots == 0


def test_a_request_without_a_seed_takes_the_servers(tiny: Any) -> None:
    settings = {"realistic": NUMBERS, "audit": NUMBERS}
    seeded = EngineCore(*tiny, Config(seed=5), pack_settings=settings, runtime="eager")
    with working(seeded, slots=2) as worker, TestClient(make_app(seeded, worker)) as client:
        said = [
            client.post("/v1/counterfactuals", files={"image": picture()}, data=data).json()["seed"]
            for data in ({}, {"seed": "5"}, {"seed": "0"})
        ]
    assert said[0] == said[1] != said[2]


def test_brackets_in_texts_are_no_depth(client: TestClient) -> None:
    answer = client.post("/v1/counterfactuals", json={"image": "[" * 2 * MAX_DEPTH + '"\\"'})
    assert "image: not base64" in answer.json()["detail"]


def test_other_paths_and_methods(client: TestClient) -> None:
    assert client.get("/nothing").json()["title"] == "Not found"
    assert client.get("/v1/counterfactuals").status_code == 405
    assert client.get("/v1/counterfactuals/" + "x" * 30).status_code == 404
    assert client.post("/v1/saliency", files={"image": picture()}, data={"method": "no"}).json()["field"] == "method"


def test_a_sample_that_has_no_answer_is_422_and_others_are_unharmed(tiny: Any) -> None:
    diffusion, classifier = tiny
    inner = classifier.module

    class Sick(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.9, torch.nan, inner(x))

    sick = EngineCore(diffusion, SoftmaxClassifier(Sick(), classifier.labels), runtime="eager",
                      pack_settings={"realistic": NUMBERS, "audit": NUMBERS})  # fmt: skip
    with working(sick, slots=2) as worker, TestClient(make_app(sick, worker)) as client:
        white = client.post("/v1/counterfactuals", files={"image": png(torch.ones(3, 16, 16))})
        good = client.post("/v1/counterfactuals", files={"image": picture()})
        predicted = client.post("/v1/predictions", files={"image": png(torch.ones(3, 16, 16))})
    assert white.status_code == predicted.status_code == 422
    assert "NaN or infinity" in white.json()["detail"]
    assert good.status_code == 200


def test_keys_are_asked_for_counted_and_read_again(engine: EngineCore, worker: Worker, tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("# who\nfirst\nsecond\n")
    keys = Keys(file)
    with TestClient(make_app(engine, worker, keys=keys)) as client:
        assert client.get("/healthz").status_code == 200
        refused = client.get("/v1/models")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        for header in ("Bearer third", "Basic first", "first", "Bearer ", "bearer firs"):
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == 401
        for header in ("Bearer first", "bearer second"):
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == 200
        file.write_text("third\n")
        keys.read()
        assert client.get("/v1/models", headers={"Authorization": "Bearer first"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer third"}).status_code == 200


def test_what_one_key_asked_for_is_not_another_keys(engine: EngineCore, worker: Worker, tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
    keys = Keys(file)
    with TestClient(make_app(engine, worker, keys=keys)) as client:
        later = client.post(
            "/v1/counterfactuals", files={"image": picture()}, headers=first | {"Prefer": "respond-async"}
        ).headers["Location"]
        file.write_text("second\nfirst\n")
        keys.read()
        assert client.get(later, headers=second).status_code == 404
        assert client.delete(later, headers=second).status_code == 404
        assert client.get(later[:-16], headers=first).status_code == 404
        assert client.get(later, headers=first).status_code in (200, 202)
        assert client.delete(later, headers=first).status_code == 204


def test_a_page_of_another_origin_may_ask_with_its_key(engine: EngineCore, worker: Worker, tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n")
    page = {"Origin": "https://page.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with TestClient(make_app(engine, worker, keys=Keys(file), cors_origins=[page["Origin"]])) as client:
        assert client.options("/v1/predictions", headers=page | asks).status_code == 200  # browsers send no key here
        refused = client.get("/v1/models", headers=page)
        answered = client.get("/v1/models", headers=page | {"Authorization": "Bearer first"})
        assert client.options("/v1/predictions", headers=asks | {"Origin": "https://other.example"}).status_code == 400
    assert (refused.status_code, answered.status_code) == (401, 200)
    for answer in (refused, answered):
        assert answer.headers["access-control-allow-origin"] == page["Origin"]


def test_health_metrics_and_request_ids(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    named = client.get("/healthz", headers={"X-Request-Id": "abc-1"})
    assert named.headers["x-request-id"] == "abc-1"
    assert len(client.get("/healthz", headers={"X-Request-Id": "no\tid"}).headers["x-request-id"]) == 32
    text = client.get("/metrics").text
    for name in ("counterlens_requests_total", "request_explain_seconds_bucket", "counterlens_queue_depth",
                 "counterlens_batch_occupancy", "counterlens_queue_seconds_sum"):  # fmt: skip
        assert name in text
    assert 'status="400"' in text
    routes = client.get("/openapi.json").json()["paths"]
    assert {"/v1/counterfactuals", "/v1/saliency", "/v1/predictions", "/v2/models/{model}/infer"} <= routes.keys()


def test_a_full_queue_is_429_and_a_stopped_server_503(engine: EngineCore) -> None:
    gate = threading.Event()
    with working(engine, slots=1, max_queue=1) as worker, TestClient(make_app(engine, worker)) as client:
        worker.call(lambda: gate.wait(20))
        while worker._calls:
            time.sleep(0.001)
        asks = {"Prefer": "respond-async"}
        assert client.post("/v1/counterfactuals", files={"image": picture()}, headers=asks).status_code == 202
        full = client.post("/v1/counterfactuals", files={"image": picture()})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        gate.set()
        worker.stop()
        assert client.post("/v1/counterfactuals", files={"image": picture()}).status_code == 503
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200


def test_the_open_inference_protocol(client: TestClient, engine: EngineCore) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/models/tiny/ready").json()["ready"] is True
    assert client.get("/v2/models/other").status_code == 404
    shown = torch.cat([_tensor(picture(i)) for i in range(3)])
    image = {"name": "image", "datatype": "FP32", "shape": [3, 3, 16, 16]}
    target = {"name": "target", "datatype": "INT64", "shape": [3], "data": [-1, 1, 2]}
    wanted = [{"name": n} for n in ("counterfactual", "prediction", "source", "probabilities", "saliency", "l1")]
    plain = client.post("/v2/models/tiny/infer", json={
        "id": "7", "inputs": [image | {"data": shown.reshape(-1).tolist()}, target],
        "outputs": [o for o in wanted if o["name"] != "saliency"],
    })  # fmt: skip
    assert plain.status_code == 200, plain.text
    found = {o["name"]: o for o in plain.json()["outputs"]}
    assert plain.json()["id"] == "7"
    assert found["counterfactual"]["shape"] == [3, 3, 16, 16]
    assert found["probabilities"]["shape"] == [3, len(engine.labels)]
    blob = shown.numpy().astype("<f4").tobytes()
    head = json.dumps({
        "inputs": [image | {"parameters": {"binary_data_size": len(blob)}}, target],
        "outputs": [{"name": "counterfactual", "parameters": {"binary_data": True}}],
    }).encode()  # fmt: skip
    binary = client.post(
        "/v2/models/tiny/infer", content=head + blob, headers={"Inference-Header-Content-Length": str(len(head))}
    )
    length = int(binary.headers["inference-header-content-length"])
    array = np.frombuffer(binary.content[length:], dtype="<f4")
    assert np.allclose(array, found["counterfactual"]["data"])
    odd = client.post("/v2/models/tiny/infer", content=head, headers={b"Inference-Header-Content-Length": b"\xb2"})
    assert "inference-header-content-length: expected at most" in odd.json()["detail"]
    for inputs, detail in (
        ([image | {"data": [0.0]}], "image: does not fit shape"),
        ([image | {"datatype": "FP8", "data": []}], "image: datatype: expected"),
        ([image | {"shape": "x"}], "image: shape"),
        ([target], "image: expected an input"),
        ([image | {"data": (shown + 2).reshape(-1).tolist()}], "image: expected numbers in [0, 1]"),
        ([image | {"parameters": {"binary_data_size": 10**9}}], "binary_data_size"),
        ([image | {"parameters": [1]}], "image: expected parameters as an object"),
        ([image | {"shape": [2**24] * 60}], "image: shape"),
        ([image | {"shape": [2**24] * 8, "data": []}], "image: does not fit shape"),
        ([image | {"data": shown.reshape(-1).tolist()}, target | {"datatype": "FP32"}], "target: expected an input of"),
    ):
        bad = client.post("/v2/models/tiny/infer", json={"inputs": inputs})
        assert bad.status_code == 400
        assert detail in bad.json()["detail"]
    good = [image | {"data": shown.reshape(-1).tolist()}]
    for names in (["other"], ["counterfactual"] * 2):
        bad = client.post("/v2/models/tiny/infer", json={"inputs": good, "outputs": [{"name": n} for n in names]})
        assert "is none, or is asked for twice" in bad.json()["detail"]
    texts = {"name": "target", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}
    head = json.dumps({"inputs": [texts]}).encode()
    lying = head + (200).to_bytes(4, "little") + b"a" * 200
    said = {"Inference-Header-Content-Length": str(len(head))}
    assert "goes beyond" in client.post("/v2/models/tiny/infer", content=lying, headers=said).json()["detail"]


def test_of_a_batch_that_does_not_fit_in_the_queue_nothing_runs(engine: EngineCore) -> None:
    gate = threading.Event()
    image = {"name": "image", "datatype": "FP32", "shape": [2, 3, 16, 16], "data": [0.5] * 2 * 3 * 16 * 16}
    with working(engine, slots=1, max_queue=2) as worker, TestClient(make_app(engine, worker)) as client:
        worker.call(lambda: gate.wait(20))
        while worker._calls:
            time.sleep(0.001)
        before = worker.submit(torch.full((3, 16, 16), 0.5))
        assert client.post("/v2/models/tiny/infer", json={"inputs": [image]}).status_code == 429
        worker.cancel(before)
        three = image | {"shape": [3, 3, 16, 16], "data": [0.5] * 3 * 3 * 16 * 16}
        never = client.post("/v2/models/tiny/infer", json={"inputs": [three]})
        assert never.status_code == 413
        assert "more than the 2" in never.json()["detail"]
        gate.set()
        while worker.waiting or worker.busy_slots:
            time.sleep(0.001)
        assert worker.steps == 0


def test_kserve_version_1(client: TestClient, engine: EngineCore) -> None:
    asked = {"instances": [{"b64": base64.b64encode(picture(i)).decode()} for i in range(2)]}
    said = client.post("/v1/models/tiny:predict", json=asked).json()["predictions"]
    assert [max(p, key=p.get) for p in said] == [
        engine.labels[int(i)]
        for i in engine.probabilities(torch.cat([_tensor(picture(i)) for i in range(2)])).argmax(1)
    ]
    made = client.post("/v1/models/tiny:explain", json=asked).json()["explanations"]
    assert [m["status"] for m in made] == ["done", "done"]
    assert client.post("/v1/models/tiny:predict", json={"instances": []}).status_code == 400


def test_what_is_no_counterfactual_takes_the_models_own_size_under_fit_native(tmp_path: Path) -> None:
    """Instead of quietly reading the image in another way than the server was told."""
    saved.save_stable_diffusion(tmp_path / "sd")
    saved.save_resnet(tmp_path / "resnet")
    native = Engine.from_pretrained(
        tmp_path / "sd", tmp_path / "resnet", Config(preset="imagenet-text", steps=4, fit="native")
    )
    wide, own = png(torch.rand(3, 16, 40)), png(torch.rand(3, 16, 16))
    with working(native, slots=1) as worker, TestClient(make_app(native, worker)) as client:
        for path, asked in (
            ("/v1/predictions", {"files": {"image": wide}}),
            ("/v1/saliency", {"files": {"image": wide}}),
            ("/v1/models/sd:predict", {"json": {"instances": [{"b64": base64.b64encode(wide).decode()}]}}),
        ):
            refused = client.post(path, **asked)
            assert refused.status_code == 422
            assert refused.json()["field"] == "image"
            assert "24x8 pixels under fit native, which is for /v1/counterfactuals; here" in refused.json()["detail"]
        assert client.post("/v1/predictions", files={"image": own}).status_code == 200
        assert client.post("/v1/counterfactuals", files={"image": wide}).status_code == 200
