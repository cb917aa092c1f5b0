"""A gradient is the same in every layout: a batch norm's and an instance norm's only with our help (torch 2.13)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterlens.engine.config import StepOptions
from counterlens.engine.guidance.pullback import PULLBACK_MODES, pullback
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.image_classifiers import wrap_classifier
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.runtime.spec import Spec, flat
from counterlens.engine.saliency.methods import explain_with

C = 4
GRID = F.affine_grid(torch.tensor([[[0.8, 0.2, 0.1], [-0.2, 0.9, 0.0]]]), [1, C, 5, 6], align_corners=False)


def norm_of(kind: Callable[..., nn.Module], **options: bool) -> nn.Module:
    torch.manual_seed(1)
    module = kind(C, **options).eval()
    for name, tensor in (*module.named_buffers(), *module.named_parameters()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2.0) if name in ("running_var", "weight") else tensor.data.normal_()
    return module


NORMS = {
    "BatchNorm1d": (norm_of(nn.BatchNorm1d), (6,)),
    "BatchNorm2d": (norm_of(nn.BatchNorm2d), (5, 6)),
    "BatchNorm2d without weights": (norm_of(nn.BatchNorm2d, affine=False), (5, 6)),
    "BatchNorm2d of one row": (norm_of(nn.BatchNorm2d), (1, 6)),
    "BatchNorm2d of one column": (norm_of(nn.BatchNorm2d), (5, 1)),
    "BatchNorm3d": (norm_of(nn.BatchNorm3d), (2, 3, 4)),
    "BatchNorm3d of one row": (norm_of(nn.BatchNorm3d), (1, 1, 4)),
    "InstanceNorm1d": (norm_of(nn.InstanceNorm1d, affine=True), (6,)),
    "InstanceNorm2d": (norm_of(nn.InstanceNorm2d), (5, 6)),
    "InstanceNorm2d with statistics": (norm_of(nn.InstanceNorm2d, track_running_stats=True), (5, 6)),
    "InstanceNorm3d": (norm_of(nn.InstanceNorm3d, affine=True), (2, 3, 4)),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "group norm": norm_of(lambda c: nn.GroupNorm(2, c)),
    "layer norm": nn.LayerNorm(6),
    "convolution": nn.Conv2d(C, 6, 3, padding=1),
    "strided convolution": nn.Conv2d(C, 6, 2, 2),
    "depthwise convolution": nn.Conv2d(C, C, 3, groups=C),
    "dilated convolution": nn.Conv2d(C, 6, 3, padding=2, dilation=2),
    "1x1 convolution": nn.Conv2d(C, 6, 1),
    "transposed convolution": nn.ConvTranspose2d(C, 6, 2, 2),
    "circular padding": nn.Conv2d(C, 6, 3, padding=1, padding_mode="circular"),
    "reflection": nn.ReflectionPad2d(1),
    "replication": nn.ReplicationPad2d(1),
    "max pooling": nn.MaxPool2d(3, 2, 1),
    "average pooling": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "adaptive average pooling": nn.AdaptiveAvgPool2d(4),
    "adaptive max pooling": nn.AdaptiveMaxPool2d(4),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "antialias": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
    "grid_sample": lambda x: F.grid_sample(x, GRID.expand(len(x), -1, -1, -1).to(x), align_corners=False),
    "pixel shuffle": nn.PixelShuffle(2),
    "PReLU": nn.PReLU(C),
    "GELU": nn.GELU(),
    "GLU": nn.GLU(1),
    "softmax": nn.Softmax(1),
    "attention": lambda x: F.scaled_dot_product_attention(x, 2 * x, x),
    "normalize": lambda x: F.normalize(x, dim=1),
    "unfold": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1)[0],
    "roll": lambda x: x.roll(1, 2),
}


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers with the axes in another order of memory, and with the strides that a size of 1 may have."""
    back = [order.index(i) for i in range(len(order))]
    out = x.permute(order).contiguous().permute(back)
    strides = [1 if n == 1 else s for n, s in zip(out.shape, out.stride(), strict=True)]
    return out.as_strided(out.shape, strides)


