"""Folders and tables that users bring: which images and rows they hold, without opening an image."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CounterlensError, UsageError

ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".jp2", ".tga", ".heic", ".heif",
)  # fmt: skip
PARQUET = (".parquet", ".pq")
DELIMITERS = (",", ";", "\t", "|")
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
SYNSET = re.compile(r"n\d{8}")
SYNSET_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")


def shown(path: Path) -> str:
    """A path as text that any file can hold: bytes that are no UTF-8 are written as \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


@dataclass
class Folder:
    """What a folder holds.

    Attributes:
        images: each with its label, the name of its class folder, if it is in one; in order.
        parquet: files of that kind, in order.
        unread: subfolders that cannot be listed, and why.
        notes: what is passed over, for a person to read.
    """

    images: list[tuple[Path, str | None]] = field(default_factory=list)
    parquet: list[Path] = field(default_factory=list)
    unread: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_folder(root: Path, recursive: bool = False) -> Folder:
    """The images of a folder and of its subfolders, which are their labels; with `recursive` of all folders below.

    Links are followed, but no folder is read twice. Subfolders named like ImageNet's synsets (n01440764) get their
    names from LOC_synset_mapping.txt or synset_words.txt (`n01440764 tench, Tinca tinca`) beside them or one folder up.

    Raises:
        UsageError: the folder itself cannot be listed.
    """
    out = Folder()
    names = synset_names(root)
    others: list[Path] = []
    deeper: list[Path] = []
    real = os.path.realpath(root)
    seen: set[str] = set()
    # Real folders first, so that what a link leads to stands under its own name where it is there as well.
    todo, links = [root], list[Path]()
    while todo or links:
        folder = todo.pop() if todo else links.pop(0)
        place = os.path.realpath(folder)
        if place in seen or (folder != root and Path(real).is_relative_to(place)):
            out.notes.append(f"{shown(folder)} is a link to {place}, whose images are read once")
            continue
        seen.add(place)
        try:
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda e: e.name)
        except OSError as error:
            if folder == root:
                raise UsageError(f"images: {root} cannot be read ({error.strerror or error})") from error
            out.unread.append((folder, error.strerror or str(error)))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path):
                if not recursive and folder != root:
                    deeper.append(path)
                else:
                    (links if entry.is_symlink() else todo).append(path)
            elif path.suffix.lower() in ENDINGS:
                parts = path.relative_to(root).parts
                out.images.append((path, names.get(parts[0], shown(Path(parts[0]))) if len(parts) > 1 else None))
            else:
                (out.parquet if path.suffix.lower() in PARQUET else others).append(path)
    for found in (out.images, out.unread):
        found.sort(key=lambda item: (item[0].parent.parts, item[0].name))
    out.parquet.sort()
    if deeper := [path for path in deeper if _holds_files(path)]:
        said = f"{_count(deeper, 'folder')} below class folders not read (--recursive does)"
        out.notes.append(f"{said}: {_some(deeper, root)}")
    if out.images:
        others, out.parquet = others + out.parquet, []
    if others:
        out.notes.append(f"{_count(others, 'file')} left out, not read by the ending: {_some(others, root)}")
    return out


def _holds_files(folder: Path) -> bool:
    try:
        return any(path.is_file() for path in folder.iterdir())
    except OSError:
        return True  # for all we know


def _count(paths: Sequence[Path], what: str) -> str:
    return f"{len(paths)} {what}{'' if len(paths) == 1 else 's'}"


def _some(paths: Sequence[Path], root: Path) -> str:
    named = sorted(shown(path.relative_to(root)) for path in paths)
    return ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")


def synset_names(folder: Path) -> dict[str, str]:
    """Names of synsets, from a file in the folder or the one above it; none without such a file.

    Raises:
        CounterlensError: a line is not `n01440764 name`; the message says which.
    """
    for path in (where / name for where in (folder, folder.parent) for name in SYNSET_FILES):
        if not os.path.isfile(path):
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
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CounterlensError(f"{path}: cannot be read ({error})") from error


@dataclass
class Table:
    """A table of text: column names, rows as (line, cells), and notes for a person to read."""

    columns: list[str]
    rows: list[tuple[int, list[str]]]
    encoding: str
    notes: list[str]


