"""`counterlens adapter train|explain|evaluate`, `counterlens saliency` and `counterlens evaluate`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CounterlensError, NotFinite, UsageError
from ..files import write_atomically
from ..labels import find_label
from .options import (
    MAP_COLUMNS,
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

    from ..images.sources import Sample
    from ..models.protocols import Classifier
    from ..saliency.lax import LAX

ClassifierOption = Annotated[
    str, typer.Option(help="Of the pack; with --images also a folder, hub id or torchvision:NAME.")
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

        return load_alpha_min(str(text))
    if not 0 <= value <= 1:
        raise UsageError(f"alpha-min: expected a number in [0, 1] or a calibration.json, got {text}")
    return value


AlphaOption = Annotated[
    float,
    typer.Option(
        help="Lowest threshold of MSI, or the calibration.json of metrics calibrate.", parser=_alpha,
        metavar="NUMBER|FILE",
    ),
]  # fmt: skip
MarkerOption = Annotated[str, typer.Option(help="On the pack's images: none, random, matching or conflicting.")]
LayerOption = Annotated[str | None, typer.Option(help="Of gradcam; the last maps without it.")]
METHODS = "lax, gradxinput, ig, smoothgrad, gradcam, occlusion, ablation, rise"
COMPILED = ("adapter.onnx", "curve.onnx")
EVALUATED = ("summary.json", "scores.parquet", "curves.png", "methods.png")
SHOWN = 8  # images in the picture of methods

app = typer.Typer(no_args_is_help=True, help="Train LAX on a frozen classifier, and use it.")


def register(parent: typer.Typer) -> None:
    """Add `adapter`, `saliency` and `evaluate` to the command line."""
    parent.add_typer(app, name="adapter")
    parent.command()(saliency)
    parent.command()(evaluate)


def _open(
    pack: str, classifier: str, own: Path | None, labels: str | None, size: int | None, device: str = "cpu",
    option: str = "--images",
) -> tuple[Any, Classifier, int, Any]:  # fmt: skip
    """(the pack or None, the classifier, its image size, what hides pixels); `own` is what the option was given."""
    from ..images.collect import read_names
    from ..models.placing import choose_device
    from ..packs import Pack

    there = choose_device(device)
    opened = Pack(pack)
    if classifier in opened.classifier_names():
        for name, value in (("labels", labels), ("image-size", size)):
            if value is not None:
                raise UsageError(f"{name}: the pack's {classifier!r} has its own; give it with another classifier")
        explained = opened.classifier(classifier)
        explained.module.to(there)
        return opened, explained, 32, opened.mean_colour
    if own is None:
        known = ", ".join(opened.classifier_names())
        raise UsageError(f"classifier: {classifier!r} is not in pack {pack!r} ({known}); another one needs {option}")
    from ..models.image_classifiers import open_classifier

    names, size = read_names(labels) if labels else None, size or 224
    described = open_classifier(classifier, image_size=size, labels=names)
    described.module.to(there)
    return None, described, size, "blur"


def _load(source: Path, size: int, recursive: bool) -> tuple[list[str], Tensor, int]:
    """Names and images [N, 3, size, size] of a source, and how many could not be read, which is said."""
    import torch

    names, images, failed = load_all(open_images([source], recursive).samples, size)
    return names, torch.stack(images), failed


def _adapter(pack: Any, name: str, classifier: Classifier, quantity: str, folder: Path | None) -> LAX:
    from ..saliency.lax import open_adapter
    from ..saliency.packed import pack_adapter

    if folder is not None:
        return open_adapter(folder, classifier)
    if pack is None:
        raise UsageError("adapter: this classifier is not a pack's; give the folder that adapter train wrote")
    return pack_adapter(pack, name, classifier, quantity)


def open_classifier_and_adapter(
    pack: str, classifier: str, quantity: str, adapter: Path | None, labels: str | None, image_size: int | None
) -> tuple[Any, LAX, int, Any]:
    """(the pack or None, the adapter with its classifier, the image size, what hides pixels), on the CPU."""
    opened, explained, size, baseline = _open(pack, classifier, adapter, labels, image_size, option="--adapter")
    return opened, _adapter(opened, classifier, explained, quantity, adapter), size, baseline


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, its checkpoint and loss.png.")] = Path("adapter"),
    pack: PackOption = "digits",
    classifier: ClassifierOption = "clean",
    quantity: QuantityOption = "class",
    images: ImagesOption = None,
    validation: Annotated[Path | None, typer.Option(help="Images that training does not see, like --images.")] = None,
    recursive: RecursiveOption = False,
    labels: LabelsOption = None,
    image_size: SizeOption = None,
    taps: Annotated[
        str | None, typer.Option(help="Names of modules, a,b,c; pixels: none. Without it, one for each resolution.")
    ] = None,
    baselines: Annotated[
        str | None, typer.Option(help="What hides pixels: some of mean, blur, colour, noise, image.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser, at most.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Images in a step.", min=1)] = None,
    forward_batch: Annotated[int | None, typer.Option(help="Perturbed images in one pass: memory.", min=2)] = None,
    alpha_min: Annotated[float | None, typer.Option(help="Lowest threshold; the recipe's without it.")] = None,
    area: Annotated[float | None, typer.Option(help="Weight of the marked area.", min=0)] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Train a LAX adapter for a frozen classifier, which must be differentiable; it is not changed.

    Interrupted, the same command goes on from its checkpoint. Training stops early on the validation images: on their
    MSI, and with the pack's and the general recipe, on the sum of MSI and BaseScore_area.

    The pack's recipe for labels takes over an hour on one core; --steps 1000 is a tenth of that and most of the way.

    Example: counterlens adapter train --pack digits --classifier shortcut --out my-adapter
    """
    from ..images.files import make_folder
    from ..models.placing import choose_device, computing_on
    from ..saliency.recipes import pack_images, schedule_for, taps_for, train_adapter

    opened, explained, size, _ = _open(pack, classifier, images, labels, image_size, device)
    packed = classifier if opened else None
    chosen = schedule_for(
        packed, quantity, steps=steps, batch=batch, forward_batch=forward_batch,
        alpha_min=alpha_min, area=area, baselines=tuple(baselines.split(",")) if baselines else None, seed=seed,
    )  # fmt: skip
    if images is not None:
        if validation is None:
            raise UsageError(
                "validation: needed beside --images; early stopping looks at images that training does not"
            )
        (_, shown, failed), (_, held, more) = _load(images, size, recursive), _load(validation, size, recursive)
        failed += more
        colour = shown.mean((0, 2, 3))
    else:
        failed, (shown, held) = 0, pack_images(opened, chosen, quantity)
        colour = opened.mean_colour
    there = choose_device(device)
    shown, held = shown.to(there), held.to(there)
    out = make_folder(out)
    named = taps_for(packed, quantity) if taps is None else [] if taps == "pixels" else taps.split(",")
    command = {"classifier": classifier, "pack": opened.name if opened else None}
    with progress_bar("training", chosen.steps) as progress:

        def show(step: int, total: int, loss: float, best: float) -> None:
            text = f"loss {loss:.3f}, best score {best:.3f}"
            progress.update(progress.task_ids[0], completed=step, total=total, description=text)

        with computing_on(there):
            adapter, history = train_adapter(
                explained, shown, held, chosen, quantity=quantity, taps=named, colour=colour, out=out, on_step=show,
                described=command,
            )  # fmt: skip
    validated = adapter.training["validation"]
    record = {
        "out": str(out), "taps": adapter.taps, "quantity": adapter.quantity.name, "steps": len(history.losses),
        "parameters": sum(p.numel() for p in adapter.head.parameters()),
        **{f"validation_{name}": value for name, value in validated.items()},
    }  # fmt: skip
    if as_json:
        print_json(record)
    scores = ", ".join(f"{'MSI' if name == 'msi' else 'BaseScore_area'} {v:.3f}" for name, v in validated.items())
    text_console(as_json).print(
        f"{record['steps']} steps, validation {scores}; {record['parameters']} parameters on "
        f"{', '.join(adapter.taps) or 'pixels'}; adapter and loss.png in {out}"
    )
    if failed:
        raise CounterlensError(f"{failed} images could not be read; the adapter was trained on the others")


