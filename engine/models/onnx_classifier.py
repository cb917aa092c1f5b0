"""An ONNX classifier as one that can be differentiated, where it is shown to be the same function as the file.

The oracle is ONNX Runtime: its scores on real images, and finite differences of them for the gradient. What cannot be
shown is refused with its reasons (`NoGradient`); such a file can still be asked for answers, as a black box.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from counterlens.export.check import free_memory

from ..errors import CounterlensError, UsageError
from .files import id2label_names, read_json
from .image_classifiers import OUTPUTS, ImageClassifier, Logits, Output, finish, like, recipe
from .norms import PlainNorms
from .onnx_file import GREY, OnnxFile, Picture, open_session, read_onnx
from .onnx_graph import OnnxGraph
from .onnx_operators import NoGradient, Unfit
from .preprocessing import Preprocessing, from_processor, pixels_of
from .processors import keep_processor
from .protocols import Classifier
from .text import import_transformers

IMAGES = 4  # compared with ONNX Runtime
DIRECTIONS = 3  # of finite differences: along the gradient, and two random ones
STEPS = (3e-3, 1e-2, 3e-2)  # of [0, 1], for each pixel
SAME = {False: 1e-3, True: 5e-2}  # of scores, relative to the largest; half precision or not
SLOPE = 5e-2  # of slopes, relative to the gradient
TINY = 1e-30  # least probability whose log is taken
ROUNDING = 1e-5  # of scores in float32, relative to the largest
NAMES = ("labels", "names", "classes", "class_names", "categories", "id2label")  # keys of labels in a file's metadata


@dataclass(frozen=True)
class Conversion:
    """How a file was converted and what was found.

    Attributes:
        path: of the file. forward: largest difference of scores from ONNX Runtime's, relative to the largest score.
        gradient: largest difference of slopes from finite differences of ONNX Runtime's scores, relative to the
            gradient. images: that were compared. operators: how often each. assumed: what the file does not say.
    """

    path: str
    forward: float
    gradient: float
    images: int
    operators: dict[str, int]
    assumed: tuple[str, ...]


# Not attributes of the classifiers, whose attributes decide what is compiled.
_CONVERSIONS: WeakKeyDictionary[nn.Module, Conversion] = WeakKeyDictionary()


def conversion_of(classifier: Classifier) -> Conversion | None:
    """What is known of a classifier that was opened from an ONNX file; None for others."""
    return _CONVERSIONS.get(classifier.module)


class Converted(nn.Module):
    """A graph behind the layout of its input: preprocessed pixels [B, 3, h, w] to logits [B, labels].

    A graph of a fixed batch runs at any: as it is where nothing in it holds the batch, else mapped over the images. Of
    probabilities that it computes in a way of its own, `log` takes the logarithm.
    """

    grey: Tensor

    def __init__(self, graph: OnnxGraph, picture: Picture, batch: int | None, log: bool = False) -> None:
        super().__init__()
        self.graph, self.batch, self.log = graph, batch, log
        self.channels, self.last = picture.channels, picture.last
        self.register_buffer("grey", torch.tensor(GREY).reshape(1, 3, 1, 1), persistent=False)

    def forward(
        self,
        pixels: Tensor,  # [B, 3, h, w]
    ) -> Tensor:
        if self.channels == 1:
            pixels = (pixels * self.grey.to(pixels.dtype)).sum(dim=1, keepdim=True)
        if self.last:
            pixels = pixels.permute(0, 2, 3, 1)
        pixels = like(pixels, self.graph)
        out: Tensor = self.graph(pixels) if self.batch is None else torch.vmap(self._one)(pixels)
        out = out.flatten(1)
        return out.clamp_min(TINY).log() if self.log else out  # [B, labels]

    def _one(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.graph(pixels.expand(self.batch or 1, *pixels.shape))
        return out[0]


def open_onnx_classifier(
    path: str | Path,
    *,
    image_size: int,
    labels: Sequence[str] | None = None,
    output: Output | None = None,
    scores: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
) -> ImageClassifier:
    """Open an ONNX classifier as a differentiable one, held to ONNX Runtime.

    A softmax or sigmoid at its end is left out: its input is the logits. Labels come from the file's metadata or the
    `config.json` beside it, preprocessing from the `preprocessor_config.json` beside it. `conversion_of` says what was
    assumed and measured.

    Args:
        path: of the file.
        image_size: side of the images that the diffusion model makes.
        labels: names of its scores; two for one score, that of the negative first.
        output: `softmax`, `sigmoid` or `binary`; without it, what the graph ends in, else softmax.
        scores: name of the output that holds the scores, where there are several.
        preprocessing: resize, crop, mean, std, interpolation, see `image_classifiers.wrap_classifier`.
        images: [B, 3, H, W] in [0, 1] to compare on; a few are enough. Without them, seeded ones like photographs.

    Raises:
        NoGradient: it cannot be differentiated, or what was made of it is not the same function; with every reason.
        UsageError: an option does not fit. CounterlensError: the file is corrupt, or a package is missing.
    """
    if output is not None and output not in OUTPUTS:
        raise UsageError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
    file = read_onnx(path, output=scores)
    if file.picture.dtype == "uint8":
        raise NoGradient(file.path, ["it takes 8-bit pixels, and rounding to them has no gradient"])
    graph = OnnxGraph(file).eval()
    made, process, assumed = _preprocessing(file, image_size, preprocessing)
    many = _count(file, graph, made.size)
    names, link = _meaning(file, graph.ending, many, labels, output, assumed)
    if graph.halved:
        assumed.append("its half-precision weights are computed in float32")
    pictures = (natural_images(image_size, IMAGES) if images is None else images[:IMAGES].cpu()).float()
    run = open_session(file, torch.get_num_threads())
    with torch.no_grad():
        pixels = made(pictures)
    theirs = torch.from_numpy(run(pixels.numpy())).flatten(1)
    log = not graph.ending and link == "softmax" and output is None and _are_probabilities(theirs)
    if log:
        graph.ending = "softmax"
        assumed[-1] = "its scores sum to 1: they are taken for probabilities"
    module = _same_batch(file, graph, pixels, theirs, assumed, log)
    forward = _compare(file, graph, module, pixels, theirs)
    slope = _compare_slopes(file, graph, nn.Sequential(made, module), lambda x: run(made(x).numpy()), pictures[:1])
    if slope > SLOPE:
        assumed.append("its scores are too rough for finite differences in float32; they are compared, slopes are not")
    try:
        classifier = finish(Logits(made, module, link), names, image_size, link)
    except UsageError as error:
        raise NoGradient(file.path, [str(error).removeprefix("classifier: ")]) from error
    if process is not None:
        keep_processor(classifier, process)
    _CONVERSIONS[classifier.module] = Conversion(
        str(file.path), forward, slope, len(pictures), dict(graph.kinds), tuple(assumed)
    )
    return classifier


def natural_images(size: int, count: int) -> Tensor:
    """Seeded images with the statistics of photographs: [count, 3, size, size] in [0, 1]; amplitudes fall as 1/f."""
    g = torch.Generator().manual_seed(0)
    down, across = torch.meshgrid(torch.fft.fftfreq(size), torch.fft.fftfreq(size), indexing="ij")
    falling = 1 / (down.square() + across.square()).sqrt().clamp_min(1 / size)
    noise = torch.randn((count, 4, size, size), generator=g)
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * falling).real
    smooth = smooth / smooth.std(dim=(2, 3), keepdim=True)
    # Channels share most of their light.
    return (0.45 + 0.2 * (0.9 * smooth[:, :1] + 0.4 * smooth[:, 1:])).clamp(0, 1)


def _preprocessing(
    file: OnnxFile, image_size: int, given: Mapping[str, Any] | None
) -> tuple[Preprocessing, Callable[[Any], Tensor] | None, list[str]]:
    """What stands between an image and the file, its function of a picture where it has one, and what was assumed."""
    beside = _beside(file, "preprocessor_config.json")
    size = file.picture.size
    process: Callable[[Any], Tensor] | None = None
    assumed: list[str] = []
    if given is not None:
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
    else:
        made = recipe(image_size, resize=size)
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


def _beside(file: OnnxFile, name: str) -> Path:
    """A file beside the model's, or above a folder called onnx, as hubs lay them out."""
    folder = file.path.parent
    return (folder.parent if folder.name == "onnx" and not (folder / name).is_file() else folder) / name


