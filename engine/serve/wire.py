"""What travels: images as PNG and base64, requests as pydantic models, errors as problem details (RFC 9457)."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..blackbox.asking import BudgetSpent
from ..blackbox.reading import NoAnswer, Unusable
from ..config import Config
from ..errors import CounterlensError, UsageError
from ..images.files import MAX_PIXELS, decoding, formats_of, to_uint8
from ..images.masks import AUTO, box_mask, fitted, framed, parse_box, read_mask
from .refusals import Cancelled, Draining, Exhausted, Full, Late

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.result import Counterfactual
    from ..guidance.region import Region
    from ..images.fitting import Frame

T = TypeVar("T")
LARGE = 4_000_000  # pixels of an image
MAX_DEPTH = 32  # of a JSON body
# A string that does not end is taken whole too: looking for its end from every quote in it would take minutes.
STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
# An empty list is 2 bytes in a body and 64 in memory, and reading it holds everybody else up.
MAX_NESTED = 200_000
OPENS, NO_BRACKETS = ord("["), bytes(set(range(256)) - set(b"[]{}"))
ROUND = bytes.maketrans(b"{}", b"[]")
OF_THE_SERVER = (
    "pack",
    "classifier",
    "mode",
    "speed",
    "seed",
    "region",
    "count",
)  # fields of Config that a request's `config` has not


class Problem(CounterlensError):
    """An answer that is an error, with its HTTP status."""

    def __init__(self, status: int, detail: str, field: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.field, self.headers = status, detail, field, headers or {}

    def body(self, path: str = "") -> dict[str, Any]:
        """As RFC 9457 has it; below /v2 also with the `error` that the Open Inference Protocol asks for."""
        titles = {
            400: "Bad request", 401: "Unauthorised", 404: "Not found", 405: "Method not allowed", 408: "Too slow",
            409: "Conflict", 413: "Too large", 415: "Unsupported media type", 422: "Cannot be explained",
            429: "Too many requests", 500: "Internal error", 502: "No answer of the black box", 503: "Unavailable",
            504: "Too late",
        }  # fmt: skip
        named = {} if self.field is None else {"field": self.field}
        named |= {"error": self.detail} if path.startswith("/v2/") else {}
        return {"type": "about:blank", "title": titles.get(self.status, "Error"), "status": self.status,
                "detail": self.detail, **named}  # fmt: skip


def problem_of(error: Exception) -> Problem:
    """What an exception of ours is over HTTP."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Full):
        return Problem(429, str(error), headers={"Retry-After": str(max(1, round(error.retry_after)))})
    if isinstance(error, Draining | Exhausted):
        return Problem(503, str(error), headers={"Retry-After": "5" if isinstance(error, Draining) else "1"})
    if isinstance(error, BudgetSpent):  # no Retry-After: another time gives the same
        return Problem(503, str(error), "classifier")
    if isinstance(error, NoAnswer | Unusable):
        return Problem(502, str(error), "classifier")
    if isinstance(error, Late):
        return Problem(504, str(error), "budget_s")
    if isinstance(error, Cancelled):
        return Problem(409, str(error))
    field, _, _ = str(error).partition(":")
    return Problem(400 if isinstance(error, UsageError) else 422, str(error), field if field.isidentifier() else None)


