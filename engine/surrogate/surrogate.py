"""A surrogate as a whole: the students, what was asked, which box they are of; saved, opened, held to the box."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from counterlens.export.files import newer
from counterlens.export.hashing import file_digest
from counterlens.export.store import weights_digest

from ..blackbox.box import Fingerprint
from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from ..images.files import make_folder
from ..models.files import read_json
from ..models.protocols import SoftmaxClassifier
from ..showing import one_line
from .student import Students, new_students

if TYPE_CHECKING:
    from ..blackbox.box import BlackBox

FORMAT, VERSION = "counterlens-surrogate", 1
DESCRIPTION, WEIGHTS, ASKED = "surrogate.json", "surrogate.safetensors", "asked.safetensors"


@dataclass
class Surrogate:
    """A trained student of a black box.

    Attributes:
        students: the networks.
        labels: of the box.
        image_size: side of the images in pixels.
        hard: the box says labels only.
        box: which one it is, and its answers to the probes: a record of `blackbox.box.Fingerprint`.
        images: [N, 3, H, W] uint8, all that the box was asked.
        answers: [N, labels], what it said.
        training: plain values: the plan, queries by kind, rounds, agreement.
    """

    students: Students
    labels: list[str]
    image_size: int
    hard: bool
    box: dict[str, Any]
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    answers: Tensor = field(default_factory=lambda: torch.empty(0))
    training: dict[str, Any] = field(default_factory=dict)

    __repr__ = one_line

    @property
    def classifier(self) -> SoftmaxClassifier:
        """The students as a differentiable classifier."""
        return SoftmaxClassifier(self.students.eval().requires_grad_(False), self.labels)

    @property
    def digest(self) -> str:
        """A short hash of the students' weights."""
        return weights_digest([self.students])[:16]

    def check(self, box: BlackBox) -> None:
        """Hold the box to what it was.

        Raises:
            UsageError: another box, other labels or other image size. CounterlensError: it answers otherwise by now.
        """
        before, now = Fingerprint.of(self.box), box.fingerprint()
        if (size := self.image_size) != box.image_size:
            raise UsageError(
                f"surrogate: trained on images of {size}x{size}, these models take {box.image_size}x{box.image_size}; "
                "train another one: counterlens surrogate train"
            )
        if list(before.labels) != list(now.labels):
            raise UsageError(f"surrogate: {before.change(now)}; it was trained on {before.name}, this is {now.name}")
        if change := before.change(now):
            raise CounterlensError(
                f"surrogate: {box.name} is not what it was when this one was trained on {before.name}: {change}; "
                "train another one: counterlens surrogate train"
            )

    def save(self, folder: str | Path) -> Path:
        """Write weights, what was asked, and the description, which goes last; returns the folder.

        Raises:
            UsageError: the folder cannot be written. CounterlensError: a file cannot.
        """
        folder = make_folder(Path(folder))
        write_atomically(folder / WEIGHTS, save({k: v.contiguous() for k, v in self.students.state_dict().items()}))
        write_atomically(folder / ASKED, save({"images": self.images, "answers": self.answers}))
        members = self.students.members
        description = {
            "format": FORMAT,
            "schema_version": VERSION,
            "labels": self.labels,
            "image_size": self.image_size,
            "hard": self.hard,
            "members": len(members),
            "width": members[0].width,
            "box": self.box,
            "files": {name: file_digest(folder / name) for name in (WEIGHTS, ASKED)},
            "training": self.training,
        }
        write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
        return folder


def is_surrogate(folder: str | Path) -> bool:
    """Whether a path is the folder of a surrogate."""
    return (Path(folder) / DESCRIPTION).is_file()


def open_surrogate(folder: str | Path) -> Surrogate:
    """Open a saved surrogate.

    Raises:
        UsageError: there is none in the folder. CounterlensError: its files are missing or changed, or of another
            version.
    """
    folder = Path(folder)
    if not is_surrogate(folder):
        raise UsageError(
            f"surrogate: {folder} holds none ({DESCRIPTION} is missing); train one: counterlens surrogate train"
        )
    said = read_json(folder / DESCRIPTION)
    if said.get("format") != FORMAT:
        raise CounterlensError(f"{folder / DESCRIPTION}: expected {FORMAT}, got {said.get('format')!r}")
    if problem := newer(said.get("schema_version"), VERSION):
        raise CounterlensError(f"{folder / DESCRIPTION}: {problem}, or train it again: counterlens surrogate train")
    try:
        labels, hard, box = [str(label) for label in said["labels"]], bool(said["hard"]), dict(said["box"])
        size, members, width = (int(said[name]) for name in ("image_size", "members", "width"))
        files, training = dict(said["files"]), dict(said["training"])
        expected = [files[WEIGHTS], files[ASKED]]
    except (KeyError, TypeError, ValueError) as error:
        raise CounterlensError(f"{folder / DESCRIPTION}: not a surrogate ({type(error).__name__}: {error})") from error
    for name, digest in zip((WEIGHTS, ASKED), expected, strict=True):
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise CounterlensError(f"{folder / name}: missing, or not the file that {DESCRIPTION} describes")
    students = new_students(len(labels), size, members, width)
    try:
        students.load_state_dict(load_file(folder / WEIGHTS))
        asked = load_file(folder / ASKED)
        images, answers = asked["images"], asked["answers"]
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise CounterlensError(f"{folder}: {str(error).splitlines()[0]}") from error
    students.eval().requires_grad_(False)
    return Surrogate(students, labels, size, hard, box, images, answers, training)
