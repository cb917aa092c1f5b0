"""A whole counterfactual as one ONNX file: image and target in, counterfactual and measures out; the loop inside."""

from __future__ import annotations

import base64
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError
from counterlens.export.hashing import file_digest
from counterlens.export.onnx import appearing
from counterlens.export.program import Call, If, Loop, Share, Step, Storage, Values, check_file, write_program
from counterlens.export.versions import versions

from ..config import Config, Settings
from ..errors import UsageError
from ..files import write_atomically
from ..guidance.jobs import guided_steps, seeded_noise
from ..guidance.sampler import sample
from ..guidance.schedule import add_noise, ddim, schedule_of
from ..guidance.solvers import History, advance, coefficients
from ..images.files import as_saved, to_uint8
from ..models.conditions import CONDITION, grouped, named, tensors
from ..models.processors import card_fit
from ..models.protocols import probabilities
from ..multistep import SOLVERS
from ..outputs import Run, open_run
from ..packs import Pack
from ..portable.file import COUNTERFACTUAL, SALIENCY, SCHEMA_VERSION, card_of
from ..portable.page import page_files, web_runtime, write_page
from ..runtime import onnxruntime
from ..runtime.registry import AUTO
from ..runtime.spec import SLOTS
from .whole_runs import NAME, STEPS

if TYPE_CHECKING:
    from .core import EngineCore

MODEL = COUNTERFACTUAL
CARD = card_of(MODEL)
INPUTS = {
    "image": "pixels, red, green and blue, in [0, 1]",
    "target": "label to reach, by its place in `labels`; -1: the runner-up",
    "noise": "standard normal numbers",
    "guidance_scale": "scale of the whole guidance, 0 or more",
    "class_scale": "scale of the classifier's score, 0 or more",
    "distance_scale": "scale of the pull towards the input, 0 or more",
    "angle": "angle limit of the consensus filter, degrees",
}
SCALES = ("guidance_scale", "class_scale", "distance_scale", "angle")
STEEPEST = 180.0  # degrees
OUTPUTS = {
    "counterfactual": "the changed image in [0, 1], of 8-bit values k / 255",
    "source": "label of the image; -1 where image or target cannot be used",
    "source_probabilities": "of the image's labels",
    "resolved_target": "label that was to be reached; where it is `source`, the image itself comes back",
    "prediction": "label of the counterfactual; a success where it is `resolved_target`; -1 where there is none",
    "probabilities": "of the counterfactual's labels",
    "l1": "mean absolute change per pixel and channel; NaN where there is no counterfactual",
    "kept": "share of latent locations that the consensus filter kept, for each step; NaN where it did not run",
}
PARITY_IMAGES = 64
LONG = 5.0  # seconds of a run, from which on larger batches are not measured
EQUAL_PREDICTIONS = 63 / 64
WITHIN_ONE = {"detached": 0.98, "exact": 0.90}  # one location at the angle limit rescales its sample


def scale_names(settings: Settings) -> tuple[str, ...]:
    """Which of `SCALES` change a run: there is no angle without a filter."""
    return SCALES[:-1] if settings.filter == "off" else SCALES


