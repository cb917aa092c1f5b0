"""Other metrics of the field on paper, and against Quantus itself where definitions agree."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from counterlens.engine.errors import NotFinite, UsageError
from counterlens.engine.metrics import (
    complexity,
    effective_complexity,
    efficient_mprt,
    faithfulness_correlation,
    faithfulness_estimate,
    infidelity,
    irof,
    islands,
    mask_auc,
    monotonicity,
    mprt,
    pointing_game,
    rank_variation,
    region_perturbation,
    relevance_mass,
    relevance_rank,
    sensitivity,
    smoothed,
    sparseness,
    top_k_intersection,
)
from counterlens.engine.metrics.faithfulness import darkest
from counterlens.engine.metrics.masking import mean_ranks
from counterlens.engine.metrics.robust import fall, neighbours, shifted, smooth
from counterlens.engine.metrics.table import GROUPS, METRICS, NEEDS, check_metrics
from tests.engine.metrics.models import Linear, Random, sample

LOGIT: Any = {"quantity": "logit", "baseline": "zero"}
QUIET = {"disable_warnings": True, "display_progressbar": False}


def paper() -> tuple[Linear, Tensor, Tensor]:
    """A 4x4 image of 1 to 16 whose logit is their sum: the image is the perfect map."""
    image = torch.arange(1.0, 17.0).reshape(1, 1, 4, 4)
    return Linear(torch.ones(4, 4)), image, image[:, 0]


# On paper


def test_correlations_of_a_perfect_map_are_one() -> None:
    model, image, saliency = paper()
    assert faithfulness_correlation(model, image, saliency, 1, subset_size=5, runs=9, **LOGIT).item() == pytest.approx(
        1
    )
    for per_step in (1, 3):
        value = faithfulness_estimate(model, image, saliency, 1, per_step=per_step, **LOGIT)
        assert value.item() == pytest.approx(1)
        assert faithfulness_estimate(model, image, -saliency, 1, per_step=per_step, **LOGIT).item() == pytest.approx(-1)
    assert infidelity(model, image, torch.ones(1, 4, 4), 1, patches=(1, 2), **LOGIT).item() == pytest.approx(0)
    tripled = infidelity(model, image, torch.full((1, 4, 4), 3.0), 1, patches=(2,), **LOGIT)
    blocks = torch.tensor([1 + 2 + 5 + 6, 3 + 4 + 7 + 8, 9 + 10 + 13 + 14, 11 + 12 + 15 + 16.0])
    assert tripled.item() == pytest.approx((2 * blocks).square().mean().item())
    assert infidelity(model, image, torch.full((1, 4, 4), 3.0), 1, patches=(2,), scaled=True, **LOGIT).item() < 1e-9


def test_a_constant_effect_has_no_correlation() -> None:
    model, image, saliency = paper()
    flat = faithfulness_correlation(model, image * 0, saliency, 1, subset_size=5, runs=9, **LOGIT)
    assert flat.isnan().all()


def test_monotonicity() -> None:
    image = torch.ones(1, 1, 2, 2)
    saliency = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    rising, falling = Linear(torch.ones(2, 2)), Linear(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert monotonicity(rising, image, saliency, 1, **LOGIT).item() == 1
    assert monotonicity(falling, image, saliency, 1, **LOGIT).item() == 0
    assert monotonicity(falling, image, saliency, 1, rule="share", **LOGIT).item() == 0.75


def test_regions_go_by_their_sums() -> None:
    model, image, saliency = paper()
    found = region_perturbation(model, image, saliency, 1, patch=2, regions=3, **LOGIT)
    assert found.values.tolist() == [[136 - 54, 136 - 54 - 46, 136 - 54 - 46 - 22]]
    assert found.score.item() == pytest.approx((54 + 100 + 122) / 3)
    least = region_perturbation(model, image, saliency, 1, patch=2, order="lerf", **LOGIT)
    assert least.values.tolist() == [[136 - 14, 136 - 14 - 22, 54, 0]]
    # Sides that the patch does not divide: a pixel is cut off at both borders.
    odd = region_perturbation(model, image, saliency, 1, patch=3, regions=1, **LOGIT)
    assert odd.shares.tolist() == [9 / 16] or odd.values.shape == (1, 1)


def test_irof_with_segments_of_any_number() -> None:
    model, image, saliency = paper()
    two = torch.zeros(1, 4, 4, dtype=torch.long)
    two[:, 2:] = 1
    three = two.clone()
    three[:, 3] = 2
    shares = [(136 - 100) / 136, 0]
    alone = irof(model, image, saliency, 1, segments=two, **LOGIT)
    assert alone.item() == pytest.approx(2 - sum(shares) / 2)
    # Beside an image of three segments: not a number changes.
    both = irof(model, image.repeat(2, 1, 1, 1), saliency.repeat(2, 1, 1), 1, segments=torch.cat([two, three]), **LOGIT)
    assert both[0].item() == alone.item()
    assert irof(model, image, saliency, 1, segments=lambda x: two[0], **LOGIT).item() == alone.item()


def test_values_do_not_depend_on_batches() -> None:
    images, maps = sample(3)
    model = Random()
    for metric, options in (
        (faithfulness_correlation, {"subset_size": 7, "runs": 5}),
        (faithfulness_estimate, {"per_step": 9}),
        (irof, {"patch": 3}),
        (infidelity, {"patches": (2, 3)}),
    ):
        whole = metric(model, images, maps, 1, seeds=[4, 5, 6], batch_size=64, **options)
        alone = [
            metric(model, images[i : i + 1], maps[i : i + 1], 1, seeds=[4 + i], batch_size=3, **options)
            for i in range(3)
        ]
        assert torch.allclose(whole, torch.cat(alone), atol=1e-5), metric


def test_shapes_of_maps() -> None:
    one, many = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    one[0, 1:4, 1:3] = 1.0  # six pixels
    many[0, ::3, ::3] = 1.0  # nine of them, each alone
    assert islands(one, 6 / 64).item() == 6
    assert islands(many, 9 / 64).item() == 1
    diagonal = torch.eye(8)[None]
    assert islands(diagonal, 8 / 64).item() == 8
    assert rank_variation(one).item() < rank_variation(many).item()
    assert rank_variation(torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))).item() == pytest.approx(
        1 / 3, abs=0.02
    )
    assert sparseness(torch.ones(1, 4, 4)).item() == pytest.approx(0, abs=1e-9)
    assert complexity(torch.ones(1, 4, 4)).item() == pytest.approx(np.log(16), abs=1e-9)
    assert complexity(torch.zeros(1, 4, 4)).isnan().all()
    assert effective_complexity(one).item() == 6


def test_maps_are_moved_and_smoothed() -> None:
    saliency = torch.arange(9.0).reshape(1, 3, 3)
    assert shifted(saliency, 1, 0).tolist() == [[[0, 1, 2], [0, 1, 2], [3, 4, 5]]]
    assert shifted(saliency, 0, -1).tolist() == [[[1, 2, 2], [4, 5, 5], [7, 8, 8]]]
    assert len(list(neighbours(saliency))) == 8
    assert len(list(neighbours(saliency[:, :1]))) == 2
    assert smooth(saliency)[0, 1, 1].item() == 4
    assert fall(torch.tensor([0.9]), torch.tensor([0.7]), True) == pytest.approx(0.2)
    assert fall(torch.tensor([0.1]), torch.tensor([0.3]), False) == pytest.approx(0.2)


def test_ranks_share_ties() -> None:
    assert mean_ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[3.5, 1, 3.5, 2]]


def test_localisation_on_paper() -> None:
    saliency = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    inside = torch.tensor([[[True, False], [True, False]]])
    assert pointing_game(saliency, inside).item() == 1
    assert relevance_mass(saliency, inside).item() == pytest.approx(0.6)
    assert relevance_rank(saliency, inside).item() == 0.5
    assert mask_auc(saliency, inside).item() == 0.75
    assert top_k_intersection(saliency, inside, 1).item() == 1
    assert top_k_intersection(saliency, inside, 2, relative=True).item() == 1


class Net(nn.Module):
    """Two layers with weights that can be made random."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).relu().mean((2, 3)))


