"""What mkdocs takes from elsewhere: recorded pictures, and the pages and figures that are made of the code itself.

A page asks for such text by a line `<!-- made: NAME -->`; NAME is a key of `MADE`.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "engine"
ROW, WIDTH, GAP = 58, 760, 10  # of the layers' picture, in pixels


def layers() -> list[list[str]]:
    """The engine's layers, highest first, as the contract in pyproject.toml has them."""
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    contract = next(c for c in tool["importlinter"]["contracts"] if c.get("containers") == ["counterlens.engine"])
    return [[name.strip() for name in row.replace(":", "|").split("|")] for row in contract["layers"]]


def says(name: str) -> str:
    """The first sentence of a module's or package's docstring."""
    path = ENGINE / name / "__init__.py" if (ENGINE / name).is_dir() else ENGINE / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=[.;])\s|\n", text)[0].rstrip(".;")


def layers_picture() -> str:
    """The layers as SVG: one row for each, and an arrow for the way that imports go."""
    rows = layers()
    height = len(rows) * (ROW + GAP) - GAP
    parts = [
        f'<svg class="layers" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Layers of counterlens.engine; '
        'a row imports rows below it only">'
    ]
    for i, row in enumerate(rows):
        width = (WIDTH - 40 - GAP * (len(row) - 1)) / len(row)
        for j, name in enumerate(row):
            x, y = 40 + j * (width + GAP), i * (ROW + GAP)
            parts.append(f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{ROW}" rx="6"/>')
            parts.append(f'<text x="{x + width / 2:.0f}" y="{y + ROW / 2 + 6}">{html.escape(name)}</text>')
    parts.append(f'<path d="M16 4 V{height - 6} M8 {height - 18} L16 {height - 4} L24 {height - 18}"/></svg>')
    return "".join(parts)


def layers_table() -> str:
    """The layers and what each part says of itself."""
    lines = ["| layer | part | what it is |", "| --- | --- | --- |"]
    rows = layers()
    lines += [f"| {len(rows) - i} | `{name}` | {says(name)} |" for i, row in enumerate(rows) for name in row]
    return "\n".join(lines)


def commands() -> str:
    """Every command with its options, as `--help` has them."""
    import typer.cli
    import typer.main

    from counterlens.engine.cli.main import app

    group = typer.main.get_command(app)
    text = typer.cli.get_docs_for_click(obj=group, ctx=typer.Context(group), name="counterlens")
    text = re.sub(r"^(Example: )(counterlens .*)$", r"\1`\2`", text, flags=re.M)
    return text[text.index("\n## ") :]  # each command says itself what the list above them cuts short


def settings() -> str:
    """The fields of `Config`."""
    from counterlens.engine.config import Config, declared

    schema = Config.model_json_schema()["properties"]
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, said in ((name, schema[name]) for name in declared(Config)):
        kinds = [kind for kind in said.get("anyOf", [said]) if kind.get("type") != "null"]
        kind = ", ".join(", ".join(map(str, kind["enum"])) if "enum" in kind else kind["type"] for kind in kinds)
        default = "" if said.get("default") is None else f"`{said['default']}`"
        lines.append(f"| `{name}` | {kind} | {default} | {said.get('description', '')} |")
    return "\n".join(lines)


def presets() -> str:
    """The published settings."""
    from counterlens.engine.config import PRESETS

    names = ["steps", "strength", "guidance_scale", "class_scale", "distance_scale", "angle", "filter"]
    lines = [f"| preset | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    lines += [f"| `{p}` | {' | '.join(f'{getattr(s, n)}' for n in names)} |" for p, s in PRESETS.items()]
    return "\n".join(lines)


def columns() -> str:
    """The columns of an audit's rows: what they say, with their types."""
    from counterlens.engine.audit.rows import COLUMNS

    lines = ["| column | Arrow type | what it says |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{c.name}` | `{c.kind}` | {c.says} |" for c in COLUMNS)])


def methods() -> str:
    """The saliency methods."""
    from counterlens.engine.saliency.table import METHODS

    lines = ["| `--method` | its map | it needs |", "| --- | --- | --- |"]
    for m in METHODS.values():
        needs = {"gradients": m.gradients, "a trained adapter": m.adapter, "captum": m.captum}
        lines.append(f"| `{m.name}` | {m.about} | {', '.join(what for what, needed in needs.items() if needed)} |")
    return "\n".join(lines)


def metrics() -> str:
    """The metrics of maps."""
    from counterlens.engine.metrics.table import METRICS

    lines = ["| group | column | metric | what it says |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {m.group} | `{m.name}` | {m.arrow} | {m.about} |" for m in METRICS.values())])


def encoders() -> str:
    """The networks of the papers' tables."""
    from counterlens.engine.metrics.encoders import ENCODERS

    lines = ["| `NAME` | network | it is given, [B, 3, h, w] | it returns | weights |", "| --- " * 5 + "|"]
    rows = (f"| `{e.name}` | {e.about} | {e.takes} | {e.gives} | {e.source} |" for e in ENCODERS.values())
    return "\n".join([*lines, *rows])


def sizing() -> str:
    """What one server holds, as `bench.serve` and `bench.serve_ray` recorded it."""
    import json

    names = ("start", "latency", "throughput", "overload", "aborted", "ray")
    found = {n: json.loads((ROOT / "bench" / "results" / f"serve-{n}.json").read_text()) for n in names}
    full, ray = found["overload"]["rows"][-1], found["ray"]
    rows = [
        ("process start to ready", f"{found['start']['seconds']['p50']:.1f} s"),
        ("one request on an idle server, p50", f"{1e3 * found['latency']['server']['p50']:.0f} ms"),
        ("server and generator on a core each: requests a second", f"{found['overload']['capacity']:.0f}"),
        (f"the same, asked for {full['times']:g} times as many", f"{full['goodput']:.0f}"),
        ("p99 of the accepted ones then, with a queue of 64", f"{full['seconds']['p99']:.1f} s"),
        ("memory of the process", f"{found['aborted']['after']['bytes'] / 1e6:.0f} MB"),
        (f"{ray['replicas']} replicas on Ray: start to ready", f"{ray['start_s']:.0f} s"),
        ("the same: requests a second", f"{ray['per_second']:.0f}"),
        ("a replica is killed under load: asked, failed at first, answered when asked once more",
         f"{ray['killed']['asked']}, {ray['killed']['asked_again']}, {ray['killed']['answered']}"),
        ("until another one is ready", f"{ray['killed']['replaced_s']:.0f} s"),
    ]  # fmt: skip
    e = found["throughput"]["environment"]
    lines = ["| digits pack, `fast` | measured |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)]
    return "\n".join([*lines, "", f"Recorded in `bench/results/serve-*.json` on {e['device']}, last {e['date'][:10]}."])


MADE = {
    "sizing": sizing,
    "layers-picture": layers_picture,
    "layers-table": layers_table,
    "commands": commands,
    "settings": settings,
    "presets": presets,
    "columns": columns,
    "methods": methods,
    "metrics": metrics,
    "encoders": encoders,
}


def fill(text: str) -> str:
    """A page with all that is made in its place."""
    return re.sub(r"<!-- made: ([\w-]+) -->", lambda found: MADE[found[1]](), text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page."""
    return fill(markdown)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this once: the recorded pictures become files of the site."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files
