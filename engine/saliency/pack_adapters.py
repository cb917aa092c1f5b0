"""Trains a pack's LAX adapters: `python -m counterlens.engine.saliency.pack_adapters --pack DIR --work RUN`.

The same as four times `counterlens adapter train`, and the files put into the pack and its manifest. Started again with
the same command, it goes on from its last checkpoints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..models.placing import choose_device
from ..packs import Pack
from ..packs.train import list_files
from .explain import FOLDER
from .lax import DESCRIPTION, WEIGHTS
from .recipes import HALVES, pack_images, schedule_for, train_adapter

ADAPTERS = {
    f"{name}{end}": (name, q) for name in ("clean", "shortcut") for end, q in (("", "class"), ("-half", HALVES))
}


def main(
    pack: Annotated[str, typer.Option(help="Pack, or its folder.")],
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and loss plots.")],
    device: Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train the adapters of `clean` and `shortcut`, for labels and for "5 or more", and put them into the pack.

    Those for labels take about half an hour each on one core.

    Example: python -m counterlens.engine.saliency.pack_adapters --pack digits --work run
    """
    opened, there = Pack(pack), choose_device(device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for folder, (name, quantity) in ADAPTERS.items():
            schedule = schedule_for(name, quantity)
            images, validation = (x.to(there) for x in pack_images(opened, schedule, quantity))
            task = progress.add_task(folder, total=schedule.steps)
            out = work / folder
            out.mkdir(parents=True, exist_ok=True)
            classifier = opened.classifier(name)
            classifier.module.to(there)
            train_adapter(
                classifier, images, validation, schedule, quantity=quantity,
                colour=opened.mean_colour, out=out,
                on_step=lambda step, *_, t=task: progress.update(t, completed=step),
                described={"classifier": name, "pack": opened.name},
            )  # fmt: skip
            inside = opened.folder / FOLDER / folder
            inside.mkdir(parents=True, exist_ok=True)
            for file in (WEIGHTS, DESCRIPTION):
                shutil.copyfile(out / file, inside / file)
    opened.manifest["files"] = list_files(opened.folder)
    (opened.folder / "pack.json").write_text(json.dumps(opened.manifest, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
