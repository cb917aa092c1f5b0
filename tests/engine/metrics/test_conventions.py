"""Insertion, deletion, ROAD and COUT against plain versions of each project's convention, and Quantus itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor

from counterlens.engine.errors import UsageError
from counterlens.engine.metrics import (
    comprehensiveness,
    cout,
    deletion,
    impute,
    insertion,
    lerf,
    morf,
    perturbation_curve,
    road,
    sufficiency,
)
from tests.engine.metrics.models import Linear, Random, sample

PATHS: Any = {"insertion": insertion, "deletion": deletion, "morf": morf, "lerf": lerf}


def paper() -> tuple[Linear, Tensor, Tensor]:
    """Pixels 1, 2, 3, 4 in the order of a perfect map; the logit is the sum of what is shown."""
    image = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    return Linear(torch.ones(2, 2)), image, image[:, 0]


@pytest.mark.parametrize(
    ("metric", "values", "score"),
    [
        ("insertion", [0, 4, 7, 9, 10], (0 / 2 + 4 + 7 + 9 + 10 / 2) / 4),
        ("deletion", [10, 6, 3, 1, 0], (10 / 2 + 6 + 3 + 1) / 4),
        ("morf", [10, 6, 3, 1, 0], 10 - 20 / 5),
        ("lerf", [10, 9, 7, 4, 0], 10 - 30 / 5),
    ],
)
def test_paths_on_paper(metric: str, values: list[float], score: float) -> None:
    model, image, saliency = paper()
    result = PATHS[metric](model, image, saliency, 1, quantity="logit", baseline="zero", per_step=1)
    assert result.values.tolist() == [values]
    assert result.score.tolist() == [score]
    assert result.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_eraser_on_paper() -> None:
    model, image, saliency = paper()
    common: Any = {"quantity": "logit", "baseline": "zero", "shares": [0.25, 0.5]}
    assert sufficiency(model, image, saliency, 1, **common).score.tolist() == [10 - (4 + 7) / 2]
    assert comprehensiveness(model, image, saliency, 1, **common).score.tolist() == [10 - (6 + 3) / 2]


def test_rules_and_starts() -> None:
    model, image, saliency = paper()

    def score(**options: Any) -> float:
        return float(deletion(model, image, saliency, 1, quantity="logit", baseline="zero", **options).score)

    assert score(per_step=3) == (10 + 1) / 2 * 0.75 + (1 + 0) / 2 * 0.25  # true abscissae 0, 3/4, 1
    assert score(per_step=3, rule="even") == (10 / 2 + 1 + 0) / 2
    assert score(per_step=3, rule="steps") == 10 / 2 + 1 + 0
    assert score(per_step=1, start=False, rule="mean") == 10 / 4
    assert score(per_step=1, start=False) == (6 / 2 + 3 + 1 + 0) / 3
    assert score(steps=2, max_share=0.5) == (10 / 2 + 6 + 3 / 2) / 2
    assert score(steps=1, start=False) == 0


def plain_quantus(
    model: Any, x: np.ndarray, y: np.ndarray, a: np.ndarray, per_step: int, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """PixelFlipping: each channel a feature, replaced by the image's minimum, softmax, areas with one unit per step."""
    n = len(x)
    a = np.broadcast_to(a, x.shape).reshape(n, -1)
    order = np.argsort(-a, axis=1, kind="stable") if order is None else order
    flat, black = x.reshape(n, -1).copy(), x.reshape(n, -1).min(1)
    curve = []
    for start in range(0, a.shape[1], per_step):
        for i in range(n):
            flat[i, order[i, start : start + per_step]] = black[i]
        with torch.no_grad():
            p = torch.softmax(model(torch.from_numpy(flat.reshape(x.shape))), 1).numpy()
        curve.append(p[np.arange(n), y])
    values = np.stack(curve, 1)
    return values, (values[:, 1:] + values[:, :-1]).sum(1) / 2


@pytest.mark.parametrize("per_step", [1, 10])
def test_agrees_with_quantus_pixel_flipping(per_step: int) -> None:
    images, saliency = sample(3, (6, 5))
    model, y = Random(), torch.tensor([0, 3, 4])
    values, area = plain_quantus(model, images.numpy(), y.numpy(), saliency[:, None].numpy(), per_step)
    result = deletion(model, images, saliency, y, compat="quantus", per_step=per_step)
    assert np.abs(result.values.numpy() - values).max() <= 1e-5
    assert np.abs(result.score.numpy() - area).max() <= 1e-5 * values.shape[1]
    assert torch.equal(morf(model, images, saliency, y, compat="quantus", per_step=per_step).score, result.score)


