"""Folders, synset folders, manifests and files of neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images.collect import read_folder, read_names, read_neighbours


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_synset_folders_have_names(tmp_path: Path) -> None:
    images = tmp_path / "val"
    touch(images / "n01440764" / "x.JPEG", images / "n01443537" / "y.JPEG")
    assert [label for _, label in read_folder(images).images] == ["n01440764", "n01443537"]
    mapping = tmp_path / "LOC_synset_mapping.txt"
    mapping.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    assert [label for _, label in read_folder(images).images] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    mapping.write_text("tench\n")
    with pytest.raises(CounterlensError, match=r"LOC_synset_mapping\.txt, line 1"):
        read_folder(images)


def test_neighbours(tmp_path: Path) -> None:
    as_csv, as_json = tmp_path / "n.csv", tmp_path / "n.json"
    as_csv.write_text('tench,goldfish,"great white shark, man-eater"\n')
    assert read_neighbours(as_csv) == {"tench": ["goldfish", "great white shark, man-eater"]}
    as_json.write_text(json.dumps({"a": ["b"]}))
    assert read_neighbours(as_json) == {"a": ["b"]}
    for path, text in [(as_csv, "tench\n"), (as_json, "[1]"), (as_json, '{"a": "b"}'), (as_json, "{")]:
        path.write_text(text)
        with pytest.raises(UsageError, match=r"^neighbours:"):
            read_neighbours(path)


def test_names(tmp_path: Path) -> None:
    assert read_names("cat, dog") == ["cat", "dog"]
    (tmp_path / "l.txt").write_text("tench, Tinca tinca\ngoldfish\n\n")
    assert read_names(str(tmp_path / "l.txt")) == ["tench, Tinca tinca", "goldfish"]
    for text in ("cat,cat", "cat,,dog", "", str(tmp_path / "none.txt")):
        with pytest.raises(UsageError, match=r"^labels:"):
            read_names(text)


def test_relative_targets(tiny) -> None:
    diffusion, classifier = tiny
    nearest = {str(d): [str(d), str((d + 1) % 10), "5"] for d in range(10)}
    engine = Engine(diffusion, classifier, neighbours=nearest)
    p = torch.eye(10)[[3, 9]] + 0.1 * torch.eye(10)[[7, 2]]
    assert engine.resolve_targets(["neighbour", "neighbour"], p).tolist() == [4, 0]
    assert engine.resolve_targets("runner-up", p).tolist() == [7, 2]
    with pytest.raises(UsageError, match=r"^target: opposite needs a classifier with two labels, this one has 10"):
        engine.check_target("opposite")
    with pytest.raises(UsageError, match=r"^neighbours: none given for 9 labels, '1' for one"):
        Engine(diffusion, classifier, neighbours={"0": ["1"]}).check_target("neighbour")
    with pytest.raises(UsageError, match=r"^neighbours: 'eleven' is no label"):
        Engine(diffusion, classifier, neighbours={"0": ["eleven"]})
