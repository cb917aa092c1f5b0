"""Labels that share a name: one resolver, indices always work, and no name is resolved to the wrong one of two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from counterlens.engine import Config, Engine
from counterlens.engine.audit.auditor import Auditor
from counterlens.engine.audit.plan import Options
from counterlens.engine.errors import UsageError
from counterlens.engine.images.collect import read_names
from counterlens.engine.images.sources import open_source
from counterlens.engine.labels import distinct_names, find_label, is_label, match_labels
from counterlens.engine.metrics.quantities import make_quantity
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.models.stable_diffusion import make_prompts
from tests.tiny import IMAGE_SIZE, save_dit, save_ldm, save_stable_diffusion

LABELS = ["dog", "crane", "maillot", "7", "cat", "crane", "maillot", "3", "boat", "crane"]


@pytest.mark.parametrize(
    ("said", "index"),
    [
        ("dog", 0), ("boat", 8), (0, 0), (9, 9), ("9", 9), ("1", 1), ("4.0", 4),
        ("7", 3), ("3", 7), (7, 7), (3, 3),  # text is a name first, a number is an index
        ("crane (5)", 5), ("maillot (2)", 2),
    ],
)  # fmt: skip
def test_names_and_indices_mean_one_label(said: str | int, index: int) -> None:
    assert find_label(said, LABELS) == find_label(said, distinct_names(LABELS)) == index
    assert is_label(said, LABELS)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("crane", "3 labels are named 'crane'; use 1, 5 or 9"),
        ("maillot", "2 labels are named 'maillot'; use 2 or 6"),
        ("bird", "'bird' is no label"),
        ("10", "'10' is no label"),
        (10, "10 is no label"),
        (-1, "-1 is no label"),
        (True, "True is no label"),
        ("crane (2)", "is no label"),
        ("²", "is no label"),
    ],
)
def test_names_of_several_labels_are_refused_with_their_indices(said: str | int, words: str) -> None:
    for labels in (LABELS, distinct_names(LABELS)):
        with pytest.raises(UsageError) as caught:
            find_label(said, labels)
        assert words in str(caught.value)


def test_generators_are_matched_by_place_where_names_repeat() -> None:
    assert match_labels(LABELS, LABELS, "classes") == list(range(10))
    assert match_labels(["cat", "boat"], LABELS, "classes") == [4, 8]
    assert match_labels(["cat", "bird"], LABELS, "classes") is None
    with pytest.raises(UsageError, match=r"^labels: 'crane' is the name of classes 1, 5 or 9; .*label 1 is.*classes="):
        match_labels(["cat", "crane"], LABELS, "classes")
    with pytest.raises(UsageError, match=r"^labels: labels 0 or 2 are both named 'cat'.*4.*classes="):
        match_labels(["cat", "dog", "cat"], LABELS, "classes")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
    base = tmp_path_factory.mktemp("labels")
    saves = {"ldm": save_ldm, "dit": save_dit, "sd": save_stable_diffusion}
    return {name: save(base / name) for name, save in saves.items()}


def rename(folder: Path, names: list[str]) -> None:
    import json

    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": dict(enumerate(names))}))


def engine_of(folder: Path, labels: list[str], **own: object) -> Engine:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, len(labels))
    )
    config = Config(mode="official", steps=6, strength=0.5)
    return Engine.from_pretrained(folder, net, config, labels=labels, runtime="eager", device="cpu", **own)


@pytest.mark.parametrize("kind", ["ldm", "dit"])
def test_the_label_that_was_asked_for_is_generated(folders, kind: str) -> None:
    rename(folders[kind], LABELS)
    engine = engine_of(folders[kind], LABELS)
    assert engine.diffusion.classes.tolist() == list(range(10))
    image = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    source = int(engine.probabilities(image).argmax())
    by_target = {}
    for target in {1, 5, 9} - {source}:
        got = engine.counterfactual(image, targets=target)
        assert got.target.tolist() == [target]
        assert got.record(0)["target"] == f"crane ({target})"
        by_target[target] = got.images
    first, second = list(by_target.values())[:2]
    assert not torch.equal(first, second)
    with pytest.raises(UsageError, match=r"^target: 3 labels are named 'crane'; use 1, 5 or 9"):
        engine.counterfactual(image, targets="crane")
    with pytest.raises(UsageError, match=r"^neighbours: 2 labels are named 'maillot'"):
        Engine(engine.diffusion, engine.classifier, neighbours={"dog": ["maillot"]})


@pytest.mark.parametrize("kind", ["ldm", "dit"])
def test_names_that_contradict_the_order_are_refused(folders, kind: str) -> None:
    rename(folders[kind], [f"thing {i}" for i in range(10)])
    shuffled = [f"thing {i}" for i in (1, 0, *range(2, 10))]
    assert engine_of(folders[kind], shuffled).diffusion.classes.tolist() == [1, 0, *range(2, 10)]
    with pytest.raises(UsageError, match=r"^labels: 'thing 1' is label 0 and class 1 .*'bird'.*classes="):
        engine_of(folders[kind], [*shuffled[:-1], "bird"])
    two = ["thing 3", "thing 3"]
    with pytest.raises(UsageError, match=r"^labels: labels 0 or 1 are both named 'thing 3'"):
        engine_of(folders[kind], two)
    assert engine_of(folders[kind], two, classes=[3, 4]).diffusion.classes.tolist() == [3, 4]


def test_text_that_says_two_labels_alike_is_told(folders) -> None:
    with pytest.warns(UserWarning, match=r"^prompts: labels 1, 5, 9 are all said as 'a photo of a crane\.'"):
        make_prompts(LABELS, "imagenet")
    prompts = [f"number {i}" for i in range(10)]
    engine = engine_of(folders["sd"], LABELS, prompts=prompts)
    assert engine.diffusion.prompts == prompts
    with pytest.raises(UsageError, match=r"^classes: this model is text-conditional"):
        engine_of(folders["sd"], LABELS, prompts=prompts, classes=list(range(10)))


def test_class_folders_and_manifests_of_two_labels(folders, tmp_path: Path) -> None:
    rename(folders["dit"], LABELS)
    engine = engine_of(folders["dit"], LABELS)

    def audited(name: str, *folders: str) -> Auditor:
        for i, folder in enumerate(folders):
            (tmp_path / name / folder).mkdir(parents=True)
            Image.new("RGB", (16, 16), (10 * i, 9, 99)).save(tmp_path / name / folder / f"{i}.png")
        return Auditor(engine, open_source(tmp_path / name), Options())

    with pytest.raises(UsageError, match=r"^label in .*: 3 labels are named 'crane'; use 1, 5 or 9"):
        audited("names", "dog", "crane")
    auditor = audited("indices", "0", "5", "9", "crane (1)", "7")
    assert sorted(auditor.labels) == [0, 1, 3, 5, 9]  # the folder 7 is the label of that name
    assert [c.label for c in auditor.plan()] == auditor.labels
    (tmp_path / "m.csv").write_text("image,label,target\nindices/0/0.png,dog,crane\n")
    with pytest.raises(UsageError, match=r"^target: 3 labels are named 'crane'"):
        Auditor(engine, open_source(tmp_path / "m.csv"), Options())


def test_groups_of_a_quantity_and_lists_of_names(tmp_path: Path) -> None:
    classifier = SoftmaxClassifier(nn.Flatten(), LABELS)
    with pytest.raises(UsageError, match=r"^quantity: 3 labels are named 'crane'; use 1, 5 or 9"):
        make_quantity(classifier, "dog,crane/maillot,7,cat")
    assert make_quantity(classifier, "0,1,2,7,4/5,6,3,8,9").conditions == 2
    (tmp_path / "names.txt").write_text("\n".join(LABELS))
    assert read_names(str(tmp_path / "names.txt")) == LABELS


@pytest.mark.parametrize("labels", [["crane", "crane", "crane (0)"], ["a (1)", "a", "a", "a (1) (0)"], ["x"] * 3])
def test_no_two_labels_are_told_apart_alike(labels: list[str]) -> None:
    names = distinct_names(labels)
    assert len(set(names)) == len(labels)
    assert [find_label(name, names) for name in names] == list(range(len(names)))
