"""`counterlens saliency` and `counterlens evaluate`, and what they share with `counterlens adapter`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..blackbox.kinds import is_box
from ..blackbox.options import BoxOptions
from ..errors import CounterlensError, NotFinite, UsageError
from ..files import write_atomically
from ..labels import find_label
from ..metrics.table import GROUPS
from ..saliency.table import METHODS, check_methods
from .asking import asking, undefined
from .generated import with_options
from .opening import AskedBox, check_box, only_called
from .options import (
    MAP_COLUMNS,
    METHOD_NAMES,
    DeviceOption,
    ForwardOption,
    ImagesArgument,
    JsonFlag,
    LabelsOption,
    OverwriteFlag,
    PackOption,
    RecursiveOption,
    ResumeFlag,
    SeedOption,
    errors,
    load_all,
    map_row,
    open_images,
    print_json,
    progress_bar,
    text_console,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..blackbox.box import BlackBox
    from ..images.sources import Sample
    from ..models.protocols import Classifier
    from ..packs import Pack, Samples
    from ..saliency.explain import Explanations
    from ..saliency.lax import LAX

Own = Path | list[Path] | None  # what allows a classifier that is not the pack's: mostly the images
ClassifierOption = Annotated[
    str,
    typer.Option(
        help="Of the pack; with images of your own also a folder, hub id or torchvision:NAME. Or a black box: "
        "model.onnx, python:module:function, https://..."
    ),
]
QuantityOption = Annotated[
    str, typer.Option(help="class, or groups of labels: 0,1,2,3,4/5,6,7,8,9 (the target's group against the rest).")
]
ImagesOption = Annotated[
    Path | None, typer.Option(help="Images instead of the pack's: a folder, .csv, .parquet or datasets folder.")
]
SizeOption = Annotated[
    int | None, typer.Option(help="Side in pixels for a classifier that is not the pack's; 224 without it.", min=8)
]
AdapterOption = Annotated[Path | None, typer.Option(help="Folder of a trained adapter; the pack's own without it.")]


def _alpha(text: str | float) -> float:
    """A number, or what `metrics calibrate` froze in a file."""
    try:
        value = float(text)
    except ValueError:
        from ..metrics import load_alpha_min

        try:
            return load_alpha_min(str(text))
        except CounterlensError as error:
            raise typer.BadParameter(str(error)) from error
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"expected a number in [0, 1] or a calibration.json, got {text}")
    return value


AlphaOption = Annotated[
    float,
    typer.Option(
        help="Lowest threshold of MSI, or the calibration.json of metrics calibrate.", parser=_alpha,
        metavar="NUMBER|FILE",
    ),
]  # fmt: skip
MetricsOption = Annotated[
    str,
    typer.Option(
        help=f"Groups ({', '.join(GROUPS)}, all) or names, such as main,irof. robust takes ten times "
        "as long as main; judge needs --judge, masks --masks."
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(help="A second classifier, of the pack or as --classifier: is the evidence one for it as well?"),
]
MasksOption = Annotated[
    str | None,
    typer.Option(
        help="Where the evidence is: a folder of black and white pictures named as the images, or `marker` of the "
        "pack's images."
    ),
]
SurrogateOption = Annotated[
    Path | None, typer.Option(help="Of a black box: its student's folder, which lax and gradients look into.")
]
FitOption = Annotated[
    Literal["auto", "crop", "pad", "squash"],
    typer.Option(help="Of pictures that are not square; auto: what the classifier's own processor does."),
]
LayerOption = Annotated[str | None, typer.Option(help="Of gradcam; the last maps without it.")]
EVALUATED = ("summary.json", "scores.parquet", "curves.png", "methods.png")
SHOWN = 8  # images in the picture of methods
STUDENT = "student"  # what a method looks at that looks inside a black box


@dataclass(frozen=True)
class Opened:
    """A classifier that is explained, the pack that it is of or None, and its image size."""

    pack: Pack | None
    name: str
    classifier: Classifier
    size: int

    def read(self, sample: Sample, fit: str) -> Tensor:
        """A sample's image as the classifier sees it: [3, size, size] in [0, 1]; see `photos.seen_by`."""
        from ..core.photos import seen_by

        return seen_by(self.classifier, self.size, sample.file(), sample.name, fit)

    def facts(self, quantity: str, adapter: LAX | None, seed: int, there: Any = None) -> dict[str, Any]:
        """What makes maps of this classifier, and the session."""
        from ..provenance import models_digest, session

        return {
            "pack": self.pack.name if self.pack else None, "classifier": self.name, "image_size": self.size,
            "quantity": quantity, "weights": models_digest([self.classifier.module], self.classifier.labels),
            "adapter": None if adapter is None else models_digest([adapter.head], adapter.taps), "seed": seed,
            "runtime": "eager", **session(there),
        }  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is explained: options of every command here."""

    pack: PackOption = "digits"
    classifier: ClassifierOption = "clean"
    quantity: QuantityOption = "class"
    labels: LabelsOption = None
    image_size: SizeOption = None

    def open(self, own: Own, device: str = "cpu", option: str = "--images", box: BoxOptions | None = None) -> Opened:
        """The classifier, on its device; `own` is what the option was given that allows one that is not the pack's.

        `box` says how a black box is asked, of a command that needs no gradient; it may see the pack's images.
        """
        from ..images.collect import read_names
        from ..models.placing import choose_device
        from ..packs import Pack

        there, opened = choose_device(device), Pack(self.pack)
        if self.classifier in opened.classifier_names():
            for name, value in (("labels", self.labels), ("image-size", self.image_size)):
                if value is not None:
                    raise UsageError(
                        f"{name}: the pack's {self.classifier!r} has its own; give it with another classifier"
                    )
            explained: Classifier = opened.classifier(self.classifier)
            explained.module.to(there)
            return Opened(opened, self.classifier, explained, 32)
        if is_box(self.classifier):
            return self._open_box(opened, own, box, device, option == "--images")
        if own is None:
            known = ", ".join(opened.classifier_names())
            raise UsageError(
                f"classifier: {self.classifier!r} is not in pack {self.pack!r} ({known}); another one needs {option}"
            )
        from ..models.image_classifiers import open_classifier
        from ..surrogate.surrogate import is_surrogate, open_surrogate

        if is_surrogate(self.classifier):
            student = open_surrogate(self.classifier)
            student.students.to(there)
            return Opened(None, self.classifier, student.classifier, student.image_size)
        names, size = read_names(self.labels) if self.labels else None, self.image_size or 224
        explained = open_classifier(self.classifier, image_size=size, labels=names)
        explained.module.to(there)
        return Opened(None, self.classifier, explained, size)

    def _open_box(self, pack: Pack, own: Own, options: BoxOptions | None, device: str, shown: bool) -> Opened:
        from ..blackbox.opening import open_called
        from ..images.collect import read_names
        from ..images.sources import some_images
        from ..models.placing import choose_device

        asked = check_box(self.classifier, options)
        size = self.image_size or (32 if own is None else 224)
        if self.labels is not None:
            labels = read_names(self.labels)
        else:
            labels = list(pack.classifier(pack.classifier_names()[0]).labels) if own is None else []
        some = some_images(own or []) if shown else None
        real = some if own is not None else lambda _: pack.samples("test", count=8).images
        called = open_called(self.classifier, labels, image_size=size, options=asked, images=real)
        called.module.to(choose_device(device))
        return Opened(pack if own is None else None, getattr(called, "name", self.classifier), called, size)

    def judge(self, name: str, own: Own, device: str, box: BoxOptions | None) -> Classifier:
        """Another classifier, opened alike."""
        other = replace(self, classifier=name)
        if is_box(self.classifier) and not is_box(name):  # labels and size were said of the box
            other = replace(other, labels=None, image_size=None)
        return other.open(own, device, box=box if is_box(name) else None).classifier

    def adapter_of(self, methods: Sequence[str], opened: Opened, folder: Path | None) -> LAX | None:
        """The adapter that one of the methods needs, or None; a folder for none of them is refused."""
        if any(METHODS[name].adapter for name in methods):
            return self.adapter(opened, folder)
        if folder is not None:
            raise UsageError(f"adapter: {', '.join(methods)} takes none")
        return None

    def adapter(self, opened: Opened, folder: Path | None) -> LAX:
        """The adapter in a folder, or the pack's."""
        from ..saliency.explain import find_adapter

        return find_adapter(folder, opened.classifier, self.quantity, opened.pack, opened.name)