def test_agrees_with_quantus_itself() -> None:
    quantus = pytest.importorskip(
        "quantus", reason="needs quantus (pip install '.[comparisons]')", exc_type=ImportError
    )
    images, _ = sample(3, (6, 5))
    saliency = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))  # no ties: its sort is not stable
    model, y = Random().eval(), torch.tensor([0, 3, 4])
    flipping = quantus.PixelFlipping(features_in_step=10, disable_warnings=True, display_progressbar=False)
    theirs = flipping(
        model=model,
        x_batch=images.numpy(),
        y_batch=y.numpy(),
        a_batch=saliency.numpy(),
        softmax=True,
        channel_first=True,
    )
    ours = deletion(model, images, saliency, y, compat="quantus", per_step=10)
    assert np.abs(np.array(theirs) - ours.values.numpy()).max() <= 1e-5
    grey, saliency = sample(4, (10, 10), channels=1)
    model = Random(channels=1).eval()
    y = model(grey).argmax(1)
    measure = quantus.ROAD(noise=0.0, percentages=list(range(1, 100, 2)), disable_warnings=True)
    accuracy = measure(
        model=model, x_batch=grey.numpy(), y_batch=y.numpy(), a_batch=saliency[:, None].numpy(), channel_first=True
    )
    ours = road(model, grey, saliency, y, compat="quantus", noise=0)
    assert np.abs(np.array(list(accuracy.values())) - ours.values.mean(0).numpy()).max() <= 1e-5


def plain_xplique(
    model: Any, x: np.ndarray, y: np.ndarray, a: np.ndarray, steps: int, insert: bool, max_share: float
) -> tuple[dict[int, float], float]:
    """CausalFidelity: whole pixels, cut-off counts, the model's output as it is, evenly spaced trapezoid, one mean."""
    n, c = x.shape[:2]
    flat = x.reshape(n, c, -1)
    order = np.argsort(a.reshape(n, -1), axis=-1, kind="stable")[:, ::-1]
    start, end = (np.zeros_like(flat), flat) if insert else (flat, np.zeros_like(flat))
    scores: dict[int, float] = {}
    for count in np.linspace(0, int(np.floor(flat.shape[2] * max_share)), steps + 1, dtype=np.int32):
        mixed = start.copy()
        for i in range(n):
            mixed[i][:, order[i, :count]] = end[i][:, order[i, :count]]
        with torch.no_grad():
            out = model(torch.from_numpy(mixed.reshape(x.shape))).numpy()
        scores[int(count)] = out[np.arange(n), y].mean()
    v = np.array(list(scores.values()))
    return scores, np.mean(v[:-1] + v[1:]) * 0.5


@pytest.mark.parametrize(("steps", "max_share"), [(10, 1.0), (7, 0.6), (100, 1.0)])
@pytest.mark.parametrize("insert", [True, False])
def test_agrees_with_xplique(insert: bool, steps: int, max_share: float) -> None:
    images, saliency = sample(3, (6, 5))
    saliency = (saliency * 4).round()  # ties: by index from the end, as a reversed sort gives them
    model, y = Random(), torch.tensor([0, 3, 4])
    scores, area = plain_xplique(model, images.numpy(), y.numpy(), saliency.numpy(), steps, insert, max_share)
    metric = insertion if insert else deletion
    result = metric(model, images, saliency, y, compat="xplique", steps=steps, max_share=max_share)
    assert (result.shares * 30).round().int().tolist() == list(scores)
    assert np.abs(result.values.mean(0).numpy() - np.array(list(scores.values()))).max() <= 1e-5
    assert abs(result.score.mean().item() - area) <= 1e-5
    coloured = torch.stack([saliency, saliency + 1, saliency - 1], 1)
    again = metric(model, images, coloured, y, compat="xplique", steps=steps, max_share=max_share)
    assert torch.allclose(again.score, result.score, atol=1e-5)


