"""Saliency methods on models whose maps can be written down, and what they refuse."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.metrics.table import METRICS
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs.architectures import StridedClassifier
from counterlens.engine.saliency.evaluation import evaluate, summarise, write_parquet
from counterlens.engine.saliency.lax import new_adapter
from counterlens.engine.saliency.methods import CELLS, explain_with
from counterlens.engine.saliency.table import METHODS, check_methods

SIZE = 16
PLAIN = [name for name in METHODS if name != "lax"]


class Linear(nn.Module):
    """Two labels, logits (0, w x): the log-odds of label 1 are w x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        value = (x * self.weight).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(value), value], 1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def linear() -> SoftmaxClassifier:
    return SoftmaxClassifier(Linear(), ["0", "1"])


@pytest.fixture(scope="module")
def strided() -> SoftmaxClassifier:
    torch.manual_seed(0)
    return SoftmaxClassifier(StridedClassifier(classes=4, width=8).eval(), list("abcd"))


def test_maps_of_a_linear_model(linear, images) -> None:
    w = linear.module.weight.detach()
    colour = torch.tensor([0.2, 0.4, 0.6])
    effect = w * (images - colour[:, None, None])  # what hiding a value changes in the log-odds
    cells = nn.functional.avg_pool2d(effect.sum(1), SIZE // CELLS) * (SIZE // CELLS) ** 2
    spread = cells.repeat_interleave(SIZE // CELLS, 1).repeat_interleave(SIZE // CELLS, 2)
    for name, expected in (
        ("gradxinput", (w * images).sum(1)),
        ("ig", effect.sum(1)),
        ("smoothgrad", w.abs().amax(0).expand(3, -1, -1)),
        ("ablation", spread),
    ):
        saliency, scores = explain_with(name, linear, images, 1, baseline=colour)
        assert torch.allclose(scores, expected, atol=2e-5), name
        assert saliency.flatten(1).amin(1).abs().max() == 0
        assert (saliency.flatten(1).amax(1) == 1).all()
        assert not scores.requires_grad
    # The other label's evidence is the same with the sign turned.
    _, other = explain_with("ig", linear, images, 0, baseline=colour)
    assert torch.allclose(other, -effect.sum(1), atol=2e-5)
    # A window in the middle is covered by four: their mean is what the map shows there.
    _, occluded = explain_with("occlusion", linear, images, 1, baseline=colour)
    windows = nn.functional.avg_pool2d(effect.sum(1, keepdim=True), 2, 1) * 4
    around = windows[:, 0, 7:9, 7:9].mean((1, 2))
    assert torch.allclose(occluded[:, 8, 8], around, atol=2e-5)


def test_rise_finds_the_pixels_that_are_read(images) -> None:
    class Patch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value = 6 * (x[:, :, 8:12, 4:8].mean((1, 2, 3)) - 0.25)
            return torch.stack([-value, value], 1)

    classifier = SoftmaxClassifier(Patch(), ["0", "1"])
    _, scores = explain_with("rise", classifier, images, 1, baseline=0.0)
    best = scores.flatten(1).argmax(1)
    assert ((best // SIZE - 10).abs() <= 2).all()
    assert ((best % SIZE - 6).abs() <= 2).all()
    again = explain_with("rise", classifier, images, 1, baseline=0.0)[1]
    other = explain_with("rise", classifier, images, 1, baseline=0.0, seed=1)[1]
    assert torch.equal(scores, again)
    assert not torch.equal(scores, other)


@pytest.mark.parametrize("name", PLAIN)
def test_an_image_has_the_same_map_wherever_it_stands(name, strided, images) -> None:
    module = strided.module.train()
    target = torch.tensor([0, 1, 2])
    _, together = explain_with(name, strided, images, target, seed=2)
    _, alone = explain_with(name, strided, images[2:], target[2:], seed=2)
    assert together.shape == (3, SIZE, SIZE)
    assert torch.allclose(together[2:], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
    assert module.training
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())
    module.eval()


def test_evaluation_scores_what_it_explains(strided, images, tmp_path) -> None:
    scored = evaluate(strided, images, ["gradxinput", "rise", "gradxinput"], baseline=0.3, seeds=[5, 6, 7])
    assert list(scored) == ["gradxinput", "rise"]
    row = summarise(scored)["rise"]
    assert {name for name, metric in METRICS.items() if metric.group == "main"} <= set(row)
    assert row["msi"]["low"] <= row["msi"]["mean"] <= row["msi"]["high"]
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    write_parquet(scored, ["x", "y", "z"], strided.labels, tmp_path / "scores.parquet")
    table = parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [r["image"] for r in table] == ["x", "y", "z"] * 2
    assert table[4]["msi"] == pytest.approx(scored["rise"].values["msi"][1].item())


def test_what_does_not_fit(strided, images, monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"method: expected one of lax, .*got 'magic'"):
        check_methods(["ig", "magic"])
    with pytest.raises(UsageError, match="adapter: method lax needs"):
        explain_with("lax", strided, images)
    with pytest.raises(UsageError, match=r"tap: the model has no 'feature\.1'; nearest: features\.1"):
        explain_with("gradcam", strided, images, layer="feature.1")
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(CounterlensError, match=r"captum cannot be imported.*pip install 'captum"):
        explain_with("ig", strided, images)
    assert explain_with("rise", strided, images)[0].shape == (3, SIZE, SIZE)


def test_a_given_target_costs_no_forward_pass(strided, images, monkeypatch) -> None:
    adapter, asked = new_adapter(strided, SIZE), []
    logits = strided.logits
    monkeypatch.setattr(strided, "logits", lambda x: asked.append(len(x)) or logits(x))
    explain_with("lax", strided, images, 1, adapter=adapter)
    assert asked == [3]
    explain_with("lax", strided, images, adapter=adapter)
    assert asked == [3, 3, 3]
