"""The benchmarks of whole counterfactuals: `python -m bench.run --suite counterfactual --baseline literal`.

Everything that is compared is timed in turns within one run, and gains are reported as ratios of medians. What comes
from fewer or cheaper steps (`algorithm`: literal in eager against ours in eager) stands apart from what comes from
compiling them (`compile`: ours in eager against ours compiled); one thread count, float32, no callbacks.

The literal baseline is frozen: `pairs-class` schedule, 171 steps, the pack's own scales and angle, its own best batch
size. A whole run takes minutes, so its time is that of a few of its steps times 171, and one whole run is timed beside
it (`--whole`). Results go to bench/results/speed-SUITE.json; `bench.report --compare` reads the `figures` in there.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.baselines.literal import literal_loop, literal_step
from bench.measure import predictions, two_targets
from bench.pareto import judge_features, literal_settings, not_inferior
from bench.record import RESULTS, environment, in_turns, interval, quantiles, say, spread, timed, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.config import Settings, StepOptions
from counterlens.engine.guidance.jobs import Job, Outcome, seeded_noise
from counterlens.engine.guidance.sampler import Sampler
from counterlens.engine.guidance.schedule import make_schedule
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.images.files import to_uint8
from counterlens.engine.metrics.distribution import kernel_distance
from counterlens.engine.models.freezing import frozen
from counterlens.engine.packs import Pack
from counterlens.export.store import Store

STORE = Path("build/bench-store")
CACHE = Path("build/bench-quality")  # counterfactuals of the quality suite, so that it can be stopped and go on
LITERAL_STEPS = 171
Figures = dict[str, dict[str, Any]]


def open_engine(runtime: str, config: Config) -> Engine:
    """The digits engine under one runtime; compiled steps and parts are built into build/bench-store."""
    engine = Engine.from_pack("digits", config=config, runtime=runtime, store=STORE, device="cpu")
    if runtime == "onnxruntime":
        for what in ("unet", "vae-encoder", "vae-decoder"):
            compiled_part(engine, what)
    return engine


def figure(value: float, better: str, unit: str) -> dict[str, Any]:
    """A figure that `bench.report --compare` can compare; better is lower or higher."""
    return {"value": value, "better": better, "unit": unit}


# Counterfactuals


def literal_steps_times(
    engine: Engine, settings: Settings, images: Tensor, target: Tensor, batch: int, steps: int
) -> Callable[[], Any]:
    """A call that takes `steps` literal steps of a batch, from the middle of the schedule."""
    schedule = make_schedule(len(engine.diffusion.alphas_cumprod), settings.steps, settings.strength)
    z = seeded_noise(engine.diffusion.latent_shape, list(range(batch)), torch.zeros(1))
    x, goal = images[:batch], target[:batch]
    middle = len(schedule) // 2
    pairs = list(zip(schedule.timesteps, schedule.timesteps_prev, strict=True))[middle : middle + steps]

    def call() -> None:
        state = z
        with frozen(*engine.diffusion.modules(), engine.classifier.module):
            for t, t_prev in pairs:
                state, _, _ = literal_step(
                    engine.diffusion, engine.classifier, state, t, t_prev, x, goal,
                    guidance_scale=settings.guidance_scale, class_scale=settings.class_scale,
                    distance_scale=settings.distance_scale, angle_deg=settings.angle,
                )  # fmt: skip

    return call


def counterfactual_suite(baseline: str, runtime: str, rounds: int, speeds: list[str], whole: bool) -> dict[str, Any]:
    """End-to-end time per counterfactual at full batches and at batch 1, of every speed, against the literal loop."""
    pack = Pack("digits")
    settings = literal_settings(pack)
    samples = pack.samples("test", count=64, marker="random")
    engines = {
        (name, run): open_engine(run, Config(mode="realistic", speed=name))  # type: ignore[arg-type]
        for name in speeds
        for run in dict.fromkeys(("eager", runtime))
    }
    first = next(iter(engines.values()))
    images = samples.images
    targets = first.resolve_targets("runner-up", first.probabilities(images))

    calls: dict[str, Callable[[], Any]] = {}
    shares: dict[str, float] = {}  # what one call's time is multiplied with to be one counterfactual's
    literal_batches = (1, 4, 8, 16) if baseline == "literal" else ()
    for batch in literal_batches:
        calls[f"literal, batch {batch}"] = literal_steps_times(first, settings, images, targets, batch, 2)
        shares[f"literal, batch {batch}"] = LITERAL_STEPS / 2 / batch
    for (name, run), engine in engines.items():
        for count, label in ((64, "full"), (1, "one")):
            x, t = images[:count], targets[:count]
            calls[f"{name}, {run}, {label}"] = lambda e=engine, x=x, t=t: e.counterfactual(x, t)  # type: ignore[misc]
            shares[f"{name}, {run}, {label}"] = 1 / count
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            repeats = 4 if name.endswith("one") else 1
            times[name] += [timed(call) * shares[name] for _ in range(repeats)]
    seconds = {name: quantiles(v, (0.2, 0.5, 0.8, 0.95, 0.99)) | {"calls": len(v)} for name, v in times.items()}
    for name, q in seconds.items():
        say(f"{name}: {q['p50']:.4f} s (p20 {q['p20']:.4f}, p80 {q['p80']:.4f}) per counterfactual")
    result: dict[str, Any] = {"seconds_per_counterfactual": seconds, "images": len(images)}
    figures: Figures = {}
    best = min((f"literal, batch {b}" for b in literal_batches), key=lambda n: seconds[n]["p50"], default=None)
    for name in speeds:
        for label, against in (("full", best), ("one", "literal, batch 1")):
            ours, eager = (seconds[f"{name}, {run}, {label}"]["p50"] for run in (runtime, "eager"))
            figures[f"{name}, {label}"] = figure(ours, "lower", "s per counterfactual")
            if best is not None and against is not None:
                literal = seconds[against]["p50"]
                gain = {"algorithm": literal / eager, "compile": eager / ours, "both": literal / ours}
                result.setdefault("times_literal", {})[f"{name}, {label}"] = gain
                figures[f"{name}, {label}, times literal"] = figure(literal / ours, "higher", "x")
                say(f"{name}, {label}: " + ", ".join(f"{k} {v:.1f}x" for k, v in gain.items()))
    result["best_literal_batch"] = best
    if whole and best is not None:
        batch = int(best.split()[-1])
        noise = seeded_noise(first.diffusion.latent_shape, list(range(batch)), torch.zeros(1))
        fields = settings.model_dump()
        names = ("steps", "strength", "guidance_scale", "class_scale", "distance_scale")
        with frozen(*first.diffusion.modules(), first.classifier.module):
            took = timed(
                lambda: literal_loop(
                    first.diffusion,
                    first.classifier,
                    images[:batch],
                    targets[:batch],
                    noise,
                    angle_deg=settings.angle,
                    **{n: fields[n] for n in names},
                )
            )
        extrapolated = seconds[best]["p50"]
        result["whole_literal_run"] = {"seconds_per_counterfactual": took / batch, "extrapolated": extrapolated}
        say(f"one whole literal run: {took / batch:.3f} s per counterfactual, {extrapolated:.3f} s extrapolated")
    return result | {"figures": figures}


# Quality on the test split


def test_pairs(engine: Engine, pack: Pack, count: int | None) -> tuple[Tensor, Tensor]:
    """Every test digit twice: images [2N, 3, H, W]; targets [2N], the runner-up and a random other label."""
    images = pack.samples("test", count=count, marker="random").images
    return torch.cat([images, images]), torch.cat(two_targets(engine, images))


def cached_run(
    name: str, engine: Engine, images: Tensor, targets: Tensor, settings: Settings, until: float
) -> Tensor | None:
    """Counterfactuals as saved, in chunks of 16 that a later call takes from the cache; None if time ran out."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{name}.pt"
    state = torch.load(path, weights_only=True) if path.exists() else {}
    key = json.dumps(settings.model_dump(), sort_keys=True) + str(len(images))
    if state.get("key") != key:
        state = {"key": key, "images": torch.zeros(0, 3, *images.shape[2:], dtype=torch.uint8)}
    config = Config(mode="realistic", **settings.model_dump())
    while (done := len(state["images"])) < len(images):
        if time.monotonic() > until:
            say(f"{name}: {done} of {len(images)}; run again to go on")
            return None
        part = slice(done, done + 16)
        # Padded to 16 images: the last chunk runs in as many slots as the others.
        rows = torch.arange(done, done + 16).clamp(max=len(images) - 1)
        result = engine.counterfactual(images[rows], targets[rows], config=config)
        made = len(images[part])
        if failed := [e for e in result.errors[:made] if e is not None]:
            raise RuntimeError(f"{name}: {failed[0]}")
        state["images"] = torch.cat([state["images"], to_uint8(result.images[:made])])
        torch.save(state, path)
    return state["images"].float() / 255


