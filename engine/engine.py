"""The Engine: images and targets in, measured counterfactuals out."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from counterlens.export.store import Store

from .config import PRESET_PROMPTS, Config, Settings, default_settings, preset_misfit
from .errors import CounterlensError, UsageError
from .guidance.pullback import PullbackMode, frozen
from .guidance.sampler import sample
from .guidance.schedule import make_schedule
from .images import as_saved, make_folder, save_png, to_uint8
from .memory import checkpointed, largest_batch
from .models.latent import ClassConditionalLatentDiffusion
from .models.protocols import Classifier, Diffusion, probabilities
from .packs import Pack
from .runtime.choice import RUNTIMES, Choice, StepRunner
from .runtime.spec import Spec, flat

if TYPE_CHECKING:
    from .audit.results import Results

# Batches are padded to these sizes: with the same shape a sample's result never depends on its neighbours.
SLOTS = (1, 2, 4, 8, 16)

# Targets that depend on the prediction: its runner-up, the other one of two labels, the nearest label of a file.
RELATIVE_TARGETS = ("runner-up", "opposite", "neighbour")

Targets = str | int | Sequence[str | int] | Tensor


@dataclass
class Counterfactuals:
    """Counterfactuals of B images; every measure is of the image as the saved 8-bit file holds it.

    A sample that failed has its message in `errors`, its input as image, -1 as prediction and NaN measures.

    Attributes:
        images: [B, 3, H, W] in [0, 1], not rounded to 8 bits.
        inputs: [B, 3, H, W] in [0, 1].
        source: [B] the classifier's prediction for the input.
        target: [B] the label asked for.
        prediction: [B] the classifier's prediction for the counterfactual.
        confidence: [B] probability of that prediction.
        target_confidence: [B] probability of the target.
        flipped: [B] bool, prediction equals target.
        l1, l2: [B] mean absolute and root mean square difference per pixel and channel, in [0, 1].
        kept_fraction: [B, steps] share of latent locations that the consensus filter kept; NaN where no step ran.
        seconds: [B] wall time of the sample's batch, divided by the batch's samples.
        seeds: one per sample.
        errors: one message or None per sample.
        labels: names of the classifier's labels.
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
    seeds: list[int]
    errors: list[str | None]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.errors)

    def record(self, i: int) -> dict[str, Any]:
        """One sample as plain values, as `--json` prints it: source, target, ..., or error."""
        if self.errors[i] is not None:
            return {"error": self.errors[i]}
        return {
            "source": self.labels[int(self.source[i])],
            "target": self.labels[int(self.target[i])],
            "prediction": self.labels[int(self.prediction[i])],
            "confidence": round(self.confidence[i].item(), 6),
            "target_confidence": round(self.target_confidence[i].item(), 6),
            "flipped": bool(self.flipped[i]),
            "l1": round(self.l1[i].item(), 6),
            "l2": round(self.l2[i].item(), 6),
            "seed": self.seeds[i],
            "seconds": round(self.seconds[i].item(), 4),
        }

    def save(self, folder: str | Path, names: Sequence[str] | None = None) -> list[Path]:
        """Write one 8-bit PNG per finished sample and `results.jsonl` with one record per sample.

        Args:
            folder: created if needed.
            names: file names without ending; `0000`, `0001`, ... without them.

        Returns:
            The paths of the PNG files, in order; failed samples have none.

        Raises:
            UsageError: the folder cannot be written, or names do not fit. CounterlensError: a file cannot be written.
        """
        names = [f"{i:04d}" for i in range(len(self))] if names is None else list(names)
        if len(names) != len(self) or len(set(names)) != len(names):
            raise UsageError(f"names: expected {len(self)} different names, got {len(names)}")
        folder = make_folder(Path(folder))
        paths, lines = [], []
        for i, name in enumerate(names):
            record: dict[str, Any] = {"name": name}
            if self.errors[i] is None:
                paths.append(folder / f"{name}.png")
                save_png(self.images[i], paths[-1])
                record["path"] = paths[-1].name
            lines.append(json.dumps(record | self.record(i)))
        try:
            (folder / "results.jsonl").write_text("".join(line + "\n" for line in lines))
        except OSError as error:
            raise CounterlensError(f"{folder / 'results.jsonl'}: cannot be written ({error.strerror})") from error
        return paths