@dataclass(frozen=True)
class Explaining:
    """How it is explained: options of the commands that make maps."""

    adapter: AdapterOption = None
    alpha_min: AlphaOption = 0.5
    layer: LayerOption = None
    recursive: RecursiveOption = False
    fit: FitOption = "auto"
    device: DeviceOption = "auto"
    overwrite: OverwriteFlag = False
    seed: SeedOption = 0
    as_json: JsonFlag = False


def load(source: Path, opened: Opened, recursive: bool, fit: str) -> tuple[list[str], Tensor, int]:
    """Names and images [N, 3, size, size] of a source, and how many could not be read, which is said."""
    import torch

    names, images, failed = load_all(open_images([source], recursive).samples, lambda sample: opened.read(sample, fit))
    return names, torch.stack(images), failed


def read_masks(source: str, names: Sequence[str], images: Tensor, drawn: Samples | None) -> Tensor:
    """Where the evidence is in each image: [N, H, W] bool, of pictures named as the images or of the pack's markers.

    Raises:
        UsageError: there is no such folder or picture, its size is another one, or a pack's image has no marker.
    """
    import torch
    from PIL import Image

    from ..images.files import decoding

    if source == "marker" and not Path(source).exists():
        if drawn is None or any(marker is None for marker in drawn.markers):
            raise UsageError("masks: marker is for the pack's images, all of them with one: --marker matching, say")
        inside = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool)
        for mask, marker in zip(inside, drawn.markers, strict=True):
            assert marker is not None
            mask[marker.box] = True
        return inside
    folder, found = Path(source), []
    for name in names:
        path = folder / f"{Path(name).stem}.png"
        if not path.is_file():
            raise UsageError(f"masks: {path} is missing; expected a black and white picture for each image")
        with decoding(path), Image.open(path) as picture:
            mask = picture.convert("L")
        if mask.size != (images.shape[3], images.shape[2]):
            raise UsageError(
                f"masks: {path} is {mask.width}x{mask.height}, the images are {images.shape[3]}x{images.shape[2]}"
            )
        found.append(torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).reshape(mask.height, mask.width))
    return torch.stack(found) > 127