def quality_suite(runtime: str, speeds: list[str], count: int | None, minutes: float) -> dict[str, Any] | None:
    """Quality of every speed beside the literal schedule's, paired over all test digits and two targets.

    The literal schedule runs in our exact engine, whose steps are the literal ones within parity (bench.exactness).
    """
    pack = Pack("digits")
    judge = pack.classifier("judge")
    runs = {"literal": literal_settings(pack)}
    engine = open_engine(runtime, Config(mode="realistic"))
    runs |= {name: engine.settings(Config(mode="realistic", speed=name)) for name in speeds}  # type: ignore[arg-type]
    images, targets = test_pairs(engine, pack, count)
    until = time.monotonic() + 60 * minutes
    made = {name: cached_run(name, engine, images, targets, settings, until) for name, settings in runs.items()}
    if any(after is None for after in made.values()):
        return None
    real = judge_features(judge, images[: len(images) // 2])
    g = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(images), (len(images),), generator=g) for _ in range(200)]
    out: dict[str, Any] = {"images": len(images), "settings": {n: s.model_dump() for n, s in runs.items()}, "rows": {}}
    values: dict[str, dict[str, Tensor]] = {}
    for name, after in made.items():
        assert after is not None
        features = judge_features(judge, after)
        values[name] = {
            "flip": (predictions(engine.classifier, after) == targets).double(),  # type: ignore[arg-type]
            "transfer": (predictions(judge, after) == targets).double(),
            "l1": (after - images).abs().mean(dim=(1, 2, 3)).double(),
        }
        row: dict[str, Any] = {k: interval(v) for k, v in values[name].items()}
        distances = torch.stack([kernel_distance(real, features[d]) for d in draws])
        low, high = distances.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        row["kid"] = {"mean": kernel_distance(real, features).item(), "low": low, "high": high}
        if name != "literal":
            row["minus_literal"] = {k: interval(v - values["literal"][k]) for k, v in values[name].items()}
            row["not_inferior"] = not_inferior(row["minus_literal"]) | {
                "kid": row["kid"]["mean"] <= out["rows"]["literal"]["kid"]["high"]
            }
        out["rows"][name] = row
        say(name, {k: round(row[k]["mean"], 4) for k in ("flip", "transfer", "l1", "kid")}, row.get("not_inferior"))
    return out | {"figures": {f"{n}, transfer": figure(r["transfer"]["mean"], "higher", "share")
                              for n, r in out["rows"].items()}}  # fmt: skip


