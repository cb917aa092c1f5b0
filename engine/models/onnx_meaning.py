"""What an ONNX file's input wants and what its scores mean: one reading, whether the file guides or is only asked."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..errors import CounterlensError, UsageError
from .files import id2label_names, read_json
from .image_classifiers import Output, recipe
from .onnx_file import OnnxFile
from .preprocessing import Preprocessing, from_processor, pixels_of
from .text import import_transformers

Said = Literal["probabilities", "logits", "independent"]
NAMES = ("labels", "names", "classes", "class_names", "categories", "id2label")  # keys of labels in a file's metadata
GIVES: dict[str, Said] = {"softmax": "probabilities", "log-softmax": "logits", "sigmoid": "independent"}  # by its end


@dataclass(frozen=True)
class Meaning:
    """What scores mean.

    Attributes:
        labels: of the scores. link: how logits become probabilities.
        probabilities: the file gives them, and not logits; None where nothing tells and nobody said.
        assumed: what the file does not say.
    """

    labels: list[str]
    link: Output
    probabilities: bool | None
    assumed: str


def preprocessing_of(
    file: OnnxFile, image_size: int, given: Mapping[str, Any] | None
) -> tuple[Preprocessing, Callable[[Any], Tensor] | None, list[str]]:
    """What stands between an image and the file, its function of a picture where it has one, and what was assumed.

    Raises:
        UsageError: what is given makes another size than the file's, or is of pixels that a file of 8 bits has not.
        CounterlensError: the file beside it cannot be read.
    """
    beside = _beside(file, "preprocessor_config.json")
    size, bytes_ = file.picture.size, file.picture.dtype == "uint8"
    process: Callable[[Any], Tensor] | None = None
    assumed: list[str] = []
    if given is not None:
        if bytes_ and (wrong := [name for name in ("mean", "std") if name in given]):
            raise UsageError(f"{wrong[0]}: {file.path} takes pixels of 8 bits as they are")
        said = dict(given)
        if size is not None and "resize" not in said and "crop" not in said:
            said["resize"] = size
        made = recipe(image_size, **said)
        process = made.of_picture if "resize" in given else None
    elif beside.is_file():
        read_json(beside)
        try:
            processor = import_transformers().AutoImageProcessor.from_pretrained(beside.parent, local_files_only=True)
        except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CounterlensError(f"{beside}: cannot be read ({' '.join(str(error).split())[:200]})") from error
        made, process = from_processor(processor, image_size), pixels_of(processor)
        if bytes_:  # its graph normalises them
            made.mean.zero_()
            made.std.fill_(1)
            process = None
            assumed.append(f"it takes 8-bit pixels, so mean and std of its {beside.name} are left to it")
    else:
        made = recipe(image_size, resize=size)
        if not bytes_:
            assumed.append(
                "pixels are given to it in [0, 1]; if it was trained on others, give mean and std, or keep its "
                "preprocessor_config.json beside it"
            )
    if size is not None and made.size != size:
        raise UsageError(
            f"preprocessing: {file.path} takes {size[0]}x{size[1]} pixels, what stands before it makes "
            f"{made.size[0]}x{made.size[1]}"
        )
    return made, process, assumed


def as_scores(
    file: OnnxFile,
    out: np.ndarray,  # [B, labels], also with sides of one behind it, or [B]
) -> np.ndarray:
    """Scores [B, labels].

    Raises:
        UsageError: they are something else.
    """
    if out.ndim == 0 or math.prod(out.shape[2:]) != 1:
        raise UsageError(f"classifier: {file.path}: output {file.output!r} is {list(out.shape)}, expected [B, labels]")
    return out.reshape(len(out), -1)


def meaning_of(
    file: OnnxFile,
    ending: str,
    scores: np.ndarray,  # [N, labels], of a few images
    labels: Sequence[str] | None,
    *,
    output: Output | None = None,
    said: Said | None = None,
) -> Meaning:
    """What a file's scores mean: what its graph ends in tells, else what was said, else whether they sum to 1.

    Args:
        ending: see `onnx_graph.find_ending`.
        labels: names of its scores; its own without them.
        output: `softmax`, `sigmoid` or `binary`, of a module's logits. said: what the file's own scores are.

    Raises:
        UsageError: there are no labels, too few or too many, or the file shows something else than was said.
    """
    many, names = scores.shape[1], list(labels) if labels else own_labels(file)
    natural = GIVES.get(ending)
    wanted: Output = "sigmoid" if (said or natural) == "independent" else "softmax"
    link: Output = output or ("binary" if many == 1 else wanted)
    fits = said in (None, natural) or (many == 1 and (said, natural) == ("probabilities", "independent"))
    if natural is not None and not fits:
        raise UsageError(f"classifier_output: {file.path} ends in a {ending}, so its answers are {natural}, not {said}")
    if ending and (ending == "sigmoid") != (link in ("sigmoid", "binary")):
        raise UsageError(f"output: {file.path} ends in a {ending}, which does not fit {link!r}")
    expected = 2 if link == "binary" else many
    if not names:
        raise UsageError(f"labels: {file.path} names none; give {expected}, one for each of its scores")
    if len(names) != expected:
        raise UsageError(f"labels: {len(names)} names for the {expected} of {file.path}; give one for each")
    if link == "binary" and many != 1:
        raise UsageError(f"output: {file.path} has {many} scores, binary is of one")
    if ending:
        return Meaning(
            names, link, ending != "log-softmax", f"it ends in a {ending}: what goes into that are the logits"
        )
    inside = bool(((scores >= 0) & (scores <= 1)).all())
    sums = inside and many > 1 and bool((np.abs(scores.sum(axis=1) - 1) < 1e-3).all())
    if said == "probabilities" and not (sums if link == "softmax" else inside):
        raise UsageError(
            f"classifier_output: {file.path} gives scores from {scores.min():.3g} to {scores.max():.3g}, which are no "
            "probabilities; where that is meant, say --classifier-output logits or independent"
        )
    if said is not None:
        return Meaning(names, link, said == "probabilities" or (said == "independent" and inside), "")
    if sums and link == "softmax" and output is None:
        return Meaning(names, link, True, "its scores sum to 1: they are taken for probabilities")
    of = f"its scores are logits, of a {'sigmoid' if link == 'binary' else link}" if output is None else ""
    return Meaning(names, link, None if output is None else False, of)


def own_labels(file: OnnxFile) -> list[str]:
    """Labels in the file's metadata, or in the config.json beside it; none where neither names them."""
    for key in NAMES:
        if not (text := file.metadata.get(key, "").strip()):
            continue
        try:
            value: Any = json.loads(text)
        except ValueError:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = text.splitlines() if "\n" in text else text.split(",")
        if isinstance(value, dict):
            value = [value[k] for k in sorted(value, key=lambda k: int(k) if str(k).isdigit() else 0)]
        if isinstance(value, list) and value and all(isinstance(n, str | int) for n in value):
            return [str(n).strip() for n in value]
    beside = _beside(file, "config.json")
    return (id2label_names(read_json(beside).get("id2label")) or []) if beside.is_file() else []


def _beside(file: OnnxFile, name: str) -> Path:
    """A file beside the model's, or above a folder called onnx, as hubs lay them out."""
    folder = file.path.parent
    return (folder.parent if folder.name == "onnx" and not (folder / name).is_file() else folder) / name
