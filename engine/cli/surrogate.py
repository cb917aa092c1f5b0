"""`counterlens surrogate train|show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..blackbox.kinds import is_box
from ..errors import CounterlensError, UsageError
from .generated import only, with_options, without
from .opening import AskedBox, EngineOptions, RunOptions, check_box, only_called, open_engine
from .options import (
    ImagesArgument,
    JsonFlag,
    RecursiveOption,
    errors,
    load_all,
    open_images,
    print_json,
    progress_bar,
    text_console,
)

if TYPE_CHECKING:
    from ..surrogate.surrogate import Surrogate

app = typer.Typer(no_args_is_help=True, help="Train a student of a black box, and look at one.")


@app.command()
@with_options
def train(
    config: RunOptions,
    opening: Annotated[EngineOptions, without("surrogate", "queries_each")],
    box: AskedBox,
    images: Annotated[list[Path], ImagesArgument],
    out: Annotated[Path, typer.Option(help="Folder of the surrogate; the same command goes on in it.")] = Path(
        "surrogate"
    ),
    recursive: RecursiveOption = False,
    queries: Annotated[int, typer.Option(help="Images that the box is asked about.", min=40)] = 3000,
    rounds: Annotated[int, typer.Option(help="Of counterfactuals that the box judges.", min=1)] = 3,
    hidden: Annotated[
        float, typer.Option(help="Share of the queries with a part hidden, for saliency.", min=0, max=0.6)
    ] = 0.0,
    members: Annotated[int, typer.Option(help="Students that are averaged.", min=1)] = 2,
    width: Annotated[int, typer.Option(help="Channels of a student's first layer, a multiple of 8.", min=8)] = 32,
    fit_steps: Annotated[int, typer.Option(help="Steps of the optimiser before the first round.", min=1)] = 500,
    as_json: JsonFlag = False,
) -> None:
    """Train a differentiable student of a classifier that can only be called, on its answers to images around yours.

    Your images need no labels. The generator makes others around them, and round by round the box judges the
    counterfactuals that the student leads to. Interrupted, the same command goes on, and asks for nothing twice.

    Example: counterlens surrogate train photos/ --classifier model.onnx --labels cat,dog --out my-surrogate
    """
    import torch

    from ..blackbox.box import as_box, said
    from ..surrogate.rounds import Plan, Trainer
    from ..surrogate.surrogate import is_surrogate, open_surrogate

    if opening.classifier is None or not is_box(opening.classifier):
        raise UsageError(
            "classifier: name what can only be called (model.onnx, python:module:function, https://...); anything else "
            "is explained without a surrogate"
        )
    if config.fit == "native":
        raise UsageError("fit: a surrogate sees square images of one size; say --fit auto, crop, pad or squash")
    if config.count > 1 or config.region is not None:
        raise UsageError(
            "count: a training makes one counterfactual of an image, anywhere in it; leave it and region out"
        )
    plan = Plan(
        queries=queries, rounds=rounds, hidden=hidden, members=members, width=width, steps=fit_steps, seed=config.seed
    )
    items = open_images(images, recursive).samples
    if is_surrogate(out):
        raise UsageError(f"out: {out} holds a surrogate; counterlens surrogate show {out}, or choose another folder")
    engine = open_engine(config, opening, only_called(opening.classifier, box))
    asked = as_box(engine.classifier)
    assert asked is not None
    _, shown, failed = load_all(items, lambda sample: engine.read(sample.file(), sample.name, own=False).image)
    with progress_bar("training") as progress:

        def show(stage: int, stages: int, name: str, trainer: Trainer) -> None:
            used = sum(trainer.queries.values())
            progress.update(progress.task_ids[0], completed=stage, total=stages, description=f"{name}: {used} queries")
            if name == f"round {len(trainer.records)}":  # and not one that had nothing left to ask
                record = trainer.records[-1]
                errors.print(
                    f"{name}: the box confirms {record['confirmed']:.1%} of {record['asked']} counterfactuals, the "
                    f"student takes {record['student_flips']:.1%} for their target; {used} queries so far"
                )

        engine.train_surrogate(torch.stack(shown), out, plan, show)
    _say(open_surrogate(out), out, as_json)
    errors.print(said(asked.record()))
    if failed:
        raise CounterlensError(f"{failed} images could not be read; the surrogate was trained on the others")


@app.command()
@with_options
def show(
    opening: Annotated[EngineOptions, only("classifier", "labels")],
    box: AskedBox,
    surrogate: Annotated[Path, typer.Argument(help="Its folder.")] = Path("surrogate"),
    as_json: JsonFlag = False,
) -> None:
    """Say what a surrogate was trained on and how far it agrees with its box; with --classifier, is that as it was?

    Example: counterlens surrogate show my-surrogate --classifier model.onnx
    """
    from ..blackbox.box import open_box
    from ..images.collect import read_names
    from ..surrogate.surrogate import open_surrogate

    trained = open_surrogate(surrogate)
    check_box(opening.classifier, only_called(opening.classifier, box))
    _say(trained, surrogate, as_json)
    if opening.classifier is not None:
        names = read_names(opening.labels) if opening.labels else trained.labels
        trained.check(open_box(opening.classifier, names, image_size=trained.image_size, options=box))
        text_console(as_json).print(f"{opening.classifier} answers as it did then")


def _say(surrogate: Surrogate, folder: Path, as_json: bool) -> None:
    """What a surrogate says of itself, for people or as JSON."""
    training, agreement = surrogate.training, surrogate.training["agreement"]
    record = {
        "surrogate": str(folder), "box": surrogate.box["name"], "hard": surrogate.hard, "labels": surrogate.labels,
        "image_size": surrogate.image_size, "members": len(surrogate.students.members), **training,
    }  # fmt: skip
    if as_json:
        print_json(record)
    console = text_console(as_json)
    queries = ", ".join(f"{count} {kind}" for kind, count in training["queries"].items())
    alone = " (labels alone)" if surrogate.hard else ""
    console.print(f"{folder}: students: {record['members']}, of {record['box']}{alone}")
    console.print(f"queries: {sum(training['queries'].values())} ({queries})")
    for number, row in enumerate(training["rounds"], 1):
        console.print(f"round {number}: the box confirmed {row['confirmed']:.1%} of {row['asked']} counterfactuals")
    if agreement:
        console.print(
            f"student and box agree on {agreement['images']:.1%} of {agreement['pairs']} held-out images, on "
            f"{agreement['near_the_decision']:.1%} near the decision and on {agreement['counterfactuals']:.1%} of the "
            f"counterfactuals; the box confirms {agreement['confirmed']:.1%} of these"
        )
