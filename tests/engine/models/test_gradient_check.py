"""A classifier whose gradient is not that of its logits is refused when it is opened, and no other is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterlens.engine import Config, Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.models.image_classifiers import wrap_classifier
from counterlens.engine.models.protocols import SoftmaxClassifier

LABELS = [str(i) for i in range(10)]
SIZE = 16


class Small(nn.Module):
    """A convolutional classifier with one thing changed."""

    def __init__(self, inside: Callable[[Tensor], Tensor] | None = None, gain: float = 5.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.norm.running_mean.normal_(std=0.2)
        self.norm.running_var.uniform_(0.5, 2)
        self.last, self.head = nn.Conv2d(16, 16, 3, stride=2), nn.Linear(16, 10)
        self.inside, self.gain = inside or nn.ReLU(), gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(self.norm(self.stem(x)))
        return self.head(F.gelu(self.last(x)).mean((2, 3))) * self.gain


class WrongBackward(torch.autograd.Function):
    """The identity, and a gradient that is not."""

    @staticmethod
    def forward(x: Tensor, how: str) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.how = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.how == "alone":
            return (g.flip(3) if g.shape[0] == 1 else g), None
        wrong = {
            "scaled": g * 1.2,
            "reversed": -g,
            "shifted": g.roll(1, 3),
            "zero": g * 0,
            "clipped": g.clamp(-1e-4, 1e-4),
        }
        return wrong[ctx.how], None


def wrong(how: str) -> Callable[[Tensor], Tensor]:
    return lambda x: WrongBackward.apply(x, how).relu()


def half_detached(x: Tensor) -> Tensor:
    return (x * x.detach().sigmoid()).relu()


REFUSED = {
    "scaled gradient": (
        wrong("scaled"),
        r"is not that of its logits .*cut at clone under torch\.no_grad \(test",
    ),
    "reversed gradient": (wrong("reversed"), "is not that of its logits"),
    "shifted gradient": (wrong("shifted"), "is not that of its logits"),
    "zero gradient": (wrong("zero"), "is not that of its logits"),
    "clipped gradient": (wrong("clipped"), "is not that of its logits"),
    "wrong for one image": (wrong("alone"), r"gradient alone is not its gradient beside others \(off by \d+%\)"),
    "cut in one branch": (half_detached, r"is not that of its logits .*cut at detach \(test_gradient_check\.py"),
    "norm of the batch": (lambda x: x - x.mean(0, keepdim=True), "depend on the others in its batch"),
    "batch norm without statistics": (nn.BatchNorm2d(16, track_running_stats=False), "depend on the others"),
    "softmax over the batch": (lambda x: x * x.mean((2, 3), keepdim=True).softmax(0), "depend on the others"),
    "dropout that is never off": (lambda x: F.dropout(x, 0.5), "it is random.*dropout"),
    "noise": (lambda x: x + torch.randn_like(x), "it is random"),
    "NaN": (lambda x: (x - 1e4).sqrt(), "NaN or infinite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_gradient_is_refused_by_name(name: str) -> None:
    inside, words = REFUSED[name]
    with pytest.raises(UsageError, match=f"^classifier: .*{words}"):
        wrap_classifier(Small(inside).eval(), LABELS, image_size=SIZE)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x * 255) / 255

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Only32(nn.Module):
    """Constants in float32 that no cast reaches, as many models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.kernel = Small(), [torch.full((3, 1, 3, 3), 1 / 9)]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.conv2d(x, self.kernel[0], padding=1, groups=3))


