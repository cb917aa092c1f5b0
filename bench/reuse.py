"""Deep features and gradients of earlier steps: error, speed and quality, `python -m bench.reuse`.

`error` walks the trajectory of the speed `fast` with exact gradients and the whole decoder, and compares at every step
what each variant adds to the unconditional noise with what exact guidance adds: relative length of the difference and
cosine, apart for steps that compute everything and steps that reuse. `rows` are whole runs of validation digits, each
with two targets: CPU seconds in turns with `fast`, so that other work on the machine hits both, and flips, transfer and
L1 minus those of the literal schedule (of bench/results/pareto.json), paired.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.measure import quality, two_targets
from bench.pareto import PATH, not_inferior
from bench.record import interval, say, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.config import StepOptions
from counterlens.engine.guidance.schedule import ddim, schedule_of
from counterlens.engine.guidance.step import GuidedStep, carried_names
from counterlens.engine.images.files import as_saved
from counterlens.engine.packs import Pack

CHEAP = {"gradient": "detached", "guidance_decoder": "tiny"}
# What is reused, and every how many steps it is computed.
REUSED: dict[str, tuple[tuple[str, ...], int]] = {
    "features 2": (("features",), 2), "features 3": (("features",), 3), "gradients 2": (("gradients",), 2),
    "gradients 3": (("gradients",), 3), "both 2": (("features", "gradients"), 2),
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "features 2": {"reuse_features": 2}, "features 3": {"reuse_features": 3}, "gradients 2": {"reuse_gradients": 2},
    "both 2": {"reuse_features": 2, "reuse_gradients": 2}, "8 steps, both 2": {
        "steps": 8, "reuse_features": 2, "reuse_gradients": 2
    },
    "8 steps, features 2": {"steps": 8, "reuse_features": 2},
}  # fmt: skip


@torch.no_grad()
def errors(engine: Engine, images: Tensor, targets: Tensor) -> dict[str, Any]:
    """Error of each variant's guidance along the exact trajectory."""
    diffusion, settings = engine.diffusion, engine.settings(Config(mode="realistic", speed="fast"))
    schedule = schedule_of(settings, diffusion.alphas_cumprod)
    scales: dict[str, Any] = {
        "guidance_scale": settings.guidance_scale, "class_scale": settings.class_scale,
        "distance_scale": settings.distance_scale, "angle_deg": settings.angle,
    }  # fmt: skip
    tiny, levels, batch = engine.guidance_decoder, diffusion.alphas_cumprod, len(images)
    condition, null = diffusion.condition(targets), diffusion.null_condition(batch)
    z = diffusion.encode(images)
    for t, t_prev in zip(reversed(schedule.timesteps), reversed(schedule.timesteps_prev), strict=True):
        eps = diffusion.predict_noise(z, torch.full((batch,), t), null)
        z, _ = ddim(z, eps, levels[t_prev].expand(batch).to(z), levels[t].expand(batch).to(z))
    exact = GuidedStep(diffusion, engine.classifier, StepOptions(guidance_every=2))  # returns what it adds
    variants: dict[str, tuple[StepOptions, tuple[str, ...], int]] = {
        "detached, full decoder": (StepOptions(gradient="detached", guidance_every=2), (), 1),
        "detached, tiny decoder": (StepOptions(**CHEAP, guidance_every=2), (), 1),
    }
    for name, (kinds, n) in REUSED.items():
        for kind, fields in (("exact", {}), ("detached, tiny decoder", CHEAP)):
            options = StepOptions(**fields, guidance_every=2, **{f"reuse_{k}": 2 for k in kinds})
            variants[f"{kind}, {name}"] = options, kinds, n
    held: dict[str, tuple[Tensor, ...]] = {}
    found: dict[str, dict[str, list[Tensor]]] = {}
    for i, (t, t_prev) in enumerate(zip(schedule.timesteps, schedule.timesteps_prev, strict=True)):
        given = (z, torch.full((batch,), t), torch.full((batch,), t_prev), condition, images, targets)
        z_next, _, _, guidance = exact(*given, **scales)
        for name, (options, kinds, n) in variants.items():
            decoder = tiny if options.guidance_decoder == "tiny" else None
            reused = kinds if i % n else ()
            step = GuidedStep(diffusion, engine.classifier, options, decoder=decoder, reused=reused)
            out = step(*given, **scales, carried=held[name] if reused else ())
            if not reused:
                held[name] = out[4 : 4 + len(carried_names(kinds))]
            difference = (out[3] - guidance).flatten(1).norm(dim=1) / guidance.flatten(1).norm(dim=1)
            cosine = torch.cosine_similarity(out[3].flatten(1), guidance.flatten(1), dim=1)
            row = found.setdefault(name, {})
            for key, value in (("error", difference), ("cosine", cosine)):
                row.setdefault(f"{key}, {'reusing' if reused else 'whole'} steps", []).append(value)
        z = z_next
    return {name: {key: torch.cat(v).mean().item() for key, v in row.items()} for name, row in found.items()}