def read_table(path: Path, wanted: Sequence[str]) -> Table:
    """Read a CSV file as people's programs write them.

    UTF-8 or UTF-16, with a byte order mark or without, else Windows-1252 (said in a note); separated by commas,
    semicolons, tabs or bars, whichever gives one of the columns `wanted`; any line ends; quoted cells may hold line
    ends; empty lines, and cells beyond the first line's that are empty, are passed over.

    Raises:
        UsageError: the file cannot be read, is empty, has damaged quotes, NULs, a line with more cells than the first,
            a column twice, or no line below the first; the message says which line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    text, encoding, notes = _decode(path, data)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"{path}, line {line}: a NUL byte; the file is damaged, or no text: save it as CSV UTF-8")
    if not text.strip():
        raise UsageError(f"{path}: the file is empty; expected a first line such as image,label,target")
    if told := re.match(r"sep=(.)(\r\n|\r|\n)", text):  # Excel's own first line
        text, delimiters = text[told.end() :], [told[1]]
    else:
        delimiters = ["\t", *DELIMITERS] if path.suffix.lower() == ".tsv" else list(DELIMITERS)
    # The first that gives a known column; where none does, the one that gives most columns is in the message.
    known = {
        d: (sum(name.lower() in wanted for name in names), len(names)) for d in delimiters if (names := _first(text, d))
    }
    best = next((d for d, (found, _) in known.items() if found), max(known, key=lambda d: known[d][1], default=","))
    (_, columns), *rows = _rows(path, text, best) or [(1, [""])]
    while len(columns) > 1 and not columns[-1]:
        columns.pop()
    columns = [name.lower() if name.lower() in wanted else name for name in columns]
    if twice := [name for i, name in enumerate(columns) if name and name in columns[:i]]:
        raise UsageError(f"{path}: column {twice[0]!r} stands twice")
    for number, cells in rows:
        if any(cells[len(columns) :]):
            raise UsageError(f"{path}, line {number}: more fields than the first line names")
    return Table(columns, rows, encoding, notes)


def _decode(path: Path, data: bytes) -> tuple[str, str, list[str]]:
    """Text, its encoding, and a note where that is a guess."""
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "utf-8")
    if not mark and b"\0" in data[:2]:  # UTF-16 without a mark has a NUL beside every Latin letter
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    data = data[len(mark) :]
    try:
        return data.decode(encoding), encoding, []
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        if encoding == "utf-8":
            with contextlib.suppress(UnicodeDecodeError):
                return data.decode("cp1252"), "cp1252", [f"{path} is not UTF-8 (line {line}); read as Windows-1252"]
        raise UsageError(f"{path}, line {line}: not text that can be read; save it as CSV UTF-8") from error


def _first(text: str, delimiter: str) -> list[str]:
    """The first line's cells by a delimiter; none where it cannot be the one."""
    try:
        return [
            cell.strip()
            for cell in next(csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=delimiter, strict=True))
        ]
    except csv.Error:
        return []


def _rows(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Lines with something in them: their number and their cells, without surrounding space."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    number = 0
    while True:
        try:
            number = reader.line_num + 1
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            break
        except csv.Error as error:
            raise UsageError(f"{path}, line {number}: {error}; is a quote left open?") from error
        if any(cells):
            rows.append((number, cells))
    return rows


def read_neighbours(path: Path) -> dict[str, list[str]]:
    """Nearest labels of each label, nearest first: JSON `{"tench": ["goldfish", ...]}` or CSV lines `tench,goldfish`.

    Raises:
        UsageError: the file cannot be read or is not such a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
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
        UsageError: a name is empty or typed twice, or the file cannot be read.
    """
    path = Path(text)
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines() if path.suffix == ".txt" else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"labels: {path} cannot be read ({error})") from error
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    # A list of a thousand names may well hold two cranes; in a line that someone typed it is a slip.
    if not names or "" in names or (path.suffix != ".txt" and len(set(names)) < len(names)):
        raise UsageError(f"labels: expected different names, none of them empty, got {names[:8]}")
    return names
