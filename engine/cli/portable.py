"""`counterlens export --what counterfactual`, and `counterlens run`, which works without PyTorch."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CounterlensError, UsageError
from .options import (
    COUNTERFACTUAL_COLUMNS,
    ImagesArgument,
    JsonFlag,
    OverwriteFlag,
    RecursiveOption,
    ResumeFlag,
    SeedOption,
    counterfactual_row,
    errors,
    open_images,
    print_json,
    progress_bar,
    text_console,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..config import Config
    from ..engine import Engine
    from ..portable.file import CounterfactualFile


def export_whole(
    engine: Engine, config: Config, out: Path | None, batch: str, storage: Any, share: Any, page: bool,
    single_page: bool, ort_web: Path | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """What `export --what counterfactual` does: the file, its card, and pages that run it."""
    from ..portable.file import CARD
    from ..portable.page import page_files

    if out is None:
        raise UsageError("out: a whole counterfactual goes to a folder; name it (--out whole)")
    if batch != "open" and not (batch.isdecimal() and int(batch) > 0):
        raise UsageError(f"batch: expected open or a number above 0, got {batch!r}")
    pages = [True] * single_page + [False] * page
    with progress_bar("export") as progress:
        task = progress.task_ids[0]
        card = engine.export_counterfactual(
            out, config, batch=None if batch == "open" else int(batch), storage=storage, share=share, pages=pages,
            ort_web=ort_web, overwrite=overwrite, option="--{}",
            say=lambda text: progress.update(task, description=text),
        )  # fmt: skip
    files = [out / name for name in (card["file"], CARD, *(name for single in pages for name in page_files(single)))]
    report = {**card, "files": [str(path) for path in files]}
    report.pop("page", None)
    if as_json:
        return print_json(report)
    console, parity = text_console(False), card["parity"]
    say = console.print
    say(f"{card['steps']} steps in one file of {card['bytes'] / 1e6:.1f} MB, made in {card['seconds']['in all']:.0f} s")
    say(
        f"against the eager run on {parity['images']}: {parity['predictions_equal']:.1%} of the predictions equal, "
        f"{parity['within_1_of_255']:.1%} of the images within 1/255, the worst off by {parity['worst_in_255']:g}/255"
    )
    if "warning" in parity:
        say(f"warning: {parity['warning']}")
    for path in files:
        say(str(path))


def register(app: typer.Typer) -> None:
    """Add `run`."""
    app.command()(run)


def run(
    file: Annotated[Path, typer.Argument(help="counterfactual.onnx; its card, counterfactual.json, lies beside it.")],
    images: Annotated[list[Path], ImagesArgument],
    target: Annotated[str, typer.Option(help="Label name, index or runner-up.")] = "runner-up",
    recursive: RecursiveOption = False,
    out: Annotated[Path, typer.Option(help="Folder for the counterfactuals.")] = Path("counterfactuals"),
    threads: Annotated[int | None, typer.Option(help="Of ONNX Runtime; its own choice without it.", min=1)] = None,
    overwrite: OverwriteFlag = False,
    resume: ResumeFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Change images with a counterfactual's file alone: without PyTorch, in about a second.

    `counterlens export --what counterfactual` writes the file. The output is that of `counterlens counterfactual`: one
    PNG per image, results.jsonl and run.json.

    Example: counterlens run whole/counterfactual.onnx digits/test-0000-0.png --target 7 --out changed
    """
    from PIL import Image

    from ..images.files import write_png
    from ..outputs import Source, open_run
    from ..portable.file import CounterfactualFile

    items = open_images(images, recursive).samples
    opened = CounterfactualFile(file, threads)
    wanted, card = opened.target(target), opened.card
    facts = {
        "command": "counterlens run", "file": str(file), "file_sha256": card["sha256"],
        "classifier": card["classifier"], "mode": card["mode"], "speed": card["speed"],
        "settings": card["settings"], "weights": card["weights"],
        "target": target, "seed": seed, "threads": threads,
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
                    pixels = item.pixels(opened.image_size).transpose(2, 0, 1)
                    record |= {"input_sha256": item.sha256(), **_answer(opened, pixels, wanted, seed)}
                    changed = record.pop("counterfactual", None)
                    if changed is not None:
                        path = folder.folder / f"{name}.png"
                        write_png(Image.fromarray(changed), path, folder.line(name, record))
                        record["path"] = str(path)
                except (CounterlensError, OSError) as error:
                    record |= {"status": "failed", "error": str(error).removeprefix(f"{item.name}: ")}
                record = folder.line(name, record)
                folder.append(record)
            failed += record["status"] == "failed"
            if as_json:
                print_json(record)
            rows.append(counterfactual_row(record))
    console.table(COUNTERFACTUAL_COLUMNS, rows)
    if failed:
        raise CounterlensError(f"{failed} of {len(items)} images failed; the others are in {out}")


def _answer(opened: CounterfactualFile, pixels: NDArray[np.float32], target: int, seed: int) -> dict[str, Any]:
    """One image's record, its counterfactual [S, S, 3] in 8 bits; or why there is none."""
    started = time.perf_counter()
    answers = opened.run(pixels[None], target, seed)
    if (error := answers.errors[0]) is not None:
        skipped = int(answers.source[0]) == int(answers.target[0]) >= 0
        return {"status": "skipped" if skipped else "failed", "error": error}
    labels, said, wanted = opened.labels, int(answers.prediction[0]), int(answers.target[0])
    return {
        "source": labels[answers.source[0]],
        "target": labels[wanted],
        "prediction": labels[said],
        "confidence": round(float(answers.probabilities[0, said]), 6),
        "target_confidence": round(float(answers.probabilities[0, wanted]), 6),
        "flipped": said == wanted,
        "l1": round(float(answers.l1[0]), 6),
        "seconds": round(time.perf_counter() - started, 4),
        "counterfactual": (answers.counterfactual[0].transpose(1, 2, 0) * 255).round().astype("uint8"),
    }
