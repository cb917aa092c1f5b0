"""The page at `/`: its files and routes over HTTP, and what a person sees in a browser."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import html5lib
import httpx
import pytest
import torch
from starlette.testclient import TestClient

from counterlens.engine.core.core import EngineCore
from counterlens.engine.serve import tasks
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.file import FileWorker, make_file_app
from counterlens.engine.serve.guard import Keys
from counterlens.engine.serve.wire import png
from counterlens.engine.serve.worker import Worker
from tests.engine.portable.test_portable import SIZE, write_toy
from tests.engine.serve.test_http import events, picture, pixels


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
    html5lib.HTMLParser(strict=True).parse(page.text)
    ids = re.findall(r'\sid="([^"]+)"', page.text)
    assert len(ids) == len(set(ids))
    script = client.get("/page.js").text
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= set(ids)
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


def test_results_are_forgotten_in_time_and_before_their_previews_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "KEPT_S", 0.05)
    monkeypatch.setattr(tasks, "KEPT_CHARACTERS", 250)

    async def run() -> list[list[str]]:
        held, seen = tasks.Tasks(), []
        for name in ("long", "first", "second", "third"):
            await held.open(name, lambda: None)
            held.say(name, "progress", {"step": 1, "image": "x" * 100})
            if name != "long":  # which goes on
                held.say(name, "result", {"status": "done"})
        seen.append([*held.tasks])
        await asyncio.sleep(0.2)
        seen.append([*held.tasks])
        return seen

    assert asyncio.run(run()) == [["long", "third"], ["long"]]


def test_previews_of_runs_that_go_on_do_not_fill_the_memory_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "KEPT_CHARACTERS", 250)

    async def run() -> tasks.Tasks:
        held = tasks.Tasks()
        for name in ("one", "other"):
            await held.open(name, lambda: None)
            for step in range(1, 5):
                held.say(name, "progress", {"step": step, "image": "x" * 100})
        return held

    held = asyncio.run(run())
    kept = {name: [d["step"] for _, d in task.events if "image" in d] for name, task in held.tasks.items()}
    assert sum(map(len, kept.values())) == 2
    assert kept["other"] == [4]
    assert all([d["step"] for _, d in task.events] == [1, 2, 3, 4] for task in held.tasks.values())


# In a browser


@pytest.fixture(scope="module")
def address(engine: EngineCore, worker: Worker) -> Iterator[str]:
    with listening(make_app(engine, worker)) as made:
        yield made


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """An application at a port of this machine."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False, lifespan="off"))
    held = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{held.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a Chromium (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


class Tab:
    """A tab of its own session, and what it said on the console and asked for."""

    def __init__(self, browser: Any, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: Any) -> None:
        self.context.close()

    def open(self, file: bytes) -> None:
        """Open an image and wait for what the model says of it."""
        self.page.set_input_files("#file", {"name": "image.png", "mimeType": "image/png", "buffer": file})
        self.page.wait_for_selector("#run:enabled")

    def answered(self, times: int = 1) -> str:
        """What the page says of the result."""
        self.page.wait_for_selector(f"body[data-answers='{times}']")
        return self.page.inner_text("#answer")


def test_a_person_sees_an_image_change_and_comes_back_to_it(browser: Any, address: str) -> None:
    with Tab(browser, 390) as tab:
        page = tab.page
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        assert page.is_visible("#hint")
        tab.open(picture(5))
        assert page.locator("#before .first").count() == 1
        page.press("#run", "Enter")
        first = tab.answered()
        assert first.startswith("The model said")
        last = page.inner_text("#at")
        assert re.match(r"Step (\d+) of \1\n\S+: [<>]?.*% · ", last)
        assert "NaN" not in page.get_attribute("#target-line", "points")
        page.press("#step", "Home")
        page.wait_for_selector("#step[aria-valuetext^=Before]")
        page.press("#step", "ArrowRight")
        page.wait_for_selector("#step[aria-valuetext^='Step 1 of']")
        page.select_option("#method", "rise")
        page.wait_for_selector("body[data-maps]")
        assert page.inner_text("#score").startswith("MSI ")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        link = page.url
        assert "#task=" in link
        assert tab.said == []
        assert all(url.startswith((address, "blob:", "data:")) for url in tab.asked)
    with Tab(browser) as tab:  # somebody else, with the link alone
        tab.page.goto(link)
        assert tab.answered() == first
        assert tab.page.inner_text("#at") == last
        assert tab.said == []
        assert httpx.delete(link.replace("#task=", "v1/counterfactuals/")).status_code == 204
        tab.page.reload()
        tab.page.get_by_text("This result is gone").wait_for()
        tab.open(picture(6))
        tab.page.click("#run")
        assert tab.answered().startswith("The model said")
        assert not tab.page.is_visible("#problem")
        # A browser says itself that an answer was 404.
        assert [text for text in tab.said if "404" not in text] == []


@pytest.mark.slow
def test_the_page_of_a_file_shows_what_the_file_can_do(browser: Any, tmp_path: Path) -> None:
    worker = FileWorker(write_toy(tmp_path))
    with listening(make_file_app(worker)) as address, Tab(browser) as tab:
        worker.start().result(timeout=20)
        tab.page.goto(address)
        tab.page.wait_for_selector("body[data-ready]")
        for unknown in ("#speeds", "#modes", "#evidence"):
            assert not tab.page.is_visible(unknown)
        tab.open(picture(5, size=SIZE))
        before = tab.page.inner_text("#before .first .name")
        tab.page.click("#run")
        assert tab.answered().startswith(f"The model said {before} ")
        assert tab.page.inner_text("#after .first .name") != before
        assert tab.page.inner_text("#at").startswith("After\n")
        assert "task" not in tab.page.url
        tab.page.press("#step", "Home")
        tab.page.wait_for_selector("#step[aria-valuetext^=Before]")
        for fit, rows in (("crop", ["GGG"] * 3), ("squash", ["RGB"] * 3), ("pad", ["000", "RGB", "000"])):
            worker.run.fit = fit
            tab.page.reload()
            tab.page.wait_for_selector("body[data-ready]")
            tab.open(stripes())
            assert tab.page.evaluate(NINE, SIZE) == rows, fit
        assert tab.said == []
        worker.stop()


def stripes() -> bytes:
    """A third red, a third green, a third blue, three times as wide as high."""
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 60, 60)
    return png(torch.cat([*colours], dim=-1))


NINE = """(size) => [1, 3, 5].map((y) => [1, 3, 5].map((x) => {
  const place = [x, y].map((n) => Math.floor(n * size / 6));
  const [r, g, b] = document.getElementById("input").getContext("2d").getImageData(...place, 1, 1).data;
  return r > 150 ? "R" : g > 150 ? "G" : b > 150 ? "B" : "0";
}).join(""))"""


def test_a_run_that_is_stopped_gives_its_place_free(browser: Any, address: str, worker: Worker) -> None:
    gate = threading.Event()
    with Tab(browser) as tab:
        tab.page.goto(address)
        tab.page.wait_for_selector("body[data-ready]")
        tab.open(picture(7))
        steps = worker.steps
        worker.call(lambda: gate.wait(20))
        tab.page.click("#run")
        tab.page.get_by_role("button", name="Stop").wait_for()
        while not worker.waiting:
            time.sleep(0.01)
        tab.page.keyboard.press("Escape")
        tab.page.get_by_role("button", name="Show the change").wait_for()
        assert tab.page.inner_text("#answer") == "Stopped."
        while not all(request.ticket.cancelled for request in worker._waiting):
            time.sleep(0.01)
        gate.set()
        assert worker.call(lambda: worker.steps).result(timeout=20) == steps
        assert worker.busy_slots == worker.waiting == 0
        tab.page.click("#run")  # and the page goes on
        tab.answered()
        assert tab.said == []


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_out_of_addresses(
    browser: Any, engine: EngineCore, worker: Worker, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    with listening(make_app(engine, worker, keys=Keys(file))) as address, Tab(browser) as tab:
        tab.page.goto(address)
        tab.page.fill("#key", "wrong")
        tab.page.press("#key", "Enter")
        tab.page.get_by_text("This key is not accepted here.").wait_for()
        tab.page.fill("#key", "secret")
        tab.page.press("#key", "Enter")
        tab.page.wait_for_selector("body[data-ready]")
        assert not tab.page.is_visible("#door")
        tab.open(picture(8))
        tab.page.click("#run")
        tab.answered()
        tab.page.reload()
        tab.answered()  # it is kept for this tab
        assert not any("secret" in url for url in tab.asked)
        assert [text for text in tab.said if "401" not in text] == []


REFUSALS = [
    (429, "why", "The server is busy. There should be room in about 7 seconds."),
    (413, "why", "The image is too large for this server (why)."),
    (422, "why", "The server cannot do this: why."),
    (502, "why", "The model that this server asks gave no answer (why)."),
    (503, "classifier: why", "The model that this server asks may be asked no more (classifier: why)."),
    (503, "why", "The server is being started or stopped and takes nothing just now."),
    (0, "", "The server cannot be reached."),
]


@pytest.mark.slow
def test_what_goes_wrong_is_said_in_a_sentence_and_tried_again(browser: Any, address: str) -> None:
    with Tab(browser) as tab:
        tab.page.goto(address)
        tab.page.wait_for_selector("body[data-ready]")
        tab.open(picture(9))
        for status, detail, sentence in REFUSALS:

            def refuse(route: Any, *, status: int = status, detail: str = detail) -> None:
                if status:
                    route.fulfill(status=status, headers={"Retry-After": "7"}, json={"detail": detail})
                else:
                    route.abort()

            tab.page.route("**/v1/counterfactuals", refuse)
            tab.page.click("#run")
            tab.page.get_by_text(sentence).wait_for()
            tab.page.unroute("**/v1/counterfactuals")
            assert tab.page.is_enabled("#run")
        tab.page.get_by_role("button", name="Try again").click()
        tab.answered()
        assert not tab.page.is_visible("#problem")
        broken = 'event: progress\ndata: {"step": 1, "total": 3}\n\n'
        tab.page.route(
            "**/v1/counterfactuals", lambda route: route.fulfill(content_type="text/event-stream", body=broken)
        )
        tab.page.click("#run")
        tab.page.get_by_text("The connection broke off before the result was there.").wait_for()

        def called_only(route: Any) -> None:
            told = route.fetch().json()
            told["models"][0]["guides"] = False
            route.fulfill(json=told)

        tab.page.route("**/v1/models", called_only)
        tab.page.reload()
        tab.page.get_by_text("This server's model can only be asked").wait_for()
        tab.page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": picture(9)})
        tab.page.wait_for_selector("#look:enabled")
        assert tab.page.is_disabled("#run")
        assert [text for text in tab.said if "Failed to load resource" not in text] == []


@pytest.mark.slow
def test_a_thousand_labels_are_searched(browser: Any, address: str) -> None:
    labels = [f"label {i}" for i in range(999)] + ["a very long name of a label, such as photographs have them"]
    chances = [0.5, 0.3, *[0.2 / 998] * 998]

    def models(route: Any) -> None:
        told = route.fetch().json()
        told["models"][0] |= {"labels": labels, "image_size": 224}
        route.fulfill(json=told)

    with Tab(browser, 390) as tab:
        tab.page.route("**/v1/models", models)
        tab.page.route("**/v1/predictions", lambda route: route.fulfill(json={"shares": chances}))
        tab.page.goto(address)
        tab.page.wait_for_selector("body[data-ready]")
        tab.open(picture(4, size=300))
        assert tab.page.locator("#before li").count() == 8
        tab.page.fill("#find", "VERY long")
        tab.page.get_by_role("button", name=labels[-1]).click()
        tab.page.fill("#find", "")
        assert tab.page.get_by_role("button", name=labels[-1]).get_attribute("aria-pressed") == "true"
        assert tab.page.is_disabled("[data-target='0']")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        sent: list[Any] = []
        tab.page.route(
            "**/v1/counterfactuals", lambda route: (sent.append(route.request.post_data_json), route.abort())
        )
        tab.page.click("#run")
        tab.page.get_by_text("The server cannot be reached.").wait_for()
        assert sent[0]["target"] == 999
        assert pixels(base64.b64decode(sent[0]["image"])).shape == (224, 224, 3)


DROP = """([kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), held = new DataTransfer();
  held.items.add(new File([bytes], "image.png", { type: "image/png" }));
  const fields = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, { ...fields, clipboardData: held })
    : new DragEvent(kind, { ...fields, dataTransfer: held }));
}"""


@pytest.mark.slow
def test_an_image_is_dropped_pasted_drawn_or_a_sample(browser: Any, address: str) -> None:
    sample = {"name": "a sample", "image": base64.b64encode(picture(12)).decode()}
    with Tab(browser) as tab:
        page = tab.page
        sent: list[bytes] = []

        def predict(route: Any) -> None:
            sent.append(base64.b64decode(route.request.post_data_json["image"]))
            route.continue_()

        page.route("**/v1/samples", lambda route: route.fulfill(json={"samples": [sample]}))
        page.route("**/v1/predictions", predict)
        predicted = "**/v1/predictions"
        with page.expect_response(predicted):  # the first sample is taken
            page.goto(address)
        for kind, number in (("drop", 10), ("paste", 11)):
            with page.expect_response(predicted):
                page.evaluate(DROP, [kind, base64.b64encode(picture(number)).decode()])
        page.focus("#samples button")
        with page.expect_response(predicted):
            page.keyboard.press("Space")
        box = page.locator("#ink").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 20)
        with page.expect_response(predicted):
            page.mouse.up()
        page.wait_for_selector("#run:enabled")
        assert page.get_attribute("#input", "aria-label") == "Your drawing"
        first, dropped, pasted, again, drawn = (pixels(data) for data in sent)
        for got, number in ((first, 12), (dropped, 10), (pasted, 11), (again, 12)):
            assert (got == pixels(picture(number))).all()
        assert drawn[0:3].max() == 255
        assert drawn[8:].max() == 26  # the empty ground
        assert tab.said == []
