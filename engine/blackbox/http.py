"""A classifier behind an address: KServe v1, the Open Inference Protocol (v2), or whatever a template describes."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import CounterlensError, UsageError, install_hint
from ..models.preprocessing import Preprocessing
from .open_inference import HEADER, Model, read_response
from .options import BoxOptions, numbers
from .reading import Refused, Unanswered, Unusable
from .sending import Late, Packed, Sender, TooLong

Pixels = NDArray[np.uint8]

LOCAL = re.compile(r"localhost|127(\.\d+){3}|::1")
VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?")
SECRET = re.compile(r"key|token|secret|pass|pwd|auth|cred|jwt|sig|^code$", re.I)
LARGEST = 64 * 2**20  # bytes of an answer
LONGEST_PAUSE = 60.0  # seconds that a server may ask for
WAITS = (408, 425, 429, 500, 502, 503, 504)  # may be answered another time
ABOUT_IMAGE = (400, 413, 415, 422)  # this request is refused, another image may be taken
V1 = {"request": {"instances": [{"image": {"b64": "$png"}}]}, "answer": "predictions[*]"}
STEP = re.compile(r"([^.\[\]]+)|\[(\d+|\*)\]")


class Endpoint:
    """An address that answers POST requests; which protocol it speaks, its path says, or a template.

    Raises:
        UsageError: address, template or a header do not fit. CounterlensError: httpx is missing, or it does not answer.
    """

    remote = True
    preprocessing: Preprocessing | None = None

    def __init__(self, address: str, labels: Sequence[str], size: int, options: BoxOptions) -> None:
        try:
            import httpx
        except ImportError as error:
            raise CounterlensError(f"httpx cannot be imported ({error}); {install_hint('endpoints')}") from error
        for logger in ("httpx", "httpcore"):  # they would log addresses and headers with what is secret in them
            logging.getLogger(logger).setLevel(logging.WARNING)
        self._httpx, self._address = httpx, address
        self.labels, self.output, self._retries = list(labels), options.output, options.retries
        self._check_address(options.insecure)
        self._headers = _headers(options.header)
        self._expanded()  # or a variable is missing
        self.name = address
        self.concurrency = options.concurrency or 4
        self._mean, self._std = numbers("mean", options.mean, 0.0), numbers("std", options.std, 1.0)
        self._sender = self._open_sender(options.timeout)
        self._model: Model | None = None  # of the Open Inference Protocol
        self._binary = options.binary
        path = urlsplit(address).path.rstrip("/")
        self._make: Callable[[Pixels], Any]
        self._take: Callable[[Any, int], Any]
        described: dict[str, Any] | None
        if options.template is not None:
            described, many = _template(options.template)
        elif path.endswith(":predict"):
            described, many = V1, True
        elif re.search(r"/v2/models/[^/]+(/versions/[^/]+)?(/infer)?$", path):
            self._model = self._v2(path)
            described, many = None, True
        else:
            raise UsageError(
                f"classifier: {address} is no .../v1/models/NAME:predict and no .../v2/models/NAME/infer; say what is "
                "sent and where the answer stands with --classifier-template FILE.json"
            )
        if options.binary and self._model is None:
            raise UsageError("classifier_binary: of the Open Inference Protocol alone (.../v2/models/NAME/infer)")
        if described is not None:
            wanted, answer = described["request"], str(described["answer"])
            self._make = lambda images: fill(wanted, images, self._value)
            self._take = lambda said, count: find(said, answer, count)
        fixed = self._model.fixed if self._model else None
        self.batch = options.batch or fixed or (8 if many else 1)
        if fixed and self.batch > fixed:
            raise UsageError(f"classifier_batch: {address} takes {fixed} images in a request, by its metadata")
        if self.batch > 1 and not many:
            raise UsageError("classifier_batch: the template's request has no list of one image, so it holds one image")
        self.identity: dict[str, Any] = {
            "address": address, "template": described, "mean": self._mean, "std": self._std,
        }  # fmt: skip

    def ask(self, images: Pixels) -> Any:
        """One request."""
        if (model := self._model) is None:
            return self._take(self._json("POST", self._target(), self._make(images)), len(images))
        array = model.array(self._floats(images) if model.floats else images)
        if not self._binary:
            return model.take(self._json("POST", self._target(), model.request(array)), len(images))
        body, length = model.binary_request(array)
        headers = {"content-type": "application/octet-stream", HEADER: str(length)}
        return model.take(self._answer("POST", self._target(), body, headers), len(images))

    # What is sent

    def _value(self, what: str, image: Pixels) -> Any:
        """An image as a placeholder asks for it."""
        if what == "png":
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            return base64.b64encode(buffer.getvalue()).decode()
        return image.tolist() if what == "pixels" else self._floats(image).transpose(2, 0, 1).tolist()

    def _floats(self, images: Pixels) -> NDArray[np.float32]:
        """Pixels in [0, 1], normalised, channels last."""
        return ((images.astype(np.float64) / 255 - self._mean) / self._std).astype(np.float32)

    def _v2(self, path: str) -> Model:
        """Read from the model's metadata what it takes and gives."""
        base = path.removesuffix("/infer")
        self._infer = f"{base}/infer"
        try:
            return Model.of(self._metadata(self._target(base)), len(self.labels))
        except Refused as error:
            raise UsageError(
                f"classifier: {self._address}: {self.hide(str(error))} with --classifier-template FILE.json"
            ) from error

    def _metadata(self, address: str) -> Any:
        for attempt in range(self._retries + 1):
            try:
                return self._json("GET", address)
            except Unanswered as failure:
                why = str(failure)
                time.sleep(0.1 * 2 ** min(attempt, 5))
            except Refused as refusal:
                why = str(refusal)
                break
        raise CounterlensError(f"classifier: {self.name} {self.hide(why)}")

    # The request

    def _open_sender(self, seconds: float) -> Sender:
        """What sends; certificates and proxies are those of the environment, but for hosts on this machine."""
        host = urlsplit(self._address).hostname or ""
        try:
            return Sender(self.concurrency, seconds, LARGEST, host if LOCAL.fullmatch(host) else None)
        except OSError as error:
            raise CounterlensError(
                f"classifier: certificates cannot be read ({error}); look at SSL_CERT_FILE and SSL_CERT_DIR"
            ) from error
        except (ImportError, ValueError, self._httpx.InvalidURL) as error:
            # An address is not shown: it may hold a password.
            why = f" ({error})" if isinstance(error, ImportError) else ", it is no http:// or https:// address"
            raise CounterlensError(
                f"classifier: the proxy of the environment cannot be used{why}; look at HTTPS_PROXY, HTTP_PROXY, "
                "ALL_PROXY and NO_PROXY"
            ) from error

    def _check_address(self, insecure: bool) -> None:
        try:
            parts = urlsplit(self._address)
        except ValueError as error:
            raise UsageError(f"classifier: it is no address ({error})") from error
        if parts.username or parts.password:
            raise UsageError(
                "classifier: no user and password in an address, it is written into files; give a header of a "
                "variable, --classifier-header 'Authorization: Basic $LOGIN'"
            )
        if not parts.hostname or re.search(r"\s", self._address):
            raise UsageError(f"classifier: {self._address!r} names no host")
        try:
            _ = parts.port, self._httpx.URL(self._address).host
        except (ValueError, self._httpx.InvalidURL) as error:
            raise UsageError(f"classifier: {self._address!r} is no address ({error})") from error
        for pair in filter(None, parts.query.split("&")):
            name, _, value = pair.partition("=")
            if SECRET.search(name) and not VARIABLE.search(value):
                raise UsageError(
                    f"classifier: {name}= in an address is written into files; give it as {name}=$VARIABLE"
                )
        if parts.scheme == "http" and not LOCAL.fullmatch(parts.hostname) and not insecure:
            raise UsageError(
                f"classifier: http:// to {parts.hostname} sends images and headers in the open; use https://, or "
                "--classifier-insecure to allow it"
            )

    def _target(self, path: str | None = None) -> str:
        """The address to ask, variables put in."""
        parts = urlsplit(self._address)
        wanted = path or getattr(self, "_infer", None) or parts.path
        return parts._replace(path=wanted, query=_expand(parts.query, in_query=True)).geturl()

    def _expanded(self) -> dict[str, str]:
        return {name: _expand(value) for name, value in self._headers.items()}

    def hide(self, text: str) -> str:
        """A text without what variables hold."""
        for name in VARIABLE.findall(" ".join([*self._headers.values(), urlsplit(self._address).query])):
            if value := os.environ.get(name, "").strip():
                for said in (value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]):
                    text = text.replace(said, f"${name}")
        return text

    def _json(self, method: str, address: str, body: Any = None) -> Any:
        """What a request of JSON is answered with; see `_answer`."""
        if body is None:
            return self._answer(method, address, None, {})
        return self._answer(method, address, json.dumps(body).encode(), {"content-type": "application/json"})

    def _answer(self, method: str, address: str, content: bytes | None, headers: Mapping[str, str]) -> Any:
        """The JSON that a request is answered with, tensors behind it put in.

        Raises:
            Unanswered: it may be answered another time. Refused: this request will not. Unusable: none will.
        """
        host, httpx = urlsplit(self._address).netloc, self._httpx
        headers = {**self._expanded(), "accept": "application/json", **headers}
        try:
            response, body = self._sender.send(method, address, content, headers)
        except TooLong as error:
            raise Unanswered(f"answers with more than {LARGEST >> 20} MB") from error
        except Late as late:
            how = "finish its answer" if late.began else "answer"
            raise Unanswered(f"did not {how} within {self._sender.seconds:g} s") from late
        except Packed as error:
            raise Unanswered(f"answers with what cannot be decompressed ({error})") from error
        except httpx.RequestError as error:
            why = " ".join(self.hide(str(error)).split())[:200]
            if "CERTIFICATE_VERIFY_FAILED" in why:
                own = "self-signed" if "self-signed" in why or "self signed" in why else "not one that is trusted here"
                raise Unusable(
                    f"classifier: the certificate of {host} is {own} ({why}); SSL_CERT_FILE=FILE.pem names the "
                    "authority that signed it, where you trust it"
                ) from error
            raise Unanswered(f"cannot be reached ({why or type(error).__name__})") from error
        text, status = body[:4096].decode("utf-8", errors="replace"), response.status_code
        start = " ".join(self.hide(text).split())[:120]
        if response.is_redirect:
            there = self.hide(response.headers.get("location", ""))
            raise Unusable(
                f"classifier: {host} redirects to {there[:200]!r}; refused: images and headers go nowhere else. Give "
                "that address where you trust it"
            )
        if status in (401, 403):
            raise Unusable(f"classifier: {host} refuses the request with {status}; is the header's variable right?")
        if status in WAITS:
            raise Unanswered(
                f"answers with error {status} ({start})", pause_of(response.headers.get("retry-after", ""))
            )
        if status in ABOUT_IMAGE:
            raise Refused(f"refuses this request with {status} ({start})")
        if not response.is_success:
            raise Unusable(f"classifier: {host} answers with {status} ({start})")
        try:
            return read_response(body, response.headers.get(HEADER))
        except (ValueError, RecursionError) as error:
            what = "HTML" if text.lstrip()[:1] == "<" else "no JSON"
            raise Unanswered(f"answers with {what} ({start[:60]})") from error


