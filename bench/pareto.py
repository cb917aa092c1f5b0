"""What every way to save time costs in quality, on the validation split: `python -m bench.pareto`.

One row for the literal schedule, one for each option alone, and a grid of them combined, all with the same strength,
scales and angle wherever the schedule is not the option itself. `balanced`, `fast` and `turbo` are chosen here
(`--apply` writes them into the pack's manifest); nothing looks at the test split. Every digit has two targets, the
runner-up and a random other label: few steps fail with the second kind first. Cost is CPU time on one thread in
eager: waiting does not count, but a neighbour on the same core does. Rows that are in
bench/results/pareto.json are kept and not run again.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.measure import quality, two_targets
from bench.record import RESULTS, interval, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.config import PRESETS, SPEEDS, Settings
from counterlens.engine.images.files import as_saved
from counterlens.engine.metrics.distribution import kernel_distance
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack

PATH = RESULTS / "pareto.json"
MARGIN = 0.03  # the lower bounds of flip and transfer may lie this far below the literal schedule's
ALONE: dict[str, dict[str, Any]] = {
    "literal schedule, exact": {},
    "detached": {"gradient": "detached"},
    "tiny decoder": {"guidance_decoder": "tiny"},
    "latent distance": {"distance": "latent"},
    "every 2nd step": {"guidance_every": 2},
    "first 70 % of the steps": {"guidance_end": 0.7},
    "deep features of every 2nd step": {"reuse_features": 2},
    "deep features of every 3rd step": {"reuse_features": 3},
    "gradients of every 2nd step": {"reuse_gradients": 2},
    "gradients of every 3rd step": {"reuse_gradients": 3},
    "10 DDIM steps": {"steps": 10, "spacing": "trailing"},
    "10 DPM-Solver++ steps": {"steps": 10, "spacing": "trailing", "solver": "dpm++"},
    "10 UniPC steps": {"steps": 10, "spacing": "trailing", "solver": "unipc"},
    "10 DDIM steps from inversion": {"steps": 10, "spacing": "trailing", "noise": "inversion"},
}
CHEAP = {"gradient": "detached", "guidance_decoder": "tiny", "noise": "inversion"}


def literal_settings(pack: Pack) -> Settings:
    """The frozen baseline's setting: `pairs-class` schedule, 171 steps, the pack's own scales and angle."""
    own = pack.manifest["settings"]["realistic"]
    published = PRESETS["pairs-class"].model_dump()
    return Settings(**published | {k: own[k] for k in ("guidance_scale", "class_scale", "distance_scale", "angle")})


def combined() -> dict[str, dict[str, Any]]:
    """The grid, laid over the pack's own mode `realistic`."""
    out: dict[str, dict[str, Any]] = {"realistic as tuned": {}}
    for gradient, decoder, distance in (
        ("exact", "full", "image"), ("detached", "full", "image"), ("detached", "tiny", "image"),
        ("detached", "full", "latent"), ("detached", "tiny", "latent"),
    ):  # fmt: skip
        fields = {"gradient": gradient, "guidance_decoder": decoder, "distance": distance, "noise": "inversion"}
        out[f"8 trailing dpm++, {gradient}, {decoder}, {distance}"] = fields | {
            "steps": 8, "spacing": "trailing", "solver": "dpm++"
        }  # fmt: skip
    for steps in (4, 5, 6):
        fields = CHEAP | {"guidance_decoder": "full", "steps": steps, "spacing": "trailing", "solver": "dpm++"}
        out[f"{steps} trailing dpm++, detached, full, image"] = fields
    grid = [(steps, "leading", "ddim") for steps in (3, 4, 5, 6, 8, 10)]
    grid += [(steps, "trailing", solver) for steps in (4, 5, 6, 7, 8, 10) for solver in ("ddim", "dpm++", "unipc")]
    grid += [(steps, "logsnr", solver) for steps in (4, 6, 8) for solver in ("ddim", "dpm++")]
    grid += [(steps, "official", "ddim") for steps in (7, 9, 10)]
    grid += [(steps, "trailing", solver) for steps in (2, 3) for solver in ("ddim", "dpm++")]
    for steps, spacing, solver in grid:
        out[f"{steps} {spacing} {solver}, cheap"] = CHEAP | {"steps": steps, "spacing": spacing, "solver": solver}
    for steps in (2, 3, 4):
        fields = CHEAP | {"steps": steps, "spacing": "trailing", "solver": "ddim", "denoiser": "distilled"}
        out[f"{steps} trailing ddim, cheap, distilled"] = fields
    for steps, solver, features, gradients in (
        (7, "dpm++", 2, 1), (7, "dpm++", 3, 1), (7, "dpm++", 1, 2), (7, "dpm++", 2, 2), (8, "dpm++", 2, 1),
        (8, "dpm++", 2, 2), (6, "dpm++", 2, 1), (7, "ddim", 2, 1), (7, "ddim", 2, 2), (8, "ddim", 2, 2),
    ):  # fmt: skip
        fields = CHEAP | {"steps": steps, "spacing": "trailing", "solver": solver}
        reuse = {"reuse_features": features, "reuse_gradients": gradients}
        out[f"{steps} trailing {solver}, cheap, features {features}, gradients {gradients}"] = fields | reuse
    for steps in (4, 5):
        fields = CHEAP | {"steps": steps, "spacing": "leading", "solver": "ddim"}
        out[f"{steps} leading ddim, cheap, latent distance"] = fields | {"distance": "latent"}
        out[f"{steps} leading ddim, cheap, random noise"] = fields | {"noise": "random"}
        out[f"{steps} leading ddim, cheap, every 2nd"] = fields | {"guidance_every": 2}
        out[f"{steps} leading ddim, cheap, to 75 %"] = fields | {"guidance_end": 0.75}
    return out


