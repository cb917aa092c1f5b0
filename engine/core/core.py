"""EngineCore: models held under one runtime; images and targets in, measured counterfactuals out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from counterlens.export.store import Store

from ..config import SPEEDS, Config, Settings, default_settings, preset_misfit
from ..errors import UsageError
from ..guidance.memory import checkpointed, largest_batch
from ..guidance.pullback import PullbackMode
from ..guidance.sampler import Job, Observer, Outcome, Sampler, count_ticks
from ..guidance.schedule import make_schedule
from ..guidance.spans import span
from ..images.files import as_saved
from ..labels import distinct_names, find_label
from ..models.attention import ATTENTIONS, memory_efficient_attention, not_supported_reasons
from ..models.freezing import frozen
from ..models.gradient_check import check_gradient
from ..models.placing import choose_device, computing_on, place
from ..models.protocols import Classifier, Diffusion, probabilities
from ..models.tiny import TinyDecoder, check_decoder, open_decoder
from ..provenance import digest, models_digest, models_numbers, session
from ..runtime.choice import RUNTIMES, Choice
from ..runtime.runners import REAL_IMAGES, SLOTS, Runners
from ..runtime.spec import Spec
from .result import ALREADY, Counterfactuals, noise_seed
from .targets import RELATIVE_TARGETS, Targets

if TYPE_CHECKING:
    pass


class EngineCore:
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
        self._digest: tuple[Any, str] | None = None
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
        self.pullback: PullbackMode = "autograd" if differentiated_by_autograd else "functional"
        self.runners = Runners(
            diffusion, classifier, guidance_decoder, runtime=self.runtime, store=self.store, backend=backend,
            pullback=self.pullback,
        )  # fmt: skip
        self.neighbours = {
            self.check_target(k): [self.check_target(n) for n in v if n != k] for k, v in (neighbours or {}).items()
        }
        self.slots: tuple[int, ...] = SLOTS
        self._check_source(self.config)
        if memory_budget is not None:
            with self._prepared():
                settings = self.settings(self.config)
                most = largest_batch(
                    diffusion, classifier, settings, memory_budget, SLOTS, self.pullback, self.runners.decoder(settings)
                )
            self.slots = tuple(s for s in SLOTS if s <= most)

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
                self.diffusion, slots, self.runners.step(settings).observed(), settings.graph,
                decode=self.diffusion.decode, observe=observe,
            )  # fmt: skip
        parts = self.runners.functions(settings, slots)
        return Sampler(
            self.diffusion, slots, self.runners.step(settings).step(slots), settings.graph,
            predict_noise=parts["predict_noise"], encode=parts["encode"], decode=parts["decode"],
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the diffusion model is."""
        return next(p for m in self.diffusion.modules() for p in m.parameters()).device

    def predict_noise(self, slots: int) -> Callable[..., Tensor]:
        """The noise prediction beside the guided steps, compiled where the store has it."""
        return self.runners.functions(self.settings(self.config), slots)["predict_noise"]

    def slots_for(self, batch: int) -> int:
        """The slot count that a batch of this size is padded to."""
        return next((s for s in self.slots if s >= batch), self.slots[-1])

    def spec(self, settings: Settings, **fields: Any) -> Spec:
        """What is compiled for these settings; fields are those of `Spec` that the settings leave open."""
        return self.runners.spec(settings, **fields)

    def runtime_choice(self, batch: int = 1, config: Config | None = None) -> Choice:
        """Which runtime runs the guided steps of a batch of this size, and why."""
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
        modules = [*self.diffusion.modules(), self.classifier.module]
        if self.guidance_decoder is not None:
            modules.append(self.guidance_decoder.module)
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        state = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        if self._digest is None or self._digest[0] != state:
            self._digest = (state, models_digest(modules, self.labels))
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
            "settings": self.settings(config).model_dump(),
            "seed": config.seed,
            "weights": self.digest(),
            **models_numbers(self.diffusion, self.classifier),
            "image_size": self.image_size,
            "dtype": str(weights.dtype).removeprefix("torch."),
            "slots": self.slots[-1],
            "neighbours": digest(self.neighbours) if self.neighbours else None,
            "attention": self.attention,
            "checkpointing": self.checkpointing,
            "kernels": self.backend,
            "runtime_option": self.runtime,
            "runtime": self.runtime_choice(batch, config).runtime,
            **session(self.device),
        }

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
        if self.runners.real_images is None and len(images) and images[:REAL_IMAGES].isfinite().all():
            self.runners.real_images = images[:REAL_IMAGES].detach().clone()
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
            made = {c: self.facts(c, len(outcomes)) | {"budget_s": budget_s} for c in decided}
            result.provenance = [made[c] for c in configs]
            return result

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


def _batches(count: int, slots: Sequence[int] = SLOTS) -> list[tuple[list[int], int]]:
    """Rows of each batch, padded to a slot count with its first row, and how many of them are real."""
    batches = []
    for start in range(0, count, slots[-1]):
        rows = list(range(start, min(start + slots[-1], count)))
        size = next(s for s in slots if s >= len(rows))
        batches.append((rows + rows[:1] * (size - len(rows)), len(rows)))
    return batches
