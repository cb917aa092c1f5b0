"""LAX: taps change nothing, the loss is the formula, training can be interrupted, files are checked."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.memory import PeakMemory
from counterlens.engine.metrics.imputation import impute
from counterlens.engine.metrics.quantities import make_quantity
from counterlens.engine.metrics.robust import shifted, smooth
from counterlens.engine.models.protocols import SigmoidClassifier, SoftmaxClassifier
from counterlens.engine.packs.architectures import StridedClassifier
from counterlens.engine.saliency import training
from counterlens.engine.saliency.head import COARSE, Head
from counterlens.engine.saliency.lax import LAX, new_adapter, open_adapter
from counterlens.engine.saliency.recipes import train_adapter
from counterlens.engine.saliency.taps import choose_taps, tapped
from counterlens.engine.saliency.training import Schedule, faithfulness, train, training_loss

SIZE = 16
LABELS = ["a", "b", "c", "d"]
QUICK = Schedule(steps=6, batch=4, every=3, learning_rate=1e-2)


class Tokens(nn.Module):
    """A vision transformer's shape: patches of 4 pixels, a class token and two registers in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.front = nn.Parameter(torch.randn(1, 3, 8))
        self.block = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.front.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        return self.head(self.norm(tokens + self.block(tokens))[:, 0] + tokens.mean(1))


