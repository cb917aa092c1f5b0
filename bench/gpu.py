"""Full-size guided steps and counterfactuals on one GPU, random weights: `python -m bench.gpu --suite step --record`.

Stable Diffusion 1.x at 256x256 in half precision with ResNet-50 in float32. `step` times one guided step in every
runtime against the literal one, side by side; `counterfactual` times whole ones under the speed `fast` against the
literal schedule of 171 steps, of which a few are timed; `digits` compares whole runs of the digits pack with those on
the CPU. Results go to bench/results/gpu-SUITE.json.
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
from bench.real_models import IMAGE_SIZE, LABELS, build
from bench.record import environment, in_turns, quantiles, say, spread, timed, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.config import PRESETS, StepOptions
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.attention import memory_efficient_attention, not_supported_reasons
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.placing import full_precision
from counterlens.engine.models.tiny import TinyDecoder
from counterlens.engine.packs import Pack
from counterlens.engine.profiling.profile import profile
from counterlens.engine.runtime.choice import StepRunner
from counterlens.engine.runtime.spec import DTYPES, SCALES, Spec, flat, relative_errors
from counterlens.export.store import Store

MODEL = "stable-diffusion-1.x"
LITERAL_STEPS = 171
Call = Callable[[], Any]


def tiny_decoder(device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """AutoencoderTiny's published configuration, as `taesd`."""
    from diffusers import AutoencoderTiny

    with torch.device(device):
        module = AutoencoderTiny()
    return TinyDecoder(module.to(dtype), "taesd, random weights", 4)


@torch.no_grad()
def step_suite(dtype: str, batches: list[int], rounds: int, inductor: bool) -> dict[str, Any]:
    """One guided step, by gradient and runtime: seconds, ratios to the literal step, relative difference from eager."""
    device = torch.device("cuda")
    diffusion, classifier = build(MODEL, device, DTYPES[dtype])
    tiny = tiny_decoder(device, DTYPES[dtype])
    rows: list[dict[str, Any]] = []
    kinds: dict[str, dict[str, Any]] = {
        "exact": {},
        "detached": {"options": StepOptions(gradient="detached")},
        "detached, tiny decoder": {
            "options": StepOptions(gradient="detached", guidance_decoder="tiny"),
            "decoder": tiny,
        },
    }
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

            both, twice = torch.cat([diffusion.null_condition(batch).float(), condition]), torch.cat([t, t])
            calls["unguided"] = lambda z=z, b=both, w=twice: diffusion.predict_noise(torch.cat([z, z]), w, b)  # type: ignore[misc]
            calls["literal"] = literal
            for kind, fields in kinds.items():
                spec = Spec(diffusion, classifier, **fields)
                eager = flat(spec.step())
                calls[f"{kind}, eager"] = lambda run=eager, x=inputs: run(*x)  # type: ignore[misc]
                runtimes = ["cudagraphs"]
                if inductor and kind == "detached, tiny decoder":
                    runtimes.append("inductor")
                for runtime in runtimes:
                    try:
                        started = time.perf_counter()
                        run = flat(StepRunner(spec, runtime, Store("build/gpu-store")).step(batch))
                        got = run(*inputs)
                        seconds = time.perf_counter() - started
                    except (RuntimeError, ValueError) as error:
                        notes[f"{kind}, {runtime}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                        say(notes)
                        continue
                    expected = eager(*inputs)
                    calls[f"{kind}, {runtime}"] = lambda run=run, x=inputs: run(*x)  # type: ignore[misc]
                    parity[f"{kind}, {runtime}"] = {
                        "relative_error": relative_errors(got[0], expected[0]).max().item(),
                        "kept_differs": (got[2] - expected[2]).abs().max().item(),
                        "seconds_to_build": seconds,
                    }
            sdpa = flat(GuidedStep(diffusion, classifier, mode="autograd"))
            calls["exact, eager autograd, sdpa"] = lambda run=sdpa, x=inputs: run(*x)  # type: ignore[misc]
            if reasons := not_supported_reasons(diffusion.modules()):
                notes["xformers"] = "; ".join(reasons)
            else:

                def xformers(run: Any = sdpa, x: Any = inputs) -> Any:
                    with memory_efficient_attention(diffusion.modules()):
                        return run(*x)

                try:
                    error = relative_errors(xformers()[0], sdpa(*inputs)[0]).max().item()
                    parity["exact, eager autograd, xformers"] = {"relative_error": error}
                    calls["exact, eager autograd, xformers"] = xformers
                except (RuntimeError, NotImplementedError, ValueError) as failed:
                    notes["xformers"] = f"{type(failed).__name__}: {str(failed).splitlines()[0]}"
            ours, plain = calls["exact, eager"](), literal()
            parity["exact, literal"] = {"relative_error": relative_errors(ours[0], plain[0]).max().item()}
            torch.cuda.reset_peak_memory_stats()
            seconds = spread(in_turns(calls, rounds, warm=2))
            row = {
                "batch": batch, "seconds": seconds, "parity": parity, "notes": notes,
                "times_literal": {n: seconds["literal"]["p50"] / s["p50"] for n, s in seconds.items()},
                "times_unguided": {n: s["p50"] / seconds["unguided"]["p50"] for n, s in seconds.items()},
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            }  # fmt: skip
            rows.append(row)
            for name, s in seconds.items():
                say(f"batch {batch}: {name}: {1e3 * s['p50']:.1f} ms, literal is {row['times_literal'][name]:.2f} x")
            say(parity, notes)
    return {"model": MODEL, "dtype": dtype, "image_size": IMAGE_SIZE, "rows": rows}


@torch.no_grad()
def counterfactual_suite(dtype: str, rounds: int, record: bool) -> dict[str, Any]:
    """Whole counterfactuals under `fast`, at batch 1 and 16, against the literal schedule; memory and roofline."""
    device = torch.device("cuda")
    diffusion, classifier = build(MODEL, device, DTYPES[dtype])
    tiny = tiny_decoder(device, DTYPES[dtype])
    g = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 8, 8, generator=g)
    images = torch.nn.functional.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(0, 1)
    settings = PRESETS["pairs-class"]
    scales = {
        "guidance_scale": settings.guidance_scale, "class_scale": settings.class_scale,
        "distance_scale": settings.distance_scale, "angle_deg": settings.angle,
    }  # fmt: skip
    kinds = {"fast": Config(speed="fast"), "fast, tiny decoder": Config(speed="fast", guidance_decoder="tiny")}
    out: dict[str, Any] = {"model": MODEL, "dtype": dtype, "image_size": IMAGE_SIZE, "labels": len(LABELS)}
    seconds: dict[str, dict[str, float]] = {}
    peaks: dict[str, float] = {}
    engines = {
        (kind, runtime): Engine(
            diffusion, classifier, config, runtime=runtime, guidance_decoder=tiny, device=device,
            store="build/gpu-store",
        )
        for kind, config in kinds.items()
        for runtime in ("eager", "cudagraphs")
    }  # fmt: skip
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
                torch.cuda.reset_peak_memory_stats()
                result = call()
                peaks[f"{name}, batch {batch}"] = torch.cuda.max_memory_allocated() / 1e9
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
        for _ in range(30):
            latency[kind].append(timed(lambda k=kind: engines[k, "cudagraphs"].counterfactual(images[:1])))  # type: ignore[misc]
    out["latency_batch_1"] = {k: quantiles(v, (0.5, 0.95, 0.99)) for k, v in latency.items()}
    say(out["latency_batch_1"])
    if record:  # counting operations for the roofline takes minutes
        write_result("gpu-counterfactual", out)
    out["roofline"] = {}
    for kind in kinds:
        for batch in (1, 16):
            found = profile(engines[kind, "eager"], images, batch=batch)
            out["roofline"][f"{kind}, batch {batch}"] = {
                "parts": {n: asdict(p) for n, p in found.parts.items()}, "limits": found.limits,
                "overhead": found.overhead, "gap_share": found.gap_share, "latency": found.latency,
                "unattributed_share": found.unattributed_share,
            }  # fmt: skip
            say(kind, batch, {n: round(p.roofline, 3) for n, p in found.parts.items()}, found.limits)
    return out


