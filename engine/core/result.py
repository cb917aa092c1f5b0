"""What a counterfactual run gives back, and the seeds that it starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import Config
from ..errors import CounterlensError, UsageError
from ..images.files import save_png, to_uint8

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
        from ..outputs import Source, open_run

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
