"""`counterlens demo`, `samples` and `info`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CounterlensError
from ..files import write_atomically
from .generated import only, with_options
from .opening import EngineOptions
from .options import (
    JsonFlag,
    OverwriteFlag,
    SeedOption,
    print_json,
    progress_bar,
    text_console,
)

PackAlone = Annotated[EngineOptions, only("pack")]


@with_options
def demo(
    opening: PackAlone,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("counterlens-demo"),
    count: Annotated[int, typer.Option(help="How many test digits.", min=1, max=20)] = 10,
    seed: SeedOption = 0,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Explain two classifiers of the digits pack, one honest and one with a planted shortcut.

    Each test digit carries a coloured marker. `clean` ignores it; `shortcut` was trained where a marker in the top-left
    corner means "5 or more" and one in the bottom-right corner "less than 5". The targets lie across that boundary.

    Example: counterlens demo --out /tmp/demo
    """
    from ..images.drawing import draw_strips
    from ..images.files import write_png
    from ..outputs import open_run
    from ..packs import pack_facts

    path = out / "counterfactuals.png"
    facts = {"command": "counterlens demo", "count": count, "seed": seed, **pack_facts(opening.pack)}
    with open_run(out, facts, files=[path.name], overwrite=overwrite):
        from .demo import run_demo

        with progress_bar("demo") as progress:
            task = progress.task_ids[0]
            parts = run_demo(opening.pack, count, seed, lambda i, n: progress.update(task, completed=i, total=n))
        write_png(draw_strips([p.strip for p in parts]), path, facts)
    console = text_console(as_json)
    rows = []
    for p in parts:
        s = p.summary
        rows.append([
            f"{p.classifier}, {p.mode}", str(s["images"]), f"{s['flip_rate']:.0%}", f"{s['transfer_rate']:.0%}",
            f"{s['l1_mean']:.3f}", f"{s['touched_rate']:.0%}",
        ])  # fmt: skip
    console.table(["explained", "images", "flipped", "judge agrees", "L1", "marker touched"], rows)
    console.print(
        "`clean` changes its mind when the digit changes; `shortcut` when the marker does. The 45 degree filter of "
        "mode realistic hides part of that, because the generator knows that the marker means nothing; mode audit "
        "shows it."
    )
    seconds = sum(p.summary["seconds_per_image"] for p in parts) / len(parts)
    console.print(f"{seconds:.2f} seconds for each counterfactual; pictures: {path}")
    if as_json:
        for p in parts:
            for record in p.records:
                print_json({"classifier": p.classifier, "mode": p.mode, **record})
        artifacts = [str(path)]
        first = parts[0].summary
        by_part = {f"{p.classifier}/{p.mode}": p.summary for p in parts}
        print_json({**first, "artifacts": artifacts, "parts": by_part})
    failed = sum(p.summary["failed"] for p in parts)
    if failed:
        raise CounterlensError(f"{failed} counterfactuals failed; --json names them")


@with_options
def samples(
    opening: PackAlone,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    count: Annotated[int, typer.Option(help="How many, spread evenly over the digits.", min=1)] = 20,
    marker: Annotated[str, typer.Option(help="none, random, matching or conflicting.")] = "none",
    out: Annotated[Path, typer.Option(help="Folder for the images and labels.csv.")] = Path("samples"),
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Write real handwritten digits of the pack as PNG files, with a labels.csv (file,label,marker).

    `matching` puts each marker in the corner that the shortcut's rule gives to the digit (5 or more: top-left, less:
    bottom-right), `conflicting` in the other one.

    Example: counterlens samples --split test --count 50 --marker matching --out digits
    """
    from ..images.files import save_png
    from ..outputs import open_run
    from ..packs import Pack, pack_facts

    drawn = Pack(opening.pack).samples(split, count=count, marker=marker, seed=seed)
    names = [f"{split}-{number:04d}-{label}.png" for number, label in zip(drawn.ids, drawn.labels, strict=True)]
    facts = {"command": "counterlens samples", "split": split, "count": count, "marker": marker, "seed": seed}
    facts |= pack_facts(opening.pack)
    rows = []
    with open_run(out, facts, files=[*names, "labels.csv"], overwrite=overwrite):
        for image, label, planted, name in zip(drawn.images, drawn.labels, drawn.markers, names, strict=True):
            rows.append({"file": name, "label": str(label), "marker": str(planted) if planted else "none"})
            save_png(image, out / name, facts | rows[-1])
            if as_json:
                print_json(rows[-1])
        table = io.StringIO()
        writer = csv.DictWriter(table, ["file", "label", "marker"])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(out / "labels.csv", table.getvalue())
    text_console(as_json).print(f"{len(rows)} images and labels.csv in {out}")


@with_options
def info(
    opening: PackAlone,
    out: Annotated[Path | None, typer.Option(help="Folder to write info.json to as well.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what is installed, which kernel backends run here and why others do not, and what the pack holds.

    Example: counterlens info --json
    """
    from .info import describe

    facts = describe(opening.pack)
    if out is not None:
        from ..images.files import make_folder

        write_atomically(make_folder(out) / "info.json", json.dumps(facts, indent=1) + "\n")
    if as_json:
        print_json(facts)
        return
    console = text_console(as_json)
    console.print("  ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    console.print(f"device: {facts['device']}, {facts['threads']} threads")
    rows = []
    against: dict[str, None] = {}
    for name, operation in facts["operations"].items():
        others = [b for b, reasons in operation["backends"].items() if not reasons and b != operation["auto"]]
        rows.append([name, operation["auto"], operation["why"], ", ".join(others)])
        for backend, reasons in operation["backends"].items():
            against |= dict.fromkeys(f"{backend} does not run here: {reason}" for reason in reasons)
    console.table(["operation", "auto runs", "because", "also runs here"], rows)
    for name, reasons in facts["runtimes"].items():
        against |= dict.fromkeys(f"runtime {name} does not run here: {reason}" for reason in reasons)
    for line in against:
        console.print(line)
    console.print("runtimes: " + ", ".join(name for name, reasons in facts["runtimes"].items() if not reasons))
    named = [facts["pack"]["name"], ", ".join(facts["pack"]["classifiers"])]
    described = {mode: ", ".join(f"{k} {v}" for k, v in s.items()) for mode, s in facts["pack"]["settings"].items()}
    console.table(["pack", "classifiers", "mode", "settings"], [[*named, *row] for row in described.items()])
