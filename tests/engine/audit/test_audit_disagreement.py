"""The disagreement map: it observes the very run that is reported, its test keeps its promise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterlens.engine.audit.disagreement import (
    FACTOR,
    contrast,
    find,
    judge,
    read_maps,
    regions,
    sign_test,
    unlikely_labels,
)
from counterlens.engine.audit.statistics import STATISTICS
from counterlens.engine.audit.watching import Observer, observe, shares
from counterlens.engine.config import Config, StepOptions
from counterlens.engine.errors import CounterlensError
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.images.files import as_saved
from counterlens.engine.models.freezing import frozen
from counterlens.kernels.consensus import consensus_filter
from tests.engine.audit.test_audit import make_engine
from tests.engine.guidance.test_cheap_gradients import decoder

SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.2, "angle_deg": 45.0}


@pytest.mark.parametrize("gradient", ["exact", "detached"])
def test_the_score_is_the_gradient_of_log_p(tiny64, gradient: str) -> None:
    """Against autograd through UNet, decoder and classifier, written from the formula."""
    diffusion, classifier = tiny64
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, *diffusion.latent_shape, generator=g, dtype=torch.float64)
    image = torch.rand(3, 3, 16, 16, generator=g, dtype=torch.float64)
    timestep, target = torch.tensor([300, 300, 300]), torch.tensor([1, 5, 7])
    steps = [
        GuidedStep(diffusion, classifier, StepOptions(gradient=gradient), with_directions=w) for w in (True, False)
    ]
    with frozen(*diffusion.modules(), classifier.module):
        given = (z, timestep, timestep - 50, diffusion.condition(target), image, target)
        (*out, score, reference), plain = (step(*given, **SCALES) for step in steps)
        abar = diffusion.alphas_cumprod[300]
        leaf = z.clone().requires_grad_()
        eps = diffusion.predict_noise(leaf, timestep, diffusion.null_condition(3))
        eps_u = eps.detach() if gradient == "detached" else eps
        x0 = (diffusion.decode((leaf - (1 - abar).sqrt() * eps_u) / abar.sqrt()) + 1) / 2
        (expected,) = torch.autograd.grad(classifier.log_prob(x0, target).sum(), leaf)
        eps_c = diffusion.predict_noise(z, timestep, diffusion.condition(target))
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    torch.testing.assert_close(shares(score), shares(-expected), rtol=1e-6, atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(score.flatten(1), -expected.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(reference, eps_c - eps.detach())


def test_shares_and_what_the_filter_removes(tiny) -> None:
    settings = make_engine(tiny).settings(Config())
    g = torch.Generator().manual_seed(1)
    score, reference = (torch.randn(2, 3, 4, 4, 4, generator=g) for _ in range(2))  # two steps of three samples
    observer = Observer(5, settings)
    for step in range(2):
        observer([4, 0, 2], score[step], reference[step])
    seen = observer.seen([0, 2])
    for maps in (seen.push, seen.evidence):
        assert maps.sum(axis=(1, 2)) == pytest.approx([1, 1])
    assert np.isnan(observer.seen([1]).push).all()  # nothing was seen of it
    expected = []
    for step in range(2):
        kept = consensus_filter(score[step], reference[step], settings.angle)[1]
        expected.append(shares(score[step]) * ~kept)
    assert seen.removed == pytest.approx(torch.stack(expected).mean(0)[1:].numpy())
    assert 0 < seen.removed.sum() < seen.push.sum()
    assert not shares(torch.zeros(1, 4, 4, 4)).any()


RUNS: list[dict[str, Any]] = [
    *({"speed": s, "mode": m} for s in ("exact", "balanced", "fast") for m in ("realistic", "audit")),
    *({"solver": s, "guidance_every": e} for s in ("ddim", "dpm++", "unipc") for e in (1, 2)),
    {"filter": "project", "angle": 40}, {"filter": "global", "angle": 40}, {"filter": "off"}, {"noise": "inversion"},
    {"spacing": "logsnr", "steps": 8}, {"distance": "latent"}, {"gradient": "detached", "guidance_decoder": "tiny"},
    {"guidance_start": 0.2, "guidance_end": 0.8, "steps": 12},
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "count"), [*((r, 3) for r in RUNS), ({}, 1), ({"solver": "unipc", "guidance_every": 2}, 19)], ids=str
)
def test_what_is_observed_is_the_run_that_is_reported(tiny, given: dict[str, Any], count: int) -> None:
    """The same pixels with and without, and the filter's own shares come out of what was observed, step by step."""
    engine = make_engine(tiny, guidance_decoder=decoder())
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    config = Config(**given)
    settings = engine.settings(config)
    kept: list[list[float]] = [[] for _ in images]

    def observe(samples: list[int], score: Tensor, reference: Tensor) -> None:
        mask = consensus_filter(score, reference, settings.angle, mode=settings.filter)[1]
        for i, share in zip(samples, mask.float().flatten(1).mean(1).tolist(), strict=True):
            kept[i].append(share)

    plain = engine.counterfactual(images, config=config)
    watched = engine.counterfactual(images, config=config, observe=observe)
    assert torch.equal(watched.images, plain.images)
    assert torch.equal(watched.kept_fraction.nan_to_num(-1), plain.kept_fraction.nan_to_num(-1))
    for i, shares_kept in enumerate(kept):
        reported = watched.kept_fraction[i]
        assert shares_kept == pytest.approx(reported[reported.isfinite()].tolist(), abs=1e-6)
    assert not any(watched.errors)