def _count(file: OnnxFile, graph: OnnxGraph, size: tuple[int, int]) -> int:
    """How many scores each image has; the graph is run without values, so that nothing is too large."""
    picture = file.picture
    one = (picture.channels, *size)
    shape = (picture.batch or 1, *((*one[1:], one[0]) if picture.last else one))
    try:
        out, taken = graph.rehearse(shape, torch.float64 if picture.dtype == "float64" else torch.float32)
    except Unfit as error:
        raise NoGradient(file.path, [str(error)]) from error
    if taken > (free := free_memory(torch.device("cpu"))):
        raise NoGradient(file.path, [f"a gradient takes {taken / 1e9:.1f} GB an image, {free / 1e9:.1f} GB are free"])
    if len(out) < 2 or out[0] != shape[0] or max(out[2:], default=1) != 1:
        raise UsageError(f"classifier: {file.path}: output {file.output!r} is {list(out)}, expected [B, labels]")
    return out[1]


def _meaning(
    file: OnnxFile, ending: str, many: int, labels: Sequence[str] | None, output: Output | None, assumed: list[str]
) -> tuple[list[str], Output]:
    """Labels, and how scores become probabilities.

    Raises:
        UsageError: there are no labels, too few or too many, or the graph ends in something else than was said.
    """
    names = list(labels) if labels else _own_labels(file)
    found: Output = "sigmoid" if ending == "sigmoid" else "softmax"
    link: Output = output or ("binary" if many == 1 else found)
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
        assumed.append(f"it ends in a {ending}: what goes into that are the logits")
    elif output is None:
        assumed.append(f"its scores are logits, of a {'sigmoid' if link == 'binary' else link}")
    return names, link


