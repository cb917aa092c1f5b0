"""KServe's protocols: the Open Inference Protocol (v2, JSON and binary tensors), and v1's predict and explain."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from ..config import Config
from ..core.result import Counterfactual
from ..errors import CounterlensError
from ..images.files import as_saved
from .server import Server
from .wire import Problem, from_base64, parse_json, png, problem_of, to_base64
from .worker import Ticket

HEADER = "inference-header-content-length"
DTYPES = {"FP32": np.float32, "INT64": np.int64, "INT32": np.int32, "FP64": np.float64, "BOOL": np.bool_}
MAX_BATCH = 64
DEFAULT_OUTPUTS = ("counterfactual", "prediction", "probabilities", "flipped")
OUTPUTS = (*DEFAULT_OUTPUTS, "source", "l1", "saliency")


def parameters_of(said: dict[str, Any], name: str = "parameters") -> dict[str, Any]:
    """The parameters of a request, or of an input or output of this name.

    Raises:
        Problem: 400, they are no object.
    """
    parameters = said.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Problem(400, f"{name}: expected parameters as an object", name)
    return parameters


def tensor_of(given: dict[str, Any], blob: memoryview) -> tuple[Any, int]:
    """An input's array, or list of texts for BYTES, and how many bytes of the blob it took.

    Raises:
        Problem: 400, naming the input.
    """
    name, kind, shape = str(given.get("name")), given.get("datatype"), given.get("shape")
    if not isinstance(shape, list) or len(shape) > 8 or not all(isinstance(n, int) and 0 <= n <= 2**24 for n in shape):
        raise Problem(400, f"{name}: shape: expected at most 8 whole numbers, got {str(shape)[:60]}", name)
    count = math.prod(shape)
    size = parameters_of(given, name).get("binary_data_size")
    if size is not None and (not isinstance(size, int) or size < 0 or size > len(blob)):
        raise Problem(400, f"{name}: binary_data_size: {str(size)[:20]} bytes were said, {len(blob)} are there", name)
    if kind == "BYTES":
        if size is None:
            texts = [str(x) for x in np.asarray(given.get("data", []), dtype=object).reshape(-1)]
        else:
            texts, at = [], 0
            while at < size:
                length = struct.unpack_from("<I", blob, at)[0] if at + 4 <= size else size
                if at + 4 + length > size:
                    raise Problem(400, f"{name}: a text of {length} bytes goes beyond the {size} of the input", name)
                texts.append(bytes(blob[at + 4 : at + 4 + length]).decode(errors="replace"))
                at += 4 + length
        if len(texts) != count:
            raise Problem(400, f"{name}: shape {shape} needs {count} values, got {len(texts)}", name)
        return texts, size or 0
    if kind not in DTYPES:
        raise Problem(400, f"{name}: datatype: expected {', '.join(DTYPES)} or BYTES, got {str(kind)[:20]}", name)
    array: np.ndarray
    try:
        if size is None:
            array = np.asarray(given.get("data"), dtype=DTYPES[kind]).reshape(shape)
        else:
            array = np.frombuffer(blob[:size], dtype=DTYPES[kind]).reshape(shape).copy()
    except (ValueError, TypeError, OverflowError) as error:
        raise Problem(400, f"{name}: does not fit shape {shape} of {kind} ({str(error)[:100]})", name) from error
    return array, size or 0


def read_inference(body: bytes, header_length: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the request's JSON, its inputs by name)."""
    length = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > len(body):
            raise Problem(400, f"{HEADER}: expected at most {len(body)}, got {header_length[:20]!r}", HEADER)
        length = int(header_length)
    asked, blob = parse_json(body[:length]), memoryview(body)[length:]
    inputs = asked.get("inputs") if isinstance(asked, dict) else None
    if not isinstance(inputs, list) or not all(isinstance(i, dict) for i in inputs):
        raise Problem(400, "inputs: expected a list of tensors", "inputs")
    found = {}
    for given in inputs:
        found[str(given.get("name"))], used = tensor_of(given, blob)
        blob = blob[used:]
    return asked, found


def images_of(inputs: dict[str, Any], size: int) -> Tensor:
    """The images [B, 3, size, size] of a request."""
    array = inputs.get("image")
    if not isinstance(array, np.ndarray):
        raise Problem(400, f"image: expected an input of FP32 [B, 3, {size}, {size}] in [0, 1]", "image")
    images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if images.ndim != 4 or images.shape[1:] != (3, size, size) or not 1 <= len(images) <= MAX_BATCH:
        raise Problem(
            400,
            f"image: expected [B, 3, {size}, {size}] with B from 1 to {MAX_BATCH}, got {list(images.shape)}",
            "image",
        )
    if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise Problem(400, "image: expected numbers in [0, 1]", "image")
    return images


