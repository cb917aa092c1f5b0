"""`counterlens counterfactual`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from ..errors import CounterlensError, UsageError
from .generated import with_options
from .opening import EngineOptions, RunOptions, open_engine
from .options import (
    COUNTERFACTUAL_COLUMNS,
    ImagesArgument,
    JsonFlag,
    OverwriteFlag,
    RecursiveOption,
    ResumeFlag,
    counterfactual_row,
    errors,
    open_images,
    print_json,
    progress_bar,
    text_console,
)

if TYPE_CHECKING:
    from ..engine import Engine
    from ..images.sources import Sample
    from ..outputs import Run


@with_options
def counterfactual(
    config: RunOptions,
    opening: EngineOptions,
    images: Annotated[list[Path] | None, ImagesArgument] = None,
    target: Annotated[
        str, typer.Option(help="Label, runner-up (second choice), opposite (of two) or neighbour (--neighbours).")
    ] = "runner-up",
    out: Annotated[Path, typer.Option(help="Folder for the counterfactuals.")] = Path("counterfactuals"),
    manifest: Annotated[Path | None, typer.Option(help="Table with the columns image and target.")] = None,
    recursive: RecursiveOption = False,
    budget: Annotated[float | None, typer.Option(help="Seconds for each image; then what there is.")] = None,
    overwrite: OverwriteFlag = False,
    resume: ResumeFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Change each image as little as needed for the classifier to say the target.

    Writes one PNG per image, results.jsonl and run.json, each batch as soon as it is done. An image that fails is
    reported and the others go on; the exit code is 1 then.

    A folder takes one run: the same command goes on in it, where finished images are skipped; --resume adds images to
    it, --overwrite replaces it, and what differs in a setting is refused.

    With --model, any classifier is explained by any diffusion model; --preset picks a published setting for them.

    Example: counterlens counterfactual four.png --target 9 --out changed
    """
    from ..images.files import make_folder
    from ..outputs import Source, open_run

    items = open_images(images or [], recursive, manifest, targets=True).samples
    if budget is not None and not budget > 0:
        raise UsageError(f"budget: expected seconds above 0, got {budget:g}")
    out = make_folder(out)
    engine = open_engine(config, opening)
    choices: list[str | int] = [item.target or target for item in items]
    for choice in dict.fromkeys(choices):
        engine.check_target(choice)
    console = text_console(as_json)
    rows = []
    failed = 0
    facts = {
        "command": "counterlens counterfactual", **engine.facts(config), "target": target, "budget_s": budget,
    }  # fmt: skip
    sources = [Source(item.path.stem, {"image": item.name, "target": item.target}, item.own_file) for item in items]
    with (
        progress_bar("counterfactuals") as progress,
        open_run(
            out, facts, sources=sources, endings=(".png",), overwrite=overwrite, resume=resume,
            say=errors.print,
        ) as run,
    ):  # fmt: skip
        for record in _counterfactual_records(engine, items, choices, run, budget, progress):
            failed += record["status"] == "failed"
            if as_json:
                print_json(record)
            rows.append(counterfactual_row(record))
    console.table(COUNTERFACTUAL_COLUMNS, rows)
    if failed:
        raise CounterlensError(f"{failed} of {len(items)} images failed; the others are in {out}")


def _counterfactual_records(
    engine: Engine,
    items: list[Sample],
    targets: list[str | int],
    run: Run,
    budget_s: float | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield one line per image in order, batch by batch, as it was written; what cannot be read or written is one too.

    Those that are done already come as they are.
    """
    import torch

    from ..images.files import save_png
    from ..runtime.spec import SLOTS

    task = progress.task_ids[0]
    todo = [i for i, line in enumerate(run.done) if line is None]
    batches = [todo[k : k + SLOTS[-1]] for k in range(0, len(todo), SLOTS[-1])]
    told = 0
    for b, rows in enumerate(batches):
        records: dict[int, dict[str, Any]] = {i: {"image": items[i].name} for i in rows}
        loaded: dict[int, torch.Tensor] = {}
        for i in rows:
            try:
                loaded[i] = items[i].load(engine.image_size, engine.config.interpolation)
                records[i]["input_sha256"] = items[i].sha256()
            except (CounterlensError, OSError) as error:
                records[i] |= {"status": "failed", "error": str(error).removeprefix(f"{items[i].name}: ")}

        def show(i: int, n: int, b: int = b) -> None:
            progress.update(task, completed=b + i / n, total=len(batches))

        if loaded:
            result = engine.counterfactual(
                torch.stack(list(loaded.values())), [targets[i] for i in loaded], on_step=show, budget_s=budget_s
            )
        for k, i in enumerate(loaded):
            records[i] |= result.record(k) | {"runtime": result.provenance[k]["runtime"]}
            if records[i]["status"] != "done":
                continue
            path = run.folder / f"{run.names[i]}.png"
            try:
                save_png(result.images[k], path, run.line(run.names[i], records[i]))
                records[i]["path"] = str(path)
            except CounterlensError as error:
                records[i] |= {"status": "failed", "error": str(error)}
        for i in rows:
            yield from (line for line in run.done[told:i] if line is not None)
            told = i
            if (label := items[i].label) is not None:
                records[i]["label"] = label
            line = run.line(run.names[i], records[i])
            run.append(line)
            yield line
    yield from (line for line in run.done[told:] if line is not None)
