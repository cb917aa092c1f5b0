"""Classifiers behind a real HTTP server: protocols, failures, secrets, and how much is asked."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch

from bench.endpoint import FLAKY, Endpoint, serving
from counterlens.engine.blackbox import http
from counterlens.engine.blackbox.answers import FILE, key_of
from counterlens.engine.blackbox.box import BlackBox, open_box, probes
from counterlens.engine.errors import CounterlensError, UsageError
from tests.engine.blackbox.conftest import LABELS

JSON = {"content-type": "application/json"}


@pytest.fixture
def server(judge: Any) -> Iterator[Endpoint]:
    with serving(Endpoint(judge)) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterlens.engine.blackbox.asking.FIRST_WAIT", 0.01)


def opened(server: Endpoint, address: str | None = None, **options: Any) -> BlackBox:
    return open_box(address or server.address, LABELS, image_size=32, **options)


def test_every_protocol_gives_the_same_answers(
    server: Endpoint, judge: Any, digits: np.ndarray, tmp_path: Path
) -> None:
    template = tmp_path / "score.json"
    template.write_text(json.dumps({"request": {"picture": "$png", "top": 10}, "answer": "result.scores"}))
    many = tmp_path / "many.json"
    many.write_text(json.dumps({"request": {"instances": ["$png"]}, "answer": "predictions[*]"}))
    base = server.address.split("/v1")[0]
    for address, options, requests in (
        (server.address, {}, 2),
        (f"{base}/v2/models/box/infer", {}, 2),
        (f"{base}/v2/models/box", {"batch": 3}, 4),
        (f"{base}/score", {"template": template}, 10),
        (f"{base}/v1/models/box:predict", {"template": many, "batch": 5}, 2),
    ):
        box = opened(server, address, **options)
        before = server.requests
        assert np.allclose(box.answer(digits[:10]), judge(digits[:10]), atol=2e-5), address
        assert server.requests - before == requests, address


def test_requests_at_once_are_bounded_and_so_is_their_rate(server: Endpoint, digits: np.ndarray) -> None:
    slow, server.answer = server.answer, lambda images: (time.sleep(0.03), slow(images))[1]
    opened(server, batch=2, concurrency=3).answer(digits[:24])
    assert server.most_flying == 3
    started = time.perf_counter()
    opened(server, batch=2, concurrency=3, rate=25.0).answer(digits[24:40])
    assert time.perf_counter() - started > 9 / 25  # eight requests, and two of probes


def test_a_flaky_server_loses_nothing_and_gives_no_wrong_answer(judge: Any, digits: np.ndarray, tmp_path: Path) -> None:
    with serving(Endpoint(judge, faults=FLAKY | {"nonsense": 0.1}, slow_s=1.0, seed=3)) as server:
        box = opened(server, batch=2, timeout=0.5, retries=8, concurrency=8)
        box.keep(tmp_path / FILE)
        rows = box.answer(digits)
    assert {"error", "slow", "good"} < set(server.said)
    assert set(server.said) & {"html", "nan", "length", "sum"}
    assert np.allclose(rows, judge(digits), atol=1e-6)
    q = box.queries
    assert q.asked == sum(server.asked.values())
    assert q.retried == q.asked - len(digits) - 4 - 2  # probes, two of them twice
    assert q.failed == 0


def test_what_gets_no_answer_is_a_row_of_nan_with_its_reason(server: Endpoint, judge: Any, digits: np.ndarray) -> None:
    bad = {key_of(digits[i]): n for n, i in enumerate((2, 5, 7, 11))}
    nonsense = [
        (200, JSON, b'{"predictions": [[NaN, 1, 0, 0, 0, 0, 0, 0, 0, 0]]}'),
        (200, {"content-type": "text/html"}, b"<html>sorry</html>"),
        (200, JSON, b'{"predictions": [[0.5, 0.5]]}'),
        (422, {}, b"no picture of mine"),
    ]

    def override(path: str, images: list[np.ndarray]) -> Any:
        wrong = [bad[key_of(image)] for image in images if key_of(image) in bad]
        return nonsense[wrong[0]] if wrong else None

    server.override = override
    box = opened(server, batch=4, retries=2)
    rows = box.answer(digits[:16])
    assert np.isnan(rows).all(1).nonzero()[0].tolist() == [2, 5, 7, 11]
    kept = [i for i in range(16) if i not in (2, 5, 7, 11)]
    assert np.allclose(rows[kept], judge(digits[kept]), atol=1e-6)
    said = [box.why(torch.from_numpy(digits[i]).permute(2, 0, 1) / 255) for i in (2, 5, 7, 11)]
    for text, expected in zip(
        said, ("NaN", "answers with HTML", "[2] scores", "422 (no picture of mine)"), strict=True
    ):
        assert expected in text
    server.override = None
    assert np.allclose(box.answer(digits[:16]), judge(digits[:16]), atol=1e-6)  # they were never cached
    assert box.queries.failed == 4


def test_a_server_that_is_gone_ends_the_run(server: Endpoint, digits: np.ndarray) -> None:
    box = opened(server, batch=4, retries=1)
    server.override = lambda path, images: (503, {"retry-after": "0"}, b"gone fishing")
    with pytest.raises(CounterlensError, match=r"no answer for \d+ images in a row.*503 \(gone fishing\)"):
        box.answer(digits)


def test_a_kill_loses_the_requests_in_flight_alone(server: Endpoint, digits: np.ndarray, tmp_path: Path) -> None:
    slow, server.answer = server.answer, lambda images: (time.sleep(0.02), slow(images))[1]
    code = f"""
