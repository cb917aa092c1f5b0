"""What speed `turbo` shows of a classifier that its student was not trained with: `python -m bench.turbo`.

The shortcut classifier on the digits pack, each digit with a marker that agrees with it, towards the likeliest class
across "5 or more", in both modes, by `fast` and by `turbo`, paired by digit: flips, L1, and what the marker gets of the
change: the mean change of its pixels, and how many times that of the others. Results: bench/results/turbo.json.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from torch import Tensor

from bench.measure import targets_across
from bench.record import interval, write_result
from bench.regions import boxes
from counterlens.engine import Config, Engine
from counterlens.engine.images.files import as_saved
from counterlens.engine.packs import Pack, Samples

SPEEDS = ("fast", "turbo")


def measured(engine: Engine, samples: Samples, targets: Tensor, config: Config) -> dict[str, Tensor]:
    """Of each digit: flip, across, L1, change of the marker's pixels and of the others', and their ratio."""
    result = engine.counterfactual(samples.images, targets, config=config)
    if failed := [e for e in result.errors if e is not None]:
        raise RuntimeError(f"{len(failed)} samples failed: {failed[0]}")
    change = (as_saved(result.images) - samples.images).abs().mean(1)
    inside = boxes(samples)
    marker = (change * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
    rest = (change * ~inside).flatten(1).sum(1) / (~inside).flatten(1).sum(1)
    across = (result.prediction >= 5) == (targets >= 5)
    values = {"flip": result.flipped, "across": across, "l1": result.l1, "marker_l1": marker, "rest_l1": rest}
    return {name: v.double() for name, v in values.items()} | {"marker_ratio": (marker / rest.clamp(min=1e-6)).double()}


def main(
    count: Annotated[int | None, typer.Option(help="Digits; all without it.")] = None,
    split: Annotated[str, typer.Option(help="test; validation while something is being chosen.")] = "test",
) -> None:
    """Measure both speeds in both modes and record the figures; other splits and parts of one are only shown.

    Example: python -m bench.turbo
    """
    samples = Pack("digits").samples(split, count=count, marker="matching")
    engine = Engine.from_pack("digits", "shortcut")
    targets = targets_across(engine, samples.images)
    figures: dict[str, Any] = {"split": split, "digits": len(samples.labels)}
    for mode in ("realistic", "audit"):
        values = {speed: measured(engine, samples, targets, Config.make(mode=mode, speed=speed)) for speed in SPEEDS}
        figures[mode] = {speed: {name: interval(v) for name, v in found.items()} for speed, found in values.items()}
        figures[mode]["turbo against fast"] = {
            name: interval(values["turbo"][name] - values["fast"][name]) for name in values["fast"]
        }
    if count is None and split == "test":
        write_result("turbo", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
