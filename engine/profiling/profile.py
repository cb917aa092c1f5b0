"""One profile of guided sampling: parts, gaps, guidance overhead, roofline, latencies."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..core.core import EngineCore
from ..core.targets import Targets
from ..errors import UsageError
from ..guidance.schedule import ddim
from ..guidance.spans import STEP_PARTS, listening
from ..models.conditions import cat
from ..runtime.spec import DTYPES, flat
from .costs import count_costs, measure_limits
from .recorder import Recorder, Span

STAGES = ("predictions", "encode", "inversion", "guided step", "unguided step", "decode")
REPEATS = 7  # of steps that are timed outside the run


@dataclass
class Part:
    """One part of a guided step at the profiled batch.

    Attributes:
        seconds: mean time in one step.
        share: of the step's time.
        calls: how often it runs in one step.
        gflop, mbytes: arithmetic, and memory traffic if every operation goes to memory.
        roofline: time that the machine's measured limits allow over the time that it took; caches can lift it over 1.
        peak_mbytes: of the step's tensors alive at once, weights left out.
    """

    seconds: float
    share: float
    calls: float
    gflop: float
    mbytes: float
    roofline: float
    peak_mbytes: float


@dataclass
class Profile:
    """What `profile` measured; times in seconds.

    Attributes:
        runtime, why: what executed the guided steps, and why that.
        parts_runtime: where the parts were timed: a compiled step is one call, so its parts are those of eager.
        batch, slots, images, steps: per call; slots with padding; in all; per image.
        stages: mean time per image of each stage, `bookkeeping` (self time of the sampler's steps) and `unattributed`.
        unattributed_share: of the run's time: in no stage.
        step: p50, p95, p99 and mean of a guided step as the sampler calls it.
        parts: of a guided step, by name.
        gap_share: of the timed step: between its parts (launching, and glue that is in none).
        per_step: for each step of the schedule the mean time of each part (compiled: of the whole step).
        latency: p50, p95, p99 and mean of a call's time, from images to measured counterfactuals.
        overhead: a guided step over an unguided one, and a guided image over an unguided one.
        limits: FLOP/s and bytes/s that this machine reached.
        device: its name.
        settings: of the run.
    """

    runtime: str
    why: str
    parts_runtime: str
    batch: int
    slots: int
    images: int
    steps: int
    stages: dict[str, float]
    unattributed_share: float
    step: dict[str, float]
    parts: dict[str, Part]
    gap_share: float
    per_step: list[dict[str, float]]
    latency: dict[str, float]
    overhead: dict[str, float]
    limits: dict[str, float]
    device: str
    settings: dict[str, Any]
    spans: list[Span]

    def as_json(self) -> dict[str, Any]:
        """Everything but the single spans, which the trace holds."""
        return {k: v for k, v in asdict(self).items() if k != "spans"}


def profile(
    engine: EngineCore,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    targets: Targets = "runner-up",
    config: Config | None = None,
    *,
    batch: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Run counterfactuals in calls of `batch` images with every part timed, after one call that is not counted.

    Args:
        engine: its runtime executes the steps.
        images: at least `batch`; what does not fill a call is left out.
        targets: as for `Engine.counterfactual`.
        config: instead of the engine's.
        batch: images per call; latency is that of a call.
        say: told what is being done.

    Raises:
        UsageError: there are fewer images than `batch`, or something does not fit `Engine.counterfactual`.
    """
    if not 1 <= batch <= len(images):
        raise UsageError(f"batch: expected 1 to {len(images)}, the number of images, got {batch}")
    config = config or engine.config
    settings = engine.settings(config)
    device = engine.device
    chosen = list(targets) if isinstance(targets, (Sequence, Tensor)) and not isinstance(targets, str) else None
    calls = [range(i, i + batch) for i in range(0, len(images) - batch + 1, batch)]
    slots = engine.slots_for(batch)

    def run(rows: range) -> None:
        engine.counterfactual(
            images[list(rows)], targets if chosen is None else [chosen[i] for i in rows], None, config, whole=False
        )

    say("warming up")
    engine.warmup([batch], config, measure=False)
    run(calls[0])
    recorder = Recorder(device)
    for number, rows in enumerate(calls):
        say(f"call {number + 1} of {len(calls)}")
        with listening(recorder), recorder.span("call"):
            run(rows)
    spans = recorder.spans()
    children = _children(spans)
    choice = engine.step_choice(batch, config)

    steps = [s for s in spans if s.name == "guided step"]
    if not steps:
        raise UsageError("images: no guided step ran; every target is the prediction already, or an image is broken")
    timed, timed_spans = steps, spans
    if choice.runtime != "eager":
        say("timing the parts in eager")
        timed_spans = _eager_steps(engine, config, slots, device)
        timed = [s for s in timed_spans if s.name == "guided step"]
    say("counting")
    spec = engine.spec(settings)
    with engine.frozen():
        costs = count_costs(flat(spec.step()), spec.example(slots))
    limits = measure_limits(device, DTYPES[spec.precision])
    total = sum(s.seconds for s in timed)
    parts = {}
    for name in STEP_PARTS:
        own = [s for s in timed_spans if s.name == name]
        if own:
            mean = sum(s.seconds for s in own) / len(timed)
            cost = costs[name]
            ideal = max(cost.flops / limits.flops, cost.bytes / limits.bandwidth)
            parts[name] = Part(
                mean, mean * len(timed) / total, len(own) / len(timed), cost.flops / 1e9, cost.bytes / 1e6,
                ideal / mean, cost.peak_bytes / 1e6,
            )  # fmt: skip
    stages, unattributed = _stages(spans, children, len(calls) * batch)
    unguided = _unguided_seconds(engine, config, slots, device)
    guided = statistics.median(s.seconds for s in steps)
    per_image = sum(stages.values())
    guided_time = stages.get("guided step", 0.0)
    return Profile(
        runtime=choice.runtime,
        why=choice.why,
        parts_runtime="eager" if choice.runtime != "eager" else choice.runtime,
        batch=batch,
        slots=slots,
        images=len(calls) * batch,
        steps=round(sum(s.name == "step" for s in spans) / len(calls)),
        stages=stages,
        unattributed_share=unattributed,
        step=_levels([s.seconds for s in steps]),
        parts=parts,
        gap_share=1 - sum(p.share for p in parts.values()),
        per_step=_per_step(spans, children),
        latency=_levels([s.seconds for s in spans if s.name == "call"]),
        overhead={
            "guided_step": guided,
            "unguided_step": unguided,
            "step": guided / unguided,
            "guided_image": per_image,
            "unguided_image": per_image - guided_time * (1 - unguided / guided),
            "image": per_image / (per_image - guided_time * (1 - unguided / guided)),
        },
        limits=asdict(limits),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        settings=settings.model_dump(),
        spans=spans,
    )


def _children(spans: list[Span]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = defaultdict(list)
    for i, span in enumerate(spans):
        out[span.parent].append(i)
    return out


def _stages(spans: list[Span], children: dict[int, list[int]], images: int) -> tuple[dict[str, float], float]:
    """Seconds per image of each stage, and the share of the calls' time that is in none of them."""
    total = sum(s.seconds for s in spans if s.name == "call")
    out = {name: sum(s.seconds for s in spans if s.name == name) / images for name in STAGES}
    own = [(s, sum(spans[c].seconds for c in children[i])) for i, s in enumerate(spans) if s.name == "step"]
    out["bookkeeping"] = sum(s.seconds - inside for s, inside in own) / images
    out["unattributed"] = total / images - sum(out.values())
    return {name: seconds for name, seconds in out.items() if seconds or name == "unattributed"}, out[
        "unattributed"
    ] * images / total


def _per_step(spans: list[Span], children: dict[int, list[int]]) -> list[dict[str, float]]:
    """For each step of the schedule the mean seconds of each part, over the calls."""
    rows: list[dict[str, list[float]]] = []
    place: dict[int, int] = defaultdict(int)
    for i, span in enumerate(spans):
        if span.name != "step":
            continue
        number = place[span.parent]
        place[span.parent] += 1
        if number == len(rows):
            rows.append(defaultdict(list))
        seconds: dict[str, float] = defaultdict(float)
        for child in children[i]:
            inner = children[child]
            for leaf in inner or [child]:
                seconds[spans[leaf].name] += spans[leaf].seconds
        seconds["bookkeeping"] = span.seconds - sum(seconds.values())
        for name, value in seconds.items():
            rows[number][name].append(value)
    return [{name: statistics.mean(values) for name, values in row.items()} for row in rows]


@torch.no_grad()
def _eager_steps(engine: EngineCore, config: Config, slots: int, device: torch.device) -> list[Span]:
    spec = engine.spec(engine.settings(config))
    step, inputs = flat(spec.step()), spec.example(slots)
    with engine.frozen():
        step(*inputs)
        recorder = Recorder(device)
        with listening(recorder):
            for _ in range(REPEATS):
                with recorder.span("guided step"):
                    step(*inputs)
    return recorder.spans()


@torch.no_grad()
def _unguided_seconds(engine: EngineCore, config: Config, slots: int, device: torch.device) -> float:
    """Median time of a step without guidance: both noise predictions as one batch, and the DDIM update."""
    spec = engine.spec(engine.settings(config))
    z, timestep, timestep_prev, *_ = spec.example(slots)
    levels = engine.diffusion.alphas_cumprod.to(z)
    target = torch.zeros(slots, dtype=torch.long, device=z.device)
    both = cat(engine.diffusion.null_condition(slots), engine.diffusion.condition(target))
    with engine.frozen():
        predict_noise = engine.predict_noise(slots)

        def step() -> None:
            eps = predict_noise(torch.cat([z, z]), torch.cat([timestep, timestep]), both)
            ddim(z, eps[slots:], levels[timestep], levels[timestep_prev])

        step()
        times = []
        for _ in range(REPEATS):
            recorder = Recorder(device)
            with recorder.span("unguided"):
                step()
            times.append(recorder.spans()[0].seconds)
    return statistics.median(times)


def _levels(seconds: list[float]) -> dict[str, float]:
    p50, p95, p99 = (
        torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95, 0.99]).double()).tolist()
    )
    return {"p50": p50, "p95": p95, "p99": p99, "mean": statistics.mean(seconds), "count": len(seconds)}