# One guided step


KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "detached": {"gradient": "detached"},
    "exact, tiny decoder": {"guidance_decoder": "tiny"},
    "detached, tiny decoder": {"gradient": "detached", "guidance_decoder": "tiny"},
    "detached, latent distance": {"gradient": "detached", "distance": "latent"},
    "detached, tiny decoder, latent distance": {
        "gradient": "detached", "guidance_decoder": "tiny", "distance": "latent",
    },
}  # fmt: skip


def guided_step_suite(runtime: str, rounds: int, batch: int) -> dict[str, Any]:
    """Guidance overhead: a guided step against an unguided one (both noise predictions and the DDIM update)."""
    pack = Pack("digits")
    settings = literal_settings(pack)
    engine = open_engine("eager", Config(mode="realistic"))
    compiled = open_engine(runtime, Config(mode="realistic")) if runtime != "eager" else None
    images = pack.samples("test", count=batch, marker="random").images
    targets = engine.resolve_targets("runner-up", engine.probabilities(images))
    diffusion = engine.diffusion
    z = seeded_noise(diffusion.latent_shape, list(range(batch)), torch.zeros(1))
    t, t_prev = torch.full((batch,), 301), torch.full((batch,), 281)
    conditions = torch.cat([diffusion.null_condition(batch), diffusion.condition(targets)])
    scales: dict[str, Any] = {
        "guidance_scale": settings.guidance_scale, "class_scale": settings.class_scale,
        "distance_scale": settings.distance_scale, "angle_deg": settings.angle,
    }  # fmt: skip
    latents = diffusion.encode(images)

    def unguided() -> None:
        diffusion.predict_noise(torch.cat([z, z]), torch.cat([t, t]), conditions)

    calls: dict[str, Callable[[], Any]] = {
        "unguided": unguided,
        "literal": lambda: literal_step(
            diffusion, engine.classifier, z, 301, 281, images, targets, **scales
        ),
    }  # fmt: skip
    if compiled is not None:
        unet = compiled_part(compiled, "unet")
        calls["unguided, compiled"] = lambda: unet(torch.cat([z, z]), torch.cat([t, t]), conditions)
    for name, fields in KINDS.items():
        chosen = Settings(**settings.model_dump() | fields)
        seen = latents if chosen.distance == "latent" else images
        for label, one in (("", engine), (", compiled", compiled)):
            if one is not None:
                step = one.runners.step(chosen).step(batch)
                calls[name + label] = lambda s=step, x=seen: s(z, t, t_prev, targets, x, targets, **scales)  # type: ignore[misc]
    with engine.frozen():
        seconds = spread(in_turns(calls, rounds))
        fidelity = step_fidelity(engine, images[:8], targets[:8], settings)
    overhead = {
        name: q["p50"] / seconds["unguided, compiled" if name.endswith("compiled") else "unguided"]["p50"]
        for name, q in seconds.items()
        if not name.startswith("unguided")
    }
    for name, ratio in overhead.items():
        say(f"{name}: {1e3 * seconds[name]['p50']:.1f} ms, {ratio:.2f} x an unguided step")
    for name, q in fidelity.items():
        say(f"{name}: cosine to the exact guidance {q['p50']:.3f} (p20 {q['p20']:.3f})")
    figures = {f"{name}, overhead": figure(ratio, "lower", "x") for name, ratio in overhead.items()}
    return {"batch": batch, "seconds": seconds, "overhead": overhead, "fidelity": fidelity, "figures": figures}


