"""Taps: what follows the image is a map in whatever layout, what does not is none, and a copy stays as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterlens.engine.errors import UsageError
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.saliency.lax import new_adapter, open_adapter
from counterlens.engine.saliency.methods import explain_with
from counterlens.engine.saliency.taps import Layout, Tap, choose_layer, choose_taps, find_maps, resolve_taps, tapped
from counterlens.engine.saliency.training import Schedule, train

SIZE, SIDE, WIDTH = 16, 4, 8
LABELS = ["a", "b", "c"]
QUICK = Schedule(steps=2, batch=2, every=2)


@dataclass
class Out:
    """As transformers' outputs were before they were mappings."""

    note: str
    hidden: Tensor


class Say(nn.Module):
    """Hands on what it is given, in a form of its own."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def forward(self, *x: Tensor) -> Any:
        return self.form(*x)


FORMS: dict[str, tuple[Any, str]] = {
    "channels first": (lambda m: m, "said"),
    "transposed": (lambda m: m.transpose(2, 3), "said@BCWH"),
    "channels last": (lambda m: m.permute(0, 2, 3, 1), "said@BHWC"),
    "tokens": (lambda m: m.flatten(2).transpose(1, 2), "said@B(4x4)C"),
    "tokens after a class token": (lambda m: front(m, 1), "said@B(1+4x4)C"),
    "tokens after registers": (lambda m: front(m, 5), "said@B(5+4x4)C"),
    "tokens, batch second": (lambda m: front(m, 2).transpose(0, 1), "said@(2+4x4)BC"),
    "flattened": (lambda m: m.flatten(2), "said@BC(4x4)"),
    "a tuple": (lambda m: (m, m.mean((2, 3))), "said"),
    "second of a tuple": (lambda m: (m.mean((2, 3)), m), "said[1]"),
    "a mapping": (lambda m: {"pooled": m.mean((2, 3)), "last": front(m, 1)}, "said[1]@B(1+4x4)C"),
    "a dataclass": (lambda m: Out("", m.permute(0, 2, 3, 1)), "said@BHWC"),
}
NONE = {
    "pooled": lambda m: m.mean((2, 3)),
    "one place": lambda m: m.mean((2, 3), keepdim=True),
    "a position bias": lambda m: torch.linspace(0, 1, 16 * WIDTH).view(1, 16, WIDTH),
    "a relative position bias": lambda m: torch.linspace(0, 1, 4 * 16 * 16).view(4, 16, 16),
    "attention": lambda m: attention(m),
    "attention of one head": lambda m: attention(m)[:, 0],
    "windows": lambda m: m.unfold(2, 2, 2).unfold(3, 2, 2).movedim(1, 5).flatten(0, 2).flatten(1, 2),
    "mirrored": lambda m: m.flip(2, 3),
    "indices": lambda m: m.argmax(1, keepdim=True).expand_as(m),
    "nothing": lambda m: None,
}  # fmt: skip


def front(m: Tensor, count: int) -> Tensor:
    tokens = m.flatten(2).transpose(1, 2)
    return torch.cat([tokens.mean(1, keepdim=True).expand(-1, count, -1), tokens], 1)


def attention(m: Tensor) -> Tensor:
    tokens = m.flatten(2).transpose(1, 2)
    return (tokens @ tokens.transpose(1, 2)).softmax(-1)[:, None].expand(-1, 4, -1, -1)


class Net(nn.Module):
    """Maps [B, 8, 4, 4] that `said` hands on in a form; the answer comes from the maps."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.said = Say(form)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patch(x)
        self.said(maps)
        return self.head(maps.mean((2, 3)))


def of(module: nn.Module) -> SoftmaxClassifier:
    return SoftmaxClassifier(module.eval(), LABELS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FORMS)
def test_a_map_is_found_in_any_layout(name: str, images: Tensor) -> None:
    torch.manual_seed(0)
    form, expected = FORMS[name]
    classifier = of(Net(form))
    assert resolve_taps(classifier, images[:1], ["said"]) == [expected]
    with tapped(classifier.module, [expected]) as features, torch.no_grad():
        classifier.logits(images)
    assert torch.equal(features[0], classifier.module.patch(images))
    assert str(Tap.parse(expected)) == expected


@pytest.mark.parametrize("name", NONE)
def test_what_does_not_follow_the_image_is_no_map(name: str, images: Tensor) -> None:
    torch.manual_seed(0)
    classifier = of(Net(NONE[name]))
    assert [str(f.tap) for f in find_maps(classifier, images[:1])[0]] == ["patch"]
    with pytest.raises(UsageError, match=r"tap: 'said' gives .*(follow the image|no tensor)"):
        new_adapter(classifier, SIZE, taps=["said"])
    adapter = new_adapter(classifier, SIZE)
    assert adapter.taps == ["patch"]
    train(adapter, images, lambda _: 0.0, QUICK)


