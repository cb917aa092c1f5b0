"""`counterlens adapter train|export|explain|evaluate`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from .generated import with_options
from .options import (
    DeviceOption,
    JsonFlag,
    OverwriteFlag,
    RecursiveOption,
    SeedOption,
    print_json,
    progress_bar,
    text_console,
)
from .saliency import (
    AdapterOption,
    AlphaOption,
    FitOption,
    ImagesOption,
    Subject,
    evaluate_methods,
    explain_images,
    load,
)

COMPILED = ("adapter.onnx", "curve.onnx")

app = typer.Typer(no_args_is_help=True, help="Train LAX on a frozen classifier, and use it.")


def train(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, its checkpoint and loss.png.")] = Path("adapter"),
    images: ImagesOption = None,
    validation: Annotated[Path | None, typer.Option(help="Images that training does not see, like --images.")] = None,
    recursive: RecursiveOption = False,
    fit: FitOption = "auto",
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
    *,
    subject: Subject,
) -> None:
    """Train a LAX adapter for a frozen classifier, which must be differentiable; it is not changed.

    Interrupted, the same command goes on from its checkpoint. Training stops early on the validation images: on their
    MSI, and with the pack's and the general recipe, on the sum of MSI and BaseScore_area, of the map as it is and moved
    by one pixel.

    The pack's recipe for labels takes half an hour on one core; --steps 1000 is a quarter of that and most of the way.

    Example: counterlens adapter train --pack digits --classifier shortcut --out my-adapter
    """
    from ..images.files import make_folder
    from ..models.placing import choose_device, computing_on
    from ..saliency.recipes import pack_images, schedule_for, train_adapter
    from ..saliency.taps import Tap, find_modules

    opened, quantity = subject.open(images, device), subject.quantity
    packed = opened.name if opened.pack else None
    chosen = schedule_for(
        packed, quantity, steps=steps, batch=batch, forward_batch=forward_batch,
        alpha_min=alpha_min, area=area, baselines=tuple(baselines.split(",")) if baselines else None, seed=seed,
    )  # fmt: skip
    named = None if taps is None else [] if taps == "pixels" else taps.split(",")
    find_modules(opened.classifier.module, [Tap.parse(tap).name for tap in named or ()])  # before images are made
    if images is not None:
        if validation is None:
            raise UsageError(
                "validation: needed beside --images; early stopping looks at images that training does not"
            )
        (_, shown, failed), (_, held, more) = (load(path, opened, recursive, fit) for path in (images, validation))
        failed += more
        colour = shown.mean((0, 2, 3))
    else:
        assert opened.pack is not None  # any other classifier comes with images
        failed, (shown, held) = 0, pack_images(opened.pack, chosen, quantity)
        colour = opened.pack.mean_colour
    there = choose_device(device)
    shown, held = shown.to(there), held.to(there)
    out = make_folder(out)
    command = {"classifier": opened.name, "pack": opened.pack.name if opened.pack else None}
    with progress_bar("training", chosen.steps) as progress:

        def show(step: int, total: int, loss: float, best: float) -> None:
            text = f"loss {loss:.3f}, best score {best:.3f}"
            progress.update(progress.task_ids[0], completed=step, total=total, description=text)

        with computing_on(there):
            adapter, history = train_adapter(
                opened.classifier, shown, held, chosen, quantity=quantity, taps=named, colour=colour, out=out,
                on_step=show, described=command,
            )  # fmt: skip
    validated = adapter.training["validation"]
    record = {
        "out": str(out), "taps": adapter.taps, "quantity": adapter.quantity.name, "steps": len(history.losses),
        "parameters": sum(p.numel() for p in adapter.head.parameters()),
        **{f"validation_{name}": value for name, value in validated.items()},
    }  # fmt: skip
    if as_json:
        print_json(record)
    scores = ", ".join(
        f"{name.replace('msi', 'MSI').replace('base_score_area', 'BaseScore_area')} {v:.3f}"
        for name, v in validated.items()
    )
    text_console(as_json).print(
        f"{record['steps']} steps, validation {scores}; {record['parameters']} parameters on "
        f"{', '.join(adapter.taps) or 'pixels'}; adapter and loss.png in {out}"
    )
    if failed:
        raise CounterlensError(f"{failed} images could not be read; the adapter was trained on the others")


def export(
    out: Annotated[Path | None, typer.Option(help="Folder for a copy: adapter.onnx and curve.onnx.")] = None,
    adapter: AdapterOption = None,
    alpha_min: AlphaOption = 0.5,
    steps: Annotated[int, typer.Option(help="Thresholds of the curve.", min=1)] = 16,
    store: Annotated[Path | None, typer.Option(help="Store of artefacts; the user's cache without it.")] = None,
    force: Annotated[bool, typer.Option(help="Build again, even if the store has it.")] = False,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
    *,
    subject: Subject,
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

    opened = subject.open(adapter, option="--adapter")
    trained = subject.adapter(opened, adapter)
    console = text_console(as_json)
    facts = {
        "command": "counterlens adapter export", "alpha_min": alpha_min, "steps": steps,
        **opened.facts(subject.quantity, trained, 0),
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


for name, run in (("train", train), ("export", export)):
    app.command(name)(with_options(run))
app.command("explain")(
    with_options(
        explain_images,
        """Explain images with a trained adapter, in one pass of the classifier and a little more.

        Example: counterlens adapter explain four.png --classifier shortcut --out where
        """,
        command="counterlens adapter explain", method="lax", layer=None, box=None, surrogate=None,
    )
)  # fmt: skip
app.command("evaluate")(
    with_options(
        evaluate_methods,
        """Score a trained adapter alone, as `counterlens evaluate` scores methods.

        Example: counterlens adapter evaluate --adapter my-adapter --count 50 --out scored
        """,
        command="counterlens adapter evaluate", methods="lax", layer=None, box=None,
    )
)  # fmt: skip
