"""The HTTP interface: counterfactuals, saliency and predictions, as one answer, as a stream, or later."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from ..core.core import EngineCore
from ..core.result import Counterfactual
from ..errors import CounterlensError
from ..saliency.lax import LAX
from ..saliency.table import METHODS
from .described import add_docs
from .guard import Keys, Limits, guarded, own_name
from .kserve import add_routes
from .offered import facts, samples
from .page import add_page
from .routes import PROBLEMS, add_probes, add_problems, body_of, fields_of
from .server import Server, Shares
from .sizing import Fit
from .tasks import LAST, Event, Tasks
from .telemetry import Metrics
from .wire import (
    CounterfactualRequest,
    PredictionRequest,
    Problem,
    SaliencyRequest,
    config_of,
    in_header,
    png,
    prediction_of,
    problem_of,
    to_base64,
    validated,
)
from .worker import Ticket, Worker


async def finish(server: Server, name: str, ticket: Ticket[Counterfactual], saliency: bool) -> None:
    """Wait for a task's result and tell it as its last event."""
    try:
        with server.worker.holding():
            result = await asyncio.wrap_future(ticket.future)
            answered = await server.answer(result, ticket, saliency)
            # Whoever comes back may not have the image any more.
            server.tasks.say(name, "result", answered | {"input": to_base64(png(result.input))})
    except CounterlensError as error:
        server.tasks.say(name, "error", problem_of(error).body())


async def stream(server: Server, name: str) -> AsyncIterator[bytes]:
    """A task's events as server-sent events, from the first to the last."""
    told = 0
    while True:
        events = await server.tasks.events(name, told, wait_s=10)
        if events is None:  # deleted meanwhile
            events = [("error", Problem(409, "request: cancelled").body())]
        for kind, data in events:
            yield f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
            if kind in LAST:
                return
        told += len(events)
        if not events:
            yield b": still here\n\n"  # proxies close what is silent


