"""NaN and infinity of a model are errors that name the image: in every saliency method, metric, and command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterlens.engine.cli import saliency as cli
from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, NotFinite, UsageError
from counterlens.engine.images.files import save_png
from counterlens.engine.metrics import (
    calibrate,
    comprehensiveness,
    counterfactual_quality,
    cout,
    deletion,
    fid,
    gradient_maps,
    impute,
    insertion,
    kid,
    lerf,
    morf,
    msi,
    perturbation_curve,
    road,
    sfid,
    sufficiency,
)
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.saliency.evaluation import evaluate
from counterlens.engine.saliency.lax import new_adapter
from counterlens.engine.saliency.methods import explain_with
from counterlens.engine.saliency.table import METHODS
from counterlens.engine.saliency.training import Schedule, train

SIZE, BAD = 16, 2
LABELS = ["a", "b", "c"]


class Net(nn.Module):
    """A small network with something that goes wrong where an image has a black corner."""

    def __init__(self, wrong: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 3)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        corner = x[:, :, :5, :5].mean((1, 2, 3))[:, None]
        return self.head((self.conv(x) + self.wrong(corner)[:, :, None, None]).mean((2, 3)))


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN values": lambda c: torch.where(c < 0.01, torch.nan, c),
    "infinite values": lambda c: torch.where(c < 0.01, torch.inf, c),
    "minus infinity": lambda c: torch.where(c < 0.01, -torch.inf, c),
    "the gradient of a root at 0": lambda c: c.sqrt(),  # a finite answer
    "the gradient of a logarithm near 0": lambda c: (c + 1e-45).log().clamp(min=-1) + 0 * c.sqrt(),
}
VALUES = list(WRONG)[:3]
GRADIENTS = ["gradxinput", "ig", "smoothgrad", "gradcam"]


def of(name: str) -> SoftmaxClassifier:
    return SoftmaxClassifier(Net(WRONG[name]).eval(), LABELS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    images = 0.2 + 0.8 * torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    images[BAD, :, :5, :5] = 0
    return images


@pytest.fixture(scope="module")
def maps() -> Tensor:
    return torch.rand(4, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("wrong", VALUES)
@pytest.mark.parametrize(
    ("method", "target"), [*((m, None) for m in METHODS), *((m, 1) for m in (*GRADIENTS, "ablation"))]
)
def test_every_method_names_the_image(method: str, target: int | None, wrong: str, images: Tensor) -> None:
    classifier = of(wrong)
    adapter = new_adapter(classifier, SIZE, taps=["conv"]) if method == "lax" else None
    with pytest.raises(NotFinite, match=rf"(classifier|{method}): NaN or infinity for image {BAD}$") as caught:
        explain_with(method, classifier, images, target, baseline=0.5, adapter=adapter, batch=3)
    assert caught.value.samples == [BAD]
    assert caught.value.exit_code == 1
    good = images[[i for i in range(4) if i != BAD]]
    assert explain_with(method, classifier, good, target, baseline=0.5, adapter=adapter)[0].isfinite().all()


@pytest.mark.parametrize("wrong", list(WRONG)[3:])
@pytest.mark.parametrize("method", ["gradxinput", "gradient_maps"])
def test_a_gradient_that_is_not_there(method: str, wrong: str, images: Tensor) -> None:
    classifier = of(wrong)
    with torch.no_grad():
        assert classifier.logits(images).isfinite().all()
    with pytest.raises(NotFinite, match=rf"NaN or infinity for image {BAD}$"):
        gradient_maps(classifier, images) if method == "gradient_maps" else explain_with(method, classifier, images)


def test_maps_of_a_head_that_overflows(images: Tensor) -> None:
    classifier = of("NaN values")
    adapter = new_adapter(classifier, SIZE, taps=["conv"])
    with torch.no_grad():
        adapter.head.mix[0].weight.fill_(torch.inf)
    adapter.head.eval()
    with pytest.raises(NotFinite, match=r"lax: NaN or infinity for image 0, 1"):
        adapter.explain(images[:BAD], 1)


@pytest.mark.parametrize("wrong", VALUES[:2])
def test_training_names_the_image(wrong: str, images: Tensor) -> None:
    adapter = new_adapter(of(wrong), SIZE, taps=["conv"])
    with pytest.raises(NotFinite, match=rf"classifier: NaN or infinity for image {BAD}$"):
        train(adapter, images, lambda _: 0.0, Schedule(steps=9, batch=3, every=9))


METRICS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "msi": msi, "insertion": insertion, "deletion": deletion, "morf": morf, "lerf": lerf, "road": road,
    "sufficiency": sufficiency, "comprehensiveness": comprehensiveness, "curve": perturbation_curve,
    "calibrate": calibrate,
    "correct": lambda c, x, s: insertion(c, x, s, quantity="correct"),
    "logit": lambda c, x, s: msi(c, x, s, quantity="logit"),
    "own quantity": lambda c, x, s: msi(c, x, s, quantity=lambda z, t: (z.argmax(1) == t).float()),
    "cout": lambda c, x, s: cout(c, x, x.flip(3), 1),
    "quality": lambda c, x, s: counterfactual_quality(c, x, x.flip(3), 1),
    "judge": lambda c, x, s: counterfactual_quality(of("the gradient of a root at 0"), x, x, 1, judges={"j": c}),
    "encoder": lambda c, x, s: counterfactual_quality(of("the gradient of a root at 0"), x, x, 1, encoder=c.logits),
    "fid": lambda c, x, s: fid(x, x, c.logits), "sfid": lambda c, x, s: sfid(x, x, c.logits),
    "kid": lambda c, x, s: kid(x, x, c.logits),
    "lpips": lambda c, x, s: counterfactual_quality(
        of("the gradient of a root at 0"), x, x, 1, lpips=lambda a, b: c.logits((a + 1) / 2)[:, 0]
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("wrong", ["NaN values", "infinite values"])
def test_every_metric_names_the_image(metric: str, wrong: str, images: Tensor, maps: Tensor) -> None:
    with pytest.raises(NotFinite, match=rf": NaN or infinity for image .*{BAD}"):
        METRICS[metric](of(wrong), images, maps)


@pytest.mark.parametrize("call", [
    lambda x, s, bad: msi(of("NaN values"), x, bad), lambda x, s, bad: impute(bad[:, None], s > 0.5),
    lambda x, s, bad: counterfactual_quality(of("NaN values"), x, x + bad[:, None], 1),
    lambda x, s, bad: calibrate(of("NaN values"), x, bad), lambda x, s, bad: road(of("NaN values"), x, bad),
])  # fmt: skip
def test_maps_and_images_that_are_given_are_looked_at(call, images: Tensor, maps: Tensor) -> None:
    bad = maps.clone()
    bad[1, 3, 3] = torch.inf
    with pytest.raises(UsageError, match=r"expected finite values, got NaN or infinity in sample 1"):
        call(images[:2], maps[:2], bad[:2])


def test_features_that_are_too_large_for_a_distance(images: Tensor) -> None:
    with pytest.raises(CounterlensError, match="KID"):
        kid(images, images, lambda x: x.double().mean((2, 3)) * 1e200)


def test_a_class_that_is_ruled_out_is_none(images: Tensor, maps: Tensor) -> None:
    def classifier(x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), torch.full((len(x), 1), -torch.inf)], 1)

    assert msi(classifier, images, maps, 1).score.isfinite().all()


OPTIONS = {
    "subject": cli.Subject(),
    "how": cli.Explaining(device="cpu", as_json=True),
    "command": "counterlens",
    "box": None,
}


@pytest.fixture
def folder(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images in a folder, and commands that open a classifier whose gradient is NaN on one of them."""
    (tmp_path / "in").mkdir()
    for i, image in enumerate(images):
        save_png(image, tmp_path / "in" / f"{i}.png")
    classifier = of("the gradient of a root at 0")
    monkeypatch.setattr(cli.Subject, "open", lambda *_, **__: cli.Opened(None, "of the test", classifier, SIZE))
    return tmp_path / "in"


