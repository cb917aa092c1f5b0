"""What the commands share: options that are of no model, and where text goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from ..errors import MAX_SEED, CounterlensError
from ..runtime.registry import choices, formats
from ..saliency.table import METHODS
from ..terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from ..images.sources import Sample, Source

errors = Terminal(stderr=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object per result on stdout, text on stderr.")]
SeedOption = Annotated[
    int, typer.Option(help="Of everything random; combined with each image's own pixels or id.", min=0, max=MAX_SEED)
]
PackOption = Annotated[str, typer.Option(help="An embedded pack (digits) or a pack's folder.")]
LabelsOption = Annotated[str | None, typer.Option(help="Names of the logits: a,b,c or a .txt file, one a line.")]
DeviceOption = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Remove what an earlier run wrote into --out.")]
ResumeFlag = Annotated[bool, typer.Option("--resume", help="Add images to the run in --out; settings must be its own.")]
# In help texts: what the tables hold when they are read.
RUNTIMES, FORMATS, METHOD_NAMES = "{runtimes}", "{formats}", "{methods}"
ForwardOption = Annotated[
    str, typer.Option(help="Of the metrics' forward passes: eager, or onnxruntime (compiled for the CPU).")
]

ImagesArgument = typer.Argument(
    help="Images, folders of them (subfolders are labels), .csv, .parquet or datasets folders.", metavar="IMAGE..."
)
RecursiveOption = Annotated[bool, typer.Option("--recursive", help="Of folders, all below; else one level of classes.")]


COUNTERFACTUAL_COLUMNS = ["image", "from", "target", "now", "confidence", "flipped", "L1", "file"]


def filled(text: str) -> str:
    """A help text with the names of the runtimes, formats or saliency methods that there are."""
    for mark, table in ((RUNTIMES, choices), (FORMATS, formats), (METHOD_NAMES, lambda: list(METHODS))):
        if mark in text:
            *names, last = table()
            text = text.replace(mark, f"{', '.join(names)} or {last}")
    return text


def text_console(as_json: bool) -> Terminal:
    """Where text for people goes: stderr when stdout belongs to a machine."""
    return Terminal(stderr=as_json)


def counterfactual_row(record: dict[str, Any]) -> list[str]:
    """An image's row under `COUNTERFACTUAL_COLUMNS`; where there is no counterfactual, it is said why."""
    if record["status"] != "done":
        kind, colour = ("error", "red") if record["status"] == "failed" else ("skipped", "yellow")
        errors.print(f"{kind}: {record['image']}: {record['error']}", style=colour)
        return [record["image"], "", "", "", "", "", "", record["status"]]
    return [
        record["image"], record["source"], record["target"], record["prediction"], f"{record['confidence']:.3f}",
        "yes" if record["flipped"] else "no", f"{record['l1']:.4f}", record["path"],
    ]  # fmt: skip


MAP_COLUMNS = ["image", "target", "probability", "MSI", "marked", "file"]


def map_row(record: dict[str, Any]) -> list[str]:
    """An image's row under `MAP_COLUMNS`; where there is no map, it is said why."""
    if record["status"] != "done":
        errors.print(f"error: {record['image']}: {record['error']}", style="red")
        return [record["image"], "", "", "", "", "failed"]
    return [
        record["image"], record["target"], f"{record['probability']:.3f}", f"{record['msi']:.3f}",
        f"{100 * record['mask_area']:.1f} %", record["path"],
    ]  # fmt: skip


def print_json(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def text_column(text: str) -> TextColumn:
    """A column of a progress bar, without markup."""
    return TextColumn(text)


def progress_of(*columns: ProgressColumn) -> Progress:
    """A bar on stderr, shown on terminals only and gone when done; JSON on a stdout elsewhere stays there."""
    return Progress(
        *columns, console=errors, transient=True, disable=not errors.is_terminal, redirect_stdout=sys.stdout.isatty()
    )


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Progress]:
    """A progress bar on stderr, shown on terminals only and gone when done; it counts to a total that is known."""
    done = TaskProgressColumn() if total is None else MofNCompleteColumn()
    columns = (text_column("{task.description}"), BarColumn(), done, TimeRemainingColumn())
    with progress_of(*columns) as progress:
        progress.add_task(title, total=total)
        yield progress


def open_images(
    paths: Sequence[Path], recursive: bool = False, manifest: Path | None = None, *, targets: bool = False
) -> Source:
    """The images that a command is given; says what is passed over, such as targets where it does not take them.

    Raises:
        UsageError: see `images.sources.open_sources`.
    """
    from ..images.sources import open_sources

    source = open_sources(paths, recursive, manifest)
    unused = [] if targets or all(s.target is None for s in source.samples) else ["targets of tables are not used here"]
    for note in source.notes + unused:
        errors.print(f"note: {note}")
    return source


def load_all(samples: Sequence[Sample], read: Callable[[Sample], Tensor]) -> tuple[list[str], list[Tensor], int]:
    """Names and images of the samples that can be read, and how many cannot be, each of them said.

    Raises:
        CounterlensError: none can.
    """
    names, images = [], []
    for sample in samples:
        try:
            images.append(read(sample))
        except CounterlensError as error:
            errors.print(f"error: {error}", style="red")
        else:
            names.append(sample.name)
    if not images:
        raise CounterlensError(f"images: none of {len(samples)} can be read")
    return names, images, len(samples) - len(images)
