"""`counterlens export --what counterfactual|saliency`, and `counterlens run`, which works without PyTorch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CounterlensError, UsageError
from .options import (
    COUNTERFACTUAL_COLUMNS,
    MAP_COLUMNS,
    ImagesArgument,
    JsonFlag,
    OverwriteFlag,
    RecursiveOption,
    ResumeFlag,
    SeedOption,
    counterfactual_row,
    errors,
    map_row,
    open_images,
    print_json,
    progress_bar,
    text_console,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from ..config import Config
    from ..engine import Engine
    from ..portable.file import CounterfactualFile, SaliencyFile


def export_whole(
    engine: Engine, config: Config, out: Path | None, batch: int | None, storage: Any, share: Any, scales: bool,
    page: bool, single_page: bool, ort_web: Path | None, adapter: Path | None, overwrite: bool, measure: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """What `export --what counterfactual` does: the file, its card, and pages that run it."""
    from ..portable.file import SALIENCY, card_of
    from ..portable.page import page_files

    folder = _folder(out, "a whole counterfactual", "whole")
    pages = [True] * single_page + [False] * page
    with progress_bar("export") as progress:
        task = progress.task_ids[0]
        card = engine.export_counterfactual(
            folder, config, adapter=adapter, batch=batch, storage=storage, share=share, scales=scales, pages=pages,
            ort_web=ort_web, overwrite=overwrite, option="--{}", measure=measure,
            say=lambda text: progress.update(task, description=text),
        )  # fmt: skip
    files = [name for single in pages for name in page_files(single)]
    if pages and (folder / SALIENCY).exists():
        files = [SALIENCY, card_of(SALIENCY), *files]
    elif pages:
        errors.print("note: no adapter for this classifier, so the page shows no saliency map; --adapter gives one")
    parity = card["parity"]
    _report(card, folder, files, as_json, [
        f"{card['steps']} steps in one file of {card['bytes'] / 1e6:.1f} MB, made in {card['seconds']['in all']:.0f} s",
        f"against the eager run on {parity['images']}: {parity['predictions_equal']:.1%} of the predictions equal, "
        f"{parity['within_1_of_255']:.1%} of the images within 1/255, the worst off by {parity['worst_in_255']:g}/255",
    ])  # fmt: skip


def export_map(
    out: Path | None, pack: str, classifier: str | None, quantity: str, adapter: Path | None, labels: str | None,
    image_size: int | None, batch: int | None, storage: Any, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """What `export --what saliency` does: the file and its card."""
    from ..saliency.explain import hidden_by
    from ..saliency.one_file import export_saliency
    from .saliency import Subject

    folder = _folder(out, "a saliency map's file", "where")
    subject = Subject(pack, classifier or "clean", quantity, labels, image_size)
    opened = subject.open(adapter, option="--adapter")
    trained = subject.adapter(opened, adapter)
    with progress_bar("export") as progress:
        task = progress.task_ids[0]
        card = export_saliency(
            trained, folder, baseline=hidden_by(opened.pack), pack=opened.pack, batch=batch, storage=storage,
            overwrite=overwrite, facts=opened.facts(quantity, trained, 0), option="--{}",
            say=lambda text: progress.update(task, description=text),
        )  # fmt: skip
    parity = card["parity"]
    _report(card, folder, [], as_json, [
        f"map and MSI in one file of {card['bytes'] / 1e6:.1f} MB, made in {card['seconds']['in all']:.0f} s",
        f"against the adapter on {parity['images']}: {parity['predictions_equal']:.1%} of the predictions equal, "
        f"{parity['maps_within_1_of_255']:.1%} of the maps within 1/255, {parity['msi_within_0.001']:.1%} of the "
        f"scores within 0.001, the worst off by {parity['worst_in_255']:g}/255 and {parity['worst_msi']:g}",
    ])  # fmt: skip


def _folder(out: Path | None, what: str, example: str) -> Path:
    if out is None:
        raise UsageError(f"out: {what} goes to a folder; name it (--out {example})")
    return out


def _report(card: dict[str, Any], folder: Path, more: list[str], as_json: bool, lines: list[str]) -> None:
    """Say what was written: as JSON without what is for pages alone, or in lines."""
    from ..portable.file import card_of

    files = [str(folder / name) for name in (card["file"], card_of(card["file"]), *more)]
    if as_json:
        return print_json({k: v for k, v in card.items() if k not in ("page", "heat")} | {"files": files})
    if "warning" in card["parity"]:
        lines.append(f"warning: {card['parity']['warning']}")
    for line in (*lines, *files):
        text_console(False).print(line)


def register(app: typer.Typer) -> None:
    """Add `run`."""
    app.command()(run)


ScaleOption = Annotated[float | None, typer.Option(help="Of a counterfactual, where the file takes it; else its own.")]


def run(
    file: Annotated[
        Path, typer.Argument(help="counterfactual.onnx or saliency.onnx; its card, a .json, lies beside it.")
    ],
    images: Annotated[list[Path], ImagesArgument],
    target: Annotated[
        str | None, typer.Option(help="Label name or index; else runner-up, or of saliency the prediction.")
    ] = None,
    recursive: RecursiveOption = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; counterfactuals or saliency without it.")
    ] = None,
    class_scale: ScaleOption = None,
    distance_scale: ScaleOption = None,
    guidance_scale: ScaleOption = None,
    angle: ScaleOption = None,
    threads: Annotated[int | None, typer.Option(help="Of ONNX Runtime; its own choice without it.", min=1)] = None,
    overwrite: OverwriteFlag = False,
    resume: ResumeFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Change images, or show where the evidence is, with a file alone: without PyTorch, in about a second.

    `counterlens export --what counterfactual` (or saliency) writes the file. The output is that of `counterlens
    counterfactual` (or saliency): one PNG per image, results.jsonl and run.json.

    Example: counterlens run whole/counterfactual.onnx digits/test-0000-0.png --target 7 --out changed
    """
    from ..images.files import write_png
    from ..outputs import Source, open_run
    from ..portable.file import CounterfactualFile, SaliencyFile, read_card

    items = open_images(images, recursive).samples
    given = {
        "class_scale": class_scale, "distance_scale": distance_scale, "guidance_scale": guidance_scale, "angle": angle,
    }  # fmt: skip
    scales = {name: value for name, value in given.items() if value is not None}
    opened: CounterfactualFile | SaliencyFile
    facts: dict[str, Any]
    answer: Callable[[NDArray[np.float32]], tuple[dict[str, Any], Image.Image | None]]
    if read_card(file)["what"] == "saliency":
        opened = mapped = SaliencyFile(file, threads)
        if scales:
            raise UsageError(f"{next(iter(scales)).replace('_', '-')}: of counterfactuals; {file} draws saliency maps")
        answer = functools.partial(_map, mapped, opened.target(target or opened.default))
        facts, columns, row = {"method": "lax"}, MAP_COLUMNS, map_row
    else:
        opened = changed = CounterfactualFile(file, threads)
        changed.check_scales(scales)
        answer = functools.partial(_change, changed, opened.target(target or opened.default), seed, scales)
        facts, columns, row = (
            {k: opened.card[k] for k in ("mode", "speed", "settings")},
            COUNTERFACTUAL_COLUMNS,
            counterfactual_row,
        )
        facts |= {"scales": scales}
    card = opened.card
    out = out or Path("saliency" if card["what"] == "saliency" else "counterfactuals")
    facts |= {
        "command": "counterlens run", "file": str(file), "file_sha256": card["sha256"],
        "classifier": card["classifier"], "weights": card["weights"],
        "target": target or opened.default, "seed": seed, "threads": threads,
        "made_with": card["versions"],
        "versions": {"counterlens": version("counterlens"), "onnxruntime": opened.runtime_version},
    }  # fmt: skip
    sources = [Source(item.path.stem, {"image": item.name}, item.own_file) for item in items]
    console, rows, failed = text_console(as_json), [], 0
    with open_run(
        out, facts, sources=sources, endings=(".png",), inputs=[file], overwrite=overwrite, resume=resume,
        say=errors.print,
    ) as folder:  # fmt: skip
        for item, name, done in zip(items, folder.names, folder.done, strict=True):
            record = done
            if record is None:
                record = {"image": item.name, "status": "done"}
                try:
                    started = time.perf_counter()
                    more, picture = answer(item.pixels(opened.image_size, opened.fit).transpose(2, 0, 1))
                    record |= {"input_sha256": item.sha256(), **more}
                    if picture is not None:
                        path = folder.folder / f"{name}.png"
                        record["seconds"] = round(time.perf_counter() - started, 4)
                        write_png(picture, path, folder.line(name, record))
                        record["path"] = str(path)
                except (CounterlensError, OSError) as error:
                    record |= {"status": "failed", "error": str(error).removeprefix(f"{item.name}: ")}
                record = folder.line(name, record)
                folder.append(record)
            failed += record["status"] == "failed"
            if as_json:
                print_json(record)
            rows.append(row(record))
    console.table(columns, rows)
    if failed:
        raise CounterlensError(f"{failed} of {len(items)} images failed; the others are in {out}")