@torch.no_grad()
def judge_features(judge: SoftmaxClassifier, images: Tensor) -> Tensor:
    """The judge's 64 convolutional features, averaged over space: [N, 64]."""
    module: Any = judge.module
    return torch.cat([module.features(b * 2 - 1).mean(dim=(2, 3)) for b in images.split(128)])


def evaluate(engine: Engine, judge: SoftmaxClassifier, images: Tensor, targets: Tensor, settings: Settings) -> Any:
    """Quality and CPU seconds per image of one setting."""
    config = Config(mode="realistic", **settings.model_dump())
    warm = settings.model_copy(update={"steps": 2, "spacing": "trailing"})
    engine.counterfactual(images[:16], targets[:16], config=Config(mode="realistic", **warm.model_dump()))
    started = time.process_time()
    result = engine.counterfactual(images, targets, config=config)
    seconds = (time.process_time() - started) / len(images)
    if failed := [e for e in result.errors if e is not None]:
        raise RuntimeError(f"{len(failed)} samples failed: {failed[0]}")
    after = as_saved(result.images)
    measured = quality(images, after, targets, engine.classifier, judge)  # type: ignore[arg-type]
    row: dict[str, Any] = {name: interval(v) for name, v in measured.items()}
    row["kid"] = kernel_distance(judge_features(judge, images), judge_features(judge, after)).item()
    row["values"] = {name: [round(x, 4) for x in v.tolist()] for name, v in measured.items()}
    return row | {"cpu_seconds": seconds, "images": len(images), "settings": settings.model_dump()}


def not_inferior(change: dict[str, dict[str, float]]) -> dict[str, bool]:
    """Which of flip, transfer and L1 are no worse than the literal schedule's, by the paired differences' intervals."""
    kept = {name: change[name]["low"] >= -MARGIN for name in ("flip", "transfer")}
    return kept | {"l1": change["l1"]["mean"] <= 0}


def choose(rows: dict[str, Any], base: dict[str, Any]) -> dict[str, str]:
    """Names of the rows for `fast`, the cheapest not worse than the reference, `balanced`, the best, and `turbo`.

    Not worse, over the samples that both rows have, paired, as `bench.run --suite quality` judges it: the lower 95 %
    bound of the difference in flips and in transfer is at least -`MARGIN`, and L1 is no higher on average. `balanced`
    is, of those that cost at most twice what `realistic` costs, the one with the highest transfer - 2 L1 (as in
    `bench.sweep`). `turbo` is the cheapest of those with the distilled denoiser, if one of them is not worse.
    """
    reference = rows["literal schedule, exact"]

    def good(row: dict[str, Any]) -> bool:
        n = min(row["images"], reference["images"])
        change = {
            k: interval(torch.tensor(v[:n]).double() - torch.tensor(reference["values"][k][:n]).double())
            for k, v in row["values"].items()
        }
        return all(not_inferior(change).values())

    candidates = {
        name: row for name, row in rows.items()
        if good(row) and all(row["settings"][k] == base[k] for k in ("strength", "class_scale", "distance_scale"))
    }  # fmt: skip
    if not candidates:
        raise SystemExit("no row is as good as the literal schedule; extend the grid")
    distilled = {n: r for n, r in candidates.items() if r["settings"].get("denoiser") == "distilled"}
    candidates = {n: r for n, r in candidates.items() if n not in distilled}
    most = 2 * rows["realistic as tuned"]["cpu_seconds"]
    affordable = {n: r for n, r in candidates.items() if r["cpu_seconds"] <= most}
    chosen = {"turbo": min(distilled, key=lambda n: distilled[n]["cpu_seconds"])} if distilled else {}
    return chosen | {
        "fast": min(candidates, key=lambda n: candidates[n]["cpu_seconds"]),
        "balanced": max(affordable, key=lambda n: affordable[n]["transfer"]["mean"] - 2 * affordable[n]["l1"]["mean"]),
    }


