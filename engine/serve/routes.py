"""What every application of ours has: how bodies are read and described, and errors as problem details."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser

from ..errors import CounterlensError
from .telemetry import Metrics
from .wire import Problem, from_base64, parse_json, problem_of, to_base64

PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"description": "Problem details (RFC 9457)."} for code in (400, 401, 413, 415, 422, 429, 502, 503, 504)
}
MultiPartParser.spool_max_size = 0  # never: else uploads of more than a megabyte are written to a temporary file


class Taking(Protocol):
    """What a probe asks of a worker."""

    draining: bool

    @property
    def accepting(self) -> bool:
        """Whether it takes requests."""
        ...


async def fields_of(request: Request) -> tuple[dict[str, Any], bytes]:
    """A request's fields beside the image, and the image's bytes, from JSON or a form.

    Raises:
        Problem: 400 or 415, it is neither, or has no image.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        fields = parse_json(await request.body())
        if not isinstance(fields, dict):
            raise Problem(400, "body: expected a JSON object", "body")
        if not isinstance(fields.get("image"), str):
            raise Problem(400, "image: expected a file in base64", "image")
        return fields | {"image": ""}, from_base64(fields["image"])
    if kind != "multipart/form-data":
        raise Problem(415, f"content-type: expected multipart/form-data or application/json, got {kind or 'none'!r}")
    async with request.form(max_files=2, max_fields=32) as form:
        upload, mask = form.get("image"), form.get("region")
        if upload is None or isinstance(upload, str):
            raise Problem(400, "image: expected a file", "image")
        data = await upload.read()
        fields = {name: value for name, value in form.items() if name != "image" and isinstance(value, str)}
        if mask is not None and not isinstance(mask, str):
            fields["region"] = to_base64(await mask.read())
    if "config" in fields:
        fields["config"] = parse_json(str(fields["config"]).encode())
    return fields | {"image": ""}, data


def body_of(model: Any) -> dict[str, Any]:
    """A route's body for OpenAPI: the model as JSON, or a form with the file itself."""
    schema = model.model_json_schema()
    form = schema | {
        "properties": schema["properties"] | {"image": {"type": "string", "format": "binary"}},
    }
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def add_problems(app: FastAPI) -> None:
    """Have errors answered as problem details."""

    @app.exception_handler(CounterlensError)
    async def ours(request: Request, error: CounterlensError) -> JSONResponse:
        problem = problem_of(error)
        return JSONResponse(problem.body(request.url.path), problem.status, problem.headers, "application/problem+json")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        problem = Problem(400, f"{name}: {first['msg']}", name)
        return JSONResponse(problem.body(request.url.path), 400, None, "application/problem+json")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        problem = Problem(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
        return JSONResponse(
            problem.body(request.url.path), error.status_code, error.headers, "application/problem+json"
        )


def add_probes(app: FastAPI, worker: Taking, metrics: Metrics) -> None:
    """Add `/readyz` and `/metrics`."""

    @app.get("/readyz", tags=["server"])
    async def readyz() -> dict[str, str]:
        """Whether requests are taken: after warm-up, and not while it is being stopped."""
        if not worker.accepting:
            raise Problem(503, "server: it is being stopped" if worker.draining else "server: it warms up")
        return {"status": "ready"}

    @app.get("/metrics", tags=["server"])
    async def prometheus() -> Response:
        """Prometheus metrics."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")
