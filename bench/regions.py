"""Counterfactuals that keep to a region, on the digits pack's test split: `python -m bench.regions`.

`marker`: the shortcut classifier, in both modes, where the marker's box alone may change, that and the place where a
marker means the opposite, or everything but the marker; the target is the likeliest class across "5 or more". `drawn`:
what it says of the same digits with the marker erased, or moved to the other corner, by hand. `why`: the marker alone
once more, without the faded edge, with other filters, with more of the classifier and of the process. `auto`: the clean
classifier and runner-up targets, with and without a region that is found, paired by digit; it was tuned on the
validation split. Results: bench/results/regions.json.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.measure import open_engines, quality, targets_across
from bench.record import interval, write_result
from counterlens.engine import Config
from counterlens.engine.core.result import Counterfactuals
from counterlens.engine.engine import Engine
from counterlens.engine.guidance import region
from counterlens.engine.images.files import as_saved
from counterlens.engine.packs import Samples
from counterlens.engine.packs.rendering import CORNERS, MARKER_SIZE

TODAY_L1 = 0.0636  # of mode realistic, bench/results/quality.json
MARGIN = 0.03


def boxes(samples: Samples) -> Tensor:
    """Each sample's marker as a mask: [N, H, W] bool."""
    masks = torch.zeros(len(samples.images), *samples.images.shape[-2:], dtype=torch.bool)
    for mask, marker in zip(masks, samples.markers, strict=True):
        assert marker is not None
        mask[marker.box] = True
    return masks


def corners(samples: Samples) -> Tensor:
    """Both places of markers: [N, H, W] bool."""
    mask = torch.zeros(samples.images.shape[-2:], dtype=torch.bool)
    for row, column in CORNERS.values():
        mask[row : row + MARKER_SIZE, column : column + MARKER_SIZE] = True
    return mask.expand(len(samples.images), -1, -1)


def said(result: Counterfactuals) -> dict[str, Any]:
    """Flips, and of regions: area, L1 inside and outside, and whether every pixel outside is the input's."""
    if failed := [e for e in result.errors if e is not None]:
        raise RuntimeError(f"{len(failed)} samples failed: {failed[0]}")
    out: dict[str, Any] = {"flip": interval(result.flipped.double()), "l1": interval(result.l1.double())}
    if result.regions[0] is not None:
        measures = [sample.measures() for sample in result]
        out |= {name: interval(torch.tensor([m[name] for m in measures])) for name in measures[0]}
        out["outside_bit_identical"] = all(
            torch.equal(sample.image[:, ~sample.region], sample.input[:, ~sample.region])
            for sample in result
            if sample.region is not None
        )
    return out


def marker_figures(engine: Engine, samples: Samples, config: Config) -> dict[str, Any]:
    """Flips where the marker alone may change, where both corners may, where the marker may not, and anywhere."""
    x, masks = samples.images, boxes(samples)
    targets = targets_across(engine, x)
    regions: dict[str, Any] = {
        "anywhere": None, "marker excluded": ~masks, "only the marker": masks, "both corners": corners(samples),
    }  # fmt: skip
    return {
        name: said(engine.counterfactual(x, targets, config=config, region=where)) for name, where in regions.items()
    }


def drawn_figures(engine: Engine, samples: Samples, others: dict[str, Samples]) -> dict[str, Any]:
    """What is said of the same digits with other markers: shares that say the target, and any label across."""
    targets = targets_across(engine, samples.images)
    out = {}
    for name, drawn in others.items():
        assert drawn.ids == samples.ids
        found = engine.probabilities(drawn.images).argmax(1)
        across = (found >= 5) == (targets >= 5)
        out[name] = {"target": interval((found == targets).double()), "across": interval(across.double())}
    return out


def why_figures(engine: Engine, samples: Samples, config: Config) -> dict[str, Any]:
    """Flips and probability of the target where the marker alone may change, with one thing taken out at a time."""
    x, masks = samples.images, boxes(samples)
    targets = targets_across(engine, x)
    own = engine.settings(config)
    variants: dict[str, dict[str, Any]] = {
        "as it is": {}, "no faded edge": {}, "90 degrees": {"angle": 90.0}, "no filter": {"filter": "off"},
        "classifier x4": {"class_scale": 4 * own.class_scale}, "no distance": {"distance_scale": 0.0},
        "strength 0.8": {"strength": 0.8}, "all of it": {
            "filter": "off", "class_scale": 4 * own.class_scale, "distance_scale": 0.0, "strength": 0.8,
        },
    }  # fmt: skip
    out, faded = {}, region.weights
    said_given = config.model_dump(exclude_unset=True)
    for name, more in variants.items():
        region.weights = (lambda mask: mask.float()) if name in ("no faded edge", "all of it") else faded
        try:
            made = engine.counterfactual(x, targets, config=Config.make(**said_given | more), region=masks)
        finally:
            region.weights = faded
        across = (made.prediction >= 5) == (targets >= 5)
        out[name] = {
            "flip": interval(made.flipped.double()), "across": interval(across.double()),
            "target_confidence": interval(made.target_confidence.double()), "l1_inside": interval(
                torch.tensor([sample.measures()["l1_inside"] for sample in made])
            ),
        }  # fmt: skip
    return out


def auto_figures(engine: Engine, judge: Any, samples: Samples, config: Config) -> dict[str, Any]:
    """`auto` against anywhere, paired, with the differences' 95 % intervals."""
    x = samples.images
    targets = engine.resolve_targets("runner-up", engine.probabilities(x))
    values, out = {}, {}
    for name, where in (("anywhere", None), ("auto", "auto")):
        result = engine.counterfactual(x, targets, config=config, region=where)
        values[name] = quality(x, as_saved(result.images), targets, engine.classifier, judge)  # type: ignore[arg-type]
        out[name] = said(result) | {"transfer": interval(values[name]["transfer"])}
    change = {k: interval(values["auto"][k] - values["anywhere"][k]) for k in ("flip", "transfer", "l1")}
    l1 = values["auto"]["l1"].mean().item()
    met = {"l1": l1 <= 0.8 * TODAY_L1} | {k: change[k]["low"] >= -MARGIN for k in ("flip", "transfer")}
    return out | {"paired": change, "l1_ratio_to_today": l1 / TODAY_L1, "met": met}


def main(
    count: Annotated[int | None, typer.Option(help="Test digits; all without it.")] = None,
    speed: Annotated[str | None, typer.Option(help="exact, balanced or fast; mode realistic's own without it.")] = None,
    split: Annotated[str, typer.Option(help="test; validation while something is being chosen.")] = "test",
) -> None:
    """Measure regions and record the figures; other splits and parts of one are only shown.

    Example: python -m bench.regions
    """
    pack, engines, judge = open_engines("digits")
    config, shortcut = Config.make(speed=speed), engines["shortcut"]
    matching = pack.samples(split, count=count, marker="matching")
    others = {
        name: pack.samples(split, count=count, marker=rule)
        for name, rule in (("marker erased", "none"), ("marker moved", "conflicting"))
    }
    figures = {
        "split": split, "digits": count or len(pack.samples(split).labels), "speed": speed or "mode realistic's own",
        "marker": {
            mode: marker_figures(shortcut, matching, Config.make(speed=speed, mode=mode))
            for mode in ("realistic", "audit")
        },
        "drawn": drawn_figures(shortcut, matching, others),
        "why": why_figures(shortcut, matching, config),
        "auto": auto_figures(engines["clean"], judge, pack.samples(split, count=count, marker="random"), config),
    }  # fmt: skip
    if count is None and split == "test":
        write_result("regions", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
