"""A classifier in an ONNX file that is only called: read, given images and understood as one that guides is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterlens.export.hashing import file_digest

from ..errors import CounterlensError, UsageError
from ..models.onnx_classifier import IMAGES, natural_images
from ..models.onnx_file import OnnxFile, open_session, read_onnx
from ..models.onnx_graph import OnnxGraph, find_ending, makers
from ..models.onnx_meaning import as_scores, meaning_of, own_labels, preprocessing_of
from ..models.onnx_operators import NoGradient
from ..models.preprocessing import Preprocessing
from .options import BoxOptions, Output, normalising
from .reading import Refused


class OnnxBox:
    """An ONNX file of images, run by ONNX Runtime; its scores, maps of them, or labels alone are the answer.

    Attributes:
        labels: as given, else the file's own. output: what its answers are, see `BoxOptions`.

    Raises:
        UsageError: its input is none for images, or its answers are none of these. CounterlensError: it cannot be
            opened, or should not be; a package is missing.
    """

    remote = False
    preprocessing: Preprocessing | None

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        size: int,
        options: BoxOptions,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        file = read_onnx(name, output=options.scores, labels=len(labels) or None)
        if file.picture.dtype == "uint8" and (options.mean or options.std):
            raise UsageError(f"classifier_mean: {file.path} takes pixels of 8 bits as they are")
        with suppress(NoGradient):  # what a few bytes would make of the memory is refused before anybody runs it
            OnnxGraph(file)
        self._file, self.name = file, name
        self.concurrency, self.batch = options.concurrency or 1, options.batch or 64
        made, _, assumed = preprocessing_of(file, size, normalising(options, preprocessing))
        self._prepare, self.preprocessing = made, made
        self._run = open_session(file, torch.get_num_threads(), self.batch)
        self.labels, self.output, self._logits = list(labels) or own_labels(file), options.output, False
        if assumed:
            warnings.warn(f"{name}: {'; '.join(assumed)}", stacklevel=5)
        if file.answer == "scores":
            self._understand(file, size, options)
        if len(self.labels) < 2:
            raise UsageError(f"labels: {file.path} names none; give two or more, in the order of its answers")
        self.identity: dict[str, Any] = {
            "onnx": file_digest(file.path), "data": [file_digest(path) for path in file.data], "scores": file.output,
            "pixels": [made.resize, made.size, made.order, made.geometry, made.colour, made.interpolation],
            "mean": made.mean.flatten().tolist(), "std": made.std.flatten().tolist(), "sigmoid": self._logits,
        }  # fmt: skip

    def _understand(self, file: OnnxFile, size: int, options: BoxOptions) -> None:
        """What its scores are, as one that guides takes them; what nothing tells has to be said."""
        said = options.output if "output" in options.model_fields_set else None
        ending, _ = find_ending(makers(file.model.graph), file.output)
        scores = self._answers(natural_images(size, IMAGES))
        meaning = meaning_of(file, ending, scores, self.labels, said=said)
        self.labels = meaning.labels
        if meaning.link == "binary" and meaning.probabilities is None:
            raise UsageError(
                f"classifier_output: nothing says whether the one score of {file.path} is a probability; say "
                "--classifier-output probabilities or logits"
            )
        found: Output = "probabilities" if meaning.probabilities is not False else "logits"
        if meaning.link == "sigmoid":
            found, self._logits = "independent", not meaning.probabilities
        self.output = found

    def ask(self, images: NDArray[np.uint8]) -> Any:
        """Its answer for each image."""
        try:
            out = self._answers(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        except CounterlensError as error:
            raise Refused(str(error).removeprefix(f"classifier: {self._file.path}: ")) from error
        return torch.from_numpy(out).sigmoid().numpy() if self._logits else out

    @torch.no_grad()
    def _answers(self, images: Tensor) -> Any:
        out = self._run(self._prepare(images).numpy())
        if self._file.answer == "scores":
            return as_scores(self._file, out)
        return out if self._file.answer == "maps" else out.reshape(-1)

    def hide(self, text: str) -> str:
        """As it is."""
        return text