def pause_of(asked: str) -> float:
    """Seconds that a server wants to be left alone, by its `Retry-After`: a number or a date; 0 where it says none."""
    if asked.isascii() and asked.isdecimal():
        return min(float(asked), LONGEST_PAUSE)
    try:
        then = parsedate_to_datetime(asked).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(max(0.0, then - time.time()), LONGEST_PAUSE)


def _headers(text: str | None) -> dict[str, str]:
    """Headers of `Name: value; Name: value`, whose values are of variables.

    Raises:
        UsageError: a value names no variable: what is typed stands in the shell's history and in lists of processes.
    """
    found = {}
    for part in filter(None, (text or "").split(";")):
        name, colon, value = (x.strip() for x in part.partition(":"))
        if not colon or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UsageError("classifier_header: expected 'Name: value', such as 'Authorization: Bearer $TOKEN'")
        if not VARIABLE.search(value):
            raise UsageError(
                f"classifier_header: {name} has to come from a variable of the environment: '{name}: $VARIABLE'"
            )
        found[name] = value
    return found


def _expand(text: str, *, in_query: bool = False) -> str:
    """A text with the values of its variables; in an address, + and / in them are no signs of its own.

    Raises:
        UsageError: one is not set.
    """

    def value(match: re.Match[str]) -> str:
        if not (found := os.environ.get(match[1], "").strip()):
            raise UsageError(f"classifier_header: the environment has no {match[1]}")
        if not found.isprintable() or not found.isascii():
            raise UsageError(f"classifier_header: {match[1]} holds what no header can")
        return quote(found, safe="") if in_query else found

    return VARIABLE.sub(value, text)


