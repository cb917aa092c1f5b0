"""`counterlens audit`, `audit-merge` and `audit-report`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from ..blackbox.kinds import is_box
from ..blackbox.options import BoxOptions
from ..errors import CounterlensError, UsageError
from ..metrics.table import GROUPS
from .generated import with_options
from .opening import AskedBox, EngineOptions, RunOptions, open_engine
from .options import (
    METHOD_NAMES,
    JsonFlag,
    RecursiveOption,
    errors,
    print_json,
    progress_of,
    text_column,
    text_console,
)

if TYPE_CHECKING:
    from ..audit.rows import Row
    from ..audit.run import Progress
    from ..blackbox.opening import Shown
    from ..engine import Engine
    from ..models.protocols import Classifier

# Everything heavy is imported inside the commands: --help must answer at once.


@with_options
def audit(
    config: RunOptions,
    opening: EngineOptions,
    box: AskedBox,
    source: Annotated[
        Path, typer.Argument(help="Image folder, .csv or .parquet (image,label,target,id), or a datasets folder.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command goes on in it.")],
    target: Annotated[
        str, typer.Option(help="Label, runner-up, opposite or neighbour, where the source names none.")
    ] = "runner-up",
    counterfactuals: Annotated[bool, typer.Option(help="Make counterfactuals.")] = True,
    saliency: Annotated[
        str | None, typer.Option(help=f"A saliency map as well, scored by MSI, of {METHOD_NAMES}.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help=f"Scores of the maps: groups ({', '.join(g for g in GROUPS if g != 'masks')}, all) or names, such as "
            "main,robust. robust takes ten times as long as main; judge asks the first --judge."
        ),
    ] = None,
    insight: Annotated[bool, typer.Option(help="More counterfactuals for wrong predictions.")] = True,
    shortcuts: Annotated[int, typer.Option(help="Samples for the disagreement map; 0: none.", min=0)] = 128,
    recursive: RecursiveOption = False,
    limit: Annotated[int | None, typer.Option(help="At most so many samples.", min=1)] = None,
    per_class: Annotated[int | None, typer.Option(help="At most so many of each true label.", min=1)] = None,
    only_misclassified: Annotated[bool, typer.Option(help="Only where prediction and true label differ.")] = False,
    only_below: Annotated[float | None, typer.Option(help="Only where the confidence is below this.")] = None,
    slice: Annotated[list[str] | None, typer.Option(help="Column that groups the report; may be repeated.")] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="Independent classifier that confirms flips; the pack's `judge`.")
    ] = None,
    budget_s: Annotated[float | None, typer.Option(help="Deadline in seconds for each sample.")] = None,
    part_size: Annotated[int, typer.Option(help="Samples written at once, the unit of going on.", min=1)] = 64,
    image_format: Annotated[str, typer.Option(help="png, or webp (lossless, smaller).")] = "png",
    shard: Annotated[str | None, typer.Option(help="Only this share of the parts, such as 3/8.")] = None,
    workers: Annotated[int, typer.Option(help="Threads that read images; with --ray: engines.", min=1)] = 2,
    ray: Annotated[str | None, typer.Option(help="Run on Ray: `local`, or a cluster's address.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the audit that is in --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out, as the same command does anyway.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only estimate time and disk.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Explain a whole data set: rows in Parquet, images beside them, one report to read.

    Stopped at any moment, the same command goes on, with the threads and the runtime that it began with; with another
    model or setting it refuses, and --overwrite replaces what is there. What failed is recorded in its row and the
    others go on; the exit code is 1 then.

    Example: counterlens audit digits/labels.csv --slice marker --classifier shortcut --out audit
    """
    started = time.perf_counter()
    from ..audit.auditor import open_auditor
    from ..audit.run import run_audit
    from ..core.photos import disagreement
    from ..images.sources import some_images

    if overwrite and resume:
        raise UsageError("overwrite: not together with --resume")
    part = _shard(shard)
    called = is_box(opening.classifier) or not any(map(is_box, judge or ()))
    shown = some_images(source, recursive)
    own = box if called else BoxOptions()  # else it is of the judges alone
    engine = open_engine(config, opening, own, shown=shown)
    auditor = open_auditor(
        engine, source, config, _judges(engine, judge, opening, box, shown),
        target=target, counterfactuals=counterfactuals, saliency=saliency, insight=insight, limit=limit,
        metrics=None if metrics is None else [name.strip() for name in metrics.split(",")],
        per_class=per_class, only_misclassified=only_misclassified, only_below=only_below, sample_seed=config.seed,
        budget_s=budget_s, part_size=part_size, image_format=image_format, slices=slice or (),
        recursive=recursive,
    )  # fmt: skip
    console = text_console(as_json)
    for note in auditor.notes:
        errors.print(f"note: {note}")
    if dry_run and auditor.boxes:
        raise UsageError(f"dry-run: times are measured, which would ask {auditor.boxes[0].name}")
    if dry_run:
        _dry_run(auditor, out, shortcuts, part, time.perf_counter() - started, as_json)
        return

    def show(rows: Sequence[Row]) -> None:
        for row in rows:
            if as_json:
                said = row.record().items()
                print_json({k: v for k, v in said if v is not None and not k.endswith(("_grid", "_curve"))})
            own, ours = (row.own_prediction, row.own_confidence), (row.prediction, row.confidence)
            if own[0] is not None and ours[0] not in (None, own[0]):
                errors.print(f"warning: {row.id}: {disagreement(own, ours, row.fit)}", style="yellow")
            if row.status == "failed":
                errors.print(f"error: {row.id}: {row.error}", style="red")

    if ray is not None:
        _quiet_ray()
    with _bar() as update:
        results = run_audit(
            auditor, out, shard=part, workers=workers, ray=ray, shortcuts=shortcuts, overwrite=overwrite,
            on_progress=update, on_rows=show, say=errors.print,
        )  # fmt: skip
    from ..audit.disagreement import read_facts, verdict
    from ..audit.report import write_report
    from ..audit.summary import summarise

    summary = summarise(results)
    for line in summary.lines():
        console.print(line)
    if (facts := read_facts(results.folder)) is not None:
        console.print(verdict(facts, engine.image_size))
    elif shortcuts and counterfactuals and part is None:
        console.print("Shortcuts were not looked for: that takes two images that can be read, and two labels.")
    if as_json:
        print_json(summary.record())
    console.print(f"results: {out}")
    if report:
        console.print(f"report: {write_report(results)}")
    if summary.failed:
        raise CounterlensError(f"{summary.failed} of {summary.samples} samples failed; their rows say why")


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of the shards.")],
    out: Annotated[Path, typer.Option(help="Folder for the whole audit.")],
    as_json: JsonFlag = False,
) -> None:
    """Put the shards of one audit together; says which are missing.

    Example: counterlens audit-merge shard-1 shard-2 --out audit
    """
    from ..audit.disagreement import read_facts, verdict
    from ..audit.merge import merge as merge_shards
    from ..audit.summary import summarise

    summary = summarise(merge_shards(folders, out, say=lambda text: errors.print(text)))
    console = text_console(as_json)
    for line in summary.lines():
        console.print(line)
    if (facts := read_facts(out)) is not None:
        console.print(verdict(facts, facts["size"]))
    if as_json:
        print_json(summary.record())