class Keeps(nn.Module):
    """Fills a cache in its first forward, as LeViT and BEiT do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.cache, self.bias = Small(), {}, nn.Parameter(torch.ones(10))
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        return self.inner(x) + self.cache["bias"]


def scripted(*inside: nn.Module) -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 16, 3), *inside, nn.Flatten(), nn.Linear(3136, 10)).eval())


def parametrized(kind: Any) -> nn.Module:
    net = Small()
    kind(net.last)
    return net


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "relu": Small,
    "max-pool": lambda: Small(nn.MaxPool2d(3, 2)),
    "leaky": lambda: Small(nn.LeakyReLU(0.1)),
    "hard swish": lambda: Small(nn.Hardswish()),
    "dropout in eval": lambda: Small(nn.Dropout(0.5)),
    "instance norm": lambda: Small(nn.InstanceNorm2d(16)),
    "sort": lambda: Small(lambda x: x.sort(1).values * x),
    "top k": lambda: Small(lambda x: x * (x >= x.topk(4, 1).values[:, -1:])),
    "8-bit pixels": lambda: nn.Sequential(Detached8Bit(), Small()),
    "8-bit pixels by a function": lambda: nn.Sequential(Lambda(StraightThrough.apply), Small()),
    "8-bit activations": lambda: Small(lambda x: F.relu(x) + (torch.round(x * 31) / 31 - x).detach()),
    "saturated": lambda: Small(lambda x: torch.tanh(x * 1e4)),
    "no gradient at all here": lambda: Small(lambda x: torch.sigmoid(x * 1e-3 - 1e4)),
    "large logits": lambda: Small(gain=1e6),
    "small logits": lambda: Small(gain=1e-6),
    "float32 inside": lambda: Small(lambda x: F.relu(x.float()).to(x.dtype)),
    "bfloat16 inside": lambda: Small(lambda x: F.relu(x.bfloat16()).to(x.dtype)),
    "float32 only": Only32,
    "bfloat16 weights": lambda: Small().bfloat16(),
    "float64 weights": lambda: Small().double(),
    "a cache": Keeps,
    "weight norm": lambda: parametrized(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: parametrized(nn.utils.parametrizations.spectral_norm),
    "scripted": lambda: torch.jit.script(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10))
    ),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 10)),
}


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Detached8Bit(nn.Module):
    """Rounds pixels as a file does, with a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x + ((x * 255).round() / 255 - x).detach()


@pytest.mark.parametrize("name", TAKEN)
def test_an_honest_classifier_is_taken_and_left_as_it_was(name: str) -> None:
    module = TAKEN[name]().eval()
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    x = x.double() if name == "float64 weights" else x
    cached = module.cache if name == "a cache" else None
    before = {k: v.clone() for k, v in module.state_dict().items()}
    if name == "float64 weights":
        module(x)
    classifier = wrap_classifier(module, LABELS, image_size=SIZE)
    assert classifier.logits(x.float()).dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.dtype == v.dtype for p, v in zip(module.state_dict().values(), before.values(), strict=True))
    if cached is not None:
        assert module.cache is cached
        assert all(v.dtype == torch.float32 for v in cached.values())


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2).square()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchs_own_fault_is_seen_where_it_cannot_be_mended() -> None:
    """A norm in TorchScript runs where no hook or mode reaches: torch 2.13's gradient of one image is wrong."""
    norm = Small().norm
    with pytest.raises(UsageError, match="gradient alone is not its gradient beside others"):
        wrap_classifier(scripted(norm, Tokens()), LABELS, image_size=SIZE)
    wrap_classifier(scripted(norm), LABELS, image_size=SIZE)


def test_an_engine_checks_a_classifier_of_the_users_own_kind(tiny: Any) -> None:
    diffusion, _ = tiny
    with pytest.raises(UsageError, match="is not that of its logits"):
        Engine(diffusion, SoftmaxClassifier(Small(wrong("scaled")).eval(), diffusion.labels), Config())


def test_it_is_cheap() -> None:
    from counterlens.engine.models.gradient_check import check_gradient
    from counterlens.engine.packs import Pack

    classifier = Pack("digits").classifier("clean")
    classifier.logits(torch.rand(3, 3, 32, 32))
    started = time.process_time()
    check_gradient(classifier, 32)
    assert time.process_time() - started < 0.5  # 20 to 60 ms on a free core
