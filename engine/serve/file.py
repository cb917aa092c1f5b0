"""The same routes for the whole run in one file: numpy, pillow and ONNX Runtime, no PyTorch."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from PIL import Image

from ..images.files import load_pixels
from ..labels import distinct_names
from ..portable.file import SALIENCY, CounterfactualFile, SaliencyFile
from ..portable.overlay import change
from .described import add_docs
from .guard import Keys, Limits, guarded
from .page import add_page
from .refusals import Draining, Full
from .routes import PROBLEMS, add_probes, add_problems, body_of, fields_of
from .telemetry import Metrics
from .wire import (
    CounterfactualRequest,
    Decoder,
    PredictionRequest,
    Problem,
    SaliencyRequest,
    in_header,
    prediction_of,
    to_base64,
    validated,
)

T = TypeVar("T")
OWN = ("speed", "mode", "budget_s", "saliency", "region", "config")  # of a request that the file decides


class FileWorker:
    """Runs one image after the other in a thread of its own; ONNX Runtime uses all cores.

    Args:
        file: a whole counterfactual; a saliency map's file beside it is served as well.
        max_queue: requests that may wait; one more is refused with `Full`.
    """

    def __init__(self, file: Path, max_queue: int = 64, threads: int | None = None) -> None:
        self.run = CounterfactualFile(file, threads)
        beside = file.with_name(SALIENCY)
        self.maps = SaliencyFile(beside, threads) if beside.exists() else None
        self.name, self.max_queue = file.stem, max_queue
        self.held = self.busy_slots = self.ticks = self.steps = self.places = 0
        self.rate = self.tick_s = 0.0
        self.largest = 1
        self.ready = self.draining = self.ended = False
        self._pool = ThreadPoolExecutor(1, "counterlens-file")
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Requests that do not run yet."""
        return self.held - self.busy_slots

    @property
    def accepting(self) -> bool:
        """Whether requests are taken."""
        return self.ready and not self.draining

    def start(self, warm: Callable[[], None] = lambda: None) -> Future[None]:
        """Run an image once, and be ready."""

        def first() -> None:
            warm()
            self.run.run(np.full((1, 3, self.run.image_size, self.run.image_size), 0.5, dtype=np.float32))
            self.ready = True

        return self._pool.submit(first)

    def check_room(self) -> None:
        """Refuse before anything costs time.

        Raises:
            Full, Draining: it is not taken.
        """
        if self.draining:
            raise Draining("server: it is being stopped; ask another one")
        if self.waiting >= self.max_queue:
            raise Full(self.waiting, 1 / self.rate if self.rate else 1.0)

    def submit(self, call: Callable[[], T], gone: threading.Event) -> Future[T]:
        """Run it when its turn comes, unless its caller is gone by then.

        Raises:
            Full, Draining: see `check_room`.
        """
        with self._lock:
            self.check_room()
            self.held += 1

        def run() -> T:
            try:
                if gone.is_set():
                    raise Problem(409, "request: the caller is gone")
                if self.ended:
                    raise Draining("server: it was stopped before this was done")
                self.busy_slots, began = 1, time.perf_counter()
                result = call()
                self.tick_s = time.perf_counter() - began
                self.rate = 1 / self.tick_s
                self.ticks, self.steps, self.places = self.ticks + 1, self.steps + 1, self.places + 1
                return result
            finally:
                with self._lock:
                    self.busy_slots, self.held = 0, self.held - 1

        return self._pool.submit(run)

    def stop(self, grace_s: float = 10.0) -> None:
        """Take nothing new, finish what there is within the grace period, and refuse the rest."""
        self.draining = True
        end = time.perf_counter() + grace_s
        while self.held and not self.ended and time.perf_counter() < end:
            time.sleep(0.01)
        self.hurry()
        self._pool.shutdown()

    @property
    def unfinished(self) -> int:
        """Requests that were taken and have no result yet."""
        return self.held

    def hurry(self) -> None:
        """End the grace period: what does not run yet is refused."""
        self.draining = self.ended = True


