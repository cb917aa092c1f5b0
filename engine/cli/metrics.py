"""`counterlens metrics calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import ForwardOption, OverwriteFlag, SeedOption, print_json, text_console

# torch and everything that needs it are imported inside the commands: --help must answer at once.

SIGMA = 1 / 16  # of the gradient maps, as a share of the image's height

app = typer.Typer(no_args_is_help=True, help="Metrics of saliency maps: freeze their settings.")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Folder for calibration.json.")] = Path("calibration"),
    pack: Annotated[str, typer.Option(help="An embedded pack (digits) or a pack's folder.")] = "digits",
    classifier: Annotated[str, typer.Option(help="The pack's classifier.")] = "clean",
    split: Annotated[str, typer.Option(help="train or validation; test is for comparing methods.")] = "validation",
    count: Annotated[int, typer.Option(help="How many images, spread evenly over the classes.", min=2)] = 100,
    maps: Annotated[
        Path | None,
        typer.Option(help="Safetensors file with `saliency` [N, H, W] of the images; gradients without it."),
    ] = None,
    candidates: Annotated[
        str, typer.Option(help="Values of alpha_min to choose from.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    steps: Annotated[int, typer.Option(help="Thresholds of MSI.", min=1)] = 16,
    runtime: ForwardOption = "eager",
    overwrite: OverwriteFlag = False,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object on stdout.")] = False,
) -> None:
    """Choose MSI's alpha_min on a validation split and freeze it in a file that says how it was chosen.

    The best value is the one at which MSI tells an image's own map from another image's map: see the file's `rule`.

    Example: counterlens metrics calibrate --classifier clean --out calibration
    """
    if split == "test":
        raise UsageError("split: alpha_min is not chosen on the test split, on which methods are compared")
    values = _numbers(candidates)
    from counterlens.export.hashing import file_digest

    from ..metrics.calibration import calibrate as choose
    from ..metrics.msi_score import threshold_grid
    from ..metrics.reference_maps import gradient_maps, read_maps
    from ..outputs import open_run
    from ..packs import Pack, pack_facts
    from ..runtime.forward import forward_by

    opened = Pack(pack)
    model = opened.classifier(classifier)
    samples = opened.samples(split, count=count, marker="random", seed=seed)
    size = samples.images.shape[2]
    saliency = (
        gradient_maps(model, samples.images, sigma=SIGMA * size) if maps is None else read_maps(maps, samples.images)
    )
    for value in values:
        threshold_grid(value, steps)  # refused before there is a folder
    path = out / "calibration.json"
    facts = {
        "command": "counterlens metrics calibrate", "classifier": classifier, "split": split, "count": count,
        "maps": None if maps is None else [str(maps), file_digest(maps)], "candidates": values, "steps": steps,
        "runtime_option": runtime, "seed": seed, **pack_facts(pack),
    }  # fmt: skip
    inputs = [] if maps is None else [maps]
    with open_run(out, facts, files=[path.name], inputs=inputs, overwrite=overwrite):
        result = choose(
            forward_by(runtime, model, size, samples.images), samples.images, saliency, candidates=values, steps=steps,
            baseline=opened.mean_colour, seeds=samples.ids,
        )  # fmt: skip
        content = result.save(
            path, pack=opened.name, classifier=classifier, split=split, seed=seed, baseline="training mean colour",
            maps=maps.name if maps else f"|gradient of log p|, summed over channels, smoothed with sigma = {SIGMA:g} H",
            forwards=result.forwards,
        )  # fmt: skip
    if as_json:
        print_json(content | {"path": str(path)})
        return
    console = text_console(as_json)
    rows = [
        [f"{row.alpha_min:g}", f"{row.effect:.3f}", f"{row.own:.3f}", f"{row.other:.3f}"] for row in result.candidates
    ]
    console.table(["alpha_min", "effect", "MSI, own map", "MSI, another image's map"], rows)
    console.print(f"alpha_min {result.alpha_min:g}, frozen in {path}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(f"candidates: expected numbers separated by commas, got {text!r}") from error
