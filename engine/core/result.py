"""What a counterfactual run gives back, and the seeds that it starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import CounterlensError, UsageError
from ..images.files import as_saved, save_png, to_uint8
from ..showing import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

ALREADY = "is already the prediction"  # how the error of a sample that is skipped ends


@dataclass
class Counterfactual:
    """What became of one sample; every measure is of the image as the saved 8-bit file holds it.

    A sample that failed has its message in `error`, its input as image, -1 as prediction and NaN measures.

    Attributes:
        id: as `Session.submit` gave it; in a batch the place in it.
        image: [3, H, W] in [0, 1], not rounded to 8 bits.
        input: [3, H, W] in [0, 1].
        source: the classifier's prediction for the input; -1 where it gives NaN or infinity.
        target: the label asked for; -1 where it is none.
        prediction: the classifier's prediction for the counterfactual.
        confidence: probability of that prediction.
        target_confidence: probability of the target.
        flipped: prediction equals target.
        l1, l2: mean absolute and root mean square difference per pixel and channel, in [0, 1].
        kept_fraction: [steps] share of latent locations that the consensus filter kept; NaN without a guided step.
        seconds: wall time of every batched operation that the sample took part in, divided by the samples in it.
        complete: every step was taken; False where `budget_s` ended the run before, and with an error.
        seed: of the noise.
        error: why there is no counterfactual, or None.
        labels: names of the classifier's labels.
        provenance: what made it: classifier, mode, settings, seed, weights, versions, threads, ...
        region: where alone it could change, [H, W] bool; None: anywhere.
        sample: place of its image among those that were given; in a session the id.
        k: which of the `count` counterfactuals of its image it was made as, from 0.
        student: of a black box's surrogate, what it thought of the counterfactual, and what asking took; all else here
            is what the box says.
    """

    id: int
    image: Tensor
    input: Tensor
    source: int
    target: int
    prediction: int
    confidence: float
    target_confidence: float
    flipped: bool
    l1: float
    l2: float
    kept_fraction: Tensor
    seconds: float
    complete: bool
    seed: int
    error: str | None
    labels: list[str] = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)
    region: Tensor | None = field(default=None, repr=False)
    sample: int = 0
    k: int = 0
    student: dict[str, Any] = field(default_factory=dict)

    __repr__ = one_line

    def measures(self) -> dict[str, float]:
        """Of a region: its share of the pixels, and l1 inside and outside; nothing without one."""
        if self.region is None:
            return {}
        change = (as_saved(self.image) - self.input).abs().mean(dim=0)
        inside, outside = change[self.region], change[~self.region]
        return {
            "region_area": self.region.float().mean().item(),
            "l1_inside": inside.mean().item() if len(inside) else 0.0,
            "l1_outside": outside.mean().item() if len(outside) else 0.0,
        }

    @property
    def status(self) -> str:
        """What became of it: `done`, `skipped` (the target was the prediction already) or `failed`."""
        if self.error is None:
            return "done"
        return "skipped" if self.error.endswith(ALREADY) else "failed"

    def record(self) -> dict[str, Any]:
        """The sample as plain values, as `--json` prints it: status, and source, target, ..., or error."""
        if self.error is not None:
            return {"status": self.status, "error": self.error}
        return {
            "status": self.status,
            "source": self.labels[self.source],
            "target": self.labels[self.target],
            "prediction": self.labels[self.prediction],
            "confidence": round(self.confidence, 6),
            "target_confidence": round(self.target_confidence, 6),
            "flipped": self.flipped,
            "l1": round(self.l1, 6),
            "l2": round(self.l2, 6),
            "complete": self.complete,
            **({"k": self.k} if "count" in self.provenance else {}),
            "seed": self.seed,
            "seconds": round(self.seconds, 4),
            **self.student,
            **{name: round(value, 6) for name, value in self.measures().items()},
        }


@dataclass
class Counterfactuals:
    """Counterfactuals of B images: what `Counterfactual` says of each, stacked; indexing gives one of them.

    Attributes:
        images, inputs: [B, 3, H, W] in [0, 1].
        source, target, prediction: [B] labels.
        confidence, target_confidence, l1, l2, seconds: [B].
        flipped, complete: [B] bool.
        kept_fraction: [B, steps], of the longest schedule.
        seeds, errors, provenance: one per sample.
        regions: [H, W] bool of each sample, or None where it could change anywhere.
        samples: which of the images that were given each is of; with `count`, an image has several, nearest first.
        ks: which of its image's `count` counterfactuals each was made as.
        students: what a black box's surrogate thought of each, see `Counterfactual.student`.
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
    complete: Tensor
    seeds: list[int]
    errors: list[str | None]
    labels: list[str]
    provenance: list[dict[str, Any]] = field(default_factory=list, repr=False)
    regions: list[Tensor | None] = field(default_factory=list, repr=False)
    samples: list[int] = field(default_factory=list, repr=False)
    ks: list[int] = field(default_factory=list, repr=False)
    students: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @classmethod
    def stack(
        cls,
        samples: Sequence[Counterfactual],
        inputs: Tensor,  # [B, 3, H, W] in [0, 1]
        labels: list[str],
    ) -> Counterfactuals:
        """Samples as one result, in their order; `inputs` are theirs."""
        images = inputs.clone()
        kept = torch.full((len(samples), max((len(s.kept_fraction) for s in samples), default=0)), torch.nan)
        for i, sample in enumerate(samples):
            images[i] = sample.image
            kept[i, : len(sample.kept_fraction)] = sample.kept_fraction
        exact = torch.promote_types(inputs.dtype, torch.float32)
        return cls(
            images=images,
            inputs=inputs,
            source=torch.tensor([s.source for s in samples], dtype=torch.long),
            target=torch.tensor([s.target for s in samples], dtype=torch.long),
            prediction=torch.tensor([s.prediction for s in samples], dtype=torch.long),
            confidence=torch.tensor([s.confidence for s in samples], dtype=exact),
            target_confidence=torch.tensor([s.target_confidence for s in samples], dtype=exact),
            flipped=torch.tensor([s.flipped for s in samples], dtype=torch.bool),
            l1=torch.tensor([s.l1 for s in samples], dtype=exact),
            l2=torch.tensor([s.l2 for s in samples], dtype=exact),
            kept_fraction=kept,
            seconds=torch.tensor([s.seconds for s in samples], dtype=torch.float32),
            complete=torch.tensor([s.complete for s in samples], dtype=torch.bool),
            seeds=[s.seed for s in samples],
            errors=[s.error for s in samples],
            labels=labels,
            provenance=[s.provenance for s in samples],
            regions=[s.region for s in samples],
            samples=[s.sample for s in samples],
            ks=[s.k for s in samples],
            students=[s.student for s in samples],
        )

    def __repr__(self) -> str:
        done, flipped = self.errors.count(None), int(self.flipped.sum())
        return f"Counterfactuals({done} of {len(self)} made, {flipped} flipped, mean l1 {self.l1.nanmean():.3f})"

    def __len__(self) -> int:
        return len(self.errors)

    def __iter__(self) -> Iterator[Counterfactual]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Counterfactual:
        return Counterfactual(
            id=range(len(self))[i],
            image=self.images[i],
            input=self.inputs[i],
            source=int(self.source[i]),
            target=int(self.target[i]),
            prediction=int(self.prediction[i]),
            confidence=self.confidence[i].item(),
            target_confidence=self.target_confidence[i].item(),
            flipped=bool(self.flipped[i]),
            l1=self.l1[i].item(),
            l2=self.l2[i].item(),
            kept_fraction=self.kept_fraction[i],
            seconds=self.seconds[i].item(),
            complete=bool(self.complete[i]),
            seed=self.seeds[i],
            error=self.errors[i],
            labels=self.labels,
            provenance=self.provenance[i] if self.provenance else {},
            region=self.regions[i] if self.regions else None,
            sample=self.samples[i] if self.samples else range(len(self))[i],
            k=self.ks[i] if self.ks else 0,
            student=self.students[i] if self.students else {},
        )

    def by_image(self) -> list[list[Counterfactual]]:
        """The counterfactuals of each image, nearest first; one each without `count`."""
        images: dict[int, list[Counterfactual]] = {}
        for answer in self:
            images.setdefault(answer.sample, []).append(answer)
        return list(images.values())

    def figure(self, most: int = 8) -> Figure:
        """Inputs, counterfactuals and what became darker and brighter, as a matplotlib figure.

        Args:
            most: rows; further images are left out.

        Raises:
            CounterlensError: matplotlib is missing.
        """
        from ..images.figures import counterfactuals_figure

        return counterfactuals_figure(self, most)

    def to_pil(self, most: int = 8) -> Image.Image:
        """`figure`, drawn."""
        from ..images.figures import drawn

        return drawn(self.figure(most))

    def _repr_html_(self) -> str | None:
        from ..images.figures import as_html

        return as_html(self)

    def status(self, i: int) -> str:
        """What became of a sample, see `Counterfactual.status`."""
        return self[i].status

    def record(self, i: int) -> dict[str, Any]:
        """One sample as plain values, see `Counterfactual.record`."""
        return self[i].record()

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
            names: of the images' files without ending, made safe where they are not; `0000`, `0001`, ... without them.
                The first counterfactual of an image is NAME.png, with `count` the second NAME.2.png and so on.
            overwrite: remove what an earlier run wrote there.
            resume: add to it.

        Returns:
            The paths of the PNG files, in order; failed samples have none.

        Raises:
            UsageError: the folder cannot be written or holds another run, or names do not fit. CounterlensError: a
                file cannot be written; the others are.
        """
        from ..outputs import Source, open_run

        found = self.by_image()
        names = [f"{i:04d}" for i in range(len(found))] if names is None else list(names)
        if len(names) != len(found) or len(set(names)) != len(names):
            raise UsageError(f"names: expected {len(found)} different names, got {len(names)}")
        names = [
            name if n == 0 else f"{name}.{n + 1}"
            for name, answers in zip(names, found, strict=True)
            for n in range(len(answers))
        ]
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
