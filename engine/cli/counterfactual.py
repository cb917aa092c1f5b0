"""`counterlens counterfactual`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from ..errors import CounterlensError, UsageError
from .asking import asking
from .generated import with_options
from .opening import AskedBox, EngineOptions, RunOptions, open_engine
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
    import torch

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
    box: AskedBox,
    images: Annotated[list[Path] | None, ImagesArgument] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Label, runner-up (second choice), runners-up (each of --count another), opposite (of two) or "
            "neighbour (--neighbours)."
        ),
    ] = "runner-up",
    out: Annotated[Path, typer.Option(help="Folder for the counterfactuals.")] = Path("counterfactuals"),
    manifest: Annotated[Path | None, typer.Option(help="Table with the columns image and target.")] = None,
    recursive: RecursiveOption = False,
    budget: Annotated[float | None, typer.Option(help="Seconds for each image; then what there is.")] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="The change also laid over the photo, at its own size.")
    ] = False,
    lpips: Annotated[
        Path | None, typer.Option(help="LPIPS as an ONNX file: how far apart the answers of --count look.")
    ] = None,
    overwrite: OverwriteFlag = False,
    resume: ResumeFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Change each image as little as needed for the classifier to say the target.

    Writes a PNG per image (--count: NAME.2.png, ... too), results.jsonl and run.json, batch by batch. An image that
    fails is reported and the others go on; the exit code is 1 then.

    A folder takes one run: the same command goes on in it, where finished images are skipped; --resume adds images to
    it, --overwrite replaces it, and what differs in a setting is refused.

    With --model, any classifier is explained by any diffusion model; --preset picks a published setting for them.

    What can only be called is explained through --surrogate, a student of it. It judges every counterfactual itself;
    what it does not confirm is tried again.

    Example: counterlens counterfactual four.png --target 9 --out changed
    """
    from counterlens.export.hashing import file_digest

    from ..images.files import make_folder
    from ..images.masks import AUTO, Masks
    from ..images.sources import some_images
    from ..outputs import Source, open_run

    items = open_images(images or [], recursive, manifest, targets=True).samples
    if budget is not None and not budget > 0:
        raise UsageError(f"budget: expected seconds above 0, got {budget:g}")
    if lpips is not None and config.count == 1:
        raise UsageError("lpips: it is measured between several counterfactuals of an image; add --count")
    distance = None
    if lpips is not None:
        from ..runtime.encoders import open_encoder

        distance = open_encoder("lpips", lpips)
    masks = None if config.region is None else Masks(config.region)
    choices: list[str | int] = [item.target or target for item in items]
    created = not out.exists()
    out = make_folder(out)
    try:
        engine = open_engine(config, opening, box, guides=True, shown=some_images(items))
        for choice in dict.fromkeys(choices):
            engine.check_target(choice, config.count)
    except CounterlensError:
        if created:
            out.rmdir()
        raise
    console = text_console(as_json)
    rows = []
    failed: set[str] = set()
    facts = {
        "command": "counterlens counterfactual", **engine.facts(config), "target": target, "budget_s": budget,
        **({"restore": True} if restore else {}),
        **({} if lpips is None else {"lpips": [str(lpips), file_digest(lpips)]}),
        **({} if masks is None else masks.facts()),
    }  # fmt: skip
    endings = (".png", *((RESTORED,) if restore else ()), *((REGION,) if masks and masks.text == AUTO else ()))
    further = [f".{n}{ending}" for n in range(2, config.count + 1) for ending in endings]
    sources = [Source(item.path.stem, {"image": item.name, "target": item.target}, item.own_file) for item in items]
    kept = 0
    with (
        progress_bar("counterfactuals") as progress,
        open_run(
            out, facts, sources=sources, endings=endings, further=further,
            inputs=[] if masks is None else masks.files, overwrite=overwrite, resume=resume, say=errors.print,
        ) as run,
        asking(run, [engine.box], as_json),
    ):  # fmt: skip
        for record in _counterfactual_records(engine, items, choices, run, budget, restore, masks, distance, progress):
            if record["status"] == "failed":
                failed.add(record.get("answer_of", record["name"]))
            kept += record.get("restored_flipped", False)
            if as_json:
                print_json(record)
            rows.append(counterfactual_row(record))
    console.table(COUNTERFACTUAL_COLUMNS, rows)
    if restore and (flips := sum(row[5] == "yes" for row in rows)):
        console.print(f"{kept} of {flips} flips survive in the restored photos")
    if failed:
        raise CounterlensError(f"{len(failed)} of {len(items)} images failed; the others are in {out}")


