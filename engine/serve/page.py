"""The page for people at `/`: its files, the samples that it offers, and what it has to know."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ..core.core import EngineCore
from ..packs import Pack
from ..portable.overlay import PLASMA
from ..portable.page import HERE as SHARED
from ..portable.page import html_of, script_of
from ..saliency.explain import pack_adapters
from ..saliency.table import METHODS
from .server import Server
from .tasks import KEPT_S
from .wire import png, to_base64

HERE = Path(__file__).parent
SAMPLES = 20  # of the pack
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FOR_EVER, ASK_AGAIN = "public, max-age=31536000, immutable", "no-cache"


def facts(engine: EngineCore) -> dict[str, Any]:
    """What the page offers beside what is served: what a request that says nothing gets, and methods that work here."""
    pack = Pack(engine.source["pack"]) if "pack" in engine.source else None
    adapted = pack is not None and (engine.source.get("classifier", ""), "class") in pack_adapters(pack)
    usable = [
        name
        for name in METHODS
        if (adapted or not METHODS[name].adapter) and (not METHODS[name].captum or find_spec("captum"))
    ]
    config = engine.config
    return {
        "usable_methods": usable, "modes": ["realistic", "audit", "official"], "default_mode": config.mode_name,
        "default_speed": config.speed, "kept_s": KEPT_S,
    }  # fmt: skip


def samples(engine: EngineCore) -> list[dict[str, str]]:
    """Images of the pack's test split, half of them with a marker; none where another model is served."""
    if "pack" not in engine.source:
        return []
    drawn = Pack(engine.source["pack"]).samples("test", count=SAMPLES, marker="random")
    names = [
        str(label) if marker is None else f"{label} with a {marker.colour} marker"
        for label, marker in zip(drawn.labels, drawn.markers, strict=True)
    ]
    return [{"name": n, "image": to_base64(png(x))} for n, x in zip(names, drawn.images, strict=True)]


def add_page(app: FastAPI, server: Server, *, asks_for_keys: bool) -> None:
    """Add the page, its files and its routes; `asks_for_keys`: the page asks for one before it asks the server."""
    style, script = (SHARED / "page.css").read_text() + (HERE / "live.css").read_text(), script_of(HERE / "live.js")
    html = html_of(
        HERE / "live.html", STYLE=_tag(style), SCRIPT=_tag(script), HEAT=" ".join(PLASMA),
        KEY="yes" if asks_for_keys else "no",
    )  # fmt: skip
    drawn = samples(server.engine)

    def file(path: str, text: str, kind: str) -> None:
        body, tag = text.encode(), f'"{_tag(text)}"'

        async def answer(request: Request) -> Response:
            exact = request.query_params.get("v") == tag.strip('"')
            headers = {
                "ETag": tag, "Cache-Control": FOR_EVER if exact else ASK_AGAIN, "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            }  # fmt: skip
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            return Response(body, 200, headers, kind)

        app.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False)

    file("/", html, "text/html")
    file("/page.css", style, "text/css")
    file("/page.js", script, "text/javascript")

    @app.get("/v1/samples", tags=["server"])
    async def of_the_pack() -> dict[str, Any]:
        """Images to try the model with, as PNG in base64; none where it is not a pack's."""
        return {"samples": drawn}


def _tag(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
