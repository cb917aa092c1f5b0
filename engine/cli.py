"""The command line; larger commands live in the `cli.py` of their packages."""

from __future__ import annotations

import csv
import io
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from typer.core import TyperCommand

from counterlens.export.errors import ExportError

from .adapter.cli import register as register_adapter
from .audit import cli as _audit
from .errors import CounterlensError, UsageError
from .files import write_atomically
from .metrics import cli as _metrics
from .options import (
    COUNTERFACTUAL_COLUMNS,
    RUNTIMES,
    ClassesOption,
    ClassifierOption,
    DeviceOption,
    DistanceOption,
    GuidanceDecoderOption,
    HeadOption,
    ImagesArgument,
    ImageSizeOption,
    JsonFlag,
    LabelsOption,
    MatchOfficialFlag,
    ModelOption,
    OverwriteFlag,
    PackOption,
    PromptsOption,
    RecursiveOption,
    ResumeFlag,
    SeedOption,
    SpeedOption,
    UnusedSeedOption,
    WeightsOption,
    counterfactual_row,
    errors,
    open_engine,
    open_images,
    print_json,
    progress_bar,
    saving_options,
    source_fields,
    text_console,
)
from .portable.cli import register as register_portable
from .profiling import cli as _profiling
from .terminal import StreamError, Terminated, safe_streams, stopping

if TYPE_CHECKING:
    from .audit.sources import Sample
    from .engine import Engine
    from .outputs import Run

# torch, diffusers and everything that needs them are imported inside the commands: --help must answer at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