def _counterfactual_records(
    engine: Engine,
    items: list[Sample],
    targets: list[str | int],
    run: Run,
    budget_s: float | None,
    restore: bool,
    masks: Masks | None,
    distance: Callable[..., torch.Tensor] | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield the lines of each image in order, batch by batch, as written; what cannot be read or written is one too.

    Those that are done already come as they are.
    """
    import torch

    from ..core.answers import diversity, features_of, lpips_between
    from ..runtime.spec import SLOTS

    task = progress.task_ids[0]
    todo = [i for i, line in enumerate(run.done) if line is None]
    batches = [todo[k : k + SLOTS[-1]] for k in range(0, len(todo), SLOTS[-1])]
    told = 0
    features = features_of(engine.classifier, engine.source.get("pack")) if engine.config.count > 1 else None
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
        results: dict[int, list[Counterfactual]] = {}
        for s, alike in enumerate(shapes.values()):

            def show(i: int, n: int, done: float = b + s / len(shapes), share: float = 1 / len(shapes)) -> None:
                progress.update(task, completed=done + share * i / n, total=len(batches))

            images = torch.stack([loaded[i].image for i in alike])
            made = engine.counterfactual(
                images, [targets[i] for i in alike], on_step=show, budget_s=budget_s,
                region=[regions[i] for i in alike],
            )  # fmt: skip
            results.update(zip(alike, made.by_image(), strict=True))
        for i in rows:
            yield from _done(run, told, i)
            told = i
            label = {} if items[i].label is None else {"label": items[i].label}
            answers = results.get(i, [])
            said: dict[str, Any] = {}
            if features is not None and answers and answers[0].error is None:
                apart = diversity(answers, features)
                said = {"answers": len(answers), "diversity": round(apart, 6) if len(answers) > 1 else None}
                said["diversity_by"] = features.name
                if distance is not None:
                    said["diversity_lpips"] = round(lpips_between(answers, distance), 6) if len(answers) > 1 else None
            lines = [] if answers else [run.line(run.names[i], records[i] | label)]
            for n, result in enumerate(answers, 1):
                record = records[i] | result.record() | {"runtime": result.provenance["runtime"]}
                record |= {"answer": n, **said} if said else {}
                name = run.names[i]
                if n > 1:
                    record["answer_of"], name = name, f"{name}.{n}"
                lines.append(_written(engine, items[i], loaded[i], result, run, name, record, restore, masks) | label)
            for line in lines:
                run.append(line)
            yield from lines
    yield from _done(run, told, len(run.done))


def _done(run: Run, start: int, end: int) -> Iterator[dict[str, Any]]:
    """The lines of images that an earlier session finished, in order."""
    for line in run.done[start:end]:
        if line is not None:
            yield line
            yield from sorted(run.further.get(line["name"], []), key=lambda other: other["answer"])


def _written(
    engine: Engine,
    item: Sample,
    photo: Photo,
    result: Counterfactual,
    run: Run,
    name: str,
    record: dict[str, Any],
    restore: bool,
    masks: Masks | None,
) -> dict[str, Any]:
    """Write a counterfactual's pictures, and return its line; one that cannot be written has failed."""
    from ..blackbox.reading import Unusable
    from ..images.files import save_png
    from ..images.masks import AUTO
    from ..images.restoring import save_restored

    if record["status"] != "done":
        return run.line(name, record)
    path = run.folder / f"{name}.png"
    try:
        if restore:
            where = result.region
            if masks is not None and (own := masks.of_photo(item, photo.frame)) is not None:
                where = own
            picture, said = engine.restore(item.file(), photo, result.image, item.name, region=where)
            record |= {
                "restored_path": str(path.with_name(name + RESTORED)),
                "restored_prediction": said.label,
                "restored_target_confidence": round(said.probabilities[result.target].item(), 6),
                "restored_flipped": int(said.probabilities.argmax()) == result.target,
            }
            save_restored(picture, Path(record["restored_path"]), run.line(name, record))
        save_png(result.image, path, run.line(name, record))
        record["path"] = str(path)
        if masks is not None and masks.text == AUTO and result.region is not None:
            found = result.region[None].expand(3, -1, -1).float()
            save_png(found, path.with_name(name + REGION))
    except CounterlensError as error:
        if isinstance(error, Unusable):  # the other images' end too
            raise
        record |= {"status": "failed", "error": str(error)}
    return run.line(name, record)


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