def compiled_part(engine: Engine, what: str) -> Callable[..., Any]:
    """A part of the models as a compiled function."""
    from counterlens.engine.runtime import artefacts

    spec = engine.spec(engine.settings(engine.config), what=what)
    return artefacts.open_function(artefacts.build(spec, "onnx", Store(STORE)))


@torch.no_grad()
def step_fidelity(engine: Engine, images: Tensor, targets: Tensor, settings: Settings) -> dict[str, Any]:
    """Cosine of every cheaper guidance to the exact one, at the same latents along exact runs of 20 steps."""
    diffusion = engine.diffusion
    steps = {
        name: GuidedStep(
            diffusion, engine.classifier, StepOptions(**fields, guidance_every=2),
            decoder=engine.guidance_decoder if "guidance_decoder" in fields else None,
        )
        for name, fields in KINDS.items()
    }  # fmt: skip
    scales = torch.tensor(
        [settings.guidance_scale, settings.class_scale, settings.distance_scale, settings.angle], dtype=torch.float64
    ).repeat(len(images), 1)
    names = ("guidance_scale", "class_scale", "distance_scale", "angle_deg")
    latents = diffusion.encode(images)
    cosines: dict[str, list[float]] = {name: [] for name in steps if name != "exact"}
    by_step: dict[str, list[float]] = {name: [] for name in cosines}

    def watched(*given: Tensor, **_: Any) -> Any:
        z, t, t_prev, condition, image, target = given
        numbers = dict(zip(names, scales.unbind(1), strict=True))
        exact = steps["exact"](*given, **numbers)
        for name in cosines:
            seen = latents if "latent" in name else image
            other = steps[name](z, t, t_prev, condition, seen, target, **numbers)[3]
            values = torch.cosine_similarity(other.flatten(1), exact[3].flatten(1))
            cosines[name] += values.tolist()
            by_step[name].append(values.mean().item())
        return exact[:3]

    run = settings.model_copy(update={"steps": 50})
    sampler = Sampler(diffusion, len(images), watched, run.graph)
    for i in range(len(images)):
        sampler.submit(Job(images[i], int(targets[i]), i, run))
    while sampler.busy:
        sampler.tick()
    return {name: quantiles(v) | {"by_step": by_step[name]} for name, v in cosines.items()}


