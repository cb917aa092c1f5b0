"""The Engine: images and targets in, measured counterfactuals out."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Config, Settings
from .errors import CounterlensError, UsageError
from .guidance.pullback import frozen
from .guidance.sampler import sample
from .guidance.schedule import make_schedule
from .images import as_saved, make_folder, save_png, to_uint8
from .models.protocols import Classifier, Diffusion, probabilities
from .packs import Pack

# Batches are padded to these sizes: with the same shape a sample's result never depends on its neighbours.
SLOTS = (1, 2, 4, 8, 16)

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
        pack_settings: tuned numbers of the modes `realistic` and `audit`.
        backend: of the kernels: `auto`, `triton`, `cpp` or `reference`.
        source: the pack and classifier that this is, where a config must not ask for another.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        classifier: Classifier,
        config: Config | None = None,
        *,
        pack_settings: dict[str, dict[str, Any]],
        backend: str = "auto",
        source: dict[str, str] | None = None,
    ) -> None:
        if list(diffusion.labels) != list(classifier.labels):
            raise UsageError(
                f"classifier: its {len(classifier.labels)} labels are not the diffusion model's {len(diffusion.labels)}"
            )
        self.diffusion = diffusion
        self.classifier = classifier
        self.config = config or Config()
        self.pack_settings = pack_settings
        self.backend = backend
        self.source = source or {}
        self._check_source(self.config)

    @classmethod
    def from_pack(cls, name: str = "digits", classifier: str = "clean", config: Config | None = None) -> Engine:
        """Open an embedded pack (`digits`) or a pack's folder, verifying every file.

        Raises:
            UsageError: there is no such pack or classifier. CounterlensError: a file is missing or was changed.
        """
        pack = Pack(name)
        settings = {mode: pack.manifest["settings"][mode] for mode in ("realistic", "audit")}
        source = {"pack": name, "classifier": classifier}
        return cls(pack.diffusion(), pack.classifier(classifier), config, pack_settings=settings, source=source)

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
        parts = [probabilities(self.classifier, images[rows])[:n] for rows, n in _batches(len(images))]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.labels))

    def check_target(self, target: str | int) -> int:
        """Index of a label given by name or index; -1 for `runner-up`, which depends on the image.

        Raises:
            UsageError: it is no label.
        """
        if target == "runner-up":
            return -1
        if isinstance(target, str) and target in self.labels:
            return self.labels.index(target)
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(self.labels):
            return target
        known = ", ".join(self.labels[:12]) + (", ..." if len(self.labels) > 12 else "")
        raise UsageError(f"target: {target!r} is no label; expected runner-up, an index or one of {known}")

    def resolve_targets(
        self,
        targets: Targets,
        probabilities: Tensor,  # [B, labels]
    ) -> Tensor:
        """Label indices [B] of targets by index, by label, or `runner-up` (the classifier's second choice).

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
        second = probabilities.topk(2, dim=1).indices[:, 1].tolist()
        out = [s if t == "runner-up" else self.check_target(t) for t, s in zip(targets, second, strict=True)]
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
            targets: one per image, or one for all: label index, label name, or `runner-up`.
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
        settings = config.settings(self.pack_settings)
        self._check_images(images)
        with frozen(*self.diffusion.modules(), self.classifier.module):
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
        batches = _batches(len(todo))
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
                backend=self.backend, on_step=after_step,
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


def _batches(count: int) -> list[tuple[list[int], int]]:
    """Rows of each batch, padded to a slot count with its first row, and how many of them are real."""
    batches = []
    for start in range(0, count, SLOTS[-1]):
        rows = list(range(start, min(start + SLOTS[-1], count)))
        slots = next(s for s in SLOTS if s >= len(rows))
        batches.append((rows + rows[:1] * (slots - len(rows)), len(rows)))
    return batches


def image_seed(image: Tensor, seed: int) -> int:
    """A seed from the image's own 8-bit pixels and a run's seed."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + to_uint8(image.nan_to_num()).cpu().numpy().tobytes()).digest()
    return int.from_bytes(digest[:6], "little")
