"""What the methods of `table` do: LAX, gradients and ablations through captum, Grad-CAM and RISE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blackbox.box import as_box, no_gradient
from ..errors import CounterlensError, NotFinite, UsageError, install_hint
from ..metrics.inputs import Baseline, check_computed, make_baseline
from ..metrics.quantities import LogOdds, Quantity, check_labels, make_quantity, undefined
from ..models.freezing import frozen
from ..models.protocols import Classifier
from .lax import LAX
from .table import METHODS, check_methods
from .taps import Tap, choose_layer, tapped_edges

IG_STEPS = 32
NOISE = (16, 0.1)  # SmoothGrad: noisy copies, deviation of the noise for images in [0, 1]
CELLS = 8  # occlusion and ablation: an image is this many windows high and wide
RISE = (400, 8, 0.5)  # masks, cells of a mask, share of cells that are shown


@dataclass(frozen=True)
class Question:
    """What a method is asked about a batch.

    Attributes:
        classifier: see `engine.models.protocols.Classifier`.
        quantity: gradients are of its log-odds, RISE averages its probability.
        target: [B] labels to explain.
        hidden: [B, 3, H, W], what hides pixels.
        seed: of noise and masks; they are the same for every image.
        layer: of Grad-CAM, a tap (see `taps`).
        adapter: of LAX.
    """

    classifier: Classifier
    quantity: Quantity
    target: Tensor
    hidden: Tensor
    seed: int
    layer: str | None
    adapter: LAX | None

    def log_odds(self, images: Tensor, target: Tensor) -> Tensor:
        """The explained log-odds [B]; what captum differentiates and ablates."""
        return self.quantity.log_odds(self.classifier.logits(images), target)


def _captum() -> ModuleType:
    try:
        import captum.attr
    except ImportError as error:
        raise CounterlensError(
            f"captum cannot be imported ({error}); gradient and ablation methods need it: "
            f"{install_hint('explain')}; lax, gradcam and rise do without"
        ) from error
    return captum.attr


def gradient_x_input(q: Question, x: Tensor) -> Tensor:
    """The gradient of the explained log-odds times the input, summed over channels."""
    return _captum().InputXGradient(q.log_odds).attribute(x.requires_grad_(), additional_forward_args=q.target).sum(1)


def integrated_gradients(q: Question, x: Tensor) -> Tensor:
    """Gradients averaged from what hides pixels to the image, times that difference."""
    method = _captum().IntegratedGradients(q.log_odds)
    return (
        method.attribute(
            x,
            baselines=q.hidden,
            additional_forward_args=q.target,
            n_steps=IG_STEPS,
            internal_batch_size=max(64, len(x)),
        )
        .sum(1)
        .to(x.dtype)
    )


def smoothgrad(q: Question, x: Tensor) -> Tensor:
    """Mean absolute gradient of noisy copies, the largest over channels."""
    copies, deviation = NOISE
    # captum's NoiseTunnel draws for the whole batch at once: an image's map would depend on its place.
    noise = torch.randn((copies, *x.shape[1:]), generator=torch.Generator().manual_seed(q.seed)).to(x)
    method = _captum().Saliency(q.log_odds)
    total = torch.zeros_like(x)
    for one in noise:
        total += method.attribute((x + deviation * one).requires_grad_(), additional_forward_args=q.target)
    return total.amax(1) / copies


def grad_cam(q: Question, x: Tensor) -> Tensor:
    """A layer's maps, weighted by their mean gradients; what speaks against the target is cut."""
    tap = Tap.parse(q.layer or choose_layer(q.classifier, x[:1]))
    with tapped_edges(q.classifier.module, [tap]) as held, torch.enable_grad():
        odds = q.log_odds(x.detach().requires_grad_(), q.target)
        if tap not in held:
            raise UsageError(f"layer: {str(tap)!r} carries no gradient; Grad-CAM has nothing to show")
        features, edge = held[tap]
        (gradient,) = torch.autograd.grad(odds.sum(), [edge], allow_unused=True)
    if gradient is None:  # the answer does not go through it
        return torch.zeros_like(x[:, 0])
    weights = tap.read(gradient).mean((2, 3), keepdim=True)
    cam = (weights * tap.read(features)).sum(1, keepdim=True)
    cam = F.relu(torch.where(cam.isfinite(), cam, torch.nan))  # minus infinity is no evidence of nothing
    return F.interpolate(cam, size=x.shape[2:], mode="bilinear")[:, 0].to(x.dtype)