@app.command()
def export(
    out: Annotated[Path | None, typer.Option(help="Folder for a copy: adapter.onnx and curve.onnx.")] = None,
    pack: PackOption = "digits",
    classifier: ClassifierOption = "clean",
    quantity: QuantityOption = "class",
    adapter: AdapterOption = None,
    alpha_min: AlphaOption = 0.5,
    steps: Annotated[int, typer.Option(help="Thresholds of the curve.", min=1)] = 16,
    store: Annotated[Path | None, typer.Option(help="Store of artefacts; the user's cache without it.")] = None,
    force: Annotated[bool, typer.Option(help="Build again, even if the store has it.")] = False,
    labels: LabelsOption = None,
    image_size: SizeOption = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Compile an adapter, its frozen model included, and the perturbation curve of MSI to ONNX, checked against eager.

    adapter.onnx takes image and target and gives saliency, scores and logits. curve.onnx takes image, baseline,
    saliency and target and gives the probability of what is kept and of what is left at each threshold: [B, 2, K].

    Example: counterlens adapter export --classifier shortcut --out compiled
    """
    from counterlens.export.store import Store

    from ..outputs import open_run
    from ..runtime.onnxruntime import FILE
    from ..saliency.onnx import build_artefacts

    opened, trained, size, _ = open_classifier_and_adapter(pack, classifier, quantity, adapter, labels, image_size)
    console = text_console(as_json)
    facts = {
        "command": "counterlens adapter export", "alpha_min": alpha_min, "steps": steps,
        **describe(opened, classifier, trained.classifier, size, quantity, trained, 0, None),
    }  # fmt: skip
    with nullcontext() if out is None else open_run(out, facts, files=COMPILED, overwrite=overwrite) as run:
        with progress_bar("exporting"):
            built = build_artefacts(trained, Store(store), alpha_min=alpha_min, steps=steps, force=force)
        for what, artefact in built.items():
            path = artefact.file(FILE)
            if run is not None:
                path = run.folder / f"{what}.onnx"
                write_atomically(path, artefact.file(FILE).read_bytes())
            if as_json:
                print_json({**artefact.report, "path": str(path)})
            parity = artefact.report["parity"]
            console.print(f"{what}: worst error {parity['worst']:.1e} (allowed {parity['tolerance']:g}); {path}")


def _saliency(
    images: list[Path], recursive: bool, method: str, out: Path, pack: str, classifier: str, quantity: str,
    adapter: Path | None, target: str | None, labels: str | None, image_size: int | None, alpha_min: float,
    layer: str | None, device: str, overwrite: bool, resume: bool, seed: int, as_json: bool, command: str,
) -> None:  # fmt: skip
    """Overlay PNG, arrays and a line of results.jsonl for each image; a file that cannot be read is reported."""
    import torch
    from safetensors.torch import save

    from ..images.maps import save_overlay
    from ..metrics.quantities import make_quantity
    from ..models.placing import choose_device, computing_on
    from ..outputs import Source, open_run
    from ..saliency.evaluation import score_maps
    from ..saliency.methods import check_methods, explain_with, predicted

    check_methods([method])
    there = choose_device(device)
    items = open_images(images, recursive).samples
    opened, explained, size, baseline = _open(pack, classifier, images[0], labels, image_size, device)
    question = make_quantity(explained, quantity)
    wanted = None
    if target is not None:
        wanted = find_label(target, explained.labels)
    trained = _adapter(opened, classifier, explained, quantity, adapter) if method == "lax" else None
    facts = {
        "command": command, "method": method, "target_option": target, "alpha_min": alpha_min, "layer": layer,
        **describe(opened, classifier, explained, size, question.name, trained, seed, there),
    }  # fmt: skip
    console = text_console(as_json)
    rows = []
    failed = 0

    def explain_one(item: Sample, name: str, folder: Path) -> dict[str, Any]:
        image = item.load(size)[None].to(there)
        with computing_on(there):
            label = predicted(explained, image) if wanted is None else torch.tensor([wanted], device=there)
            saliency, scores = explain_with(
                method, explained, image, label, quantity=question, baseline=baseline, adapter=trained, layer=layer,
                seed=seed,
            )  # fmt: skip
            scored = score_maps(
                explained, image, saliency, scores, label, question, alpha_min=alpha_min, baseline=baseline
            )
        curves = scored.msi.curves
        assert curves.keep is not None
        assert curves.remove is not None
        picture, arrays = folder / f"{name}.png", folder / f"{name}.safetensors"
        record = {
            "image": item.name, "status": "done", "input_sha256": item.sha256(), "method": method,
            "target": explained.labels[int(label)], "probability": round(curves.full[0].item(), 6),
            **{k: round(v[0].item(), 6) for k, v in scored.values.items()},
            "thresholds": [round(v, 6) for v in curves.abscissae[0].tolist()],
            "keep": [round(v, 6) for v in curves.keep[0].tolist()],
            "remove": [round(v, 6) for v in curves.remove[0].tolist()],
        }  # fmt: skip
        line = run.line(name, record)
        save_overlay(image[0], saliency[0], picture, line)
        maps = {"saliency": saliency[0].cpu().contiguous(), "scores": scores[0].cpu().contiguous()}
        write_atomically(arrays, save(maps, metadata={"counterlens": json.dumps(line)}))
        return record | {"path": str(picture), "arrays": str(arrays)}

    sources = [Source(item.path.stem, {"image": item.name}, item.own_file) for item in items]
    with open_run(
        out, facts, sources=sources, endings=(".png", ".safetensors"), overwrite=overwrite, resume=resume,
        say=errors.print,
    ) as run:  # fmt: skip
        for item, name, done in zip(items, run.names, run.done, strict=True):
            line = done
            if line is None:
                try:
                    record = explain_one(item, name, run.folder)
                except (CounterlensError, OSError) as error:
                    if isinstance(error, UsageError):
                        raise
                    message = str(error).removeprefix(f"{item.name}: ")
                    if isinstance(error, NotFinite):
                        message = f"{error.what}: NaN or infinity for this image"
                    record = {"image": item.name, "status": "failed", "error": message}
                line = run.line(name, record)
                run.append(line)
            if as_json:
                print_json(line)
            failed += line["status"] == "failed"
            rows.append(map_row(line))
    console.table(MAP_COLUMNS, rows)
    if failed:
        raise CounterlensError(f"{failed} of {len(items)} images failed; the others are in {out}")


def describe(
    pack: Any, name: str, classifier: Classifier, size: int, quantity: str, adapter: LAX | None, seed: int, there: Any
) -> dict[str, Any]:
    """What makes maps of this classifier, and the session."""
    from ..provenance import models_digest, session

    return {
        "pack": pack.name if pack else None, "classifier": name, "image_size": size, "quantity": quantity,
        "weights": models_digest([classifier.module], classifier.labels),
        "adapter": None if adapter is None else models_digest([adapter.head], adapter.taps), "seed": seed,
        "runtime": "eager", **session(there),
    }  # fmt: skip


def saliency(
    images: Annotated[list[Path], ImagesArgument],
    method: Annotated[str, typer.Option(help=f"One of {METHODS}.")] = "lax",
    out: Annotated[Path, typer.Option(help="Folder for overlays (.png) and arrays (.safetensors).")] = Path("saliency"),
    target: Annotated[str | None, typer.Option(help="Label to explain; the prediction without it.")] = None,
    recursive: RecursiveOption = False,
    pack: PackOption = "digits",
    classifier: ClassifierOption = "clean",
    quantity: QuantityOption = "class",
    adapter: AdapterOption = None,
    labels: LabelsOption = None,
    image_size: SizeOption = None,
    alpha_min: AlphaOption = 0.5,
    layer: LayerOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteFlag = False,
    resume: ResumeFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Show where a classifier's evidence is, and how good that answer is: MSI and its curves, in results.jsonl.

    Example: counterlens saliency four.png --method lax --out where
    """
    _saliency(
        images, recursive, method, out, pack, classifier, quantity, adapter, target, labels, image_size, alpha_min,
        layer, device, overwrite, resume, seed, as_json, "counterlens saliency",
    )  # fmt: skip


@app.command()
def explain(
    images: Annotated[list[Path], ImagesArgument],
    out: Annotated[Path, typer.Option(help="Folder for overlays (.png) and arrays (.safetensors).")] = Path("saliency"),
    target: Annotated[str | None, typer.Option(help="Label to explain; the prediction without it.")] = None,
    recursive: RecursiveOption = False,
    pack: PackOption = "digits",
    classifier: ClassifierOption = "clean",
    quantity: QuantityOption = "class",
    adapter: AdapterOption = None,
    labels: LabelsOption = None,
    image_size: SizeOption = None,
    alpha_min: AlphaOption = 0.5,
    device: DeviceOption = "auto",
    overwrite: OverwriteFlag = False,
    resume: ResumeFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Explain images with a trained adapter, in one pass of the classifier and a little more.

    Example: counterlens adapter explain four.png --classifier shortcut --out where
    """
    _saliency(
        images, recursive, "lax", out, pack, classifier, quantity, adapter, target, labels, image_size, alpha_min, None,
        device, overwrite, resume, seed, as_json, "counterlens adapter explain",
    )  # fmt: skip


def _evaluate(
    methods: str, out: Path, pack: str, classifier: str, quantity: str, adapter: Path | None, images: Path | None,
    recursive: bool, labels: str | None, image_size: int | None, split: str, count: int | None, marker: str,
    alpha_min: float, layer: str | None, runtime: str, device: str, overwrite: bool, seed: int, as_json: bool,
    command: str,
) -> None:  # fmt: skip
    from ..images.files import write_png
    from ..images.maps import check_charts, draw_charts, draw_methods
    from ..models.placing import choose_device, computing_on
    from ..outputs import open_run
    from ..runtime.forward import forward_by
    from ..saliency.evaluation import METRICS, summarise, write_parquet
    from ..saliency.evaluation import evaluate as compare
    from ..saliency.methods import check_methods, minmax

    chosen = check_methods([name.strip() for name in methods.split(",")])
    check_charts()
    there = choose_device(device)
    opened, explained, size, baseline = _open(pack, classifier, images, labels, image_size, device)
    if images is not None:
        names, shown, failed = _load(images, size, recursive)
        ids = list(range(len(names)))
    else:
        failed, drawn = 0, opened.samples(split, count=count, marker=marker)
        shown, ids = drawn.images, drawn.ids
        names = [f"{split}-{i:04d}-{label}" for i, label in zip(drawn.ids, drawn.labels, strict=True)]
    trained = _adapter(opened, classifier, explained, quantity, adapter) if "lax" in chosen else None
    forward = forward_by(runtime, explained, size, shown)
    facts = {
        "command": command, "methods": chosen, "images": None if images is None else str(images), "split": split,
        "count": count, "marker": marker, "shown": len(shown), "alpha_min": alpha_min, "layer": layer,
        "runtime_option": runtime, **describe(opened, classifier, explained, size, quantity, trained, seed, there),
        "runtime": runtime,
    }  # fmt: skip
    with open_run(out, facts, files=EVALUATED, inputs=[images] if images else [], overwrite=overwrite):
        rest, lost = list(range(len(shown))), dict[str, str]()
        with progress_bar("methods", len(chosen)) as progress, computing_on(there):

            def show(name: str) -> None:
                progress.update(progress.task_ids[0], description=name, completed=chosen.index(name) + 1)

            while True:  # methods are compared on the same images: one that fails on any method is left out of all
                try:
                    scored = compare(
                        explained, shown[rest].to(there), chosen, quantity=quantity, adapter=trained, forward=forward,
                        alpha_min=alpha_min, baseline=baseline, layer=layer, seed=seed, seeds=[ids[i] for i in rest],
                        on_method=show,
                    )  # fmt: skip
                    break
                except NotFinite as error:
                    for name in (names[rest[k]] for k in error.samples):
                        lost[name] = f"{error.what}: NaN or infinity for this image"
                        errors.print(f"error: {name}: {lost[name]}", style="red")
                    rest = [i for k, i in enumerate(rest) if k not in error.samples]
                    if not rest:
                        raise
        summary, failed = summarise(scored), failed + len(lost)
        shown, names = shown[rest], [names[i] for i in rest]
        write_parquet(scored, names, explained.labels, out / "scores.parquet", lost)
        first = next(iter(scored.values()))
        captions = [explained.labels[int(t)] for t in first.target[:SHOWN]]
        notes = {name: [f"MSI {v:.2f}" for v in s.values["msi"][:SHOWN].tolist()] for name, s in scored.items()}
        maps = {name: minmax(s.saliency[:SHOWN]).cpu() for name, s in scored.items()}
        write_png(draw_methods(shown[:SHOWN], captions, maps, notes), out / "methods.png", facts)
        lines: dict[str, dict[str, Any]] = {"keep": {}, "remove": {}, "msi": {}}
        for name, s in scored.items():
            assert s.msi.curves.keep is not None
            assert s.msi.curves.remove is not None
            lines["keep"][name] = (s.inserted.shares.tolist(), s.inserted.values.mean(0).tolist())
            lines["remove"][name] = (s.removed.shares.tolist(), s.removed.values.mean(0).tolist())
            difference = (s.msi.curves.keep - s.msi.curves.remove).mean(0)
            lines["msi"][name] = (s.msi.curves.abscissae.mean(0).tolist(), difference.tolist())
        charts = [
            ("most salient pixels shown", "share shown", "probability", lines["keep"]),
            ("most salient pixels hidden", "share hidden", "probability", lines["remove"]),
            ("MSI", "threshold", "Ins - Del", lines["msi"]),
        ]
        draw_charts(charts, out / "curves.png")
        rows = []
        for name, row in summary.items():
            cells = [f"{row[m]['mean']:.3f} ({row[m]['low']:.3f} to {row[m]['high']:.3f})" for m in METRICS]
            rows.append([name, *cells, f"{100 * row['mask_area']['mean']:.1f} %", f"{row['ms_per_image']:.2f}"])
            if as_json:
                print_json({"method": name, **row})
        console = text_console(as_json)
        console.table(["method", *METRICS, "marked", "ms"], rows)
        write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    files = ", ".join(f"{out / name}" for name in EVALUATED)
    console.print(f"{len(shown)} images; {files}")
    if failed:
        raise CounterlensError(f"{failed} of {len(shown) + failed} images failed; the others are compared")


CountOption = Annotated[int | None, typer.Option(help="How many of the pack's images; all without it.", min=1)]
SplitOption = Annotated[str, typer.Option(help="Of the pack: train, validation or test.")]


def evaluate(
    methods: Annotated[str, typer.Option(help=f"Some of {METHODS}.")] = "lax,ig,gradcam",
    out: Annotated[Path, typer.Option(help="Folder for table, curves and pictures.")] = Path("evaluation"),
    pack: PackOption = "digits",
    classifier: ClassifierOption = "clean",
    quantity: QuantityOption = "class",
    adapter: AdapterOption = None,
    images: ImagesOption = None,
    recursive: RecursiveOption = False,
    labels: LabelsOption = None,
    image_size: SizeOption = None,
    split: SplitOption = "test",
    count: CountOption = None,
    marker: MarkerOption = "random",
    alpha_min: AlphaOption = 0.5,
    layer: LayerOption = None,
    runtime: ForwardOption = "eager",
    device: DeviceOption = "auto",
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Compare saliency methods on the same images.

    Writes summary.json (means with 95 % intervals), scores.parquet (per image), curves.png and methods.png.

    Example: counterlens evaluate --methods lax,ig,gradcam --count 50 --out compared
    """
    _evaluate(
        methods, out, pack, classifier, quantity, adapter, images, recursive, labels, image_size, split, count, marker,
        alpha_min, layer, runtime, device, overwrite, seed, as_json, "counterlens evaluate",
    )  # fmt: skip


@app.command("evaluate")
def evaluate_adapter(
    out: Annotated[Path, typer.Option(help="Folder for table, curves and pictures.")] = Path("evaluation"),
    pack: PackOption = "digits",
    classifier: ClassifierOption = "clean",
    quantity: QuantityOption = "class",
    adapter: AdapterOption = None,
    images: ImagesOption = None,
    recursive: RecursiveOption = False,
    labels: LabelsOption = None,
    image_size: SizeOption = None,
    split: SplitOption = "test",
    count: CountOption = None,
    marker: MarkerOption = "random",
    alpha_min: AlphaOption = 0.5,
    runtime: ForwardOption = "eager",
    device: DeviceOption = "auto",
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Score a trained adapter alone, as `counterlens evaluate` scores methods.

    Example: counterlens adapter evaluate --adapter my-adapter --count 50 --out scored
    """
    _evaluate(
        "lax", out, pack, classifier, quantity, adapter, images, recursive, labels, image_size, split, count, marker,
        alpha_min, None, runtime, device, overwrite, seed, as_json, "counterlens adapter evaluate",
    )  # fmt: skip