def _check_asked(box: BoxOptions | None, *names: str | None) -> None:
    """Refuse options of black boxes where none of these is one."""
    if not any(map(is_box, names)):
        check_box(names[0], box)


def _student(opened: Opened, surrogate: Path, methods: Sequence[str], there: Any) -> Opened:
    """The student of a black box, if one of the methods looks inside a classifier; else the box itself."""
    from ..blackbox.box import as_box
    from ..surrogate.surrogate import open_surrogate

    if (box := as_box(opened.classifier)) is None:
        raise UsageError("surrogate: of a black box; name it (--classifier model.onnx, python:module:function, ...)")
    trained = open_surrogate(surrogate)
    if trained.image_size != opened.size:
        raise UsageError(f"surrogate: it sees images of {trained.image_size} pixels; give --image-size that")
    trained.check(box)
    if not any(METHODS[name].inside for name in methods):
        return opened
    trained.students.to(there)
    return replace(opened, classifier=trained.classifier)


def looked_into(methods: Iterable[str]) -> dict[str, str]:
    """What each method looks at where a black box has a student."""
    return {name: STUDENT if METHODS[name].inside else "black box" for name in methods}


def _check_layer(layer: str | None, chosen: Sequence[str]) -> None:
    """Refuse a layer that no chosen method reads.

    Raises:
        UsageError: see above.
    """
    reads = [m.name for m in METHODS.values() if m.layer]
    if layer is not None and not set(chosen) & set(reads):
        raise UsageError(f"layer: {', '.join(chosen)} reads no layer of the classifier; it is for {', '.join(reads)}")