def orders(ndim: int) -> list[tuple[int, ...]]:
    every = list(itertools.permutations(range(ndim)))
    return [*every[:: max(1, len(every) // 12)], (0, *range(2, ndim), 1), (*range(2, ndim), 0, 1)]


def worst(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """Largest error of a gradient relative to that of plain layouts, over layouts of the input and the gradient."""
    torch.manual_seed(0)
    x, errors = torch.randn(shape), []
    y = function(leaf := x.clone().requires_grad_())
    g = torch.randn(y.shape)
    expected = torch.autograd.grad(y, leaf, g)[0]
    for given in orders(len(shape)):
        for order in orders(g.ndim):
            leaf = in_order(x, given).requires_grad_()
            got = torch.autograd.grad(function(leaf), leaf, in_order(g, order))[0]
            errors.append((got - expected).abs().max().item())
    return max(errors) / expected.abs().max().item()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_one_gradient_in_every_layout(name: str, batch: int) -> None:
    module, size = NORMS[name]
    with frozen(module):
        assert worst(module, (batch, C, *size)) < 1e-4
    assert not {**module._forward_hooks, **module._forward_pre_hooks}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_other_operators_need_no_help(name: str, batch: int) -> None:
    assert worst(OTHERS[name], (batch, C, 5 if name != "pixel shuffle" else 4, 6)) < 1e-4


class Tokens(nn.Module):
    """A norm whose output becomes tokens, so that its gradient arrives channels-last."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.stem = norm, nn.Conv2d(3, 8, 4, 4)
        self.mean, self.var = nn.Buffer(torch.randn(8) * 0.2), nn.Buffer(torch.rand(8) + 0.5)
        self.inner = {"module": nn.BatchNorm2d(8), "instance": nn.InstanceNorm2d(8)}.get(norm, nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.norm == "function":
            x = F.batch_norm(x, self.mean, self.var)
        elif self.norm == "instance function":
            x = F.instance_norm(x)
        elif self.norm == "named arguments":
            x = F.batch_norm(input=x, running_mean=self.mean, running_var=self.var, training=False)
        x = self.inner(x)
        if self.norm == "sequence first":
            return self.head(F.instance_norm(x).flatten(2).permute(2, 0, 1)).mean(0) * 20
        return self.head(x.flatten(2).transpose(1, 2)).mean(1) * 20


KINDS = ("module", "function", "instance", "instance function", "named arguments", "sequence first")


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("mode", PULLBACK_MODES)
def test_an_image_has_its_own_gradient_alone_and_beside_others(norm: str, mode: str) -> None:
    module = Tokens(norm).eval()
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    classifier = wrap_classifier(module, [str(i) for i in range(10)], image_size=32)
    target = torch.tensor([3, 3, 3])
    directions = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(1)).double()
    reference = Tokens(norm).eval().double().requires_grad_(False)  # forward mode knows no layouts of gradients

    def log_prob(image: Tensor) -> Tensor:
        return torch.log_softmax(reference(image), 1)[:, 3]

    truth = torch.stack([torch.func.jvp(log_prob, (x.double(),), (d,))[1] for d in directions])  # [4, B]
    with frozen(classifier.module), torch.no_grad():
        for rows in ([0], [0, 1], [2, 0, 1]):
            y, pull = pullback(partial(classifier.log_prob, target=target[: len(rows)]), x[rows], mode)
            got = pull(torch.ones_like(y)).double()
            along = (got * directions[:, rows]).sum(dim=(2, 3, 4))
            torch.testing.assert_close(along, truth[:, rows], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["gradxinput", "ig", "smoothgrad"])
@pytest.mark.parametrize("norm", ["module", "function"])
def test_maps_of_one_image_are_those_of_the_same_image_beside_another(method: str, norm: str) -> None:
    pytest.importorskip("captum", reason="needs captum (the extra `explain`)")
    classifier = wrap_classifier(Tokens(norm), [str(i) for i in range(10)], image_size=32)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    alone, beside = (explain_with(method, classifier, x[:n], [3] * n)[1][0] for n in (1, 2))
    torch.testing.assert_close(alone, beside, rtol=1e-3, atol=1e-5 * beside.abs().max().item())


@pytest.mark.parametrize("norm", ["module", "instance"])
def test_a_guided_step_of_one_image_is_that_of_float64(tiny: Any, norm: str) -> None:
    """Before, z_prev was off by a quarter of its size; a batch of two never was."""
    diffusion, _ = tiny
    exact = copy.deepcopy(diffusion)
    for module in exact.modules():
        module.double()
    classifiers = [SoftmaxClassifier(m, diffusion.labels) for m in (Tokens(norm).eval(), Tokens(norm).eval().double())]
    for seed in range(2):
        given = Spec(diffusion, classifiers[0]).example(1, seed)
        results = []
        for model, classifier, dtype in zip(
            (diffusion, exact), classifiers, (torch.float32, torch.float64), strict=True
        ):
            inputs = [x.to(dtype) if x.is_floating_point() else x for x in given]
            step = flat(GuidedStep(model, classifier, StepOptions(filter="off"), mode="autograd", backend="reference"))
            with frozen(*model.modules(), classifier.module), torch.no_grad():
                results.append(step(*inputs)[0].double())
        assert (results[0] - results[1]).norm() < 1e-4 * results[1].norm()
