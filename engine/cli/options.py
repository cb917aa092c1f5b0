"""What the commands share: options, the engine that they describe, and where text goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
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

from ..errors import MAX_SEED, CounterlensError, UsageError
from ..runtime.registry import choices, formats
from ..saliency.table import METHODS
from ..terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import Config
    from ..engine import Engine
    from ..images.sources import Sample, Source

errors = Terminal(stderr=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object per result on stdout, text on stderr.")]
SeedOption = Annotated[
    int, typer.Option(help="Of everything random; combined with each image's own pixels or id.", min=0, max=MAX_SEED)
]
UnusedSeedOption = Annotated[
    int, typer.Option(help="Taken like everywhere; nothing here is random.", min=0, max=MAX_SEED)
]
PackOption = Annotated[str, typer.Option(help="An embedded pack (digits) or a pack's folder.")]
ClassifierOption = Annotated[
    str | None,
    typer.Option(help="What to explain: of the pack (clean); with --model a folder, hub id, torchvision:NAME."),
]
ModelOption = Annotated[
    str | None, typer.Option(help="Diffusion model instead of the pack's: a diffusers folder or hub id.")
]
LabelsOption = Annotated[str | None, typer.Option(help="Names of the logits: a,b,c or a .txt file, one a line.")]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="imagenet, openai-imagenet, pets, flowers, smile, age, a template with {label}, or a .txt file of prompts."
    ),
]
ClassesOption = Annotated[str | None, typer.Option(help="The diffusion model's class of each label: 3,7,...")]
HeadOption = Annotated[Path | None, typer.Option(help="Safetensors file: linear head on a backbone.")]
WeightsOption = Annotated[Path | None, typer.Option(help="Weights of a torchvision or timm model.")]
ImageSizeOption = Annotated[int | None, typer.Option(help="Side in pixels, for Stable Diffusion.")]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Remove what an earlier run wrote into --out.")]
ResumeFlag = Annotated[bool, typer.Option("--resume", help="Add images to the run in --out; settings must be its own.")]
# In help texts: what the tables hold when they are read.
RUNTIMES, FORMATS, METHOD_NAMES = "{runtimes}", "{formats}", "{methods}"
ForwardOption = Annotated[
    str, typer.Option(help="Of the metrics' forward passes: eager, or onnxruntime (compiled for the CPU).")
]
DeviceOption = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.")]
MatchOfficialFlag = Annotated[
    bool, typer.Option("--match-official", help="As the authors' code: bilinear resize, one noise, their prompts, ...")
]
SpeedOption = Annotated[str | None, typer.Option(help="exact, balanced or fast: how the setting is computed.")]
GuidanceDecoderOption = Annotated[str | None, typer.Option(help="full, or tiny: a small one, for gradients only.")]
DistanceOption = Annotated[str | None, typer.Option(help="To the input, over image (pixels) or latent.")]


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


def source_fields(pack: str, classifier: str | None, model: str | None) -> dict[str, Any]:
    """What a config says of its source: a pack's name and classifier, nothing of --model."""
    return {} if model else {"pack": pack, "classifier": classifier or "clean"}


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


def load_all(
    samples: Sequence[Sample], size: int, interpolation: str = "lanczos"
) -> tuple[list[str], list[Tensor], int]:
    """Names and images [3, size, size] of the samples that can be read, and how many cannot be, each of them said.

    Raises:
        CounterlensError: none can.
    """
    names, images = [], []
    for sample in samples:
        try:
            images.append(sample.load(size, interpolation))
        except CounterlensError as error:
            errors.print(f"error: {error}", style="red")
        else:
            names.append(sample.name)
    if not images:
        raise CounterlensError(f"images: none of {len(samples)} can be read")
    return names, images, len(samples) - len(images)


def saving_options(
    checkpointing: bool, memory_budget: float | None, neighbours: Path | None, **more: Any
) -> dict[str, Any]:
    """Options of `Engine` from those of a command; `more` as they are, those that were not given (None) left out."""
    from ..images.collect import read_neighbours

    given = {
        "memory_budget": None if memory_budget is None else memory_budget * 1e9,
        "neighbours": None if neighbours is None else read_neighbours(neighbours),
        **more,
    }
    return {"checkpointing": checkpointing} | {name: value for name, value in given.items() if value is not None}


def open_engine(
    config: Config, pack: str, classifier: str | None, model: str | None, options: dict[str, Any], **own: Any
) -> Engine:
    """The engine of a pack, or of --model and --classifier with what describes them (`own`; None: not given)."""
    from ..engine import Engine
    from ..images.collect import read_names

    say_choices(config)
    own = {name: value for name, value in own.items() if value is not None}
    if model is None:
        if own:
            raise UsageError(f"{next(iter(own))}: needs --model; the pack's models have their own")
        return Engine.from_pack(pack, classifier or "clean", config, **options)
    if classifier is None:
        raise UsageError("classifier: --model needs one to explain; give a folder, a hub id or torchvision:NAME")
    if "labels" in own:
        own["labels"] = read_names(own["labels"])
    if own.get("prompts", "").endswith(".txt"):
        own["prompts"] = _lines(Path(own["prompts"]))
    if "classes" in own:
        own["classes"] = _numbers(own["classes"])
    return Engine.from_pretrained(model, classifier, config, **own, **options)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompts: {path} cannot be read ({error})") from error


def say_choices(config: Config) -> None:
    """Say what --match-official sets."""
    from ..config import OFFICIAL_CHOICES

    if config.match_official:
        for choice in OFFICIAL_CHOICES:
            errors.print(f"note: match-official: {choice}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(f"classes: expected numbers separated by commas, got {text!r}") from error
