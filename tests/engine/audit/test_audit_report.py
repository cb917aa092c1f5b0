"""The report: whole in one file, safe, small, and readable in a real browser; patterns in errors."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from counterlens.engine.audit import report as report_module
from counterlens.engine.audit.disagreement import box_name
from counterlens.engine.audit.insight import patterns, place_of
from counterlens.engine.audit.report import ORDERS, choose_cards, write_report
from counterlens.engine.audit.results import Results
from counterlens.engine.audit.rows import Row
from counterlens.engine.errors import CounterlensError
from counterlens.engine.portable.overlay import change, overlay
from tests.engine.audit.test_audit import make_engine, run
from tests.engine.images.test_sources import picture, save

NASTY = "<script>alert('x')</script>&quot; é 界"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def audited(tiny, tmp_path_factory) -> Results:
    """Nine images, one unreadable, one class with one sample, one id that is HTML, with insight and a map."""
    folder = tmp_path_factory.mktemp("report")
    lines = ["image,label,id,camera"]
    for i in range(8):
        save(folder / f"{i}.png", i)
        lines.append(f"{i}.png,{i % 2 if i else 7},{NASTY if i == 3 else i},{'left' if i < 4 else 'right'}")
    (folder / "8.png").write_bytes(picture()[:40])
    (folder / "list.csv").write_text("\n".join([*lines, "8.png,1,8,left", ""]))
    engine = make_engine(tiny)
    return run(
        engine, folder / "list.csv", folder / "out", judges={"other": tiny[1]}, insight=True, shortcuts=6,
        slices=["camera"], report=True,
    )  # fmt: skip


def page(results: Results) -> str:
    return (results.folder / "report.html").read_text()


def cards(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def test_the_page_needs_nothing_else(audited: Results) -> None:
    html = page(audited)
    assert not re.search(r"https?://|//cdn|@import|url\((?!data:)", html)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", html)
    html5lib = pytest.importorskip("html5lib", reason="needs html5lib")
    html5lib.HTMLParser(strict=True).parse(html)


def test_the_cards_are_the_rows(audited: Results) -> None:
    drawn, rows = cards(page(audited)), {r["number"]: r for r in audited.rows()}
    assert [c["number"] for c in drawn] == [n for n, r in rows.items() if r["image"] is not None]
    for card in drawn:
        row = rows[card["number"]]
        assert (card["id"], card["prediction"], card["flipped"]) == (row["id"], row["prediction"], row["flipped"])
        assert (audited.folder / card["files"][1]).is_file()
        assert all(p.startswith("data:image/webp;base64,") for p in card["pictures"][:3])
    smallest = sorted((c for c in drawn if c["flipped"]), key=lambda c: c["order"]["smallest"])
    assert [rows[c["number"]]["l1"] for c in smallest] == sorted(rows[c["number"]]["l1"] for c in smallest)
    hardest = min((c for c in drawn if "hardest" in c["order"]), key=lambda c: c["order"]["hardest"])
    assert hardest["flipped"] is False or all(c["flipped"] for c in drawn)


def test_changes_and_maps_are_drawn_as_everywhere_else(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    pixels = {name: g.integers(0, 256, (16, 16, 3), dtype=np.uint8) for name in ("image", "counterfactual")}
    pixels["saliency"] = np.repeat(g.integers(0, 256, (16, 16, 1), dtype=np.uint8), 3, axis=2)
    for name, values in pixels.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    shown = report_module._pictures(tmp_path, {name: f"{name}.png" for name in pixels}, 96, 80)
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text.split(",")[1])))) for text in shown if text]
    before, after, saliency = (np.moveaxis(pixels[n] / np.float32(255), -1, 0) for n in pixels)
    for got, expected in zip(drawn[2:], (change(before, after), overlay(before, saliency[0])), strict=True):
        assert np.abs(np.moveaxis(expected, 0, -1) * 255 - got).max() <= 0.5 + 1e-3


def test_ids_cannot_become_html(audited: Results) -> None:
    html = page(audited)
    assert "<script>alert" not in html
    assert NASTY in [c["id"] for c in cards(html)]


def test_many_rows_keep_the_first_of_every_order(monkeypatch) -> None:
    monkeypatch.setattr(report_module, "CARDS", 30)
    monkeypatch.setattr(report_module, "TOP", 4)
    rng = np.random.default_rng(0)
    rows = [
        {"number": i, "flipped": bool(rng.random() < 0.8), "target_confidence": rng.random(), "l1": rng.random(),
         "transfer": bool(rng.random() < 0.9), "confidence": rng.random(),
         "correct": bool(rng.random() < 0.9), "msi": None}
        for i in range(200)
    ]  # fmt: skip
    kept = {r["number"] for r in choose_cards(rows)}
    assert len(kept) == 30
    for name, (_, key) in ORDERS.items():
        if name != "msi":
            assert {r["number"] for r in sorted(rows, key=key)[:4]} <= kept, name


def test_images_outside_of_the_folder_are_refused(audited: Results, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(audited.folder, copy)
    results = Results.open(copy)
    rows = list(results.rows())[:4]
    rows[0]["image"] = "../../outside.png"
    results.write_part(0, [Row(**row) for row in rows], {})
    with pytest.raises(CounterlensError, match="lies outside of"):
        write_report(results)


def test_places_have_names() -> None:
    grid = np.full((8, 8), 0.01)
    grid[0:2, 6:8] = 1
    assert place_of(grid.flatten().tolist()) == "at the top right"
    assert place_of(np.ones(64).tolist()) == "all over the image"
    assert place_of([0.0] * 64) == "nowhere"
    assert box_name([0, 0, 8, 8], 32) == "the top left"
    assert box_name([12, 12, 20, 20], 32) == "the middle"
    assert box_name([24, 12, 32, 20], 32) == "the bottom"
    assert box_name([0, 0, 32, 28], 32) == "most of the image"


def test_errors_are_grouped() -> None:
    corner, spread = np.full((8, 8), 0.01), np.ones((8, 8))
    corner[0:2, 0:2] = 1
    base = {"true_l1": 0.1, "away_grid": None, "correct": False}
    rows = [
        base | {"label": "3", "prediction": "5", "true_grid": corner.flatten().tolist(), "true_l1": 0.2},
        base | {"label": "3", "prediction": "5", "true_grid": corner.flatten().tolist()},
        base | {"label": "3", "prediction": "5", "true_grid": spread.flatten().tolist()},
        base | {"label": "4", "prediction": "9", "true_grid": None},
        base | {"label": "4", "prediction": "4", "true_grid": None, "correct": True},
    ]
    found = patterns(rows)
    assert [(p.label, p.prediction, p.place, len(p.rows)) for p in found] == [
        ("3", "5", "at the top left", 2), ("3", "5", "all over the image", 1), ("4", "9", "not explained", 1),
    ]  # fmt: skip
    assert [r["true_l1"] for r in found[0].examples] == [0.1, 0.2]


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_real_browser(audited: Results, width: int) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser_path is None:
        pytest.skip(f"needs a Chromium: one of {', '.join(BROWSERS)}")
    said: list[str] = []
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else said.append(r.url))
        tab.goto((audited.folder / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator(".card").count() == 8
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        tab.select_option("#slice", label="camera: left")
        assert tab.locator(".card").count() == 4
        tab.select_option("#slice", value="")
        tab.fill("#find", "alert")
        assert tab.locator(".card").count() == 1
        assert NASTY in tab.locator(".card").inner_text()
        browser.close()
    assert said == []
