"""Finds the digits pack's own settings on the validation split: `python -m bench.sweep`.

Two grids over the same space, with the filter and without it, and one over the weight of classifier-free
image-to-image. Everything is recorded in bench/results/sweep.json; nothing here looks at the test split.
"""

from __future__ import annotations

import itertools
import json
from typing import Annotated, Any

import typer
from rich.progress import track

from bench.measure import open_engines, quality, run_img2img, run_ours
from bench.record import RESULTS, write_result
from counterlens.engine.config import Settings
from counterlens.engine.packs import Pack

GRID: dict[str, list[Any]] = {
    "strength": [0.5, 0.6],
    "class_scale": [2.0, 3.0, 4.0],
    "distance_scale": [0.5, 1.0, 1.5],
    "gradient": ["detached", "exact"],
    "noise": ["inversion"],
    "steps": [10],
}
FIXED = {"guidance_scale": 3.0}
WEIGHTS = [1.0, 2.0, 3.0, 4.0, 6.0]
FLIP = 0.98  # asked of a setting on validation, so that 97 % on test is likely


def score(row: dict[str, Any]) -> float:
    """What a setting is chosen by: transfer and closeness, among those that flip enough."""
    return row["transfer"] - 2 * row["l1"] - 4 * max(0.0, FLIP - row["flip"])


def main(
    pack: Annotated[str, typer.Option(help="Pack or folder.")] = "digits",
    count: Annotated[int, typer.Option(help="How many validation digits.")] = 120,
    grid: Annotated[str, typer.Option(help="JSON object that replaces values of the grid.")] = "{}",
    name: Annotated[str, typer.Option(help="Name of the result.")] = "sweep",
    filters: Annotated[str, typer.Option(help="Comma-separated filters.")] = "zero,off",
    angle: Annotated[float, typer.Option(help="Angle limit, degrees.")] = 45.0,
    apply: Annotated[bool, typer.Option(help="Write the chosen settings into the pack's manifest.")] = False,
) -> None:
    """Sweep on the validation split and print the best settings.

    Example: python -m bench.sweep --count 60 --grid '{"strength": [0.5]}'
    """
    opened, engines, judge = open_engines(pack)
    engine = engines["clean"]
    samples = opened.samples("validation", count=count, marker="random")
    images = samples.images
    targets = engine.resolve_targets("runner-up", engine.probabilities(images))
    space = GRID | json.loads(grid)
    rows: list[dict[str, Any]] = []

    def add(after: Any, **fields: Any) -> None:
        measured = quality(images, after, targets, engine.classifier, judge)  # type: ignore[arg-type]
        rows.append(fields | {k: round(v.mean().item(), 5) for k, v in measured.items()})
        rows[-1]["score"] = round(score(rows[-1]), 5)

    points = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    for filter_mode in filters.split(","):
        for point in track(points, description=f"filter {filter_mode}"):
            settings = Settings(**FIXED, **point, filter=filter_mode, angle=angle)
            add(run_ours(engine, images, targets, settings), kind="ours", **settings.model_dump())
            print(rows[-1], flush=True)
    starts = {(p["strength"], p["steps"], p["noise"]) for p in points}
    for strength, steps, noise in sorted(starts):
        settings = Settings(
            **FIXED, strength=strength, steps=steps, noise=noise, class_scale=0, distance_scale=0, angle=angle
        )
        for weight in WEIGHTS:
            after = run_img2img(engine, images, targets, settings, weight)
            add(after, kind="img2img", strength=strength, steps=steps, noise=noise, weight=weight)
    rows.sort(key=lambda r: -r["score"])
    path = write_result(name, {"split": "validation", "count": len(images), "rows": rows})
    for kind in ("zero", "off"):
        for row in [r for r in rows if r.get("filter") == kind][:5]:
            print(kind, {k: row[k] for k in ("strength", "class_scale", "distance_scale", "gradient", "steps")},
                  {k: row[k] for k in ("flip", "transfer", "l1", "score")})  # fmt: skip
    print(f"{len(rows)} settings in {path.relative_to(RESULTS.parent.parent)}")
    if apply:
        apply_choice(opened, rows)


def choose(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best setting with the filter, the best without at a flip rate within 1 point (the nearest where
    there is none), and the img2img weight.

    The weight is the smallest that flips as often as asked, else the one that flips most.
    """
    fields = tuple(Settings.model_fields)
    best = next(r for r in rows if r.get("filter") == "zero")
    without = [r for r in rows if r.get("filter") == "off"]
    matched = [r for r in without if abs(r["flip"] - best["flip"]) <= 0.01]
    off = matched[0] if matched else min(without, key=lambda r: abs(r["flip"] - best["flip"]))
    same = [r for r in rows if r["kind"] == "img2img" and all(r[k] == best[k] for k in ("strength", "steps", "noise"))]
    enough = [r for r in same if r["flip"] >= FLIP]
    chosen = min(enough, key=lambda r: r["weight"]) if enough else max(same, key=lambda r: r["flip"])
    return {
        "realistic": {k: best[k] for k in fields},
        "off": {k: off[k] for k in fields},
        "img2img_weight": chosen["weight"],
    }


def apply_choice(pack: Pack, rows: list[dict[str, Any]]) -> None:
    """Write the choice into pack.json: modes realistic and audit, and what bench.quality compares with."""
    choice = choose(rows)
    manifest = json.loads((pack.folder / "pack.json").read_text())
    manifest["settings"] = {"realistic": choice["realistic"], "audit": choice["realistic"] | {"angle": 90.0}}
    manifest["sweep"] = {"off": choice["off"], "img2img_weight": choice["img2img_weight"]}
    (pack.folder / "pack.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(choice))


if __name__ == "__main__":
    typer.run(main)