BATCH = 16


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        found = []
        for package in ("counterlens", "torch", "diffusers", "onnxruntime", "onnxruntime-gpu"):
            with suppress(PackageNotFoundError):
                found.append(f"{package} {version(package)}")
        text_console(as_json=False).print(", ".join([*found, f"Python {sys.version.split()[0]}"]))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Say the versions.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Show what would have to change in an image for a model to change its mind."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("counterlens-demo"),
    count: Annotated[int, typer.Option(help="How many test digits.", min=1, max=20)] = 10,
    seed: SeedOption = 0,
    pack: PackOption = "digits",
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Explain two classifiers of the digits pack, one honest and one with a planted shortcut.

    Each test digit carries a coloured marker. `clean` ignores it; `shortcut` was trained where a marker in the top-left
    corner means "5 or more" and one in the bottom-right corner "less than 5". The targets lie across that boundary.

    Example: counterlens demo --out /tmp/demo
    """
    from .drawing import draw_strips
    from .images import write_png
    from .outputs import open_run
    from .provenance import pack_facts

    path = out / "counterfactuals.png"
    facts = {"command": "counterlens demo", "count": count, "seed": seed, **pack_facts(pack)}
    with open_run(out, facts, files=[path.name], overwrite=overwrite):
        from .demo import run_demo

        with progress_bar("demo") as progress:
            task = progress.task_ids[0]
            parts = run_demo(pack, count, seed, lambda i, n: progress.update(task, completed=i, total=n))
        write_png(draw_strips([p.strip for p in parts]), path, facts)
    console = text_console(as_json)
    rows = []
    for p in parts:
        s = p.summary
        rows.append([
            f"{p.classifier}, {p.mode}", str(s["images"]), f"{s['flip_rate']:.0%}", f"{s['transfer_rate']:.0%}",
            f"{s['l1_mean']:.3f}", f"{s['touched_rate']:.0%}",
        ])  # fmt: skip
    console.table(["explained", "images", "flipped", "judge agrees", "L1", "marker touched"], rows)
    console.print(
        "`clean` changes its mind when the digit changes; `shortcut` when the marker does. The 45 degree filter of "
        "mode realistic hides part of that, because the generator knows that the marker means nothing; mode audit "
        "shows it."
    )
    seconds = sum(p.summary["seconds_per_image"] for p in parts) / len(parts)
    console.print(f"{seconds:.2f} seconds for each counterfactual; pictures: {path}")
    if as_json:
        for p in parts:
            for record in p.records:
                print_json({"classifier": p.classifier, "mode": p.mode, **record})
        artifacts = [str(path)]
        first = parts[0].summary
        by_part = {f"{p.classifier}/{p.mode}": p.summary for p in parts}
        print_json({**first, "artifacts": artifacts, "parts": by_part})
    failed = sum(p.summary["failed"] for p in parts)
    if failed:
        raise CounterlensError(f"{failed} counterfactuals failed; --json names them")


@app.command()
def counterfactual(
    images: Annotated[list[Path] | None, ImagesArgument] = None,
    target: Annotated[
        str, typer.Option(help="Label, runner-up (second choice), opposite (of two) or neighbour (--neighbours).")
    ] = "runner-up",
    out: Annotated[Path, typer.Option(help="Folder for the counterfactuals.")] = Path("counterfactuals"),
    mode: Annotated[str | None, typer.Option(help="official, realistic (default) or audit.")] = None,
    pack: PackOption = "digits",
    classifier: ClassifierOption = None,
    model: ModelOption = None,
    labels: LabelsOption = None,
    prompts: PromptsOption = None,
    classes: ClassesOption = None,
    head: HeadOption = None,
    weights: WeightsOption = None,
    manifest: Annotated[Path | None, typer.Option(help="Table with the columns image and target.")] = None,
    recursive: RecursiveOption = False,
    neighbours: Annotated[Path | None, typer.Option(help="Nearest labels: JSON, or CSV label,nearest,...")] = None,
    image_size: ImageSizeOption = None,
    dtype: Annotated[str | None, typer.Option(help="Of the model's weights: float32, bfloat16 or float16.")] = None,
    device: DeviceOption = "auto",
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, more time.")] = False,
    memory_budget: Annotated[float | None, typer.Option(help="GB; the largest batch that fits is used.")] = None,
    runtime: Annotated[str, typer.Option(help=f"{RUNTIMES}.")] = "auto",
    attention: Annotated[str, typer.Option(help="Of UNet and VAE: sdpa, or xformers (CUDA).")] = "sdpa",
    preset: Annotated[str | None, typer.Option(help="A published setting, such as pairs-class.")] = None,
    steps: Annotated[int | None, typer.Option(help="DDIM steps over the whole process.")] = None,
    strength: Annotated[float | None, typer.Option(help="Share of the process that is noised, in (0, 1].")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Scale of the whole guidance.")] = None,
    class_scale: Annotated[float | None, typer.Option(help="Scale of the classifier's score.")] = None,
    distance_scale: Annotated[float | None, typer.Option(help="Scale of the pull towards the input.")] = None,
    angle: Annotated[float | None, typer.Option(help="Angle limit of the filter in degrees.")] = None,
    filter: Annotated[str | None, typer.Option(help="zero, project, global or off.")] = None,
    gradient: Annotated[str | None, typer.Option(help="exact or detached.")] = None,
    noise: Annotated[str | None, typer.Option(help="random or inversion.")] = None,
    match_official: MatchOfficialFlag = False,
    speed: SpeedOption = None,
    solver: Annotated[str | None, typer.Option(help="ddim, dpm++ (DPM-Solver++(2M)) or unipc.")] = None,
    spacing: Annotated[
        str | None, typer.Option(help="official, or over the noised part: leading, trailing, linspace, logsnr.")
    ] = None,
    guidance_decoder: GuidanceDecoderOption = None,
    tiny_decoder: Annotated[str | None, typer.Option(help="AutoencoderTiny for --guidance-decoder tiny.")] = None,
    distance: DistanceOption = None,
    guidance_start: Annotated[float | None, typer.Option(help="Share of the run from which steps are guided.")] = None,
    guidance_end: Annotated[float | None, typer.Option(help="Share of the run up to which steps are guided.")] = None,
    guidance_every: Annotated[int | None, typer.Option(help="Every n-th step asks, the others reuse it.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds for each image; then what there is.")] = None,
    overwrite: OverwriteFlag = False,
    resume: ResumeFlag = False,
    seed: SeedOption = 0,
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
    from .config import Config
    from .images import make_folder
    from .outputs import Source, open_run
    from .provenance import engine_facts

    items = open_images(images or [], recursive, manifest, targets=True).samples
    config = Config.make(
        mode=mode, **source_fields(pack, classifier, model), preset=preset, steps=steps, strength=strength,
        guidance_scale=guidance_scale, class_scale=class_scale, distance_scale=distance_scale, angle=angle,
        filter=filter, gradient=gradient, noise=noise, speed=speed, solver=solver, spacing=spacing,
        guidance_decoder=guidance_decoder, distance=distance, guidance_start=guidance_start, guidance_end=guidance_end,
        guidance_every=guidance_every, match_official=match_official, seed=seed,
    )  # fmt: skip
    if budget is not None and not budget > 0:
        raise UsageError(f"budget: expected seconds above 0, got {budget:g}")
    out = make_folder(out)
    saving = saving_options(
        checkpointing, memory_budget, neighbours, attention=attention, guidance_decoder=tiny_decoder, device=device,
        runtime=runtime,
    )  # fmt: skip
    engine = open_engine(
        config, pack, classifier, model, saving, labels=labels, prompts=prompts, classes=classes, head=head,
        weights=weights, image_size=image_size, dtype=dtype,
    )  # fmt: skip
    choices: list[str | int] = [item.target or target for item in items]
    for choice in dict.fromkeys(choices):
        engine.check_target(choice)
    if engine.settings(config).guidance_decoder != "tiny" and tiny_decoder is not None:
        raise UsageError("tiny_decoder: it is not used; add --guidance-decoder tiny")
    console = text_console(as_json)
    rows = []
    failed = 0
    facts = {
        "command": "counterlens counterfactual", **engine_facts(engine, config), "target": target, "budget_s": budget,
    }  # fmt: skip
    sources = [Source(item.path.stem, {"image": item.name, "target": item.target}, item.own_file) for item in items]
    with (
        progress_bar("counterfactuals") as progress,
        open_run(
            out, facts, sources=sources, endings=(".png",), overwrite=overwrite, resume=resume,
            say=errors.print,
        ) as run,
    ):  # fmt: skip
        for record in _counterfactual_records(engine, items, choices, run, budget, progress):
            failed += record["status"] == "failed"
            if as_json:
                print_json(record)
            rows.append(counterfactual_row(record))
    console.table(COUNTERFACTUAL_COLUMNS, rows)
    if failed:
        raise CounterlensError(f"{failed} of {len(items)} images failed; the others are in {out}")


def _counterfactual_records(
    engine: Engine,
    items: list[Sample],
    targets: list[str | int],
    run: Run,
    budget_s: float | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield one line per image in order, batch by batch, as it was written; what cannot be read or written is one too.

    Those that are done already come as they are.
    """
    import torch

    from .images import save_png

    task = progress.task_ids[0]
    todo = [i for i, line in enumerate(run.done) if line is None]
    batches = [todo[k : k + BATCH] for k in range(0, len(todo), BATCH)]
    told = 0
    for b, rows in enumerate(batches):
        records: dict[int, dict[str, Any]] = {i: {"image": items[i].name} for i in rows}
        loaded: dict[int, torch.Tensor] = {}
        for i in rows:
            try:
                loaded[i] = items[i].load(engine.image_size, engine.config.interpolation)
                records[i]["input_sha256"] = items[i].sha256()
            except (CounterlensError, OSError) as error:
                records[i] |= {"status": "failed", "error": str(error).removeprefix(f"{items[i].name}: ")}

        def show(i: int, n: int, b: int = b) -> None:
            progress.update(task, completed=b + i / n, total=len(batches))

        if loaded:
            result = engine.counterfactual(
                torch.stack(list(loaded.values())), [targets[i] for i in loaded], on_step=show, budget_s=budget_s
            )
        for k, i in enumerate(loaded):
            records[i] |= result.record(k) | {"runtime": result.provenance[k]["runtime"]}
            if records[i]["status"] != "done":
                continue
            path = run.folder / f"{run.names[i]}.png"
            try:
                save_png(result.images[k], path, run.line(run.names[i], records[i]))
                records[i]["path"] = str(path)
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