class Engine:
    """Explains a classifier's predictions with a diffusion model's counterfactuals.

    Args:
        diffusion, classifier: see `engine.models.protocols`. Their labels must be the same.
        config: defaults for every call.
        pack_settings: tuned numbers of the modes `realistic` and `audit`; without them both are the published ImageNet
            setting for this kind of model, `audit` with the filter at 90 degrees.
        backend: of the kernels: `auto`, `triton`, `cpp` or `reference`.
        runtime: how guided steps are executed: `eager`, `inductor`, `onnxruntime`, `aoti` or `tensorrt`, which runs or
            raises; `auto` takes the fastest that was measured on this machine, see `runtime_choice`.
        store: folder of compiled steps; the user's cache without one.
        source: the pack and classifier that this is, where a config must not ask for another.
        checkpointing: recompute activations of decoder and UNet in the backward pass: less memory, more time.
        memory_budget: bytes; the largest batch that fits is measured and used.
        neighbours: nearest labels of each label, nearest first, for targets `neighbour`.

    Raises:
        UsageError: labels, preset, budget or neighbours do not fit.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        classifier: Classifier,
        config: Config | None = None,
        *,
        pack_settings: dict[str, dict[str, Any]] | None = None,
        backend: str = "auto",
        runtime: str = "auto",
        store: str | Path | None = None,
        source: dict[str, str] | None = None,
        checkpointing: bool = False,
        memory_budget: float | None = None,
        neighbours: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if list(diffusion.labels) != list(classifier.labels):
            raise UsageError(
                f"classifier: its {len(classifier.labels)} labels are not the diffusion model's "
                f"{len(diffusion.labels)}; diffusion.describe(labels) names them"
            )
        self.diffusion = diffusion
        self.classifier = classifier
        self.config = config or Config()
        self.pack_settings = default_settings(diffusion.conditioning) if pack_settings is None else pack_settings
        self.backend = backend
        self.source = source or {}
        if runtime not in RUNTIMES:
            raise UsageError(f"runtime: expected one of {', '.join(RUNTIMES)}, got {runtime!r}")
        if checkpointing and runtime not in ("auto", "eager"):
            raise UsageError(f"checkpointing: recomputes in eager; runtime {runtime!r} cannot")
        self.runtime = "eager" if checkpointing else runtime
        self.store = Store(store)
        self._runners: dict[tuple[str, str], StepRunner] = {}
        self.pullback: PullbackMode = "autograd" if checkpointing else "functional"
        self.neighbours = {
            self.check_target(k): [self.check_target(n) for n in v if n != k] for k, v in (neighbours or {}).items()
        }
        self.slots: tuple[int, ...] = SLOTS
        self._check_source(self.config)
        if memory_budget is not None:
            with self._saving_memory():
                most = largest_batch(
                    diffusion, classifier, self.settings(self.config), memory_budget, SLOTS, self.pullback
                )
            self.slots = tuple(s for s in SLOTS if s <= most)

    @classmethod
    def from_pack(
        cls, name: str = "digits", classifier: str = "clean", config: Config | None = None, **options: Any
    ) -> Engine:
        """Open an embedded pack (`digits`) or a pack's folder, verifying every file; options are those of `Engine`.

        Raises:
            UsageError: there is no such pack or classifier. CounterlensError: a file is missing or was changed.
        """
        pack = Pack(name)
        settings = {mode: pack.manifest["settings"][mode] for mode in ("realistic", "audit")}
        source = {"pack": name, "classifier": classifier}
        models = (pack.diffusion(), pack.classifier(classifier))
        return cls(*models, config, pack_settings=settings, source=source, **options)

    def _runner(self, settings: Settings) -> StepRunner:
        key = (settings.filter, settings.gradient)
        if key not in self._runners:
            spec = Spec(self.diffusion, self.classifier, filter_mode=settings.filter, gradient=settings.gradient)
            self._runners[key] = StepRunner(spec, self.runtime, self.store, self.backend, self.pullback)
        return self._runners[key]

    def _slots(self, batch: int) -> int:
        return next((s for s in self.slots if s >= batch), self.slots[-1])

    def runtime_choice(self, batch: int = 1, config: Config | None = None) -> Choice:
        """Which runtime runs the guided steps of a batch of this size, and why."""
        return self._runner(self.settings(config or self.config)).choose(self._slots(batch))

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
        runner = self._runner(self.settings(config or self.config))
        out = {}
        with frozen(*self.diffusion.modules(), self.classifier.module):
            for slots in sorted({self._slots(b) for b in batches}):
                missing = self.runtime == "auto" and str(slots) not in runner.measurements()
                if missing if measure is None else measure:
                    runner.measure(slots)
                with torch.no_grad():
                    flat(runner.step(slots))(*runner.spec.example(slots))
                out[slots] = runner.choose(slots)
        return out

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
            options: of `Engine`: backend, checkpointing, memory_budget, neighbours.

        Raises:
            UsageError: parts or options do not fit. CounterlensError: files are missing or corrupt.
        """
        from .models.image_classifiers import open_classifier, wrap_classifier
        from .models.load import open_diffusion
        from .models.stable_diffusion import StableDiffusion

        config = config or Config()
        diffusion = open_diffusion(model, dtype=dtype, image_size=image_size)
        said = prompts or PRESET_PROMPTS.get(config.preset or "", "imagenet")
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
            diffusion.describe(explained.labels, said)
        else:
            diffusion.describe(explained.labels, classes)
        tuned = None
        if isinstance(diffusion, ClassConditionalLatentDiffusion):
            tuned = Pack(str(model)).manifest["settings"]
        return cls(diffusion, explained, config, pack_settings=tuned, **options)

    def settings(self, config: Config) -> Settings:
        """Every number of a run with this config.

        Raises:
            UsageError: its fields contradict each other, or its preset does not fit the models.
        """
        if config.preset and (reason := preset_misfit(config.preset, self.diffusion.conditioning, len(self.labels))):
            raise UsageError(f"preset: {reason}")
        return config.settings(self.pack_settings)

    @contextmanager
    def _saving_memory(self) -> Iterator[None]:
        with checkpointed(self.diffusion.modules()) if self.pullback == "autograd" else nullcontext():
            yield

    def _check_source(self, config: Config) -> None:
        for field, mine in self.source.items():
            if field in config.model_fields_set and getattr(config, field) != mine:
                raise UsageError(f"{field}: this engine has {mine!r}, the config asks for {getattr(config, field)!r}")

    @property
    def labels(self) -> list[str]:
        """Names of the classifier's labels."""
        return list(self.classifier.labels)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images that the models take."""
        return self.diffusion.image_size

    @torch.no_grad()
    def probabilities(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """The classifier's probabilities: [B, labels]; computed in padded batches like everything else."""
        batches = _batches(len(images), self.slots)
        parts = [probabilities(self.classifier, images[rows])[:n] for rows, n in batches]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.labels))

    def check_target(self, target: str | int) -> int:
        """Index of a label given by name or index; -1 for `RELATIVE_TARGETS`, which depend on the image.

        Raises:
            UsageError: it is no label, or relative to something that this classifier does not have.
        """
        if target == "opposite" and len(self.labels) != 2:
            raise UsageError(f"target: opposite needs a classifier with two labels, this one has {len(self.labels)}")
        if target == "neighbour" and (lonely := [n for i, n in enumerate(self.labels) if not self.neighbours.get(i)]):
            raise UsageError(f"neighbours: none given for {len(lonely)} labels, {lonely[0]!r} for one")
        if target in RELATIVE_TARGETS:
            return -1
        if isinstance(target, str) and target in self.labels:
            return self.labels.index(target)
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(self.labels):
            return target
        known = ", ".join(self.labels[:12]) + (", ..." if len(self.labels) > 12 else "")
        raise UsageError(
            f"target: {target!r} is no label; expected {', '.join(RELATIVE_TARGETS)}, an index or one of {known}"
        )

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
        config: Config | None = None,
        progress: Callable[[int, int, Tensor], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Counterfactuals:
        """Change each image as little as needed for the classifier to say its target.

        Args:
            images: [B, 3, H, W] in [0, 1] at the model's image size (`load_image` reads files).
            targets: one per image, or one for all: label index, label name, `runner-up`, `opposite` (of two labels)
                or `neighbour` (the nearest one that the engine was given).
            seeds: one per image; without them each image's own pixels and `config.seed` decide, so that an image has
                the same noise wherever it stands.
            config: instead of the engine's.
            progress: called with (step, total, x0) after every step; x0 is the current batch's clean estimate
                [b, 3, H, W] in [0, 1]. Decoding it costs a decoder pass each step.
            on_step: called with (step, total) after every step, at no cost.

        Returns:
            Counterfactuals; samples that fail are reported in `.errors` and do not stop the others.

        Raises:
            UsageError: images, targets, seeds or config do not fit.
        """
        config = config or self.config
        self._check_source(config)
        settings = self.settings(config)
        self._check_images(images)
        with frozen(*self.diffusion.modules(), self.classifier.module), self._saving_memory():
            before = self.probabilities(images)
            source = before.argmax(dim=1)
            target = self.resolve_targets(targets, before)
            if seeds is None:
                seeds = [image_seed(image, config.seed) for image in images]
            if len(seeds) != len(images):
                raise UsageError(f"seeds: expected {len(images)}, one per image, got {len(seeds)}")
            errors: list[str | None] = [
                f"target {self.labels[int(t)]!r} is already the prediction" if s == t else None
                for s, t in zip(source.tolist(), target.tolist(), strict=True)
            ]
            for i in range(len(images)):
                if not images[i].isfinite().all():
                    errors[i] = "the image holds NaN or infinite values"
            todo = [i for i, error in enumerate(errors) if error is None]
            return self._run(images, source, target, list(seeds), settings, errors, todo, progress, on_step)

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
            options: of `engine.audit.run.Options` and `engine.audit.run.audit`.

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

    def _run(
        self,
        images: Tensor,
        source: Tensor,
        target: Tensor,
        seeds: list[int],
        settings: Settings,
        errors: list[str | None],
        todo: list[int],
        progress: Callable[[int, int, Tensor], None] | None,
        on_step: Callable[[int, int], None] | None,
    ) -> Counterfactuals:
        batch = len(images)
        batches = _batches(len(todo), self.slots)
        steps = len(make_schedule(len(self.diffusion.alphas_cumprod), settings.steps, settings.strength))
        total = steps * len(batches)
        out = images.clone()
        kept = torch.full((batch, steps), torch.nan)
        seconds = torch.full((batch,), torch.nan)
        for number, (rows, n) in enumerate(batches):
            index = [todo[r] for r in rows]  # padded: the first sample again and again behind the first n

            def after_step(i: int, _: int, z0: Tensor, number: int = number, n: int = n) -> None:
                if on_step is not None:
                    on_step(number * steps + i, total)
                if progress is not None:
                    x0 = (self.diffusion.decode(z0)[:n] + 1) / 2
                    progress(number * steps + i, total, x0.clamp(0, 1))

            started = time.perf_counter()
            run = sample(
                self.diffusion, self.classifier, images[index], target[index], [seeds[i] for i in index], settings,
                step=self._runner(settings).step(len(index)), on_step=after_step,
            )  # fmt: skip
            with torch.no_grad():
                decoded = (self.diffusion.decode(run.z) + 1) / 2
            finite = run.finite & decoded.isfinite().flatten(1).all(dim=1)
            elapsed = (time.perf_counter() - started) / n
            for row, i in enumerate(index[:n]):
                kept[i] = run.kept_fraction[row]
                seconds[i] = elapsed
                if finite[row]:
                    out[i] = decoded[row].clamp(0, 1)
                else:
                    step = int(run.kept_fraction[row].isfinite().sum()) + 1
                    errors[i] = f"the model returned NaN or infinite values at step {min(step, steps)} of {steps}"
        return self._measure(images, out, source, target, seeds, errors, kept, seconds)

    def _measure(
        self,
        images: Tensor,
        out: Tensor,
        source: Tensor,
        target: Tensor,
        seeds: list[int],
        errors: list[str | None],
        kept: Tensor,
        seconds: Tensor,
    ) -> Counterfactuals:
        failed = torch.tensor([e is not None for e in errors], dtype=torch.bool)
        saved = as_saved(out)
        probabilities = self.probabilities(saved)
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


def image_seed(image: Tensor, seed: int) -> int:
    """A seed from the image's own 8-bit pixels and a run's seed."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + to_uint8(image.nan_to_num()).cpu().numpy().tobytes()).digest()
    return int.from_bytes(digest[:6], "little")
