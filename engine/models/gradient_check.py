"""A classifier's gradient, held to the classifier itself once, when it is opened: eager is no oracle at one shape.

Three things have to agree: an image's logits and gradient alone, the same beside other images, and finite differences
of the logits, in float64 where the module runs in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from counterlens.export.state import State

from ..errors import UsageError
from .freezing import frozen
from .protocols import Classifier, SigmoidClassifier, SoftmaxClassifier

DIRECTIONS = 2
# Steps of finite differences, from the one that says most to the one that survives the most rounding. ReLUs and
# max-pools are as good as smooth at the first.
STEPS = {torch.float64: (1e-5, 1e-4, 1e-3, 1e-2), torch.float32: (3e-3, 1e-2, 3e-2)}
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5}  # of a forward pass, relative to its logits
# What alone and beside others, and gradient and finite differences, may differ by, by the weights' precision.
ALONE = {torch.float64: 1e-3, torch.float32: 2e-2, torch.float16: 0.3, torch.bfloat16: 0.5}
ALIKE = {torch.float64: 2e-2, torch.float32: 5e-2, torch.float16: 0.3, torch.bfloat16: 0.5}
SAME_SLOPE = 0.05  # two steps see one slope: it is the derivative
_CHECKED: WeakSet[nn.Module] = WeakSet()


def check_gradient(
    classifier: Classifier, image_size: int, *, suspects: Sequence[str] = (), rounds: bool = False
) -> None:
    """Compare a classifier's gradient for one image with that beside others and with finite differences.

    Finite differences say nothing about a classifier that rounds (8-bit pixels, quantised layers): its gradient is
    straight-through by choice. Nor where no two steps see the same slope, or only a flat one.

    Args:
        classifier: see `models.protocols`.
        image_size: side in pixels.
        suspects: operations that cut the gradient somewhere, for the message.
        rounds: it rounds on the way.

    Raises:
        UsageError: it is random, an image's logits depend on its neighbours, or its gradient is not that of its logits.
    """
    if classifier.module in _CHECKED:
        return
    parameter = next(classifier.module.parameters(), torch.empty(0))
    precision = parameter.dtype if parameter.dtype in ALIKE else torch.float32
    images = _images(image_size).to(parameter.device, torch.float64 if precision == torch.float64 else torch.float32)
    with frozen(classifier.module), _preserved(classifier):
        weights = torch.randn(len(classifier.labels), generator=torch.Generator().manual_seed(1)).to(images)
        try:
            logits, gradient = _differentiate(classifier.logits, weights, images[:1])
            beside, in_batch = _differentiate(classifier.logits, weights, images[[1, 0, 2]])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"classifier: fails on one image or on three: {str(error).splitlines()[0]}") from error
        scale = max(beside.abs().max().item(), 1e-12)
        if not (logits.isfinite().all() and gradient.isfinite().all()):
            raise UsageError("classifier: it gives NaN or infinite values, or such a gradient, for an ordinary image")
        if (logits[0] - beside[1]).abs().max().item() > ALONE[precision] * scale:
            again, _ = _differentiate(classifier.logits, weights, images[:1])
            if (logits - again).abs().max().item() > ALONE[precision] * scale:
                raise UsageError(
                    "classifier: it is random, two runs on one image differ; is dropout on in eval mode "
                    "(functional.dropout without training=self.training)?"
                )
            raise UsageError(
                "classifier: an image's logits depend on the others in its batch (a norm without running statistics, "
                "or an operation over the batch axis); an explanation would explain its neighbours"
            )
        size = max(gradient.norm().item(), in_batch[1].norm().item())
        off = (gradient[0] - in_batch[1]).norm().item()
        if off > ALIKE[precision] * size + torch.finfo(torch.float32).tiny:
            raise UsageError(
                f"classifier: an image's gradient alone is not its gradient beside others (off by {off / size:.0%}), "
                "so one of them is wrong: an operation has another backward for one image"
            )
        wrong = "" if rounds else _against_differences(classifier, weights, images[:1], gradient[0], ALIKE[precision])
    if wrong:
        cut = f"; the gradient is cut at {suspects[0]}" if suspects else "; a custom autograd.Function may be why"
        raise UsageError(f"classifier: its gradient is not that of its logits ({wrong}){cut}")
    _CHECKED.add(classifier.module)


def _images(size: int) -> Tensor:
    """Three different ones [3, 3, size, size] in [0, 1]: slopes of light with noise, so that no two pixels tie."""
    g = torch.Generator().manual_seed(0)
    across = torch.linspace(0, 1, size)
    slopes = torch.rand((3, 3, 2), generator=g)
    light = slopes[..., :1, None] * across[:, None] + slopes[..., 1:, None] * across  # [3, 3, size, size]
    return 0.15 + 0.3 * light + 0.1 * torch.rand((3, 3, size, size), generator=g)


def _differentiate(logits: Callable[[Tensor], Tensor], weights: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = images.clone().requires_grad_()
        out = logits(leaf)
        return out.detach(), torch.autograd.grad((out @ weights).sum(), leaf)[0]


@torch.no_grad()
def _against_differences(
    classifier: Classifier,
    weights: Tensor,
    image: Tensor,  # [1, 3, H, W]
    gradient: Tensor,  # [3, H, W]
    tolerance: float,
) -> str:
    """How the gradient differs from finite differences along a few directions; empty where it does not."""
    g = torch.Generator().manual_seed(2)
    directions = torch.randn((DIRECTIONS, *gradient.shape), generator=g).to(image)
    said = (gradient.double() * directions).sum(dim=(1, 2, 3))
    size = gradient.double().norm().item()
    doubled = _doubled(classifier)
    runs = [(torch.float64, doubled), (image.dtype, classifier.logits)]
    for dtype, run in runs:
        if run is None:
            continue
        x, d, w = (t.to(dtype) for t in (image, directions, weights))
        before: Tensor | None = None
        try:
            for step in STEPS[dtype]:
                out = run(torch.cat([x + step * d, x - step * d]))
                if out.dtype != dtype:
                    break  # it computes in float32 whatever it is given
                up, down = (out @ w.to(out.dtype)).double().chunk(2)
                slope, noise = (up - down) / (2 * step), ROUNDING[dtype] * out.abs().max().item() / step
                if (slope - said).abs().max().item() <= tolerance * size + noise:
                    return ""
                flat = slope.abs().max().item() <= 3 * noise
                if before is not None and not flat:
                    largest = slope.abs().max().item()
                    if (slope - before).abs().max().item() <= SAME_SLOPE * largest:
                        return f"{said[0].item():.3g} and {slope[0].item():.3g} along one direction"
                before = None if flat else slope
            else:
                return ""
        except (RuntimeError, TypeError, ValueError):  # it does not run in float64
            if run is not doubled:
                raise
    return ""


def _doubled(classifier: Classifier) -> Callable[[Tensor], Tensor] | None:
    """The classifier with its weights in float64, where that can be made without a copy of the module."""
    module = classifier.module
    if not isinstance(classifier, SoftmaxClassifier | SigmoidClassifier) or isinstance(module, torch.jit.ScriptModule):
        return None
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wide = {k: t.detach().double() if t.is_floating_point() else t.detach().clone() for k, t in held.items()}

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, wide, (x,))
        return out

    return run


@contextmanager
def _preserved(classifier: Classifier) -> Iterator[None]:
    """Put back what a forward keeps (counters, caches, which would hold float64) and the random generator."""
    state = State(classifier)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        state.restore()