@app.command()
def samples(
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    count: Annotated[int, typer.Option(help="How many, spread evenly over the digits.", min=1)] = 20,
    marker: Annotated[str, typer.Option(help="none, random, matching or conflicting.")] = "none",
    out: Annotated[Path, typer.Option(help="Folder for the images and labels.csv.")] = Path("samples"),
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    pack: PackOption = "digits",
    as_json: JsonFlag = False,
) -> None:
    """Write real handwritten digits of the pack as PNG files, with a labels.csv (file,label,marker).

    `matching` puts each marker in the corner that the shortcut's rule gives to the digit (5 or more: top-left, less:
    bottom-right), `conflicting` in the other one.

    Example: counterlens samples --split test --count 50 --marker matching --out digits
    """
    from .images import save_png
    from .outputs import open_run
    from .packs import Pack
    from .provenance import pack_facts

    drawn = Pack(pack).samples(split, count=count, marker=marker, seed=seed)
    names = [f"{split}-{number:04d}-{label}.png" for number, label in zip(drawn.ids, drawn.labels, strict=True)]
    facts = {"command": "counterlens samples", "split": split, "count": count, "marker": marker, "seed": seed}
    facts |= pack_facts(pack)
    rows = []
    with open_run(out, facts, files=[*names, "labels.csv"], overwrite=overwrite):
        for image, label, planted, name in zip(drawn.images, drawn.labels, drawn.markers, names, strict=True):
            rows.append({"file": name, "label": str(label), "marker": str(planted) if planted else "none"})
            save_png(image, out / name, facts | rows[-1])
            if as_json:
                print_json(rows[-1])
        table = io.StringIO()
        writer = csv.DictWriter(table, ["file", "label", "marker"])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(out / "labels.csv", table.getvalue())
    text_console(as_json).print(f"{len(rows)} images and labels.csv in {out}")