def explain_images(
    images: Annotated[list[Path], ImagesArgument],
    method: Annotated[str, typer.Option(help=f"{METHOD_NAMES}.")] = "lax",
    out: Annotated[Path, typer.Option(help="Folder for overlays (.png) and arrays (.safetensors).")] = Path("saliency"),
    target: Annotated[str | None, typer.Option(help="Label to explain; the prediction without it.")] = None,
    *,
    subject: Subject,
    how: Explaining,
    box: AskedBox | None,
    surrogate: SurrogateOption = None,
    resume: ResumeFlag = False,
    command: str,
) -> None:
    """Show where a classifier's evidence is, and how good that answer is: MSI and its curves, in results.jsonl.

    Example: counterlens saliency four.png --method lax --out where
    """
    from safetensors.torch import save

    from ..blackbox.reading import Unusable
    from ..images.maps import save_overlay
    from ..metrics.quantities import make_quantity
    from ..models.placing import choose_device, computing_on
    from ..outputs import Source, open_run
    from ..provenance import models_digest
    from ..saliency.explain import explain
    from ..saliency.methods import check_callable, predicted

    _check_layer(how.layer, check_methods([method]))
    _check_asked(box, subject.classifier)
    there = choose_device(how.device)
    items = open_images(images, how.recursive).samples
    box = box if surrogate is None else only_called(subject.classifier, box)
    opened = subject.open(images, how.device, box=box)
    seen = opened if surrogate is None else _student(opened, surrogate, [method], there)  # what the method looks at
    check_callable(seen.classifier, [method])
    question = make_quantity(seen.classifier, subject.quantity)
    wanted = None if target is None else find_label(target, opened.classifier.labels)
    trained = subject.adapter_of([method], seen, how.adapter)
    facts = {
        "command": command, "method": method, "target_option": target, "alpha_min": how.alpha_min, "layer": how.layer,
        **({} if surrogate is None else {"surrogate": models_digest([seen.classifier.module], seen.classifier.labels)}),
        "fit": how.fit,
        **opened.facts(question.name, trained, how.seed, there),
    }  # fmt: skip
    rows, failed = [], 0

    def explain_one(item: Sample, name: str, folder: Path) -> dict[str, Any]:
        image = opened.read(item, how.fit)[None].to(there)
        with computing_on(there):
            explained = predicted(opened.classifier, image) if wanted is None else wanted
            found = explain(
                seen.classifier, image, method, explained, pack=opened.pack, quantity=question, adapter=trained,
                alpha_min=how.alpha_min, layer=how.layer, metrics=["main", "shape"], seed=how.seed,
                forward=None if surrogate is None else opened.classifier,
            )  # fmt: skip
        picture, arrays = folder / f"{name}.png", folder / f"{name}.safetensors"
        record = {"image": item.name, "status": "done", "input_sha256": item.sha256(), **found.record(0)}
        line = run.line(name, record)
        save_overlay(found.images[0], found.saliency[0], picture, line, found.regions[0])
        maps = {"saliency": found.saliency[0].contiguous(), "scores": found.scores[0].contiguous()}
        write_atomically(arrays, save(maps, metadata={"counterlens": json.dumps(line)}))
        return record | {"path": str(picture), "arrays": str(arrays)}

    sources = [Source(item.path.stem, {"image": item.name}, item.own_file) for item in items]
    with open_run(
        out, facts, sources=sources, endings=(".png", ".safetensors"), overwrite=how.overwrite, resume=resume,
        say=errors.print,
    ) as run, asking(run, [opened.classifier], how.as_json) as boxes:  # fmt: skip
        for item, name, done in zip(items, run.names, run.done, strict=True):
            line = done
            if line is None:
                try:
                    record = explain_one(item, name, run.folder)
                except (CounterlensError, OSError) as error:
                    if isinstance(error, UsageError | Unusable):
                        raise
                    message = str(error).removeprefix(f"{item.name}: ")
                    if isinstance(error, NotFinite):
                        message = undefined(error, boxes)
                    record = {"image": item.name, "status": "failed", "error": message}
                line = run.line(name, record)
                run.append(line)
            if how.as_json:
                print_json(line)
            failed += line["status"] == "failed"
            rows.append(map_row(line))
    text_console(how.as_json).table(MAP_COLUMNS, rows)
    if failed:
        raise CounterlensError(f"{failed} of {len(items)} images failed; the others are in {out}")


