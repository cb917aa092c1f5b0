"""Counterfactual quality by hand, distances between sets against closed forms, bootstrap intervals."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import Tensor, nn

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.metrics import bootstrap, counterfactual_quality, fid, kid, sfid
from tests.engine.metrics.models import Linear, Random, sample


def flat(x: Tensor) -> Tensor:
    """Features that are the pixels themselves."""
    return x.flatten(1)


def test_quality_on_paper() -> None:
    # Two images of 2x2; the classifier says 1 where the sum exceeds 0.
    images = torch.zeros(2, 1, 2, 2)
    after = images.clone()
    after[0, 0, 0, 0], after[1, 0, 0, 1] = 0.8, 0.05
    classifier, judge = Linear(torch.ones(2, 2) * 10), Linear(-torch.ones(2, 2))
    result = counterfactual_quality(
        classifier, images, after, 1, judges={"judge": judge}, encoder=lambda x: flat(x) + 1
    )
    assert result.flipped.tolist() == [True, True]
    assert result.source.tolist() == [0, 0]
    assert torch.allclose(result.target_confidence, torch.tensor([8, 0.5]).double().sigmoid(), atol=1e-6)
    assert torch.allclose(result.l1, torch.tensor([0.2, 0.0125]).double(), atol=1e-7)
    assert torch.allclose(result.l2, torch.tensor([0.4, 0.025]).double(), atol=1e-7)
    assert result.changed_area.tolist() == [0.25, 0]
    assert result.transfer["judge"].tolist() == [False, False]
    cosine = torch.cosine_similarity(torch.tensor([1.8, 1, 1, 1]), torch.ones(4), dim=0)
    assert result.similarity is not None
    assert abs(result.similarity[0] - cosine) < 1e-6
    summary = result.summary()
    assert summary["flipped"].mean == 1
    assert summary["unconfirmed/judge"].mean == 1
    assert summary["transfer/judge"].mean == 0
    assert summary["l1"].n == 2
    # COUT: one step in four changes a pixel; p(1) jumps from 1/2 to p at the first, p(0) is its complement.
    assert result.transition is not None
    p = torch.tensor([8.0, 0.5]).double().sigmoid()
    area = (0.5 / 2 + p * 3 + p / 2) / 4
    assert torch.allclose(result.transition.score, area - (1 - area), atol=1e-6)
    assert abs(summary["cout"].mean - result.transition.score.mean().item()) < 1e-12
    bare = counterfactual_quality(classifier, images, after, 1, with_cout=False)
    assert bare.transition is None
    assert set(bare.summary()) == {"flipped", "target_confidence", "l1", "l2", "changed_area"}


def test_no_flip_has_no_unconfirmed_rate() -> None:
    images, _ = sample(2)
    model = Random()
    other = (model(images).argmax(1) + 1) % 5
    result = counterfactual_quality(model, images, images, other, judges={"judge": model}, with_cout=False)
    assert result.summary()["unconfirmed/judge"].n == 0
    assert result.summary()["flipped"].mean == 0


def test_lpips_when_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = sample(3)
    model = Random()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(CounterlensError, match="pip install lpips"):
        counterfactual_quality(model, images, images, 0, with_cout=False, lpips="alex")

    class LPIPS(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    result = counterfactual_quality(model, images, images / 2, 0, with_cout=False, lpips="alex", batch_size=2)
    assert result.lpips is not None
    assert torch.allclose(result.lpips, 2 * result.l1, atol=1e-6)  # in [-1, 1] differences are twice as large
    with pytest.raises(UsageError, match="resnet"):
        counterfactual_quality(model, images, images, 0, with_cout=False, lpips="resnet")
    own = counterfactual_quality(model, images, images, 0, with_cout=False, lpips=lambda a, b: (a - b).sum((1, 2, 3)))
    assert own.lpips is not None
    assert own.lpips.tolist() == [0, 0, 0]


def test_fid_against_the_closed_form() -> None:
    pytest.importorskip("torchmetrics", reason="needs torchmetrics (pip install '.[quality]')")
    g = torch.Generator().manual_seed(0)
    real = torch.randn(200, 1, 1, 2, generator=g)
    fake = torch.randn(150, 1, 1, 2, generator=g) * 0.5 + 1
    a, b = real.flatten(1).double(), fake.flatten(1).double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # The root's trace is the sum of the roots of the product's eigenvalues.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert abs(fid(real, fake, flat, batch_size=7) - expected.item()) < 1e-6
    assert abs(fid(real, real, flat)) < 1e-6
    # Counterfactuals that are their originals: FID is blind, split FID sees how far two halves are apart anyway.
    assert sfid(real, real, flat) > 0
    assert sfid(real, real, flat, seed=1) == sfid(real, real, flat, seed=1)
    assert sfid(real, real + 3, flat) > 15


def test_few_images_warn() -> None:
    pytest.importorskip("torchmetrics", reason="needs torchmetrics (pip install '.[quality]')")
    images, _ = sample(8, (2, 2))
    with pytest.warns(UserWarning, match="8 images for 12 features"):
        fid(images, images.flip(0), flat)
    with pytest.warns(UserWarning, match="4 images for 12 features"):
        sfid(images, images, flat, splits=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kid(images, images.flip(0), flat, subsets=2)


def test_kid_against_the_estimator_written_out() -> None:
    a, b = sample(9, (1, 2), channels=1)[0], sample(9, (1, 2), channels=1)[1][:, None] + 0.5
    x, y = a.flatten(1).double(), b.flatten(1).double()

    def kernel(p: Tensor, q: Tensor) -> float:
        return ((p @ q / 2 + 1) ** 3).item()

    same = sum(kernel(p[i], p[j]) for p in (x, y) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    cross = sum(kernel(x[i], y[j]) for i in range(9) for j in range(9)) / 81
    state = torch.random.get_rng_state()
    mean, deviation = kid(a, b, flat, subsets=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(mean - (same - 2 * cross)) < 1e-6
    assert deviation < 1e-6
    assert kid(a, b, flat, subsets=3, subset_size=4, seed=1) == kid(a, b, flat, subsets=3, subset_size=4, seed=1)


def test_bootstrap() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(400, generator=g)
    interval = bootstrap(values)
    half = 1.96 * values.std().item() / 20
    assert abs(interval.mean - values.mean().item()) < 1e-6
    assert abs(interval.low - (interval.mean - half)) < half / 5
    assert abs(interval.high - (interval.mean + half)) < half / 5
    assert bootstrap(values) == interval
    narrow = bootstrap(values, confidence=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high
    ones = bootstrap(torch.ones(10, dtype=torch.bool))
    assert (ones.low, ones.high, ones.n) == (1, 1, 10)
    # How often an interval holds the truth: 95 % of 200 samples of a rate of 0.3, give or take.
    held = sum(
        i.low <= 0.3 <= i.high for i in (bootstrap(torch.rand(100, generator=g) < 0.3, draws=500) for _ in range(200))
    )
    assert 180 <= held <= 198


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: counterfactual_quality(Random(), x, x[:1], 0), ["counterfactuals", "[3, 3, 9, 7]"]),
        (lambda x: counterfactual_quality(Random(), x, x, 7), ["target", "0 to 4"]),
        (lambda x: counterfactual_quality(Random(), x, x, 0, changed_above=2), ["changed_above", "2"]),
        (lambda x: counterfactual_quality(Random(), x, x, 0, encoder=lambda y: y), ["features", "[3, D]"]),
        (lambda x: fid(x, x, lambda y: y.mean()), ["features", "[3, D]", "[]"]),
        (lambda x: fid(x[:1], x, flat), ["images", "two"]),
        (lambda x: sfid(x, x, flat), ["four"]),
        (lambda x: kid(x, x, flat, subset_size=9), ["subset_size", "2 to 3"]),
        (lambda x: bootstrap(x), ["values", "[N]"]),
        (lambda x: bootstrap(torch.tensor([1.0, torch.nan])), ["values", "1 of 2", "NaN"]),
        (lambda x: bootstrap(torch.ones(2), confidence=1), ["confidence"]),
    ],
)
def test_bad_input(call, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        call(sample(3)[0])
    for word in words:
        assert word in str(caught.value)


def test_missing_torchmetrics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    with pytest.raises(CounterlensError, match=r"pip install 'torchmetrics"):
        fid(*[torch.rand(4, 1, 1, 2)] * 2, flat)
