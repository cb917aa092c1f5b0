"""EngineCore: models held under one runtime; images and targets in, measured counterfactuals out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from counterlens.export.store import Store

from ..blackbox.box import BlackBox, as_box
from ..config import FEW_STEP_SPEEDS, SPEEDS, Config, Settings, StepOptions, default_settings, preset_misfit
from ..errors import UsageError
from ..guidance.memory import checkpointed, largest_batch, step_bytes, weight_bytes
from ..guidance.pullback import PullbackMode
from ..guidance.sampler import Observer, Sampler
from ..guidance.schedule import carried_strength
from ..guidance.spans import span
from ..labels import distinct_names
from ..models.attention import memory_efficient_attention
from ..models.deep import no_deep_features
from ..models.freezing import frozen
from ..models.gradient_check import check_gradient
from ..models.placing import choose_device, computing_on, place
from ..models.predictions import FLOW
from ..models.protocols import Classifier, Diffusion, probabilities
from ..models.tiny import TinyDecoder, check_decoder, open_decoder
from ..provenance import digest, models_digest, models_numbers, session
from ..runtime.choice import AnyStep, Choice
from ..runtime.here import memory_of, slots_on
from ..runtime.registry import AUTO, EAGER
from ..runtime.runners import REAL_IMAGES, Runners
from ..runtime.spec import SLOTS, Spec
from .answers import arranged_by_image
from .checks import check_guides, check_images, check_models, check_running
from .photos import Photo, Said, check_native, read, restored, say
from .regions import RegionLike, one_region_each
from .result import Counterfactual, Counterfactuals
from .session import Session, padded_batches
from .targets import TargetLabels, Targets, one_each
from .whole_runs import WholeRuns, WholeSampler

_OPENING = RLock()  # what runs is opened or recorded once, by the first thread that needs it


class EngineCore:
    """Explains a classifier's predictions with a diffusion model's counterfactuals.

    Threads: `counterfactual`, `explain`, `probabilities` and the functions on images and maps may run in any number of
    them at once, of one engine or of several that share models; each gives what it gives alone, and the models are left
    as they were when the last is done. A `session` or `sampler` belongs to one thread. What builds, opens, measures or
    trains (making an engine, `warmup`, exports, adapters) and `audit`, which holds the process's number of threads, are
    to be alone with their models.

    Args:
        diffusion, classifier: see `engine.models.protocols`. Their labels must be the same.
        config: defaults for every call.
        pack_settings: tuned numbers of the modes `realistic` and `audit`; without them both are the published ImageNet
            setting for this kind of model, `audit` with the filter at 90 degrees.
        backend: of the kernels: `auto`, `triton`, `cpp` or `reference`.
        runtime: how guided steps are executed: `eager` or one of `runtime.registry.names()`, such as `onnxruntime`,
            which runs or raises; `auto` takes the fastest that was measured on this machine, see `runtime_choice`.
            Encoder, decoder and UNet beside the steps are compiled where the store has them too (`counterlens export
            --what all`).
        store: folder of compiled steps; the user's cache without one.
        speeds: what the speeds `exact`, `balanced`, `fast` and `turbo` change in a setting; `config.SPEEDS` without it,
            or `FEW_STEP_SPEEDS` of a distilled generator.
        source: the pack and classifier that this is, where a config must not ask for another.
        checkpointing: recompute activations of decoder and UNet in the backward pass: less memory, more time.
        memory_budget: bytes; the largest batch that fits is measured and used.
        attention: of UNet and VAE: `sdpa` (PyTorch's own) or `xformers` (CUDA, eager).
        neighbours: nearest labels of each label, nearest first, for targets `neighbour`.
        device: where the models run, moved there in place: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`;
            where they are without it. Images come in and go out on the CPU.
        guidance_decoder: of `guidance_decoder="tiny"`: a folder or hub id of an `AutoencoderTiny`, or an open decoder.
        distilled: the same diffusion model with a denoiser for few guided steps, for `denoiser="distilled"` and so for
            the speed `turbo`; inversion, encoding and decoding stay `diffusion`'s.

    Raises:
        UsageError: labels, preset, budget, neighbours, device or guidance decoder do not fit.
    """

    box: BlackBox | None = None  # what is asked for every probability, where `classifier` is its student
    queries_each = 4  # of the box, for one counterfactual, its image's own included

    def __init__(
        self,
        diffusion: Diffusion,
        classifier: Classifier,
        config: Config | None = None,
        *,
        pack_settings: dict[str, dict[str, Any]] | None = None,
        speeds: dict[str, dict[str, Any]] | None = None,
        backend: str = "auto",
        runtime: str = AUTO,
        store: str | Path | None = None,
        source: dict[str, str] | None = None,
        checkpointing: bool = False,
        memory_budget: float | None = None,
        attention: str = "sdpa",
        neighbours: Mapping[str, Sequence[str]] | None = None,
        guidance_decoder: TinyDecoder | str | Path | None = None,
        distilled: Diffusion | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        check_models(diffusion, classifier)
        self.diffusion = diffusion
        self.classifier = classifier
        self.config = config or Config()
        untuned = default_settings(diffusion.conditioning, diffusion.latent_shape[0])
        self.pack_settings = untuned if pack_settings is None else pack_settings
        self.speeds = speeds or (FEW_STEP_SPEEDS if getattr(diffusion, "distilled", False) else SPEEDS)
        self.backend = backend
        self.source = source or {}
        self._digest: tuple[list[str], str] | None = None
        self.names = dict(self.source)  # of the models, as results say them
        if isinstance(guidance_decoder, str | Path):
            guidance_decoder = open_decoder(guidance_decoder)
        if guidance_decoder is not None:
            check_decoder(guidance_decoder, diffusion)
        self.guidance_decoder = guidance_decoder
        self.distilled = distilled
        if device is not None:
            there = choose_device(device)
            place(diffusion, there)
            for module in self.modules():
                module.to(there)
            if distilled is not None:
                place(distilled, there)
        called = as_box(classifier) is not None
        if not (self.source or called):  # a pack's own classifiers are known
            check_gradient(classifier, diffusion.image_size)
        check_running(diffusion, classifier, runtime, checkpointing, attention)
        self.checkpointing, self.attention = checkpointing, attention
        differentiated_by_autograd = checkpointing or attention == "xformers"
        self.runtime = EAGER if differentiated_by_autograd or called else runtime
        self.store = Store(store)
        self.pullback: PullbackMode = "autograd" if differentiated_by_autograd else "functional"
        self.runners = Runners(
            diffusion, classifier, guidance_decoder, distilled, runtime=self.runtime, store=self.store, backend=backend,
            pullback=self.pullback,
        )  # fmt: skip
        self.whole_runs = WholeRuns(self.runners)
        self.targets = TargetLabels(self.labels, neighbours)
        self._check_source(self.config)
        self.memory_budget = memory_budget
        self._bytes: dict[tuple[StepOptions, tuple[int, int]], int] = {}
        self._slots: dict[tuple[int, int], tuple[int, ...]] = {}  # of images of other sizes, by height and width
        _ = self.slots if memory_budget is not None else ()  # or nothing fits, which is said now

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold all models in eval mode without parameter gradients: for a `sampler` and whatever runs beside it."""
        check_guides(self.classifier)
        with computing_on(self.device), frozen(*self.modules()), self._prepared():
            yield

    def modules(self) -> list[nn.Module]:
        """Every module that takes part."""
        own = [] if self.guidance_decoder is None else [self.guidance_decoder.module]
        if self.distilled is not None:
            own += [m for m in self.distilled.modules() if all(m is not known for known in self.diffusion.modules())]
        return [*self.diffusion.modules(), self.classifier.module, *own]

    def sampler(
        self,
        config: Config | None = None,
        slots: int = SLOTS[-1],
        observe: Observer | None = None,
        sides: tuple[int, int] | None = None,
    ) -> Sampler:
        """Slots for samples that come and go, at the step of this config; use it inside `frozen`.

        Results are bit-identical to those of `counterfactual` where that uses as many slots. `observe`: see there.
        `sides` are height and width of the images where they are not the model's own: such samples run in eager.

        Raises:
            UsageError: a runtime was named whose artefacts are of another size.
        """
        settings = self.settings(config or self.config)
        eager = observe is not None or (sides is not None and not self.is_own_size(sides))
        if eager and observe is None and sides is not None:
            self.check_runtime_for(sides)

        def step(kinds: tuple[str, ...] = ()) -> AnyStep:
            runner = self.runners.step(settings, kinds)
            return runner.eager(with_directions=observe is not None) if eager else runner.step(slots)

        with _OPENING:
            steps = [step(kinds) for kinds in ((), *self.runners.kinds(settings))]
            parts = {"decode": self.diffusion.decode} if eager else self.runners.functions(settings, slots)
        guided_noise = None if settings.denoiser == "own" else self.runners.guided(settings).predict_noise
        return Sampler(
            self.diffusion, slots, steps[0], settings.graph, **parts, guided_noise=guided_noise, observe=observe,
            reusing=step,
        )  # fmt: skip

    def open_whole(self, settings: Settings, slots: int) -> WholeSampler | None:
        """A whole run's file for such batches, under `auto` where one was measured to be faster; see `whole`."""
        if self.whole_runs.choose(settings, slots) is None:
            return None
        with _OPENING:
            run = self.whole_runs.open(settings)
        return WholeSampler(run, settings, slots, self.diffusion.latent_shape)

    @property
    def device(self) -> torch.device:
        """Where the diffusion model is."""
        return next(p for m in self.diffusion.modules() for p in m.parameters()).device

    def predict_noise(self, slots: int) -> Callable[..., Tensor]:
        """The noise prediction beside the guided steps, compiled where the store has it."""
        return self.runners.functions(self.settings(self.config), slots)["predict_noise"]

    def slots_for(self, batch: int, sides: tuple[int, int] | None = None) -> int:
        """The slot count that a batch of this size is padded to; `sides`: see `slots_of`."""
        slots = self.slots if sides is None else self.slots_of(sides)
        return next((s for s in slots if s >= batch), slots[-1])

    def slots_of(self, sides: tuple[int, int]) -> tuple[int, ...]:
        """The slot counts that fit into the memory budget for images of this height and width.

        Raises:
            UsageError: not one sample fits.
        """
        if self.is_own_size(sides) or (self.memory_budget is None and self.device.type == "cpu"):
            return self.slots
        return self._slots.get(sides) or self._slots.setdefault(sides, self._fitting_slots(sides))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The slot counts that there are: those that fit into the memory budget, on a GPU into its free memory."""
        return self._fitting_slots()

    def _fitting_slots(self, sides: tuple[int, int] | None = None) -> tuple[int, ...]:
        slots = slots_on(self.device, self.runtime)
        if (budget := self.memory_budget or memory_of(self.device, weight_bytes(self.modules()))) is None:
            return slots
        settings = self.settings(self.config)
        with computing_on(self.device), self._prepared():
            most = largest_batch(
                self.diffusion, self.classifier, settings, budget, slots, self.pullback,
                self.runners.decoder(settings), sides,
            )  # fmt: skip
        return tuple(s for s in slots if s <= most)

    def step_bytes(self, sides: tuple[int, int], config: Config | None = None) -> int:
        """Peak bytes of a guided step of one image of this height and width, weights left out; measured once."""
        settings = self.settings(config or self.config)
        key = (settings.graph, sides)
        with _OPENING, self._prepared():
            if key not in self._bytes:
                self._bytes[key] = step_bytes(
                    self.diffusion, self.classifier, 1, settings, self.pullback, self.runners.decoder(settings), sides
                )
        return self._bytes[key]

    def is_own_size(self, sides: Sequence[int]) -> bool:
        """Whether images of this height and width are the square ones that the models were made for."""
        return tuple(sides) == (self.image_size, self.image_size)

    def check_runtime_for(self, sides: tuple[int, int]) -> None:
        """Refuse a runtime that was named for images of another size than what it compiles for.

        Raises:
            UsageError: says which do.
        """
        if self.runtime not in (AUTO, EAGER):
            size = self.image_size
            raise UsageError(
                f"runtime: what {self.runtime} runs is compiled for images of {size}x{size}, these are "
                f"{sides[1]}x{sides[0]} (fit native); runtime eager or auto take them"
            )

    def spec(self, settings: Settings, **fields: Any) -> Spec:
        """What is compiled for these settings; fields are those of `Spec` that the settings leave open."""
        return self.runners.spec(settings, **fields)

    def runtime_choice(self, batch: int = 1, config: Config | None = None) -> Choice:
        """Which runtime runs the guided steps of a batch of this size, or all of it as a `whole-run`, and why."""
        settings, slots = self.settings(config or self.config), self.slots_for(batch)
        return self.whole_runs.choose(settings, slots) or self.step_choice(batch, config)

    def step_choice(self, batch: int = 1, config: Config | None = None) -> Choice:
        """Which runtime runs the guided steps where they are taken one by one, and why."""
        return self.runners.step(self.settings(config or self.config)).choose(self.slots_for(batch))

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
        with self.frozen():
            return {
                slots: self.runners.prepare(settings, slots, measure)
                for slots in sorted({self.slots_for(b) for b in batches})
            }

    def digest(self) -> str:
        """A short hash of the models: made again only when one of their tensors is another or was written to."""
        modules, known = self.modules(), self.runners.hashes
        state = [known(module) for module in modules]
        if self._digest is None or self._digest[0] != state:
            self._digest = (state, models_digest(modules, self.labels, known))
        return self._digest[1]

    def facts(self, config: Config, batch: int = 1) -> dict[str, Any]:
        """What makes this engine's results with a config, and the session; `runtime` is what runs such a batch."""
        weights = next(p for m in self.diffusion.modules() for p in m.parameters())
        return {
            "classifier": type(self.classifier.module).__name__,
            **self.names,
            "mode": config.mode_name,
            "preset": config.preset,
            "speed": config.speed,
            "match_official": config.match_official,
            "fit": config.fit_name,
            **({} if config.region is None else {"region": config.region}),
            **({} if config.count == 1 else {"count": config.count}),
            "settings": self.settings(config).model_dump(),
            # Of another noise path, where `settings` has the strength of the same noise level.
            **({"strength_asked": config.settings(self.pack_settings, self.speeds).strength} if self.carries else {}),
            "seed": config.seed,
            "weights": self.digest(),
            **models_numbers(self.diffusion, self.classifier),
            "image_size": self.image_size,
            "dtype": str(weights.dtype).removeprefix("torch."),
            "slots": self.slots[-1],
            "neighbours": digest(self.targets.neighbours) if self.targets.neighbours else None,
            "attention": self.attention,
            "checkpointing": self.checkpointing,
            "kernels": self.backend,
            "runtime_option": self.runtime,
            "runtime": self.step_choice(batch, config).runtime,
            **session(self.device),
        }

    def settings(self, config: Config) -> Settings:
        """Every number of a run with this config.

        Raises:
            UsageError: its fields contradict each other, or its preset does not fit the models.
        """
        self._check_source(config)
        if config.preset and (reason := preset_misfit(config.preset, self.diffusion.conditioning, len(self.labels))):
            raise UsageError(f"preset: {reason}")
        if config.fit == "native":
            check_native(self)
        settings = config.settings(self.pack_settings, self.speeds)
        if self.carries:
            used = carried_strength(settings.strength, self.diffusion.alphas_cumprod)
            settings = settings.model_copy(update={"strength": used})
        if settings.guidance_decoder == "tiny" and self.guidance_decoder is None:
            raise UsageError(
                "guidance_decoder: this engine has no tiny decoder; give Engine(guidance_decoder=...) the folder or "
                "hub id of an AutoencoderTiny for this model's VAE"
            )
        if (why := no_deep_features(self.runners.guided(settings))) and settings.reuse_features > 1:
            raise UsageError(f"reuse_features: {why}; leave it out")
        return settings

    @property
    def carries(self) -> bool:
        """Whether a strength is carried over by its noise level: the path is not Stable Diffusion's, nor one that
        strengths were published or tuned for (see `carried_strength`).
        """
        return getattr(self.diffusion, "prediction", None) == FLOW or getattr(self.diffusion, "carried", False)

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
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """The classifier's probabilities: [B, labels] on the CPU, in batches padded to `sizes` (`slots` without it)."""
        if self.box is not None:
            with span("predictions"):
                return probabilities(self.box, images)
        batches = padded_batches(len(images), sizes or self.slots)
        with span("predictions"), computing_on(self.device), frozen(self.classifier.module):
            parts = [probabilities(self.classifier, images[rows].to(self.device))[:n].cpu() for rows, n in batches]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.labels))

    def check_target(self, target: str | int, count: int = 1) -> int:
        """See `TargetLabels.check`."""
        return self.targets.check(target, count)

    def resolve_targets(
        self,
        targets: Targets,
        probabilities: Tensor,  # [B, labels]
    ) -> Tensor:
        """See `TargetLabels.resolve_all`."""
        return self.targets.resolve_all(targets, probabilities)

    @contextmanager
    def session(self, config: Config | None = None, slots: int | None = None) -> Iterator[Session]:
        """Make counterfactuals one by one; the models are held as in `frozen` meanwhile. See `Session`.

        Args:
            config: of samples that bring none; the engine's without it.
            slots: how many samples are guided at once, rounded up to one of `slots`; as many as fit without it.

        Raises:
            UsageError: the config does not fit, or slots is below 1.
        """
        if slots is not None and slots < 1:
            raise UsageError(f"slots: expected 1 or more, got {slots}")
        with self.frozen():
            yield Session(self, config, self.slots_for(slots or self.slots[-1]))

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
        whole: bool = True,
        region: RegionLike | Sequence[RegionLike | None] | None = None,
    ) -> Counterfactuals:
        """Change each image as little as needed for the classifier to say its target.

        Any number of images runs over at most 16 slots: a sample that is finished leaves, and the next one joins at the
        following step, so that memory does not grow with the number of images.

        Args:
            images: [B, 3, H, W] in [0, 1] at the model's image size (`load_image` reads files).
            targets: one per image, or one for all: label index, label name, `runner-up`, `opposite` (of two labels),
                `neighbour` (the nearest one that the engine was given) or `runners-up` (of `config.count` answers one
                towards each of the likeliest other labels).
            seeds: one per image; without them each image's own pixels and `config.seed` decide, so that an image has
                the same noise wherever it stands.
            config: instead of the engine's; one for all, or one per image. Those of one call must agree on what decides
                the step's graph: filter, gradient, guidance_decoder, distance, and what steps reuse.
            progress: called with (step, total, x0) after every step; x0 is the clean estimate [b, 3, H, W] in [0, 1] of
                the samples in the slots. Decoding it costs a decoder pass each step.
            on_step: called with (step, total) after every step, at no cost.
            budget_s: seconds for each sample from the moment that it is first worked on. What the run has come to by
                then is the result, marked in `.complete`; it is an error where no guided step fits.
            observe: called after every guided step with the places in `images` of the n samples that took it, and what
                the consensus filter compared: the classifier's score, up to a factor for each sample, and the
                generator's class direction, [n, C, h, w] each. Such a run is eager under every runtime; in eager,
                pixels are the same with and without.
            whole: under the runtime `auto`, images that share their settings may run by a file of the whole run
                (`counterlens export --what counterfactual`) where that was measured to be faster, if nothing is asked
                of single steps; pixels then agree within 1/255. False takes the steps.
            region: where alone the images may change, `config.region` without it: `auto`, x,y,w,h in pixels of the
                image, a mask's file, or a mask [H, W] as tensor or array (`core.regions.check_region` says which); one
                for all, or one per image. Outside, pixels are the image's own, bit by bit.

        Returns:
            Counterfactuals; samples that fail are reported in `.errors` and do not stop the others. With `config.count`
            up to so many of each image, one image's after the other's (`.by_image()`): those that flip first, then
            nearest first, without duplicates (see `core.answers`).

        Raises:
            UsageError: images, targets, seeds, config, budget or regions do not fit.
        """
        self.check_images(images)
        regions = one_region_each(region, images)
        configs = [config or self.config] * len(images) if config is None or isinstance(config, Config) else [*config]
        if len(configs) != len(images):
            raise UsageError(f"config: expected {len(images)}, one per image, got {len(configs)}")
        if budget_s is not None and not budget_s > 0:
            raise UsageError(f"budget_s: expected seconds above 0, got {budget_s}")
        asked = one_each(targets, len(images))
        for target, each in dict.fromkeys(zip(asked, configs, strict=True)):
            self.check_target(target, each.count)
        given = [None] * len(images) if seeds is None else list(seeds)
        if len(given) != len(images):
            raise UsageError(f"seeds: expected {len(images)}, one per image, got {len(given)}")
        whole = whole and (progress, on_step, budget_s, observe) == (None,) * 4
        taken = 0  # ticks of earlier batches

        def run(answers: list[tuple[int, int]]) -> list[Counterfactual]:
            """One batch: answer k of image i for each of these."""
            nonlocal taken
            samples: list[Counterfactual] = []
            places = [i for i, _ in answers]
            watch = None if observe is None else lambda ids, *seen: observe([places[id] for id in ids], *seen)
            session = Session(self, configs[0] if configs else None, observe=watch, whole=whole)
            for i, k in answers:
                session.submit(images[i], asked[i], given[i], configs[i], budget_s, regions[i], k)
            while session.busy:
                samples = session.tick()
                sampler = session.sampler
                if sampler is None or not sampler.stepped:
                    continue
                step, total = taken + sampler.ticks, taken + session.total
                if on_step is not None:
                    on_step(step, total)
                if progress is not None:
                    rows = [slot for slot, _ in sampler.stepped]
                    with torch.no_grad():
                        x0 = (self.diffusion.decode(sampler.z0)[rows] + 1) / 2
                    progress(step, total, x0.clamp(0, 1).cpu())
            taken += session.total
            for made, (i, _) in zip(samples, answers, strict=True):
                made.sample = i
            return samples

        with self.frozen():
            samples = run([(i, 0) for i in range(len(images))])  # as without `count`, bit by bit
            more = [
                (made.sample, k) for made in samples if made.error is None for k in range(1, configs[made.sample].count)
            ]
            if more:
                samples = arranged_by_image([*samples, *run(more)])
            return Counterfactuals.stack(
                samples, images[[made.sample for made in samples]] if more else images, self.labels
            )

    def meet_images(self, images: Tensor) -> None:
        """Keep the first images, if they are finite: artefacts are held to eager on them."""
        if (
            self.runners.real_images is None
            and len(images)
            and self.is_own_size(images.shape[2:])
            and images[:REAL_IMAGES].isfinite().all()
        ):
            self.runners.real_images = images[:REAL_IMAGES].detach().clone()

    def check_images(self, images: Tensor) -> None:
        """See `checks.check_images`."""
        check_images(images, self.image_size, self.multiple, getattr(self.diffusion, "longest", None))

    @property
    def multiple(self) -> int | None:
        """What sides of images of other shapes are multiples of; None where the models take square ones of one size."""
        any_shape = getattr(self.diffusion, "rectangular", False) and self.box is None  # a student takes squares
        return getattr(self.diffusion, "multiple", None) if any_shape else None

    def read(
        self, file: Path | BytesIO, name: str | None = None, config: Config | None = None, *, own: bool = True
    ) -> Photo:
        """Read an image file as the fit of the config lays it out; see `photos.read`, errors too."""
        return read(self, file, name, config or self.config, own=own)

    def own_answers(self, photos: Sequence[Photo]) -> list[Said | None]:
        """What the classifier's own pipeline says of each untouched file; None where it has no processor of its own."""
        said = iter(say(self, [photo.own for photo in photos if photo.own is not None]))
        return [None if photo.own is None else next(said) for photo in photos]

    def restore(
        self,
        file: Path | BytesIO,
        photo: Photo,
        after: Tensor,
        name: str | None = None,
        config: Config | None = None,
        region: Tensor | None = None,
    ) -> tuple[Image.Image, Said]:
        """A counterfactual's change laid over the photo at its own size; see `photos.restored`, errors too."""
        return restored(self, file, photo, after, name, config or self.config, region)