def png(pixels: NDArray[Any]) -> bytes:
    """[3, H, W] in [0, 1] as an 8-bit PNG file."""
    out = BytesIO()
    Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def make_file_app(
    worker: FileWorker, *, keys: Keys | None = None, limits: Limits | None = None, cors_origins: list[str] | None = None
) -> Any:
    """The server's ASGI application; see `app.make_app`."""
    limits, metrics = limits or Limits(), Metrics(worker)
    opened, labels, decoder = worker.run, distinct_names(worker.run.labels), Decoder(limits.pixels)
    app = FastAPI(
        title="counterlens", version="1", description="A whole run in one file.", docs_url=None, redoc_url=None
    )
    add_problems(app)
    add_docs(app)

    async def image(data: bytes) -> NDArray[np.float32]:
        def read(file: BytesIO) -> NDArray[np.float32]:
            pixels = load_pixels(file, opened.image_size, "image", fit=opened.fit)
            return pixels.transpose(2, 0, 1)[None]

        return await decoder.read(data, read)

    async def done(request: Request, call: Callable[[], T]) -> T:
        """What the worker makes of it; it is not begun once the caller is gone."""
        gone, began = threading.Event(), time.perf_counter()
        future = asyncio.wrap_future(worker.submit(call, gone))
        try:
            while not (await asyncio.wait({future}, timeout=0.25))[0]:
                if await request.is_disconnected():
                    raise Problem(409, "request: the caller is gone")
            metrics.explain.observe(time.perf_counter() - began)
            return future.result()
        finally:
            gone.set()

    @app.post("/v1/counterfactuals", openapi_extra=body_of(CounterfactualRequest), responses=PROBLEMS, tags=["explain"])
    async def counterfactual(request: Request) -> Response:
        """Change an image as little as needed for the model to say the target; `Accept: image/png`: the picture."""
        worker.check_room()
        fields, data = await fields_of(request)
        if given := [name for name in OWN if name in fields]:
            raise Problem(400, f"{given[0]}: the file has its own", given[0])
        accept, prefer = request.headers.get("accept", ""), request.headers.get("prefer", "")
        if "text/event-stream" in accept or "respond-async" in prefer:
            raise Problem(400, "prefer: a file's run has no steps to tell of; ask without", "prefer")
        asked = validated(CounterfactualRequest, fields)
        target = opened.target(asked.target)
        pixels, began = await image(data), time.perf_counter()
        made = await done(request, lambda: opened.run(pixels, target, asked.seed or 0))
        source, said, wanted = int(made.source[0]), int(made.prediction[0]), int(made.target[0])
        if made.errors[0] is not None and source != wanted:
            raise Problem(422, made.errors[0])
        answer = {"source": labels[source], "target": labels[wanted], "total_s": round(time.perf_counter() - began, 4)}
        if made.errors[0] is not None:
            return JSONResponse({"status": "skipped", "error": made.errors[0], **answer})
        after = made.counterfactual[0]
        if "image/png" in accept:
            headers = {"X-Prediction": in_header(labels[said]), "X-Flipped": str(said == wanted).lower()}
            return Response(png(after), 200, headers, "image/png")
        return JSONResponse({
            "status": "done", **answer, "prediction": labels[said],
            "indices": {"source": source, "target": wanted, "prediction": said},
            "shares": [round(p, 6) for p in made.probabilities[0].tolist()],
            "confidence": round(float(made.probabilities[0, said]), 6),
            "target_confidence": round(float(made.probabilities[0, wanted]), 6), "flipped": said == wanted,
            "l1": round(float(made.l1[0]), 6), "seed": asked.seed or 0, "image": to_base64(png(after)),
            "change": to_base64(png(change(pixels[0], after))), "settings": opened.card["settings"],
            "runtime": "onnxruntime", "weights": opened.card["weights"],
        })  # fmt: skip

    @app.post("/v1/predictions", openapi_extra=body_of(PredictionRequest), responses=PROBLEMS, tags=["explain"])
    async def prediction(request: Request) -> Response:
        """What the model says of an image; with a saliency map's file beside, without the counterfactual's cost."""
        worker.check_room()
        fields, data = await fields_of(request)
        validated(PredictionRequest, fields)
        pixels = await image(data)
        p = await done(request, lambda: probabilities(worker, pixels))
        if not np.isfinite(p).all():
            raise Problem(422, "classifier: NaN or infinity for this image")
        return JSONResponse(prediction_of(labels, p.tolist()))

    @app.post("/v1/saliency", openapi_extra=body_of(SaliencyRequest), responses=PROBLEMS, tags=["explain"])
    async def saliency(request: Request) -> Response:
        """Where the evidence for a label is, and how good that answer is (MSI)."""
        maps = worker.maps
        if maps is None:
            raise Problem(
                422, f"saliency: no {SALIENCY} lies beside the file; counterlens export --what saliency makes one"
            )
        fields, data = await fields_of(request)
        if given := [name for name in ("method", "quantity") if name in fields]:
            raise Problem(400, f"{given[0]}: the file has its own", given[0])
        asked = validated(SaliencyRequest, fields)
        target = maps.target(maps.default if asked.target is None else asked.target)
        pixels = await image(data)
        made = await done(request, lambda: maps.run(pixels, target))
        if made.errors[0] is not None:
            raise Problem(422, made.errors[0])
        return JSONResponse({
            "status": "done", "method": maps.card["method"], "prediction": labels[int(made.prediction[0])],
            "target": labels[int(made.target[0])], "probability": round(float(made.probability[0]), 6),
            **{name: round(float(value[0]), 6) for name, value in made.numbers.items()},
            "thresholds": maps.card["thresholds"],
            **{name: [round(v, 6) for v in curve[0].tolist()] for name, curve in made.curves.items()},
            "map": to_base64(png(np.repeat(made.saliency[0][None], 3, 0))),
        })  # fmt: skip

    @app.get("/v1/models", tags=["server"])
    async def models() -> dict[str, Any]:
        """What is served."""
        methods = ["lax"] if worker.maps else []
        offered = {
            "methods": methods,
            "usable_methods": methods,
            "speeds": [],
            "modes": [],
            "kept_s": 0,
            "streams": False,
        }
        facts = {"image_size": opened.image_size, "fit": opened.fit, "labels": labels, "sha256": opened.card["sha256"]}
        return {"models": [{"name": worker.name, **facts, **offered}]}

    @app.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "alive"}

    add_probes(app, worker, metrics)
    keys = keys or Keys(None)
    add_page(app, samples(opened), asks_for_keys=bool(keys.keys))
    return guarded(app, keys, limits, metrics, cors_origins)


def samples(opened: CounterfactualFile) -> list[dict[str, str]]:
    """Those of the offline page, which lie in the file's card where it was exported with one."""
    shape = (opened.image_size, opened.image_size, 3)
    held = opened.card.get("page", {}).get("samples", [])
    pictures = [np.frombuffer(base64.b64decode(one["pixels"]), dtype=np.uint8).reshape(shape) for one in held]
    return [
        {"name": one["name"], "image": to_base64(png(pixels.transpose(2, 0, 1) / 255))}
        for one, pixels in zip(held, pictures, strict=True)
    ]


def probabilities(worker: FileWorker, pixels: NDArray[np.float32]) -> NDArray[Any]:
    """[labels], from the smallest file that has them."""
    if worker.maps is None:
        return worker.run.run(pixels).source_probabilities[0]
    logits = worker.maps.run(pixels).logits[0]
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
