"""A real HTTP server in front of any function of images, which fails as it is told to: for tests and measurements."""

from __future__ import annotations

import base64
import io
import json
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from counterlens.engine.blackbox.answers import key_of
from counterlens.engine.blackbox.open_inference import HEADER
from counterlens.engine.models.protocols import Classifier, probabilities

NONSENSE = ("html", "nan", "length", "sum")
FLAKY = {"error": 0.2, "slow": 0.05, "nonsense": 0.01}  # shares of requests


def answers_of(classifier: Classifier) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier as a function from uint8 [N, H, W, 3] to probabilities [N, labels]; one at a time."""
    lock = threading.Lock()

    @torch.no_grad()
    def answer(images: np.ndarray) -> np.ndarray:
        with lock:
            x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
            # A sum's last bits may depend on the batch: always of one size.
            padded = torch.cat([x, x[:1].expand(-len(x) % 8, -1, -1, -1)])
            return torch.cat([probabilities(classifier, part) for part in padded.split(8)])[: len(x)].numpy()

    return answer


class Endpoint(ThreadingHTTPServer):
    """Answers `/v1/models/box:predict`, `/v2/models/box/infer` and, for templates, `/score`.

    Args:
        answer: uint8 [N, H, W, 3] to probabilities [N, labels].
        faults: shares of requests that fail as `error` (500), `slow` (no answer for `slow_s`) or `nonsense`.
        seed: of the faults.
        headers: that a request must bring; else 401.

    Attributes:
        asked: how often each image was asked about, by key. answered: how often it got a good answer.
        requests, flying, most_flying: how many there were, are, and were at once.
    """

    daemon_threads = True

    def __init__(
        self,
        answer: Callable[[np.ndarray], Any],
        *,
        size: int = 32,
        labels: int = 10,
        faults: Mapping[str, float] | None = None,
        slow_s: float = 1.0,
        seed: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.size, self.labels = answer, size, labels
        self.faults, self.slow_s, self.headers = dict(faults or {}), slow_s, dict(headers or {})
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.asked, self.answered = Counter[bytes](), Counter[bytes]()
        self.requests = self.flying = self.most_flying = 0
        self.said: list[str] = []  # kinds of answers, in order
        self.override: Callable[[str, list[np.ndarray]], tuple[int, dict[str, str], bytes] | None] | None = None
        self.scheme = "http"

    @property
    def address(self) -> str:
        """Of the v1 protocol."""
        return f"{self.scheme}://localhost:{self.server_address[1]}/v1/models/box:predict"

    def fault(self) -> str:
        """What goes wrong with the next request; empty: nothing."""
        with self.lock:
            drawn, kind = self.random.random(), self.random.choice(NONSENSE)
        for name, share in self.faults.items():
            if drawn < share:
                return kind if name == "nonsense" else name
            drawn -= share
        return ""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to tell."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Endpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """Metadata of the v2 protocol."""
        size, labels = self.server.size, self.server.labels
        said = {
            "name": "box", "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 3, size, size]}],
            "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, labels]}],
        }  # fmt: skip
        self._send(200, {"content-type": "application/json"}, json.dumps(said).encode())

    def do_POST(self) -> None:
        """An answer, or what goes wrong."""
        server = self.server
        body, length = self.rfile.read(int(self.headers["content-length"])), self.headers.get(HEADER)
        self.binary = length is not None
        if self.binary:
            from counterlens.engine.serve.kserve import read_inference  # the server's own reader

            asked, tensors = read_inference(body, length)
            asked["inputs"][0]["data"] = tensors["image"]
        else:
            asked = json.loads(body)
        images = self._images(asked)
        keys = [key_of(image) for image in images]
        with server.lock:
            server.requests += 1
            server.flying += 1
            server.most_flying = max(server.most_flying, server.flying)
            server.asked.update(keys)
        try:
            if any(self.headers.get(name) != value for name, value in server.headers.items()):
                self._send(401, {}, b"who are you?")
                return
            if server.override is not None and (own := server.override(self.path, images)) is not None:
                self._send(*own)
                return
            self._answer(images, keys, server.fault())
        finally:
            with server.lock:
                server.flying -= 1

    def _images(self, body: Any) -> list[np.ndarray]:
        if "inputs" in body:
            (tensor,) = body["inputs"]
            array = np.asarray(tensor["data"], dtype=np.float64).reshape(-1, *tensor["shape"][-3:])
            return list(np.round(array.transpose(0, 2, 3, 1) * 255).astype(np.uint8))
        sent = body["instances"] if "instances" in body else [body["picture"]]
        texts = [one["image"]["b64"] if isinstance(one, dict) else one for one in sent]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in texts]

    def _answer(self, images: list[np.ndarray], keys: list[bytes], fault: str) -> None:
        server = self.server
        with server.lock:
            server.said.append(fault or "good")
        if fault == "error":
            self._send(500, {}, b"something broke")
            return
        if fault == "slow":
            time.sleep(server.slow_s)
            self._send(504, {}, b"too late")
            return
        if fault == "html":
            self._send(200, {"content-type": "text/html"}, b"<html><body>Please log in</body></html>")
            return
        rows = np.asarray(server.answer(np.stack(images)), dtype=np.float64).tolist()
        if fault == "nan":
            rows[-1][0] = float("nan")
        elif fault == "length":
            rows[-1] = rows[-1][:-1]
        elif fault == "sum":
            rows[-1] = [p + 0.5 for p in rows[-1]]
        else:
            with server.lock:
                server.answered.update(keys)
        if self.path.startswith("/v2/"):
            flat = [p for row in rows for p in row]
            shape = [len(rows), len(flat) // len(rows)]
            scores: dict[str, Any] = {"name": "scores", "datatype": "FP32", "shape": shape}
            said: Any = {"outputs": [scores]}
            if self.binary:
                blob = np.asarray(flat, dtype="<f4").tobytes()
                scores["parameters"] = {"binary_data_size": len(blob)}
                head = json.dumps(said).encode()
                self._send(200, {"content-type": "application/octet-stream", HEADER: str(len(head))}, head + blob)
                return
            scores["data"] = flat
        elif self.path == "/score":
            said = {"result": {"scores": rows[0]}}
        else:
            said = {"predictions": rows}
        self._send(200, {"content-type": "application/json"}, json.dumps(said).encode())

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(endpoint: Endpoint, certificate: str | None = None) -> Iterator[Endpoint]:
    """Run a server in a thread; with a certificate's file (key and chain) over TLS."""
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        endpoint.socket = context.wrap_socket(endpoint.socket, server_side=True)
        endpoint.scheme = "https"
    thread = threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.shutdown()
        endpoint.server_close()
        thread.join()
