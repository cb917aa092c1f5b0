"""Perturbation curves and MSI against curves done on paper, and against the oracle of the kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from counterlens.engine.errors import UsageError
from counterlens.engine.metrics import group_odds, msi, perturbation_curve
from counterlens.kernels.curve import curve_scores
from counterlens.kernels.perturb import perturb, rank_pixels
from tests.engine.metrics.models import Linear, Needs, Random, sample


def four(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 2, 2)


def test_linear_classifier_on_paper() -> None:
    # Image 1 2 / 3 4 with weights 1: the logit is the sum of what is shown.
    image, weight = four([1, 2, 3, 4]), torch.ones(2, 2)
    saliency = four([0.0, 0.25, 0.5, 1.0])[:, 0]
    curves = perturbation_curve(
        Linear(weight), image, saliency, 1, quantity="logit", baseline="zero", thresholds=[0, 0.25, 0.5, 0.51, 1]
    )
    assert curves.keep is not None
    assert curves.remove is not None
    assert curves.keep.tolist() == [[10, 9, 7, 4, 4]]
    assert curves.remove.tolist() == [[0, 1, 3, 6, 6]]
    assert curves.areas.tolist() == [[1, 0.75, 0.5, 0.25, 0.25]]
    assert curves.full.tolist() == [10]
    assert curves.target.tolist() == [1]
    # Whole image, shown 3, 2 and 1 pixels; hidden 4 (nothing), 3, 2 and 1: the whole image and 0.51 = 1 once.
    assert (curves.forwards, curves.asked) == (8, 11)
    ranked = perturbation_curve(
        Linear(weight), image, saliency, 1, quantity="logit", baseline=1.0, order="rank", counts=[0, 1, 4, 2]
    )
    assert ranked.keep is not None
    assert ranked.keep.tolist() == [[4, 7, 10, 9]]
    assert ranked.abscissae.tolist() == [[1, 0.75, 0, 0.5]]
    assert math.isclose(
        float(perturbation_curve(Linear(weight), image, saliency, 1, thresholds=[1]).full),
        1 / (1 + math.exp(-10)),
        rel_tol=1e-6,
    )


def test_msi_on_paper() -> None:
    # A tight map on a 4x4 image whose class hangs on two pixels: shown they are enough, hidden nothing is left.
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[0, :2] = True
    image = torch.ones(1, 3, 4, 4)
    tight = region.float()[None]
    result = msi(Needs(region), image, tight, 1, baseline="zero", steps=3)
    assert torch.allclose(result.base_score, torch.ones(1, dtype=torch.float64))
    assert result.mask_penalty.tolist() == [2 / 16]
    assert torch.allclose(result.score, torch.tensor([1 - 2 / 16], dtype=torch.float64))
    # Area form: 8, 4 and 0 pixels; the first two hold the region, an empty mask neither shows nor hides it.
    # Delta = 1, 1, -1: half of 1, half of the mean 0.5 * (1 + 0) = 0.5.
    assert torch.allclose(result.base_score_area, torch.tensor([0.75], dtype=torch.float64))
    assert result.sufficient_area.tolist() == [4 / 16]
    # K = 1 and alpha_min = 1: Delta itself.
    for one in (msi(Needs(region), image, tight, 1, steps=1, baseline="zero"),
                msi(Needs(region), image, tight, 1, alpha_min=1, baseline="zero")):  # fmt: skip
        assert torch.allclose(one.base_score, torch.ones(1, dtype=torch.float64))
        assert one.curves.abscissae.shape == (1, 1)
    # The map's second level is marked at 0.5 but not at 0.75 and 1: Delta is 1, then -1 and -1.
    two_levels = tight.clone()
    two_levels[0, 3, 3], two_levels[0, 0, 0] = 1, 0.6
    result = msi(Needs(region), image, two_levels, 1, baseline="zero", steps=3)
    # At 0.75 and 1 pixel (0, 0) is hidden in Ins (0) and shown in Del, whose other pixel is hidden (0): Delta = 0.
    assert torch.allclose(result.base_score, torch.tensor([0.5 + 0.5 * 0.25], dtype=torch.float64))


def test_constant_map_marks_nothing_with_one_warning() -> None:
    image = torch.ones(2, 3, 4, 4)
    model = Needs(torch.ones(4, 4, dtype=torch.bool))
    for normalize in ("minmax", "none"):
        with pytest.warns(UserWarning, match="2 of 2 maps are constant") as caught:
            result = msi(model, image, torch.full((2, 4, 4), 0.7), 1, baseline="zero", normalize=normalize)
        assert len(caught) == 1
        assert result.mask_penalty.tolist() == [0, 0]
        assert torch.allclose(result.base_score, torch.full((2,), -1.0, dtype=torch.float64))
        assert result.curves.constant.tolist() == [True, True]


def test_ties() -> None:
    image = four([1, 2, 4, 8])
    saliency = four([1, 1, 1, 0])[:, 0]
    model = Linear(torch.ones(2, 2))

    def first_pixel(**arguments: object) -> float:
        curves = perturbation_curve(
            model, image, saliency, 1, quantity="logit", baseline="zero", order="rank", counts=[1], **arguments
        )
        assert curves.keep is not None
        return float(curves.keep)

    assert first_pixel(ties="first") == 1
    assert first_pixel(ties="last") == 4
    assert {first_pixel(seeds=s) for s in range(30)} == {1, 2, 4}
    by_value = perturbation_curve(model, image, saliency, 1, quantity="logit", baseline="zero", thresholds=[0.5])
    assert by_value.keep is not None
    assert float(by_value.keep) == 7


@pytest.mark.parametrize("order", ["value", "rank"])
def test_equals_the_kernels_oracle(order: str) -> None:
    images, saliency = sample()
    model, levels = Random(), torch.linspace(0.5, 1, 6).double()
    low, span = saliency.amin((1, 2), keepdim=True), saliency.amax((1, 2), keepdim=True)
    unit = (saliency - low) / (span - low)
    rank = rank_pixels(saliency, [5, 6, 7]) if order == "rank" else None
    inputs = perturb(images, 0.25, unit, levels, order=order, rank=rank, backend="reference")
    targets = model(images).argmax(1)
    expected = curve_scores(model(inputs.flatten(0, 2)).unflatten(0, (3, 2, 6)), targets, levels, backend="reference")
    curves = perturbation_curve(
        model, images, saliency, baseline=0.25, order=order, thresholds=levels, seeds=[5, 6, 7], batch_size=7
    )
    assert curves.keep is not None
    assert curves.remove is not None
    assert torch.allclose(torch.stack([curves.keep, curves.remove], 1).float(), expected.probability, atol=1e-6)
    scores = msi(model, images, saliency, baseline=0.25, steps=6, seeds=[5, 6, 7])
    got = scores.base_score if order == "value" else scores.base_score_area
    assert torch.allclose(got.float(), expected.base_score, atol=1e-6)
    if order == "value":
        assert torch.allclose(scores.mask_penalty.float(), (unit >= 0.5).float().mean((1, 2)))


def test_batch_size_and_neighbours_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    images, saliency = sample(5)
    saliency[1] = (saliency[1] * 3).round()  # few levels: fewer forwards than its neighbours
    results = [msi(Random(), images, saliency, batch_size=b, seeds=list(range(5))) for b in (1, 7, 64)]
    alone = msi(Random(), images[2:3], saliency[2:3], seeds=[2])
    monkeypatch.setattr("counterlens.engine.metrics.curves.CHUNK_BYTES", 1)  # each batch is written on its own
    results += [msi(Random(), images, saliency, batch_size=b, seeds=list(range(5))) for b in (1, 7)]
    for r in results[1:]:
        assert torch.allclose(r.score, results[0].score, atol=1e-5)
        assert torch.allclose(r.base_score_area, results[0].base_score_area, atol=1e-5)
        assert r.curves.forwards == results[0].curves.forwards
    assert torch.allclose(alone.base_score_area, results[0].base_score_area[2:3], atol=1e-5)


def test_thresholds_of_each_sample_in_any_order() -> None:
    images, saliency = sample(3)
    saliency = (saliency * 6).round() / 6  # ties, and thresholds that equal values
    levels = torch.tensor([[0.5, 0.0, 1.0, 0.5], [1.0, 0.9, 0.1, 0.0], [1 / 3, 2 / 3, 1 / 6, 0.5]], dtype=torch.float64)
    model = Random()
    curves = perturbation_curve(model, images, saliency, 2, thresholds=levels, normalize="none", baseline="zero")
    assert curves.keep is not None
    assert curves.remove is not None
    for i in range(3):
        for k in range(4):
            shown = saliency[i] >= levels[i, k].float()
            for mask, got in ((shown, curves.keep), (~shown, curves.remove)):
                expected = model(images[i : i + 1] * mask).softmax(1)[0, 2]
                assert abs(expected.item() - got[i, k].item()) < 1e-6
            assert curves.areas[i, k].item() == pytest.approx(shown.double().mean().item())


def test_forwards_are_full_batches_and_masks_go_once() -> None:
    images, saliency = sample(4)
    model = Random()
    model.train()
    binary = (saliency > 0.5).float()
    result = msi(model, images, binary, steps=16, area=False, batch_size=3)
    assert model.training
    # Every threshold gives the same mask: whole image, shown, hidden.
    assert result.curves.forwards == 12
    assert result.curves.asked == 4 + 4 * 2 * 16
    assert model.seen == [3, 1, 3, 3, 2]


def test_channels_apart() -> None:
    images, _ = sample(2, (3, 4))
    saliency = torch.rand(images.shape, generator=torch.Generator().manual_seed(3))
    model = Random()
    curves = perturbation_curve(
        model, images, saliency, channels="apart", order="rank", counts=[5], baseline=torch.tensor([0.1, 0.2, 0.3]),
        mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4],
    )  # fmt: skip
    shown = torch.zeros(2, 36, dtype=torch.bool).scatter_(1, saliency.flatten(1).topk(5).indices, True)
    baseline = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    mixed = torch.where(shown.view_as(images), images, baseline)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]])[:, :, None, None]
    targets = model((images - mean) / std).argmax(1)
    expected = model((mixed - mean) / std).softmax(1).gather(1, targets[:, None])
    assert curves.keep is not None
    assert torch.allclose(curves.keep.float(), expected, atol=1e-6)


@pytest.mark.parametrize("baseline", ["mean", "blur", "noise", 0.5])
def test_baselines(baseline: str | float) -> None:
    images, saliency = sample(2, (16, 16))
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x.mean((2, 3))

    perturbation_curve(model, images, saliency, baseline=baseline, order="rank", counts=[0], keep="above", seeds=[3, 4])
    hidden = seen[1]
    if baseline == "mean":
        assert torch.allclose(hidden, images.mean((2, 3), keepdim=True).expand_as(images))
    elif baseline == "blur":
        assert torch.allclose(hidden.mean((2, 3)), images.mean((2, 3)), atol=0.05)
        assert hidden.var() < images.var() / 4
    elif baseline == "noise":
        swapped: list[Tensor] = []
        perturbation_curve(
            lambda x: swapped.append(x.clone()) or x.mean((2, 3)), images.flip(0), saliency, baseline="noise",
            order="rank", counts=[0], keep="above", seeds=[4, 3],
        )  # fmt: skip
        assert torch.equal(swapped[1].flip(0), hidden)
        assert not torch.equal(hidden[0], hidden[1])
    else:
        assert (hidden == 0.5).all()


def test_quantities() -> None:
    images, saliency = sample(4)
    model = Random()
    logits = model(images)
    p = logits.softmax(1)
    target = logits.argmax(1)
    whole = {q: perturbation_curve(model, images, saliency, thresholds=[1], quantity=q).full.float() for q in
             ("probability", "logit", "log_prob")}  # fmt: skip
    assert torch.allclose(whole["probability"], p.amax(1))
    assert torch.allclose(whole["logit"], logits.amax(1))
    assert torch.allclose(whole["log_prob"], p.amax(1).log(), atol=1e-6)
    inside = p[:, [1, 3]].sum(1)
    odds = perturbation_curve(model, images, saliency, thresholds=[1], quantity=group_odds([1, 3], of="members"))
    assert torch.allclose(odds.full.float(), inside, atol=1e-6)
    of_target = perturbation_curve(
        model, images, saliency, thresholds=[1], quantity=group_odds([1, 3], form="log_odds")
    ).full.float()
    sign = torch.where((target == 1) | (target == 3), 1.0, -1.0)
    assert torch.allclose(of_target, sign * (inside.log() - (1 - inside).log()), atol=1e-5)


def test_protocol_classifiers_and_outputs_with_logits(tiny) -> None:
    _, classifier = tiny
    images = torch.rand(2, 3, 16, 16)
    saliency = torch.rand(2, 16, 16)

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    results = [
        perturbation_curve(c, images, saliency, thresholds=[0.5])
        for c in (classifier, classifier.module, lambda x: Output(classifier.module(x)))
    ]
    assert torch.equal(results[0].full, results[1].full)
    assert torch.equal(results[0].full, results[2].full)
    classifier.link = "sigmoid"
    try:
        one = perturbation_curve(classifier, images, saliency, 3, thresholds=[0.5])
    finally:
        classifier.link = "softmax"
    assert torch.allclose(one.full.float(), classifier.module(images)[:, 3].sigmoid())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"saliency": torch.rand(2, 8, 7)}, ["saliency", "[2, 9, 7]", "[2, 8, 7]"]),
        ({"saliency": torch.rand(2, 3, 9, 7)}, ["saliency", "[2, 3, 9, 7]", "channels='apart'"]),
        ({"saliency": torch.full((2, 9, 7), torch.nan)}, ["saliency", "NaN", "sample 0, 1"]),
        ({"saliency": torch.ones(2, 9, 7, dtype=torch.int64)}, ["saliency", "floating"]),
        ({"images": torch.rand(3, 9, 7)}, ["images", "[3, 9, 7]"]),
        ({"target": 5}, ["target", "0 to 4", "5"]),
        ({"target": [0, -1]}, ["target", "-1"]),
        ({"target": [0, 1, 2]}, ["target", "2 of them"]),
        ({"target": 0.5}, ["target", "whole numbers"]),
        ({"target": "cat"}, ["target", "whole numbers", "cat"]),
        ({"images": torch.full((2, 3, 9, 7), torch.nan)}, ["images", "NaN", "sample 0, 1"]),
        ({"baseline": float("nan")}, ["baseline", "nan"]),
        ({"mean": [0.5] * 3}, ["std", "both"]),
        ({"mean": [0.5], "std": [0.5]}, ["mean", "3 numbers", "got 1"]),
        ({"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}, ["std", "above 0"]),
        ({"thresholds": []}, ["thresholds", "at least one"]),
        ({"thresholds": [0.5, 1.5]}, ["thresholds", "[0, 1]"]),
        ({"counts": [64], "order": "rank"}, ["counts", "63"]),
        ({"counts": [1], "thresholds": [0.5]}, ["counts", "thresholds"]),
        ({"order": "size"}, ["order", "size"]),
        ({"keep": "left"}, ["keep", "left"]),
        ({"baseline": "grey"}, ["baseline", "grey"]),
        ({"baseline": torch.zeros(4)}, ["baseline", "[4]"]),
        ({"normalize": "none", "saliency": torch.rand(2, 9, 7) + 1}, ["normalize", "[0, 1]"]),
        ({"normalize": "max"}, ["normalize", "max"]),
        ({"ties": "middle"}, ["ties", "middle"]),
        ({"seeds": [1]}, ["seeds", "2"]),
        ({"channels": "both"}, ["channels", "both"]),
        ({"quantity": "odds"}, ["quantity", "odds"]),
        ({"quantity": lambda logits, target: logits}, ["quantity", "[2]", "[2, 5]"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"classifier": lambda x: (x.mean((2, 3)), x)}, ["classifier", "tuple of 2", "wrap"]),
        ({"classifier": lambda x: x}, ["classifier", "[2, classes]", "[2, 3, 9, 7]"]),
        ({"classifier": lambda x: x.mean((1, 2, 3))[:, None]}, ["classifier", "one logit"]),
        ({"classifier": 3}, ["classifier", "3"]),
    ],
)
def test_bad_input(arguments: dict[str, object], words: list[str]) -> None:
    images, saliency = sample(2)
    with pytest.raises(UsageError) as caught:
        perturbation_curve(**({"classifier": Random(), "images": images, "saliency": saliency} | arguments))  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, ["steps", "0"]),
        ({"steps": 2.5}, ["steps", "2.5"]),
        ({"std": [0.5] * 3}, ["mean", "both"]),
        ({"alpha_min": 1.2}, ["alpha_min", "1.2"]),
        ({"penalty": -1}, ["penalty", "-1"]),
    ],
)
def test_bad_msi_arguments(arguments: dict[str, object], words: list[str]) -> None:
    images, saliency = sample(2)
    with pytest.raises(UsageError) as caught:
        msi(Random(), images, saliency, **arguments)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_no_images() -> None:
    result = msi(Random(), torch.rand(0, 3, 9, 7), torch.rand(0, 9, 7))
    assert result.score.shape == (0,)
    assert result.curves.forwards == 0


def test_scores_order_the_equal_pixels_of_a_saturated_map() -> None:
    """The area form is that of the scores, the value form that of the map, from one call."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 8, 8, generator=g)
    scores = 400 * torch.randn(3, 8, 8, generator=g)
    saliency = scores.sigmoid()
    assert len(saliency[0].unique()) < 40
    weight = torch.randn(3, 192, generator=g) / 4

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    both = msi(model, images, saliency, scores=scores)
    by_value, by_rank = msi(model, images, saliency, area=False), msi(model, images, scores)
    assert torch.allclose(both.score, by_value.score, atol=1e-6)
    assert torch.allclose(both.base_score_area, by_rank.base_score_area, atol=1e-6)
    assert torch.equal(both.sufficient_area, by_rank.sufficient_area)
    assert not torch.allclose(msi(model, images, saliency).base_score_area, by_rank.base_score_area, atol=1e-4)
    with pytest.raises(UsageError, match="saliency: expected"):
        msi(model, images, saliency, scores=scores[:, :4])