def gradients(module: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        chosen = module(images).gather(1, target[:, None]).sum()
    return torch.autograd.grad(chosen, images)[0]


def test_sensitivity_is_relative_to_the_map() -> None:
    images, _ = sample(2)
    found = sensitivity(lambda x, _: x.mean(1), images, images.mean(1), torch.zeros(2, dtype=torch.long), samples=4)
    assert found.changes.shape == (2, 4)
    assert (found.maximum >= found.mean).all()
    assert (found.mean > 0).all()
    given = sensitivity(
        lambda x, _: x.mean(1),
        images,
        images.mean(1),
        torch.zeros(2, dtype=torch.long),
        noise=torch.zeros(1, 2, 3, 9, 7),
    )
    assert given.maximum.tolist() == [0, 0]
    with pytest.raises(NotFinite, match="explain"):
        sensitivity(lambda x, _: x.mean(1) * torch.nan, images, images.mean(1), torch.zeros(2, dtype=torch.long))


def test_random_layers_leave_the_module_as_it_was() -> None:
    torch.manual_seed(0)
    module, (images, _) = Net().eval(), sample(2)
    target = torch.tensor([0, 1])
    before, state = gradients(module, images, target), torch.get_rng_state()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    found = mprt(gradients, module, images, before, target)
    assert found.layers == ["head", "features"]
    assert found.correlations.shape == (2, 2)
    assert (found.correlations.abs() < 1).all()
    assert torch.equal(found.last, found.correlations[:, 1])
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    alone = mprt(gradients, module, images, before, target, order="independent")
    assert torch.equal(alone.correlations[:, 1], found.correlations[:, 0])  # the head, alone random in both
    mean = smoothed(gradients, samples=3)(module, images, target)
    assert mean.shape == before.shape
    assert torch.equal(mean, smoothed(gradients, samples=3)(module, images, target))
    with pytest.raises(UsageError, match="no layer"):
        mprt(gradients, nn.Flatten(), images, before, target)


def test_what_does_not_fit() -> None:
    model, (images, maps) = Random(), sample(2)
    inside = torch.zeros(2, 9, 7, dtype=torch.bool)
    inside[0, 0, 0] = True
    for message, call in (
        ("subset_size, runs", lambda: faithfulness_correlation(model, images, maps, subset_size=64)),
        ("subsets", lambda: faithfulness_correlation(model, images, maps, subsets=torch.full((2, 3, 4), 63))),
        ("per_step", lambda: faithfulness_estimate(model, images, maps, per_step=0)),
        ("similarity", lambda: faithfulness_estimate(model, images, maps, similarity="kendall")),  # type: ignore[arg-type]
        ("rule", lambda: monotonicity(model, images, maps, rule="most")),  # type: ignore[arg-type]
        ("order", lambda: region_perturbation(model, images, maps, order="random")),  # type: ignore[arg-type]
        ("segments", lambda: irof(model, images, maps, segments=torch.zeros(2, 3, 3, dtype=torch.long))),
        ("gaps, got .* sample 0", lambda: irof(model, images, maps, segments=torch.full((2, 9, 7), 3))),
        ("normalize", lambda: infidelity(model, images, maps, normalize="min")),  # type: ignore[arg-type]
        ("unknown option colour", lambda: infidelity(model, images, maps, colour=1)),  # type: ignore[call-arg]
        ("sample 1", lambda: irof(model, images, torch.stack([maps[0], maps[1] * torch.nan]))),
        ("mask 1 has no pixel", lambda: pointing_game(maps, inside)),
        ("masks: expected", lambda: mask_auc(maps, inside[:, :3])),
        ("mask 0 has all", lambda: mask_auc(maps, torch.ones(2, 9, 7, dtype=torch.bool))),
        ("k: expected 1 to 63", lambda: top_k_intersection(maps, torch.ones(2, 9, 7, dtype=torch.bool), 64)),
        ("saliency", lambda: sparseness(maps * torch.nan)),
        ("share", lambda: islands(maps, 0)),
        ("bins", lambda: efficient_mprt(gradients, Net(), images, maps, torch.zeros(2).long(), bins=1)),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_groups_of_metrics() -> None:
    assert {metric.group for metric in METRICS.values()} == set(GROUPS)
    assert check_metrics(["shape", "irof", "islands"])[-1] == "irof"
    assert set(check_metrics(["all"], [])) == {n for n, m in METRICS.items() if m.group not in NEEDS}
    with pytest.raises(UsageError, match="pointing_game needs masks"):
        check_metrics(["pointing_game"], ["judge"])
    with pytest.raises(UsageError, match="expected groups"):
        check_metrics(["iorf"])


# Against Quantus


@pytest.fixture(scope="module")
def quantus() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("quantus", reason="needs quantus: pip install '.[comparisons]'")
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # type: ignore[attr-defined]  # Quantus 0.6 asks for the name that NumPy dropped
    return module


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    images, _ = sample(3, (16, 12))
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    model = Net().eval()
    model.head.weight.data *= 50  # or hiding pixels would change little more than rounding does
    maps = torch.rand(images.shape, generator=g) - 0.3
    target = torch.tensor([0, 3, 1])
    inside = torch.zeros(3, 16, 12, dtype=torch.bool)
    for i in range(3):
        inside[i, 2 : 8 + i, 3:9] = True
    return {"model": model, "images": images, "maps": maps, "target": target, "inside": inside}


def theirs(metric: Any, case: dict[str, Any], maps: Tensor | None = None, **more: Any) -> Tensor:
    chosen = case["maps"] if maps is None else maps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = metric(
            model=case["model"], x_batch=case["images"].numpy(), y_batch=case["target"].numpy(),
            a_batch=chosen.numpy().copy(), softmax=True, channel_first=True, device="cpu", **more,
        )  # fmt: skip
    return torch.tensor(np.asarray(values, dtype=float))


def ours(function: Any, case: dict[str, Any], **options: Any) -> Tensor:
    return function(
        case["model"], case["images"], case["maps"], case["target"], baseline=darkest(case["images"]), **options
    )


def close(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5), (a, b)


def test_quantus_faithfulness(quantus: Any, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    choice = np.random.choice

    def remember(*args: Any, **options: Any) -> Any:
        drawn.append(choice(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(np.random, "choice", remember)
    expected = theirs(quantus.FaithfulnessCorrelation(
        nr_runs=9, subset_size=50, abs=False, return_aggregate=False, **QUIET), case)  # fmt: skip
    subsets = torch.tensor(np.stack(drawn)).reshape(9, 3, 50).transpose(0, 1)
    close(ours(faithfulness_correlation, case, subsets=subsets, channels="apart"), expected)
    estimate = quantus.FaithfulnessEstimate(features_in_step=16, abs=False, perturb_baseline="black", **QUIET)
    close(ours(faithfulness_estimate, case, per_step=16, channels="apart"), theirs(estimate, case))
    for patch in (4, 5):
        found = ours(region_perturbation, case, patch=patch, regions=6)
        expected = theirs(quantus.RegionPerturbation(patch_size=patch, regions_evaluation=6, **QUIET), case)
        close(found.full[:, None] - found.values, expected)  # type: ignore[attr-defined]
    squares = quantus.Infidelity(perturb_patch_sizes=[2, 4], n_perturb_samples=1, **QUIET)
    close(ours(infidelity, case, patches=(2, 4), cumulative=True), theirs(squares, case))


def test_quantus_irof(quantus: Any, case: dict[str, Any]) -> None:
    slic = pytest.importorskip("skimage.segmentation", reason="needs scikit-image, which comes with quantus").slic
    expected = []
    for i in range(3):
        black = case["images"][i].min().item()
        metric = quantus.IROF(perturb_func=lambda arr, mask, black=black, **_: np.where(mask, black, arr), **QUIET)
        one = case | {"images": case["images"][i : i + 1], "target": case["target"][i : i + 1]}
        expected.append(theirs(metric, one, case["maps"][i : i + 1]))
    found = ours(irof, case, segments=lambda x: torch.tensor(slic(x.permute(1, 2, 0).numpy(), start_label=0)))
    close(found, torch.cat(expected))


def test_quantus_maps(quantus: Any, case: dict[str, Any]) -> None:
    maps, inside = case["maps"], case["inside"]
    unit = maps / maps.abs().max()
    close(sparseness(unit), theirs(quantus.Sparseness(**QUIET), case))
    close(complexity(maps), theirs(quantus.Complexity(**QUIET), case))
    close(effective_complexity(unit, 0.3), theirs(quantus.EffectiveComplexity(eps=0.3, **QUIET), case))
    one = maps[:, :1].contiguous()
    given = {"s_batch": inside[:, None].numpy()}
    for metric, value in (
        (quantus.PointingGame(**QUIET), pointing_game(one[:, 0], inside)),
        (quantus.RelevanceMassAccuracy(abs=True, **QUIET), relevance_mass(one[:, 0].abs(), inside)),
        (quantus.RelevanceRankAccuracy(**QUIET), relevance_rank(one[:, 0], inside)),
        (quantus.AUC(**QUIET), mask_auc(one[:, 0], inside)),
        (quantus.TopKIntersection(k=40, **QUIET), top_k_intersection(one[:, 0], inside, 40)),
        (quantus.TopKIntersection(k=40, concept_influence=True, **QUIET),
         top_k_intersection(one[:, 0], inside, 40, relative=True)),
    ):  # fmt: skip
        close(value, theirs(metric, case, one, **given))


def test_quantus_sensitivity_and_randomisation(quantus: Any, case: dict[str, Any]) -> None:
    model, images, target = case["model"], case["images"], case["target"]
    own = gradients(model, images, target)

    def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> Any:
        return gradients(model, torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets)).numpy()

    options = {"nr_samples": 4, "lower_bound": 0.05, **QUIET}
    drawn = np.random.RandomState(1)
    noise = torch.tensor(
        np.stack([drawn.uniform(-0.05, 0.05, size=(3, images[0].numel())).reshape(images.shape) for _ in range(4)])
    )
    found = sensitivity(lambda x, y: gradients(model, x, y), images, own, target, noise=noise)
    np.random.seed(1)
    close(found.maximum, theirs(quantus.MaxSensitivity(**options), case, own, explain_func=explain))
    np.random.seed(1)
    close(found.mean, theirs(quantus.AvgSensitivity(**options), case, own, explain_func=explain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = quantus.MPRT(abs=False, normalise=False, **QUIET)(
            model=model, x_batch=images.numpy(), y_batch=target.numpy(), a_batch=own.numpy().copy(),
            explain_func=explain, channel_first=True, device="cpu",
        )  # fmt: skip
    same = mprt(gradients, model, images, own, target)
    for i, name in enumerate(same.layers):
        close(same.correlations[:, i], torch.tensor(layers[name]))
    rise = theirs(
        quantus.EfficientMPRT(complexity_func_kwargs={"n_bins": 30}, abs=True, normalise=True, **QUIET),
        case, own, explain_func=explain,
    )  # fmt: skip
    close(efficient_mprt(lambda m, x, y: gradients(m, x, y).abs(), model, images, own.abs(), target, bins=30), rise)


def test_quantus_monotonicity_is_another_thing(quantus: Any, case: dict[str, Any]) -> None:
    """Theirs is always true: it fills pixels with the baseline that they have already."""
    said = theirs(quantus.Monotonicity(features_in_step=16, **QUIET), case)
    assert said.tolist() == [1, 1, 1]
    found = ours(monotonicity, case, per_step=16, channels="apart")
    assert not found.all()
    assert "quantus" in sys.modules


def test_no_images_have_no_scores() -> None:
    images, maps, target = torch.rand(0, 3, 8, 8), torch.rand(0, 8, 8), torch.zeros(0, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert faithfulness_correlation(model, images, maps, target, subset_size=4).shape == (0,)
    assert region_perturbation(model, images, maps, target, patch=4).score.shape == (0,)
    assert infidelity(model, images, maps, target).shape == (0,)
    assert sensitivity(lambda x, _: x.mean(1), images, maps, target).maximum.shape == (0,)
