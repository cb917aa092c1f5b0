"""What the routes share: the worker, decoding beside the event loop, answers, and tasks that callers come back for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from torch import Tensor

from ..blackbox.reading import NoAnswer
from ..config import Config
from ..core.core import EngineCore
from ..core.result import Counterfactual
from ..errors import NotFinite
from ..guidance.region import Region
from ..metrics.msi_score import MSI
from ..metrics.quantities import make_quantity
from ..saliency.explain import Explanations, explain_by
from ..saliency.lax import LAX
from ..saliency.table import METHODS
from .guard import Limits, is_own
from .offered import usable_methods
from .tasks import KEPT, KEPT_S, Event, Tasks
from .telemetry import Metrics
from .tracing import past_spans
from .wire import (
    CounterfactualRequest,
    Decoder,
    Problem,
    SaliencyRequest,
    answer_of,
    config_of,
    png,
    region_of,
    to_base64,
)
from .worker import Ticket, Worker

T = TypeVar("T")
Shares = tuple[float, float]  # see `Ticket.shares`
MAPS = 4  # of a black box that are made at once, with thousands of images each


async def _gone(request: Request) -> None:
    """Returns once the caller is gone; told by the connection, because asking for it costs more than all else."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, future: asyncio.Future[T]) -> T:
    gone = asyncio.ensure_future(_gone(request))
    either: set[asyncio.Future[Any]] = {future, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise Problem(409, "request: the caller is gone")
        return future.result()
    finally:
        gone.cancel()
        if not future.done():
            future.cancel()


def area_curves(scores: MSI) -> dict[str, list[float]]:
    """Of one map: the explained quantity with the most salient `areas` of the pixels alone, and with all but these."""
    of = scores.area_curves
    assert of is not None
    assert of.keep is not None
    assert of.remove is not None
    named = {"areas": of.areas, "keep_area": of.keep, "remove_area": of.remove}
    return {name: [round(v, 6) for v in rows[0].tolist()] for name, rows in named.items()}


class Server:
    """What the routes share."""

    def __init__(
        self, engine: EngineCore, worker: Worker, metrics: Metrics, limits: Limits, tasks: Tasks | None = None,
        adapter: LAX | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.worker, self.metrics, self.limits = engine, worker, metrics, limits
        self.tasks = tasks or Tasks()
        self.decoder = Decoder(limits.pixels)
        self.box, self.adapter, self.usable = worker.box, adapter, usable_methods(engine, adapter)
        self._maps = threading.BoundedSemaphore(MAPS)
        self.name = engine.names.get("pack") or Path(engine.names.get("model", "model")).name

    async def pictured(self, data: bytes, config: Config, region: str | None = None) -> tuple[Tensor, Region | None]:
        """An uploaded image, decoded beside the event loop, and where it may change; see `wire.region_of`."""

        def read(file: BytesIO) -> tuple[Tensor, Region | None]:
            photo = self.engine.read(file, "image", config, own=False)
            return photo.image, None if region is None else region_of(region, photo.frame)

        return await self.decoder.read(data, read)

    async def image(self, data: bytes) -> Tensor:
        """An uploaded image of the model's own size.

        Raises:
            Problem: 422, the server's `fit` is native, and that leaves it another size.
        """
        size = self.engine.image_size
        image, _ = await self.pictured(data, self.engine.config)
        if image.shape[-2:] != (size, size):
            raise Problem(
                422, f"image: {image.shape[-1]}x{image.shape[-2]} pixels under fit {self.engine.config.fit}, which is "
                f"for /v1/counterfactuals; here it takes {size}x{size}", "image",
            )  # fmt: skip
        return image

    async def call(self, run: Callable[[], T], request: Request | None = None) -> T:
        """Something short that needs the models, unless a request's caller is gone; else see `Worker.holding`."""
        future = asyncio.wrap_future(self.worker.call(run, held=request is None))
        return await future if request is None else await _unless_gone(request, future)

    def submit(
        self,
        image: Tensor,
        asked: CounterfactualRequest,
        region: Region | None,
        on_step: Callable[[dict[str, int], Tensor | None, Shares | None], None] | None,
    ) -> Ticket[Counterfactual]:
        """Put a counterfactual into the worker's queue; `on_step` is told in the event loop."""
        loop = asyncio.get_running_loop()

        def stepped(ticket: Ticket[Counterfactual], preview: Tensor | None) -> None:
            if on_step is not None:
                tried = {"attempt": ticket.attempt} if ticket.attempt else {}
                at = {"step": ticket.step, "total": ticket.total, **tried}
                loop.call_soon_threadsafe(on_step, at, preview, ticket.shares)

        return self.worker.submit(
            image, asked.target, config_of(asked, self.engine.config), budget_s=asked.budget_s, region=region,
            on_step=stepped if on_step else None, preview=on_step is not None and asked.preview,
        )  # fmt: skip

    async def wait(self, request: Request, ticket: Ticket[T]) -> T:
        """The ticket's result; it is cancelled once the caller is gone."""
        try:
            return await _unless_gone(request, asyncio.wrap_future(ticket.future))
        finally:
            if not ticket.future.done():
                self.worker.cancel(ticket)

    async def answer(self, result: Counterfactual, ticket: Ticket[Counterfactual], saliency: bool) -> dict[str, Any]:
        """The result as JSON, with the saliency of its input where that was asked for."""
        self.metrics.answered(ticket)
        total = ticket.finished - ticket.arrived
        self.metrics.explain.observe(total)
        began = time.perf_counter()
        body = await asyncio.to_thread(answer_of, result, ticket.slots, ticket.started - ticket.arrived, total)
        past_spans([("encode", began, time.perf_counter())], {})
        if saliency:
            body["saliency"] = await self.saliency(result.input, SaliencyRequest(image="", target=result.source))
        return body

    def check_map(self, field: str) -> None:
        """Refuse a map beside something that costs more, before that is made.

        Raises:
            Problem: 400, there is none by default.
        """
        if (wanted := SaliencyRequest(image="").method) not in self.usable:
            raise Problem(
                400, f"{field}: by {wanted}, for which this server has no adapter (--adapter FOLDER); /v1/saliency has "
                f"others: {', '.join(self.usable)}", field,
            )  # fmt: skip

    async def probabilities(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        request: Request | None = None,
    ) -> Tensor:
        """What the model says of images: [B, labels]; see `call`.

        Raises:
            Problem: 422, NaN or infinity. NoAnswer: a black box says nothing of one.
        """
        p = await self.call(lambda: self.engine.probabilities(images), request)
        if not (there := p.isfinite().all(1)).all():
            place = int((~there).nonzero()[0])
            which = "this image" if len(images) == 1 else f"image {place}"
            if self.box is not None:
                raise NoAnswer(f"classifier: it gives no answer for {which} ({self.box.why(images[place])})")
            raise Problem(422, f"classifier: NaN or infinity for {which}")
        return p

    async def maps(self, images: Tensor, request: Request | None = None, **options: Any) -> Explanations:
        """Saliency of images, see `explain_by` and `call`; a black box is asked no more once the caller is gone.

        Raises:
            NoAnswer: a black box says nothing of one of those that it is asked about.
        """
        if self.box is None:
            return await self.call(lambda: explain_by(self.engine, images, adapter=self.adapter, **options), request)
        box, left = self.box, threading.Event()

        def explained() -> Explanations:
            with self._maps, box.unless(left):
                return explain_by(self.engine, images, adapter=self.adapter, **options)

        try:
            return await self.call(explained, request)
        except NotFinite as error:
            raise NoAnswer(f"classifier: it gives no answer ({box.why() or error})") from error
        finally:
            left.set()

    async def saliency(self, image: Tensor, asked: SaliencyRequest, request: Request | None = None) -> dict[str, Any]:
        """A saliency map with MSI and its curve; see `call`."""
        by_adapter = asked.method in METHODS and METHODS[asked.method].adapter
        if self.engine.box is not None and by_adapter:
            self.check_map("method")  # no pack has adapters of a surrogate
        if self.adapter is not None and by_adapter:
            explained = self.adapter.quantity.name
            if make_quantity(self.engine.classifier, asked.quantity).name != explained:
                raise Problem(400, f"quantity: this server's adapter explains {explained}", "quantity")
        options = {"explained": asked.target, "method": asked.method, "quantity": asked.quantity}
        made = await self.maps(image[None], request, **options)
        shown = to_base64(await asyncio.to_thread(png, made.saliency[0]))
        return made.record(0) | area_curves(made.msi) | {"map": shown}

    async def keep(self, name: str, ticket: Ticket[Counterfactual]) -> None:
        """Keep a task for a caller that comes back.

        Raises:
            Problem: 429, too many run.
        """
        if not await self.tasks.open(name, lambda: self.worker.cancel(ticket)):
            self.worker.cancel(ticket)
            raise Problem(429, f"tasks: {KEPT} run already", None, {"Retry-After": "5"})

    async def events(self, request: Request, name: str) -> list[Event]:
        """What has been told of a task of the request's key so far.

        Raises:
            Problem: 404.
        """
        events = await self.tasks.events(name, 0, wait_s=0) if is_own(request.scope, name) else None
        if events is None:
            raise Problem(404, f"counterfactual: there is none of this name, or none any more ({KEPT_S:.0f} s)")
        return events
