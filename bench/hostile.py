"""What nobody should send to a server: every kind of it, over a socket, and what came back.

An answer counts as bad if it is a 500 or shows a traceback; 503 (memory, stopping) and 504 (budget) are answers.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import random
import socket
import struct
import time
import zlib
from collections import Counter
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

BODY_LIMIT = 32_000_000  # of `counterlens serve`
NUMBERS = (
    -1,
    0,
    1e308,
    -1e308,
    2**63,
    -(2**63),
    2**200,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "x",
    None,
    [],
    {},
    True,
)
FIELDS = ("target", "speed", "mode", "seed", "budget_s", "saliency", "preview", "config", "image")
SETTINGS = ("strength", "steps", "class_scale", "distance_scale", "guidance_scale", "angle", "guidance_every", "noise",
            "solver", "spacing", "filter")  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int) -> bytes:
    """A few kilobytes that claim `side` squared pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(3_000_000), 9)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose compressed text is 200 MB."""
    good = BytesIO()
    Image.new("RGB", (8, 8)).save(good, "PNG")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    return good.getvalue()[:33] + text + good.getvalue()[33:]


def animated(kind: str, frames: int) -> bytes:
    """A file of many frames."""
    out = BytesIO()
    pages = [Image.new("RGB", (64, 64), (i % 256, i // 256, 0)) for i in range(frames)]
    pages[0].save(out, kind, save_all=True, append_images=pages[1:])
    return out.getvalue()


@functools.cache
def files() -> dict[str, bytes]:
    """Images that are none, or more than they seem."""
    good = BytesIO()
    Image.new("RGB", (32, 32), (200, 20, 20)).save(good, "PNG")
    whole = good.getvalue()
    return {
        "30000 x 30000": huge_png(30_000), "2 ** 31 - 1 squared": huge_png(2**31 - 1), "0 x 0": huge_png(0),
        "7000 x 7000": huge_png(7000), "text of 200 MB": text_bomb(), "APNG of 500": animated("PNG", 500),
        "GIF of 500": animated("GIF", 500), "cut off": whole[: len(whole) // 2], "bit flips": whole[:40] + b"\xff" * 20,
        "only a head": whole[:8], "zeros": bytes(10_000), "zip": b"PK\x03\x04" + bytes(99),
        "EPS": b"%!PS-Adobe-3.0 EPSF", "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "TIFF": b"II*\0\xff\xff\xff\xff", "ICO": b"\0\0\1\0\xff\xff",
    }  # fmt: skip


def requests(image: bytes) -> list[tuple[str, str, dict[str, Any]]]:
    """(what, path, arguments of httpx)."""
    out: list[tuple[str, str, dict[str, Any]]] = []
    text = base64.b64encode(image).decode()
    for name, data in files().items():
        for path in ("counterfactuals", "saliency", "predictions"):
            out.append((f"file: {name}", f"/v1/{path}", {"files": {"image": data}}))
    for field in FIELDS:
        for value in NUMBERS:
            body = json.dumps({"image": text, "speed": "fast", field: value})
            out.append((f"{field}: {value}", "/v1/counterfactuals", {"content": body, "headers": JSON}))
    for field in SETTINGS:
        for value in NUMBERS:
            body = json.dumps({"image": text, "speed": "fast", "budget_s": 5, "config": {field: value}})
            out.append((f"config: {field}: {value}", "/v1/counterfactuals", {"content": body, "headers": JSON}))
    for what, content in {
        "deep list": "[" * 10_000, "deep object": '{"a":' * 10_000, "deep, whole": "[" * 10_000 + "]" * 10_000,
        "open text": '"' + '\\"' * 100_000, "long number": "9" * 100_000, "surrogate": '{"image": "\\ud800"}',
        "twice": '{"image": 1, "image": 2}', "NUL": "\0" * 100, "": "",
    }.items():  # fmt: skip
        for path in ("/v1/counterfactuals", "/v2/models/digits/infer", "/v1/models/digits:explain"):
            out.append((f"JSON: {what}", path, {"content": content, "headers": JSON}))
    for kind in ("text/plain", "application/xml", "multipart/form-data", "multipart/form-data; boundary=", "\u00e4"):
        out.append(
            (f"type: {kind}", "/v1/counterfactuals", {"content": image, "headers": {b"content-type": kind.encode()}})
        )
    form = {b"content-type": b"multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n'
    for what, content_ in {
        "no end": b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc',
        "no name": b"--x\r\n\r\nabc\r\n--x--\r\n", "garbage": random.Random(0).randbytes(5000),
        "thousand fields": b"".join(part % i for i in range(1000)),
        "long header": b"--x\r\nContent-Disposition: " + b"a" * 100_000 + b"\r\n\r\n",
    }.items():  # fmt: skip
        out.append((f"form: {what}", "/v1/counterfactuals", {"content": content_, "headers": form}))
    for garbage in ("%%%%", "A", "data:,", "data:image/png;base64", "=" * 1000, "\u00e9", text[:-5]):
        out.append((f"base64: {garbage[:20]}", "/v1/predictions", {"json": {"image": garbage}}))
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 3, 32, 32]}
    for size in (-1, 0, 1, 12287, 12289, 2**62, "x", None, 1.5, True):
        for shape in ([1, 3, 32, 32], [2**24, 2**24, 2**24], [-1], [0], [], [1, 3, 32, 1e9]):
            head = json.dumps(
                {"inputs": [tensor | {"shape": shape, "parameters": {"binary_data_size": size}}]}
            ).encode()
            for length in (len(head), 0, 10**9):
                out.append(
                    (
                        f"binary: {size} {shape} {length}",
                        "/v2/models/digits/infer",
                        {"content": head + bytes(12288), "headers": {"Inference-Header-Content-Length": str(length)}},
                    )
                )
    return out


JSON = {"content-type": "application/json"}


def raw(url: str, data: bytes, pause_s: float = 0.0, wait_s: float = 5.0) -> bytes:
    """What comes back for bytes that no client library would send; with a pause between single bytes."""
    there = urlsplit(url)
    with socket.create_connection((there.hostname or "", there.port or 80), timeout=wait_s) as held:
        try:
            if pause_s:
                for byte in data:
                    held.sendall(bytes([byte]))
                    time.sleep(pause_s)
            else:
                held.sendall(data)
            return held.recv(65536)
        except (TimeoutError, ConnectionError):
            return b""


def raws() -> dict[str, bytes]:
    """Requests as bytes."""
    post = b"POST /v1/predictions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return {
        "headers of 64 KiB": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 65536 + b"\r\n\r\n",
        "thousand headers": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n",
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        "cut off": post + b"Content-Length: 1000\r\n\r\n{",
        "negative length": post + b"Content-Length: -5\r\n\r\n{}",
        "two lengths": post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        "bad chunk": post + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n",
        "length said": post + b"Content-Length: 99999999999\r\n\r\n",
        "odd key": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        "odd id": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\x01b\r\n\r\n",
        "long path": b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }  # fmt: skip


def slow(url: str, connections: int = 100, hold_s: float = 5.0, closed_s: float = 40.0) -> list[str]:
    """Connections that send half of their headers, or of a body, and then nothing; all at once: those left open."""
    there = urlsplit(url)
    post = b"POST /v1/predictions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    post += b"Content-Length: 90\r\n"
    held = [socket.create_connection((there.hostname or "", there.port or 80)) for _ in range(connections)]
    for i, one in enumerate(held):
        one.sendall(post[:40] if i % 2 else post + b"\r\n{")
    time.sleep(hold_s)
    assert httpx.get(f"{url}/healthz", timeout=10).status_code == 200
    end, left = time.monotonic() + closed_s, 0
    for one in held:
        one.settimeout(max(0.01, end - time.monotonic()))
        try:
            while one.recv(65536):
                pass
        except TimeoutError:
            left += 1
        except ConnectionError:
            pass
        one.close()
    return [f"{left} slow connections are open after {hold_s + closed_s:g} s"] if left else []


def keys(url: str, key: str) -> list[str]:
    """No key, wrong ones and the right one at a server that asks for it: what is answered as it should not be."""
    wrong = ["", key, "Bearer", "Bearer ", f"Bearer {key}x", f"Bearer {key[:-1]}", f"Basic {key}",
             f"Bearer {key} {key}", f"Bearer {'a' * 20_000}", "Bearer \u00e9", f"Bearer\t{key}"]  # fmt: skip
    bad = []
    for path in ("/v1/models", "/openapi.json", "/v2/models/digits", "/v1/counterfactuals/x"):
        for said in (None, *wrong, f"bearer {key}"):
            header = b"" if said is None else b"Authorization: " + said.encode("latin-1") + b"\r\n"
            asked = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + header + b"\r\n"
            answer = raw(url, asked).decode("latin-1")
            right = said == f"bearer {key}"
            if (answer[9:12] == "401") == right or answer[9:10] not in "24":
                bad.append(f"{path}: {said!r:.60} gets {answer[:60]!r}")
    return bad


def fuzz(url: str, cases: int) -> tuple[Counter[str], list[str]]:
    """schemathesis' cases from the OpenAPI document: answers by status, and the bad ones."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    statuses: Counter[str] = Counter()
    bad: list[str] = []
    for turn, operation in enumerate(itertools.cycle(operations)):  # one without fields has a single case
        if sum(statuses.values()) >= cases:
            break

        @seed(turn)
        @settings(max_examples=50, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            answer = case.call(timeout=120)
            _judge(f"{case.method} {case.path}", answer.status_code, answer.text, statuses, bad)

        run()
    return statuses, bad


def _judge(what: str, status: int, text: str, statuses: Counter[str], bad: list[str]) -> None:
    statuses[str(status)] += 1
    if status == 500 or "Traceback" in text:
        bad.append(f"{what}: {status} {text[:300]}")


def attack(url: str, image: bytes, cases: int) -> dict[str, Any]:
    """Everything above; `cases` of schemathesis."""
    statuses: Counter[str] = Counter()
    bad: list[str] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for what, path, asked in requests(image):
            answer = client.post(path, **asked)
            _judge(what, answer.status_code, answer.text, statuses, bad)

        def endless() -> Any:
            for _ in range(BODY_LIMIT // 1_000_000 + 5):
                yield bytes(1_000_000)

        try:
            answer = client.post("/v1/predictions", content=endless(), headers=JSON)
            _judge("chunks without end", answer.status_code, answer.text, statuses, bad)
        except httpx.TransportError:
            statuses["closed"] += 1
    for what, data in raws().items():
        said = raw(url, data, wait_s=2.0).decode("latin-1")
        _judge(what, int(said.split()[1]) if said.startswith("HTTP/") else 0, said, statuses, bad)
    bad += slow(url)
    more, worse = fuzz(url, cases)
    return {"statuses": dict(statuses), "schemathesis": dict(more), "cases": sum(more.values()), "bad": bad + worse}