# Slots


def batching_suite(runtime: str, rounds: int, slots: int = 8) -> dict[str, Any]:
    """64 requests with mixed step counts: slots that refill against fixed batches that wait for their longest one."""
    pack = Pack("digits")
    engine = open_engine(runtime, Config(mode="realistic", speed="fast"))
    images = pack.samples("test", count=64, marker="random").images
    targets = engine.resolve_targets("runner-up", engine.probabilities(images))
    g = torch.Generator().manual_seed(0)
    steps = torch.tensor([4, 6, 8, 12, 20])[torch.randint(5, (64,), generator=g)].tolist()
    jobs = [
        Job(images[i], int(targets[i]), i, engine.settings(Config(mode="realistic", speed="fast", steps=n)))
        for i, n in enumerate(steps)
    ]

    def run(groups: list[list[int]]) -> dict[int, Outcome]:
        out: dict[int, Outcome] = {}
        for group in groups:
            sampler = engine.sampler(Config(mode="realistic", speed="fast"), slots)
            index = {sampler.submit(jobs[i]): i for i in group}
            while sampler.busy:
                out |= {index[o.id]: o for o in sampler.tick()}
        return out

    fixed = [list(range(i, i + slots)) for i in range(0, 64, slots)]
    with engine.frozen():
        calls = {"slots": lambda: run([list(range(64))]), "fixed batches": lambda: run(fixed)}
        seconds = spread(in_turns(calls, rounds))
        together = run([list(range(64))])
        alone = {i: run([[i]])[i] for i in range(0, 64, 8)}
    equal = all(torch.equal(together[i].image, o.image) for i, o in alone.items())  # type: ignore[arg-type]
    ratio = seconds["fixed batches"]["p50"] / seconds["slots"]["p50"]
    say(f"64 requests in {slots} slots: {ratio:.2f} x fixed batches; bit-identical to solo runs: {equal}")
    return {
        "steps": steps, "slots": slots, "seconds": seconds, "throughput_ratio": ratio, "equal_to_solo": equal,
        "figures": {"throughput against fixed batches": figure(ratio, "higher", "x")},
    }  # fmt: skip


def growth_suite(runtime: str, small: int = 100, large: int = 1000) -> dict[str, Any]:
    """Time per image and memory at many images."""
    import resource

    engine = open_engine(runtime, Config(mode="realistic", speed="fast"))
    images = Pack("digits").samples("train", count=large, marker="random").images
    engine.counterfactual(images[:32])
    rounds: dict[int, list[float]] = {small: [], large: []}
    memory = []
    for _ in range(3):
        rounds[small].append(timed(lambda: engine.counterfactual(images[:small])) / small)
    memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    rounds[large].append(timed(lambda: engine.counterfactual(images)) / large)
    rounds[small].append(timed(lambda: engine.counterfactual(images[:small])) / small)
    memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    own = 5 * images.numel() * 4 / 2**20  # what the call is given and gives back, and its 8-bit round trip
    ratio = statistics.median(rounds[large]) / statistics.median(rounds[small])
    say(f"time per image at {large}: {ratio:.3f} x that at {small}; peak memory {memory} MiB, results {own:.0f} MiB")
    return {
        "seconds_per_image": {str(k): v for k, v in rounds.items()}, "ratio": ratio, "peak_mib": memory,
        "images_and_results_mib": own, "figures": {"cost growth": figure(ratio, "lower", "x")},
    }  # fmt: skip


def explain_suite(runtime: str, rounds: int) -> dict[str, Any]:
    """`Engine.explain`: a saliency map alone, and with its counterfactual, per image of a full batch and at batch 1."""
    engine: Any = open_engine(runtime, Config(mode="realistic", speed="fast"))
    if not hasattr(engine, "explain"):
        raise SystemExit("suite explain: the engine in this tree has no explain")
    images = Pack("digits").samples("test", count=16, marker="random").images
    calls = {
        f"{name}, batch {n}": lambda x=images[:n], c=both: engine.explain(x, counterfactual=c)
        for n in (16, 1)
        for name, both in (("saliency", False), ("saliency and counterfactual", True))
    }
    seconds = spread(in_turns(calls, rounds))
    for name, q in seconds.items():
        count = int(name.split()[-1])
        say(f"{name}: {q['p50'] / count:.4f} s an image")
    figures = {n: figure(q["p50"] / int(n.split()[-1]), "lower", "s an image") for n, q in seconds.items()}
    return {"seconds": seconds, "figures": figures}


