"""Counterfactuals that are in a folder already: what `counterlens counterfactual` or an audit wrote, read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CounterlensError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ..images.sources import Sample

COMMANDS = "`counterlens counterfactual` or `counterlens audit`"
NEEDED: dict[str, Any] = {"name": str, "image": str, "status": str}
NEEDED_DONE: dict[str, Any] = {
    "path": str, "source": str, "target": str, "prediction": str, "flipped": bool, "target_confidence": float | int,
    "l1": float | int, "fit": str, "input_sha256": str,
}  # fmt: skip
CLOSE = 2e-3  # how far L1 may be from what the results say; another reading of an image is further


@dataclass(frozen=True)
class Made:
    """One counterfactual, not yet read.

    Attributes:
        image: name of its image, as the run called it. counterfactual: its file.
        further: files of the image's other counterfactuals, from the same run.
        line: what the results say of it.
        saved: the image as the models saw it, where the run saved it.
    """

    image: str
    counterfactual: Path
    further: tuple[Path, ...]
    line: dict[str, Any]
    saved: Path | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What two runs have in common where they answer the same question: the image, by its bytes, and the target."""
        return self.line.get("input_sha256", self.image), self.line["target"]


@dataclass(frozen=True)
class Results:
    """The counterfactuals of a folder.

    Attributes:
        folder: where.
        facts: what made them; `pack` and `classifier` where a pack did.
        made: those that are done, in order.
        without: images that have none, for they failed or were skipped.
    """

    folder: Path
    facts: dict[str, Any]
    made: list[Made]
    without: int


def read_results(folder: Path) -> Results:
    """What a run or an audit left in a folder.

    Raises:
        UsageError: the folder holds neither, or no counterfactual; the message names it.
    """
    from ..audit.results import MANIFEST
    from ..outputs import read_run

    if not folder.is_dir():
        raise UsageError(f"{folder}: no folder; give what {COMMANDS} wrote")
    found = _of_audit(folder) if (folder / MANIFEST).is_file() else None
    if found is None:
        run = read_run(folder)
        if run is None:
            raise UsageError(f"{folder}: no results there; give a folder that {COMMANDS} wrote")
        if run["command"] != "counterlens counterfactual":
            raise UsageError(f"{folder}: holds what {run['command']} wrote, not what {COMMANDS} did")
        found = _of_run(folder, run)
    if not found.made:
        raise UsageError(f"{folder}: none of its {found.without} images has a counterfactual")
    return found


def _of_run(folder: Path, run: dict[str, Any]) -> Results:
    from ..outputs import LOG

    path = folder / LOG
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    lines: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break  # the last line of a run that was killed
            raise UsageError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(line, dict) or (lacking := _lacking(line)):
            what = f"it has no {lacking}" if isinstance(line, dict) else "it is no object"
            raise UsageError(f"{path}, line {number}: not a line of a run: {what}")
        lines[line["name"]] = line
    further: dict[str, list[Path]] = {}
    for line in lines.values():
        if "answer_of" in line and line["status"] == "done":
            further.setdefault(line["answer_of"], []).append(_there(folder, line["path"]))
    own = [line for line in lines.values() if "answer_of" not in line]
    made = [
        Made(line["image"], _there(folder, line["path"]), tuple(further.get(line["name"], ())), line)
        for line in own
        if line["status"] == "done"
    ]
    return Results(folder, run, made, len(own) - len(made))


def _lacking(line: dict[str, Any]) -> str:
    """The first field of a line of results.jsonl that is not there, or of another type; empty where all are."""
    wanted = NEEDED | (NEEDED_DONE if line.get("status") == "done" else {})
    return next((name for name, kind in wanted.items() if not isinstance(line.get(name), kind)), "")


def _there(folder: Path, path: str) -> Path:
    """A file of a run; the folder may have been moved since."""
    file = folder / Path(path).name
    if not file.is_file():
        raise UsageError(f"{file}: is in the results and is not there")
    return file


def _of_audit(folder: Path) -> Results:
    from ..audit.results import Results as Audit

    audit = Audit.open(folder)
    made, without = [], 0
    for row in audit.rows():
        if row["status"] != "done" or row["counterfactual"] is None or row["image"] is None:
            without += 1
            continue
        line = {k: v for k, v in row.items() if v is not None}
        line["source"] = row["prediction"]
        made.append(Made(row["id"], folder / row["counterfactual"], (), line, folder / row["image"]))
    return Results(folder, dict(audit.manifest["identity"]["model"]), made, without)


class Reader:
    """Reads images as a run read them, and refuses what is not what it read.

    Args:
        results: whose images.
        samples: where they are now, if not where the run found them; recognised by their bytes.
        colour: beside padded pictures, in [0, 1].
    """

    def __init__(
        self, results: Results, samples: Sequence[Sample] = (), colour: tuple[float, ...] = (0.0, 0.0, 0.0)
    ) -> None:
        self.by_hash = {sample.sha256(): sample for sample in samples}
        self.colour = colour
        self.official = bool(results.facts.get("match_official"))

    def pair(self, made: Made) -> tuple[Tensor, Tensor]:
        """An image and its counterfactual, [3, H, W] each, in [0, 1].

        Raises:
            CounterlensError: a file is missing, changed, or cannot be read; the message names it.
        """
        after = picture(made.counterfactual)
        before = picture(made.saved) if made.saved is not None else self._input(made, tuple(after.shape[1:]))
        if before.shape != after.shape:
            raise UsageError(
                f"{made.counterfactual}: {_size(after)} pixels, and its image is of {_size(before)}; it is not this "
                "image's counterfactual"
            )
        said, found = made.line["l1"], (after - before).abs().mean().item()
        if abs(found - said) > CLOSE:
            raise UsageError(
                f"{made.counterfactual}: L1 to {made.image} is {found:.4f}, and the results say {said:.4f}; one of the "
                "files was changed, or the image cannot be read here as the run read it"
            )
        return before, after

    def _input(self, made: Made, size: tuple[int, ...]) -> Tensor:
        import torch

        from counterlens.export.hashing import file_digest

        from ..images.files import as_pixels, framed, open_picture
        from ..images.fitting import Frame, take

        line, path = made.line, Path(made.image)
        wanted = line["input_sha256"]
        if (sample := self.by_hash.get(wanted)) is not None:
            file: Any = sample.file()
        elif not path.is_file():
            raise UsageError(f"{made.image}: no file here; say with --images where the images of the run are")
        elif file_digest(path) != wanted:
            raise UsageError(f"{made.image}: has changed since it was explained")
        else:
            file = path
        opened = open_picture(file, made.image, managed=not self.official)
        height, width = size
        if line["fit"] == "native":
            frame = Frame("native", opened.size, (0, 0, opened.width, opened.height), (width, height))
        else:
            frame = framed(line["fit"], opened, made.image, width)
        shown = take(opened, frame, "bilinear" if self.official else "lanczos", self.colour)
        return torch.from_numpy(as_pixels(shown)).permute(2, 0, 1).contiguous()


def picture(path: Path) -> Tensor:
    """A picture file at its own size, [3, H, W] in [0, 1].

    Raises:
        CounterlensError: it cannot be read; the message names it.
    """
    import torch

    from ..images.files import as_pixels, open_picture

    if not path.is_file():
        raise CounterlensError(f"{path}: is in the results and is not there")
    return torch.from_numpy(as_pixels(open_picture(path, path))).permute(2, 0, 1).contiguous()


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"
