"""Counterfactuals that keep to a region, on the digits pack's test split: `python -m bench.regions`.

`marker`: the shortcut classifier, with the marker's box alone allowed to change and with everything else allowed; the
target is the likeliest class across "5 or more". `auto`: the clean classifier and runner-up targets, with and without a
region that is found, paired by digit. `auto` was tuned on the validation split. Results: bench/results/regions.json.
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
        row, column = CORNERS[marker.corner]
        mask[row : row + MARKER_SIZE, column : column + MARKER_SIZE] = True
    return masks


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
    """Flips where the marker alone may change, where it alone may not, and anywhere."""
    x, masks = samples.images, boxes(samples)
    targets = targets_across(engine, x)
    regions: dict[str, Any] = {"anywhere": None, "marker excluded": ~masks, "only the marker": masks}
    return {
        name: said(engine.counterfactual(x, targets, config=config, region=region)) for name, region in regions.items()
    }


def auto_figures(engine: Engine, judge: Any, samples: Samples, config: Config) -> dict[str, Any]:
    """`auto` against anywhere, paired, with the differences' 95 % intervals."""
    x = samples.images
    targets = engine.resolve_targets("runner-up", engine.probabilities(x))
    values, out = {}, {}
    for name, region in (("anywhere", None), ("auto", "auto")):
        result = engine.counterfactual(x, targets, config=config, region=region)
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
    config = Config.make(speed=speed)
    figures = {
        "split": split, "digits": count or len(pack.samples(split).labels), "speed": speed or "mode realistic's own",
        "marker": marker_figures(engines["shortcut"], pack.samples(split, count=count, marker="matching"), config),
        "auto": auto_figures(engines["clean"], judge, pack.samples(split, count=count, marker="random"), config),
    }  # fmt: skip
    if count is None and split == "test":
        write_result("regions", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
