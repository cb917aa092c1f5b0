"""The report: one HTML page that needs nothing else, for people who do not program."""

from __future__ import annotations

import base64
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import CounterlensError
from ..files import real, write_atomically
from ..images.sources import need
from ..metrics.table import METRICS
from ..portable import overlay as colours
from .disagreement import LACKS, alarms, read_facts, read_maps, verdict
from .insight import COLUMNS as INSIGHT_COLUMNS
from .insight import patterns
from .results import GOES_ON, Results
from .statistics import STATISTICS, boxes, sentence
from .summary import Interval, Summary, summarise
from .watching import CELLS

REPORT = "report.html"
CARDS = 1000  # samples with pictures
TOP = 150  # of each order among them, where there are more samples
BUDGET = 11_000_000  # characters of pictures in the gallery
SIZES = ((96, 80), (96, 60), (80, 50), (64, 45), (48, 40), (32, 35))  # side in pixels, WebP quality
PATTERNS, EXAMPLES, PAIRS = 8, 6, 16
REDRAWN = 0.9  # share of unchanged answers after encoding and decoding, below which the overview says so
ORDERS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "hardest": (
        "Hardest to flip",
        lambda r: (bool(r["flipped"]), r["target_confidence"] if not r["flipped"] else -(r["l1"] or 0.0)),
    ),
    "smallest": ("Smallest change that flips", lambda r: (not r["flipped"], r["l1"])),
    "adversarial": (
        "Most adversarial (flips the model, not the judge)",
        lambda r: (not (r["flipped"] and r["transfer"] is False), r["l1"]),
    ),
    "unsure": ("Least sure predictions", lambda r: r["confidence"] if r["confidence"] is not None else 2.0),
    "wrong": ("Wrong predictions, surest first", lambda r: (r["correct"] is not False, -(r["confidence"] or 0.0))),
    "msi": ("Worst saliency maps", lambda r: r["msi"] if r["msi"] is not None else 9.0),
}
GALLERY_COLUMNS = [
    "number", "id", "file", "slices", "label", "prediction", "confidence", "correct", "status", "error", "target",
    "counterfactual_prediction", "counterfactual_confidence", "target_confidence", "flipped", "transfer", "judges",
    "l1", "changed_area", "msi", "image", "counterfactual", "saliency", "part", "seed",
]  # fmt: skip