def digits_suite() -> dict[str, Any]:
    """The digits pack on the GPU against the CPU: whole runs, predictions and maps."""
    images = Pack("digits").samples("test", count=32, marker="random").images
    out: dict[str, Any] = {}
    for speed in ("fast", "exact"):
        config = Config(mode="realistic", speed=speed, steps=50 if speed == "exact" else None)  # type: ignore[arg-type]
        runs = {}
        for device, runtime in (("cpu", "eager"), ("cuda", "eager"), ("cuda", "cudagraphs")):
            engine = Engine.from_pack("digits", config=config, runtime=runtime, device=device, store="build/gpu-store")
            started = time.perf_counter()
            runs[device, runtime] = engine.counterfactual(images)
            first = time.perf_counter() - started
            started = time.perf_counter()
            engine.counterfactual(images)
            say(f"{speed}, {device}, {runtime}: {first:.2f} s, again {time.perf_counter() - started:.2f} s")
        reference = runs["cpu", "eager"]
        for (device, runtime), run in runs.items():
            difference = (run.images - reference.images).abs().amax((1, 2, 3))
            out[f"{speed}, {device}, {runtime}"] = {
                "within_1e-4": (difference <= 1e-4).double().mean().item(), "worst": difference.max().item(),
                "median": difference.median().item(),
                "flips_equal": (run.flipped == reference.flipped).double().mean().item(),
                "errors": [e for e in run.errors if e is not None][:1],
            }  # fmt: skip
    maps = {d: Engine.from_pack("digits", device=d).explain(images) for d in ("cpu", "cuda")}
    out["saliency"] = (maps["cuda"].saliency - maps["cpu"].saliency).abs().max().item()
    out["msi"] = (maps["cuda"].msi.score - maps["cpu"].msi.score).abs().max().item()
    say(json.dumps(out, indent=1))
    return out


def main(
    suite: Annotated[str, typer.Option(help="step, counterfactual or digits.")] = "step",
    dtype: Annotated[str, typer.Option(help="Of the diffusion model: fp16, bf16 or fp32.")] = "fp16",
    batches: Annotated[str, typer.Option(help="Of the suite step.")] = "1,4,8",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 10,
    inductor: Annotated[bool, typer.Option(help="Compile with torch.compile as well, which takes minutes.")] = False,
    record: Annotated[bool, typer.Option(help="Write bench/results/gpu-SUITE.json.")] = False,
) -> None:
    """Run one suite.

    Example: python -m bench.gpu --suite counterfactual --record
    """
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: needs a CUDA device")
    torch.manual_seed(0)
    if suite == "step":
        result = step_suite(dtype, [int(b) for b in batches.split(",")], rounds, inductor)
    elif suite == "counterfactual":
        result = counterfactual_suite(dtype, rounds, record)
    elif suite == "digits":
        result = digits_suite()
    else:
        raise typer.BadParameter(f"expected step, counterfactual or digits, got {suite!r}", param_hint="--suite")
    if record:
        say(write_result(f"gpu-{suite}", result))
    else:
        print(json.dumps({"environment": environment(), **result}))


if __name__ == "__main__":
    typer.run(main)