def counterfactual_program(engine: EngineCore, settings: Settings, scales: bool = False) -> list[Step]:
    """The run of these settings over the values image [B, 3, S, S] in [0, 1], target [B] int64 and, where the settings
    draw it, noise [B, C, h, w]; with `scales` also `scale_names`, [B] each, instead of the settings' own.

    -1 as target is the runner-up. To be run or written with the engine frozen.
    """
    if settings.reuses:
        raise UsageError(
            f"reuse_{settings.reuses[0]}: a file of the whole run computes every step anew; leave it out, or export "
            "the guided step"
        )
    given = scale_names(settings) if scales else ()
    steepest = STEEPEST if settings.filter == "zero" else 90 - 1e-4  # the others need an angle below 90 degrees
    diffusion = engine.diffusion
    alphas_cumprod = diffusion.alphas_cumprod
    schedule = schedule_of(settings, alphas_cumprod)
    times, times_prev = torch.tensor(schedule.timesteps), torch.tensor(schedule.timesteps_prev)
    steps, labels = len(schedule), len(engine.labels)

    def resolve_target(image: Tensor, target: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        usable = usable_inputs(image, target, labels)
        for name, value in zip(given, numbers, strict=True):
            usable = usable & (value >= 0) & (value <= (steepest if name == "angle" else torch.finfo(value.dtype).max))
        clean = torch.where(usable[:, None, None, None], image, 0.0)
        before = probabilities(engine.classifier, clean)
        best = before.topk(2, dim=1).indices
        resolved = torch.where(target < 0, best[:, 1], target.clamp(max=labels - 1))
        return usable, clean, before, best[:, 0], resolved

    def same(z: Tensor) -> Tensor:
        return z * 1

    def add_the_noise(z: Tensor, noise: Tensor) -> Tensor:
        return add_noise(z, noise, alphas_cumprod.to(z)[schedule.start].expand(z.shape[0]))

    def invert(z: Tensor, i: Tensor) -> Tensor:
        batch, levels = z.shape[0], alphas_cumprod.to(z)
        t, t_prev = times.flip(0)[i].expand(batch), times_prev.flip(0)[i].expand(batch)
        return ddim(z, diffusion.predict_noise(z, t, diffusion.null_condition(batch)), levels[t_prev], levels[t])[0]

    def clear(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(z) for _ in past)

    step = engine.spec(settings).step()
    own = {name: getattr(settings, name) for name in SCALES if name not in given}
    every = guided_steps(settings, steps)
    reuse = ("reused",) if settings.guidance_every > 1 else ()
    past = (*SOLVERS[settings.solver].remembers, *reuse)
    reference = "latents" if settings.distance == "latent" else "clean"

    def guided_step(z: Tensor, i: Tensor, image: Tensor, target: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        batch = z.shape[0]
        condition, numbers = grouped(others[: len(said)]), others[len(said) :]
        scale: dict[str, Any] = dict(zip(given, numbers, strict=True))
        scale |= {name: z.new_full((1,), value).expand(batch) for name, value in own.items()}
        scale["angle_deg"] = scale.pop("angle")
        return step(z, times[i].expand(batch), times_prev[i].expand(batch), condition, image, target, **scale)

    inside = torch.tensor([i / steps < settings.guidance_end for i in range(steps)])

    def unguided_step(z: Tensor, i: Tensor, *reused: Tensor) -> tuple[Tensor, ...]:
        batch, levels = z.shape[0], alphas_cumprod.to(z)
        t, t_prev = times[i].expand(batch), times_prev[i].expand(batch)
        eps = diffusion.predict_noise(z, t, diffusion.null_condition(batch))
        for guidance in reused:
            eps = eps + torch.where(inside[i][:, None, None, None], guidance, 0.0)
        z_next, z0 = ddim(z, eps, levels[t], levels[t_prev])
        return (z_next, z0, torch.full_like(z[:, 0, 0, 0], torch.nan), *(g * 1 for g in reused))

    table = coefficients(schedule, alphas_cumprod, settings.solver)

    def solve(z: Tensor, i: Tensor, z0: Tensor, *remembered: Tensor) -> tuple[Tensor, ...]:
        nothing = torch.zeros_like(z)
        known = dict(zip(SOLVERS[settings.solver].remembers, remembered, strict=True))
        history = History(*(known.get(name, nothing) for name in History._fields))
        row = table.to(z.dtype)[i].expand(z.shape[0], -1)
        z_next, after = advance(row, z, z0, history)
        return (z_next, *(getattr(after, name) for name in SOLVERS[settings.solver].remembers))

    def decode_and_measure(
        z: Tensor, image: Tensor, usable: Tensor, source: Tensor, resolved: Tensor
    ) -> tuple[Tensor, ...]:
        out = (diffusion.decode(z) + 1) / 2
        finite = (out * 0 == 0).to(out.dtype).flatten(1).amin(dim=1) > 0
        usable = usable & finite
        changed = usable & (resolved != source)  # where nothing is to be changed, the image itself comes back
        out = torch.where(changed[:, None, None, None], out, image).clamp(0, 1)
        saved = (out * 255).round() / 255  # as the 8-bit file holds it
        after = probabilities(engine.classifier, saved)
        l1 = torch.where(usable, (saved - image).abs().mean(dim=(1, 2, 3)), torch.nan)
        said = [torch.where(usable, label, -1) for label in (source, resolved, after.argmax(dim=1))]
        return saved, after, l1, *said

    with torch.no_grad():
        conditions = tensors(diffusion.condition(torch.arange(labels)))  # of every label: prompts are encoded now
    said = named([CONDITION], len(conditions))

    def condition(target: Tensor) -> tuple[Tensor, ...]:
        return tuple(c[target] for c in conditions)

    program: list[Step] = [
        Call(
            resolve_target, ("image", "target", *given), ("usable", "clean", "source_probabilities", "best", "wanted")
        ),
        Call(condition, ("wanted",), said),
        Call(diffusion.encode, ("clean",), ("latents",)),
        Call(same, ("latents",), ("z",)),
    ]
    if settings.noise == "inversion":
        program.append(Loop(steps, "i", ("z",), (Call(invert, ("z", "i"), ("z",)),)))
    else:
        program.append(Call(add_the_noise, ("z", "noise"), ("z",)))
    if past:
        program.append(Call(clear, ("z",), past))
    made = ("z_next", "z0", "kept", *reuse)
    guided: list[Step] = [Call(guided_step, ("z", "i", reference, "wanted", *said, *given), made)]
    if not all(every):
        flags = torch.tensor(every)

        def is_guided(z: Tensor, i: Tensor) -> Tensor:
            return flags[i]

        guided = [
            Call(is_guided, ("z", "i"), ("guide",)),
            If("guide", tuple(guided), (Call(unguided_step, ("z", "i", *reuse), made),), made),
        ]
    if settings.solver == "ddim":
        guided.append(Call(same, ("z_next",), ("z",)))
    else:
        remembered = SOLVERS[settings.solver].remembers
        guided.append(Call(solve, ("z", "i", "z0", *remembered), ("z", *remembered)))
    program.append(Loop(steps, "i", ("z", *past), tuple(guided), scans=("kept",)))
    measured = ("counterfactual", "probabilities", "l1", "source", "resolved_target", "prediction")
    program.append(Call(decode_and_measure, ("z", "clean", "usable", "best", "wanted"), measured))
    return program


def usable_inputs(image: Tensor, target: Tensor, labels: int) -> Tensor:
    """Which images [B, 3, S, S] lie in [0, 1] and have a target [B] that is -1 or a label: [B] bool."""
    inside = (image >= 0) & (image <= 1)  # NaN is not
    return (inside.to(image.dtype).flatten(1).amin(dim=1) > 0) & (target >= -1) & (target < labels)


def example_inputs(engine: EngineCore, settings: Settings, batch: int, scales: bool = False) -> Values:
    """Random inputs of the right shapes; targets are the runner-ups, scales the settings'."""
    g = torch.Generator().manual_seed(0)
    size = engine.image_size
    inputs = {"image": torch.rand((batch, 3, size, size), generator=g), "target": torch.full((batch,), -1)}
    if settings.noise != "inversion":
        inputs["noise"] = torch.randn((batch, *engine.diffusion.latent_shape), generator=g)
    if scales:
        inputs |= {name: torch.full((batch,), getattr(settings, name)) for name in scale_names(settings)}
    return inputs


def export_counterfactual(
    engine: EngineCore,
    folder: str | Path,
    config: Config | None = None,
    *,
    batch: int | None = None,
    storage: Storage = "lossless",
    share: Share = "local",
    scales: bool = False,
    pages: Sequence[bool] = (),
    saliency: Callable[[Run], dict[str, Any]] | None = None,
    ort_web: Path | None = None,
    overwrite: bool = False,
    option: str = "{}=True",
    measure: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a whole counterfactual as `counterfactual.onnx`, and `counterfactual.json` that says how to use it.

    It is handed over only if it agrees with the eager run: on 64 images of the pack, or for other models on random ones
    (with a warning).

    Args:
        engine: on the CPU.
        folder: created if needed; it takes one run, as every output folder.
        config: instead of the engine's.
        batch: the only size of the batch; open without it.
        storage, share: see `export.program.write_program`.
        scales: and the angle are inputs of the file instead of numbers in it.
        pages: that run the file in a browser: True is one HTML file, False files for a static host.
        saliency: writes `saliency.onnx` and its card for the pages, which show a map beside then; returns the card.
        ort_web: onnxruntime-web for them, see `portable.page.web_runtime`.
        overwrite: remove what an earlier run wrote into the folder.
        option: how a person says `overwrite`.
        measure: an engine under `auto` also puts a file that it could use (batch open, nothing left as an input) into
            its store, and times it against the steps.
        say: told what is being done.

    Returns:
        What counterfactual.json holds.

    Raises:
        UsageError: the models are elsewhere than on the CPU, or config does not fit. ExportError: something cannot be
            exported, or the file does not agree with the eager run. CounterlensError: a file cannot be written.
    """
    config = config or engine.config
    settings = engine.settings(config)
    if config.match_official:
        raise UsageError(
            "match_official: a whole run draws each image's own noise and skips what is the target already"
        )
    if config.fit == "native":
        raise UsageError(
            f"fit: a file takes images of one size, {engine.image_size}x{engine.image_size}; no native there"
        )
    if config.region is not None:
        raise UsageError("region: a whole run's file takes the image alone; the engine's own steps keep to regions")
    if config.count > 1:
        raise UsageError("count: a whole run's file makes one of an image; the engine's own steps make several")
    if engine.device.type != "cpu":
        raise UsageError(f"device: a whole run is written and checked on the CPU, the models are on {engine.device}")
    if pages and batch not in (None, 1):
        raise UsageError(f"batch: a page shows one image at a time; take an open batch or 1, not {batch}")
    web = web_runtime(ort_web) if pages else None  # what is missing is said before minutes of work
    folder, files = Path(folder), [name for single in pages for name in page_files(single)]
    files += [SALIENCY, card_of(SALIENCY)] if saliency is not None else []
    facts = {
        **engine.facts(config, batch or 1), "command": "counterlens export", "what": "counterfactual",
        "batch": batch, "storage": storage, "share": share, "scales": scales,
    }  # fmt: skip
    with open_run(folder, facts, files=[MODEL, CARD, *files], overwrite=overwrite, option=option) as run:
        started = time.perf_counter()
        with engine.frozen(), torch.no_grad(), appearing(folder / MODEL) as unchecked:
            program = counterfactual_program(engine, settings, scales)
            inputs = example_inputs(engine, settings, batch or _batch_of_its_own(engine, program), scales)
            write_program(
                program, inputs, list(OUTPUTS), unchecked, storage=storage, share=share, dynamic_batch=batch is None,
                say=say,
            )  # fmt: skip
            composed = time.perf_counter() - started
            parity, shapes = check_counterfactual(engine, settings, unchecked, batch, scales, say)
            run.claim(path.name for path in unchecked.parent.iterdir())
        card = _card(engine, config, settings, folder / MODEL, inputs, shapes, batch) | {
            "storage": storage,
            "parity": parity,
            "seconds": {"composing": round(composed, 1), "in all": round(time.perf_counter() - started, 1)},
        }
        if web is not None:
            card["page"] = page_card(engine, web.version) | {"saliency": saliency is not None}
        cards = {CARD: card}
        if saliency is not None:
            cards[card_of(SALIENCY)] = saliency(run)
        write_card(folder, CARD, card)
        for single in pages:
            assert web is not None
            write_page(folder, cards, web, single=single)
    if measure and engine.runtime == AUTO and (batch, scales, storage) == (None, False, "lossless"):
        engine.whole_runs.keep(settings, folder / MODEL, parity)
        measure_whole(engine, config, say)
    return card


def measure_whole(engine: EngineCore, config: Config, say: Callable[[str], None] = lambda _: None) -> None:
    """Time a whole run that the engine's store has against its steps, at every batch size that takes seconds."""
    settings = engine.settings(config)
    whole = engine.whole_runs.open(settings)
    given = list(example_inputs(engine, settings, engine.slots[-1]).values())
    images, runners = given[0], engine.runners
    runners.step(settings)
    runners.parts(settings)
    real = runners.real_images  # what is compiled is not held to eager on these random ones
    for slots in engine.slots:
        say(f"measuring batch {slots}")

        def steps(rows: Tensor = images[:slots]) -> None:
            engine.counterfactual(rows, config=config, whole=False)

        def at_once(slots: int = slots) -> None:  # a session predicts before and after
            rows = images[:slots]
            engine.probabilities(rows)
            whole(*(x[:slots] for x in given))
            engine.probabilities(rows)

        try:
            times = {STEPS: median_time(steps), NAME: median_time(at_once)}
        finally:
            runners.real_images = real
        engine.whole_runs.remember(settings, slots, times)
        if max(times.values()) > LONG:
            return


def median_time(call: Callable[[], object], rounds: int = 3) -> float:
    """Seconds that a call takes, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def write_card(folder: Path, name: str, card: dict[str, Any]) -> None:
    """Write what a file's user has to know beside it."""
    write_atomically(folder / name, json.dumps(card, indent=1) + "\n")


def _card(
    engine: EngineCore,
    config: Config,
    settings: Settings,
    model: Path,
    inputs: Values,
    outputs: Values,
    batch: int | None,
) -> dict[str, Any]:
    """What a user of the file has to know, and what made it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "what": "counterfactual",
        "file": MODEL,
        "sha256": file_digest(model),
        "bytes": model.stat().st_size,
        "labels": engine.labels,
        "image_size": engine.image_size,
        "fit": card_fit(engine.classifier) if config.fit == "auto" else config.fit,
        "inputs": [described(n, x, batch, INPUTS) | _default(n, settings) for n, x in inputs.items()],
        "outputs": [described(n, outputs[n], batch, OUTPUTS) for n in OUTPUTS],
        "mode": config.mode_name,
        "preset": config.preset,
        "speed": config.speed,
        "settings": settings.model_dump(),
        "steps": outputs["kept"].shape[1],
        "classifier": engine.source.get("classifier"),
        "weights": engine.digest(),
        "versions": versions(("counterlens", "torch", "onnx", "onnxruntime")),
        "limits": "No time budget and no progress inside a run: the loop is in the file. Every sample takes all steps.",
    }


def page_card(engine: EngineCore, web_version: str) -> dict[str, Any]:
    """What a page shows beside the file: samples of the pack, the empty ground, and what the model is."""
    pack = engine.source.get("pack")
    about, samples = "The model inside was brought by whoever made this page.", []
    if pack is not None:
        held = Pack(pack)
        drawn = held.samples("test", count=10)
        about = (
            f"Inside is the {engine.source.get('classifier', '')} classifier of counterlens' {held.name} pack, with "
            "its diffusion model. Digits: UCI, as shipped with scikit-learn (E. Alpaydin, C. Kaynak; CC BY 4.0)."
        )
        samples = [
            {
                "name": str(label),
                "pixels": base64.b64encode(to_uint8(image).permute(1, 2, 0).contiguous().numpy().tobytes()).decode(),
            }
            for image, label in zip(drawn.images, drawn.labels, strict=True)
        ]
    return {"about": about, "samples": samples, "ground": "#1a1a1a", "onnxruntime_web": web_version}


def _batch_of_its_own(engine: EngineCore, program: Sequence[Step]) -> int:
    taken = {engine.image_size, *engine.diffusion.latent_shape, len(engine.labels)}
    for part in tensors(engine.diffusion.condition(torch.zeros(1, dtype=torch.long))):
        taken |= set(part.shape)
    return free_batch(program, taken)


def free_batch(program: Sequence[Step], taken: set[int]) -> int:
    """A batch size that is no other size of the program's values, by which the open dimension is told from the rest."""
    taken = {3, *taken, *(step.count for step in program if isinstance(step, Loop))}
    return next(n for n in (5, 7, 11, 13, 17, 19, 23, 29, 31) if n not in taken)


def described(name: str, x: Tensor, batch: int | None, meanings: Mapping[str, str]) -> dict[str, Any]:
    """An input or output as a card says it."""
    shape = [batch or "batch", *x.shape[1:]]
    return {"name": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": shape, "meaning": meanings[name]}


def _default(name: str, settings: Settings) -> dict[str, float]:
    return {"default": getattr(settings, name)} if name in SCALES else {}


def parity_images(pack: Pack | None, size: int) -> tuple[Tensor, dict[str, str]]:
    """Images [64, 3, size, size] that a file is compared on, and what a report says of them."""
    if pack is not None:
        return pack.samples("test", count=PARITY_IMAGES).images, {"images": f"{PARITY_IMAGES} of the pack's test split"}
    coarse = torch.rand((PARITY_IMAGES, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return as_saved(images), {
        "images": f"{PARITY_IMAGES} random ones",
        "warning": "no images of the pack fit these models: compared on random ones",
    }


def check_counterfactual(
    engine: EngineCore,
    settings: Settings,
    path: Path,
    batch: int | None,
    scales: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], Values]:
    """Hold a file to the eager run of the same settings; returns the report and the outputs of the last batch.

    Raises:
        ExportError: ONNX Runtime is missing or cannot open it, shapes do not fit, or too few samples agree.
    """
    pack = engine.source.get("pack")
    images, said = parity_images(None if pack is None else Pack(pack), engine.image_size)
    say(f"comparing it with the eager run on {PARITY_IMAGES} images")
    check_file(path)
    run_file = onnxruntime.load(path)
    at_once = batch or SLOTS[-1]
    equal, close, count, worst = 0, 0, 0, 0.0
    got: Values = {}
    for start in range(0, len(images), at_once):
        seeds = [i % len(images) for i in range(start, start + at_once)]
        rows = images[seeds]
        source = probabilities(engine.classifier, rows)
        target = source.topk(2, dim=1).indices[:, 1]
        run = sample(
            engine.diffusion, engine.classifier, rows, target, seeds, settings,
            decoder=engine.runners.decoder(settings), guided=engine.runners.guided(settings),
        )  # fmt: skip
        expected = as_saved((engine.diffusion.decode(run.z) + 1) / 2)
        feeds = {"image": rows, "target": torch.full((len(rows),), -1)}
        if settings.noise != "inversion":
            feeds["noise"] = seeded_noise(engine.diffusion.latent_shape, seeds, rows)
        if scales:
            feeds |= {name: torch.full((len(rows),), getattr(settings, name)) for name in scale_names(settings)}
        got = dict(zip(OUTPUTS, run_file(*feeds.values()), strict=True))
        off = (got["counterfactual"] - expected).abs().flatten(1).amax(dim=1)
        equal += int((got["prediction"] == probabilities(engine.classifier, expected).argmax(dim=1)).sum())
        close += int((off < 1.5 / 255).sum())
        worst = max(worst, off.max().item())
        count += len(rows)
    report = {
        **said,
        "predictions_equal": equal / count,
        "within_1_of_255": close / count,
        "worst_in_255": round(worst * 255, 2),
        "asked": {"predictions_equal": EQUAL_PREDICTIONS, "within_1_of_255": WITHIN_ONE[settings.gradient]},
    }
    if not (equal / count >= EQUAL_PREDICTIONS and close / count >= WITHIN_ONE[settings.gradient]):
        raise ExportError(
            f"the written run does not agree with the eager one: {equal} of {count} predictions equal, {close} images "
            f"within 1/255, the worst off by {worst * 255:.1f}/255; it was not kept"
        )
    return report, got