def evaluate_methods(
    methods: Annotated[str, typer.Option(help=f"Names, such as a,b: {METHOD_NAMES}.")] = "lax,ig,gradcam",
    out: Annotated[Path, typer.Option(help="Folder for table, curves and pictures.")] = Path("evaluation"),
    *,
    subject: Subject,
    images: ImagesOption = None,
    split: Annotated[str, typer.Option(help="Of the pack: train, validation or test.")] = "test",
    count: Annotated[int | None, typer.Option(help="How many of the pack's images; all without it.", min=1)] = None,
    marker: Annotated[
        str, typer.Option(help="On the pack's images: none, random, matching or conflicting.")
    ] = "random",
    metrics: MetricsOption = "main,shape",
    judge: JudgeOption = None,
    masks: MasksOption = None,
    runtime: ForwardOption = "eager",
    how: Explaining,
    box: AskedBox | None,
    surrogate: SurrogateOption = None,
    command: str,
) -> None:
    """Compare saliency methods on the same images.

    Writes summary.json (means with 95 % intervals, and which scores are brittle: they get worse by more than 0.1
    when the map is moved by one pixel), scores.parquet (per image), curves.png and methods.png.

    With --surrogate, methods that look inside a classifier look into the student of a black box; the box gives all
    labels and scores.

    Example: counterlens evaluate --methods lax,ig,gradcam --count 50 --judge judge --metrics main,judge --out compared
    """
    from ..images.maps import check_charts
    from ..metrics.table import METRICS, check_metrics
    from ..models.placing import choose_device, computing_on
    from ..outputs import open_run
    from ..provenance import models_digest
    from ..runtime.forward import forward_by
    from ..saliency.evaluation import evaluate, write_parquet
    from ..saliency.methods import check_callable

    chosen = check_methods([name.strip() for name in methods.split(",")])
    _check_layer(how.layer, chosen)
    _check_asked(box, subject.classifier, judge)
    given = {"judge": judge, "masks": masks, "stability": True}
    measured = check_metrics([name.strip() for name in metrics.split(",")], [g for g, there in given.items() if there])
    for group in ("judge", "masks"):
        if given[group] and not any(METRICS[name].group == group for name in measured):
            raise UsageError(f"{group}: no metric of this run asks it; give --metrics {metrics},{group}")
    check_charts()
    there = choose_device(how.device)
    box = box if surrogate is None else only_called(subject.classifier, box)
    opened = subject.open(images, how.device, box=box)
    seen = opened if surrogate is None else _student(opened, surrogate, chosen, there)  # what methods look into
    check_callable(seen.classifier, chosen)
    if images is not None:
        names, shown, failed = load(images, opened, how.recursive, how.fit)
    else:
        assert opened.pack is not None  # any other classifier comes with images
        failed, drawn = 0, opened.pack.samples(split, count=count, marker=marker)
        shown = drawn.images
        names = [f"{split}-{i:04d}-{label}" for i, label in zip(drawn.ids, drawn.labels, strict=True)]
    second = None if judge is None else subject.judge(judge, images, how.device, box)
    inside = None if masks is None else read_masks(masks, names, shown, None if images is not None else drawn)
    trained = subject.adapter_of(chosen, seen, how.adapter)
    forward = forward_by(runtime, opened.classifier, opened.size, shown)
    facts = {
        "command": command, "methods": chosen, "images": None if images is None else str(images), "split": split,
        "count": count, "marker": marker, "fit": how.fit, "shown": len(shown),
        "alpha_min": how.alpha_min, "layer": how.layer,
        "metrics": measured, "judge": judge, "masks": masks, "runtime_option": runtime,
        **({} if surrogate is None else {"surrogate": models_digest([seen.classifier.module], seen.classifier.labels)}),
        **opened.facts(subject.quantity, trained, how.seed, there), "runtime": runtime,
    }  # fmt: skip
    with (
        open_run(out, facts, files=EVALUATED, inputs=[images] if images else [], overwrite=how.overwrite) as run,
        asking(run, [opened.classifier, second], how.as_json) as boxes,
    ):
        rest, lost = list(range(len(shown))), dict[str, str]()
        with progress_bar("methods", len(chosen)) as progress, computing_on(there):

            def show(name: str) -> None:
                progress.update(progress.task_ids[0], description=name, completed=chosen.index(name) + 1)

            while True:  # methods are compared on the same images: one that fails on any method is left out of all
                try:
                    scored = evaluate(
                        opened.classifier, shown[rest].to(there), chosen, pack=opened.pack, quantity=subject.quantity,
                        adapter=trained, forward=forward, alpha_min=how.alpha_min, layer=how.layer, seed=how.seed,
                        metrics=measured, judge=second, masks=None if inside is None else inside[rest], on_method=show,
                        inside=None if surrogate is None else seen.classifier,
                    )  # fmt: skip
                    break
                except NotFinite as error:
                    for name in (names[rest[k]] for k in error.samples):
                        lost[name] = undefined(error, boxes)
                        errors.print(f"error: {name}: {lost[name]}", style="red")
                    rest = [i for k, i in enumerate(rest) if k not in error.samples]
                    if not rest:
                        raise
        failed += len(lost)
        write_parquet(scored, [names[i] for i in rest], opened.classifier.labels, out / "scores.parquet", lost)
        _show_evaluation(scored, out, facts, how.as_json, boxes, {} if surrogate is None else looked_into(scored))
    files = ", ".join(f"{out / name}" for name in EVALUATED)
    text_console(how.as_json).print(f"{len(rest)} images; {files}")
    if failed:
        raise CounterlensError(f"{failed} of {len(rest) + failed} images failed; the others are compared")