# Start-up


def startup_suite(times: int) -> dict[str, Any]:
    """Seconds of fresh processes: help, import, opening the pack, the first counterfactual."""
    snippets = {
        "counterlens --help": "import sys; sys.argv = ['counterlens', '--help']; "
        "from counterlens.engine.cli.main import main; main()",
        "import": "from counterlens.engine import Engine; Engine",
        "open the pack": "from counterlens.engine import Engine; Engine.from_pack('digits')",
        "first counterfactual": "import torch; from counterlens.engine import Engine, Config; "
        "Engine.from_pack('digits', config=Config(speed='fast')).counterfactual(torch.rand(1, 3, 32, 32))",
    }
    seconds = {}
    for name, code in snippets.items():
        command = [sys.executable, "-c", code]
        runs = [timed(lambda c=command: subprocess.run(c, capture_output=True, check=True)) for _ in range(times)]  # type: ignore[misc]
        seconds[name] = quantiles(runs)
        say(f"{name}: {seconds[name]['p50']:.2f} s")
    return {"seconds": seconds, "figures": {n: figure(q["p50"], "lower", "s") for n, q in seconds.items()}}


def metrics_suite() -> dict[str, Any]:
    """The metrics' own benchmark."""
    try:
        from bench import metrics
    except ImportError as error:
        raise SystemExit(f"suite metrics: bench.metrics is not in this tree ({error})") from error
    metrics.main()
    raise SystemExit(0)


SUITES = ("counterfactual", "quality", "guided-step", "batching", "growth", "explain", "startup", "metrics")


def main(
    suite: Annotated[str, typer.Option(help=", ".join(SUITES) + ".")] = "counterfactual",
    baseline: Annotated[str, typer.Option(help="literal, or none.")] = "literal",
    runtime: Annotated[str, typer.Option(help="Of our compiled runs.")] = "onnxruntime",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 5,
    speeds: Annotated[str, typer.Option(help="Comma-separated speeds.")] = "turbo,fast,balanced",
    batch: Annotated[int, typer.Option(help="Of the suite guided-step.")] = 16,
    count: Annotated[int | None, typer.Option(help="Test digits of the suite quality; all without it.")] = None,
    minutes: Annotated[float, typer.Option(help="The suite quality stops after so many and goes on next time.")] = 1e9,
    whole: Annotated[bool, typer.Option(help="Time one whole literal run as a check.")] = False,
    record: Annotated[bool, typer.Option(help="Write bench/results/speed-SUITE.json.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run one suite.

    Example: python -m bench.run --suite counterfactual --baseline literal --json
    """
    if suite not in SUITES:
        raise typer.BadParameter(f"expected one of {', '.join(SUITES)}, got {suite!r}", param_hint="--suite")
    if baseline not in ("literal", "none"):
        raise typer.BadParameter(f"expected literal or none, got {baseline!r}", param_hint="--baseline")
    chosen = [s for s in speeds.split(",") if s]
    run: dict[str, Callable[[], dict[str, Any] | None]] = {
        "counterfactual": lambda: counterfactual_suite(baseline, runtime, rounds, chosen, whole),
        "quality": lambda: quality_suite(runtime, chosen, count, minutes),
        "guided-step": lambda: guided_step_suite(runtime, rounds, batch),
        "batching": lambda: batching_suite(runtime, rounds),
        "growth": lambda: growth_suite(runtime),
        "explain": lambda: explain_suite(runtime, rounds),
        "startup": lambda: startup_suite(rounds),
        "metrics": metrics_suite,
    }
    result = run[suite]()
    if result is None:
        raise SystemExit(3)  # not finished, to be run again
    if record:
        path = write_result(f"speed-{suite}", result)
        say(path.relative_to(RESULTS.parent.parent))
    if as_json:
        print(json.dumps({"environment": environment(), **result}))


if __name__ == "__main__":
    typer.run(main)
