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
    from ..core.photos import Photo
    from ..core.result import Counterfactual
    from ..engine import Engine
    from ..images.masks import Masks
    from ..images.sources import Sample
    from ..outputs import Run

RESTORED = ".restored.png"  # how the file of a restored photo ends
REGION = ".region.png"  # and that of a region that was found


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
    restore: Annotated[
        bool, typer.Option("--restore", help="The change also laid over the photo, at its own size.")
    ] = False,
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
    from ..images.masks import AUTO, Masks
    from ..outputs import Source, open_run

    items = open_images(images or [], recursive, manifest, targets=True).samples
    if budget is not None and not budget > 0:
        raise UsageError(f"budget: expected seconds above 0, got {budget:g}")
    masks = None if config.region is None else Masks(config.region)
    choices: list[str | int] = [item.target or target for item in items]
    created = not out.exists()
    out = make_folder(out)
    try:
        engine = open_engine(config, opening)
        for choice in dict.fromkeys(choices):
            engine.check_target(choice)
    except CounterlensError:
        if created:
            out.rmdir()
        raise
    console = text_console(as_json)
    rows = []
    failed = 0
    facts = {
        "command": "counterlens counterfactual", **engine.facts(config), "target": target, "budget_s": budget,
        **({"restore": True} if restore else {}),
        **({} if masks is None else masks.facts()),
    }  # fmt: skip
    endings = (".png", *((RESTORED,) if restore else ()), *((REGION,) if masks and masks.text == AUTO else ()))
    sources = [Source(item.path.stem, {"image": item.name, "target": item.target}, item.own_file) for item in items]
    kept = 0
    with (
        progress_bar("counterfactuals") as progress,
        open_run(
            out, facts, sources=sources, endings=endings, inputs=[] if masks is None else masks.files,
            overwrite=overwrite, resume=resume, say=errors.print,
        ) as run,
    ):  # fmt: skip
        for record in _counterfactual_records(engine, items, choices, run, budget, restore, masks, progress):
            failed += record["status"] == "failed"
            kept += record.get("restored_flipped", False)
            if as_json:
                print_json(record)
            rows.append(counterfactual_row(record))
    console.table(COUNTERFACTUAL_COLUMNS, rows)
    if restore and (flips := sum(row[5] == "yes" for row in rows)):
        console.print(f"{kept} of {flips} flips survive in the restored photos")
    if failed:
        raise CounterlensError(f"{failed} of {len(items)} images failed; the others are in {out}")


def _counterfactual_records(
    engine: Engine,
    items: list[Sample],
    targets: list[str | int],
    run: Run,
    budget_s: float | None,
    restore: bool,
    masks: Masks | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield one line per image in order, batch by batch, as it was written; what cannot be read or written is one too.

    Those that are done already come as they are.
    """
    import torch

    from ..images.files import save_png
    from ..images.masks import AUTO
    from ..images.restoring import save_restored
    from ..runtime.spec import SLOTS

    task = progress.task_ids[0]
    todo = [i for i, line in enumerate(run.done) if line is None]
    batches = [todo[k : k + SLOTS[-1]] for k in range(0, len(todo), SLOTS[-1])]
    told = 0
    for b, rows in enumerate(batches):
        records: dict[int, dict[str, Any]] = {i: {"image": items[i].name} for i in rows}
        loaded: dict[int, Photo] = {}
        regions: dict[int, torch.Tensor | str | None] = {}
        for i in rows:
            try:
                photo = engine.read(items[i].file(), items[i].name)
                regions[i] = None if masks is None else masks.of(items[i], photo.frame)
                loaded[i] = photo
                records[i]["input_sha256"] = items[i].sha256()
            except (CounterlensError, OSError) as error:
                records[i] |= {"status": "failed", "error": str(error).removeprefix(f"{items[i].name}: ")}

        _say_own_answers(engine, items, loaded, records)
        shapes: dict[tuple[int, int], list[int]] = {}  # images of one shape share a batch
        for i, photo in loaded.items():
            shapes.setdefault(photo.frame.size, []).append(i)
        results: dict[int, Counterfactual] = {}
        for s, alike in enumerate(shapes.values()):

            def show(i: int, n: int, done: float = b + s / len(shapes), share: float = 1 / len(shapes)) -> None:
                progress.update(task, completed=done + share * i / n, total=len(batches))

            images = torch.stack([loaded[i].image for i in alike])
            made = engine.counterfactual(
                images, [targets[i] for i in alike], on_step=show, budget_s=budget_s,
                region=[regions[i] for i in alike],
            )  # fmt: skip
            results.update(zip(alike, made, strict=True))
        for i, result in sorted(results.items()):
            records[i] |= result.record() | {"runtime": result.provenance["runtime"]}
            if records[i]["status"] != "done":
                continue
            path = run.folder / f"{run.names[i]}.png"
            try:
                if restore:
                    where = result.region
                    if masks is not None and (own := masks.of_photo(items[i], loaded[i].frame)) is not None:
                        where = own
                    picture, said = engine.restore(
                        items[i].file(), loaded[i], result.image, items[i].name, region=where
                    )
                    records[i] |= {
                        "restored_path": str(path.with_name(run.names[i] + RESTORED)),
                        "restored_prediction": said.label,
                        "restored_target_confidence": round(said.probabilities[result.target].item(), 6),
                        "restored_flipped": int(said.probabilities.argmax()) == result.target,
                    }
                    line = run.line(run.names[i], records[i])
                    save_restored(picture, Path(records[i]["restored_path"]), line)
                save_png(result.image, path, run.line(run.names[i], records[i]))
                records[i]["path"] = str(path)
                if masks is not None and masks.text == AUTO and result.region is not None:
                    found = result.region[None].expand(3, -1, -1).float()
                    save_png(found, path.with_name(run.names[i] + REGION))
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


def _say_own_answers(
    engine: Engine, items: list[Sample], photos: dict[int, Photo], records: dict[int, dict[str, Any]]
) -> None:
    """Record how each image lies in its file, and the answer of the classifier's own pipeline; a difference is said."""
    from ..core.photos import disagreement

    answers = dict(zip(photos, engine.own_answers(list(photos.values())), strict=True))
    for i, photo in photos.items():
        records[i] |= photo.frame.record()
        if (own := answers[i]) is None:
            continue
        records[i] |= {"own_prediction": own.label, "own_confidence": round(own.confidence, 6)}
        confidence, predicted = engine.probabilities(photo.image[None])[0].max(dim=0)
        ours = engine.labels[int(predicted)], confidence.item()
        if int(predicted) != int(own.probabilities.argmax()):  # names may repeat
            said = disagreement((own.label, own.confidence), ours, photo.frame.fit)
            errors.print(f"warning: {items[i].name}: {said}", style="yellow")
