"""A black box served: its student guides, it judges, it is asked beside the ticks, and what it does not say is said."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.requests import Request
from starlette.testclient import TestClient
from torch import Tensor

from bench.endpoint import Endpoint, serving
from counterlens.engine import Config, Engine
from counterlens.engine.blackbox.box import BlackBox, open_box
from counterlens.engine.images.files import as_saved, to_uint8
from counterlens.engine.saliency.explain import explain_by
from counterlens.engine.saliency.lax import LAX, new_adapter
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.guard import Limits
from counterlens.engine.serve.server import Server
from counterlens.engine.serve.sizing import fit as fitting
from counterlens.engine.serve.telemetry import Metrics
from counterlens.engine.serve.wire import Problem, png
from counterlens.engine.serve.worker import Cancelled, Draining, Worker
from counterlens.engine.surrogate.student import new_students
from counterlens.engine.surrogate.surrogate import Surrogate
from counterlens.engine.surrogate.training import fit
from tests.conftest import LABELS
from tests.engine.serve.test_http import events
from tests.engine.serve.test_worker import working

CONFIG = Config(steps=4, strength=0.6, gradient="detached", class_scale=6.0)
OTHER = Config(steps=3, strength=0.6, gradient="exact")


def brightness(images: np.ndarray) -> np.ndarray:
    """Ten labels by brightness, softly."""
    level = images.mean(axis=(1, 2, 3)) / 25.6
    scores = np.exp(-((level[:, None] - np.arange(10) - 0.5) ** 2))
    return scores / scores.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def images() -> Tensor:
    g = torch.Generator().manual_seed(0)
    levels = torch.linspace(0.1, 0.9, 32)[:, None, None, None]
    return as_saved((levels + 0.1 * torch.rand(32, 3, 16, 16, generator=g)).clamp(0, 1))


@pytest.fixture(scope="module")
def student(images: Tensor) -> Surrogate:
    """Of `brightness`, after a moment of training."""
    shown = to_uint8(images)
    answers = torch.from_numpy(brightness(shown.permute(0, 2, 3, 1).numpy())).float()
    students = new_students(10, 16, members=2, width=8)
    fit(students, shown, answers, hard=False, steps=40, seed=0)
    box = open_box(brightness, LABELS, image_size=16)
    return Surrogate(students, LABELS, 16, False, box.fingerprint().record())


@pytest.fixture(scope="module")
def guided(tiny: Any, student: Surrogate) -> Callable[..., Engine]:
    """An engine that asks a function, guided by the student."""

    def make(answer: Callable[..., Any] = brightness, queries_each: int = 4, **options: Any) -> Engine:
        box = open_box(answer, LABELS, image_size=16, **options)
        engine = Engine(tiny[0], box, CONFIG, runtime="eager").with_surrogate(student, queries_each=queries_each)
        engine.names |= {"model": "tiny", "classifier": "brightness"}
        return engine

    return make


def asked(engine: Engine) -> BlackBox:
    assert engine.box is not None
    return engine.box


@contextmanager
def served(engine: Engine, adapter: LAX | None = None, **options: Any) -> Iterator[tuple[TestClient, Worker]]:
    with working(engine, **{"slots": 1, "max_queue": 8} | options) as worker:
        app = make_app(engine, worker, adapter=adapter)
        with TestClient(app, raise_server_exceptions=False) as client:
            while not worker.ready:
                time.sleep(0.001)
            yield client, worker


def post(client: TestClient, path: str, image: Tensor, **fields: Any) -> Any:
    return client.post(path, json={"image": base64.b64encode(png(image)).decode(), **fields})


@pytest.mark.parametrize("slots", [1, 2])
def test_a_served_answer_is_that_of_the_engine_on_as_many_slots(guided: Any, images: Tensor, slots: int) -> None:
    alone, beside = guided(), guided()
    alone.slots = (slots,)
    wanted = [(images[9], "runner-up", CONFIG), (images[20], "9", CONFIG), (images[5], "3", OTHER)]
    expected = [alone.counterfactual(x[None], target, config=config)[0] for x, target, config in wanted]
    with working(beside, slots=slots) as worker:
        tickets = [worker.submit(*one) for one in wanted]
        results = [ticket.future.result(timeout=60) for ticket in tickets]
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result.image, other.image)
        assert result.record() | {"seconds": 0} == other.record() | {"seconds": 0}
    assert {result.flipped for result in results} == {True, False}
    assert max(ticket.attempt for ticket in tickets) > 1
    assert asked(beside).queries.asked == asked(alone).queries.asked


def test_what_it_says_over_http(guided: Any, images: Tensor) -> None:
    engine = guided(queries_each=3)
    with served(engine) as (client, _):
        before = asked(engine).queries.asked
        found = post(client, "/v1/counterfactuals", images[4], target="9").json()
        spent = asked(engine).queries.asked - before
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["image"]))))
        said = brightness(picture[None])[0]
        assert found["confirmed"] is found["flipped"] is bool(said.argmax() == 9)
        assert found["target_confidence"] == pytest.approx(said[9], abs=1e-5)
        assert found["queries"] == spent <= 3
        assert found["attempts"] >= 1
        assert found["student_prediction"] in LABELS

        streamed = client.post(
            "/v1/counterfactuals", files={"image": png(images[6])}, data={"target": "9"},
            headers={"Accept": "text/event-stream"},
        )  # fmt: skip
        told = events(streamed.text)
        steps = [data for kind, data in told if kind == "progress"]
        assert {step["attempt"] for step in steps} == set(range(1, told[-1][1]["attempts"] + 1))
        assert all("image" in step and "target_confidence" not in step for step in steps)  # steps cost no query
        assert asked(engine).queries.asked - before - spent == told[-1][1]["queries"]

        predicted = post(client, "/v1/predictions", images[4]).json()  # known: no query
        assert predicted["prediction"] == found["source"]
        (model,) = client.get("/v1/models").json()["models"]
        assert model["queries"]["asked"] == asked(engine).queries.asked
        assert model["surrogate"]
        assert model["guides"]
        assert {"rise", "gradxinput"} <= set(model["usable_methods"])
        assert "lax" not in model["usable_methods"]
        metrics = client.get("/metrics").text
        assert f'counterlens_queries_total{{kind="asked"}} {float(asked(engine).queries.asked)}' in metrics
        assert "counterlens_queries_left" not in metrics


def test_protocols_of_kserve_and_requests_that_name_a_classifier(guided: Any, images: Tensor) -> None:
    engine = guided()
    with served(engine) as (client, _):
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": images[4].flatten().tolist()}
        outputs = [{"name": name} for name in ("prediction", "probabilities", "flipped")]
        answer = client.post("/v2/models/tiny/infer", json={"inputs": [tensor], "outputs": outputs}).json()
        said = {one["name"]: one["data"] for one in answer["outputs"]}
        assert int(np.argmax(said["probabilities"])) == said["prediction"][0]
        before = asked(engine).queries.asked
        assert before <= 6 + 4  # the probabilities of what it judged are known
        outputs = [{"name": "saliency"}]  # by lax
        refused = client.post("/v2/models/tiny/infer", json={"inputs": [tensor], "outputs": outputs})
        assert (refused.status_code, refused.json()["field"]) == (400, "outputs")
        for fields in ({"classifier": "python:os:system"}, {"config": {"classifier": "python:os:system"}}):
            assert post(client, "/v1/counterfactuals", images[4], **fields).status_code == 400
        assert asked(engine).queries.asked == before


def test_maps_are_scored_by_the_box(guided: Any, images: Tensor) -> None:
    engine = guided()
    with served(engine) as (client, _):
        for method in ("rise", "gradxinput"):
            found = post(client, "/v1/saliency", images[4], method=method, target="3").json()
            made = explain_by(guided(), as_saved(images[4:5]), explained="3", method=method)
            assert found["msi"] == pytest.approx(made.msi.score.item(), abs=1e-5)
        before = asked(engine).queries
        refused = post(client, "/v1/counterfactuals", images[4], saliency=True)
        assert (refused.status_code, refused.json()["field"]) == (400, "saliency")
        assert "rise" in refused.json()["detail"]
        refused = post(client, "/v1/saliency", images[4])  # by lax
        assert (refused.status_code, refused.json()["field"]) == (400, "method")
        assert "this server has no adapter (--adapter FOLDER)" in refused.json()["detail"]
        assert asked(engine).queries == before


def test_lax_looks_into_the_student_with_an_adapter_of_its_own(guided: Any, images: Tensor) -> None:
    engine = guided()
    adapter = new_adapter(engine.classifier, 16)
    with served(engine, adapter) as (client, _):
        found = post(client, "/v1/saliency", images[4], target="3").json()
        made = explain_by(guided(), images[4:5], explained="3", adapter=adapter)
        assert found["msi"] == pytest.approx(made.msi.score.item(), abs=1e-5)
        refused = post(client, "/v1/saliency", images[4], quantity="0,1/2,3")
        assert (refused.status_code, refused.json()["field"]) == (400, "quantity")
        both = post(client, "/v1/counterfactuals", images[4], target="9", saliency=True).json()
        assert both["saliency"]["method"] == "lax"
        assert "lax" in client.get("/v1/models").json()["models"][0]["usable_methods"]


def test_a_spent_budget_is_said_and_what_is_known_is_answered(guided: Any, images: Tensor) -> None:
    engine = guided(max_queries=8)  # six of them are probes
    with served(engine) as (client, _):
        assert post(client, "/v1/predictions", images[0]).status_code == 200
        spent = post(client, "/v1/counterfactuals", images[1], target="9")
        assert spent.status_code == 503
        assert "as often as max_queries allows" in spent.json()["detail"]
        assert "retry-after" not in spent.headers
        assert post(client, "/v1/predictions", images[2]).status_code == 503
        assert post(client, "/v1/predictions", images[0]).status_code == 200
        assert client.get("/readyz").status_code == 200
        assert "counterlens_queries_left 0.0" in client.get("/metrics").text


def test_a_box_that_fails_fails_that_request_alone(guided: Any, images: Tensor) -> None:
    def picky(some: np.ndarray) -> np.ndarray:
        if (some.mean(axis=(1, 2, 3)) < 40).any():
            raise ValueError("too dark")
        return brightness(some)

    engine = guided(picky)
    with served(engine, slots=2) as (client, _):
        for path, fields in (
            ("/v1/predictions", {}), ("/v1/counterfactuals", {"target": "9"}), ("/v1/saliency", {"method": "ablation"}),
        ):  # fmt: skip
            failed = post(client, path, images[0], **fields)
            assert (failed.status_code, failed.json()["field"]) == (502, "classifier"), path
            assert "raised ValueError: too dark" in failed.json()["detail"]
            assert post(client, path, images[20], **fields).status_code == 200, path
        both = [{"b64": base64.b64encode(png(images[i])).decode()} for i in (20, 0)]
        for verb in ("predict", "explain"):
            failed = client.post(f"/v1/models/tiny:{verb}", json={"instances": both})
            assert (failed.status_code, failed.json()["field"]) == (502, "classifier"), verb
            assert "image 1" in failed.json()["detail"]
        other = post(client, "/v1/counterfactuals", images[20], target="opposite")  # of ten labels
        assert (other.status_code, other.json()["title"]) == (400, "Bad request")


def test_an_endpoint_that_is_gone_is_said_without_its_secrets(
    tiny: Any, student: Surrogate, images: Tensor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BOX_TOKEN", "hush-7351")
    with serving(Endpoint(brightness)) as server:
        box = open_box(
            server.address + "?key=$BOX_TOKEN", LABELS, image_size=16, header="Authorization: Bearer $BOX_TOKEN",
            retries=0, timeout=5,
        )  # fmt: skip
        student.check(box)
        engine = Engine(tiny[0], box, CONFIG, runtime="eager").with_surrogate(student)
        engine.names |= {"model": "tiny", "classifier": box.name}
        with served(engine) as (client, _):
            done = post(client, "/v1/counterfactuals", images[3], target="9")
            assert done.status_code == 200
            server.override = lambda path, some: (200, {}, b"<html>the key hush-7351 is not yours</html>")
            nonsense = post(client, "/v1/predictions", images[7])
            server.override = lambda path, some: (500, {}, b"the key hush-7351 is not yours")
            gone = post(client, "/v1/counterfactuals", images[8], target="9")
            told = [r.text for r in (done, nonsense, gone, client.get("/v1/models"), client.get("/metrics"))]
    assert (nonsense.status_code, gone.status_code) == (502, 502)
    assert gone.json()["detail"].startswith("the classifier gives no answer for the image")
    captured = capfd.readouterr()
    assert not [text for text in (*told, captured.out, captured.err) if "hush" in text]


def test_a_slow_box_holds_up_nobody_else_and_no_stop(guided: Any, images: Tensor) -> None:
    slow, reached, let = to_uint8(images[1]).permute(1, 2, 0).numpy(), threading.Event(), threading.Event()

    def sluggish(some: np.ndarray) -> np.ndarray:
        if any(np.array_equal(one, slow) for one in some):
            reached.set()
            assert let.wait(20)
        return brightness(some)

    engine = guided(sluggish, concurrency=3)
    with working(engine, slots=1) as worker:
        held = worker.submit(images[1], "9")
        call = worker.call(lambda: engine.probabilities(images[1:2]))
        assert reached.wait(20)
        assert worker.submit(images[2], "3").future.result(timeout=20).error is None
        assert (worker.unfinished, held.future.done()) == (2, False)
        worker.cancel(held)
        with pytest.raises(Exception, match="cancelled"):
            held.future.result(timeout=20)
        held = worker.submit(images[1], "9")
        began = time.perf_counter()
        worker.stop(grace_s=0.2)
        assert time.perf_counter() - began < 5
        for future in (held.future, call):
            with pytest.raises(Draining, match="stopped before this was done"):
                future.result(timeout=1)
        let.set()


def test_many_who_leave_a_slow_box_take_few_threads_and_queries_and_what_is_known_waits_for_none(
    guided: Any, images: Tensor
) -> None:
    let = threading.Event()
    known = to_uint8(images[20]).permute(1, 2, 0).numpy()

    def sluggish(some: np.ndarray) -> np.ndarray:
        if some.shape[0] == 1 and not np.array_equal(some[0], known):
            assert let.wait(30)
        return brightness(some)

    engine = guided(sluggish, concurrency=2)
    said = engine.probabilities(images[20:21])[0]
    before = asked(engine).queries.asked
    with working(engine, slots=1, max_queue=64) as worker:
        for image in images[:18]:
            leaver = worker.submit(image, "9")
            while not leaver.started:
                time.sleep(0.001)
            worker.cancel(leaver)
            with pytest.raises(Cancelled):
                leaver.future.result(timeout=10)
        assert sum(thread.name == "counterlens-beside" for thread in threading.enumerate()) <= 8
        held = [worker.submit(image, "9") for image in images[:8]]
        again = worker.submit(images[20], int(said.argmax()))  # which it says already
        assert again.future.result(timeout=10).status == "skipped"
        for ticket in held:
            worker.cancel(ticket)
        let.set()
        assert worker.submit(images[25], "9").future.result(timeout=30).error is None
        assert asked(engine).queries.asked - before <= 8 + 4


def test_a_map_whose_caller_is_gone_asks_no_more(guided: Any, images: Tensor) -> None:
    reached, let = threading.Event(), threading.Event()

    def sluggish(some: np.ndarray) -> np.ndarray:
        if len(some) > 8:
            reached.set()
            assert let.wait(30)
        return brightness(some)

    async def ask(server: Server) -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        waiting = asyncio.create_task(server.maps(images[4:5], Request({"type": "http"}, receive), method="rise"))
        assert await asyncio.to_thread(reached.wait, 30)
        gone.set()
        with pytest.raises(Problem, match="the caller is gone"):
            await waiting

    engine = guided(sluggish)
    before = asked(engine).queries.asked
    with working(engine, slots=1) as worker:
        while not worker.ready:
            time.sleep(0.001)
        asyncio.run(ask(Server(engine, worker, Metrics(worker), Limits())))
        let.set()
        while worker.unfinished:
            time.sleep(0.001)
    assert asked(engine).queries.asked - before <= 1 + 256  # the pass that was under way


def test_a_box_alone_predicts_and_shows_where_and_guides_nothing(tiny: Any, images: Tensor) -> None:
    engine = Engine(tiny[0], open_box(brightness, LABELS, image_size=16), CONFIG, runtime="eager")
    engine.names |= {"model": "tiny"}
    assert fitting(engine) is None
    with served(engine) as (client, worker):
        assert post(client, "/v1/predictions", images[4]).status_code == 200
        assert post(client, "/v1/saliency", images[4], method="rise").status_code == 200
        for path, fields in (("/v1/counterfactuals", {}), ("/v1/saliency", {"method": "gradxinput"})):
            refused = post(client, path, images[4], **fields)
            assert refused.status_code == 400
            assert "`counterlens surrogate train` makes a student" in refused.json()["detail"]
            assert ("serve with --surrogate FOLDER" in refused.json()["detail"]) == (path == "/v1/counterfactuals")
        (model,) = client.get("/v1/models").json()["models"]
        assert {"rise"} <= set(model["usable_methods"]) <= {"rise", "occlusion", "ablation"}
        assert model["guides"] is False
        assert not worker.failed


def test_a_budget_of_seconds_ends_the_tries(guided: Any, images: Tensor) -> None:
    first = to_uint8(images[2]).permute(1, 2, 0).numpy()

    def sluggish(some: np.ndarray) -> np.ndarray:
        if any(np.array_equal(one, first) for one in some):
            time.sleep(0.5)
        return brightness(some)

    with working(guided(sluggish), slots=1) as worker:
        rushed = worker.submit(images[2], "9", budget_s=0.45).future.result(timeout=30)
        calm = worker.submit(images[2], "9", budget_s=60.0).future.result(timeout=30)
    assert (rushed.error, rushed.complete, rushed.student["attempts"], rushed.student["queries"]) == (None, False, 1, 2)
    assert calm.complete
    assert calm.student["attempts"] > 1
    assert 0 < calm.provenance["budget_s"] <= 60.0
