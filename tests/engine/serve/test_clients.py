"""The Open Inference Protocol with a client that others wrote: Triton's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn

from counterlens.engine.blackbox.box import open_box
from counterlens.engine.core.core import EngineCore
from counterlens.engine.images.files import to_uint8
from counterlens.engine.serve.app import make_app
from tests.engine.serve.test_worker import images, working

triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")


@pytest.fixture(scope="module")
def address(engine: EngineCore) -> Iterator[str]:
    held = socket.create_server(("127.0.0.1", 0))
    with working(engine, slots=2, max_queue=8) as worker:
        server = uvicorn.Server(uvicorn.Config(make_app(engine, worker), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
        thread.start()
        while not (server.started and worker.ready):
            time.sleep(0.005)
        yield f"127.0.0.1:{held.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address) as made:
        yield made


def asked(array: np.ndarray, targets: list[int], binary: bool) -> list[Any]:
    image = triton.InferInput("image", list(array.shape), "FP32")
    image.set_data_from_numpy(array, binary_data=binary)
    target = triton.InferInput("target", [len(targets)], "INT64")
    target.set_data_from_numpy(np.asarray(targets, dtype=np.int64), binary_data=binary)
    return [image, target]


def test_health_and_metadata(client: Any, engine: EngineCore) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    said = client.get_model_metadata("tiny")
    assert {i["name"]: i["shape"] for i in said["inputs"]} == {"image": [-1, 3, 16, 16], "target": [-1]}
    assert {"counterfactual", "probabilities", "saliency"} <= {o["name"] for o in said["outputs"]}


def test_json_and_binary_tensors_answer_alike(client: Any, engine: EngineCore) -> None:
    shown = images(3).numpy()
    names = ("counterfactual", "probabilities", "prediction", "source", "flipped", "l1")
    found = []
    for binary in (False, True):
        outputs = [triton.InferRequestedOutput(n, binary_data=binary) for n in names]
        found.append(client.infer("tiny", asked(shown, [-1, -1, -1], binary), outputs=outputs, request_id="7"))
        assert found[-1].get_response()["id"] == "7"
    for name in names:
        one, two = (f.as_numpy(name) for f in found)
        assert one.dtype == two.dtype
        assert np.array_equal(one, two)
    made = found[0].as_numpy("counterfactual")
    assert made.shape == shown.shape
    assert made.min() >= 0
    assert made.max() <= 1
    p = engine.probabilities(torch.from_numpy(shown))
    assert found[0].as_numpy("source").tolist() == p.argmax(1).tolist()


@pytest.mark.parametrize("binary", [False, True])
def test_what_does_not_fit_is_said(client: Any, binary: bool) -> None:
    shown = images(1).numpy()
    for given, targets, said in (
        (shown + 2, [-1], r"image: expected numbers in \[0, 1\]"),
        (shown[:, :, :8], [-1], r"image: expected \[B, 3, 16, 16\]"),
        (shown, [1, 2], "target: expected 1, one for each image, got 2"),
        (shown, [99], "target"),
    ):
        with pytest.raises(triton.InferenceServerException, match=said):
            client.infer("tiny", asked(np.ascontiguousarray(given), targets, binary))
    with pytest.raises(triton.InferenceServerException, match="'nothing' is none"):
        client.infer("tiny", asked(shown, [-1], binary), outputs=[triton.InferRequestedOutput("nothing")])
    with pytest.raises(triton.InferenceServerException, match="is not served here"):
        client.infer("other", asked(shown, [-1], binary))


def test_a_black_box_asks_this_server_in_bytes(client: Any, address: str, engine: EngineCore) -> None:
    """Of images its v2 route makes counterfactuals: what it says of them is what the box is told."""
    box = open_box(f"http://{address}/v2/models/tiny/infer", engine.labels, image_size=16, binary=True, batch=4)
    pixels = to_uint8(images(2))
    shown = (pixels.double() / 255).float().numpy()
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=True)]
    expected = client.infer("tiny", asked(shown, [-1, -1], True), outputs=outputs).as_numpy("probabilities")
    found = box.answer(pixels.permute(0, 2, 3, 1).contiguous().numpy())
    assert np.allclose(found, expected, atol=1e-6)