def occlusion(q: Question, x: Tensor) -> Tensor:
    """What a window that is hidden takes from the log-odds; windows overlap by half."""
    h, w = (max(1, s // CELLS) for s in x.shape[2:])
    return _captum().Occlusion(q.log_odds).attribute(
        x, (3, h, w), strides=(3, max(1, h // 2), max(1, w // 2)), baselines=q.hidden,
        additional_forward_args=q.target,
    ).mean(1)  # fmt: skip


def feature_ablation(q: Question, x: Tensor) -> Tensor:
    """What a cell that is hidden takes from the log-odds."""
    h, w = x.shape[2:]
    rows, columns = torch.arange(h) * min(CELLS, h) // h, torch.arange(w) * min(CELLS, w) // w
    cells = (rows[:, None] * min(CELLS, w) + columns[None, :])[None, None].to(x.device)
    return _captum().FeatureAblation(q.log_odds).attribute(
        x, baselines=q.hidden, feature_mask=cells, additional_forward_args=q.target
    ).mean(1)  # fmt: skip


@torch.no_grad()
def rise(q: Question, images: Tensor) -> Tensor:
    """RISE: random coarse masks, averaged with the probability that the classifier gives to what they show.

    Source: Petsiuk et al., arXiv 1806.07421; pixels are hidden by the baseline colour and not by black.
    """
    count, cells, share = RISE
    b, _, h, w = images.shape
    g = torch.Generator().manual_seed(q.seed)
    grid = (torch.rand((count, 1, cells, cells), generator=g) < share).float()
    # One cell more on each side leaves room for a shift within a cell.
    step_h, step_w = -(-h // cells), -(-w // cells)
    large = F.interpolate(grid, size=((cells + 1) * step_h, (cells + 1) * step_w), mode="bilinear", align_corners=False)
    tops = torch.randint(step_h, (count,), generator=g).tolist()
    lefts = torch.randint(step_w, (count,), generator=g).tolist()
    masks = torch.stack([m[:, t : t + h, c : c + w] for m, t, c in zip(large, tops, lefts, strict=True)]).to(images)
    # In float64: how many masks share a pass depends on the batch, and an image's map must not.
    total = torch.zeros((b, h, w), dtype=torch.float64, device=images.device)
    per_pass = max(1, 256 // max(1, b))
    hidden = q.hidden[:, None]
    for part in masks.split(per_pass):
        shown = part[None] * images[:, None] + (1 - part[None]) * hidden  # [B, k, 3, H, W]
        logits = q.classifier.logits(shown.flatten(0, 1))
        p = q.quantity(logits, q.target.repeat_interleave(len(part))).reshape(b, -1)
        total += torch.einsum("bk,khw->bhw", p.double(), part[:, 0].double())
    return (total / masks.double().sum(0).clamp(min=1e-6)).to(images)


def lax(q: Question, x: Tensor) -> Tensor:
    """Of a trained adapter, its scores."""
    if q.adapter is None:
        raise UsageError("adapter: method lax needs a trained one (counterlens adapter train)")
    return q.adapter.explain(x, q.target).scores


def minmax(maps: Tensor) -> Tensor:
    """Each map [B, H, W] brought to [0, 1]; a constant one to 0."""
    low, high = maps.flatten(1).amin(1)[:, None, None], maps.flatten(1).amax(1)[:, None, None]
    return torch.where(high == low, 0, (maps - low) / torch.where(high == low, 1, high - low))  # NaN stays NaN


def check_callable(classifier: Classifier, names: Sequence[str]) -> None:
    """Refuse methods that differentiate a classifier, or see inside it, where that can only be called.

    Raises:
        UsageError: names the method, and those that would do.
    """
    box = as_box(classifier)
    inside = [n for n in names if METHODS[n].inside]
    if box is not None and inside:
        others = ", ".join(n for n, m in METHODS.items() if not m.inside)
        raise UsageError(f"method: {inside[0]} is not for a black box: {no_gradient(box.name)}; {others} need none")


@torch.no_grad()
def predicted(
    classifier: Classifier,
    images: Tensor,  # [B, 3, H, W]
    first: int = 0,
) -> Tensor:
    """The classifier's labels [B].

    Raises:
        NotFinite: a logit is NaN or endless; images are counted from `first`.
    """
    with frozen(classifier.module):
        logits = classifier.logits(images)
    bad = undefined(logits).nonzero().flatten()
    if len(bad):
        raise NotFinite("classifier", (first + bad).tolist())
    return logits.argmax(1)


def explain_with(
    name: str,
    classifier: Classifier,
    images: Tensor,  # [B, 3, H, W] in [0, 1]
    target: int | Sequence[int] | Tensor | None = None,
    *,
    quantity: str | LogOdds | Quantity = "class",
    baseline: Baseline = "blur",
    adapter: LAX | None = None,
    layer: str | None = None,
    seed: int = 0,
    batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """Saliency of images by one method: (saliency [B, H, W] in [0, 1], scores [B, H, W] as the method gives them).

    Values are compared by `saliency`, ranks by `scores`, which for LAX are its logits: a saturated map has only ties.

    Args:
        name: in `table.METHODS`.
        classifier: see `engine.models.protocols.Classifier`; left as it was.
        images: [B, 3, H, W] in [0, 1].
        target: labels to explain; the predictions without it.
        quantity: see `make_quantity`. LAX explains the one that it was trained on.
        baseline: what hides pixels, see `engine.metrics.inputs.make_baseline`.
        adapter: for `lax`.
        layer: for `gradcam`, a tap (see `taps`); the last maps through which the answer goes without it.
        seed: of noise and masks.
        batch: images at once.

    Raises:
        UsageError: an argument does not fit. CounterlensError: captum is missing. NotFinite: the classifier or the
            method gives NaN or infinity, such as the gradient of a square root at 0; `samples` says for which images.
    """
    check_methods([name])
    check_callable(classifier, [name])
    method, explained = METHODS[name], make_quantity(classifier, quantity)
    if method.adapter and adapter is not None and adapter.quantity.name != explained.name:
        raise UsageError(f"quantity: the adapter explains {adapter.quantity.name!r}, not {explained.name!r}")
    everyone = None
    if target is not None:
        everyone = check_labels(target, len(images), len(classifier.labels), images.device)
    filled = make_baseline(baseline, images, [seed] * len(images))
    filled = torch.full((1,), filled).to(images) if not isinstance(filled, Tensor) else filled
    hidden = (filled if filled.ndim == 4 else filled.reshape(1, -1, 1, 1)).expand_as(images)
    run, scores = method.load(), []
    if method.layer and len(images):
        layer = choose_layer(classifier, images[:1], layer)
    with frozen(classifier.module):
        for start in range(0, len(images), batch):
            x = images[start : start + batch].detach().clone()
            wanted = predicted(classifier, x, start) if everyone is None else everyone[start : start + batch]
            question = Question(classifier, explained, wanted, hidden[start : start + batch], seed, layer, adapter)
            scores.append(run(question, x).detach())
    joined = torch.cat(scores) if scores else images.new_zeros((0, *images.shape[2:]))
    check_computed(name, joined)
    return (torch.sigmoid(joined) if method.logits else minmax(joined)), joined
