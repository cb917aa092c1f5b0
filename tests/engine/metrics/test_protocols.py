"""The papers' columns: by hand, and against the formulas of the published code written out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from counterlens.engine.errors import NotFinite, UsageError
from counterlens.engine.metrics import cout, sfid
from counterlens.engine.metrics.attributes import (
    Attributes,
    attributes_changed,
    correlation_difference,
    read_attributes,
)
from counterlens.engine.metrics.distribution import frechet, split_frechet
from counterlens.engine.metrics.encoders import ENCODERS
from counterlens.engine.metrics.protocols import (
    PROTOCOLS,
    Batch,
    Cell,
    Column,
    Facts,
    Protocol,
    check_classifier,
    find_protocol,
    protocol_table,
)
from tests.engine.metrics.models import Random

N, A = 12, 5
G = torch.Generator().manual_seed(3)
BEFORE = (torch.rand(N, 3, 8, 8, generator=G) * 255).round() / 255
AFTER = (torch.rand(N, 3, 8, 8, generator=G) * 255).round() / 255
FURTHER = torch.rand(N, 2, 3, 8, 8, generator=G)
FLIPPED = torch.tensor([True, True, False] * 4)
CORRECT = torch.tensor([True, False] * 6)
MODEL = Random()
SOURCE, TARGET = MODEL(BEFORE).argmax(1), (MODEL(BEFORE).argmax(1) + 1) % 5
FACTS = Facts(FLIPPED, torch.linspace(0, 1, N), SOURCE, TARGET, CORRECT)
WEIGHTS = torch.randn(3 * 64, 6, generator=G)
NAMES = ["Young", "Smiling", "Male", "Bald", "Hat"]
ANNOTATED = Attributes(NAMES, torch.rand(50, A, generator=G) > 0.6, [])


def projected(images: Tensor, width: int = 2) -> Tensor:
    return images.flatten(1) @ WEIGHTS[:, :width]


def attributes(images: Tensor) -> Tensor:
    return (images.flatten(1) @ WEIGHTS[:, :A] / 4).sigmoid()


def apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3))


EVERY: dict[str, Callable[..., Tensor]] = {
    "inception": projected, "vggface2": projected, "simsiam": projected, "oracle": attributes, "lpips": apart,
}  # fmt: skip


def batches(size: int = 5) -> list[Batch]:
    parts = zip(BEFORE.split(size), AFTER.split(size), FURTHER.split(size), strict=True)
    return [Batch(a, b, list(c)) for a, b, c in parts]


def table(protocol: str, facts: Facts = FACTS, over: object = None, **more: object) -> dict[str, Cell]:
    given: dict[str, object] = {
        "encoders": EVERY, "classifier": MODEL, "attributes": ANNOTATED, "query": "Smiling", "further": True,
    }  # fmt: skip
    cells = protocol_table(find_protocol(protocol, over), facts, batches(), **(given | more))  # type: ignore[arg-type]
    return {cell.column.name: cell for cell in cells}


def literal_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """As pytorch-fid writes it."""
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy (pip install '.[test]')")
    mean, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(linalg.sqrtm(cov_a @ cov_b).real)


def test_a_face_by_hand() -> None:
    # Features (1, 0) and (1, 1): a cosine of 0.707, one person; (1, 0) and (0, 1): 0, another one.
    images = torch.zeros(2, 1, 1, 2)
    images[:, 0, 0, 0] = 1
    after = images.clone()
    after[0, 0, 0, 1] = 1
    after[1, 0, 0] = torch.tensor([0.0, 1.0])
    facts = Facts(torch.tensor([True, True]), torch.tensor([1.0, 0.5]), torch.tensor([0, 0]), torch.tensor([1, 1]))
    cells = protocol_table(
        find_protocol("celeba"), facts, [Batch(images, after)],
        encoders={"vggface2": lambda x: x.flatten(1), "oracle": lambda x: x.flatten(1)},
        attributes=Attributes(["a", "b"], torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]).bool(), []), query="a",
    )  # fmt: skip
    found = {cell.column.name: cell for cell in cells}
    assert found["fva"].value == 0.5
    assert abs(found["fs"].value - 0.5**0.5 / 2) < 1e-12
    assert found["mnac"].value == 1.5  # b appears; a goes and b appears
    # Changes (a, b): (0, 1), (-1, 1). b never differs: correlation 0, as in the data; a with itself 1, as in the data.
    assert abs(found["cd"].value) < 1e-12
    assert found["flip_rate"].value == 1
    assert "lpips" in (found["diversity"].missing or "")
    assert "true labels" in (found["cout"].missing or "")
    # L1 and L2 as sums: 1 and 1 of the first, 2 and sqrt 2 of the second.
    ldce = {c.column.name: c for c in protocol_table(find_protocol("ldce"), facts, [Batch(images, after)])}
    assert (ldce["l1"].value, ldce["confidence"].value) == (1.5, 0.75)
    assert abs(ldce["l2"].value - (1 + 2**0.5) / 2) < 1e-12


def test_celeba_against_the_published_formulas() -> None:
    found = table("celeba")
    rows = FLIPPED.numpy()
    before, after = (projected(x).double().numpy() for x in (BEFORE, AFTER))
    cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert abs(found["fva"].value - (cosine[rows] > 0.5).mean()) < 1e-12
    assert abs(found["fs"].value - cosine[rows].mean()) < 1e-6
    seen, now = (attributes(x).numpy() > 0.5 for x in (BEFORE, AFTER))
    assert found["mnac"].value == (seen[rows] != now[rows]).sum(1).mean()
    deltas, expected = now[rows].astype(float) - seen[rows].astype(float), ANNOTATED.values.numpy().astype(float)
    distance = 0.0
    for i in range(A):
        with np.errstate(invalid="ignore", divide="ignore"):
            ours = np.corrcoef(deltas[:, i], deltas[:, 1])
        ours = np.zeros((2, 2)) if np.isnan(ours).any() else ours
        distance += abs(ours[0, 1] - np.corrcoef(expected[:, i], expected[:, 1])[0, 1])
    assert abs(found["cd"].value - distance) < 1e-9
    every = torch.cat([AFTER[:, None], FURTHER], dim=1)
    pairs = [(every[:, i] - every[:, j]).square().mean((1, 2, 3)) for i, j in itertools.combinations(range(3), 2)]
    assert abs(found["diversity"].value - (sum(pairs) / 3).mean().item()) < 1e-6
    assert abs(found["cout"].value - cout(MODEL, BEFORE[CORRECT], AFTER[CORRECT], TARGET[CORRECT], SOURCE[CORRECT],
                                          compat="ace").score.mean().item()) < 1e-9  # fmt: skip
    assert {name: cell.n for name, cell in found.items()} == {
        "fid": 8, "sfid": 8, "fva": 8, "fs": 8, "mnac": 8, "cd": 8, "cout": 6, "diversity": 12, "flip_rate": 12,
    }  # fmt: skip
    assert all(cell.missing is None for cell in found.values())


def test_distances_against_the_published_formulas() -> None:
    pytest.importorskip("torchmetrics", reason="needs torchmetrics (pip install '.[quality]')")
    a, b = (projected(x).double() for x in (BEFORE, AFTER))
    ace = table("ace")
    assert abs(ace["fid"].value - literal_frechet(a.numpy(), b[FLIPPED].numpy())) < 1e-6
    # ACE: shuffled once, halved, the flipped counterfactuals of each half against the other half's originals.
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    one, other = order[:6], order[6:]
    expected = [literal_frechet(a[x].numpy(), b[y[FLIPPED[y]]].numpy()) for x, y in ((one, other), (other, one))]
    assert abs(ace["sfid"].value - sum(expected) / 2) < 1e-6
    assert abs(sfid(BEFORE, AFTER, projected, splits=1, kept=FLIPPED) - ace["sfid"].value) < 1e-9
    # LDCE: each class halved in order, all counterfactuals.
    halves: tuple[list[int], list[int]] = ([], [])
    for label in sorted(set(SOURCE.tolist())):
        rows = [i for i, s in enumerate(SOURCE.tolist()) if s == label]
        halves[0].extend(rows[: len(rows) // 2])
        halves[1].extend(rows[len(rows) // 2 :])
    expected = [literal_frechet(a[x].numpy(), b[y].numpy()) for x, y in (halves, halves[::-1])]
    assert abs(table("ldce")["sfid"].value - sum(expected) / 2) < 1e-6
    several = [split_frechet(a, b, splits=4, seed=1), split_frechet(a, b, splits=4, seed=1)]
    assert several[0] == several[1] != split_frechet(a, b, splits=4, seed=2)


def test_which_counterfactuals_count() -> None:
    assert {name: cell.n for name, cell in table("ace", over="all").items()} == {
        "fid": 12, "sfid": 12, "s3": 12, "cout": 12, "flip_rate": 12,
    }  # fmt: skip
    assert table("ldce", over="correct")["l1"].n == 6
    unknown = table("ace", Facts(FLIPPED, FACTS.target_confidence, SOURCE, TARGET))
    assert "true labels" in (unknown["cout"].missing or "")
    assert not unknown["cout"].failed
    none = table("ace", Facts(~FLIPPED & FLIPPED, FACTS.target_confidence, SOURCE, TARGET, CORRECT))
    assert none["fid"].failed
    assert "two counterfactuals at least, there are 0" in (none["fid"].missing or "")
    assert none["flip_rate"].value == 0


def test_what_networks_are_given() -> None:
    pixels = (torch.rand(1, 3, 40, 30, generator=G) * 255).round()
    image = pixels / 255
    array = pixels[0].permute(1, 2, 0).numpy().astype(np.uint8)
    resized = np.asarray(Image.fromarray(array).resize((224, 224), Image.Resampling.BILINEAR)).astype(np.float32)
    expected = (resized[:, :, ::-1] - np.array([91.4953, 103.8827, 131.0912])).transpose(2, 0, 1)
    difference = np.abs(ENCODERS["vggface2"].prepare(image)[0].numpy() - expected)
    assert difference.max() <= 2.001  # levels of 255; sums that end in a half are rounded either way
    assert difference.mean() < 0.03
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((array.astype(np.float32) / 255 - mean) / deviation).transpose(2, 0, 1)
    assert np.allclose(ENCODERS["simsiam"].prepare(image)[0].numpy(), expected, atol=1e-5)
    assert np.allclose(ENCODERS["oracle"].prepare(image)[0].numpy(), array.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    wide = ENCODERS["inception"].prepare(image)
    assert wide.shape == (1, 3, 299, 299)
    assert torch.allclose(wide[0, :, 0, 0], 2 * image[0, :, 0, 0] - 1, atol=1e-6)


CSV = "image_id,Young,Smiling\n1.jpg,1,-1\n2.jpg,-1,1\n3.jpg,-1,-1\n"
TXT = "3\nYoung Smiling\n1.jpg  1 -1\n2.jpg -1  1\n3.jpg -1 -1\n"


def test_annotations_in_both_forms(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "a.txt").write_text(TXT)
    (tmp_path / "p.csv").write_text("image_id,partition\n1.jpg,0\n2.jpg,0\n3.jpg,2\n")
    for name in ("a.csv", "a.txt"):
        read = read_attributes(tmp_path / name)
        assert read.names == ["Young", "Smiling"]
        assert read.images == ["1.jpg", "2.jpg", "3.jpg"]
        assert read.values.tolist() == [[True, False], [False, True], [False, False]]
        assert torch.allclose(read.correlations(0), torch.tensor([1, -0.5]).double())
    train = read_attributes(tmp_path / "a.csv", tmp_path / "p.csv")
    assert train.images == ["1.jpg", "2.jpg"]
    assert train.correlations(1).tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no line of names"]),
        (CSV + "4.jpg,1\n", ["line 5", "1 values for 2 attributes", "4.jpg"]),
        (CSV.replace("2.jpg,-1", "2.jpg,yes"), ["line 3", "-1, 0 or 1", "'yes'"]),
    ],
)
def test_bad_annotations(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_attributes(tmp_path / "a.csv")
    assert all(word in str(caught.value) for word in [*words, "attributes", "a.csv"])
    (tmp_path / "b.csv").write_text(CSV)
    (tmp_path / "p.csv").write_text("1.jpg 1\n2.jpg 1\n")
    with pytest.raises(UsageError, match=r"p\.csv does not say the split of 3\.jpg"):
        read_attributes(tmp_path / "b.csv", tmp_path / "p.csv")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: find_protocol("nobody"), ["protocol", "ldce, ace, celeba"]),
        (lambda: find_protocol("ace", "some"), ["over", "flipped"]),  # type: ignore[arg-type]
        (lambda: table("ace", encoders={"vgg": projected}), ["encoder", "'vgg'", "vggface2"]),
        (lambda: table("celeba", encoders={"vggface2": lambda x: x}), ["encoder vggface2", "[5, D]", "[5, 3, 8, 8]"]),
        (lambda: table("celeba", encoders={"lpips": lambda a, b: a}), ["encoder lpips", "[3]"]),
        (lambda: table("celeba", query="Tall"), ["query", "'Tall'", "Smiling"]),
        (lambda: table("celeba", query=None), ["query", "which attribute"]),
        (lambda: table("ace", splits=0), ["splits", "0"]),
        (lambda: protocol_table(PROTOCOLS["ldce"], FACTS, batches()[:1]), ["12", "5"]),
        (lambda: protocol_table(PROTOCOLS["ldce"], FACTS, [Batch(BEFORE, AFTER[:, :, :4])]), ["counterfactuals"]),
        (lambda: frechet(torch.rand(4, 2), torch.rand(1, 2)), ["FID", "two counterfactuals", "is 1"]),
        (lambda: split_frechet(BEFORE.flatten(1), AFTER.flatten(1), splits=2, groups=SOURCE), ["splits", "2"]),
        (lambda: attributes_changed(torch.tensor([[-2.0]]), torch.tensor([[3.0]])), ["oracle", "-2", "sigmoid"]),
        (lambda: correlation_difference(torch.rand(3, 2), torch.rand(3, 2), 0, torch.rand(3)), ["3 attributes"]),
        (lambda: correlation_difference(torch.rand(1, 2), torch.rand(1, 2), 0, torch.rand(2)), ["CD", "there are 1"]),
        (lambda: Attributes(["a"], torch.ones(3, 1).bool(), []).correlations(0), ["a", "same in all 3"]),
    ],
)
def test_bad_input(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_an_encoder_that_gives_nan_is_named() -> None:
    with pytest.raises(NotFinite, match="encoder simsiam: NaN or infinity for image 0, 1"):
        table("ace", encoders={"simsiam": lambda x: projected(x) * torch.nan})


def test_attributes_of_another_number_than_the_annotations() -> None:
    found = table("celeba", encoders={"oracle": projected_oracle})
    assert found["cd"].failed
    assert "expected 5 attributes" in (found["cd"].missing or "")
    assert found["mnac"].missing is None


def test_a_classifier_that_is_not_the_runs() -> None:
    says = MODEL(AFTER).argmax(1) == TARGET
    check_classifier(MODEL, replace(FACTS, flipped=says), Batch(BEFORE, AFTER))
    with pytest.raises(UsageError, match="otherwise than the results of 4 of the first 5"):
        check_classifier(MODEL, replace(FACTS, flipped=says ^ (torch.arange(N) != 2)), batches()[0])


def test_a_column_of_ones_own() -> None:
    column = Column(
        "near", "near", True, lambda m, rows: m.cosine("mine")[rows], "cosine of my features", needs=("mine",)
    )
    protocol = Protocol("mine", "mine", (column,))
    cell = protocol_table(protocol, FACTS, batches(), encoders={"mine": projected})[0]
    expected = torch.cosine_similarity(projected(BEFORE).double(), projected(AFTER).double()).mean().item()
    assert abs(cell.value - expected) < 1e-9
    assert protocol_table(protocol, FACTS, batches())[0].missing == "needs the encoder mine"


def projected_oracle(images: Tensor) -> Tensor:
    return attributes(images)[:, :3]