import numpy as np
from pathlib import Path
from counterlens.engine.blackbox.box import open_box
box = open_box({server.address!r}, {LABELS!r}, image_size=32, batch=2, concurrency=3)
box.keep(Path({str(tmp_path / FILE)!r}))
box.answer(np.load({str(tmp_path / "digits.npy")!r}))
"""
    np.save(tmp_path / "digits.npy", digits)
    process = subprocess.Popen(["python", "-c", code])
    while sum(server.asked.values()) < 26 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    time.sleep(0.1)  # what is in flight is answered to nobody
    before = server.asked.copy()
    box = opened(server, batch=2, concurrency=3)
    box.keep(tmp_path / FILE)
    stored = len(box._answers)
    assert stored >= 10
    box.answer(digits)
    again = sum(server.asked[key_of(image)] > 1 for image in digits)
    assert again <= 3 * 2  # what was in flight
    assert box.queries.cached == stored
    of_probes = {key_of(image) for image in probes(32)}
    asked = sum(n for key, n in (server.asked - before).items() if key not in of_probes)
    assert asked == len(digits) - stored
    # Counted before they were sent: also what the killed one asked last, and what it could not send any more.
    assert 0 <= box.queries_in_all.asked - sum(server.asked.values()) <= 3 * 2


def test_redirects_and_refusals_end_it_at_once(server: Endpoint) -> None:
    for answer, message in (
        (
            (307, {"location": "https://elsewhere.example/x"}, b""),
            "redirects to 'https://elsewhere.example/x'; refused",
        ),
        ((403, {}, b""), "refuses the request with 403"),
        ((404, {}, b"no such model"), r"answers with 404 \(no such model\)"),
    ):
        server.override = lambda path, images, answer=answer: answer
        before = server.requests
        with pytest.raises(CounterlensError, match=message):
            opened(server)
        assert server.requests == before + 1


def test_a_self_signed_certificate_is_named(judge: Any, tmp_path: Path) -> None:
    key, both = tmp_path / "key.pem", tmp_path / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(both)],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate = both.read_text()
    both.write_text(key.read_text() + certificate)
    with serving(Endpoint(judge), str(both)) as server:
        with pytest.raises(CounterlensError, match=r"the certificate of localhost:\d+ is self-signed"):
            opened(server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(both))
            assert not opened(server).hard


def test_secrets_come_from_the_environment_and_are_written_nowhere(
    server: Endpoint, digits: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = 's3cr3t-"token"/42'
    server.headers = {"Authorization": f"Bearer {secret}"}
    header = "Authorization: Bearer $BOX_TOKEN"
    with pytest.raises(UsageError, match="the environment has no BOX_TOKEN"):
        opened(server, header=header)
    monkeypatch.setenv("BOX_TOKEN", secret)
    box = opened(server, header=header, retries=0, batch=1)
    box.keep(tmp_path / FILE)
    box.answer(digits[:3])
    echo = json.dumps({"predictions": [secret]}).encode()
    answers = iter(
        [(500, {}, secret.encode()), (422, {}, secret.encode()), (200, JSON, echo), (200, {}, secret.encode())]
    )
    server.override = lambda path, images: next(answers)
    box.answer(digits[4:8])
    said = " ".join([*box._reasons.values(), json.dumps(box.record()), repr(box), box.why()])
    assert len(box._reasons) == 4
    assert "$BOX_TOKEN" in said
    assert "s3cr3t" not in said
    assert all(b"s3cr3t" not in path.read_bytes() for path in tmp_path.iterdir())
    server.override = lambda path, images: (302, {"location": f"http://x.example/?{secret}"}, b"")
    with pytest.raises(CounterlensError) as error:
        box.answer(digits[8:9])
    assert "s3cr3t" not in str(error.value)


def test_a_secret_in_the_query_arrives_as_it_is(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOX_KEY", "a+b/c&d#e%41==")
    paths = list[str]()
    server.override = lambda path, images: paths.append(path)
    box = opened(server, f"{server.address}?key=$BOX_KEY&v=2")
    assert parse_qs(urlsplit(paths[0]).query) == {"key": ["a+b/c&d#e%41=="], "v": ["2"]}
    assert box.source.hide(paths[0]).endswith("?key=$BOX_KEY&v=2")


def test_what_cannot_be_decompressed_or_is_endless_is_said(
    server: Endpoint, digits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "LARGEST", 2**20)
    box = opened(server, retries=0)
    packed = {"content-encoding": "gzip"}
    for headers, body, said in (
        (packed, b"no gzip", "answers with what cannot be decompressed"),
        (packed, gzip.compress(bytes(4 << 20)), "answers with more than 1 MB"),
        (packed, gzip.compress(b'{"predictions": [[0.1]]}')[:-12], "it ends too early"),
        ({"content-encoding": "gzip, gzip"}, gzip.compress(gzip.compress(bytes(4 << 20))), "not what was asked for"),
    ):
        server.override = lambda path, images, headers=headers, body=body: (200, headers, body)
        assert np.isnan(box.answer(digits[:1])).all()
        assert said in box.why()


def test_answers_that_no_reader_survives_are_failures(server: Endpoint, digits: np.ndarray) -> None:
    base = server.address.split("/v1")[0]
    box = opened(server, f"{base}/v2/models/box/infer", retries=0)
    for answer in (
        b'{"outputs": [{"name": "scores", "shape": [], "data": [1]}]}',
        b"[" * 100_000,
        b'{"outputs": [{"name": "scores", "shape": [1, 2], "data": [1' + b"0" * 400 + b", 1]}]}",
    ):
        server.override = lambda path, images, answer=answer: (200, JSON, answer)
        assert np.isnan(box.answer(digits[:1])).all()
        assert "answers with" in box.why()


@pytest.mark.parametrize("batch", [[4], [1], []])
def test_a_model_with_a_fixed_batch_or_none_is_asked_in_that_one(
    server: Endpoint, judge: Any, digits: np.ndarray, monkeypatch: pytest.MonkeyPatch, batch: list[int]
) -> None:
    base, sent, send = server.address.split("/v1")[0], list[list[int]](), http.Endpoint._json
    about = {
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [*batch, 3, 32, 32]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [*batch, 10]}],
    }
    monkeypatch.setattr(http.Endpoint, "_metadata", lambda self, address: about)

    def noted(self: http.Endpoint, method: str, address: str, body: Any) -> Any:
        sent.append(body["inputs"][0]["shape"])
        return send(self, method, address, body)

    monkeypatch.setattr(http.Endpoint, "_json", noted)
    box = opened(server, f"{base}/v2/models/box/infer")
    assert np.allclose(box.answer(digits[:6]), judge(digits[:6]), atol=2e-5)
    assert all(shape == [*batch, 3, 32, 32] for shape in sent)
    assert box.queries.asked == 6 + 6
    with pytest.raises(UsageError, match=f"takes {math.prod(batch)} images in a request"):
        opened(server, f"{base}/v2/models/box/infer", batch=5)


def test_addresses_and_options_that_do_not_fit(server: Endpoint, tmp_path: Path) -> None:
    base = server.address.split("/v1")[0]
    (tmp_path / "bad.json").write_text('{"request": {"x": "$png", "y": "$png"}, "answer": "a"}')
    (tmp_path / "path.json").write_text('{"request": {"x": "$png"}, "answer": "a[*][*]"}')
    for address, options, message in (
        ("http://example.com/v1/models/a:predict", {}, r"http:// to example.com .* --classifier-insecure"),
        ("HTTP://example.com/v1/models/a:predict", {}, "http:// to example.com"),
        ("https://me:pw@example.com/v1/models/a:predict", {}, "no user and password in an address"),
        ("https://example.com/v1/models/a:predict?api_key=123", {}, r"api_key= .* give it as api_key=\$VARIABLE"),
        (f"{base}/score", {}, "--classifier-template FILE.json"),
        (f"{base}/score", {"template": tmp_path / "none.json"}, "cannot be read"),
        (f"{base}/score", {"template": tmp_path / "bad.json"}, r"needs one of \$png"),
        (f"{base}/score", {"template": tmp_path / "path.json"}, "expected a path"),
        (server.address, {"header": "Authorization: Bearer abc"}, "has to come from a variable"),
        (server.address, {"header": "$TOKEN"}, "expected 'Name: value'"),
        (server.address, {"std": "1,0,1"}, "classifier_std: expected three numbers"),
        ("https://", {}, "names no host"),
        ("https://[::1/v1/models/a:predict", {}, "is no address"),
        ("http://localhost:99999/v1/models/a:predict", {}, "is no address"),
        ("http://127.0.0.999/v1/models/a:predict", {}, "is no address"),
        ("https://xn--/v1/models/a:predict", {}, "is no address"),
        ("https://example.com/v1/models/a:predict?code=123", {}, r"give it as code=\$VARIABLE"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            opened(server, address, **options)
        assert "\n" not in str(error.value)
    assert server.requests == 0


def test_a_server_on_this_machine_is_asked_through_no_proxy(
    server: Endpoint, digits: np.ndarray, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for host in ("localhost", "127.0.0.1"):
        box = opened(server, server.address.replace("localhost", host), retries=0)
        assert np.allclose(box.answer(digits[:1]), judge(digits[:1]), atol=1e-6)
    with pytest.raises(CounterlensError, match="cannot be reached"):
        opened(server, server.address.replace("localhost", "box.example"), retries=0, insecure=True)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SSL_CERT_FILE", "nowhere.pem", "certificates cannot be read .* SSL_CERT_FILE"),
        ("HTTPS_PROXY", "foo://me:hidden@proxy.example", "the proxy of the environment cannot be used"),
        ("HTTPS_PROXY", "http://me:hid/den@proxy.example", "the proxy of the environment cannot be used"),
    ],
)
def test_what_is_wrong_in_the_environment_is_said(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(CounterlensError, match=said) as error:
        open_box("https://box.example/v1/models/box:predict", LABELS, image_size=32)
    assert "hid" not in str(error.value)


def test_a_secret_that_a_models_metadata_repeats_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOX_TOKEN", "s3cr3t")
    about = {"inputs": [{"name": "s3cr3t", "datatype": "FP32", "shape": [1, 1, 3, 32, 32]}], "outputs": []}
    monkeypatch.setattr(http.Endpoint, "_json", lambda *args: about)
    with pytest.raises(UsageError, match=r"input \$BOX_TOKEN has shape"):
        open_box("https://box.example/v2/models/box/infer", LABELS, image_size=32, header="X-Token: $BOX_TOKEN")


def test_how_long_a_server_wants_to_be_left_alone() -> None:
    soon = formatdate(time.time() + 20, usegmt=True)
    for text, seconds in (("7", 7), ("9" * 5000, 60), ("", 0), ("²", 0), ("-3", 0), ("soon", 0), (soon, 20),
                          ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 99 Oct 9999999 07:28:00 GMT", 0)):  # fmt: skip
        assert http.pause_of(text) == pytest.approx(seconds, abs=2)
