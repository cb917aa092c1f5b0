"""`counterlens profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..config import Config
from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from .generated import with_options, without
from .opening import EngineOptions, open_engine
from .options import (
    ImagesArgument,
    JsonFlag,
    OverwriteFlag,
    RecursiveOption,
    load_all,
    open_images,
    print_json,
    progress_bar,
    text_console,
)


@with_options
def profile(
    config: Annotated[Config, without("pack", "classifier", "count")],  # its own count is of images
    opening: EngineOptions,
    images: Annotated[list[Path] | None, ImagesArgument] = None,
    recursive: RecursiveOption = False,
    target: Annotated[str, typer.Option(help="Label, runner-up, ... as for counterfactual.")] = "runner-up",
    batch: Annotated[int, typer.Option(help="Images per call: 1 for latency, 16 for throughput.", min=1)] = 1,
    count: Annotated[int, typer.Option(help="At most so many images.", min=1)] = 16,
    out: Annotated[Path, typer.Option(help="Folder for profile.html, profile.json and trace.json.")] = Path("profile"),
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Show where time and memory of guided sampling go, and what guidance costs over unguided sampling.

    Without images the pack's test digits are taken.

    Writes a page (profile.html), all numbers (profile.json) and a trace for ui.perfetto.dev (trace.json). A compiled
    step is one call: its parts are timed in eager, its whole in the runtime that was asked for.

    Example: counterlens profile --batch 16 --out profile
    """
    from ..outputs import open_run

    items = open_images(images, recursive).samples[:count] if images else []
    if opening.model and not items:
        raise UsageError("images: none given; name files or folders (only a pack has its own)")
    if config.fit == "native":
        raise UsageError("fit: a profile is of the model's own size; auto, crop, pad and squash have it")
    if config.region is not None:
        raise UsageError("region: a profile is of steps, which are the same with and without one; leave it out")
    engine = open_engine(config, opening)
    import torch

    from ..packs import Pack
    from ..profiling.profile import profile as measure
    from ..profiling.report import page, perfetto, print_profile

    if items:
        _, loaded, failed = load_all(items, lambda item: engine.read(item.file(), item.name, own=False).image)
        pictures = torch.stack(loaded)
    else:
        failed, pictures = 0, Pack(opening.pack).samples("test", count=count, marker="random").images
    facts = {
        "command": "counterlens profile", "images": [item.name for item in items], "target": target,
        "batch": batch, "count": count, **engine.facts(config, batch),
    }  # fmt: skip
    names = ("profile.html", "profile.json", "trace.json")
    inputs = [item.own_file for item in items if item.own_file is not None]
    with open_run(out, facts, files=names, inputs=inputs, overwrite=overwrite), progress_bar("profile") as progress:
        task = progress.task_ids[0]
        result = measure(
            engine, pictures, target, batch=batch, say=lambda text: progress.update(task, description=text)
        )
        texts = (page(result), json.dumps(result.as_json(), indent=1) + "\n", perfetto(result.spans))
        files = dict(zip((out / name for name in names), texts, strict=True))
        for path, text in files.items():
            write_atomically(path, text)
    if as_json:
        print_json(result.as_json() | {"files": [str(path) for path in files]})
    console = text_console(as_json)
    print_profile(result, console)
    for path in files:
        console.print(str(path))
    if failed:
        raise CounterlensError(f"{failed} of {len(items)} images could not be read; the others were profiled")
