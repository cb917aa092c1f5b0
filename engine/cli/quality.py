"""`counterlens quality`: the papers' tables of a folder of counterfactuals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..blackbox.kinds import is_box
from ..errors import CounterlensError, UsageError
from .generated import only, with_options
from .opening import AskedBox, EngineOptions, check_box
from .options import SeedOption, errors, open_images, print_json, progress_bar, text_console

if TYPE_CHECKING:
    from torch import Tensor

    from ..blackbox.options import BoxOptions
    from ..metrics.protocols import Batch, Cell, Facts, Protocol
    from .made import Made, Reader, Results

ClassifierOptions = Annotated[EngineOptions, only("classifier", "labels", "prompts", "head", "weights", "device")]


@with_options
def quality(
    opening: ClassifierOptions,
    box: AskedBox,
    results: Annotated[
        Path, typer.Argument(help="Folder that counterlens counterfactual or audit wrote.", metavar="FOLDER")
    ],
    protocol: Annotated[str, typer.Option(help="ldce, ace or celeba: whose table.")] = "ldce",
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE.onnx: inception, vggface2, simsiam, oracle or lpips; may be given often.",
            metavar="<NAME=FILE>",
        ),
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="Folder of a further run of the same images, for LPIPS between runs.")
    ] = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="Where the images are now, if not where the run found them.")
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(help="all, flipped or correct: count these in every column, instead of the protocol's own."),
    ] = None,
    splits: Annotated[int, typer.Option(help="Random halvings of sFID; ACE's scripts make one.", min=1)] = 1,
    attributes: Annotated[
        Path | None, typer.Option(help="Annotations for CD: list_attr_celeba.csv, or .txt of the data set.")
    ] = None,
    partition: Annotated[
        Path | None, typer.Option(help="list_eval_partition.csv: only its training split (0) counts for CD.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="Attribute that was to change, for CD: Smiling.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a forward pass.", min=1)] = 16,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The table as one JSON object on stdout.")] = False,
) -> None:
    """Print the table that a paper has of its counterfactuals, for a folder of yours.

    A column whose network was not given is left out, and it is said where its weights are; files are made once, see the
    documentation. The classifier of a pack is opened by itself; else --classifier, for COUT.

    Example: counterlens quality changed --protocol ace --encoder inception=inception.onnx
    """
    given = _pairs(encoder or [])
    if partition is not None and attributes is None:
        raise UsageError("partition: it says which lines of --attributes count; give these")
    if (attributes is None) != (query is None):
        raise UsageError("query: CD needs both --attributes and --query")
    from counterlens.export.hashing import file_digest

    from ..blackbox.box import as_box, said
    from ..metrics.attributes import read_attributes
    from ..metrics.protocols import check_classifier, find_protocol, protocol_table
    from ..models.placing import choose_device
    from ..models.processors import padding_of
    from ..runtime.encoders import open_encoder
    from .made import Reader, read_results

    chosen = find_protocol(protocol, over)  # type: ignore[arg-type]
    found = read_results(results)
    if same := [folder for folder in run or [] if folder.resolve() == results.resolve()]:
        raise UsageError(f"run: {same[0]} is the folder that is measured; give further runs of its images")
    others = [read_results(folder) for folder in run or []]
    device = choose_device(opening.device)
    opened = {name: open_encoder(name, path, device) for name, path in given.items()}
    known = None if attributes is None else read_attributes(attributes, partition)
    made, pictures = _ordered(found)
    classifier = _classifier(found, opening, box, pictures)
    if classifier is not None:
        classifier.module.to(device)
    reader = Reader(
        found, open_images(images).samples if images else (),
        (0.0, 0.0, 0.0) if classifier is None else padding_of(classifier),
    )  # fmt: skip
    facts = _facts(made, classifier)
    further = _further(made, others)
    if classifier is not None:
        first = next(_batches(reader, made[:batch_size], further, batch_size))
        check_classifier(classifier, facts, first)
    with progress_bar("images", len(made)) as progress:

        def advancing() -> Iterator[Batch]:
            for batch in _batches(reader, made, further, batch_size):
                yield batch
                progress.advance(progress.task_ids[0], len(batch.images))

        cells = protocol_table(
            chosen, facts, advancing(), encoders=opened, classifier=classifier, attributes=known, query=query,
            further=any(further), splits=splits, seed=seed,
        )  # fmt: skip
    if found.without:
        errors.print(f"note: {found.without} images have no counterfactual (failed or skipped) and are left out")
    asked = as_box(classifier)
    if as_json:
        record = _record(found, chosen, cells, {name: [str(p), file_digest(p)] for name, p in given.items()})
        print_json(record | ({} if asked is None else {"queries": [asked.record()]}))
    _print(found, chosen, cells, as_json)
    if asked is not None:
        text_console(as_json).print(said(asked.record()))
    if failed := [cell for cell in cells if cell.failed]:
        raise CounterlensError("; ".join(f"{cell.column.heading}: {cell.missing}" for cell in failed))


def _pairs(texts: list[str]) -> dict[str, Path]:
    """NAME=FILE as a dictionary.

    Raises:
        UsageError: one is of another form, or a name stands twice.
    """
    out: dict[str, Path] = {}
    for text in texts:
        name, mark, file = text.partition("=")
        if not (name and mark and file):
            raise UsageError(f"encoder: expected NAME=FILE.onnx, got {text!r}")
        if name in out:
            raise UsageError(f"encoder: {name} is given twice")
        out[name] = Path(file)
    return out


def _ordered(results: Results) -> tuple[list[Made], tuple[int, int]]:
    """The counterfactuals, those of one size together, and the size of the first: (height, width)."""
    from PIL import Image, UnidentifiedImageError

    sizes: dict[tuple[int, int], list[Made]] = {}
    for made in results.made:
        try:
            with Image.open(made.counterfactual) as opened:
                width, height = opened.size
        except (OSError, UnidentifiedImageError) as error:
            raise CounterlensError(f"{made.counterfactual}: cannot be read as an image ({error})") from error
        sizes.setdefault((height, width), []).append(made)
    return [made for alike in sizes.values() for made in alike], next(iter(sizes))


def _classifier(results: Results, opening: EngineOptions, box: BoxOptions, size: tuple[int, int]) -> Any:
    """The classifier that made the results: of the pack that results.jsonl names, or as the options say; else None."""
    options = opening.of_pretrained()
    pack = results.facts.get("pack")
    check_box(opening.classifier, box)
    if is_box(opening.classifier):
        from ..blackbox.opening import open_called

        if unused := [name for name in options if name != "labels"]:
            raise UsageError(f"{unused[0]}: a black box takes none")
        return open_called(str(opening.classifier), options.get("labels", ()), image_size=min(size), options=box)
    if pack is not None and not options:
        from ..packs import Pack

        return Pack(pack).classifier(opening.classifier or results.facts["classifier"])
    if opening.classifier is None:
        if options:
            raise UsageError(f"{min(options)}: it describes --classifier; give that")
        return None
    from ..models.image_classifiers import open_classifier

    return open_classifier(opening.classifier, image_size=min(size), **options)


def _facts(made: list[Made], classifier: Any) -> Facts:
    """What the results say of counterfactuals; labels are the classifier's where there is one.

    Raises:
        UsageError: the classifier has no such label; or the true labels are none of the names in the results.
    """
    import torch

    from ..labels import distinct_names, find_label, is_label
    from ..metrics.protocols import Facts

    lines = [m.line for m in made]
    named = list(dict.fromkeys(line[key] for line in lines for key in ("source", "target", "prediction")))
    known = named if classifier is None else distinct_names(classifier.labels)
    if unknown := [name for name in named if name not in known]:
        raise UsageError(f"classifier: it has no label {unknown[0]!r}, and the results have; give the one of the run")
    labels = [line["label"] for line in lines if line.get("label") is not None]
    correct: list[bool] | None = None
    if all("correct" in line for line in lines):  # an audit says so itself
        correct = [line["correct"] for line in lines]
    elif len(labels) == len(lines):
        if classifier is None:
            if set(labels).isdisjoint(known):
                raise UsageError(
                    f"labels: {labels[0]!r}, ... of the images are none of the classifier's ({known[0]}, ...)"
                )
            correct = [label == line["source"] for label, line in zip(labels, lines, strict=True)]
        else:
            if wrong := [label for label in labels if not is_label(label, known)]:
                raise UsageError(f"labels: {wrong[0]!r} of an image is no label of the classifier ({known[0]}, ...)")
            correct = [
                known[find_label(label, known)] == line["source"] for label, line in zip(labels, lines, strict=True)
            ]
    return Facts(
        torch.tensor([line["flipped"] for line in lines]),
        torch.tensor([line["target_confidence"] for line in lines], dtype=torch.float64),
        torch.tensor([known.index(line["source"]) for line in lines]),
        torch.tensor([known.index(line["target"]) for line in lines]),
        None if correct is None else torch.tensor(correct),
    )


def _further(made: list[Made], others: list[Results]) -> list[list[Path]]:
    """Of each image its other counterfactuals: of the run itself (--count), and of further runs.

    Raises:
        UsageError: a further run has none of the images.
    """
    out = [list(m.further) for m in made]
    places = {m.key: i for i, m in enumerate(made)}
    for other in others:
        hits = [(places[m.key], m) for m in other.made if m.key in places]
        if not hits:
            raise UsageError(f"run: {other.folder} has no counterfactual of these images with the same targets")
        for place, m in hits:
            out[place] += [m.counterfactual, *m.further]
    return out


def _batches(reader: Reader, made: list[Made], further: list[list[Path]], size: int) -> Iterator[Batch]:
    """The images in order, `size` at a time, each batch of one shape."""
    import torch

    from ..metrics.protocols import Batch
    from .made import picture

    held: list[tuple[Tensor, Tensor, Tensor]] = []

    def batch() -> Batch:
        before, after, more = zip(*held, strict=True)
        held.clear()
        return Batch(torch.stack(before), torch.stack(after), more)

    for one, files in zip(made, further, strict=False):
        before, after = reader.pair(one)
        others = [picture(file) for file in files]
        if wrong := [file for file, other in zip(files, others, strict=True) if other.shape != after.shape]:
            raise UsageError(f"{wrong[0]}: of another size than {one.counterfactual}")
        if held and (len(held) == size or held[0][0].shape != before.shape):
            yield batch()
        held.append((before, after, torch.stack(others) if others else after.new_empty(0, *after.shape)))
    if held:
        yield batch()


def _record(results: Results, protocol: Protocol, cells: list[Cell], encoders: dict[str, list[str]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for cell in cells:
        said: dict[str, Any] = {"about": cell.column.about, "over": cell.column.over}
        if cell.missing is not None:
            said["missing"] = cell.missing
        else:
            said |= {"value": cell.value, "n": cell.n}
            if cell.interval is not None:
                said |= {"low": cell.interval.low, "high": cell.interval.high}
        columns[cell.column.name] = said
    return {
        "folder": str(results.folder), "protocol": protocol.name, "images": len(results.made),
        "without": results.without, "encoders": encoders, "columns": columns,
    }  # fmt: skip


def _print(results: Results, protocol: Protocol, cells: list[Cell], as_json: bool) -> None:
    """The table as the paper has it, then what each number is, then what is missing."""
    from ..metrics.protocols import WHICH

    console = text_console(as_json)
    shown = [cell.column.shown(cell.value) if cell.missing is None else "-" for cell in cells]
    title = f"{protocol.about}: {len(results.made)} counterfactuals"
    console.table(["folder", *(cell.column.arrow for cell in cells)], [[results.folder.name, *shown]], title=title)
    for cell in cells:
        if cell.missing is None:
            console.print(f"{cell.column.heading}: {cell.column.about}; {WHICH[cell.column.over]} ({cell.n})")
    for why in dict.fromkeys(cell.missing for cell in cells if cell.missing is not None):
        names = ", ".join(cell.column.heading for cell in cells if cell.missing == why)
        console.print(f"{names}: not computed: {why}", style="yellow")
