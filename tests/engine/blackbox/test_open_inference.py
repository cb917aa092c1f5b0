"""Tensors as bytes, held to Triton's client and to our own server, and lengths that are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bench.endpoint import Endpoint, serving
from counterlens.engine.blackbox.box import open_box
from counterlens.engine.blackbox.open_inference import HEADER, Model, read_response
from counterlens.engine.blackbox.reading import Refused, Unanswered
from counterlens.engine.errors import UsageError
from counterlens.engine.serve.kserve import _respond, read_inference
from tests.engine.blackbox.conftest import LABELS

triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")


@pytest.fixture
def server(judge: Any) -> Iterator[Endpoint]:
    with serving(Endpoint(judge)) as endpoint:
        yield endpoint


def of(kind: str, shape: list[int]) -> Model:
    outputs = [{"name": "scores", "shape": [-1, 10]}]
    return Model.of({"inputs": [{"name": "image", "datatype": kind, "shape": shape}], "outputs": outputs}, 10)


@pytest.mark.parametrize("kind", ["FP32", "FP16", "FP64", "UINT8"])
@pytest.mark.parametrize("shape", [[-1, 3, 5, 4], [4, 5, 4, 3], [3, 5, 4]])
def test_a_request_is_what_tritons_client_sends(kind: str, shape: list[int]) -> None:
    model, rng = of(kind, shape), np.random.default_rng(0)
    images = rng.integers(0, 256, (1, 5, 4, 3)).astype(np.uint8)
    array = model.array(images / 255 if model.floats else images)
    assert list(array.shape) == [1 if shape[0] == -1 else shape[0], *shape[1:]]
    body, length = model.binary_request(array)
    theirs = triton.InferInput("image", list(array.shape), kind)
    theirs.set_data_from_numpy(array, binary_data=True)
    wanted = [triton.InferRequestedOutput("scores", binary_data=True)]
    expected, its_length = triton.InferenceServerClient.generate_request_body([theirs], outputs=wanted)
    assert json.loads(body[:length]) == json.loads(expected[:its_length])
    assert body[length:] == expected[its_length:]


def test_our_own_server_reads_a_request(judge: Any, digits: np.ndarray) -> None:
    model = of("FP32", [-1, 3, 32, 32])
    array = model.array(digits[:3] / 255)
    body, length = model.binary_request(array)
    asked, found = read_inference(body, str(length))
    assert np.array_equal(found["image"], array)
    assert asked["outputs"] == [{"name": "scores", "parameters": {"binary_data": True}}]


def test_responses_of_our_server_and_of_triton_are_read() -> None:
    arrays = {"scores": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3), "place": np.array([3, -7])}
    for binary in ([True, True], [True, False], [False, True]):
        response = _respond("box", None, [*arrays], arrays, binary)
        said = read_response(bytes(response.body), response.headers[HEADER])
        theirs = triton.InferenceServerClient.parse_response_body(
            bytes(response.body), header_length=int(response.headers[HEADER])
        )
        for output in said["outputs"]:
            array = np.reshape(output["data"], output["shape"])
            assert np.array_equal(array, theirs.as_numpy(output["name"]))
    from tritonclient.utils import serialize_byte_tensor

    blob = serialize_byte_tensor(np.array(["null", "äöü"], dtype=object)).item()
    head = json.dumps({"outputs": [{"name": "label", "datatype": "BYTES", "shape": [2],
                                    "parameters": {"binary_data_size": len(blob)}}]}).encode()  # fmt: skip
    (label,) = read_response(head + blob, str(len(head)))["outputs"]
    assert label["data"] == ["null", "äöü"]


def test_bytes_give_the_answers_that_json_gives(server: Endpoint, judge: Any, digits: np.ndarray) -> None:
    address = f"{server.address.split('/v1')[0]}/v2/models/box/infer"
    box = open_box(address, LABELS, image_size=32, binary=True)
    assert np.allclose(box.answer(digits[:10]), judge(digits[:10]), atol=1e-6)
    assert box.identity == open_box(address, LABELS, image_size=32).identity  # answers that are known stay so
    with pytest.raises(UsageError, match="classifier_binary: of the Open Inference Protocol alone"):
        open_box(server.address, LABELS, image_size=32, binary=True)


def head(size: Any = 40, **more: Any) -> bytes:
    output = {"name": "scores", "datatype": "FP32", "shape": [1, 10], "parameters": {"binary_data_size": size}}
    return json.dumps({"outputs": [output | more]}).encode()


def wrong() -> Iterator[tuple[bytes, str | None, str]]:
    """Body, what its header says, and what is said of it; nothing where it is no JSON."""
    scores = np.full((1, 10), 0.1, "<f4").tobytes()
    good = head()
    yield good + scores, str(len(good) + 41), "JSON by its"  # longer than all there is
    yield good + scores, "12 bytes", "'12 bytes' of them JSON"
    yield good + scores, "-5", "'-5' of them JSON"
    yield good + scores, "9" * 5000, "of them JSON"
    yield good + scores, str(len(good) - 3), ""  # ends within the JSON
    yield good + scores[:-1], str(len(good)), "39 bytes of 'scores', 40 were said"
    yield good + scores + b"\0", str(len(good)), "1 bytes behind its tensors"
    for size in (-4, "40", 2**70, 1.5):
        yield head(size) + scores, str(len(head(size))), "bytes of 'scores'"
    for more, said in (
        ({"shape": [1, 11]}, "40 bytes of 'scores', FP32 [1, 11] are 44"),
        ({"shape": [-1, 10]}, "of shape [-1, 10]"),
        ({"shape": "ten"}, "of shape ten"),
        ({"datatype": "FP8"}, "of FP8, which is not read"),
        ({"datatype": "BYTES"}, "which are no 10 texts"),
    ):
        yield head(**more) + scores, str(len(head(**more))), said
    yield good + scores, None, ""  # bytes, and nothing says so


@pytest.mark.parametrize(("body", "length", "said"), [*wrong()])
def test_wrong_lengths_are_said(body: bytes, length: str | None, said: str) -> None:
    with pytest.raises((Unanswered, ValueError)) as caught:  # that it is no JSON, the endpoint says
        read_response(body, length)
    assert isinstance(caught.value, Unanswered) == bool(said)
    assert said in str(caught.value)


def test_wrong_bytes_are_never_cached(server: Endpoint, judge: Any, digits: np.ndarray) -> None:
    address = f"{server.address.split('/v1')[0]}/v2/models/box/infer"
    box = open_box(address, LABELS, image_size=32, binary=True, retries=0, batch=1)
    good = head()
    cases = [*((body, length, said or "no JSON") for body, length, said in [*wrong()][3:7])]
    cases.append((good + np.full(10, np.nan, "<f4").tobytes(), str(len(good)), "NaN"))
    for i, (body, length, said) in enumerate(cases):
        headers = {} if length is None else {HEADER: length}
        server.override = lambda path, images, answer=(200, headers, body): answer
        assert np.isnan(box.answer(digits[i : i + 1])).all(), said
        assert said in box.why()
    server.override = None
    assert box.queries.failed == len(cases)
    assert np.allclose(box.answer(digits[: len(cases)]), judge(digits[: len(cases)]), atol=1e-6)


def test_what_metadata_has_to_say() -> None:
    image = {"name": "image", "datatype": "FP32", "shape": [-1, 3, 8, 8]}
    place, scores = {"name": "place", "shape": [-1]}, {"name": "scores", "shape": [-1, 10]}
    assert Model.of({"inputs": [image], "outputs": [place, scores]}, 10).output == "scores"
    assert Model.of({"inputs": [image], "outputs": [place]}, 10).output == "place"  # labels alone
    for outputs in ([], [{"name": "scores", "shape": [10**9, 0], "data": []}]):  # so many rows of nothing
        with pytest.raises(Unanswered, match="without an output 'scores'"):
            Model.of({"inputs": [image], "outputs": [scores]}, 10).take({"outputs": outputs}, 1)
    for batch, said in ((10**12, "a batch of 1000000000000"), (float("inf"), "no single input of images")):
        with pytest.raises(Refused, match=said):
            Model.of({"inputs": [image | {"shape": [batch, 3, 8, 8]}], "outputs": [scores]}, 10)
