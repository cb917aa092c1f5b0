"""The disagreement map: its directions are the guided step's, its test keeps its promise, planted causes are found."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from counterlens.engine.audit.disagreement import (
    Evidence,
    Observer,
    excess_test,
    find,
    judge,
    read_maps,
    regions,
    shares,
    unlikely_labels,
)  # fmt: skip
from counterlens.engine.config import Config
from counterlens.engine.guidance.pullback import frozen
from counterlens.engine.images import as_saved
from counterlens.kernels.consensus import consensus_filter
from tests.engine.test_audit import make_engine


@pytest.mark.parametrize("gradient", ["exact", "detached"])
def test_the_score_is_the_gradient_of_log_p(tiny64, gradient: str) -> None:
    """Against autograd through UNet, decoder and classifier, written from the formula."""
    diffusion, classifier = tiny64
    settings = make_engine(tiny64).settings(Config(gradient=gradient))
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, *diffusion.latent_shape, generator=g, dtype=torch.float64)
    timestep, target = torch.tensor([300, 300, 300]), torch.tensor([1, 5, 7])
    observer = Observer(diffusion, classifier, settings)
    with frozen(*diffusion.modules(), classifier.module):
        score, reference = observer.directions(z, timestep, diffusion.condition(target), target)
        abar = diffusion.alphas_cumprod[300]
        leaf = z.clone().requires_grad_()
        eps = diffusion.predict_noise(leaf, timestep, diffusion.null_condition(3))
        eps_u = eps.detach() if gradient == "detached" else eps
        x0 = (diffusion.decode((leaf - (1 - abar).sqrt() * eps_u) / abar.sqrt()) + 1) / 2
        (expected,) = torch.autograd.grad(classifier.log_prob(x0, target).sum(), leaf)
        eps_c = diffusion.predict_noise(z, timestep, diffusion.condition(target))
    torch.testing.assert_close(shares(score), shares(-expected), rtol=1e-6, atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(score.flatten(1), -expected.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(reference, eps_c - eps.detach())


def test_shares_and_what_the_filter_removes(tiny) -> None:
    engine = make_engine(tiny)
    settings = engine.settings(engine.config)
    observer = Observer(engine.diffusion, engine.classifier, settings)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([1, 2])
    z, t = engine.diffusion.encode(images), torch.tensor([200, 200])
    condition = engine.diffusion.condition(target)
    scales = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.2, "angle_deg": settings.angle}
    with frozen(*engine.diffusion.modules(), engine.classifier.module), torch.no_grad():
        moved = observer(z, t, t - 50, condition, images, target, **scales)
        plain = observer.step(z, t, t - 50, condition, images, target, **scales)[0]
        score, reference = observer.directions(z, t, condition, target)
    assert torch.equal(moved, plain)
    push, removed, evidence = observer.seen()
    torch.testing.assert_close(push.sum(dim=(1, 2)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(evidence.sum(dim=(1, 2)), torch.ones(2, dtype=torch.float64))
    kept = consensus_filter(score, reference, settings.angle)[1]
    torch.testing.assert_close(removed, push * ~kept)
    assert 0 < removed.sum() < push.sum()
    assert not shares(torch.zeros(1, 4, 4, 4)).any()


def maps(n: int, seed: int, planted: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Push and evidence of n samples over 6x6 places from the same law; `planted` moves push to the first place."""
    rng = np.random.default_rng(seed)
    centre = np.exp(-((np.indices((6, 6)) - 2.5) ** 2).sum(axis=0) / 4).flatten()
    push, evidence = (centre * rng.gamma(0.7, size=(n, 36)) for _ in range(2))
    push, evidence = (m / m.sum(axis=1, keepdims=True) for m in (push, evidence))
    push *= 1 - planted
    push[:, 0] += planted * rng.gamma(0.7, size=n) / 0.7
    return push, evidence


def test_the_test_keeps_its_level_and_has_power() -> None:
    """On its boundary (push = factor x evidence in law) at most about 5 % of the runs find anything anywhere."""
    wrong = sum(excess_test(*maps(40, s), factor=1.0, draws=200, seed=s).p.min() < 0.05 for s in range(200))
    assert wrong <= 20  # binomial(200, 0.05): 20 or more has probability 0.0027 ... 10 is expected
    assert sum(excess_test(*maps(40, s), draws=200, seed=s).p.min() < 0.05 for s in range(50)) == 0
    found = [excess_test(*maps(40, s, planted=0.15), draws=200, seed=s) for s in range(50)]
    assert sum(t.p[0] < 0.05 for t in found) >= 48
    assert all(int(t.excess.argmax()) == 0 for t in found)


def test_places_are_connected_cells() -> None:
    significant = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
    assert regions(significant) == [[(0, 0), (0, 1), (1, 1)], [(1, 3), (2, 3)], [(3, 0)]]
    push, evidence = (m.reshape(-1, 6, 6) for m in maps(40, 1, planted=0.2))
    facts = judge(Evidence(push, push * 0.5, evidence), 48)
    assert [p["box"] for p in facts["places"]] == [[0, 0, 8, 8]]
    assert facts["places"][0]["push"] == pytest.approx(push[:, 0, 0].mean())
    assert facts["places"][0]["removed"] == pytest.approx(push[:, 0, 0].mean() / 2)
    assert facts["ranking"][0]["cell"] == [0, 0]
    twice = judge(Evidence(push, push, evidence), 48, tests=1000)
    assert twice["places"] == []


def test_targets_are_unlikely_labels() -> None:
    ids = [str(i) for i in range(300)]
    p = torch.linspace(0, 1, 10).expand(300, 10)
    targets = unlikely_labels(p, ids, seed=0)
    assert set(targets) == set(range(5))
    assert unlikely_labels(p[7:9], ids[7:9], seed=0) == targets[7:9]
    assert unlikely_labels(p, ids, seed=1) != targets
    assert unlikely_labels(torch.tensor([[0.9, 0.1]]), ["a"], seed=0) == [1]


def test_find_on_the_tiny_models(tiny, tmp_path) -> None:
    engine = make_engine(tiny)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    facts, found = find(engine, images, list("abcde"), engine.config)
    assert facts["all"]["samples"] == 5
    assert facts["by_class"] == {}
    assert found["push"].shape == (4, 4)
    assert found["push"].sum() == pytest.approx(1)
    assert found["change"].shape == found["change_open"].shape == found["lost"].shape == (16, 16)
    with torch.no_grad():
        again = as_saved((engine.diffusion.decode(engine.diffusion.encode(images)) + 1) / 2)
    assert found["lost"].mean() == pytest.approx((again - images).abs().mean().item(), abs=1e-6)
    same = (engine.probabilities(again).argmax(1) == engine.probabilities(images).argmax(1)).double().mean().item()
    assert facts["redrawn"]["same_answer"]["mean"] == pytest.approx(same)
    json.dumps(facts)
    again, _ = find(engine, images, list("abcde"), engine.config)
    assert again == facts
    with pytest.raises(Exception, match="cannot be read"):
        read_maps(tmp_path)