def whole_runs(engine: Engine, pack: Pack, count: int, rounds: int) -> dict[str, Any]:
    """CPU seconds and quality of whole runs, beside `fast` and the recorded literal schedule."""
    samples, judge = pack.samples("validation", count=count, marker="random"), pack.classifier("judge")
    images = samples.images.repeat_interleave(2, dim=0)
    targets = torch.stack(two_targets(engine, samples.images), 1).flatten()
    literal = json.loads(PATH.read_text())["rows"]["literal schedule, exact"]["values"]
    configs = {"fast": Config(mode="realistic", speed="fast")}
    configs |= {name: Config(mode="realistic", speed="fast", **fields) for name, fields in ROWS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    rows: dict[str, Any] = {}
    for name, config in configs.items():
        made = engine.counterfactual(images, targets, config=config)
        found = quality(images, as_saved(made.images), targets, engine.classifier, judge)  # type: ignore[arg-type]
        n = min(len(images), len(literal["flip"]))
        change = {k: interval(v.double()[:n] - torch.tensor(literal[k][:n]).double()) for k, v in found.items()}
        rows[name] = {k: interval(v.double()) for k, v in found.items()}
        rows[name] |= {"minus_literal": change, "not_inferior": not_inferior(change)}
        say(name, {k: round(v.double().mean().item(), 4) for k, v in found.items()}, rows[name]["not_inferior"])
    for _ in range(rounds):
        for name, config in configs.items():
            started = time.process_time()
            engine.counterfactual(images[:16], targets[:16], config=config)
            seconds[name].append((time.process_time() - started) / 16)
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["fast"], times, strict=True)]
        rows[name] |= {"cpu_seconds": statistics.median(times), "times_fast": statistics.median(ratios)}
        say(f"{name}: {statistics.median(times):.4f} s, {statistics.median(ratios):.2f} x as fast as fast")
    return {"images": len(images), "rows": rows}


def main(
    count: Annotated[int, typer.Option(help="Validation digits, each with two targets.")] = 60,
    rounds: Annotated[int, typer.Option(help="Of timing, a batch of 16 each.")] = 9,
    record: Annotated[bool, typer.Option("--record", help="Write bench/results/reuse.json.")] = False,
) -> None:
    """Measure what reusing saves and costs.

    Example: python -m bench.reuse --record
    """
    torch.set_num_threads(1)
    pack = Pack("digits")
    engine = Engine.from_pack("digits", runtime="eager", device="cpu")
    samples = pack.samples("validation", count=16, marker="random")
    with engine.frozen():
        error = errors(engine, samples.images, two_targets(engine, samples.images)[0])
    for name, row in error.items():
        say(name, {k: round(v, 3) for k, v in row.items()})
    result = {"split": "validation", "error": error, **whole_runs(engine, pack, count, rounds)}
    if record:
        say(write_result("reuse", result))


if __name__ == "__main__":
    typer.run(main)