# Templates: {"request": JSON with a placeholder, "answer": path}

PLACEHOLDERS = ("$png", "$pixels", "$floats")


def _template(path: Path) -> tuple[dict[str, Any], bool]:
    """A template's request and answer, and whether its request holds several images."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"classifier_template: {path} cannot be read ({error})") from error
    if not isinstance(said, dict) or set(said) != {"request", "answer"} or not isinstance(said["answer"], str):
        raise UsageError(
            f'classifier_template: {path}: expected {{"request": {{... "$png" ...}}, "answer": "path.to[*].scores"}}'
        )
    count = json.dumps(said["request"]).count('"$')
    if not _holds(said["request"]) or count != 1:
        raise UsageError(f"classifier_template: {path}: its request needs one of {', '.join(PLACEHOLDERS)}, once")
    rest = STEP.sub("", said["answer"]).replace(".", "")
    if rest or said["answer"].count("[*]") > 1:
        raise UsageError(
            f"classifier_template: {path}: answer: expected a path such as outputs[0].data or predictions[*]"
        )
    many = _repeats(said["request"])
    if many and "[*]" not in said["answer"]:
        many = False  # one image a request, in a list of one
    return said, many


def _holds(part: Any) -> bool:
    """Whether a placeholder stands in a part of a request."""
    if isinstance(part, Mapping):
        return any(map(_holds, part.values()))
    return any(map(_holds, part)) if isinstance(part, list) else part in PLACEHOLDERS


def _repeats(part: Any) -> bool:
    """Whether a list of one image stands in it, which then holds as many as are asked about."""
    if isinstance(part, Mapping):
        return any(map(_repeats, part.values()))
    return isinstance(part, list) and ((len(part) == 1 and _holds(part[0])) or any(map(_repeats, part)))


def fill(request: Any, images: Pixels, value: Callable[[str, Pixels], Any]) -> Any:
    """A request for images: the innermost list of one image is made one of all."""
    if isinstance(request, Mapping):
        return {key: fill(part, images, value) for key, part in request.items()}
    if isinstance(request, list):
        if len(request) == 1 and _holds(request[0]) and not _repeats(request[0]):
            return [fill(request[0], images[i : i + 1], value) for i in range(len(images))]
        return [fill(part, images, value) for part in request]
    return value(request[1:], images[0]) if request in PLACEHOLDERS else request


def find(said: Any, path: str, count: int) -> list[Any]:
    """The answers at a path of a response, one for each image.

    Raises:
        Unanswered: nothing stands there.
    """
    here, rest = [said], path
    several = False
    for name, index in STEP.findall(rest):
        try:
            if index == "*":
                (whole,) = here
                if not isinstance(whole, list):
                    raise TypeError
                here, several = whole, True
            else:
                here = [one[int(index) if index else name] for one in here]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Unanswered(f"answers without {path}") from error
    return here if several or count != 1 else [here[0]]
