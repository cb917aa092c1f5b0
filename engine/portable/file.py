"""Runs a counterfactual's file with numpy and ONNX Runtime alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterlens.export.hashing import file_digest

from ..errors import CounterlensError, UsageError
from ..labels import find_label

CARD = "counterfactual.json"
SCHEMA_VERSION = 1
RUNNER_UP = "runner-up"


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


class CounterfactualFile:
    """A whole counterfactual that `counterlens export --what counterfactual` wrote: `counterfactual.onnx` and its card.

    Args:
        path: of the .onnx file; counterfactual.json lies beside it.
        threads: of ONNX Runtime; its own choice without it.

    Raises:
        UsageError: there is no such file, or the card is missing or of another kind. CounterlensError: the file is not
            the one that the card is of, or ONNX Runtime cannot open it.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        path = Path(path)
        self.card = read_card(path)
        if (found := file_digest(path)) != self.card["sha256"]:
            raise CounterlensError(f"{path}: not the file that {CARD} describes (sha256 {found[:12]}); export it again")
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
        shapes = {entry["name"]: entry["shape"] for entry in self.card["inputs"]}
        self.batch: int | None = None if shapes["image"][0] == "batch" else shapes["image"][0]
        self.noise: list[int] | None = shapes["noise"][1:] if "noise" in shapes else None

    def target(self, text: str | int) -> int:
        """The label of a name, a number or `runner-up` (-1).

        Raises:
            UsageError: it is none, or several labels have that name.
        """
        if text in (RUNNER_UP, -1):
            return -1
        return find_label(text, self.labels, more=(RUNNER_UP,))

    def run(
        self,
        images: NDArray[np.float32],  # [B, 3, S, S] in [0, 1]
        targets: Sequence[str | int] | str | int = RUNNER_UP,
        seed: int = 0,
    ) -> Answers:
        """Counterfactuals of some images, each towards its target or all towards one.

        Args:
            images: at the file's size.
            targets: label indices, names or `runner-up`.
            seed: of the noise, where the file takes some.

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
            feeds: dict[str, NDArray[Any]] = {"image": images[rows].astype(np.float32), "target": wanted[rows]}
            if self.noise is not None:
                feeds["noise"] = np.stack([_noise(image, seed, self.noise) for image in feeds["image"]])
            parts.append(self.session.run(None, feeds))
        names = [output.name for output in self.session.get_outputs()]
        out: dict[str, Any] = {
            name: np.concatenate([part[k] for part in parts])[: len(images)] for k, name in enumerate(names)
        }
        errors = [self._reason(i, images, out) for i in range(len(images))]
        out["target"] = out.pop("resolved_target")
        return Answers(**out, errors=errors)

    def _reason(self, i: int, images: NDArray[np.float32], out: dict[str, Any]) -> str | None:
        image = images[i]
        if not np.isfinite(image).all():
            return "the image holds NaN or infinite values"
        if image.min() < 0 or image.max() > 1:
            return f"pixels from {image.min():g} to {image.max():g}; expected 0 to 1"
        if out["prediction"][i] < 0:
            return "the model returned NaN or infinite values"
        if out["source"][i] == out["resolved_target"][i]:
            return f"target {self.labels[out['source'][i]]!r} is already the prediction"
        return None


def read_card(path: Path) -> dict[str, Any]:
    """The card beside a counterfactual's file.

    Raises:
        UsageError: file or card is missing, or the card is of another kind or of a newer counterlens.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; `counterlens export --what counterfactual --out FOLDER` writes one")
    card = path.with_name(CARD)
    try:
        found = json.loads(card.read_text())
        what, schema = found["what"], found["schema_version"]
    except OSError as error:
        raise UsageError(f"{card}: cannot be read ({error.strerror}); it belongs beside {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{card}: not the card of a counterfactual ({type(error).__name__}: {error})") from error
    if what != "counterfactual" or not isinstance(schema, int):
        raise UsageError(f"{card}: the card of {what!r}, not of a counterfactual")
    if schema > SCHEMA_VERSION:
        raise UsageError(f"{card}: written by a newer counterlens (schema {schema}, this one knows {SCHEMA_VERSION})")
    return found


def _noise(image: NDArray[np.float32], seed: int, shape: list[int]) -> NDArray[np.float32]:
    """An image's own noise, whatever stands beside it; not the engine's, whose generator is PyTorch's."""
    pixels = (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8).tobytes()
    own = hashlib.sha256(seed.to_bytes(8, "little") + pixels).digest()
    return np.random.default_rng(int.from_bytes(own[:8], "little")).standard_normal(shape, dtype=np.float32)
