"""The page for people at `/`: its files, and the samples that it offers. Needs no PyTorch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ..portable.overlay import PLASMA
from ..portable.page import HERE as SHARED
from ..portable.page import html_of, script_of

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FOR_EVER, ASK_AGAIN = "public, max-age=31536000, immutable", "no-cache"


def add_page(app: FastAPI, samples: list[dict[str, str]], *, asks_for_keys: bool) -> None:
    """Add the page, its files and its routes.

    Args:
        app: answers `/v1/models`, which says what the page offers.
        samples: name, and image as PNG in base64.
        asks_for_keys: the page asks for one before it asks the server.
    """
    style, script = (SHARED / "page.css").read_text() + (HERE / "live.css").read_text(), script_of(HERE / "live.js")
    html = html_of(
        HERE / "live.html", STYLE=_tag(style), SCRIPT=_tag(script), HEAT=" ".join(PLASMA),
        KEY="yes" if asks_for_keys else "no",
    )  # fmt: skip

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
        return {"samples": samples}


def _tag(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
