"""Guided steps and counterfactuals on one GPU, random weights: `python -m bench.gpu --suite step --record`.

Stable Diffusion 1.x at 256x256 in half precision with ResNet-50 in float32. `step` times one guided step in every
runtime against the literal one, side by side; `counterfactual` times whole ones under the speed `fast` against the
literal schedule of 171 steps, of which a few are timed; `digits` compares whole runs of the digits pack with those on
the CPU; `xformers`, `onnxruntime` and `models` are in bench.gpu_runtimes. Results go to bench/results/gpu-SUITE.json.
`--dry-run` takes tiny models on the CPU and records nothing: it shows that the script runs, and no times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.baselines.literal import literal_step
from bench.gpu_models import Where, channels_last, first_line
from bench.gpu_runtimes import models_suite, onnxruntime_suite, xformers_suite
from bench.record import environment, in_turns, quantiles, say, spread, timed, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.config import PRESETS, StepOptions
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.placing import full_precision
from counterlens.engine.packs import Pack
from counterlens.engine.profiling.profile import profile
from counterlens.engine.runtime.choice import StepRunner
from counterlens.engine.runtime.here import LAUNCH_BOUND
from counterlens.engine.runtime.spec import SCALES, Spec, flat, relative_errors
from counterlens.export.store import Store

LITERAL_STEPS = 171
STORE = "build/gpu-store"
Call = Callable[[], Any]


def kinds_of(tiny: Any) -> dict[str, dict[str, Any]]:
    """What of a step is compared, as fields of a `Spec`."""
    cheap = {"gradient": "detached", "guidance_decoder": "tiny"}
    reusing = StepOptions(**cheap, reuse_features=2, reuse_gradients=2)
    return {
        "exact": {},
        "detached": {"options": StepOptions(gradient="detached")},
        "detached, tiny decoder": {"options": StepOptions(**cheap), "decoder": tiny},
        "detached, tiny decoder, reusing": {
            "options": reusing, "decoder": tiny, "reused": ("features", "gradients"),
        },
    }  # fmt: skip


@torch.no_grad()
def step_suite(where: Where, batches: list[int], rounds: int, inductor: bool) -> dict[str, Any]:
    """One guided step, by gradient and runtime: seconds, ratios to the literal step, relative difference from eager."""
    diffusion, classifier, tiny = where.models()
    rows: list[dict[str, Any]] = []
    modules = [*diffusion.modules(), classifier.module, tiny.module]
    with frozen(*modules), full_precision():
        for batch in batches:
            calls: dict[str, Call] = {}
            parity: dict[str, Any] = {}
            notes: dict[str, str] = {}
            inputs = Spec(diffusion, classifier).example(batch)
            z, t, t_prev, condition, image, target = inputs[:6]
            t, t_prev = torch.full_like(t, 301), torch.full_like(t, 299)
            inputs = (z, t, t_prev, *inputs[3:])
            scales = {n: float(v[0]) for n, v in zip(SCALES, inputs[6:], strict=True)}

            def literal(z: Tensor = z, i: Tensor = image, g: Tensor = target, s: Any = scales) -> Any:
                return literal_step(diffusion, classifier, z, 301, 299, i, g, **s)

            null = diffusion.null_condition(batch)
            both = torch.cat([null.float() if null.is_floating_point() else null, condition])
            twice = torch.cat([t, t])
            calls["unguided"] = lambda z=z, b=both, w=twice: diffusion.predict_noise(torch.cat([z, z]), w, b)  # type: ignore[misc]
            calls["literal"] = literal
            for kind, fields in kinds_of(tiny).items():
                spec = Spec(diffusion, classifier, **fields)
                given = (*inputs, *spec.example(batch)[len(inputs) :])
                eager = flat(StepRunner(spec, "eager", Store(STORE)).step(batch))
                calls[f"{kind}, eager"] = lambda run=eager, x=given: run(*x)  # type: ignore[misc]
                runtimes = [*where.recorded, *(["inductor"] if inductor and kind == "detached, tiny decoder" else [])]
                for runtime in runtimes:
                    started = time.perf_counter()
                    try:
                        runner = StepRunner(spec, runtime, Store(STORE))
                        run = flat(runner.step(batch))
                        got = run(*given)
                    except (RuntimeError, ValueError) as error:
                        notes[f"{kind}, {runtime}"] = first_line(error)
                        continue
                    expected = eager(*given)
                    calls[f"{kind}, {runtime}"] = lambda run=run, x=given: run(*x)  # type: ignore[misc]
                    parity[f"{kind}, {runtime}"] = {
                        "relative_error": relative_errors(got[0], expected[0]).max().item(),
                        "kept_differs": (got[2] - expected[2]).abs().max().item(),
                        "seconds_to_build": time.perf_counter() - started,
                        "checked": runner.reports(),
                    }
            for name, mode, together in (
                ("exact, eager, apart", "functional", 0), ("exact, eager autograd", "autograd", 0),
                ("exact, eager autograd, together", "autograd", LAUNCH_BOUND),
            ):  # fmt: skip
                other = flat(GuidedStep(diffusion, classifier, mode=mode, together=together))  # type: ignore[arg-type]
                calls[name] = lambda run=other, x=inputs: run(*x)  # type: ignore[misc]
                error = relative_errors(other(*inputs)[0], calls["exact, eager"]()[0]).max().item()
                parity[name] = {"relative_error": error}
            ours, plain = calls["exact, eager"](), literal()
            parity["exact, literal"] = {"relative_error": relative_errors(ours[0], plain[0]).max().item()}
            if not where.dry:
                torch.cuda.reset_peak_memory_stats()
            seconds = spread(in_turns(calls, rounds, warm=2))
            with channels_last(*diffusion.modules(), tiny.module):
                names = ("exact, eager", "detached, tiny decoder, eager")
                there = spread(in_turns({f"{n}, channels last": calls[n] for n in names}, rounds, warm=2))
            seconds |= there
            row = {
                "batch": batch, "seconds": seconds, "parity": parity, "notes": notes,
                "times_literal": {n: seconds["literal"]["p50"] / s["p50"] for n, s in seconds.items()},
                "times_unguided": {n: s["p50"] / seconds["unguided"]["p50"] for n, s in seconds.items()},
                "peak_gb": 0.0 if where.dry else torch.cuda.max_memory_allocated() / 1e9,
            }  # fmt: skip
            rows.append(row)
            for name, s in seconds.items():
                say(f"batch {batch}: {name}: {1e3 * s['p50']:.1f} ms, literal is {row['times_literal'][name]:.2f} x")
            say(parity, notes)
    return where.facts() | {"image_size": diffusion.image_size, "rows": rows}


@torch.no_grad()
def counterfactual_suite(where: Where, rounds: int, record: bool) -> dict[str, Any]:
    """Whole counterfactuals under `fast`, at batch 1 and 16, against the literal schedule; memory and roofline."""
    diffusion, classifier, tiny = where.models()
    device, size = where.device, diffusion.image_size
    g = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 8, 8, generator=g)
    images = torch.nn.functional.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)
    settings = PRESETS["pairs-class"]
    scales = {
        "guidance_scale": settings.guidance_scale, "class_scale": settings.class_scale,
        "distance_scale": settings.distance_scale, "angle_deg": settings.angle,
    }  # fmt: skip
    kinds = {
        "fast": Config(speed="fast"),
        "fast, tiny decoder": Config(speed="fast", guidance_decoder="tiny"),
        "fast, tiny decoder, reusing": Config(
            speed="fast", guidance_decoder="tiny", reuse_features=2, reuse_gradients=2
        ),
    }
    out: dict[str, Any] = where.facts() | {"image_size": size, "labels": len(classifier.labels)}
    seconds: dict[str, dict[str, float]] = {}
    peaks: dict[str, float] = {}
    runtimes = ["eager"] if where.dry else ["eager", "cudagraphs"]
    best_runtime = runtimes[-1]
    engines = {
        (kind, runtime): Engine(
            diffusion, classifier, config, runtime=runtime, guidance_decoder=tiny, device=device, store=STORE
        )
        for kind, config in kinds.items()
        for runtime in runtimes
    }
    changed: dict[str, Any] = {}
    for batch in (1, 16):
        calls: dict[str, Call] = {}
        x, goal = images[:batch].to(device), torch.zeros(batch, dtype=torch.long, device=device)
        z = torch.randn(batch, *diffusion.latent_shape, device=device)

        def literal(z: Tensor = z, x: Tensor = x, goal: Tensor = goal) -> None:
            for t in (301, 299):
                z = literal_step(diffusion, classifier, z, t, t - 2, x, goal, **scales)[0]

        calls["literal"] = literal
        for (kind, runtime), engine in engines.items():
            calls[f"{kind}, {runtime}"] = lambda e=engine, b=batch: e.counterfactual(images[:b])  # type: ignore[misc]
        with frozen(*diffusion.modules(), classifier.module), full_precision():
            for name, call in calls.items():
                if not where.dry:
                    torch.cuda.reset_peak_memory_stats()
                result = call()
                peaks[f"{name}, batch {batch}"] = 0.0 if where.dry else torch.cuda.max_memory_allocated() / 1e9
                if result is not None:
                    failed = [e for e in result.errors if e is not None]
                    changed[f"{name}, batch {batch}"] = {"l1": result.l1.mean().item(), "errors": failed[:1]}
            measured = spread(in_turns(calls, rounds, warm=2))
        for name, s in measured.items():
            share = LITERAL_STEPS / 2 / batch if name == "literal" else 1 / batch
            seconds[f"{name}, batch {batch}"] = {q: v * share for q, v in s.items()}
            say(f"{name}, batch {batch}: {seconds[f'{name}, batch {batch}']['p50']:.4f} s per counterfactual")
    out |= {"seconds_per_counterfactual": seconds, "peak_gb": peaks, "results": changed}
    best = min(seconds[f"literal, batch {b}"]["p50"] for b in (1, 16))
    out["times_literal"] = {
        name: {
            "same batch": seconds[f"literal, batch {name.split()[-1]}"]["p50"] / s["p50"],
            "its best batch": best / s["p50"],
        }
        for name, s in seconds.items()
    }
    say(json.dumps(out["times_literal"], indent=1))
    latency: dict[str, list[float]] = {name: [] for name in kinds}
    for kind in kinds:
        for _ in range(2 if where.dry else 30):
            latency[kind].append(timed(lambda k=kind: engines[k, best_runtime].counterfactual(images[:1])))  # type: ignore[misc]
    out["latency_batch_1"] = {k: quantiles(v, (0.5, 0.95, 0.99)) for k, v in latency.items()}
    say(out["latency_batch_1"])
    if record:  # counting operations for the roofline takes minutes
        write_result("gpu-counterfactual", out)
    out["roofline"] = {}
    for kind in kinds:
        for batch in (1,) if where.dry else (16, 1):
            found = profile(engines[kind, "eager"], images, batch=batch)
            out["roofline"][f"{kind}, batch {batch}"] = {
                "parts": {n: asdict(p) for n, p in found.parts.items()}, "limits": found.limits,
                "overhead": found.overhead, "gap_share": found.gap_share, "latency": found.latency,
                "unattributed_share": found.unattributed_share,
            }  # fmt: skip
            say(kind, batch, {n: round(p.roofline, 3) for n, p in found.parts.items()}, found.limits)
    return out


def digits_suite(where: Where) -> dict[str, Any]:
    """The digits pack on the GPU against the CPU: whole runs, predictions and maps."""
    images = Pack("digits").samples("test", count=2 if where.dry else 32, marker="random").images
    there = where.device.type
    out: dict[str, Any] = {}
    runs_on = [("cpu", "eager"), *([] if where.dry else [("cuda", "eager"), ("cuda", "cudagraphs")])]
    configs = {
        "fast": Config(mode="realistic", speed="fast"),
        "fast, reusing": Config(mode="realistic", speed="fast", reuse_features=2, reuse_gradients=2),
        "exact": Config(mode="realistic", speed="exact", steps=4 if where.dry else 50),
    }
    for name, config in configs.items():
        runs = {}
        for device, runtime in runs_on:
            engine = Engine.from_pack("digits", config=config, runtime=runtime, device=device, store=STORE)
            started = time.perf_counter()
            runs[device, runtime] = engine.counterfactual(images)
            first = time.perf_counter() - started
            started = time.perf_counter()
            engine.counterfactual(images)
            say(f"{name}, {device}, {runtime}: {first:.2f} s, again {time.perf_counter() - started:.2f} s")
        reference = runs["cpu", "eager"]
        for (device, runtime), run in runs.items():
            difference = (run.images - reference.images).abs().amax((1, 2, 3))
            out[f"{name}, {device}, {runtime}"] = {
                "within_1e-4": (difference <= 1e-4).double().mean().item(), "worst": difference.max().item(),
                "median": difference.median().item(),
                "flips_equal": (run.flipped == reference.flipped).double().mean().item(),
                "errors": [e for e in run.errors if e is not None][:1],
            }  # fmt: skip
    maps = {d: Engine.from_pack("digits", device=d).explain(images) for d in ("cpu", there)}
    out["saliency"] = (maps[there].saliency - maps["cpu"].saliency).abs().max().item()
    out["msi"] = (maps[there].msi.score - maps["cpu"].msi.score).abs().max().item()
    say(json.dumps(out, indent=1))
    return out


SUITES = ("step", "counterfactual", "digits", "xformers", "onnxruntime", "models")


def main(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "step",
    dtype: Annotated[str, typer.Option(help="Of the diffusion model: fp16, bf16 or fp32.")] = "fp16",
    batches: Annotated[str, typer.Option(help="Of the suites step and xformers.")] = "1,4,8",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 10,
    inductor: Annotated[bool, typer.Option(help="Compile with torch.compile as well, which takes minutes.")] = False,
    full: Annotated[bool, typer.Option(help="onnxruntime: Stable Diffusion 1.x as well, which takes minutes.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Tiny models on the CPU, nothing recorded.")] = False,
    record: Annotated[bool, typer.Option(help="Write bench/results/gpu-SUITE.json.")] = False,
) -> None:
    """Run one suite.

    Example: python -m bench.gpu --suite counterfactual --record
    """
    if suite not in SUITES:
        raise typer.BadParameter(f"expected one of {', '.join(SUITES)}, got {suite!r}", param_hint="--suite")
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("bench.gpu: needs a CUDA device; --dry-run tries the script without one")
    torch.manual_seed(0)
    where = Where("fp32" if dry_run else dtype, dry_run)
    sizes = [1, 2] if dry_run else [int(b) for b in batches.split(",")]
    rounds = 1 if dry_run else rounds
    record = record and not dry_run
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: step_suite(where, sizes, rounds, inductor),
        "counterfactual": lambda: counterfactual_suite(where, rounds, record),
        "digits": lambda: digits_suite(where),
        "xformers": lambda: xformers_suite(where, sizes, rounds),
        "onnxruntime": lambda: onnxruntime_suite(where, sizes, rounds, full),
        "models": lambda: models_suite(where, rounds),
    }
    result = runs[suite]()
    if record:
        say(write_result(f"gpu-{suite}", result))
    else:
        print(json.dumps({"environment": environment(), **result}))


if __name__ == "__main__":
    typer.run(main)
