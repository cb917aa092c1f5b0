"""The Engine: images and targets in, measured counterfactuals out."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from counterlens.export.store import Store, weights_digest

from .attention import ATTENTIONS, memory_efficient_attention, not_supported_reasons
from .config import OFFICIAL_PROMPTS, PRESET_PROMPTS, SPEEDS, Config, Settings, default_settings, preset_misfit
from .errors import CounterlensError, UsageError
from .guidance.pullback import PullbackMode, frozen
from .guidance.sampler import Job, Observer, Outcome, Sampler, count_ticks
from .guidance.schedule import make_schedule
from .guidance.spans import span
from .images import as_saved, save_png, to_uint8
from .labels import distinct_names, find_label
from .memory import checkpointed, largest_batch
from .models.gradient_check import check_gradient
from .models.latent import ClassConditionalLatentDiffusion
from .models.placing import choose_device, computing_on, place
from .models.protocols import Classifier, Diffusion, probabilities
from .models.tiny import TinyDecoder, check_decoder, open_decoder
from .packs import Pack
from .provenance import engine_facts
from .runtime import onnxruntime
from .runtime.choice import RUNTIMES, Choice, StepRunner
from .runtime.spec import STEP, Spec, flat

if TYPE_CHECKING:
    from .adapter.explain import Explanations
    from .audit.results import Results

# Batches are padded to these sizes: with the same shape a sample's result never depends on its neighbours.
SLOTS = (1, 2, 4, 8, 16)

REAL_IMAGES = 4  # are enough to hold an artefact to eager on

# Targets that depend on the prediction: its runner-up, the other one of two labels, the nearest label of a file.
RELATIVE_TARGETS = ("runner-up", "opposite", "neighbour")

# What the sampler calls beside the step, and the part of the models that it is.
PARTS = {"predict_noise": "unet", "encode": "vae-encoder", "decode": "vae-decoder"}

# What `wrap_classifier` is given by `from_pretrained` itself.
OF_THE_ENGINE = ("module", "labels", "image_size")

Targets = str | int | Sequence[str | int] | Tensor
ALREADY = "is already the prediction"  # how the error of a sample that is skipped ends


@dataclass
class Counterfactuals:
    """Counterfactuals of B images; every measure is of the image as the saved 8-bit file holds it.

    A sample that failed has its message in `errors`, its input as image, -1 as prediction and NaN measures.

    Attributes:
        images: [B, 3, H, W] in [0, 1], not rounded to 8 bits.
        inputs: [B, 3, H, W] in [0, 1].
        source: [B] the classifier's prediction for the input; -1 where it gives NaN or infinity.
        target: [B] the label asked for.
        prediction: [B] the classifier's prediction for the counterfactual.
        confidence: [B] probability of that prediction.
        target_confidence: [B] probability of the target.
        flipped: [B] bool, prediction equals target.
        l1, l2: [B] mean absolute and root mean square difference per pixel and channel, in [0, 1].
        kept_fraction: [B, steps] share of latent locations that the consensus filter kept; NaN without a guided step.
        seconds: [B] wall time of every batched operation that the sample took part in, divided by the samples in it.
        complete: [B] bool, every step was taken; False where `budget_s` ended the run before, and with an error.
        seeds: one per sample.
        errors: one message or None per sample.
        labels: names of the classifier's labels.
        provenance: for each sample what made it: classifier, mode, settings, seed, weights, versions, threads, ...
    """

    images: Tensor
    inputs: Tensor
    source: Tensor
    target: Tensor
    prediction: Tensor
    confidence: Tensor
    target_confidence: Tensor
    flipped: Tensor
    l1: Tensor
    l2: Tensor
    kept_fraction: Tensor
    seconds: Tensor
    complete: Tensor
    seeds: list[int]
    errors: list[str | None]
    labels: list[str]
    provenance: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def __repr__(self) -> str:
        done, flipped = self.errors.count(None), int(self.flipped.sum())
        return f"Counterfactuals({done} of {len(self)} made, {flipped} flipped, mean l1 {self.l1.nanmean():.3f})"

    def __len__(self) -> int:
        return len(self.errors)

    def status(self, i: int) -> str:
        """What became of a sample: `done`, `skipped` (the target was the prediction already) or `failed`."""
        error = self.errors[i]
        if error is None:
            return "done"
        return "skipped" if error.endswith(ALREADY) else "failed"

    def record(self, i: int) -> dict[str, Any]:
        """One sample as plain values, as `--json` prints it: status, and source, target, ..., or error."""
        status = self.status(i)
        if status != "done":
            return {"status": status, "error": self.errors[i]}
        return {
            "status": status,
            "source": self.labels[int(self.source[i])],
            "target": self.labels[int(self.target[i])],
            "prediction": self.labels[int(self.prediction[i])],
            "confidence": round(self.confidence[i].item(), 6),
            "target_confidence": round(self.target_confidence[i].item(), 6),
            "flipped": bool(self.flipped[i]),
            "l1": round(self.l1[i].item(), 6),
            "l2": round(self.l2[i].item(), 6),
            "complete": bool(self.complete[i]),
            "seed": self.seeds[i],
            "seconds": round(self.seconds[i].item(), 4),
        }

    def save(
        self,
        folder: str | Path,
        names: Sequence[str] | None = None,
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> list[Path]:
        """Write one 8-bit PNG per finished sample, `results.jsonl` with one line per sample, and `run.json`.

        A folder takes one run: the same result can be saved there again, and with `resume` others that were made with
        the same models and settings.

        Args:
            folder: created if needed.
            names: file names without ending, made safe where they are not; `0000`, `0001`, ... without them.
            overwrite: remove what an earlier run wrote there.
            resume: add to it.

        Returns:
            The paths of the PNG files, in order; failed samples have none.

        Raises:
            UsageError: the folder cannot be written or holds another run, or names do not fit. CounterlensError: a
                file cannot be written; the others are.
        """
        from .outputs import Source, open_run

        names = [f"{i:04d}" for i in range(len(self))] if names is None else list(names)
        if len(names) != len(self) or len(set(names)) != len(names):
            raise UsageError(f"names: expected {len(self)} different names, got {len(names)}")
        made = self.provenance or [{} for _ in names]
        shared = {k: v for k, v in (made[0] if made else {}).items() if all(m.get(k) == v for m in made)}
        sources = [
            Source(name, {"name": name, "input": _pixels(image), "target": self.labels[int(target)], "seed": seed})
            for name, image, target, seed in zip(names, self.inputs, self.target, self.seeds, strict=True)
        ]
        paths, failures = [], []
        with open_run(
            Path(folder), {"command": "Counterfactuals.save", **shared}, sources=sources, endings=(".png",),
            overwrite=overwrite, resume=resume, redo=True, option="{}=True",
        ) as run:  # fmt: skip
            for i, name in enumerate(run.names):
                line = run.line(name, {"image": names[i], **self.record(i), "run_seed": made[i].get("seed")})
                line |= {k: v for k, v in made[i].items() if k not in ("seed", "started")}
                if self.errors[i] is None:
                    path = run.folder / f"{name}.png"
                    try:
                        save_png(self.images[i], path, line)
                    except CounterlensError as error:
                        failures.append(str(error))
                        line |= {"error": str(error)}
                    else:
                        paths.append(path)
                        line["path"] = path.name
                run.append(line)
        if failures:
            raise CounterlensError(f"{failures[0]} ({len(failures)} of {len(self)} failed; the others are there)")
        return paths


class Engine:
    """Explains a classifier's predictions with a diffusion model's counterfactuals.

    Args:
        diffusion, classifier: see `engine.models.protocols`. Their labels must be the same.
        config: defaults for every call.
        pack_settings: tuned numbers of the modes `realistic` and `audit`; without them both are the published ImageNet
            setting for this kind of model, `audit` with the filter at 90 degrees.
        backend: of the kernels: `auto`, `triton`, `cpp` or `reference`.
        runtime: how guided steps are executed: `eager`, `cudagraphs`, `inductor`, `onnxruntime`, `aoti` or `tensorrt`,
            which runs or raises; `auto` takes the fastest that was measured on this machine, see `runtime_choice`.
            Encoder, decoder and UNet beside the steps are compiled where the store has them too (`counterlens export
            --what all`).
        store: folder of compiled steps; the user's cache without one.
        speeds: what the speeds `exact`, `balanced` and `fast` change in a setting; `config.SPEEDS` without it.
        source: the pack and classifier that this is, where a config must not ask for another.
        checkpointing: recompute activations of decoder and UNet in the backward pass: less memory, more time.
        memory_budget: bytes; the largest batch that fits is measured and used.
        attention: of UNet and VAE: `sdpa` (PyTorch's own) or `xformers` (CUDA, eager).
        neighbours: nearest labels of each label, nearest first, for targets `neighbour`.
        device: where the models run, moved there in place: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`;
            where they are without it. Images come in and go out on the CPU.
        guidance_decoder: what `guidance_decoder="tiny"` differentiates through: a folder or hub id of an
            `AutoencoderTiny`, or an open decoder.

    Raises:
        UsageError: labels, preset, budget, neighbours, device or guidance decoder do not fit.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        classifier: Classifier,
        config: Config | None = None,
        *,
        pack_settings: dict[str, dict[str, Any]] | None = None,
        speeds: dict[str, dict[str, Any]] | None = None,
        backend: str = "auto",
        runtime: str = "auto",
        store: str | Path | None = None,
        source: dict[str, str] | None = None,
        checkpointing: bool = False,
        memory_budget: float | None = None,
        attention: str = "sdpa",
        neighbours: Mapping[str, Sequence[str]] | None = None,
        guidance_decoder: TinyDecoder | str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if isinstance(classifier, nn.Module) and not hasattr(classifier, "log_prob"):
            raise UsageError(
                f"classifier: {type(classifier).__name__} is a plain module; Engine.from_pretrained(model, module, "
                "labels=...) or models.image_classifiers.wrap_classifier(module, labels, image_size=...) wraps it"
            )
        if list(diffusion.labels) != list(classifier.labels):
            raise UsageError(
                f"classifier: its {len(classifier.labels)} labels are not the diffusion model's "
                f"{len(diffusion.labels)}; diffusion.describe(labels) names them"
            )
        levels = diffusion.alphas_cumprod
        if not ((levels > 0) & (levels < 1)).all() or not (levels[1:] < levels[:-1]).all():
            raise UsageError("diffusion: alphas_cumprod must fall from below 1 and end above 0")
        self.diffusion = diffusion
        self.classifier = classifier
        self.config = config or Config()
        self.pack_settings = default_settings(diffusion.conditioning) if pack_settings is None else pack_settings
        self.speeds = speeds or SPEEDS
        self.backend = backend
        self.source = source or {}
        self.names = dict(self.source)  # of the models, as results say them
        self.digest: tuple[Any, str] | None = None
        if isinstance(guidance_decoder, str | Path):
            guidance_decoder = open_decoder(guidance_decoder)
        if guidance_decoder is not None:
            check_decoder(guidance_decoder, diffusion)
        self.guidance_decoder = guidance_decoder
        if device is not None:
            there = choose_device(device)
            place(diffusion, there)
            for module in (classifier.module, *([] if guidance_decoder is None else [guidance_decoder.module])):
                module.to(there)
        if not self.source:  # a pack's own classifiers are known
            check_gradient(classifier, diffusion.image_size)
        if runtime not in RUNTIMES:
            raise UsageError(f"runtime: expected one of {', '.join(RUNTIMES)}, got {runtime!r}")
        if checkpointing and runtime not in ("auto", "eager"):
            raise UsageError(f"checkpointing: recomputes in eager; runtime {runtime!r} cannot")
        if attention not in ATTENTIONS:
            raise UsageError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if attention == "xformers":
            if runtime not in ("auto", "eager"):
                raise UsageError(f"attention: xformers runs in eager; runtime {runtime!r} cannot")
            if reasons := not_supported_reasons(diffusion.modules()):
                raise UsageError(f"attention: xformers cannot be used: {'; '.join(reasons)}")
        self.checkpointing, self.attention = checkpointing, attention
        differentiated_by_autograd = checkpointing or attention == "xformers"
        self.runtime = "eager" if differentiated_by_autograd else runtime
        self.store = Store(store)
        self._runners: dict[tuple[object, ...], StepRunner] = {}
        self._compiled_parts: dict[str, StepRunner] = {}
        self._pins: Mapping[str, Mapping[str, str]] = {}
        self._weights_hashes: dict[int, str] = {}
        # A few real images [N, 3, H, W], if there are any yet, on which what is compiled is held to eager.
        self.real_images: Tensor | None = None
        self.pullback: PullbackMode = "autograd" if differentiated_by_autograd else "functional"
        self.neighbours = {
            self.check_target(k): [self.check_target(n) for n in v if n != k] for k, v in (neighbours or {}).items()
        }
        self.slots: tuple[int, ...] = SLOTS
        self._check_source(self.config)
        if memory_budget is not None:
            with self._prepared():
                settings = self.settings(self.config)
                most = largest_batch(
                    diffusion, classifier, settings, memory_budget, SLOTS, self.pullback, self.tiny_decoder(settings)
                )
            self.slots = tuple(s for s in SLOTS if s <= most)

    @classmethod
    def from_pack(
        cls, name: str = "digits", classifier: str = "clean", config: Config | None = None, **options: Any
    ) -> Engine:
        """Open an embedded pack (`digits`) or a pack's folder, verifying every file; options are those of `Engine`.

        The device is `auto` without one.

        Raises:
            UsageError: there is no such pack or classifier. CounterlensError: a file is missing or was changed.
        """
        if not isinstance(classifier, str):
            raise UsageError(
                f"classifier: from_pack takes the name of one of the pack's, not a {type(classifier).__name__}; for "
                f"your own use Engine.from_pretrained({str(name)!r}, module, labels=[...])"
            )
        pack = Pack(name)
        settings = {mode: pack.manifest["settings"][mode] for mode in ("realistic", "audit")}
        source = {"pack": name, "classifier": classifier}
        models = (pack.diffusion(), pack.classifier(classifier))
        options = {"guidance_decoder": pack.guidance_decoder(), "speeds": pack.manifest.get("speeds")} | options
        options["device"] = _device(options)
        engine = cls(*models, config, pack_settings=settings, source=source, **options)
        engine.real_images = pack.samples("test", count=REAL_IMAGES).images
        return engine

    def tiny_decoder(self, settings: Settings) -> TinyDecoder | None:
        """What guidance differentiates through in place of the full decoder, where the settings ask for it."""
        return self.guidance_decoder if settings.guidance_decoder == "tiny" else None

    def spec(self, settings: Settings, **fields: Any) -> Spec:
        """What is compiled for these settings; fields are those of `Spec` that the settings leave open."""
        if fields.get("what", STEP) != STEP:  # a part is the same under all settings
            return Spec(self.diffusion, self.classifier, weights=self._weights(), images=self.real_images, **fields)
        decoder = self.tiny_decoder(settings)
        return Spec(
            self.diffusion,
            self.classifier,
            filter_mode=settings.filter,
            gradient=settings.gradient,
            decoder=decoder,
            distance=settings.distance,
            with_guidance=settings.guidance_every > 1,
            weights=self._weights(*([] if decoder is None else [decoder.module])),
            images=self.real_images,
            **fields,
        )

    def _weights(self, *more: nn.Module) -> str | None:
        """Hash of all weights, made once; None while there is no store, which is all that asks for it."""
        if len(more) not in self._weights_hashes and self.store.folder.exists():
            modules = [*self.diffusion.modules(), self.classifier.module, *more]
            self._weights_hashes[len(more)] = weights_digest(modules)
        return self._weights_hashes.get(len(more))

    def _runner(self, settings: Settings) -> StepRunner:
        key = tuple(settings.graph.values())
        if key not in self._runners:
            self._runners[key] = StepRunner(
                self.spec(settings), self.runtime, self.store, self.backend, self.pullback, pins=self._pins.get(STEP)
            )
        return self._runners[key]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold all models in eval mode without parameter gradients: for a `sampler` and whatever runs beside it."""
        own = [] if self.guidance_decoder is None else [self.guidance_decoder.module]
        modules = (*self.diffusion.modules(), self.classifier.module, *own)
        with computing_on(self.device), frozen(*modules), self._prepared():
            yield

    def sampler(self, config: Config | None = None, slots: int = 16) -> Sampler:
        """Slots for samples that come and go, at the step of this config; use it inside `frozen`.

        Results are bit-identical to those of `counterfactual` where that uses as many slots.
        """
        return self._sampler(self.settings(config or self.config), slots)

    def _sampler(self, settings: Settings, slots: int, observe: Observer | None = None) -> Sampler:
        if observe is not None:
            return Sampler(
                self.diffusion, slots, self._runner(settings).observed(), settings.graph, decode=self.diffusion.decode,
                observe=observe,
            )  # fmt: skip
        parts = self._parts(slots)
        return Sampler(
            self.diffusion, slots, self._runner(settings).step(slots), settings.graph,
            predict_noise=parts["predict_noise"], encode=parts["encode"], decode=parts["decode"],
        )  # fmt: skip

    def _part_runners(self) -> dict[str, StepRunner]:
        """One runner for each part of the models that runs beside the steps; none where everything is eager."""
        if self.runtime in ("eager", "inductor"):
            return {}
        if not self._compiled_parts:
            for what in PARTS.values():
                spec = self.spec(self.settings(self.config), what=what)
                self._compiled_parts[what] = StepRunner(spec, self.runtime, self.store, pins=self._pins.get(what))
        return self._compiled_parts

    def _parts(self, slots: int) -> dict[str, Callable[..., Tensor]]:
        """Encoder, decoder and UNet for encoding, inversion and decoding: compiled ones where the store has them."""
        runners = self._part_runners()
        own: dict[str, Callable[..., Tensor]] = {
            "predict_noise": self.diffusion.predict_noise,
            "encode": self.diffusion.encode,
            "decode": self.diffusion.decode,
        }
        return {name: runners[what].part(slots) if what in runners else own[name] for name, what in PARTS.items()}

    @property
    def device(self) -> torch.device:
        """Where the diffusion model is."""
        return next(p for m in self.diffusion.modules() for p in m.parameters()).device

    def predict_noise(self, slots: int) -> Callable[..., Tensor]:
        """The noise prediction beside the guided steps, compiled where the store has it."""
        return self._parts(slots)["predict_noise"]

    def slots_for(self, batch: int) -> int:
        """The slot count that a batch of this size is padded to."""
        return next((s for s in self.slots if s >= batch), self.slots[-1])

    def runtime_choice(self, batch: int = 1, config: Config | None = None) -> Choice:
        """Which runtime runs the guided steps of a batch of this size, and why."""
        return self._runner(self.settings(config or self.config)).choose(self.slots_for(batch))

    def runtimes(self, config: Config | None = None) -> dict[str, dict[str, str]]:
        """What runs the guided step and each part beside it, by slot count: `{"guided-step": {"1": "eager", ...}}`."""
        runners = {STEP: self._runner(self.settings(config or self.config)), **self._part_runners()}
        return {what: {str(n): r.taken(n) for n in self.slots} for what, r in runners.items()}

    def parities(self, config: Config | None = None) -> dict[str, dict[str, Any]]:
        """How far the compiled steps that are there were from eager when they were built, by runtime."""
        found = self._runner(self.settings(config or self.config)).found() if self.runtime != "eager" else {}
        return {name: artefact.report["parity"] for name, artefact in found.items()}

    @contextmanager
    def pinned(
        self,
        runtimes: Mapping[str, Mapping[str, str]],
        config: Config | None,
        say: Callable[[str], None],
        *,
        fresh: bool,
    ) -> Iterator[None]:
        """Let `auto` take what `runtimes` of an earlier session says, whatever was built or measured since.

        What cannot be had here any more is eager, which `say` is told. `fresh` opens everything compiled anew.
        """
        before = self._runners, self._compiled_parts
        if fresh:
            self._runners, self._compiled_parts = {}, {}
        now, chosen = self.runtimes(config), self.settings(config or self.config)
        runners = {STEP: self._runner(chosen), **self._part_runners()}
        pins: dict[str, dict[str, str]] = {}
        for what, runner in runners.items() if self.runtime == "auto" else ():
            wanted = runtimes.get(what, dict.fromkeys(now[what], "eager"))
            here = {"eager", *runner.ready()}
            pins[what] = {n: name if name in here else "eager" for n, name in wanted.items()}
            for name in sorted({*wanted.values()} - here):
                say(f"runtime: {name} ran {what} when this began and is not here, so eager does (counterlens export)")
        if pins and now != pins:
            say(f"runtime: {', '.join(dict.fromkeys(pins[STEP].values()))}, as this began")
        self._pins = pins
        for what, runner in runners.items():
            runner.pins = pins.get(what, {})
        try:
            yield
        finally:
            self._pins = {}
            for runner in runners.values():
                runner.pins = {}
            self._runners, self._compiled_parts = before

    def warmup(
        self, batches: Sequence[int] = SLOTS, config: Config | None = None, *, measure: bool | None = None
    ) -> dict[int, Choice]:
        """Prepare for batches of these sizes, so that no later call waits for loading or compiling.

        Args:
            batches: sizes; each is padded to its slot count.
            config: instead of the engine's.
            measure: time every runtime in the store and remember it; by default with `runtime="auto"` for what was not
                measured yet.

        Returns:
            Slot count to the runtime that is taken and why.
        """
        settings = self.settings(config or self.config)
        runner = self._runner(settings)
        out = {}
        with self.frozen():
            for slots in sorted({self.slots_for(b) for b in batches}):
                for r in (runner, *self._part_runners().values()):
                    missing = self.runtime == "auto" and str(slots) not in r.measurements() and r.ready()
                    if missing if measure is None else measure:
                        r.measure(slots)
                self._parts(slots)
                with torch.no_grad():
                    flat(runner.step(slots))(*runner.spec.example(slots))
                out[slots] = runner.choose(slots)
        return out

    def export_counterfactual(self, folder: str | Path, config: Config | None = None, **options: Any) -> dict[str, Any]:
        """Write a whole counterfactual, loop and all, as one ONNX file with a card that says how to use it.

        Args and errors: see `whole_run.export_counterfactual`. Returns what the card, counterfactual.json, holds.
        """
        from .whole_run import export_counterfactual

        return export_counterfactual(self, folder, config, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        classifier: str | Path | nn.Module | Classifier,
        config: Config | None = None,
        *,
        labels: Sequence[str] | None = None,
        prompts: str | Sequence[str] | None = None,
        classes: Sequence[int] | None = None,
        preprocessing: dict[str, Any] | None = None,
        head: str | Path | None = None,
        weights: str | Path | None = None,
        image_size: int | None = None,
        dtype: str = "float32",
        **options: Any,
    ) -> Engine:
        """Explain a classifier with a public diffusion model; everything is checked before the first step.

        All modules, a classifier's of your own too, are moved to the device: CUDA where there is one, else the CPU.

        Args:
            model: folder in diffusers' layout, hub id (`owner/name`), or a pack (`digits`).
            classifier: see `models.image_classifiers.open_classifier`; or your own module.
            config: defaults for every call; without a preset or mode, the published ImageNet setting.
            labels: names of the logits, where the classifier does not bring its own.
            prompts: of a text-conditional model and of zero-shot classifiers: a name in
                `models.stable_diffusion.PROMPTS`, a template with {label}, or one prompt per label.
            classes: of a class-conditional model, one per label, where names do not tell.
            preprocessing: of your own module: arguments of `models.image_classifiers.wrap_classifier`.
            head, weights: files, see `open_classifier`.
            image_size: for Stable Diffusion; its own without it.
            dtype: of the diffusion model's weights: float32, bfloat16 or float16. Guidance is summed in float32, and
                the classifier stays in float32: gradients of log p fall below what float16 holds.
            options: of `Engine`: backend, checkpointing, memory_budget, neighbours, guidance_decoder, device (`auto`).

        Raises:
            UsageError: parts or options do not fit. CounterlensError: files are missing or corrupt.
        """
        from .models.image_classifiers import open_classifier, wrap_classifier
        from .models.load import open_diffusion
        from .models.stable_diffusion import StableDiffusion

        config = config or Config()
        if preprocessing is not None:
            if not isinstance(classifier, nn.Module):
                raise UsageError("preprocessing: for a module of your own; this classifier brings its own")
            if not isinstance(preprocessing, Mapping):
                raise UsageError(
                    f"preprocessing: expected a mapping such as {{'mean': ..., 'std': ...}}, got {preprocessing!r:.80}"
                )
            known = [p for p in inspect.signature(wrap_classifier).parameters if p not in OF_THE_ENGINE]
            if wrong := [key for key in preprocessing if key not in known]:
                raise UsageError(f"preprocessing: {wrong[0]!r} is no key of it; expected some of {', '.join(known)}")
        diffusion = open_diffusion(model, dtype=dtype, image_size=image_size)
        said = prompts or PRESET_PROMPTS.get(config.preset or "", "imagenet")
        if config.match_official and isinstance(diffusion, StableDiffusion) and isinstance(said, str):
            said = OFFICIAL_PROMPTS.get(said, said)
        size = diffusion.image_size
        if isinstance(classifier, str | Path):
            explained: Classifier = open_classifier(
                classifier, image_size=size, labels=labels, prompts=said, head=head, weights=weights
            )
        elif isinstance(classifier, nn.Module):
            if labels is None:
                raise UsageError("labels: a module has none; give one name per logit")
            explained = wrap_classifier(classifier, labels, image_size=size, **(preprocessing or {}))
        else:
            explained = classifier
        if isinstance(diffusion, StableDiffusion):
            if config.preset == "celeba-text" and prompts is None:
                raise UsageError("prompts: celeba-text has two attributes; say smile or age, or give two prompts")
            if classes is not None:
                raise UsageError("classes: this model is text-conditional and has none; say the labels with prompts")
            diffusion.describe(explained.labels, said)
        else:
            diffusion.describe(explained.labels, classes)
        tuned = None
        if isinstance(diffusion, ClassConditionalLatentDiffusion):
            pack = Pack(str(model))
            tuned = pack.manifest["settings"]
            options = {"guidance_decoder": pack.guidance_decoder(), "speeds": pack.manifest.get("speeds")} | options
        engine = cls(diffusion, explained, config, pack_settings=tuned, **options | {"device": _device(options)})
        named = str(classifier) if isinstance(classifier, str | Path) else type(explained.module).__name__
        engine.names = {"model": str(model), "classifier": named}
        if tuned is not None:
            engine.real_images = pack.samples("test", count=REAL_IMAGES).images
        return engine

    def settings(self, config: Config) -> Settings:
        """Every number of a run with this config.

        Raises:
            UsageError: its fields contradict each other, or its preset does not fit the models.
        """
        if config.preset and (reason := preset_misfit(config.preset, self.diffusion.conditioning, len(self.labels))):
            raise UsageError(f"preset: {reason}")
        settings = config.settings(self.pack_settings, self.speeds)
        if settings.guidance_decoder == "tiny" and self.guidance_decoder is None:
            raise UsageError(
                "guidance_decoder: this engine has no tiny decoder; give Engine(guidance_decoder=...) the folder or "
                "hub id of an AutoencoderTiny for this model's VAE"
            )
        return settings

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.checkpointing:
                stack.enter_context(checkpointed(self.diffusion.modules()))
            if self.attention == "xformers":
                stack.enter_context(memory_efficient_attention(self.diffusion.modules()))
            yield

    def _check_source(self, config: Config) -> None:
        for name, mine in self.source.items():
            if name in config.model_fields_set and getattr(config, name) != mine:
                raise UsageError(f"{name}: this engine has {mine!r}, the config asks for {getattr(config, name)!r}")

    @cached_property
    def labels(self) -> list[str]:
        """Names of the classifier's labels; those that repeat have their index behind them."""
        return distinct_names(self.classifier.labels)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images that the models take."""
        return self.diffusion.image_size

    @torch.no_grad()
    def probabilities(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """The classifier's probabilities: [B, labels] on the CPU; computed in padded batches like everything else."""
        batches = _batches(len(images), self.slots)
        with span("predictions"), computing_on(self.device):
            parts = [probabilities(self.classifier, images[rows].to(self.device))[:n].cpu() for rows, n in batches]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.labels))

    def check_target(self, target: str | int) -> int:
        """Index of a label by name or index (see `find_label`); -1 for `RELATIVE_TARGETS`, which depend on the image.

        Raises:
            UsageError: it is no label, or relative to something that this classifier does not have.
        """
        if target == "opposite" and len(self.labels) != 2:
            raise UsageError(f"target: opposite needs a classifier with two labels, this one has {len(self.labels)}")
        if target == "neighbour" and (lonely := [n for i, n in enumerate(self.labels) if not self.neighbours.get(i)]):
            raise UsageError(f"neighbours: none given for {len(lonely)} labels, {lonely[0]!r} for one")
        if target in RELATIVE_TARGETS:
            return -1
        return find_label(target, self.labels, more=RELATIVE_TARGETS)

    def resolve_targets(
        self,
        targets: Targets,
        probabilities: Tensor,  # [B, labels]
    ) -> Tensor:
        """Label indices [B] of targets by index, by label, or relative to the prediction (`RELATIVE_TARGETS`).

        Raises:
            UsageError: a target is no label, or there are more or fewer targets than images.
        """
        batch = probabilities.shape[0]
        if isinstance(targets, Tensor):
            targets = targets.tolist()
        if isinstance(targets, str | int):
            targets = [targets] * batch
        if len(targets) != batch:
            raise UsageError(f"targets: expected {batch}, one per image, got {len(targets)}")
        best = probabilities.topk(2, dim=1).indices.tolist()
        out = []
        for target, (first, second) in zip(targets, best, strict=True):
            index = self.check_target(target)
            if target == "neighbour":
                index = self.neighbours[first][0]
            elif index < 0:  # of two labels, the opposite one is the runner-up
                index = second
            out.append(index)
        return torch.tensor(out, dtype=torch.long)

    def counterfactual(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        targets: Targets = "runner-up",
        seeds: Sequence[int] | None = None,
        config: Config | Sequence[Config] | None = None,
        progress: Callable[[int, int, Tensor], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        budget_s: float | None = None,
        observe: Observer | None = None,
    ) -> Counterfactuals:
        """Change each image as little as needed for the classifier to say its target.

        Any number of images runs over at most 16 slots: a sample that is finished leaves, and the next one joins at the
        following step, so that memory does not grow with the number of images.

        Args:
            images: [B, 3, H, W] in [0, 1] at the model's image size (`load_image` reads files).
            targets: one per image, or one for all: label index, label name, `runner-up`, `opposite` (of two labels)
                or `neighbour` (the nearest one that the engine was given).
            seeds: one per image; without them each image's own pixels and `config.seed` decide, so that an image has
                the same noise wherever it stands.
            config: instead of the engine's; one for all, or one per image. Those of one call must agree on what decides
                the step's graph: filter, gradient, guidance_decoder, distance and whether guidance_every is 1.
            progress: called with (step, total, x0) after every step; x0 is the clean estimate [b, 3, H, W] in [0, 1] of
                the samples in the slots. Decoding it costs a decoder pass each step.
            on_step: called with (step, total) after every step, at no cost.
            budget_s: seconds for each sample from the moment that it is first worked on. What the run has come to by
                then is the result, marked in `.complete`; it is an error where no guided step fits.
            observe: called after every guided step with the places in `images` of the n samples that took it, and what
                the consensus filter compared: the classifier's score, up to a factor for each sample, and the
                generator's class direction, [n, C, h, w] each. Such a run is eager under every runtime; in eager,
                pixels are the same with and without.

        Returns:
            Counterfactuals; samples that fail are reported in `.errors` and do not stop the others.

        Raises:
            UsageError: images, targets, seeds, config or budget do not fit.
        """
        self._check_images(images)
        if self.real_images is None and len(images) and images[:REAL_IMAGES].isfinite().all():
            self.real_images = images[:REAL_IMAGES].detach().clone()
        configs = [config or self.config] * len(images) if config is None or isinstance(config, Config) else [*config]
        if len(configs) != len(images):
            raise UsageError(f"config: expected {len(images)}, one per image, got {len(configs)}")
        decided: dict[Config, Settings] = {}
        for c in dict.fromkeys(configs or [self.config if not isinstance(config, Config) else config]):
            self._check_source(c)
            decided[c] = self.settings(c)
        if budget_s is not None and not budget_s > 0:
            raise UsageError(f"budget_s: expected seconds above 0, got {budget_s}")
        with self.frozen():
            before = self.probabilities(images)
            source = before.argmax(dim=1).masked_fill(~before.isfinite().all(dim=1), -1)
            target = self.resolve_targets(targets, before)
            if seeds is None:
                seeds = [noise_seed(image, c) for image, c in zip(images, configs, strict=True)]
            if len(seeds) != len(images):
                raise UsageError(f"seeds: expected {len(images)}, one per image, got {len(seeds)}")
            errors: list[str | None] = [
                f"target {self.labels[int(t)]!r} {ALREADY}" if s == t and not c.match_official else None
                for s, t, c in zip(source.tolist(), target.tolist(), configs, strict=True)
            ]
            for i in range(len(images)):
                if not before[i].isfinite().all():
                    errors[i] = "the classifier gives NaN or infinity for the image"
                if not images[i].isfinite().all():
                    errors[i] = "the image holds NaN or infinite values"
            jobs = [
                Job(image, int(t), seed, decided[c], budget_s)
                for image, t, seed, c in zip(images, target, seeds, configs, strict=True)
            ]
            todo = [i for i, error in enumerate(errors) if error is None]
            outcomes = self._run(jobs, todo, progress, on_step, observe)
            for i, outcome in outcomes.items():
                errors[i] = outcome.error
            result = self._measure(images, source, target, list(seeds), errors, outcomes, list(decided.values()))
            made = {c: engine_facts(self, c, len(outcomes)) | {"budget_s": budget_s} for c in decided}
            result.provenance = [made[c] for c in configs]
            return result

    def explain(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        *,
        explained: Targets | None = None,
        method: str = "lax",
        quantity: str | Callable[[Tensor, Tensor], Tensor] = "class",
        adapter: Any = None,
        baseline: Any = None,
        alpha_min: float = 0.5,
        counterfactual: bool = False,
        targets: Targets = "runner-up",
        seeds: Sequence[int] | None = None,
        config: Config | None = None,
    ) -> Explanations:
        """Show where the evidence is, how good that answer is (MSI), and asked for, what would have to change.

        Args:
            images: [B, 3, H, W] in [0, 1] at the model's image size.
            explained: labels whose evidence is shown, as for `counterfactual`; the predictions without it.
            method: `lax`, or one of `adapter.methods.saliency_methods`.
            quantity: `class`, groups of labels (`0,1,2/3,4`), or log-odds as a function of logits and targets; see
                `adapter.quantities.make_quantity`.
            adapter: of `lax`: one that is open, or its folder; the pack's without it.
            baseline: what hides pixels, see `metrics.inputs.make_baseline`; the pack's mean colour, else each image's.
            alpha_min: of MSI.
            counterfactual: compute counterfactuals as well, with `targets`, `seeds` and `config`.

        Raises:
            UsageError: images or an argument do not fit, or there is no adapter. CounterlensError: the adapter is of
                another model, or a package is missing.
        """
        from .adapter.explain import explain
        from .metrics.inputs import check_finite

        self._check_images(images)
        check_finite("images", images)
        return explain(
            self, images, explained=explained, method=method, quantity=quantity, adapter=adapter, baseline=baseline,
            alpha_min=alpha_min, counterfactual=counterfactual, targets=targets, seeds=seeds, config=config,
        )  # fmt: skip

    def audit(
        self,
        source: str | Path,
        out: str | Path,
        config: Config | None = None,
        judges: Mapping[str, Classifier] | None = None,
        **options: Any,
    ) -> Results:
        """Explain a whole data set into a folder; the same call again goes on where it was stopped.

        Args:
            source: image folder, CSV or Parquet manifest (image, label, target, id), Parquet with image bytes, or a
                folder of Hugging Face datasets.
            out: the results' folder (`engine.audit.results` says what is in it).
            config: of the counterfactuals, instead of the engine's.
            judges: classifiers that guidance never sees, by name; flips that they confirm count as transferred.
            options: of `engine.audit.explaining.Options` and `engine.audit.run.audit`.

        Returns:
            The results: rows, and what the manifest says.

        Raises:
            UsageError: source or options do not fit, or another audit is in `out`. CounterlensError: a file cannot be
                written, or another process works there.
        """
        from .audit.run import audit

        return audit(self, source, out, config, judges, **options)

    def _check_images(self, images: Tensor) -> None:
        size = self.image_size
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1:] != (3, size, size):
            shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UsageError(f"images: expected [B, 3, {size}, {size}], got {shape}; load_image resizes files")
        if not images.is_floating_point():
            raise UsageError(f"images: expected floating point in [0, 1], got {images.dtype}")
        if images.numel() and (images.min() < 0 or images.max() > 1):
            raise UsageError(f"images: expected [0, 1], got {images.min().item():g} to {images.max().item():g}")

    def _schedule_steps(self, settings: Settings) -> int:
        alphas_cumprod = self.diffusion.alphas_cumprod
        return len(
            make_schedule(len(alphas_cumprod), settings.steps, settings.strength, settings.spacing, alphas_cumprod)
        )

    def _run(
        self,
        jobs: list[Job],
        todo: list[int],
        progress: Callable[[int, int, Tensor], None] | None,
        on_step: Callable[[int, int], None] | None,
        observe: Observer | None = None,
    ) -> dict[int, Outcome]:
        """What became of the jobs in `todo`, by their index."""
        if not todo:
            return {}
        slots = self.slots_for(len(todo))
        settings = jobs[todo[0]].settings
        watch: Observer | None = None
        if observe is not None:

            def watch(ids: list[int], score: Tensor, reference: Tensor) -> None:
                observe([index[id] for id in ids], score, reference)

        sampler = self._sampler(settings, slots, watch)
        index = {sampler.submit(jobs[i]): i for i in todo}
        steps = {s: self._schedule_steps(s) for s in {jobs[i].settings for i in todo}}
        total = count_ticks([steps[jobs[i].settings] for i in todo], slots)
        outcomes: dict[int, Outcome] = {}
        while sampler.busy:
            for outcome in sampler.tick():
                outcomes[index[outcome.id]] = outcome
            if not sampler.stepped:
                continue
            if on_step is not None:
                on_step(sampler.ticks, total)
            if progress is not None:
                rows = [slot for slot, _ in sampler.stepped]
                with torch.no_grad():
                    x0 = (self.diffusion.decode(sampler.z0)[rows] + 1) / 2
                progress(sampler.ticks, total, x0.clamp(0, 1).cpu())
        return outcomes

    def _measure(
        self,
        images: Tensor,
        source: Tensor,
        target: Tensor,
        seeds: list[int],
        errors: list[str | None],
        outcomes: dict[int, Outcome],
        settings: list[Settings],
    ) -> Counterfactuals:
        out = images.clone()
        kept = torch.full((len(images), max((self._schedule_steps(s) for s in settings), default=0)), torch.nan)
        seconds = torch.full((len(images),), torch.nan)
        complete = torch.zeros(len(images), dtype=torch.bool)
        for i, outcome in outcomes.items():
            kept[i, : len(outcome.kept)] = torch.tensor(outcome.kept)
            seconds[i], complete[i] = outcome.seconds, outcome.complete
            if outcome.image is not None:
                out[i] = outcome.image.clamp(0, 1)
        saved = as_saved(out)
        probabilities = self.probabilities(saved)
        for i, finite in enumerate(probabilities.isfinite().all(dim=1).tolist()):
            if errors[i] is None and not finite:
                errors[i], complete[i] = "the classifier gives NaN or infinity for the counterfactual", False
        failed = torch.tensor([e is not None for e in errors], dtype=torch.bool)
        confidence, prediction = probabilities.max(dim=1)
        target_confidence = probabilities.gather(1, target[:, None])[:, 0]
        difference = saved - images
        nan = math.nan
        return Counterfactuals(
            images=out,
            inputs=images,
            source=source,
            target=target,
            prediction=prediction.masked_fill(failed, -1),
            confidence=confidence.masked_fill(failed, nan),
            target_confidence=target_confidence.masked_fill(failed, nan),
            flipped=(prediction == target) & ~failed,
            l1=difference.abs().mean(dim=(1, 2, 3)).masked_fill(failed, nan),
            l2=difference.square().mean(dim=(1, 2, 3)).sqrt().masked_fill(failed, nan),
            kept_fraction=kept,
            seconds=seconds,
            complete=complete,
            seeds=seeds,
            errors=errors,
            labels=self.labels,
        )


def _device(options: dict[str, Any]) -> str | torch.device:
    """The device that options of `Engine` name, or `auto`: the CPU for an ONNX Runtime that knows no other."""
    named = options.get("device") or "auto"
    if named == "auto" and options.get("runtime") == "onnxruntime" and onnxruntime.missing("cuda"):
        return "cpu"
    return named


def _batches(count: int, slots: Sequence[int] = SLOTS) -> list[tuple[list[int], int]]:
    """Rows of each batch, padded to a slot count with its first row, and how many of them are real."""
    batches = []
    for start in range(0, count, slots[-1]):
        rows = list(range(start, min(start + slots[-1], count)))
        size = next(s for s in slots if s >= len(rows))
        batches.append((rows + rows[:1] * (size - len(rows)), len(rows)))
    return batches


def _pixels(image: Tensor) -> str:
    """A short hash of an image's 8-bit pixels."""
    return hashlib.sha256(to_uint8(image.nan_to_num()).cpu().numpy().tobytes()).hexdigest()[:16]


def noise_seed(image: Tensor, config: Config) -> int:
    """The seed of an image's noise: from its own pixels and the run's seed; in the authors' code the run's alone."""
    return config.seed if config.match_official else image_seed(image, config.seed)


def image_seed(image: Tensor, seed: int) -> int:
    """A seed from the image's own 8-bit pixels and a run's seed."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + to_uint8(image.nan_to_num()).cpu().numpy().tobytes()).digest()
    return int.from_bytes(digest[:6], "little")