def _change(
    opened: CounterfactualFile, target: int, seed: int, scales: dict[str, float], pixels: NDArray[np.float32]
) -> tuple[dict[str, Any], Image.Image | None]:
    """One image's record and its counterfactual; or why there is none."""
    from PIL import Image

    answers = opened.run(pixels[None], target, seed, scales)
    if (error := answers.errors[0]) is not None:
        skipped = int(answers.source[0]) == int(answers.target[0]) >= 0
        return {"status": "skipped" if skipped else "failed", "error": error}, None
    labels, said, wanted = opened.labels, int(answers.prediction[0]), int(answers.target[0])
    return {
        "source": labels[answers.source[0]],
        "target": labels[wanted],
        "prediction": labels[said],
        "confidence": round(float(answers.probabilities[0, said]), 6),
        "target_confidence": round(float(answers.probabilities[0, wanted]), 6),
        "flipped": said == wanted,
        "l1": round(float(answers.l1[0]), 6),
    }, Image.fromarray((answers.counterfactual[0].transpose(1, 2, 0) * 255).round().astype("uint8"))


def _map(opened: SaliencyFile, target: int, pixels: NDArray[np.float32]) -> tuple[dict[str, Any], Image.Image | None]:
    """One image's record, with MSI and its curves, and the map over it; or why there is none."""
    from ..portable.overlay import side_by_side

    maps = opened.run(pixels[None], target)
    if (error := maps.errors[0]) is not None:
        return {"status": "failed", "error": error}, None
    return {
        "method": opened.card["method"],
        "prediction": opened.labels[maps.prediction[0]],
        "target": opened.labels[maps.target[0]],
        "probability": round(float(maps.probability[0]), 6),
        **{name: round(float(value[0]), 6) for name, value in maps.numbers.items()},
        "thresholds": opened.card["thresholds"],
        **{name: [round(v, 6) for v in curve[0].tolist()] for name, curve in maps.curves.items()},
    }, side_by_side(pixels, maps.saliency[0])
