"""Recorded results as Markdown: their numbers, and where these come from."""

from __future__ import annotations

import json
from typing import Any

from bench.record import RESULTS


def load(name: str) -> dict[str, Any]:
    """A recorded result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rate(v: dict[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{100 * v['mean']:.1f} % ({100 * v['low']:.1f} to {100 * v['high']:.1f})"


def points(v: dict[str, float]) -> str:
    """A paired difference of shares with its interval, in points."""
    mean, low, high = (f"{100 * v[k]:+.1f}" for k in ("mean", "low", "high"))
    return f"{mean} points ({low} to {high})"


def number(v: dict[str, float], digits: int = 4) -> str:
    """A mean with its interval."""
    return f"{v['mean']:.{digits}f} ({v['low']:.{digits}f} to {v['high']:.{digits}f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(r) + " |" for r in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def provenance(result: dict[str, Any], name: str, section: str | None = None) -> str:
    """Where the numbers come from; of one section of a result whose sections were measured one by one."""
    e = result["environment"] if section is None else result["environments"][section]
    text = f"Recorded in `bench/results/{name}.json` at {_place(e)}"
    if others := e.get("others"):
        return f"{text} ({', '.join(f'`{m}`' for m in e['methods'])}) and {_place(others)} (the others)."
    return f"{text}."


def _place(e: dict[str, Any]) -> str:
    return f"commit `{e['commit']}`, {e['date'][:10]}, {e['device']}, torch {e['versions']['torch']}"
