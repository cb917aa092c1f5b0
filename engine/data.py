"""Images and targets that users bring: folders, synset folders, CSV manifests, files of neighbours."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import CounterlensError, UsageError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SYNSET = re.compile(r"n\d{8}")
SYNSET_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")


@dataclass(frozen=True)
class Item:
    """An image file, the target asked for it (None: the run's), and its label, if its folder says."""

    path: Path
    target: str | None = None
    label: str | None = None


def collect(paths: Sequence[Path]) -> list[Item]:
    """Files as they are; folders as the images in them, labelled by subfolder where there are subfolders.

    Subfolders named like ImageNet's synsets (n01440764) get their names from LOC_synset_mapping.txt or
    synset_words.txt (`n01440764 tench, Tinca tinca`) beside them or one folder up, and keep their own without it.

    Raises:
        UsageError: a folder holds no image.
    """
    items = []
    for path in paths:
        if not path.is_dir():
            items.append(Item(path))
            continue
        names = synset_names(path)
        found = [Item(p) for p in _images(path)]
        for folder in sorted(p for p in path.iterdir() if p.is_dir()):
            found += [Item(p, label=names.get(folder.name, folder.name)) for p in _images(folder)]
        if not found:
            raise UsageError(f"images: {path} holds no image ({', '.join(ENDINGS)})")
        items += found
    return items


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))


def synset_names(folder: Path) -> dict[str, str]:
    """Names of synsets, from a file in the folder or the one above it; none without such a file.

    Raises:
        CounterlensError: a line is not `n01440764 name`; the message says which.
    """
    for path in (where / name for where in (folder, folder.parent) for name in SYNSET_FILES):
        if not path.is_file():
            continue
        names = {}
        for number, line in enumerate(_lines(path), 1):
            synset, _, name = line.partition(" ")
            if not SYNSET.fullmatch(synset) or not name.strip():
                raise CounterlensError(f"{path}, line {number}: expected a synset and its name, got {line!r}")
            names[synset] = name.strip()
        return names
    return {}


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CounterlensError(f"{path}: cannot be read ({error})") from error


def read_manifest(path: Path) -> list[Item]:
    """Images and targets from a CSV file with the columns `image` and, if wanted, `target`.

    Paths are relative to the file; an empty target means the run's.

    Raises:
        UsageError: the file cannot be read, lacks the column `image`, or a line has no image.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"manifest: {path} cannot be read ({error})") from error
    if not rows or "image" not in rows[0]:
        raise UsageError(f"manifest: {path} has no column `image`; expected a first line `image,target`")
    items = []
    for number, row in enumerate(rows, 2):
        if not (row["image"] or "").strip():
            raise UsageError(f"manifest: {path}, line {number}: no image")
        items.append(Item(path.parent / row["image"].strip(), (row.get("target") or "").strip() or None))
    return items


def read_neighbours(path: Path) -> dict[str, list[str]]:
    """Nearest labels of each label, nearest first: JSON `{"tench": ["goldfish", ...]}` or CSV lines `tench,goldfish`.

    Raises:
        UsageError: the file cannot be read or is not such a mapping.
    """
    try:
        text = path.read_text()
        if path.suffix == ".json":
            content = json.loads(text)
            if not isinstance(content, dict) or not all(
                isinstance(v, list) and all(isinstance(n, str) for n in v) for v in content.values()
            ):
                raise UsageError(f"neighbours: {path}: expected an object of lists of labels")
            return content
        rows = [row for row in csv.reader(text.splitlines()) if row]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UsageError(f"neighbours: {path} cannot be read ({error})") from error
    if short := next((row for row in rows if len(row) < 2), None):
        raise UsageError(f"neighbours: {path}: {short[0]!r} has no neighbour; expected label,nearest,next nearest,...")
    return {row[0].strip(): [name.strip() for name in row[1:]] for row in rows}


def read_names(text: str) -> list[str]:
    """Names separated by commas, or one per line of a text file.

    Raises:
        UsageError: a name is empty or stands twice, or the file cannot be read.
    """
    path = Path(text)
    try:
        names = path.read_text().splitlines() if path.suffix == ".txt" else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"labels: {path} cannot be read ({error})") from error
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names or len(set(names)) < len(names):
        raise UsageError(f"labels: expected different names, none of them empty, got {names[:8]}")
    return names