class Asked(BaseModel):
    """Fields that all requests about one image share."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="The file's bytes in base64 (PNG, JPEG, WebP, ...); a data: URL works too.")


class CounterfactualRequest(Asked):
    """What would have to change for the model to say the target."""

    target: str | int = Field("runner-up", description="Label, its index, runner-up, opposite or neighbour.")
    speed: str | None = Field(None, description="exact, balanced, fast or turbo.")
    mode: str | None = Field(None, description="official, realistic or audit.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Of the noise, combined with the image's own pixels.")
    region: str | None = Field(
        None,
        description="Where alone it may change: auto, a box x,y,w,h in the file's pixels, or a mask's file in base64, "
        "white where it may, of the file's size or the model's.",
    )
    budget_s: float | None = Field(None, gt=0, le=3600, description="Seconds from arrival; what there is then comes.")
    saliency: bool = Field(False, description="Also where the evidence for the prediction is.")
    preview: bool = Field(True, description="Of a stream: the picture after every step.")
    config: dict[str, Any] = Field(default_factory=dict, description="Single settings: strength, class_scale, ...")


class SaliencyRequest(Asked):
    """Where the evidence is."""

    target: str | int | None = Field(None, description="Label to explain; the prediction without it.")
    method: str = Field("lax", description="A saliency method, see /v1/models.")
    quantity: str = Field("class", description="class, or groups of labels such as 0,1,2,3,4/5,6,7,8,9.")


class PredictionRequest(Asked):
    """What the model says."""


def parse_json(body: bytes) -> Any:
    """A JSON body that is not nested deeper than `MAX_DEPTH`, nor in more than `MAX_NESTED` lists and objects.

    Raises:
        Problem: 400 or 413, it is none, too deep, or too much.
    """
    brackets = STRINGS.sub(b"", body).translate(ROUND, delete=NO_BRACKETS)
    if len(brackets) > 2 * MAX_NESTED:
        raise Problem(413, f"body: more than {MAX_NESTED} lists and objects in it", "body")
    depth = 0
    for byte in brackets:
        depth += 1 if byte == OPENS else -1
        if depth > MAX_DEPTH:
            raise Problem(400, f"body: JSON is nested deeper than {MAX_DEPTH}", "body")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"body: not JSON ({str(error)[:100]})", "body") from error


def validated(model: type[BaseModel], fields: Any) -> Any:
    """A request's fields, checked.

    Raises:
        Problem: 400, naming the first field that does not fit.
    """
    if not isinstance(fields, dict):
        raise Problem(400, "body: expected a JSON object", "body")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        raise Problem(400, f"{field}: {first['msg']}", field) from error


def from_base64(text: str, field: str = "image") -> bytes:
    """Bytes of base64 text, with or without a data: URL before it."""
    payload = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(400, f"{field}: not base64 ({error})", field) from error


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def in_header(label: str) -> str:
    """A label as a header may hold it: percent-encoded where it has more than letters of ASCII, digits and spaces."""
    return quote(label, safe=" /:;,()@+=!*'")


def checked(data: bytes, max_pixels: int, field: str = "image") -> tuple[BytesIO, int]:
    """An uploaded file whose size is that of an image that may be decoded, and its pixels.

    Raises:
        Problem: 413, more pixels than allowed. CounterlensError: no image.
    """
    file = BytesIO(data)
    if not data:
        raise Problem(400, f"{field}: an empty file", field)
    with decoding(field), Image.open(file, formats=formats_of(file)) as opened:
        pixels = opened.width * opened.height
    if pixels > max_pixels:
        raise Problem(413, f"{field}: {pixels / 1e6:.1f} megapixels, more than {max_pixels / 1e6:.1f}", field)
    file.seek(0)
    return file, pixels


def region_of(text: str, made: Frame) -> Region:
    """Where an uploaded image may change: `auto`, or a mask [H, W] bool; `made` says what the image shows of its file.

    Raises:
        Problem, CounterlensError: it is neither auto, nor a box in the file, nor a mask's file that fits.
    """
    import torch

    if text == AUTO:
        return "auto"
    if (box := parse_box(text)) is not None:
        return torch.from_numpy(framed(box_mask(box, made.picture), made, "region"))
    file, pixels = checked(from_base64(text, "region"), MAX_PIXELS, "region")
    if pixels > max(math.prod(made.picture), math.prod(made.size)):  # it would be decoded for nothing
        width, height = made.picture
        raise Problem(422, f"region: a mask of {pixels} pixels, and the image has {width}x{height}", "region")
    return torch.from_numpy(fitted(read_mask(file, "region"), made, "region"))


class Decoder:
    """Reads uploads beside the event loop; large ones one after the other: each takes memory for all its pixels.

    Args:
        max_pixels: of one image.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels, self.large = max_pixels, asyncio.Lock()

    async def read(self, data: bytes, decode: Callable[[BytesIO], T]) -> T:
        """What `decode` makes of the file.

        Raises:
            Problem, CounterlensError: see `checked`.
        """
        file, pixels = await asyncio.to_thread(checked, data, self.max_pixels)
        if pixels <= LARGE:
            return await asyncio.to_thread(decode, file)
        async with self.large:
            return await asyncio.to_thread(decode, file)


def png(
    image: Tensor,  # [3, H, W] or [H, W] in [0, 1]
) -> bytes:
    """The image as an 8-bit PNG file."""
    out = BytesIO()
    pixels = to_uint8(image if image.ndim == 3 else image[None].expand(3, -1, -1)).cpu().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def signed_change(before: Tensor, after: Tensor) -> Tensor:
    """What became brighter (red) and darker (blue), on white: [3, H, W] in [0, 1]."""
    change = (after - before).mean(0)
    strong = change.abs() / change.abs().max().clamp(min=1e-6)
    up, down = (change > 0) * strong, (change < 0) * strong
    return (
        1
        - (up[None] * up.new_tensor([0.2, 0.8, 0.9])[:, None, None])
        - (down[None] * down.new_tensor([0.9, 0.6, 0.1])[:, None, None])
    )


def prediction_of(
    labels: Sequence[str],
    probabilities: Sequence[float],  # of each label
) -> dict[str, Any]:
    """What a model says of an image: of each label by its name, and by its index, since names may repeat."""
    shares = [round(p, 6) for p in probabilities]
    best = max(range(len(labels)), key=probabilities.__getitem__)
    named = dict(zip(labels, shares, strict=True))
    return {"prediction": labels[best], "index": best, "probabilities": named, "shares": shares}


def config_of(asked: CounterfactualRequest, default: Config) -> Config:
    """The config of a request: the server's own where it says nothing.

    Raises:
        UsageError: a field does not fit.
    """
    if wrong := [name for name in asked.config if name in OF_THE_SERVER]:
        raise UsageError(f"config: {wrong[0]} is a field of the request itself, or the server's")
    said = {name: getattr(default, name) for name in default.model_fields_set}
    given = {"speed": asked.speed, "mode": asked.mode, "seed": asked.seed, **asked.config}
    return Config.make(**said | {name: value for name, value in given.items() if value is not None})


def answer_of(result: Counterfactual, slots: int, waited_s: float, total_s: float) -> dict[str, Any]:
    """A counterfactual as JSON: the record, the image, its change, and how long it took.

    Raises:
        Problem: 422, there is none; the detail says why.
    """
    if result.status == "failed":
        raise Problem(422, str(result.error))
    judged = {"confirmed": result.flipped} if result.student else {}
    record = result.record() | judged | {"slots": slots, "waited_s": round(waited_s, 4), "total_s": round(total_s, 4)}
    if result.error is not None:
        return record
    after = result.image.mul(255).round().div(255)
    return record | {
        "indices": {"source": result.source, "target": result.target, "prediction": result.prediction},
        "image": to_base64(png(result.image)),
        "change": to_base64(png(signed_change(result.input, after))),
        "settings": result.provenance["settings"],
        "runtime": result.provenance["runtime"],
        "weights": result.provenance["weights"],
    }