def test_the_command_goes_on_with_the_others(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(CounterlensError, match="1 of 4 images failed; the others are in"):
        cli.explain_images([folder], "gradxinput", tmp_path / "out", **OPTIONS)
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [r.get("error") for r in records] == [None, None, "gradxinput: NaN or infinity for this image", None]
    assert not (tmp_path / "out" / f"{BAD}.png").exists()
    assert "msi" in records[3]


def test_methods_are_compared_on_the_others(folder: Path, tmp_path: Path, capsys) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    with pytest.raises(CounterlensError, match="1 of 4 images failed; the others are compared"):
        cli.evaluate_methods("rise,gradxinput", tmp_path / "out", images=folder, **OPTIONS)
    assert f"{BAD}.png: gradxinput: NaN or infinity" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rise"]["msi"]["n"] == summary["gradxinput"]["msi"]["n"] == 3
    rows = parquet.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    failed = [r for r in rows if r["error"]]
    assert [Path(r["image"]).name for r in failed] == [f"{BAD}.png"]
    assert failed[0]["msi"] is None
    assert len(rows) == 7


def test_grad_cam_is_left_out_where_there_are_no_maps(images: Tensor) -> None:
    classifier = SoftmaxClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 3)).eval(), LABELS)
    with pytest.warns(UserWarning, match="gradcam is left out: layer: .* no feature maps"):
        assert list(evaluate(classifier, images, ["gradcam", "gradxinput"])) == ["gradxinput"]
    with pytest.raises(UsageError, match="no feature maps"):
        evaluate(classifier, images, ["gradcam"])


class NaNWhere(nn.Module):
    """A classifier whose answer is NaN for images that a rule picks, without a trace in its gradient."""

    def __init__(self, inner: nn.Module, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.rule = inner, rule

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).masked_fill(self.rule(x.detach())[:, None], torch.nan)


def test_counterfactuals_of_a_classifier_that_gives_nan(tiny) -> None:
    diffusion, classifier = tiny
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    short = Config(mode="official", steps=4, strength=0.5)
    inputs = NaNWhere(classifier.module, lambda x: (x - images[1]).flatten(1).abs().amax(1) < 1e-6)
    # 8-bit images are only those that are saved and measured.
    saved = NaNWhere(classifier.module, lambda x: ((x * 255) % 1).flatten(1).sub(0.5).abs().amin(1) > 0.49)
    for module, expected, what in ((inputs, [1], "for the image"), (saved, [0, 1, 2], "for the counterfactual")):
        engine = Engine(diffusion, SoftmaxClassifier(module, classifier.labels), short)
        result = engine.counterfactual(images, [3, 3, 3])
        assert [i for i, error in enumerate(result.errors) if error] == expected
        assert all(str(result.errors[i]).endswith(f"gives NaN or infinity {what}") for i in expected)
        assert all(result.status(i) == "failed" and not result.complete[i] for i in expected)
        assert result.target_confidence.isnan().tolist() == [i in expected for i in range(3)]