def apply(pack: Pack, rows: dict[str, Any], chosen: dict[str, str]) -> None:
    """Write the chosen speeds into pack.json: how, never what; strength, scales and angle stay the mode's."""
    fields = ("steps", "spacing", "solver", "noise", *SPEEDS["exact"])
    manifest = json.loads((pack.folder / "pack.json").read_text())
    settings = {speed: Settings(**rows[name]["settings"]).model_dump() for speed, name in sorted(chosen.items())}
    picked = {speed: {k: values[k] for k in fields} for speed, values in settings.items()}
    manifest["speeds"] = {"exact": SPEEDS["exact"], **picked}
    (pack.folder / "pack.json").write_text(json.dumps(manifest, indent=2) + "\n")


def draw(rows: dict[str, Any], chosen: dict[str, str], path: Path) -> None:
    """Judge's agreement and L1 over CPU seconds per image, every row a point."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, key, label in zip(axes, ("transfer", "l1"), ("the judge agrees", "mean L1"), strict=True):
        for kind, colour in (("inversion", "tab:blue"), ("random", "tab:grey")):
            points = [r for r in rows.values() if r["settings"]["noise"] == kind]
            axis.scatter(
                [r["cpu_seconds"] for r in points], [r[key]["mean"] for r in points], s=18, color=colour,
                label=f"start: {kind}",
            )  # fmt: skip
        named = {"literal schedule, exact": "literal schedule", "realistic as tuned": "realistic"}
        named |= {name: speed for speed, name in chosen.items()}
        for name, text in named.items():
            if name in rows:
                row = rows[name]
                slow = row["cpu_seconds"] > 1
                axis.annotate(
                    text, (row["cpu_seconds"], row[key]["mean"]), xytext=(-4 if slow else 4, 6),
                    ha="right" if slow else "left", textcoords="offset points", fontsize=9,
                )  # fmt: skip
                axis.scatter([row["cpu_seconds"]], [row[key]["mean"]], s=40, color="tab:red")
        axis.margins(x=0.1, y=0.12)  # room for the names
        axis.set(xscale="log", xlabel="CPU seconds per image (eager, one thread)", ylabel=label)
        axis.legend(fontsize=8)
    figure.suptitle("Digits, validation split: what every way to save time costs")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def recorded() -> dict[str, Any]:
    """The rows that were run before."""
    return json.loads(PATH.read_text())["rows"] if PATH.exists() else {}


def main(
    rows: Annotated[str, typer.Option(help="Regular expression: names of the rows to run.")] = ".",
    count: Annotated[int, typer.Option(help="How many validation digits.")] = 120,
    long_count: Annotated[int, typer.Option(help="The same for rows of more than 30 steps.")] = 40,
    minutes: Annotated[float, typer.Option(help="Start no row after so many minutes.")] = 1e9,
    apply_choice: Annotated[bool, typer.Option("--apply", help="Write the speeds into the pack's manifest.")] = False,
) -> None:
    """Run the rows that are not recorded yet, draw bench/results/pareto.png, print what would be chosen.

    Example: python -m bench.pareto --rows cheap --minutes 3
    """
    torch.set_num_threads(1)
    pack = Pack("digits")
    engine, judge = Engine.from_pack("digits", runtime="eager", device="cpu"), pack.classifier("judge")
    samples = pack.samples("validation", count=count, marker="random")
    targets = torch.stack(two_targets(engine, samples.images), 1).flatten()
    images = samples.images.repeat_interleave(2, dim=0)
    base, literal = pack.manifest["settings"]["realistic"], literal_settings(pack)
    asked = {name: Settings(**literal.model_dump() | fields) for name, fields in ALONE.items()}
    asked |= {name: Settings(**base | fields) for name, fields in combined().items()}
    started = time.monotonic()
    for name, settings in asked.items():
        known = recorded()  # read again each time: another process may be running other rows
        stale = name in known and Settings(**known[name]["settings"]) != settings
        if not re.search(rows, name) or (name in known and not stale) or time.monotonic() - started > 60 * minutes:
            continue
        n = 2 * (long_count if settings.spacing == "official" and settings.steps * settings.strength > 30 else count)
        row = evaluate(engine, judge, images[:n], targets[:n], settings)
        known = recorded() | {name: row}
        ordered = {name: known[name] for name in asked if name in known}
        write_result("pareto", {"split": "validation", "targets": "runner-up, another", "rows": ordered})
        shown = {k: round(row[k]["mean"], 4) for k in ("flip", "transfer", "l1")}
        print(f"{name}: {shown} kid {row['kid']:.5f} {row['cpu_seconds']:.3f} s", flush=True)
    known = recorded()
    if "literal schedule, exact" in known and "realistic as tuned" in known:
        chosen = choose(known, base)
        print(chosen)
        draw(known, chosen, RESULTS / "pareto.png")
        if apply_choice:
            apply(pack, known, chosen)


if __name__ == "__main__":
    typer.run(main)