class Corner(nn.Module):
    """Reads one place only: the logit of label 1 is the brightness of the top-left 4x4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(12.0))

    def forward(self, x: Tensor) -> Tensor:
        value = self.gain * (x[:, :, :4, :4].mean((1, 2, 3)) - 0.5)
        return torch.stack([-value, value], 1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def classifier() -> SoftmaxClassifier:
    torch.manual_seed(0)
    return SoftmaxClassifier(StridedClassifier(classes=4, width=8).eval(), LABELS)


def untouched(adapter: LAX) -> float:
    return 0.0


def test_logits_are_bit_identical_and_the_module_is_left_alone(classifier, images) -> None:
    torch.manual_seed(0)
    module = StridedClassifier(classes=4, width=8)  # in training mode, with gradients
    module.features[0].eval()
    before = {n: (m.training, len(m._forward_hooks)) for n, m in module.named_modules()}
    mine = SoftmaxClassifier(module, LABELS)
    adapter = new_adapter(mine, SIZE)
    train(adapter, images, untouched, QUICK, stop_after=1)
    maps = adapter.explain(images, batch=5)
    with torch.no_grad():
        expected = torch.cat([module(part) for part in images.split(5)])
    assert torch.equal(maps.logits, expected)
    assert torch.equal(maps.target, expected.argmax(1))
    assert maps.saliency.shape == (12, SIZE, SIZE)
    assert torch.equal(maps.saliency, maps.scores.sigmoid())
    assert {n: (m.training, len(m._forward_hooks)) for n, m in module.named_modules()} == before
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_taps_of_convolutions_and_tokens(classifier, images) -> None:
    assert choose_taps(classifier, images[:1]) == ["features.1", "features.4", "features.7", "features"]
    torch.manual_seed(0)
    vit = Tokens()
    with tapped(vit, ["block", "patch"]) as features, torch.no_grad():
        vit(images)
        tokens = torch.cat([vit.front.expand(12, -1, -1), vit.patch(images).flatten(2).transpose(1, 2)], 1)
        expected = vit.block(tokens)[:, 3:]  # class token and registers left out
    assert torch.equal(features[0], expected.transpose(1, 2).reshape(12, 8, 4, 4))
    assert features[1].shape == (12, 8, 4, 4)
    adapter = new_adapter(SoftmaxClassifier(vit, LABELS), SIZE, taps=["block"])
    train(adapter, images, untouched, QUICK, stop_after=2)
    assert adapter.explain(images).saliency.shape == (12, SIZE, SIZE)


def test_a_tap_that_is_not_there(classifier) -> None:
    with pytest.raises(UsageError, match=r"features\.44.*nearest:.*features\.4"):
        new_adapter(classifier, SIZE, taps=["features.44"])
    with pytest.raises(UsageError, match=r"tap: 'head' gives \[B, 4\]; no two axes"):
        new_adapter(classifier, SIZE, taps=["head"])


def test_nothing_finer_than_half_the_image_is_read_or_drawn(classifier, images) -> None:
    adapter = new_adapter(classifier, SIZE)
    assert adapter.taps == ["features.4", "features.7", "features"]  # features.1 has the image's own resolution
    assert adapter.features(images)[1][0].shape[2] == SIZE // COARSE
    torch.nn.init.normal_(adapter.head.out.weight)
    maps = adapter.explain(images).scores
    assert maps.shape == (12, SIZE, SIZE)
    # Between the places that are drawn, maps are interpolated: little is lost by drawing them so again.
    halved = F.avg_pool2d(maps[:, None], COARSE)
    again = F.interpolate(halved, scale_factor=COARSE, mode="bilinear", align_corners=False)[:, 0]
    noise = torch.rand(maps.shape)
    from_noise = F.interpolate(F.avg_pool2d(noise[:, None], COARSE), scale_factor=COARSE, mode="bilinear")[:, 0]
    lost, lost_of_noise = ((a - b).std() / b.std() for a, b in ((again, maps), (from_noise, noise)))
    assert lost < 0.5 * lost_of_noise
    # Where a model has such maps alone, they are pooled.
    finest = new_adapter(classifier, SIZE, taps=["features.1"])
    assert finest.taps == ["features.1"]
    assert finest.explain(images).scores.shape == (12, SIZE, SIZE)


def test_head_in_double_precision_and_after_loading(classifier, images) -> None:
    first, second = new_adapter(classifier, SIZE), new_adapter(classifier, SIZE, seed=1)
    target = torch.arange(12) % 4
    for part in (second.head.gains, second.head.out):
        torch.nn.init.normal_(part.weight, mean=1.0)
    features = second.features(images)[1]
    with torch.no_grad():
        expected = second.head(images, features, target)
        got = copy.deepcopy(second.head).double()(images.double(), [f.double() for f in features], target)
        assert got.dtype == torch.float64
        assert torch.allclose(got.float(), expected, rtol=1e-4, atol=1e-4)
    first.head.load_state_dict(second.head.state_dict())
    assert torch.equal(first.explain(images, target).scores, second.explain(images, target).scores)


def test_maps_of_any_shape_and_of_many_labels() -> None:
    torch.manual_seed(0)
    head = Head([5, 7], conditions=40, width=8)
    images, features = torch.rand(3, 3, 24, 40), [torch.rand(3, 5, 3, 5), torch.rand(3, 7, 2, 3)]
    with torch.no_grad():
        begun = head(images, features, torch.tensor([0, 1, 2]))
        assert torch.equal(begun, head(images, features, torch.tensor([3, 4, 5])))  # conditions begin alike
        nn.init.normal_(head.out.weight)
        nn.init.normal_(head.gains.weight)
        maps = head(images, features, torch.tensor([0, 39, 39]))
        alone = head(images[2:], [f[2:] for f in features], torch.tensor([39]))
    assert maps.shape == (3, 24, 40)
    assert torch.allclose(alone[0], maps[2], atol=1e-5)
    assert not torch.allclose(maps[1], head(images, features, torch.tensor([0, 0, 0]))[1], atol=1e-3)


def test_pixels_alone_and_taps_differ_only_in_what_they_read(classifier, images) -> None:
    adapter = new_adapter(classifier, SIZE, taps=[])
    train(adapter, images, untouched, QUICK)
    assert adapter.taps == []
    assert adapter.explain(images).saliency.std() > 0


def test_quantities(classifier) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 5.0], [0.0, 0.0, 9.0, 0.0]])
    p = logits.softmax(1)
    target = torch.tensor([3, 0])
    assert torch.allclose(make_quantity(classifier)(logits, target), p[[0, 1], [3, 0]])
    halves = make_quantity(classifier, "a,b/2,d")
    assert halves.name == "0,1/2,3"
    expected = torch.stack([p[0, 2:].sum(), p[1, :2].sum()])
    assert torch.allclose(halves(logits, target), expected)
    assert torch.allclose(halves.log_odds(logits, target), torch.log(expected / (1 - expected)), atol=1e-5)
    assert halves.condition(target).tolist() == [1, 0]
    own = make_quantity(classifier, lambda z, t: z[:, 0] - z[:, 1])
    assert torch.allclose(own(logits, target), torch.sigmoid(logits[:, 0] - logits[:, 1]))
    for bad, word in (("a,b/c", "'d'"), ("a,b/c,x", "'x'"), ("a,a,b/c,d", "two groups"), ("a,b,c,d", "one group")):
        with pytest.raises(UsageError, match=f"quantity: .*{word}"):
            make_quantity(classifier, bad)
    sigmoid = SigmoidClassifier(classifier.module, LABELS)
    assert torch.allclose(make_quantity(sigmoid)(logits, target), logits[[0, 1], [3, 0]].sigmoid())
    with pytest.raises(UsageError, match="exclude each other"):
        make_quantity(sigmoid, "a,b/c,d")


def test_the_expectation_is_the_formula_whatever_the_forward_batch(classifier, images) -> None:
    x, b = images[:3].double(), torch.full((3, 3, SIZE, SIZE), 0.3, dtype=torch.float64)
    torch.manual_seed(0)
    mine = SoftmaxClassifier(StridedClassifier(classes=4, width=8).double().eval().requires_grad_(False), LABELS)
    adapter = new_adapter(mine, SIZE, taps=["features.4"])
    target = torch.tensor([0, 1, 2])
    saliency = torch.rand(3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    levels = torch.tensor([[0.5, 0.6, 0.9]]).double().expand(3, 3)
    tau, beta = 0.1, 0.7
    terms = []
    for k in range(3):
        m = torch.sigmoid((saliency - levels[:, k, None, None]) / tau)[:, None]
        keep, remove = (
            F.softmax(mine.logits(v), 1)[range(3), target] for v in (m * x + (1 - m) * b, (1 - m) * x + m * b)
        )
        terms.append((-keep.log() - beta * (1 - remove).clamp(min=1e-6).log()).mean())
    expected = 0.5 * terms[0] + 0.5 * (terms[1] + terms[2]) / 2
    gradient = torch.autograd.grad(expected, saliency)[0]
    for forward_batch in (6, 1000):
        schedule = dataclasses.replace(QUICK, removal=beta, forward_batch=forward_batch)
        value, got = faithfulness(adapter, x, b, saliency.detach(), target, levels, tau, schedule)
        assert torch.allclose(value, expected.detach(), rtol=1e-6)
        assert torch.allclose(got, gradient, rtol=1e-5, atol=1e-9)


def test_removal_with_imputation_is_the_formula(classifier, images) -> None:
    adapter, grey, tau = new_adapter(classifier, SIZE), torch.full((3,), 0.5), 0.5
    x, losses = images[:4], []
    for weight in (0.0, 2.0):
        schedule = dataclasses.replace(
            QUICK, steps=1, imputed=weight, imputed_shares=(0.25, 0.25), moved=0.0, rank_temperature=(tau, tau)
        )
        losses.append(training_loss(adapter, x, grey, 0, schedule, torch.Generator().manual_seed(3)).detach())
    maps = adapter.explain(x)
    flat = maps.scores.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
    level, spread = by_hand(flat, 0.25, tau)
    m = (4 * (flat - level) / spread).sigmoid().view(4, SIZE, SIZE)
    hidden = impute(x, m >= 0.5)
    p = classifier.logits(x + m[:, None] * (hidden - x)).softmax(1)[range(4), maps.target]
    assert losses[1] - losses[0] == pytest.approx(-2 * (1 - p).log().mean().item(), rel=1e-3)


def by_hand(flat: Tensor, share: float, softness: float) -> tuple[Tensor, Tensor]:
    """The score that a share of the pixels is above, and how far scores lie apart there: [B, 1] each."""
    ordered = flat.sort(1).values
    places = [round((1 - share + d) * 255) for d in (0, training.EDGE, -training.EDGE)]
    level, high, low = (ordered[:, [place]] for place in places)
    return level, (high - low).clamp(min=softness)


def test_ranks_are_the_formula(classifier, images, monkeypatch) -> None:
    monkeypatch.setattr(training, "_draw", lambda b, k, *_: torch.full((b, k), 0.5, dtype=torch.float64))
    adapter, x, grey = new_adapter(classifier, SIZE), images[:4], torch.full((4, 3, SIZE, SIZE), 0.5)
    flat, target = adapter.explain(x).scores.flatten(1), torch.arange(4)
    schedule = dataclasses.replace(QUICK, rank_thresholds=2, removal=0.7)
    value = training._by_ranks(adapter, x, grey, flat, target, 1e-3, schedule, torch.Generator())
    level, spread = by_hand(flat, 0.25, 1e-3)  # a half, squared
    m = (4 * (flat - level) / spread).sigmoid().view(4, 1, SIZE, SIZE)
    assert 0.2 < m.mean() < 0.3
    kept, removed = (classifier.logits(v).softmax(1)[range(4), target] for v in (grey.lerp(x, m), x.lerp(grey, m)))
    assert value.item() == pytest.approx((-kept.log() - 0.7 * (1 - removed).log()).mean().item(), rel=1e-4)


def test_maps_are_moved_and_some_are_smoothed() -> None:
    scores = torch.rand(200, 8, 8, requires_grad=True)
    g = torch.Generator().manual_seed(0)
    found = training.moved(scores, 1 / 8, g)
    assert torch.equal(training.moved(scores, 0.0, g), scores)
    candidates = [smooth(there) if soft else there for soft in (False, True)
                  for dy in (-1, 0, 1) for dx in (-1, 0, 1) for there in [shifted(scores, dy, dx)]]  # fmt: skip
    same = torch.stack([(found - c).abs().amax((1, 2)) < 1e-6 for c in candidates])
    assert same.any(0).all()
    assert 0.3 < same[9:].any(0).float().mean() < 0.5
    found.sum().backward()
    assert scores.grad is not None


def test_memory_depends_on_the_forward_batch_and_not_on_the_thresholds(classifier, images) -> None:
    adapter = new_adapter(classifier, SIZE, taps=["features.4"])
    x, b, target = images[:4], torch.zeros(4, 3, SIZE, SIZE), torch.zeros(4, dtype=torch.long)
    saliency, peaks = torch.rand(4, SIZE, SIZE), []
    classifier.module.requires_grad_(False)
    for k in (2, 8):
        levels = torch.linspace(0.5, 0.9, k).double().expand(4, k)
        with PeakMemory() as memory:
            faithfulness(adapter, x, b, saliency, target, levels, 0.1, dataclasses.replace(QUICK, forward_batch=16))
        peaks.append(memory.peak)
    assert peaks[1] < 1.02 * peaks[0], peaks


def test_training_finds_the_one_place_that_decides(images) -> None:
    classifier = SoftmaxClassifier(Corner(), ["dark", "bright"])
    shown = torch.rand(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) * 0.4
    shown[::2, :, :4, :4] += 0.55  # half of them are bright there
    # A grey that decides nothing hides pixels; dark images are then told by their corner as well.
    schedule = Schedule(steps=60, batch=8, every=60, learning_rate=5e-3, ranks=0.0)
    grey = torch.full((3,), 0.5)
    adapter, history = train_adapter(classifier, shown, shown[:8], schedule, taps=[], colour=grey)
    assert len(history.losses) == 60
    assert sum(history.losses[-10:]) < 0.6 * sum(history.losses[:10])
    best = adapter.explain(shown).scores.flatten(1).argmax(1)
    inside = (best // SIZE < 4) & (best % SIZE < 4)
    assert inside.double().mean() >= 0.9, inside


def test_interrupted_training_ends_with_the_same_weights(classifier, images, tmp_path: Path) -> None:
    whole = new_adapter(classifier, SIZE)
    history = train(whole, images, lambda a: float(a.explain(images).saliency.mean()), QUICK)
    for stop in (2, None):
        part = new_adapter(classifier, SIZE)  # as a new process would
        again = train(
            part, images, lambda a: float(a.explain(images).saliency.mean()), QUICK, folder=tmp_path, stop_after=stop
        )
    assert again.losses == pytest.approx(history.losses, rel=1e-6)
    for (name, a), b in zip(whole.head.state_dict().items(), part.head.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8), name
    with pytest.raises(UsageError, match="another training"):
        train(new_adapter(classifier, SIZE), images, untouched, dataclasses.replace(QUICK, seed=1), folder=tmp_path)
    with pytest.raises(UsageError, match="another training"):
        train(new_adapter(classifier, SIZE), images[:8], untouched, QUICK, folder=tmp_path)
    with pytest.raises(UsageError, match="another training"):
        train(new_adapter(classifier, SIZE), images, untouched, QUICK, folder=tmp_path, held=[images])
    torch.save({"step": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(CounterlensError, match=r"checkpoint\.pt: not a checkpoint of an adapter's training"):
        train(new_adapter(classifier, SIZE), images, untouched, QUICK, folder=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CounterlensError, match=r"checkpoint\.pt: not a checkpoint"):
        train(new_adapter(classifier, SIZE), images, untouched, QUICK, folder=tmp_path)


def test_training_that_diverges_says_so(classifier, images) -> None:
    with pytest.raises(CounterlensError, match="diverged before step 2; a lower learning_rate"):
        train(new_adapter(classifier, SIZE), images, untouched, dataclasses.replace(QUICK, learning_rate=1e38))


def test_validation_is_both_forms_of_msi(classifier, images) -> None:
    for ranks in (0.0, 1.0):
        adapter, history = train_adapter(classifier, images, images[:4], dataclasses.replace(QUICK, ranks=ranks))
        measured = adapter.training["validation"]
        assert set(measured) == ({"msi", "base_score_area", "base_score_area_moved"} if ranks else {"msi"})
        assert sum(measured.values()) == pytest.approx(max(v for _, v in history.validations), abs=1e-5)


def test_training_stops_early_and_keeps_the_best(classifier, images) -> None:
    values = iter([1.0, 3.0, 2.0, 2.0, 9.0])
    kept = []
    schedule = dataclasses.replace(QUICK, steps=20, every=1, patience=2)
    adapter = new_adapter(classifier, SIZE)

    def validate(candidate: LAX) -> float:
        kept.append({k: v.clone() for k, v in candidate.head.state_dict().items()})
        return next(values)

    history = train(adapter, images, validate, schedule)
    assert [v for _, v in history.validations] == [1.0, 3.0, 2.0, 2.0]
    assert all(torch.equal(v, kept[1][k]) for k, v in adapter.head.state_dict().items())


def test_files(classifier, images, tmp_path: Path) -> None:
    adapter = new_adapter(classifier, SIZE, quantity="a,b/c,d")
    train(adapter, images, untouched, QUICK)
    adapter.training = {"classifier": "mine"}
    adapter.save(tmp_path)
    opened = open_adapter(tmp_path, classifier)
    assert torch.equal(opened.explain(images, 2).scores, adapter.explain(images, 2).scores)
    assert (opened.quantity.name, opened.training) == ("0,1/2,3", {"classifier": "mine"})
    torch.manual_seed(9)
    other = SoftmaxClassifier(StridedClassifier(classes=4, width=8), LABELS)
    with pytest.raises(CounterlensError, match="trained for another model"):
        open_adapter(tmp_path, other)
    weights = tmp_path / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CounterlensError, match=r"adapter\.safetensors: missing, or not"):
        open_adapter(tmp_path, classifier)
    description = json.loads((tmp_path / "adapter.json").read_text())
    version = description.pop("schema_version")
    for key in ("schema_version", "version"):  # the second in older files
        (tmp_path / "adapter.json").write_text(json.dumps(description | {key: 99}))
        with pytest.raises(
            CounterlensError, match=r"adapter\.json: written by a newer counterlens \(schema 99; .*update"
        ):
            open_adapter(tmp_path, classifier)
    (tmp_path / "adapter.json").write_text(json.dumps(description | {"schema_version": version - 1}))
    with pytest.raises(
        CounterlensError, match=rf"adapter\.json: version {version - 1}, this counterlens reads {version}"
    ):
        open_adapter(tmp_path, classifier)
    description["version"] = version
    del description["taps"]
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(CounterlensError, match=r"adapter\.json: not an adapter"):
        open_adapter(tmp_path, classifier)
    with pytest.raises(CounterlensError, match=r"adapter\.json: missing"):
        open_adapter(tmp_path / "nowhere", classifier)


def test_what_does_not_fit(classifier, images) -> None:
    adapter = new_adapter(classifier, SIZE)
    with pytest.raises(UsageError, match=r"images: expected \[B, 3, 16, 16\]"):
        adapter.explain(torch.rand(1, 3, 8, 8))
    with pytest.raises(UsageError, match="target: expected labels from 0 to 3"):
        adapter.explain(images, 4)
    with pytest.raises(UsageError, match="target: expected one label or 12 of them"):
        adapter.explain(images, [0, 1])
    with pytest.raises(UsageError, match="target: expected whole numbers, got 'a'"):
        adapter.explain(images, "a")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="use wrap_classifier"):
        new_adapter(classifier.module, SIZE)
    assert adapter.explain(images[:0]).saliency.shape == (0, SIZE, SIZE)

    with pytest.raises(UsageError, match="thresholds: expected at least 1, got 0"):
        dataclasses.replace(QUICK, thresholds=0)

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.mean((2, 3)), x

    with pytest.raises(UsageError, match=r"classifier: expected logits \[B, 4\], got a tuple"):
        new_adapter(SoftmaxClassifier(Two(), LABELS), SIZE, taps=[])

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return classifier.module(x).detach()

    with pytest.raises(UsageError, match="not differentiable"):
        train(new_adapter(SoftmaxClassifier(Rounded(), LABELS), SIZE, taps=[]), images, untouched, QUICK)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(classifier, images, tmp_path) -> None:
    resource = pytest.importorskip("resource", reason="needs limits of a process")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    adapter = new_adapter(classifier, SIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(CounterlensError, match=r"checkpoint\.pt: cannot be written \(File too large\)"):
            train(adapter, images, untouched, QUICK, folder=tmp_path)
        with pytest.raises(CounterlensError, match=r"adapter\.safetensors: cannot be written"):
            adapter.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