def _own_labels(file: OnnxFile) -> list[str]:
    """Labels in the file's metadata, or in the config.json beside it."""
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


@torch.no_grad()
def _same_batch(
    file: OnnxFile, graph: OnnxGraph, pixels: Tensor, theirs: Tensor, assumed: list[str], log: bool
) -> Converted:
    """The graph at any batch: as it is where every image then has the scores that it has in the file's own batch."""
    fixed = file.picture.batch
    module = Converted(graph, file.picture, None, log).eval()
    if fixed is None:
        return module
    try:
        for batch in (1, len(pixels)):
            ours = _ended(graph, module(pixels[:batch]))
            if ours.shape != theirs[:batch].shape or _apart(ours, theirs[:batch]) > SAME[graph.halved]:
                break
        else:
            return module
    except (RuntimeError, ValueError, IndexError):
        pass  # sizes in it hold the batch
    assumed.append(f"it is made for batches of {fixed} alone: every image goes through it on its own")
    return Converted(graph, file.picture, fixed, log).eval()


def _ended(graph: OnnxGraph, logits: Tensor) -> Tensor:
    """Logits as the file's own scores."""
    if graph.ending == "softmax":
        return torch.softmax(logits, dim=1)
    return torch.sigmoid(logits) if graph.ending == "sigmoid" else logits


def _are_probabilities(scores: Tensor) -> bool:
    return scores.shape[1] > 1 and bool((scores >= 0).all() and ((scores.sum(dim=1) - 1).abs() < 1e-3).all())


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


@torch.no_grad()
def _compare(file: OnnxFile, graph: OnnxGraph, module: Converted, pixels: Tensor, theirs: Tensor) -> float:
    try:
        ours = _ended(graph, module(pixels))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NoGradient(file.path, [f"what was made of it fails: {' '.join(str(error).split())[:160]}"]) from error
    if ours.shape != theirs.shape:
        raise NoGradient(file.path, [f"it gives {list(theirs.shape)}, what was made of it {list(ours.shape)}"])
    if not theirs.isfinite().all():
        raise UsageError(f"classifier: {file.path}: it gives NaN or infinite scores for an ordinary image")
    apart = _apart(ours, theirs)
    if not apart <= SAME[graph.halved]:  # NaN is different
        raise NoGradient(file.path, [f"what was made of it differs from ONNX Runtime by {apart:.1%} of its scores"])
    return apart


def _compare_slopes(
    file: OnnxFile,
    graph: OnnxGraph,
    module: nn.Module,
    run: Callable[[Tensor], np.ndarray],
    image: Tensor,  # [1, 3, H, W] in [0, 1]
) -> float:
    """How far slopes along a few directions are from finite differences of ONNX Runtime's scores, relative.

    Raises:
        NoGradient: two steps see one slope, and it is another than the gradient's.
    """
    g = torch.Generator().manual_seed(1)
    leaf = image.clone().requires_grad_()
    with PlainNorms(), torch.enable_grad():
        scores = _ended(graph, module(leaf))
        weights = torch.randn(scores.shape[1], generator=g)
        gradient = torch.autograd.grad((scores @ weights).sum(), leaf)[0]
    if not gradient.isfinite().all():
        raise NoGradient(file.path, ["its gradient is NaN or infinite for an ordinary image"])
    size = gradient.norm().item()
    if size == 0:
        raise NoGradient(file.path, ["its gradient is zero for an ordinary image"])
    random = torch.randn((DIRECTIONS - 1, *image.shape[1:]), generator=g)
    directions = torch.cat([gradient / gradient.square().mean().sqrt(), random])
    said = (gradient * directions).sum(dim=(1, 2, 3)).double()
    slopes, noise = [], []
    for step in STEPS:
        out = torch.from_numpy(run(torch.cat([image + step * directions, image - step * directions]))).flatten(1)
        up, down = (out.double() @ weights.double()).chunk(2)
        slopes.append((up - down) / (2 * step))
        noise.append(ROUNDING * out.abs().max().item() / step * (50 if graph.halved else 1))
    best = 0.0
    for i, slope in enumerate(torch.stack(slopes, dim=1)):  # of one direction, at every step
        scale = max(said[i].abs().item(), size)
        off = (slope - said[i]).abs() / scale
        if (off <= SLOPE + torch.tensor(noise) / scale).any():
            best = max(best, off.min().item())
            continue
        for one, other in pairwise(slope):
            if (one - other).abs() <= SLOPE * one.abs() and one.abs() > 3 * max(noise):
                raise NoGradient(
                    file.path,
                    [f"its gradient is {said[i]:.3g} along one direction, where ONNX Runtime's scores say {other:.3g}"],
                )
        best = max(best, off.min().item())
    return best