def write_report(results: Results, out: Path | None = None) -> Path:
    """Write `report.html` into an audit's folder, or into another one that is there.

    Returns:
        Its path.

    Raises:
        CounterlensError: jinja2 is missing, or a file cannot be read or written.
    """
    jinja2 = need("jinja2", "the report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"share": _share, "number": _number, "interval": _interval_text}
    page = environment.get_template("report.html.j2").render(**_content(results, out or results.folder))
    path = (out or results.folder) / REPORT
    write_atomically(path, page, hint=GOES_ON)
    return path


def _content(results: Results, out: Path) -> dict[str, Any]:
    """Everything that the page in `out` says."""
    summary = summarise(results)
    rows = [r for r in results.rows(GALLERY_COLUMNS) if r["image"] is not None]
    cards, shown = _cards(results.folder, rows, out)
    wrong = list(results.rows(INSIGHT_COLUMNS))
    found = patterns(wrong)
    place = _disagreement(results, rows)
    failures = Counter(r["error"] for r in results.rows(["status", "error"]) if r["status"] == "failed")
    identity = results.manifest["identity"]
    return {
        "summary": summary,
        "identity": identity,
        "sessions": results.manifest["sessions"],
        "title": f"Classifier “{identity['model']['classifier']}” on {summary.samples:,} images",
        "name": identity["model"].get("classifier"),
        "orders": {k: name for k, (name, _) in ORDERS.items() if _has(k, rows)},
        "cards_json": _json(cards),
        "shown": shown,
        "matrix": _matrix(summary),
        "pairs": summary.pairs.most_common(8),
        "patterns": [_pattern(results.folder, p) for p in found[:PATTERNS]],
        "more_patterns": len(found) - PATTERNS,
        "wrong": sum(len(p.rows) for p in found),
        "place": place,
        "failures": failures.most_common(20),
        "scores": [(METRICS[name].arrow, METRICS[name].about, v) for name, v in summary.scores.items()],
        "findings": _findings(summary, found, place),
    }  # fmt: skip


def _has(order: str, rows: list[dict[str, Any]]) -> bool:
    """Whether an order says anything about these rows."""
    if order == "adversarial":
        return any(r["transfer"] is not None for r in rows)
    if order == "wrong":
        return any(r["correct"] is False for r in rows)
    if order == "msi":
        return any(r["msi"] is not None for r in rows)
    return order == "unsure" or any(r["flipped"] is not None for r in rows)


# The gallery


def choose_cards(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that get pictures: all, or the first of every order and a random draw, in the order of the data."""
    if len(rows) <= CARDS:
        return rows
    chosen: dict[int, dict[str, Any]] = {}
    for name, (_, key) in ORDERS.items():
        if _has(name, rows):
            usable = [r for r in rows if name in ("unsure", "wrong", "msi") or r["flipped"] is not None]
            for r in sorted(usable, key=key)[:TOP]:
                chosen[r["number"]] = r
    others = [r for r in rows if r["number"] not in chosen]
    for r in random.Random(0).sample(others, min(len(others), max(0, CARDS - len(chosen)))):
        chosen[r["number"]] = r
    return [chosen[n] for n in sorted(chosen)][:CARDS]


def _cards(folder: Path, rows: list[dict[str, Any]], out: Path) -> tuple[list[dict[str, Any]], int]:
    chosen = choose_cards(rows)
    explained = [r for r in rows if r["flipped"] is not None]
    place = {
        name: {r["number"]: i for i, r in enumerate(sorted(explained if _flips(name) else rows, key=key))}
        for name, (_, key) in ORDERS.items()
        if _has(name, rows)
    }
    size = _size(folder, chosen)
    cards = []
    for r in chosen:
        card = {k: r[k] for k in ("number", "id", "label", "prediction", "correct", "status", "target", "flipped")}
        card |= {"error": r["error"], "transfer": r["transfer"], "slices": r["slices"], "part": r["part"]}
        card |= {"now": r["counterfactual_prediction"], "sure": _round(r["confidence"]), "msi": _round(r["msi"])}
        card |= {"sureNow": _round(r["counterfactual_confidence"]), "l1": _round(r["l1"], 4)}
        card |= {"area": _round(r["changed_area"]), "judges": r["judges"]}
        card["order"] = {name: ranks[r["number"]] for name, ranks in place.items() if r["number"] in ranks}
        files = [r["image"], r["counterfactual"], r["saliency"]]
        card["files"] = [f and Path(os.path.relpath(real(folder) / f, real(out))).as_posix() for f in files]
        card["pictures"] = _pictures(folder, r, *size)
        cards.append(card)
    return cards, len(chosen)


def _flips(order: str) -> bool:
    return order in ("hardest", "smallest", "adversarial")


def _round(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def _size(folder: Path, rows: list[dict[str, Any]]) -> tuple[int, int]:
    """The largest thumbnails that keep the page small, judged by some of them."""
    some = rows[:: max(1, len(rows) // 24)]
    for side, quality in SIZES:
        pictures = [p for r in some for p in _pictures(folder, r, side, quality) if p]
        if not some or sum(map(len, pictures)) / len(some) * len(rows) <= BUDGET:
            return side, quality
    return SIZES[-1]


def _pictures(folder: Path, row: dict[str, Any], side: int, quality: int) -> list[str | None]:
    """Input, counterfactual, change and saliency as data URLs."""
    before, after = _open(folder, row["image"]), _open(folder, row["counterfactual"])
    change, saliency = None, _open(folder, row["saliency"])
    if before is not None and after is not None:
        change = _picture(colours.change(_values(before), _values(after)))
    if before is not None and saliency is not None and saliency.size == before.size:
        saliency = _picture(colours.overlay(_values(before), _values(saliency)[0]))
    return [_thumb(p, side, quality) for p in (before, after, change, saliency)]


def _values(picture: Image.Image) -> np.ndarray:
    """[3, H, W] in [0, 1]."""
    return np.moveaxis(np.asarray(picture, dtype=np.float32) / 255, -1, 0)


def _picture(values: np.ndarray) -> Image.Image:
    """Of [3, H, W] in [0, 1]."""
    return Image.fromarray((np.moveaxis(values, 0, -1) * 255).round().astype(np.uint8))


def _open(folder: Path, name: str | None) -> Image.Image | None:
    if name is None:
        return None
    path = real(folder / name)
    if not path.is_relative_to(real(folder)):
        raise CounterlensError(f"{name}: a row's image lies outside of {folder}; these are not our rows")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise CounterlensError(f"{path}: cannot be read ({error.strerror or error})") from error


def _thumb(picture: Image.Image | None, side: int, quality: int) -> str | None:
    if picture is None:
        return None
    if max(picture.size) > side:
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Small images are drawn as they are: lossy compression would blur what is to be seen.
    picture.save(buffer, format="WEBP", lossless=side >= 64 and max(picture.size) <= 48, quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


# Sections


def _matrix(summary: Summary) -> dict[str, Any] | None:
    """Counts from prediction to the counterfactual's prediction, of the most frequent labels."""
    if not summary.pairs:
        return None
    often: Counter[str] = Counter()
    for (before, after), n in summary.pairs.items():
        often[before] += n
        often[after] += n
    labels = sorted((label for label, _ in often.most_common(PAIRS)), key=lambda label: (len(label), label))
    largest = max(summary.pairs.values())
    rows = [
        [(summary.pairs[b, a], round(summary.pairs[b, a] / largest, 3)) if a != b else (None, 0.0) for a in labels]
        for b in labels
    ]
    left = sum(summary.pairs.values()) - sum(n or 0 for row in rows for n, _ in row)
    return {"labels": labels, "rows": rows, "left": left}


def _pattern(folder: Path, pattern: Any) -> dict[str, Any]:
    examples = []
    for r in pattern.examples[:EXAMPLES]:
        pictures = [_open(folder, r[k]) for k in ("image", "true_counterfactual", "away_counterfactual")]
        examples.append({"row": r, "pictures": [_thumb(p, 80, 80) for p in pictures]})
    return {
        "label": pattern.label,
        "prediction": pattern.prediction,
        "place": pattern.place,
        "count": len(pattern.rows),
        "reached": sum(bool(r["true_flipped"]) for r in pattern.rows),
        "examples": examples,
    }


def _heat(values: np.ndarray, top: float, side: int = 160) -> str:
    """A map as a picture, from dark blue (0) over magenta to yellow (`top`)."""
    picture = _picture(colours.heat(np.clip(values / max(top, 1e-12), 0, 1)))
    how = Image.Resampling.NEAREST if max(picture.size) <= CELLS else Image.Resampling.BILINEAR
    buffer = io.BytesIO()
    picture.resize((side, side), how).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _disagreement(results: Results, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The disagreement map's pictures and places, and the groups of its classes."""
    facts = read_facts(results.folder)
    if facts is None:
        return None
    maps = read_maps(results.folder)
    top = float(max(maps["push"].max(), maps["evidence"].max()))
    more = np.clip(maps["change_open"] - maps["change"], 0, None)
    excess = np.clip(maps["push"] - facts["factor"] * maps["evidence"], 0, None)
    pictures = [
        ("Where the model pushes", _heat(maps["push"], top)),
        ("Where the generator sees evidence", _heat(maps["evidence"], top)),
        ("Push beyond twice the evidence", _heat(excess, top / 2)),
        ("Removed by the filter", _heat(maps["removed"], top)),
        ("Changed more with an open filter", _heat(more, max(float(more.max()), 0.05))),
        ("What the generator cannot redraw", _heat(maps["lost"], max(float(maps["lost"].max()), 0.1))),
    ]  # fmt: skip
    if "push picture" in maps:  # an older counterlens made none
        top = float(max(maps["push picture"].max(), maps["evidence picture"].max()))
        pictures += [
            ("What the push would change in the picture", _heat(maps["push picture"], top)),
            ("What the generator's evidence would change", _heat(maps["evidence picture"], top)),
        ]
    examples = [_thumb(_open(results.folder, r["image"]), 96, 80) for r in rows[:8]]
    return {
        "facts": facts,
        "pictures": pictures,
        "examples": examples,
        "sentences": [sentence(s, facts["colours"], facts["all"]["samples"]) for s in alarms(facts)],
        "swatches": _swatches(facts),
        "frames": [
            *(p["box"] for p in facts["all"]["places"]),
            *(box for s in alarms(facts) for box in boxes(s["name"], maps["change"].shape[0])),
        ],
        "says": {s.name: s.says for s in STATISTICS},
        "lacks": LACKS if "statistics" not in facts["all"] else "",
        "size": maps["change"].shape[0],
        "cells": maps["push"].shape,
    }


def _swatches(facts: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """The colours that the push goes towards, if it stands out: CSS colour, name, labels."""
    if not any(s["family"] == "colour" for s in alarms(facts)):
        return []
    found = facts["colours"]
    axis = np.array(found["axis"]) / np.abs(found["axis"]).max()
    ends = [np.clip(128 + sign * 110 * axis, 0, 255).astype(int).tolist() for sign in (1, -1)]
    named = zip(ends, found["poles"], found["labels"], strict=True)
    return [(f"rgb({r},{g},{b})", pole, labels) for (r, g, b), pole, labels in named if labels]


def _findings(summary: Summary, found: list[Any], place: dict[str, Any] | None) -> list[str]:
    """What a reader should look at first, in sentences."""
    out = []
    if place is not None:
        out.append(verdict(place["facts"], place["size"]))
    if place is not None and place["facts"]["redrawn"]["same_answer"]["mean"] < REDRAWN:
        share = 1 - place["facts"]["redrawn"]["same_answer"]["mean"]
        out.append(
            f"For {share:.0%} of the images the model changes its answer when they are only encoded and decoded again: "
            "it leans on something that the generator cannot draw, and counterfactuals cannot show."
        )
    if found and len(found[0].rows) > 1:
        p = found[0]
        out.append(f"Most frequent error: {p.label} taken for {p.prediction}, {len(p.rows)} times, decided {p.place}.")
    unconfirmed = summary.overall["transfer"]
    if unconfirmed.mean is not None and unconfirmed.mean < 0.9:
        out.append(
            f"{1 - unconfirmed.mean:.0%} of the flips do not convince an independent model: the changes are closer to "
            "an attack than to a new meaning."
        )
    flipped = summary.overall["flipped"]
    if flipped.mean is not None and flipped.mean < 0.8:
        out.append(f"{1 - flipped.mean:.0%} of the images could not be flipped; the gallery shows them first.")
    if summary.fragile:
        out.append(summary.fragile)
    if summary.failed:
        out.append(f"{summary.failed} images failed; the last section says why.")
    return out


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval_text(v: Interval, share: bool = True) -> str:
    if v.mean is None:
        return "–"
    show, scale, digits = (_share, 100, 1) if share else (_number, 1, 3)
    if v.low is None or v.high is None:
        return show(v.mean)
    return f"{show(v.mean)} ({scale * v.low:.{digits}f} to {scale * v.high:.{digits}f})"