@app.command()
def export(
    what: Annotated[
        str,
        typer.Option(
            help="guided-step (gradient included), unet, vae-encoder, vae-decoder, classifier, all (engine), or "
            "counterfactual: the whole run, loop and all, as one file for any ONNX Runtime."
        ),
    ] = "guided-step",
    format: Annotated[str, typer.Option(help="onnx, aoti (AOTInductor package) or tensorrt.")] = "onnx",
    dtype: Annotated[str, typer.Option(help="Of weights and activations: fp32, fp16 or bf16.")] = "fp32",
    pack: PackOption = "digits",
    classifier: ClassifierOption = None,
    model: ModelOption = None,
    labels: LabelsOption = None,
    prompts: PromptsOption = None,
    classes: ClassesOption = None,
    head: HeadOption = None,
    weights: WeightsOption = None,
    image_size: ImageSizeOption = None,
    mode: Annotated[str | None, typer.Option(help="official, realistic (default) or audit: filter, gradient.")] = None,
    preset: Annotated[str | None, typer.Option(help="A published setting, such as pairs-class.")] = None,
    filter: Annotated[str | None, typer.Option(help="zero, project, global or off.")] = None,
    gradient: Annotated[str | None, typer.Option(help="exact or detached.")] = None,
    speed: SpeedOption = None,
    guidance_decoder: GuidanceDecoderOption = None,
    distance: DistanceOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a copy of the artefact's files.")] = None,
    store: Annotated[Path | None, typer.Option(help="Store of artefacts; the user's cache without it.")] = None,
    force: Annotated[bool, typer.Option(help="Build again, even if the store has it.")] = False,
    overwrite: OverwriteFlag = False,
    measure: Annotated[bool, typer.Option(help="Time it against eager, for runtime auto.")] = True,
    batch: Annotated[str, typer.Option(help="Of counterfactual: open, or the one size that the file takes.")] = "open",
    storage: Annotated[
        str,
        typer.Option(help="Of counterfactual's weights: lossless (float16 where nothing is lost), float16, float32."),
    ] = "lossless",
    share: Annotated[
        str, typer.Option(help="Of counterfactual's weights: local (fast on a CPU) or outer (one copy in memory).")
    ] = "local",
    page: Annotated[bool, typer.Option("--page", help="Also a page for any static host that runs it.")] = False,
    single_page: Annotated[
        bool, typer.Option("--single-page", help="Also one HTML file that runs it, offline, by double click.")
    ] = False,
    ort_web: Annotated[
        Path | None, typer.Option(help="onnxruntime-web as npm packs it, or unpacked; fetched by npm without it.")
    ] = None,
    seed: UnusedSeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Compile the guided step, its gradients included, or a part of the models, and check it against eager.

    The artefact goes to a store, where the engine finds it: `runtime="auto"` takes it where it was measured to be
    faster. One that does not agree with eager is not kept. `all` is what a run uses: the step, and encoder, decoder and
    UNet beside it.

    Example: counterlens export --what guided-step --format onnx

    Example: counterlens export --what counterfactual --speed fast --single-page --out whole

    Example: counterlens export --model ./sd15 --classifier ./resnet-50 --preset imagenet-text --format aoti
    """
    from .config import Config

    if what in ("adapter", "curve"):
        raise UsageError(f"what: {what} has a command of its own: counterlens adapter export")
    config = Config.make(
        mode=mode, **source_fields(pack, classifier, model), preset=preset, filter=filter, gradient=gradient,
        speed=speed, guidance_decoder=guidance_decoder, distance=distance,
    )  # fmt: skip
    from .exporting import ALL, export_artefact

    # ONNX is the same from every device; AOTInductor and TensorRT compile for the one that they are on.
    options = {"store": store, "device": "cpu" if format == "onnx" else "auto"}
    engine = open_engine(
        config, pack, classifier, model, options, labels=labels, prompts=prompts, classes=classes, head=head,
        weights=weights, image_size=image_size,
    )  # fmt: skip
    if what == "counterfactual":
        from .portable.cli import export_whole

        return export_whole(engine, config, out, batch, storage, share, page, single_page, ort_web, overwrite, as_json)
    if page or single_page or ort_web is not None or (batch, storage, share) != ("open", "lossless", "local"):
        raise UsageError("what: batch, storage, share, page and ort-web are of --what counterfactual")
    for part in ALL if what == "all" else (what,):
        with progress_bar("export") as progress:
            task = progress.task_ids[0]
            report = export_artefact(
                engine, what=part, target=format, dtype=dtype, force=force, measure=measure,
                out=out / part if out is not None and what == "all" else out, overwrite=overwrite,
                say=lambda text, p=progress, t=task: p.update(t, description=text),  # type: ignore[misc]
            )  # fmt: skip
        if as_json:
            print_json(report)
        else:
            _print_export(report)


def _print_export(report: dict[str, Any]) -> None:
    console = text_console(as_json=False)
    parity = report["parity"]
    built = ", ".join(f"{name} {seconds:g} s" for name, seconds in report["seconds"].items())
    console.print(f"{report['what']} ({report['dtype']}) as {report['target']}, {report['operations']} operations")
    console.print(("built: " if report["built"] else "already in the store; built: ") + built)
    console.print(
        f"parity with eager: worst relative error {parity['worst']:.1e} of {parity['samples']} samples at batches "
        f"{', '.join(map(str, parity['batches']))} (allowed {parity['tolerance']:g}), {parity['left_out']:.0%} left out"
    )
    for batch, why in parity.get("beyond_memory", {}).items():
        console.print(f"not compared at batch {batch}: {why}")
    if report["measured"]:
        rows = [[batch, *(f"{s * 1e3:.1f} ms" for s in times.values())] for batch, times in report["measured"].items()]
        console.table(["batch", *next(iter(report["measured"].values()))], rows)
    for path in report["files"]:
        console.print(path)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Original checkpoint: .safetensors, or a pickle of tensors.")],
    out: Annotated[Path, typer.Option(help="New folder in diffusers' layout.")] = Path("converted"),
    image_size: Annotated[int | None, typer.Option(help="Side that it was trained for: 256 (LDM), 512 (SD).")] = None,
    prediction: Annotated[str, typer.Option(help="epsilon, v_prediction or sample.")] = "epsilon",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a CLIP tokenizer; SD files hold none.")] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the classes: a .txt file, one a line.")] = None,
    seed: UnusedSeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Convert cin256-v2 or a Stable Diffusion single file to a folder for --model; every tensor is accounted for.

    Example: counterlens convert model.ckpt --out cin256
    """
    from .data import read_names
    from .models.convert import convert_checkpoint

    report = convert_checkpoint(
        checkpoint, out, image_size=image_size, prediction=prediction, tokenizer=tokenizer,
        labels=read_names(labels) if labels else None,
    )  # fmt: skip
    if as_json:
        print_json(report)
    text = ", ".join(f"{part} {count}" for part, count in report["tensors"].items())
    left = ", ".join(f"{name} {count}" for name, count in report["left_out"].items()) or "nothing"
    text_console(as_json).print(f"{report['kind']} in {out}; tensors: {text}; left out: {left}")


@app.command()
def info(
    out: Annotated[Path | None, typer.Option(help="Folder to write info.json to as well.")] = None,
    seed: UnusedSeedOption = 0,
    pack: PackOption = "digits",
    as_json: JsonFlag = False,
) -> None:
    """Say what is installed, which kernel backends run here and why others do not, and what the pack holds.

    Example: counterlens info --json
    """
    from .info import describe

    facts = describe(pack)
    if out is not None:
        from .images import make_folder

        write_atomically(make_folder(out) / "info.json", json.dumps(facts, indent=1) + "\n")
    if as_json:
        print_json(facts)
        return
    console = text_console(as_json)
    console.print("  ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    console.print(f"device: {facts['device']}, {facts['threads']} threads")
    rows = []
    against: dict[str, None] = {}
    for name, operation in facts["operations"].items():
        others = [b for b, reasons in operation["backends"].items() if not reasons and b != operation["auto"]]
        rows.append([name, operation["auto"], operation["why"], ", ".join(others)])
        for backend, reasons in operation["backends"].items():
            against |= dict.fromkeys(f"{backend} does not run here: {reason}" for reason in reasons)
    console.table(["operation", "auto runs", "because", "also runs here"], rows)
    for line in against:
        console.print(line)
    named = [facts["pack"]["name"], ", ".join(facts["pack"]["classifiers"])]
    described = {mode: ", ".join(f"{k} {v}" for k, v in s.items()) for mode, s in facts["pack"]["settings"].items()}
    console.table(["pack", "classifiers", "mode", "settings"], [[*named, *row] for row in described.items()])


app.command("profile")(_profiling.profile)
app.command("audit")(_audit.audit)
app.command("audit-merge")(_audit.merge)
app.command("audit-report")(_audit.report)
app.add_typer(_metrics.app, name="metrics")
register_adapter(app)
register_portable(app)


class Command(TyperCommand):
    """A command that refuses what no option means, and says that it began before torch takes its seconds."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty texts, which a shell makes of a variable that is not set: as a path they are this folder."""
        for before, text in zip(["", *args], args, strict=False):
            if text == "" or (text.startswith("--") and text.endswith("=")):
                name = text[2:-1] or before.lstrip("-") if before.startswith("--") or text else "argument"
                raise UsageError(f"{name}: it is empty")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        out = ctx.params.get("out")
        if isinstance(out, Path) and out.exists() and not out.is_dir():
            raise UsageError(f"out: {out} is not a folder; every command writes a folder of files")
        errors.print(f"{ctx.command_path.removeprefix('counterlens ')}: opening ...", style="dim")
        return super().invoke(ctx)


def _as_commands(parent: typer.Typer) -> None:
    for command in parent.registered_commands:
        command.cls = Command
    for group in parent.registered_groups:
        assert group.typer_instance is not None
        _as_commands(group.typer_instance)


_as_commands(app)


def _warn(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """A warning as one line, without the source that it comes from."""
    errors.print(f"warning: {message}", style="yellow")


def _run() -> int:
    """Run the command line; the exit code."""
    ClickException: Any = typer.BadParameter.__mro__[2]  # newer typers carry their own copy of click's
    try:
        code = app(prog_name="counterlens", standalone_mode=False)
    except (CounterlensError, ExportError) as error:
        errors.print(f"error: {error}", style="red")
        return getattr(error, "exit_code", 1)
    except ClickException as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help
            command = error.ctx.command_path if getattr(error, "ctx", None) else "counterlens"
            errors.print(f"error: {' '.join(error.format_message().split())} ({command} --help)", style="red")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (Terminated, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 143:  # an audit turns SIGTERM into this one
            raise
        errors.print("terminated; finished results are kept")
        return 143
    if code == 130:  # typer makes it of KeyboardInterrupt
        errors.print("interrupted; finished results are kept")
    return code or 0


def main() -> None:
    """Run the command line; errors become one line on stderr and exit code 2 (usage) or 1 (failure)."""
    warnings.showwarning = _warn
    try:
        with safe_streams(), stopping():
            code = _run()
    except StreamError as error:
        code = error.exit_code
        if not error.quiet:
            errors.print(f"error: {error}", style="red")
    sys.exit(code)


if __name__ == "__main__":
    main()