def _show_evaluation(
    scored: dict[str, Explanations], out: Path, facts: dict[str, Any], as_json: bool, boxes: Sequence[BlackBox],
    seen: dict[str, str],
) -> None:  # fmt: skip
    """Write summary.json, curves.png and methods.png, and print the table; `seen` is what each method looked at."""
    from ..images.files import write_png
    from ..images.maps import draw_charts, draw_methods
    from ..metrics.table import METRICS
    from ..saliency.evaluation import summarise
    from ..saliency.methods import minmax

    first = next(iter(scored.values()))
    captions = [first.labels[int(t)] for t in first.target[:SHOWN]]
    notes = {name: [f"MSI {v:.2f}" for v in s.msi.score[:SHOWN].tolist()] for name, s in scored.items()}
    maps = {name: minmax(s.saliency[:SHOWN]) for name, s in scored.items()}
    regions = {name: s.regions[:SHOWN] for name, s in scored.items()}
    write_png(draw_methods(first.images[:SHOWN], captions, maps, notes, regions), out / "methods.png", facts)
    charts = [
        (*METRICS[metric].axes, {name: s.curves[metric] for name, s in scored.items()}) for metric in first.curves
    ]
    draw_charts(charts, out / "curves.png")
    summary, console = summarise(scored), text_console(as_json)
    for name, what in seen.items():
        summary[name]["looked_at"] = what
    for group in GROUPS:
        shown = [name for name in first.values if METRICS[name].group == group]
        rows = []
        for name, row in summary.items():
            cells = [f"{row[m]['mean']:.3f} ({row[m]['low']:.3f} to {row[m]['high']:.3f})" for m in shown]
            rows.append([name, *cells, *([f"{row['ms_per_image']:.2f}"] if group == "main" else [])])
        if shown:
            headings = [METRICS[metric].arrow for metric in shown]
            console.table(["method", *headings, *(["ms"] if group == "main" else [])], rows, title=group)
    for name, row in summary.items():
        if as_json:
            print_json({"method": name, **row})
        if lost := ", ".join(f"{METRICS[m].heading} gets worse by {by:.2f}" for m, by in row["brittle"].items()):
            console.print(f"{name} is brittle: moved by one pixel, its {lost}", style="yellow")
    if students := [name for name, what in seen.items() if what == STUDENT]:
        console.print(f"{', '.join(students)} looked at the student; all labels and scores are the black box's")
    queries = {"queries": [box.record() for box in boxes]} if boxes else {}
    write_atomically(out / "summary.json", json.dumps(summary | queries, indent=1) + "\n")


def register(parent: typer.Typer) -> None:
    """Add `saliency` and `evaluate` to the command line."""
    parent.command("saliency")(with_options(explain_images, command="counterlens saliency"))
    parent.command("evaluate")(with_options(evaluate_methods, command="counterlens evaluate"))
