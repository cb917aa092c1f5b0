"""The server of a whole run in one file: the same routes and errors, without PyTorch."""

from __future__ import annotations

import base64
import io
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from counterlens.engine.serve.file import FileWorker, make_file_app
from counterlens.engine.serve.guard import Keys, Limits
from tests.engine.cli.test_cli import one_line_error, run
from tests.engine.portable.test_portable import SIZE, write_toy

WITHOUT_TORCH = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
            raise ImportError(name, name=name)
sys.meta_path.insert(0, Gone())
from counterlens.engine.cli.main import main
main()
"""


def picture(level: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (level, level, level)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def client(file: Path) -> Iterator[TestClient]:
    worker = FileWorker(file, max_queue=2)
    with TestClient(make_file_app(worker, limits=Limits(pixels=100))) as made:
        assert made.get("/readyz").status_code == 503
        worker.start().result()
        assert made.get("/readyz").status_code == 200
        yield made
        worker.stop()
        late = made.post("/v1/counterfactuals", files={"image": picture(20)})
        assert late.status_code == 503
        assert "stopped" in late.json()["detail"]


def test_it_answers_as_the_engines_server_does(client: TestClient) -> None:
    said = client.post("/v1/counterfactuals", files={"image": picture(20)}, data={"target": "bright"}).json()
    assert (said["status"], said["source"], said["prediction"], said["flipped"]) == ("done", "dark", "bright", True)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(said["image"]))))
    assert pixels.min() > 250
    alone = client.post("/v1/counterfactuals", files={"image": picture(20)}, headers={"Accept": "image/png"})
    assert alone.headers["x-prediction"] == "bright"
    assert np.asarray(Image.open(io.BytesIO(alone.content))).shape == (SIZE, SIZE, 3)
    text = base64.b64encode(picture(20)).decode()
    assert client.post("/v1/counterfactuals", json={"image": text, "target": 0}).json()["status"] == "skipped"
    found = client.post("/v1/predictions", files={"image": picture(240)}).json()
    assert found["prediction"] == "bright"
    assert found["probabilities"]["bright"] == pytest.approx(240 / 255, abs=1e-5)
    assert client.get("/v1/models").json()["models"][0]["labels"][0] == "dark"
    assert "counterlens_requests_total" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"target": "green"}, 400, "target"), ({"speed": "fast"}, 400, "speed"), ({"seed": "-1"}, 400, "seed"),
        ({"colour": "1"}, 400, "colour"),
    ],
)  # fmt: skip
def test_what_it_does_not_take(client: TestClient, fields: dict[str, str], status: int, field: str) -> None:
    told = client.post("/v1/counterfactuals", files={"image": picture(20)}, data=fields)
    assert (told.status_code, told.headers["content-type"]) == (status, "application/problem+json")
    assert told.json()["detail"].startswith(field)


def test_other_refusals(client: TestClient, file: Path, tmp_path: Path) -> None:
    assert client.post("/v1/counterfactuals", files={"image": b"no picture"}).status_code == 422
    big = io.BytesIO()
    Image.new("RGB", (11, 11)).save(big, "PNG")
    assert client.post("/v1/counterfactuals", files={"image": big.getvalue()}).status_code == 413
    asks = {"Prefer": "respond-async"}
    assert client.post("/v1/counterfactuals", files={"image": picture(20)}, headers=asks).status_code == 400
    missing = client.post("/v1/saliency", files={"image": picture(20)})
    assert missing.status_code == 422
    assert "no saliency.onnx lies beside the file" in missing.json()["detail"]
    (tmp_path / "keys").write_text("secret\n")
    with TestClient(make_file_app(FileWorker(file), keys=Keys(tmp_path / "keys"))) as closed:
        assert closed.post("/v1/predictions", files={"image": picture(20)}).status_code == 401


@contextmanager
def serving(file: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process without PyTorch that is ready, and its address."""
    command = [sys.executable, "-c", WITHOUT_TORCH, "serve", "--file", str(file), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while (found := re.search(r"serving at (\S+)", line := process.stderr.readline())) is None:
            assert line, "it ended"
        while httpx.get(f"{found[1]}/readyz").status_code != 200:
            time.sleep(0.02)
        yield process, found[1]
    finally:
        process.kill()


def test_a_process_without_pytorch(file: Path) -> None:
    with serving(file) as (process, address), httpx.Client(base_url=address, timeout=30) as client:
        said = client.post("/v1/counterfactuals", files={"image": picture(20)}).json()
        assert said["prediction"] == "bright"
        elsewhere = client.get("/v1/models", headers={"Host": "rebound.example"})
        assert (elsewhere.status_code, elsewhere.json()["field"]) == (400, "host")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_a_second_signal_ends_a_drain_at_once_and_says_what_is_lost(file: Path) -> None:
    with serving(file) as (process, address):
        assert process.stderr is not None
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as held:
            head = b"POST /v1/predictions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            held.sendall(head + b"Content-Length: 90\r\nExpect: 100-continue\r\n\r\n")
            assert held.recv(100).startswith(b"HTTP/1.1 100 ")  # its body is waited for
            process.send_signal(signal.SIGTERM)
            while "stopping: what runs is finished" not in process.stderr.readline():
                pass
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            began = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 1
            assert time.perf_counter() - began < 5
            assert "stopped at once; requests without an answer: 1" in process.stderr.read()


def test_pages_of_other_origins_and_labels_of_other_alphabets(file: Path) -> None:
    worker = FileWorker(file)
    worker.run.labels = ["dark", "hell\r\nX-Odd: \u732b"]
    origin = "https://page.example"
    with TestClient(make_file_app(worker, cors_origins=[origin])) as client:
        worker.start().result()
        headers = {"Origin": origin, "Accept": "image/png"}
        answer = client.post("/v1/counterfactuals", files={"image": picture(20)}, headers=headers)
        worker.stop()
    assert answer.status_code == 200, answer.text
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["x-prediction"] == "hell%0D%0AX-Odd: %E7%8C%AB"


def test_options_that_have_no_use_beside_a_file(file: Path) -> None:
    one_line_error(run("serve", "--file", file, "--speed", "fast"), 2, "speed: has no use with --file")
    one_line_error(run("serve", "--file", file, "--slots", "4"), 2, "slots: has no use with --file")
    one_line_error(run("serve", "--replicas", "2"), 2, "give --ray too")
    one_line_error(run("serve", "--file", file.with_name("none.onnx")), 2, "no such file")