def plain_ace(model: Any, x: Tensor, there: Tensor, label: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """COUT: 50 groups at least, the last one counted as whole, sums of absolute differences as the order."""
    n, _, h, w = x.shape
    step = max(1, h * w // 50)
    order = (there - x).abs().sum(1).flatten(1).argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros(n, h * w)
    curves = [model(x).softmax(1)]
    for start in range(0, h * w, step):
        mask.scatter_(1, order[:, start : start + step], 1.0)
        m = mask.view(n, 1, h, w)
        curves.append(model(there * m + x * (1 - m)).softmax(1))
    p = torch.stack(curves, 1)  # [N, K, classes]
    area = (p[:, 0] / 2 + p[:, 1:-1].sum(1) + p[:, -1] / 2) * step / (h * w)
    return area[:, target] - area[:, label], p[:, :, label], p[:, :, target]


@pytest.mark.parametrize("size", [(9, 7), (12, 10), (5, 4)])
def test_agrees_with_ace(size: tuple[int, int]) -> None:
    images, _ = sample(3, size)
    there = torch.rand(images.shape, generator=torch.Generator().manual_seed(7))
    model = Random()
    score, source, target = plain_ace(model, images, there, 1, 3)
    result = cout(model, images, there, 3, 1, compat="ace", batch_size=7)
    assert (result.score.float() - score).abs().max() <= 1e-5
    assert (result.source_values.float() - source).abs().max() <= 1e-5
    assert (result.target_values.float() - target).abs().max() <= 1e-5


def test_cout_on_paper() -> None:
    # From 0 to 1: the logit grows by 4, 3, 2, 1 as the pixels come in the order of the difference.
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    there = torch.tensor([0.7, 0.8, 0.9, 1.0]).reshape(1, 1, 2, 2)
    image = torch.zeros(1, 1, 2, 2)
    model = Linear(weight)
    result = cout(model, image, there, 1, 0, quantity="logit", steps=4)
    values = [0, 4, 4 + 2.7, 4 + 2.7 + 1.6, 4 + 2.7 + 1.6 + 0.7]
    assert torch.allclose(result.target_values, torch.tensor([values]).double(), atol=1e-6)
    assert abs(result.score.item() - (sum(values) - values[-1] / 2) / 4) < 1e-6
    assert result.source_values.abs().max() == 0
    assumed = cout(model, image, there, quantity="probability")
    assert (assumed.source.tolist(), assumed.target.tolist()) == ([0], [1])
    with pytest.warns(UserWarning, match="2 of 2 differ from their images evenly, or not at all"):
        same = cout(Random(), *[torch.rand(2, 3, 4, 4)] * 2, 1, 0)
    assert torch.allclose(same.target_values, same.target_values[:, :1].expand_as(same.target_values), atol=1e-6)


def plain_imputation(image: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """One equation per removed pixel, solved by a sparse factorisation."""
    c, h, w = image.shape
    at = {(int(i), int(j)): k for k, (i, j) in enumerate(np.argwhere(removed))}
    left, right = lil_matrix((len(at), len(at))), np.zeros((len(at), c))
    for (i, j), k in at.items():
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                y, x = i + di, j + dj
                if (di, dj) == (0, 0) or not (0 <= y < h and 0 <= x < w):
                    continue
                weight = 1 / 6 if di * dj == 0 else 1 / 12
                left[k, k] += weight
                if removed[y, x]:
                    left[k, at[y, x]] -= weight
                else:
                    right[k] += weight * image[:, y, x]
    out = image.copy()
    solution = spsolve(left.tocsc(), right).reshape(len(at), c)
    for (i, j), k in at.items():
        out[:, i, j] = solution[k]
    return out


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("size", [(13, 12), (1, 9)])
def test_imputation_solves_the_sparse_system(share: float, size: tuple[int, int]) -> None:
    images, saliency = sample(2, size)
    removed = saliency < share
    removed[:, -1, -1] = False
    filled = impute(images, removed)
    for i in range(2):
        expected = plain_imputation(images[i].double().numpy(), removed[i].numpy())
        assert np.abs(filled[i].numpy() - expected).max() <= 1e-6
    # A hole in one piece, as salient regions are, and an image without a known pixel.
    hole = torch.zeros(1, 24, 24, dtype=torch.bool)
    hole[:, 2:, :20] = True
    image = sample(1, (24, 24))[0]
    expected = plain_imputation(image[0].double().numpy(), hole[0].numpy())
    assert np.abs(impute(image, hole)[0].numpy() - expected).max() <= 1e-6
    blank = impute(images, torch.ones_like(removed))
    assert torch.allclose(blank, images.mean((2, 3), keepdim=True).expand_as(images))


@pytest.mark.parametrize("first", ["most", "least"])
def test_road_is_the_classifier_on_imputed_images(first: str) -> None:
    images, saliency = sample(3, (8, 8))
    model, y = Random(), torch.tensor([0, 3, 4])
    result = road(model, images, saliency, y, first=first, shares=[0.25, 0.75], noise=0, quantity="probability")
    for k, count in enumerate((16, 48)):
        order = saliency.flatten(1).argsort(dim=1, descending=first == "most")[:, :count]
        removed = torch.zeros(3, 64, dtype=torch.bool).scatter_(1, order, True).view(3, 8, 8)
        imputed = [plain_imputation(i.double().numpy(), r.numpy()) for i, r in zip(images, removed, strict=True)]
        expected = model(torch.from_numpy(np.stack(imputed)).float()).softmax(1)[torch.arange(3), y]
        assert (result.values[:, k].float() - expected).abs().max() <= 1e-5
    assert torch.allclose(result.score, result.values.mean(1))
    noisy = [
        road(model, images[order], saliency[order], y[order], first=first, shares=[0.5], quantity="probability",
             noise=0.1, seeds=[s + 10 for s in order], batch_size=b).score[order]
        for order, b in (([0, 1, 2], 64), ([0, 1, 2], 1), ([2, 1, 0], 7))
    ]  # fmt: skip
    assert torch.allclose(noisy[0], noisy[1], atol=1e-5)
    assert torch.allclose(noisy[0], noisy[2], atol=1e-5)
    accuracy = road(model, images, saliency, first=first)
    assert set(accuracy.values.unique().tolist()) <= {0, 1}
    assert accuracy.shares.tolist() == [round(s * 64) / 64 for s in (i / 10 for i in range(1, 10))]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_forward_batches_do_not_matter(batch_size: int) -> None:
    images, saliency = sample(3)
    model = Random()
    for metric in (*PATHS.values(), sufficiency, comprehensiveness, road):
        a, b = (metric(model, images, saliency, batch_size=size) for size in (batch_size, 64))
        assert (a.score - b.score).abs().max() <= 1e-5
    there = images.roll(1, 0)
    a, b = (cout(model, images, there, 1, 0, batch_size=size) for size in (batch_size, 64))
    assert (a.score - b.score).abs().max() <= 1e-5


def test_deletion_is_insertion_from_the_other_end() -> None:
    images, saliency = sample(2)
    common: Any = {"per_step": 9, "baseline": "blur"}
    inserted = insertion(Random(), images, saliency, 1, **common)
    removed = lerf(Random(), images, saliency, 1, **common)
    assert torch.allclose(inserted.values, removed.values.flip(1), atol=1e-6)
    curves = perturbation_curve(Random(), images, saliency, 1, order="rank", counts=[9], baseline="blur")
    assert curves.keep is not None
    assert torch.allclose(curves.keep[:, 0], inserted.values[:, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        (insertion, {"compat": "quantus"}, ["compat", "insertion", "xplique"]),
        (lerf, {"compat": "quantus"}, ["compat", "lerf has none"]),
        (insertion, {"step": 3}, ["insertion", "step", "per_step"]),
        (deletion, {"steps": 0}, ["steps", "0"]),
        (deletion, {"per_step": 0}, ["per_step", "0"]),
        (deletion, {"per_step": 2, "steps": 3}, ["per_step", "steps"]),
        (deletion, {"max_share": 0.0}, ["max_share", "0.0"]),
        (deletion, {"rule": "simpson"}, ["rule", "simpson"]),
        (sufficiency, {"shares": []}, ["shares", "at least one"]),
        (road, {"shares": [1.5]}, ["shares", "1.5"]),
        (road, {"mean": [0.2], "std": [0.5]}, ["mean", "3 numbers"]),
        (road, {"mean": [0.2] * 3}, ["std", "both"]),
        (road, {"noise": -1.0}, ["noise", "-1"]),
        (road, {"first": "last"}, ["first", "last"]),
        (road, {"compat": "xplique"}, ["compat", "xplique"]),
    ],
)
def test_bad_options(metric: Any, options: dict[str, Any], words: list[str]) -> None:
    images, saliency = sample(2)
    with pytest.raises(UsageError) as caught:
        metric(Random(), images, saliency, **options)
    for word in words:
        assert word in str(caught.value)


def test_bad_counterfactuals() -> None:
    images, _ = sample(2)
    for arguments, word in [
        ((images[:1],), "[2, 3, 9, 7]"),
        ((images.flip(0), 9), "0 to 4"),
    ]:
        with pytest.raises(UsageError, match=r".*") as caught:
            cout(Random(), images, *arguments)
        assert word in str(caught.value)
    with pytest.raises(UsageError, match="compat"):
        cout(Random(), images, images, compat="quantus")  # type: ignore[arg-type]