def test_a_sample_that_fails_is_left_out(tiny) -> None:
    engine = make_engine(tiny)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    targets = engine.probabilities(images).topk(2, dim=1).indices[:, 1].tolist()
    whole, _, good = observe(engine, images, targets, engine.config)
    assert good == [0, 1, 2, 3]
    broken = images.clone()
    broken[1] = torch.nan
    seen, made, good = observe(engine, broken, targets, engine.config)
    assert good == [0, 2, 3]
    assert "NaN" in str(made.errors[1])
    assert seen.push == pytest.approx(whole.push[good])
    with pytest.raises(CounterlensError, match="disagreement: no two counterfactuals of 2"):
        observe(engine, broken[:2], targets[:2], engine.config)
    with pytest.raises(CounterlensError, match=r"disagreement: no two counterfactuals of 2 to look at: .*NaN"):
        find(engine, broken[:2], ["a", "b"], engine.config)


def maps(n: int, seed: int, planted: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Push and evidence of n samples over 6x6 places from the same law; `planted` moves push to the first place."""
    rng = np.random.default_rng(seed)
    centre = np.exp(-((np.indices((6, 6)) - 2.5) ** 2).sum(axis=0) / 4).flatten()
    push, evidence = (centre * rng.gamma(0.7, size=(n, 36)) for _ in range(2))
    push, evidence = (m / m.sum(axis=1, keepdims=True) for m in (push, evidence))
    push *= 1 - planted
    push[:, 0] += planted * rng.gamma(0.7, size=n) / 0.7
    return push, evidence


def excess_test(push: np.ndarray, evidence: np.ndarray, factor: float = FACTOR, seed: int = 0) -> Any:
    return sign_test(contrast(push, evidence, factor), draws=200, seed=seed)


def test_the_test_keeps_its_level_and_has_power() -> None:
    """On its boundary (push = factor x evidence in law) at most about 5 % of the runs find anything anywhere."""
    wrong = sum(excess_test(*maps(40, s), factor=1.0, seed=s).p.min() < 0.05 for s in range(200))
    assert wrong <= 20  # binomial(200, 0.05): 20 or more has probability 0.0027 ... 10 is expected
    assert sum(excess_test(*maps(40, s), seed=s).p.min() < 0.05 for s in range(50)) == 0
    found = [excess_test(*maps(40, s, planted=0.15), seed=s) for s in range(50)]
    assert sum(t.p[0] < 0.05 for t in found) >= 48
    assert all(int(t.excess.argmax()) == 0 for t in found)


def test_ties_are_no_rarity() -> None:
    """Four samples of 300 differ at all: a sixteenth of all draws give what was seen, whatever rounding says."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        d = np.zeros((300, 40))
        d[rng.choice(300, 4, replace=False), 0] = rng.uniform(0.001, 0.03, 4)
        assert sign_test(d, draws=400).p[0] == pytest.approx(1 / 16, abs=0.04)
    alike = sign_test(np.full((4, 40), 0.02), draws=400)
    assert alike.p == pytest.approx(1 / 16, abs=0.04)


def test_places_are_connected_cells() -> None:
    significant = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
    assert regions(significant) == [[(0, 0), (0, 1), (1, 1)], [(1, 3), (2, 3)], [(3, 0)]]
    push, evidence = (m.reshape(-1, 6, 6) for m in maps(40, 1, planted=0.2))
    nothing = {f"{name} statistics": np.zeros((40, len(STATISTICS))) for name in ("push", "evidence")}
    each = {"push": push, "removed": push * 0.5, "evidence": evidence, **nothing}
    facts = judge(each, 48)
    assert [p["box"] for p in facts["places"]] == [[0, 0, 8, 8]]
    assert facts["places"][0]["push"] == pytest.approx(push[:, 0, 0].mean())
    assert facts["places"][0]["removed"] == pytest.approx(push[:, 0, 0].mean() / 2)
    assert facts["ranking"][0]["cell"] == [0, 0]
    twice = judge(each, 48, tests=1000)
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
