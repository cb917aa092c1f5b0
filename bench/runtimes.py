"""Guided steps of the digits pack under every runtime, side by side in one run: `python -m bench.runtimes`.

Times are per guided step; ratios are between medians of interleaved calls. `--start-up` times a fresh process from its
start to the first guided step's output, with the artefact in the store.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.baselines.literal import literal_step
from bench.record import RESULTS, in_turns, spread, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.config import StepOptions
from counterlens.engine.models.freezing import frozen
from counterlens.engine.runtime import artefacts
from counterlens.engine.runtime.registry import of_format
from counterlens.engine.runtime.spec import SCALES, Spec, flat
from counterlens.export.store import Store

START = """
import sys, time
from pathlib import Path
import torch
from counterlens.engine.runtime.artefacts import open_step
from counterlens.export.store import open_artefact
step = open_step(open_artefact(Path(sys.argv[1])))
shapes = {n: (torch.zeros if d == torch.int64 else torch.rand)((1, *s), dtype=d) for n, (d, s) in step.expected.items()}
scales = {n: shapes.pop(n) for n in ("guidance_scale", "class_scale", "distance_scale", "angle_deg")}
print(tuple(step(**{k: v + 5 if k.startswith("timestep") else v for k, v in shapes.items()}, **scales)[0].shape))
"""


def two_pulls_or_one(spec: Spec, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """The decoder's two cotangents pulled back one after the other, and as one batched pull with vmap."""
    z = inputs[0]
    decode = spec.diffusion.decode

    def cotangents() -> tuple[Callable[[Tensor], tuple[Tensor]], Tensor]:
        x, pull = torch.func.vjp(decode, z)  # type: ignore[misc]
        return pull, torch.stack([torch.ones_like(x), x])

    def two() -> Any:
        pull, v = cotangents()
        return pull(v[0])[0], pull(v[1])[0]

    def one() -> Any:
        pull, v = cotangents()
        return torch.func.vmap(lambda c: pull(c)[0])(v)

    return {"two pulls": two, "one pull with vmap": one}


def measure(engine: Engine, store: Store, gradient: str, targets: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row per batch size for one gradient: seconds, ratios, parity of each artefact."""
    spec = Spec(engine.diffusion, engine.classifier, options=StepOptions(gradient=gradient))
    rows = []
    with frozen(*spec.modules):
        built = {t: artefacts.build(spec, t, store, say=print) for t in targets}
        steps = {of_format(t).name: artefacts.open_function(a) for t, a in built.items()}
        for batch in (1, 8):
            inputs = spec.example(batch)
            z, t, t_prev, _, image, target = inputs[:6]
            numbers = {n: float(v[0]) for n, v in zip(SCALES, inputs[6:], strict=True)}
            eager = flat(spec.step())
            calls: dict[str, Callable[[], Any]] = {
                "literal": lambda z=z, t=t, p=t_prev, i=image, g=target, n=numbers: literal_step(  # type: ignore[misc]
                    engine.diffusion, engine.classifier, z, int(t[0]), int(p[0]), i, g, detached=gradient == "detached",
                    **n,
                ),
                "eager": lambda e=eager, i=inputs: e(*i),  # type: ignore[misc]
            }  # fmt: skip
            calls |= {name: lambda run=run, i=inputs: run(*i) for name, run in steps.items()}  # type: ignore[misc]
            seconds = spread(in_turns(calls, rounds))
            fastest = min(steps or {"eager": None}, key=lambda name: seconds[name]["p50"])
            row: dict[str, Any] = {"gradient": gradient, "batch": batch, "seconds": seconds, "fastest": fastest}
            row["times_literal"] = seconds["literal"]["p50"] / seconds[fastest]["p50"]
            row["times_eager"] = seconds["eager"]["p50"] / seconds[fastest]["p50"]
            row["pulls"] = spread(in_turns(two_pulls_or_one(spec, inputs), rounds))
            row["parity"] = {t: a.report["parity"] for t, a in built.items()}
            row["build_seconds"] = {t: a.report["seconds"] for t, a in built.items()}
            rows.append(row)
            print(json.dumps({k: row[k] for k in ("gradient", "batch", "fastest", "times_literal", "times_eager")}))
            print({name: f"{s['p50'] * 1e3:.1f} ms" for name, s in seconds.items()})
    return rows


def start_up(store: Store, times: int = 5) -> dict[str, list[float]]:
    """Seconds from process start to the first step's output, for each guided step in the store."""
    out = {}
    for artefact in store.entries():
        if artefact.report["what"] != "guided-step":
            continue
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", START, str(artefact.folder)], check=True, capture_output=True)
            seconds.append(round(time.perf_counter() - started, 3))
        out[f"{artefact.report['target']} {artefact.key['gradient']}"] = sorted(seconds)
    return out


def main(
    targets: Annotated[str, typer.Option(help="Comma-separated: onnx, aoti.")] = "onnx",
    gradients: Annotated[str, typer.Option(help="Comma-separated: exact, detached.")] = "exact,detached",
    rounds: Annotated[int, typer.Option(help="Interleaved calls.", min=3)] = 15,
    store: Annotated[Path, typer.Option(help="Store of artefacts.")] = Path("build/bench-store"),
) -> None:
    """Build the artefacts, time every runtime and record the result.

    Example: python -m bench.runtimes --targets onnx,aoti
    """
    engine = Engine.from_pack("digits", config=Config(), runtime="eager", device="cpu")
    opened = Store(store)
    rows = [r for g in gradients.split(",") for r in measure(engine, opened, g, targets.split(","), rounds)]
    started = start_up(opened)
    print(started)
    path = write_result("runtimes", {"rows": rows, "start_up_seconds": started})
    print(path.relative_to(RESULTS.parent.parent))


if __name__ == "__main__":
    typer.run(main)