def report(
    folder: Annotated[Path, typer.Argument(help="An audit's folder.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.html; the audit's own without it.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write an audit's report.html again, also of an audit that is not finished.

    Example: counterlens audit-report audit
    """
    from ..audit.report import write_report
    from ..audit.results import Results
    from ..images.files import make_folder

    results = Results.open(folder)
    path = write_report(results, None if out is None else make_folder(out))
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    text_console(as_json).print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def _judges(
    engine: Engine, names: list[str] | None, opening: EngineOptions, box: BoxOptions, shown: Shown | None = None
) -> dict[str, Classifier]:
    """The judges that were named, black boxes too; of a pack with a `judge`, that one."""
    if called := [name for name in names or () if is_box(name)]:
        from ..blackbox.opening import open_called

        size = engine.image_size
        opened = {n: open_called(n, engine.labels, image_size=size, options=box, images=shown) for n in called}
        rest = [name for name in names or () if name not in called]
        return {**opened, **_judges(engine, rest, opening, box)}
    if opening.model is None:
        from ..packs import Pack

        pack = Pack(opening.pack)
        if names is None:
            names = ["judge"] if "judge" in pack.classifier_names() and opening.classifier != "judge" else []
        return {name: pack.classifier(name) for name in names}
    from ..models.image_classifiers import open_classifier

    return {n: open_classifier(n, image_size=engine.image_size, labels=engine.labels) for n in names or []}


# What Ray tells of its own running, to whom it means nothing who asked for an audit: logger, and part of the message.
RAY_SAYS = (
    ("ray._private.authentication.authentication_token_setup", "Token authentication is enabled"),
    ("ray._private.worker", "Started a local Ray instance"),
    ("ray.data._internal.execution.streaming_executor", "Starting execution of Dataset"),
    ("ray.data._internal.execution.streaming_executor", "Execution plan of Dataset"),
    ("ray.data._internal.execution.streaming_executor", "execution finished in"),
    ("ray.data._internal.progress", "Progress bars disabled"),
)


def _quiet_ray() -> None:
    for name, text in RAY_SAYS:
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())  # type: ignore[misc]


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"shard: expected NUMBER/COUNT such as 3/8, got {text!r}")
    return int(number), int(count)


def _dry_run(
    auditor: Any, out: Path, shortcuts: int, shard: tuple[int, int] | None, opening: float, as_json: bool
) -> None:
    from ..audit.merge import estimate, free_bytes

    e = estimate(auditor, shortcuts, shard)
    seconds = e.seconds + opening
    free = free_bytes(out)
    if as_json:
        print_json({"samples": e.samples, "seconds": seconds, "bytes": e.bytes, "free_bytes": free})
    text_console(as_json).print(
        f"{e.samples} samples, about {duration(seconds)} and {e.bytes / 1e6:.1f} MB ({free / 1e9:.1f} GB are free), "
        f"measured on {e.measured_on}; nothing was written"
    )
    if e.bytes > free:
        raise CounterlensError(f"out: {out} has {free / 1e9:.1f} GB free, the audit needs about {e.bytes / 1e9:.1f}")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar on stderr with rate, flips and failures; shown on terminals only and gone when done."""
    columns = (
        text_column("audit"), BarColumn(), MofNCompleteColumn(), text_column("{task.fields[rate]}"),
        TimeRemainingColumn(), text_column("{task.fields[flips]} flipped, {task.fields[failures]} failed"),
    )  # fmt: skip
    with progress_of(*columns) as bar:
        task = bar.add_task("audit", total=None, rate="", flips=0, failures=0)

        def update(progress: Progress, part: float) -> None:
            rate = f"{progress.rate:.2f} a second" if progress.now else ""
            bar.update(
                task, total=progress.total, completed=int(progress.done + part), rate=rate, flips=progress.flips,
                failures=progress.failures,
            )  # fmt: skip

        yield update
