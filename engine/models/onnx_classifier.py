"""An ONNX classifier as one that can be differentiated, where it is shown to be the same function as the file.

The oracle is ONNX Runtime: its scores on seeded and on the user's images, and finite differences of them for the
gradient. What cannot be shown is refused with its reasons (`NoGradient`); such a file can be asked, as a black box.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from counterlens.export.check import free_memory

from ..errors import UsageError
from .image_classifiers import OUTPUTS, ImageClassifier, Logits, Output, finish, like
from .norms import PlainNorms
from .onnx_file import GREY, OnnxFile, Picture, open_session, read_onnx
from .onnx_graph import OnnxGraph
from .onnx_meaning import Said, as_scores, meaning_of, preprocessing_of
from .onnx_operators import NoGradient, Unfit
from .processors import keep_processor
from .protocols import Classifier

IMAGES = 4  # seeded ones, compared with ONNX Runtime
REAL = 8  # of the user's own, at most
DIRECTIONS = 3  # of finite differences: along the gradient, and two random ones
STEPS = (3e-3, 1e-2, 3e-2)  # of [0, 1], for each pixel
SAME = {False: 1e-3, True: 5e-2}  # of scores, relative to the largest; half precision or not
SLOPE = 5e-2  # of slopes, relative to the gradient
TINY = 1e-30  # least probability whose log is taken
ROUNDING = 1e-5  # of scores in float32, relative to the largest


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
        out = out.reshape(len(pixels), -1)
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
    said: Said | None = None,
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
        said: what the scores are, where somebody says it: probabilities, logits or independent (no sum of 1).
        preprocessing: resize, crop, mean, std, interpolation, see `image_classifiers.wrap_classifier`.
        images: [B, 3, H, W] in [0, 1], of which the first few are compared on, beside seeded ones like photographs.

    Raises:
        NoGradient: it cannot be differentiated, or what was made of it is not the same function; with every reason.
        UsageError: an option does not fit. CounterlensError: the file is corrupt, or a package is missing.
    """
    if output is not None and output not in OUTPUTS:
        raise UsageError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
    file = read_onnx(path, output=scores, labels=len(labels) if labels else None)
    if file.answer != "scores":
        what = "maps of labels to scores (zipmap)" if file.answer == "maps" else "labels alone"
        raise NoGradient(file.path, [f"it answers with {what}, which have no gradient"])
    if file.picture.dtype == "uint8":
        raise NoGradient(file.path, ["it takes 8-bit pixels, and rounding to them has no gradient"])
    graph = OnnxGraph(file).eval()
    made, process, assumed = preprocessing_of(file, image_size, preprocessing)
    _check_size(file, graph, made.size)
    session = open_session(file, torch.get_num_threads())

    @torch.no_grad()
    def run(pictures: Tensor) -> Tensor:
        return torch.from_numpy(as_scores(file, session(made(pictures).numpy())))

    seeded = natural_images(image_size, IMAGES)
    real = seeded[:0] if images is None else images[:REAL].cpu().float()
    theirs, answers = run(seeded), run(real) if len(real) else seeded.new_zeros(0, 1)
    if not theirs.isfinite().all():
        raise UsageError(f"classifier: {file.path}: it gives NaN or infinite scores for an ordinary image")
    meaning = meaning_of(file, graph.ending, theirs.numpy(), labels, output=output, said=said)
    link, log = meaning.link, bool(meaning.probabilities) and not graph.ending
    if log and link != "softmax":
        raise NoGradient(file.path, ["it gives probabilities that it computes in a way of its own, of no softmax"])
    assumed += [meaning.assumed] if meaning.assumed else []
    if graph.halved:
        assumed.append("its half-precision weights are computed in float32")
    if log:
        graph.ending = "softmax"
    module = _same_batch(file, graph, made(seeded), theirs, assumed, log)
    whole, many = nn.Sequential(made, module), theirs.shape[1]
    forward = _compare(file, graph, whole, seeded, theirs)
    slope = _compare_slopes(file, graph, whole, run, seeded[:1], many)
    known = answers.isfinite().all(1)  # of other images their own results tell
    real, answers = real[known], answers[known]
    if len(real):
        found = _compare_on_real(file, graph, whole, run, real, answers)
        forward, slope = max(forward, found[0]), max(slope, found[1])
    if slope > SLOPE:
        assumed.append("its scores are too rough for finite differences in float32; they are compared, slopes are not")
    try:
        classifier = finish(Logits(made, module, link), meaning.labels, image_size, link)
    except UsageError as error:
        raise NoGradient(file.path, [str(error).removeprefix("classifier: ")]) from error
    if process is not None:
        keep_processor(classifier, process)
    _CONVERSIONS[classifier.module] = Conversion(
        str(file.path), forward, slope, len(seeded) + len(real), dict(graph.kinds), tuple(assumed)
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


def _check_size(file: OnnxFile, graph: OnnxGraph, size: tuple[int, int]) -> None:
    """Run the graph without values: nothing is too large, and there are scores of each image."""
    picture = file.picture
    one = (picture.channels, *size)
    shape = (picture.batch or 1, *((*one[1:], one[0]) if picture.last else one))
    try:
        out, taken = graph.rehearse(shape, torch.float64 if picture.dtype == "float64" else torch.float32)
    except Unfit as error:
        raise NoGradient(file.path, [str(error)]) from error
    if taken > (free := free_memory(torch.device("cpu"))):
        raise NoGradient(file.path, [f"a gradient takes {taken / 1e9:.1f} GB an image, {free / 1e9:.1f} GB are free"])
    if not out or out[0] != shape[0] or max(out[2:], default=1) != 1:
        raise UsageError(f"classifier: {file.path}: output {file.output!r} is {list(out)}, expected [B, labels]")


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


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


@torch.no_grad()
def _compare(
    file: OnnxFile, graph: OnnxGraph, module: nn.Module, images: Tensor, theirs: Tensor, where: str = ""
) -> float:
    try:
        ours = _ended(graph, module(images))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NoGradient(file.path, [f"what was made of it fails: {' '.join(str(error).split())[:160]}"]) from error
    if ours.shape != theirs.shape:
        raise NoGradient(file.path, [f"it gives {list(theirs.shape)}, what was made of it {list(ours.shape)}"])
    apart = _apart(ours, theirs)
    if not apart <= SAME[graph.halved]:  # NaN is different
        said = f"what was made of it differs from ONNX Runtime by {apart:.1%} of its scores{where}"
        raise NoGradient(file.path, [said])
    return apart


def _compare_on_real(
    file: OnnxFile,
    graph: OnnxGraph,
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    images: Tensor,  # [N, 3, H, W]
    theirs: Tensor,  # [N, labels]
) -> tuple[float, float]:
    """How far scores and slopes are off on images of the user's; raises as `_compare` and `_compare_slopes` do."""
    where, many = " on your images", theirs.shape[1]
    parts = zip(images.split(IMAGES), theirs.split(IMAGES), strict=True)
    forward = max(_compare(file, graph, module, part, answers, where) for part, answers in parts)
    for image in images.split(1):
        if not _gradient(graph, module, image, torch.ones(many)).isfinite().all():
            raise NoGradient(file.path, [f"its gradient is NaN or infinite{where}"])
    # Steps stay within what images can be, and off the places where black meets a clip or a ReLU.
    return forward, _compare_slopes(file, graph, module, run, 0.2 + 0.6 * images[:1], many, where)


def _gradient(graph: OnnxGraph, module: nn.Module, image: Tensor, weights: Tensor) -> Tensor:
    """Of a weighted sum of the file's own scores."""
    leaf = image.clone().requires_grad_()
    with PlainNorms(), torch.enable_grad():
        return torch.autograd.grad((_ended(graph, module(leaf)) @ weights).sum(), leaf)[0]


def _compare_slopes(
    file: OnnxFile,
    graph: OnnxGraph,
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    image: Tensor,  # [1, 3, H, W] in [0, 1]
    many: int,
    where: str = "",
) -> float:
    """How far slopes along a few directions are from finite differences of ONNX Runtime's scores, relative.

    Args:
        many: scores. where: of an image of the user's, at which it may be flat.

    Raises:
        NoGradient: two steps see one slope, and it is another than the gradient's.
    """
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(many, generator=g)
    gradient = _gradient(graph, module, image, weights)
    if not gradient.isfinite().all():
        raise NoGradient(file.path, ["its gradient is NaN or infinite for an ordinary image"])
    size = gradient.norm().item()
    if size == 0 and not where:
        raise NoGradient(file.path, ["its gradient is zero for an ordinary image"])
    directions = torch.randn((DIRECTIONS - 1, *image.shape[1:]), generator=g)
    if size > 0:
        directions = torch.cat([gradient / gradient.square().mean().sqrt(), directions])
    said = (gradient * directions).sum(dim=(1, 2, 3)).double()
    slopes, noise = [], []
    for step in STEPS:
        out = run(torch.cat([image + step * directions, image - step * directions])).double()
        up, down = (out @ weights.double()).chunk(2)
        slopes.append((up - down) / (2 * step))
        noise.append(ROUNDING * out.abs().max().item() / step * (50 if graph.halved else 1))
    best = 0.0
    for i, slope in enumerate(torch.stack(slopes, dim=1)):  # of one direction, at every step
        scale = max(said[i].abs().item(), size, TINY)
        off = (slope - said[i]).abs() / scale
        if not (off <= SLOPE + torch.tensor(noise) / scale).any():
            for one, other in pairwise(slope):
                if (one - other).abs() <= SLOPE * one.abs() and one.abs() > 3 * max(noise):
                    along = f"its gradient is {said[i]:.3g} along one direction{where}"
                    raise NoGradient(file.path, [f"{along}, where ONNX Runtime's scores say {other:.3g}"])
        best = max(best, off.min().item() if size > 0 else 0.0)
    return best
