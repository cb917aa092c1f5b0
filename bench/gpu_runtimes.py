"""Suites of bench.gpu for what a step runs through: xformers' attention, ONNX Runtime on CUDA, large models."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.gpu_models import LARGE, Where, first_line, large_model
from bench.record import in_turns, say, spread
from counterlens.engine.config import StepOptions
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.attention import memory_efficient_attention, not_supported_reasons
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.placing import full_precision
from counterlens.engine.packs import Pack
from counterlens.engine.runtime.choice import StepRunner
from counterlens.engine.runtime.spec import Spec, flat, relative_errors
from counterlens.export.store import Store

STORE = "build/gpu-store"


@torch.no_grad()
def xformers_suite(where: Where, batches: list[int], rounds: int) -> dict[str, Any]:
    """xformers' attention against SDPA: seconds of a step, exact and detached, and parity; or all its reasons."""
    diffusion, classifier, _ = where.models()
    out: dict[str, Any] = where.facts() | {"rows": []}
    if reasons := not_supported_reasons(diffusion.modules()):
        say(reasons)
        return out | {"not_supported": reasons}
    import xformers

    out["xformers"] = xformers.__version__
    with frozen(*diffusion.modules(), classifier.module), full_precision():
        for batch in batches:
            calls, parity = {}, {}
            for gradient in ("exact", "detached"):
                options = StepOptions(gradient=gradient)  # type: ignore[arg-type]
                inputs = Spec(diffusion, classifier, options=options).example(batch)
                step = flat(GuidedStep(diffusion, classifier, options, mode="autograd"))

                def fast(run: Any = step, x: Any = inputs) -> Any:
                    with memory_efficient_attention(diffusion.modules()):
                        return run(*x)

                calls[f"{gradient}, sdpa"] = lambda run=step, x=inputs: run(*x)
                calls[f"{gradient}, xformers"] = fast
                parity[gradient] = relative_errors(fast()[0], step(*inputs)[0]).max().item()
            seconds = spread(in_turns(calls, rounds, warm=2))
            out["rows"].append({"batch": batch, "seconds": seconds, "relative_error": parity})
            say(batch, {name: round(1e3 * s["p50"], 1) for name, s in seconds.items()}, parity)
    return out


@torch.no_grad()
def onnxruntime_suite(where: Where, batches: list[int], rounds: int, full: bool) -> dict[str, Any]:
    """Guided steps by ONNX Runtime on the device against eager: parity at fp32, seconds; `full`: SD 1.x in fp16 too."""
    import onnxruntime

    from tests.conftest import make_tiny

    pack = Pack("digits")
    images = pack.samples("test", count=4, marker="random").images
    cases: dict[str, Any] = {
        "digits": (pack.diffusion(), pack.classifier("clean"), images),
        "tiny": (*make_tiny(), None),
    }
    out: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "rows": {}}
    if full:
        diffusion, classifier, _ = where.models()
        cases["stable-diffusion-1.x"] = (diffusion, classifier, None)
    for name, (diffusion, classifier, real) in cases.items():
        place_on(where.device, diffusion, classifier)
        with frozen(*diffusion.modules(), classifier.module), full_precision():
            for gradient in ("exact", "detached"):
                options = StepOptions(gradient=gradient)  # type: ignore[arg-type]
                spec = Spec(diffusion, classifier, options=options, images=real)
                row: dict[str, Any] = {}
                out["rows"][f"{name}, {gradient}"] = row
                started = time.perf_counter()
                try:
                    runner = StepRunner(spec, "onnxruntime", Store(STORE))
                    run = flat(runner.step(batches[0]))
                except (RuntimeError, ValueError) as error:
                    row["failed"] = first_line(error)
                    continue
                row["seconds_to_build"] = time.perf_counter() - started
                row["checked"] = runner.reports()
                eager = flat(spec.step())
                for batch in batches:
                    inputs = spec.example(batch)
                    steps = {"eager": eager, "onnxruntime": run}
                    calls = {label: lambda f=f, x=inputs: f(*x) for label, f in steps.items()}
                    seconds = spread(in_turns(calls, rounds, warm=2))
                    error = relative_errors(run(*inputs)[0], eager(*inputs)[0]).max().item()
                    row[str(batch)] = {"seconds": seconds, "relative_error": error}
                say(name, gradient, row)
    return out


def place_on(device: torch.device, diffusion: Any, classifier: Any) -> None:
    """Move a pair of models."""
    from counterlens.engine.models.placing import place

    place(diffusion, device)
    classifier.module.to(device)


@torch.no_grad()
def models_suite(where: Where, rounds: int) -> dict[str, Any]:
    """A detached and an exact guided step of each large generator: seconds and peak memory, or why it does not fit."""
    out: dict[str, Any] = {"dtype": "bf16", "rows": {}}
    for name in LARGE:
        row: dict[str, Any] = {}
        out["rows"][name] = row
        try:
            diffusion, classifier = large_model(name, where.dry)
            with frozen(*diffusion.modules(), classifier.module):
                for gradient in ("detached", "exact"):
                    options = StepOptions(gradient=gradient)  # type: ignore[arg-type]
                    inputs = Spec(diffusion, classifier, options=options).example(1)
                    step = flat(GuidedStep(diffusion, classifier, options, mode="autograd"))
                    if not where.dry:
                        torch.cuda.reset_peak_memory_stats()
                    seconds = spread(in_turns({gradient: lambda run=step, x=inputs: run(*x)}, rounds, warm=1))
                    peak = 0.0 if where.dry else torch.cuda.max_memory_allocated() / 1e9
                    row[gradient] = {"seconds": seconds[gradient], "peak_gb": peak}
                    say(name, gradient, row[gradient])
        except torch.OutOfMemoryError as error:
            row["failed"] = first_line(error)
        diffusion = classifier = step = inputs = None
        if not where.dry:
            torch.cuda.empty_cache()
    return out
