"""README.md and docs/: every code block runs, every table and every generated list is that of the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.report import FILES, TABLES, fill
from counterlens.engine.metrics.table import METRICS
from counterlens.engine.models import load
from counterlens.engine.multistep import SOLVERS
from counterlens.engine.runtime import registry
from counterlens.engine.saliency.table import METHODS
from tests.docs.blocks import PAGES, ROOT, Block, blocks, execute, parse_only

pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
pytest.importorskip("captum", reason="needs captum (the extra `explain`)")

PARTS: list[dict[str, Any]] = [load.BACKBONES, registry._registered, METHODS._own, METRICS._own, SOLVERS]
BLOCKS = {page: list(blocks(page)) for page in PAGES}
RUN = {page: [b for b in found if b.one("not-run") is None] for page, found in BLOCKS.items()}
NOT_RUN = [block for found in BLOCKS.values() for block in found if block.one("not-run")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_page(
    chosen: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTERLENS_STORE", str(tmp_path / "store"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    before = [dict(table) for table in PARTS]
    namespace: dict[str, Any] = {}
    try:
        for block in chosen:
            execute(block, namespace, capsys)
    finally:
        for table, entries in zip(PARTS, before, strict=True):  # what a page registers is gone after it
            table.clear()
            table.update(entries)
        for module in [m for m in sys.modules if m.startswith("my_")]:
            del sys.modules[module]


@pytest.mark.parametrize("page", [p for p, b in RUN.items() if any("slow" not in x.flags for x in b)], ids=name)
def test_blocks(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page([b for b in RUN[page] if "slow" not in b.flags], tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p, b in RUN.items() if any("slow" in x.flags for x in b)], ids=name)
def test_slow_blocks(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(RUN[page], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_a_block_that_is_not_run_parses(block: Block) -> None:
    """And its reason is told: `pytest -rs` lists them."""
    parse_only(block)
    pytest.skip(f"{block}: parses, not run: {block.one('not-run')}")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
    assert len(re.findall(r"!\[", (ROOT / "README.md").read_text())) == 1


def test_tables_are_those_of_the_recorded_results() -> None:
    texts = {path: path.read_text() for path in FILES}
    assert [path for path, text in texts.items() if fill(text) != text] == []
    for table in TABLES:
        assert sum(f"<!-- {table} -->" in text for text in texts.values()) == 1, table


def test_links_of_readme_and_contributing_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), (page.name, target)


def test_every_file_that_a_page_names_is_there() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:engine|export|kernels|bench|docs|tests)/[\w./-]+)`", page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)


def test_every_column_of_an_audit_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tomllib", reason="needs Python 3.11, as the site does")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    from counterlens.engine.audit.rows import schema

    page = hooks.fill((ROOT / "docs/pages/reference/rows.md").read_text())
    table = dict(re.findall(r"^\| `(\w+)` \| `[^`]+` \| (.+) \|$", page, re.MULTILINE))
    assert list(table) == schema().names
    assert all(len(says) > 10 and says.endswith(".") for says in table.values())


def test_what_pages_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture has the layers of the contract in their order; commands and settings have all that there is."""
    pytest.importorskip("tomllib", reason="needs Python 3.11, as the site does")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    rows = hooks.layers()
    picture = hooks.layers_picture()
    names = re.findall(r">(\w+)</text>", picture)
    assert names == [part for row in rows for part in row]
    heights = dict(zip(names, re.findall(r'<text x="\d+" y="([\d.]+)"', picture), strict=True))
    assert [len({heights[part] for part in row}) for row in rows] == [1] * len(rows)
    there = {p.stem for p in (ROOT / "engine").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert set(names) == there - {"__init__"}
    for word in ("## `counterlens counterfactual`", "--guidance-every", "`counterlens adapter train`"):
        assert word in hooks.commands()
    made = {name for page in PAGES for name in re.findall(r"<!-- made: ([\w-]+) -->", page.read_text())}
    assert made == hooks.MADE.keys()


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs mkdocs-material (the extra `docs`)")
    pytest.importorskip("mkdocstrings_handlers", reason="needs mkdocstrings (the extra `docs`)")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "docs/mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    assert "https://fonts." not in (tmp_path / "index.html").read_text()
    architecture = (tmp_path / "explanation/architecture.html").read_text()
    assert '<svg class="layers"' in architecture
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css)"', page.read_text()), page
