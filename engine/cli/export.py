"""`counterlens export` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..config import Config, Settings, StepOptions
from ..errors import UsageError
from .generated import with_options, without
from .opening import EngineOptions, open_engine
from .options import (
    FORMATS,
    JsonFlag,
    OverwriteFlag,
    print_json,
    progress_bar,
    text_console,
)

WHOLE = ("counterfactual", "saliency")
# An artefact is the same for every seed and reads no files; how the engine itself runs is no part of it.
ExportedRun = Annotated[Config, without("pack", "classifier", "seed", "fit")]
ExportedModels = Annotated[
    EngineOptions,
    without("neighbours", "dtype", "device", "runtime", "attention", "checkpointing", "memory_budget"),
]


@with_options
def export(
    config: ExportedRun,
    opening: ExportedModels,
    what: Annotated[
        str,
        typer.Option(
            help="guided-step (gradient included), unet, vae-encoder, vae-decoder, classifier, all (engine), or "
            "for any ONNX Runtime one whole file: counterfactual (the run, loop and all) or saliency (LAX map and MSI)."
        ),
    ] = "guided-step",
    format: Annotated[str, typer.Option(help=f"{FORMATS}.")] = "onnx",
    dtype: Annotated[str, typer.Option(help="Of weights and activations: fp32, fp16 or bf16.")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="Folder for a copy of the artefact's files.")] = None,
    force: Annotated[bool, typer.Option(help="Build again, even if the store has it.")] = False,
    overwrite: OverwriteFlag = False,
    measure: Annotated[bool, typer.Option(help="Time it against eager, for runtime auto.")] = True,
    batch: Annotated[str, typer.Option(help="Of whole files: open, or the one size that the file takes.")] = "open",
    storage: Annotated[
        Literal["lossless", "float16", "float32"],
        typer.Option(help="Of whole files' weights: lossless (float16 where nothing is lost), float16, float32."),
    ] = "lossless",
    share: Annotated[
        Literal["local", "outer"],
        typer.Option(help="Of counterfactual's weights: local (fast on a CPU) or outer (one copy in memory)."),
    ] = "local",
    inputs: Annotated[
        Literal["fixed", "scales"],
        typer.Option(help="Of counterfactual: fixed, or scales: these and the angle are inputs of the file."),
    ] = "fixed",
    page: Annotated[bool, typer.Option("--page", help="Also a page for any static host that runs it.")] = False,
    single_page: Annotated[
        bool, typer.Option("--single-page", help="Also one HTML file that runs it, offline, by double click.")
    ] = False,
    ort_web: Annotated[
        Path | None, typer.Option(help="onnxruntime-web as npm packs it, or unpacked; fetched by npm without it.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Of saliency, and shown by pages: a trained adapter; the pack's own without it.")
    ] = None,
    quantity: Annotated[str, typer.Option(help="Of saliency: class, or groups of labels such as a,b/c,d.")] = "class",
    as_json: JsonFlag = False,
) -> None:
    """Compile the guided step, its gradients included, or a part of the models, and check it against eager.

    The artefact goes to a store, where the engine finds it: `runtime="auto"` takes it where it was measured to be
    faster. One that does not agree with eager is not kept. `all` is what a run uses: the step, and encoder, decoder and
    UNet beside it.

    Example: counterlens export --what guided-step --format onnx

    Example: counterlens export --what counterfactual --speed fast --single-page --out whole

    Example: counterlens export --what saliency --classifier shortcut --out where

    Example: counterlens export --model ./sd15 --classifier ./resnet-50 --preset imagenet-text --format aoti
    """
    if config.region is not None:
        raise UsageError("region: of runs, not of what is compiled; a step serves them with and without one")
    if config.count > 1:
        raise UsageError("count: of runs, not of what is compiled; a step serves any number")
    if what in ("adapter", "curve"):
        raise UsageError(f"what: {what} has a command of its own: counterlens adapter export")
    own = [name for name, said in (("format", format != "onnx"), ("dtype", dtype != "fp32"), ("force", force)) if said]
    if own and what in WHOLE:
        raise UsageError(f"{own[0]}: of compiled parts; --what {what} is one ONNX file with weights as --storage says")
    numbers = config.model_fields_set & (Settings.model_fields.keys() - StepOptions.model_fields.keys())
    if numbers and what != "counterfactual":
        raise UsageError(f"{min(numbers)}: of --what counterfactual; a compiled step takes its numbers as inputs")
    if batch != "open" and not (batch.isdecimal() and int(batch) > 0):
        raise UsageError(f"batch: expected open or a number above 0, got {batch!r}")
    rows = None if batch == "open" else int(batch)
    whole = (batch, storage) != ("open", "lossless")
    pages = page or single_page or ort_web is not None or (share, inputs) != ("local", "fixed")
    if pages and what != "counterfactual":
        raise UsageError("what: share, inputs, page, single-page and ort-web are of --what counterfactual")
    if what not in WHOLE and (whole or adapter is not None):
        raise UsageError("what: batch, storage and adapter are of --what counterfactual and saliency")
    if quantity != "class" and what != "saliency":
        raise UsageError("what: quantity is of --what saliency")
    if what == "saliency":
        from .portable import export_map

        if unused := opening.model_fields_set - {"pack", "classifier", "labels", "image_size"}:
            raise UsageError(f"{min(unused)}: a saliency file holds a classifier and its adapter, no diffusion model")
        if config.model_fields_set:
            raise UsageError(f"{min(config.model_fields_set)}: of counterfactuals; a saliency file has none in it")
        return export_map(
            out, opening.pack, opening.classifier, quantity, adapter, opening.labels, opening.image_size, rows, storage,
            overwrite, as_json,
        )  # fmt: skip
    from ..core.exporting import ALL, export_artefact
    from ..runtime.registry import of_format
    from ..runtime.spec import SIGNATURES

    if what not in (*SIGNATURES, "all", *WHOLE):
        raise UsageError(f"what: expected one of {', '.join((*SIGNATURES, 'all', *WHOLE))}, got {what!r}")
    device = "cpu" if of_format(format).portable else "auto"
    engine = open_engine(config, opening.model_copy(update={"device": device}))
    if what == "counterfactual":
        from .portable import export_whole

        return export_whole(
            engine, config, out, rows, storage, share, inputs == "scales", page, single_page, ort_web, adapter,
            overwrite, measure, as_json,
        )  # fmt: skip
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


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Original checkpoint: .safetensors, or a pickle of tensors.")],
    out: Annotated[Path, typer.Option(help="New folder in diffusers' layout.")] = Path("converted"),
    image_size: Annotated[int | None, typer.Option(help="Side that it was trained for: 256 (LDM), 512 (SD).")] = None,
    prediction: Annotated[str, typer.Option(help="epsilon, v_prediction or sample.")] = "epsilon",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a CLIP tokenizer; SD files hold none.")] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the classes: a .txt file, one a line.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert cin256-v2 or a Stable Diffusion single file to a folder for --model; every tensor is accounted for.

    Example: counterlens convert model.ckpt --out cin256
    """
    from ..images.collect import read_names
    from ..models.convert import convert_checkpoint

    report = convert_checkpoint(
        checkpoint, out, image_size=image_size, prediction=prediction, tokenizer=tokenizer,
        labels=read_names(labels) if labels else None,
    )  # fmt: skip
    if as_json:
        print_json(report)
    text = ", ".join(f"{part} {count}" for part, count in report["tensors"].items())
    left = ", ".join(f"{name} {count}" for name, count in report["left_out"].items()) or "nothing"
    text_console(as_json).print(f"{report['kind']} in {out}; tensors: {text}; left out: {left}")