class Twice(nn.Module):
    """One ReLU at two resolutions, in place, and a sum in place after the last convolution."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.act = nn.ReLU(in_place)
        self.head = nn.Linear(4, 3)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.act(self.first(x)))
        x = x.add_(1) if self.in_place else x + 1
        return self.head(self.act(x).mean((2, 3)))


def test_what_runs_twice_is_named_by_its_call(images: Tensor) -> None:
    classifier = of(Twice(False))
    assert choose_taps(classifier, images[:1]) == ["act#1", "act#2"]
    with pytest.raises(UsageError, match=r"tap: 'act' runs more than once in a pass; say which: act#1, act#2"):
        new_adapter(classifier, SIZE, taps=["act"])
    with pytest.raises(UsageError, match="runs more than once"), tapped(classifier.module, ["act"]):
        classifier.logits(images)
    with pytest.raises(UsageError, match=r"tap: 'act#3' gives"):
        new_adapter(classifier, SIZE, taps=["act#3"])
    with tapped(classifier.module, ["act#2", "act#1"]) as features, torch.no_grad():
        classifier.logits(images)
    assert [f.shape[2] for f in features] == [4, 8]


def test_what_follows_in_place_changes_no_tap(images: Tensor) -> None:
    taps = ["first", "act#1", "second", "act#2"]
    seen, cams = [], []
    for in_place in (False, True):
        classifier = of(Twice(in_place))
        with tapped(classifier.module, taps) as features, torch.no_grad():
            classifier.logits(images)
        seen.append(features)
        cams.append([explain_with("gradcam", classifier, images, 1, layer=layer)[1] for layer in taps])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*cams, strict=True))
    assert any(c.any() for c in cams[1])


def test_an_adapter_says_what_it_reads(images: Tensor, tmp_path) -> None:
    torch.manual_seed(0)
    classifier = of(Net(FORMS["tokens after registers"][0]))
    adapter = new_adapter(classifier, SIZE, taps=["said", "patch"])
    adapter.save(tmp_path)
    assert '"said@B(5+4x4)C"' in (tmp_path / "adapter.json").read_text()
    assert "said@B(5+4x4)C" in repr(adapter)
    assert "\n" not in repr(adapter)
    again = open_adapter(tmp_path, classifier)
    assert torch.equal(again.explain(images, 1).scores, adapter.explain(images, 1).scores)


class Attend(nn.Module):
    """A vision transformer whose answer is its class token after one attention; returns tuples with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.front = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.front.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        y = self.norm(tokens)
        return self.head(self.last(tokens + self.attention(y, y, y)[0])[:, 0])


def test_grad_cam_of_a_vision_transformer(images: Tensor) -> None:
    """Before the last attention, where places still matter; as the formula says it."""
    torch.manual_seed(0)
    classifier = of(Attend())
    assert choose_layer(classifier, images[:1]) == "norm@B(2+4x4)C"
    saliency, scores = explain_with("gradcam", classifier, images, 1)
    module = classifier.module
    with torch.enable_grad():
        tokens = torch.cat([module.front.expand(3, -1, -1), module.patch(images).flatten(2).transpose(1, 2)], 1)
        y = module.norm(tokens)
        logits = module.head(module.last(tokens + module.attention(y, y, y)[0])[:, 0])
        odds = logits[:, 1] - logits[:, [0, 2]].logsumexp(1)
        (g,) = torch.autograd.grad(odds.sum(), y)
    maps, weights = (v[:, 2:].transpose(1, 2).unflatten(2, (4, 4)) for v in (y, g))
    cam = (weights.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    expected = nn.functional.interpolate(cam, size=(SIZE, SIZE), mode="bilinear")[:, 0]
    assert torch.allclose(scores, expected, atol=1e-6)
    assert saliency.flatten(1).amax(1).gt(0).any()


@pytest.mark.parametrize("text", ["BHWC", "BCWH", "B(14x14)C", "(3+7x5)BC", "BC(4x4)"])
def test_layouts_are_text(text: str) -> None:
    assert str(Layout.parse(text)) == text


@pytest.mark.parametrize("text", ["a@HWC", "a@B(4)C", "a@BC", "a#0", "#1", "a@"])
def test_what_is_no_tap(text: str, images: Tensor) -> None:
    with pytest.raises(UsageError, match=r"tap: "):
        resolve_taps(of(Net(FORMS["tokens"][0])), images[:1], [text])


@pytest.mark.parametrize("name", ["dinov2_with_registers", "beit", "swin", "convnext", "levit", "focalnet"])
def test_public_architectures(name: str) -> None:
    """Random weights: every chosen tap is a map, training and maps run, and Grad-CAM finds a layer."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    given = {
        "dinov2_with_registers": ("Dinov2WithRegisters", small | {"patch_size": 8}),
        "beit": ("Beit", small | {"patch_size": 8, "use_relative_position_bias": True}),
        "swin": ("Swin", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
        "convnext": ("ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
        "levit": ("Levit", {"hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "depths": [1, 1],
                            "key_dim": [8, 8], "drop_path_rate": 0, "down_ops": [["Subsample", 8, 1, 2, 2, 2]],
                            "attention_ratio": [2, 2], "mlp_ratio": [2, 2]}),
        "focalnet": ("FocalNet", {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]}),
    }  # fmt: skip
    prefix, options = given[name]
    config = getattr(transformers, f"{prefix}Config")(image_size=64, num_labels=3, **options)
    torch.manual_seed(0)
    module = getattr(transformers, f"{prefix}ForImageClassification")(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, x: Tensor) -> Tensor:
            return self.model(pixel_values=x).logits

    classifier = of(Logits())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    adapter = new_adapter(classifier, 64)
    assert len(adapter.taps) >= 2
    assert resolve_taps(classifier, images[:1], adapter.taps) == adapter.taps
    train(adapter, images, lambda _: 0.0, QUICK)
    assert adapter.explain(images).saliency.shape == (2, 64, 64)
    assert explain_with("gradcam", classifier, images)[1].isfinite().all()
