"""Runs a counterfactual's or a saliency map's file with numpy and ONNX Runtime alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterlens.export.files import newer
from counterlens.export.hashing import file_digest

from ..errors import CounterlensError, UsageError
from ..labels import find_label

COUNTERFACTUAL, SALIENCY = "counterfactual.onnx", "saliency.onnx"
SCHEMA_VERSION = 1
RUNNER_UP, PREDICTION = "runner-up", "prediction"


def card_of(file: str) -> str:
    """The name of the card that lies beside a file."""
    return str(Path(file).with_suffix(".json"))


CARD = card_of(COUNTERFACTUAL)


@dataclass(frozen=True)
class Answers:
    """What the file answers for B images.

    Attributes:
        counterfactual: [B, 3, S, S] float32 in [0, 1], of 8-bit values.
        source, target, prediction: [B] labels of the image, asked for, and of the counterfactual; -1 without one.
        source_probabilities, probabilities: [B, labels].
        l1: [B] mean absolute change.
        kept: [B, steps] share of latent locations that the filter kept.
        errors: for each image why there is no counterfactual, or None.
    """

    counterfactual: NDArray[np.float32]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    prediction: NDArray[np.int64]
    source_probabilities: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    l1: NDArray[np.float32]
    kept: NDArray[np.float32]
    errors: list[str | None]


@dataclass(frozen=True)
class Maps:
    """What a saliency file answers for B images; its card says what each number means.

    Attributes:
        saliency: [B, S, S] float32 in [0, 1].
        prediction, target: [B] labels of the image, and explained; -1 where there is none.
        logits: [B, labels].
        probability: [B] of what is explained, for the whole image.
        numbers: msi and its terms by name, [B] each.
        curves: keep, remove and those of the area form by name, [B, K] each.
        errors: for each image why there is no map, or None.
    """

    saliency: NDArray[np.float32]
    prediction: NDArray[np.int64]
    target: NDArray[np.int64]
    logits: NDArray[np.float32]
    probability: NDArray[np.float32]
    numbers: dict[str, NDArray[np.float32]]
    curves: dict[str, NDArray[np.float32]]
    errors: list[str | None]


class OnnxFile:
    """A file that `counterlens export` wrote, with its card beside it, in ONNX Runtime on the CPU.

    Args:
        path: of the .onnx file.
        threads: of ONNX Runtime; its own choice without it.

    Raises:
        UsageError: there is no such file, or the card is missing or of another kind. CounterlensError: the file is not
            the one that the card is of, or ONNX Runtime cannot open it.
    """

    what: str
    default: str  # the target that is -1

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        path = Path(path)
        self.card = read_card(path, self.what)
        if (found := file_digest(path)) != self.card["sha256"]:
            raise CounterlensError(
                f"{path}: not the file that {card_of(path.name)} describes (sha256 {found[:12]}); export it again"
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise CounterlensError(f"onnxruntime cannot be imported ({error}); pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf) as error:
            raise CounterlensError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]})") from error
        self.runtime_version: str = onnxruntime.__version__
        self.labels: list[str] = self.card["labels"]
        self.image_size: int = self.card["image_size"]
        self.fit: str = self.card.get("fit", "squash")  # of pictures that are not square
        self.shapes: dict[str, list[Any]] = {entry["name"]: entry["shape"] for entry in self.card["inputs"]}
        self.batch: int | None = None if self.shapes["image"][0] == "batch" else self.shapes["image"][0]

    def target(self, text: str | int) -> int:
        """The label of a name or a number, or -1 for the file's own choice.

        Raises:
            UsageError: it is none, or several labels have that name.
        """
        if text in (self.default, -1):
            return -1
        return find_label(text, self.labels, more=(self.default,))

    def answer(
        self,
        images: NDArray[np.float32],  # [B, 3, S, S] in [0, 1]
        targets: Sequence[str | int] | str | int,
        more: Callable[[NDArray[np.float32]], dict[str, NDArray[Any]]],
    ) -> dict[str, Any]:
        """The outputs by name, in batches as the file takes them; `more` gives a batch's further inputs.

        Raises:
            UsageError: shape, type, number or targets do not fit.
        """
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise UsageError(f"images: expected [B, 3, {size}, {size}], got {list(images.shape)}")
        if not np.issubdtype(images.dtype, np.floating):
            raise UsageError(f"images: expected floating point in [0, 1], got {images.dtype}")
        if not len(images):
            raise UsageError("images: expected one or more, got none")
        if isinstance(targets, str | int):
            targets = [targets] * len(images)
        if len(targets) != len(images):
            raise UsageError(f"targets: expected {len(images)}, one for each image, got {len(targets)}")
        wanted = np.array([self.target(t) for t in targets], dtype=np.int64)
        at_once = self.batch or len(images)
        parts: list[list[NDArray[Any]]] = []
        for start in range(0, len(images), at_once):
            rows = np.arange(start, start + at_once) % len(images)
            shown = images[rows].astype(np.float32)
            parts.append(self.session.run(None, {"image": shown, "target": wanted[rows]} | more(shown)))
        names = [output.name for output in self.session.get_outputs()]
        out = {name: np.concatenate([part[k] for part in parts])[: len(images)] for k, name in enumerate(names)}
        out["target"] = out.pop("resolved_target")
        return out


class CounterfactualFile(OnnxFile):
    """A whole counterfactual that `counterlens export --what counterfactual` wrote; see `OnnxFile`."""

    what, default = "counterfactual", RUNNER_UP

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        super().__init__(path, threads)
        self.noise: list[int] | None = self.shapes["noise"][1:] if "noise" in self.shapes else None
        self.scales: dict[str, float] = {e["name"]: e["default"] for e in self.card["inputs"] if "default" in e}

    def run(
        self,
        images: NDArray[np.float32],  # [B, 3, S, S] in [0, 1]
        targets: Sequence[str | int] | str | int = RUNNER_UP,
        seed: int = 0,
        scales: Mapping[str, float] | None = None,
    ) -> Answers:
        """Counterfactuals of some images, each towards its target or all towards one.

        Args:
            images: at the file's size.
            targets: label indices, names or `runner-up`.
            seed: of the noise, where the file takes some.
            scales: instead of the card's, where the file takes them: class_scale, ...

        Raises:
            UsageError: shape, type, number, targets or scales do not fit.
        """
        numbers = self.check_scales(scales or {})

        def more(shown: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
            feeds = {name: np.full(len(shown), value, dtype=np.float32) for name, value in numbers.items()}
            if self.noise is not None:
                feeds["noise"] = np.stack([_noise(image, seed, self.noise) for image in shown])
            return feeds

        out = self.answer(images, targets, more)
        return Answers(**out, errors=[self._reason(i, images, out) for i in range(len(images))])

    def check_scales(self, given: Mapping[str, float]) -> dict[str, float]:
        """Every scale that the file takes: those given, the others as its card says.

        Raises:
            UsageError: the file does not take one, or it is out of range.
        """
        for name, value in given.items():
            if name not in self.scales:
                held = self.card["settings"].get(name, "none")
                raise UsageError(f"{name}: this file has its own ({held}); export it with --inputs scales to choose it")
            settings = self.card["settings"]
            top = math.inf if name != "angle" else 180 if settings.get("filter") == "zero" else 89.99
            if not 0 <= value <= top or math.isinf(value):
                raise UsageError(
                    f"{name}: expected a number from 0{'' if top == math.inf else f' to {top:g}'}, got {value:g}"
                )
        return {**self.scales, **given}

    def _reason(self, i: int, images: NDArray[np.float32], out: dict[str, Any]) -> str | None:
        if (reason := _unusable(images[i])) is not None:
            return reason
        if out["prediction"][i] < 0:
            return "the model returned NaN or infinite values"
        if out["source"][i] == out["target"][i]:
            return f"target {self.labels[out['source'][i]]!r} is already the prediction"
        return None


class SaliencyFile(OnnxFile):
    """A LAX map with its MSI that `counterlens export --what saliency` wrote; see `OnnxFile`."""

    what, default = "saliency", PREDICTION

    def run(
        self,
        images: NDArray[np.float32],  # [B, 3, S, S] in [0, 1]
        targets: Sequence[str | int] | str | int = PREDICTION,
    ) -> Maps:
        """Maps of some images, each for its label or all for one.

        Args:
            images: at the file's size.
            targets: label indices, names or `prediction`.

        Raises:
            UsageError: shape, type, number or targets do not fit.
        """
        out = self.answer(images, targets, lambda _: {})
        errors = [_unusable(image) for image in images]
        for i, label in enumerate(out["target"]):
            if label < 0 and errors[i] is None:
                errors[i] = "the model returned NaN or infinite values"
        first = ("saliency", "prediction", "target", "logits", "probability")
        rest = {name: value for name, value in out.items() if name not in (*first, "scores")}
        own: dict[str, Any] = {name: out[name] for name in first}
        return Maps(
            **own,
            numbers={name: value for name, value in rest.items() if value.ndim == 1},
            curves={name: value for name, value in rest.items() if value.ndim == 2},
            errors=errors,
        )


def _unusable(image: NDArray[np.float32]) -> str | None:
    if not np.isfinite(image).all():
        return "the image holds NaN or infinite values"
    if image.min() < 0 or image.max() > 1:
        return f"pixels from {image.min():g} to {image.max():g}; expected 0 to 1"
    return None


def read_card(path: Path, what: str | None = None) -> dict[str, Any]:
    """The card beside a file, of a certain kind or of any.

    Raises:
        UsageError: file or card is missing, or the card is of another kind or of a newer counterlens.
    """
    kind = what or "counterfactual"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; `counterlens export --what {kind} --out FOLDER` writes one")
    card = path.with_suffix(".json")
    try:
        found = json.loads(card.read_text())
        said, schema = found["what"], found["schema_version"]
    except OSError as error:
        raise UsageError(f"{card}: cannot be read ({error.strerror}); it belongs beside {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{card}: not the card of a {kind} ({type(error).__name__}: {error})") from error
    if said not in ("counterfactual", "saliency") or said != (what or said) or not isinstance(schema, int):
        raise UsageError(f"{card}: the card of {said!r}, not of a {kind}")
    if problem := newer(schema, SCHEMA_VERSION):
        raise UsageError(f"{card}: {problem}")
    return found


def _noise(image: NDArray[np.float32], seed: int, shape: list[int]) -> NDArray[np.float32]:
    """An image's own noise, whatever stands beside it; not the engine's, whose generator is PyTorch's."""
    pixels = (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8).tobytes()
    own = hashlib.sha256(seed.to_bytes(8, "little") + pixels).digest()
    return np.random.default_rng(int.from_bytes(own[:8], "little")).standard_normal(shape, dtype=np.float32)