def targets_of(inputs: dict[str, Any], count: int) -> list[str | int]:
    """One target for each image; -1 and no target are the runner-up."""
    given = inputs.get("target")
    if given is None:
        return ["runner-up"] * count
    if isinstance(given, np.ndarray) and given.dtype.kind != "i":
        raise Problem(400, "target: expected an input of INT64, INT32 or BYTES", "target")
    values: list[Any] = given if isinstance(given, list) else given.reshape(-1).tolist()
    if len(values) != count:
        raise Problem(400, f"target: expected {count}, one for each image, got {len(values)}", "target")
    return ["runner-up" if v == -1 else v for v in values]


async def run_all(
    server: Server, request: Request, images: Tensor, targets: list[str | int], config: Config
) -> list[Counterfactual]:
    """A counterfactual of each image; what is not wanted any more is cancelled."""
    tickets: list[Ticket[Counterfactual]] = []
    results: list[Counterfactual] = []
    if len(images) > (most := server.worker.max_queue):
        raise Problem(413, f"image: {len(images)} at once, more than the {most} that may wait here", "image")
    try:
        for x, t in zip(images, targets, strict=True):
            tickets.append(server.worker.submit(x, t, config))
        for place, ticket in enumerate(tickets):
            with naming(place, len(tickets)):
                results.append(await server.wait(request, ticket))
                server.metrics.answered(ticket)
                server.metrics.explain.observe(ticket.finished - ticket.arrived)
                if results[-1].status == "failed":
                    raise Problem(422, str(results[-1].error))
    finally:
        for ticket in tickets:
            if not ticket.future.done():
                server.worker.cancel(ticket)
    return results


@contextmanager
def naming(place: int, count: int) -> Iterator[None]:
    """What is wrong with one image of several says with which, from 0."""
    try:
        yield
    except CounterlensError as error:
        found = problem_of(error)
        which = f"image {place}: " if count > 1 else ""
        raise Problem(found.status, f"{which}{found.detail}", found.field, found.headers) from error