def make_app(
    engine: EngineCore,
    worker: Worker,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    cors_origins: list[str] | None = None,
    tasks: Tasks | None = None,
    metrics: Metrics | None = None,
    measured: Fit | None = None,
    adapter: LAX | None = None,
) -> Any:
    """The server's ASGI application.

    Args:
        engine, worker: of one another.
        keys: who is let in; everybody without.
        limits: of one request.
        cors_origins: pages of these origins may ask.
        tasks: where what callers come back for is kept; in this process without it.
        metrics: of the worker.
        measured: what `sizing.fit` found, for `/v1/models`.
        adapter: of `lax`; the pack's without it.
    """
    limits = limits or Limits()
    metrics = metrics or Metrics(worker)
    server = Server(engine, worker, metrics, limits, tasks, adapter)
    app = FastAPI(
        title="counterlens", version="1", description="Explanations of one classifier.", docs_url=None, redoc_url=None
    )
    if server.box is not None:
        metrics.count_queries(server.box)
    running: set[asyncio.Task[None]] = set()
    offered = facts(engine, adapter)

    add_problems(app)
    add_docs(app)

    @app.post("/v1/counterfactuals", openapi_extra=body_of(CounterfactualRequest), responses=PROBLEMS, tags=["explain"])
    async def counterfactual(request: Request) -> Response:
        """Change an image as little as needed for the model to say the target.

        `Accept: image/png` gives the picture alone, `text/event-stream` its steps and then the result,
        `Prefer: respond-async` a `Location` to come back to.
        """
        worker.check_room()
        fields, data = await fields_of(request)
        asked = validated(CounterfactualRequest, fields)
        if asked.saliency:
            server.check_map("saliency")
        image, region = await server.pictured(data, config_of(asked, engine.config), asked.region)
        accept, prefer = request.headers.get("accept", ""), request.headers.get("prefer", "")
        streams = "text/event-stream" in accept
        if not streams and "respond-async" not in prefer:
            with worker.holding():
                ticket = server.submit(image, asked, region, None)
                result = await server.wait(request, ticket)
                answered = await server.answer(result, ticket, asked.saliency)
            if "image/png" in accept and result.error is None:
                shown = in_header(answered["prediction"])
                said = {"X-Prediction": shown, "X-Flipped": str(answered["flipped"]).lower()}
                return Response(png(result.image), 200, said, "image/png")
            return JSONResponse(answered)
        name = own_name(request.scope)

        def tell(at: dict[str, int], preview: Tensor | None, shares: Shares | None) -> None:
            data: dict[str, Any] = {**at}
            if preview is not None:
                data["image"] = to_base64(png(preview))
            if shares is not None:
                data["source_confidence"], data["target_confidence"] = (round(p, 6) for p in shares)
            server.tasks.say(name, "progress", data)

        # Steps are told in this event loop, and so not before the task is there.
        ticket = server.submit(image, asked, region, tell)
        await server.keep(name, ticket)
        waiting = asyncio.create_task(finish(server, name, ticket, asked.saliency))
        running.add(waiting)
        waiting.add_done_callback(running.discard)
        if not streams:
            release = request.scope["hold_key"]()
            waiting.add_done_callback(lambda _: release())
        where = {"Location": f"/v1/counterfactuals/{name}"}
        if not streams:
            return JSONResponse({"id": name, "status": "accepted", **where}, 202, where)

        async def watched() -> AsyncIterator[bytes]:
            try:
                async for event in stream(server, name):
                    yield event
            finally:
                if not ticket.future.done():
                    worker.cancel(ticket)

        return StreamingResponse(watched(), 200, where | {"Cache-Control": "no-store"}, "text/event-stream")

    @app.get(
        "/v1/counterfactuals/{name}", responses={404: {"description": "None, or none any more."}}, tags=["explain"]
    )
    async def fetch(name: str, request: Request) -> Response:
        """The result if it is there (200), else how far it is (202); `text/event-stream` streams it."""
        events = await server.events(request, name)
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(stream(server, name), 200, {"Cache-Control": "no-store"}, "text/event-stream")
        start: Event = ("progress", {"step": 0, "total": 0})
        kind, data = events[-1] if events else start
        if kind == "error":
            raise Problem(data["status"], data["detail"], data.get("field"))
        if kind == "result":
            return JSONResponse(data)
        tried = {"attempt": data["attempt"]} if "attempt" in data else {}
        return JSONResponse({"status": "running", "step": data["step"], "total": data["total"], **tried}, 202)

    @app.delete("/v1/counterfactuals/{name}", status_code=204, tags=["explain"])
    async def forget(name: str, request: Request) -> Response:
        """Cancel it if it runs, and forget it."""
        await server.events(request, name)
        await server.tasks.forget(name)
        return Response(status_code=204)

    @app.post("/v1/saliency", openapi_extra=body_of(SaliencyRequest), responses=PROBLEMS, tags=["explain"])
    async def saliency(request: Request) -> Response:
        """Where the evidence for a label is, and how good that answer is (MSI)."""
        fields, data = await fields_of(request)
        asked = validated(SaliencyRequest, fields)
        return JSONResponse(await server.saliency(await server.image(data), asked, request))

    @app.post("/v1/predictions", openapi_extra=body_of(PredictionRequest), responses=PROBLEMS, tags=["explain"])
    async def prediction(request: Request) -> Response:
        """What the model says of an image."""
        fields, data = await fields_of(request)
        validated(PredictionRequest, fields)
        image = await server.image(data)
        p = await server.probabilities(image[None], request)
        return JSONResponse(prediction_of(engine.labels, p[0].tolist()))

    @app.get("/v1/models", tags=["server"])
    async def models() -> dict[str, Any]:
        """What is served."""
        slots = [s for s in engine.slots if s <= worker.largest]
        memory = None if measured is None else measured.record()
        shape = {"image_size": engine.image_size, "labels": engine.labels, "slots": slots, "memory": memory}
        queries = {} if server.box is None else {"queries": await asyncio.to_thread(server.box.record)}
        return {"models": [{"name": server.name, **engine.names, **shape, "speeds": sorted(engine.speeds),
                            "methods": list(METHODS), **offered, **queries}]}  # fmt: skip

    @app.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str]:
        """Whether the process lives, and the thread that owns the models: one that is not is to be started again."""
        if worker.failed:
            raise Problem(503, "server: the models' thread has ended")
        return {"status": "alive"}

    add_probes(app, worker, metrics)

    add_routes(app, server)
    keys = keys or Keys(None)
    add_page(app, samples(engine), asks_for_keys=bool(keys.keys))
    return guarded(app, keys, limits, metrics, cors_origins)
