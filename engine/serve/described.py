"""`/docs`: the interface for people, made from the OpenAPI document; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2rem 0 0; font-size: 1.1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 1rem 0.2rem 0; font-weight: normal; }
th { font-family: ui-monospace, monospace; }
td + td { width: 70%; }
"""
POLICY = (
    "default-src 'none'; style-src 'sha256-{}'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def add_docs(app: FastAPI) -> None:
    """Add `/docs`."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    headers = {"Content-Security-Policy": POLICY.format(digest), "X-Content-Type-Options": "nosniff"}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page_of(app.openapi()), 200, headers, "text/html")


def page_of(document: dict[str, Any]) -> str:
    """An OpenAPI document's routes with their fields and answers, as HTML."""
    said = document["info"]
    parts = [
        f"<h1>{escape(said['title'])}</h1>\n<p>{escape(said.get('description', ''))} "
        'For programs: <a href="openapi.json">openapi.json</a>.</p>'
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            lines = escape(route.get("description", route.get("summary", ""))).replace("\n\n", "</p>\n<p>")
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>\n<p>{lines}</p>")
            content = route.get("requestBody", {}).get("content", {})
            kinds = " or ".join(content)
            fields: dict[str, Any] = next(iter(content.values()))["schema"] if content else {}
            rows = [
                (name, _type(field), field.get("description", ""))
                for name, field in fields.get("properties", {}).items()
            ]
            if rows:
                parts.append(f"<p>Takes {escape(kinds)}:</p>{_table(rows)}")
            parts.append(_table([(code, answer["description"]) for code, answer in route["responses"].items()]))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Interface</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    cells = (f"<th>{escape(first)}</th>" + "".join(f"<td>{escape(c)}</td>" for c in rest) for first, *rest in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _type(field: dict[str, Any]) -> str:
    """A field's types, and its default where it has one that says something."""
    kinds = [one.get("type", "any") for one in field.get("anyOf", [field])]
    said = " or ".join(kind for kind in kinds if kind != "null")
    default = field.get("default")
    return said if default in (None, {}) else f"{said}, {default} without it"