def add_routes(app: FastAPI, server: Server) -> None:
    """Add both protocols to the application."""
    size, labels = server.engine.image_size, server.engine.labels

    def known(model: str) -> None:
        if model != server.name:
            raise Problem(404, f"model: {model[:60]!r} is not served here, {server.name!r} is", "model")

    @app.get("/v2", tags=["kserve"])
    async def metadata() -> dict[str, Any]:
        """The server."""
        return {"name": "counterlens", "version": "1", "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", tags=["kserve"])
    async def live() -> Response:
        """Whether the process lives, and the thread that owns the models."""
        good = not server.worker.failed
        return JSONResponse({"live": good}, 200 if good else 503)

    @app.get("/v2/health/ready", tags=["kserve"])
    async def ready() -> Response:
        """Whether requests are taken."""
        good = server.worker.accepting
        return JSONResponse({"ready": good}, 200 if good else 503)

    @app.get("/v2/models/{model}/ready", tags=["kserve"])
    async def model_ready(model: str) -> Response:
        """Whether requests of this model are taken."""
        known(model)
        good = server.worker.accepting
        return JSONResponse({"name": model, "ready": good}, 200 if good else 503)

    @app.get("/v2/models/{model}", tags=["kserve"])
    async def model_metadata(model: str) -> dict[str, Any]:
        """Inputs and outputs."""
        known(model)

        def said(name: str, datatype: str, *shape: int) -> dict[str, Any]:
            return {"name": name, "datatype": datatype, "shape": [-1, *shape]}

        return {
            "name": model, "versions": ["1"], "platform": "counterlens",
            "inputs": [said("image", "FP32", 3, size, size), said("target", "INT64")],
            "outputs": [
                said("counterfactual", "FP32", 3, size, size), said("source", "INT64"), said("prediction", "INT64"),
                said("probabilities", "FP32", len(labels)), said("flipped", "BOOL"), said("l1", "FP32"),
                said("saliency", "FP32", size, size),
            ],
        }  # fmt: skip

    @app.post("/v2/models/{model}/infer", tags=["kserve"])
    async def infer(model: str, request: Request) -> Response:
        """Counterfactuals of a batch of image tensors."""
        known(model)
        asked, inputs = read_inference(await request.body(), request.headers.get(HEADER))
        images = images_of(inputs, size)
        parameters = parameters_of(asked)
        speed = parameters.get("speed") or server.engine.config.speed
        config = Config.make(**server.engine.config.model_dump(exclude_unset=True) | {"speed": speed})
        wanted = asked.get("outputs") or [{"name": name} for name in DEFAULT_OUTPUTS]
        if not isinstance(wanted, list) or not all(isinstance(o, dict) for o in wanted):
            raise Problem(400, "outputs: expected a list", "outputs")
        names = [str(o.get("name")) for o in wanted]
        if wrong := [name for i, name in enumerate(names) if name not in OUTPUTS or name in names[:i]]:
            raise Problem(
                400,
                f"outputs: {wrong[0][:40]!r} is none, or is asked for twice; expected some of {', '.join(OUTPUTS)}",
                "outputs",
            )
        in_binary = [
            bool(parameters_of(o, name).get("binary_data", parameters.get("binary_data_output")))
            for o, name in zip(wanted, names, strict=True)
        ]
        if "saliency" in names:
            server.check_map("outputs")
        targets = targets_of(inputs, len(images))
        with server.worker.holding():
            results = await run_all(server, request, images, targets, config)
            made = torch.stack([as_saved(r.image) for r in results])
            arrays: dict[str, np.ndarray] = {
                "counterfactual": made.numpy(),
                "source": np.asarray([r.source for r in results], dtype=np.int64),
                "prediction": np.asarray(
                    [r.prediction if r.error is None else r.source for r in results], dtype=np.int64
                ),
                "flipped": np.asarray([r.flipped for r in results]),
                "l1": np.asarray([r.l1 if r.error is None else 0.0 for r in results], dtype=np.float32),
            }
            if "probabilities" in names:
                arrays["probabilities"] = (await server.probabilities(made)).numpy()
            if "saliency" in names:
                arrays["saliency"] = (await server.maps(images)).saliency.numpy()
        return await asyncio.to_thread(_respond, model, asked.get("id"), names, arrays, in_binary)

    @app.post("/v1/models/{model}:predict", tags=["kserve"])
    async def predict_v1(model: str, request: Request) -> dict[str, Any]:
        """Predictions of `instances`, images in base64."""
        known(model)
        images = torch.stack([await server.image(data) for data in _instances(await request.body())])
        rows = (await server.probabilities(images, request)).tolist()
        named = [dict(zip(labels, row, strict=True)) for row in rows]
        return {"predictions": named, "labels": labels, "probabilities": rows}  # names may repeat, places do not

    @app.post("/v1/models/{model}:explain", tags=["kserve"])
    async def explain_v1(model: str, request: Request) -> dict[str, Any]:
        """Counterfactuals of `instances`, images in base64."""
        known(model)
        images = torch.stack([await server.image(data) for data in _instances(await request.body())])
        targets: list[str | int] = ["runner-up"] * len(images)
        results = await run_all(server, request, images, targets, server.engine.config)
        return {"explanations": [r.record() | {"image": to_base64(png(r.image))} for r in results]}


def _instances(body: bytes) -> list[bytes]:
    asked = parse_json(body)
    given = asked.get("instances") if isinstance(asked, dict) else None
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_BATCH:
        raise Problem(400, f"instances: expected a list of 1 to {MAX_BATCH}", "instances")
    out = []
    for one in given:
        inner = one.get("image", one) if isinstance(one, dict) else one
        text = inner.get("b64") if isinstance(inner, dict) else inner
        if not isinstance(text, str):
            raise Problem(400, 'instances: expected images as {"b64": "..."}', "instances")
        out.append(from_base64(text, "instances"))
    return out


def _respond(model: str, id: Any, names: list[str], arrays: dict[str, np.ndarray], in_binary: list[bool]) -> Response:
    """Outputs as JSON, those that were asked for in binary behind it."""
    outputs, blobs = [], []
    kinds = {np.dtype(v): k for k, v in DTYPES.items()}
    for name, binary in zip(names, in_binary, strict=True):
        array = np.ascontiguousarray(arrays[name])
        said: dict[str, Any] = {"name": name, "datatype": kinds[array.dtype], "shape": list(array.shape)}
        if binary:
            blobs.append(array.tobytes())
            said["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            said["data"] = array.reshape(-1).tolist()
        outputs.append(said)
    head = json.dumps(
        {"model_name": model, "model_version": "1", "outputs": outputs} | ({"id": id} if id else {})
    ).encode()
    if not blobs:
        return Response(head, 200, media_type="application/json")
    headers = {HEADER: str(len(head))}
    return Response(b"".join([head, *blobs]), 200, headers, "application/octet-stream")
