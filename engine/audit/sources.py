"""Where an audit's images come from: folders, manifests, Parquet with image bytes, `datasets` folders."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ..data import ENDINGS, collect
from ..errors import CounterlensError, UsageError, install_hint

KNOWN = ("image", "label", "target", "id")
IMAGE_NAMES = ("image", "file", "file_name", "path")  # what other tools call the column `image`
Where = Path | tuple[int, int] | int  # a file; row group and row in it; row of a data set


@dataclass(frozen=True)
class Sample:
    """One image to explain, not yet read.

    Attributes:
        id: unique in its source.
        where: a file, or a place inside the source.
        label: its true label's name, if the source says.
        target: the target asked for it; None is the run's.
        slices: groups it belongs to, by column.
    """

    id: str
    where: Where
    label: str | None = None
    target: str | None = None
    slices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The samples of a data set in a fixed order, and how to read the bytes of one.

    Attributes:
        kind: folder, csv, parquet, parquet-bytes or datasets.
        path: what was opened.
        samples: in order.
        read: the file object or path of one sample; raises CounterlensError.
        notes: what a person should know, such as folders that are not read.
    """

    kind: str
    path: Path
    samples: list[Sample]
    read: Callable[[Sample], Path | io.BytesIO]
    notes: list[str]

    def digest(self) -> str:
        """Hash of every sample's id, label, target, slices and file size: what must not change under an audit."""
        h = hashlib.sha256()
        for s in self.samples:
            size = -1
            if isinstance(s.where, Path):
                size = s.where.stat().st_size if s.where.is_file() else -1
            h.update(json.dumps([s.id, s.label, s.target, s.slices, size], sort_keys=True).encode())
        if not isinstance(self.samples[0].where, Path) and self.path.is_file():
            h.update(str(self.path.stat().st_size).encode())
        return h.hexdigest()[:16]


def open_source(path: Path, slices: Sequence[str] = ()) -> Source:
    """Open a folder of images, a manifest, a Parquet file with images, or a Hugging Face `datasets` folder.

    Args:
        path: what to open. Columns are image (or file, file_name, path), label, target, id; paths are relative to it.
        slices: further columns, whose values are groups in the report.

    Raises:
        UsageError: there is nothing to audit there, columns are missing or unknown, or ids stand twice; the message
            names the file, the column or the id.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            source = _datasets(path, slices)
        else:
            if slices:
                raise UsageError(f"slice: {path} is a folder of images and has no column {slices[0]!r}")
            source = _folder(path)
    elif not path.exists():
        raise UsageError(f"source: {path}: no such file or folder")
    elif path.suffix.lower() in (".parquet", ".pq"):
        source = _parquet(path, slices)
    elif path.suffix.lower() in (".csv", ".tsv"):
        source = _csv(path, slices)
    else:
        raise UsageError(f"source: {path}: expected a folder, .csv, .tsv or .parquet; images are named by their folder")
    if not source.samples:
        raise UsageError(f"source: {path} holds no sample")
    twice = [name for name, n in Counter(s.id for s in source.samples).items() if n > 1]
    if twice:
        raise UsageError(f"source: {path}: id {twice[0]!r} stands twice ({len(twice)} ids do); add a column `id`")
    return source


def need(module: str, purpose: str, package: str | None = None, extra: str | None = "audit") -> Any:
    """Import an optional package, or say what to install.

    Raises:
        CounterlensError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        install = install_hint(extra) if extra else f"pip install {name}"
        raise CounterlensError(f"{purpose} needs {name}: {install}") from error


def _folder(path: Path) -> Source:
    try:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        for folder in folders:
            if folder.is_symlink() and path.resolve().is_relative_to(folder.resolve()):
                raise UsageError(f"source: {folder} is a link back to {folder.resolve()}; remove it")
        deeper = [p for f in folders for p in f.iterdir() if p.is_dir() and any(e.is_file() for e in p.iterdir())]
        items = collect([path])
    except OSError as error:
        raise UsageError(f"source: {path} cannot be read ({error.strerror or error})") from error
    samples = [Sample(_id(item.path.relative_to(path)), item.path, item.label) for item in items]
    notes = []
    if deeper:
        notes.append(f"{len(deeper)} folders deeper than class folders are not read, {deeper[0]} for one")
    others = sum(
        1 for f in (path, *folders) for p in f.iterdir()
        if p.is_file() and not p.name.startswith(".") and p.suffix.lower() not in ENDINGS
    )  # fmt: skip
    if others:
        notes.append(f"{others} files are no images by their ending and are left out")
    return Source("folder", path, samples, _file, notes)


def _id(path: Path) -> str:
    """A path as text that any file can hold: bytes that are no UTF-8 are written as \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _file(sample: Sample) -> Path:
    assert isinstance(sample.where, Path)
    return sample.where


def _csv(path: Path, slices: Sequence[str]) -> Source:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"source: {path} cannot be read ({error})") from error
    image = _image_column(path, columns, slices)
    _refuse_unknown(path, columns, image, slices)
    samples = []
    for number, row in enumerate(rows, 2):
        if None in row:
            raise UsageError(f"source: {path}, line {number}: more fields than the first line names")
        samples.append(_from_row(path, f"line {number}", row, image, slices))
    return Source("csv", path, samples, _file, [])


def _image_column(path: Path, columns: Sequence[str], slices: Sequence[str]) -> str:
    """The column that holds the image; refuses slices that are no columns."""
    if lost := [c for c in slices if c not in columns]:
        raise UsageError(f"slice: {path} has no column {lost[0]!r}; it has {', '.join(columns)}")
    found = [c for c in IMAGE_NAMES if c in columns]
    if not found:
        raise UsageError(f"source: {path} has no column `image`; it has {', '.join(columns) or 'no column'}")
    return found[0]


def _refuse_unknown(path: Path, columns: Sequence[str], image: str, slices: Sequence[str]) -> None:
    """A misspelt column must not pass for one that was left out."""
    if unknown := _unknown(columns, image, slices):
        raise UsageError(
            f"source: {path} has unknown columns {', '.join(map(repr, unknown[:5]))}; expected {', '.join(KNOWN)}; "
            "--slice COLUMN makes one a group of the report"
        )


def _unknown(columns: Sequence[str], image: str, slices: Sequence[str]) -> list[str]:
    return [c for c in columns if c not in (image, *KNOWN[1:], *slices)]


def _text(value: Any) -> str | None:
    text = "" if value is None else str(value).strip()
    return text or None


def _groups(row: dict[str, Any], slices: Sequence[str]) -> dict[str, str]:
    return {c: _text(row.get(c)) or "none" for c in slices}


def _from_row(path: Path, place: str, row: dict[str, Any], image: str, slices: Sequence[str]) -> Sample:
    name = _text(row[image])
    if name is None:
        raise UsageError(f"source: {path}, {place}: no image")
    if "\0" in name:
        raise UsageError(f"source: {path}, {place}: image {name!r} is no path")
    groups = _groups(row, slices)
    return Sample(
        _text(row.get("id")) or name, path.parent / name, _text(row.get("label")), _text(row.get("target")), groups
    )


def _parquet(path: Path, slices: Sequence[str]) -> Source:
    pa = need("pyarrow", "reading Parquet")
    pq = need("pyarrow.parquet", "reading Parquet")
    try:
        file = pq.ParquetFile(path)
        columns = list(file.schema_arrow.names)
        image = _image_column(path, columns, slices)
        kind = file.schema_arrow.field(image).type
        inside = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)
        if pa.types.is_struct(kind) and "bytes" not in [f.name for f in kind]:
            raise UsageError(
                f"source: {path}: column `{image}` is {kind}; expected paths, bytes or a struct with bytes"
            )
        if not inside and not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
            raise UsageError(
                f"source: {path}: column `{image}` is {kind}; expected paths, bytes or a struct with bytes"
            )
        if not inside:
            _refuse_unknown(path, columns, image, slices)
        wanted = [c for c in (*KNOWN[1:], *slices) if c in columns] + ([] if inside else [image])
        names = _label_names(file.schema_arrow)
        samples: list[Sample] = []
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=wanted).to_pylist()
            rows = rows or [{}] * file.metadata.row_group(group).num_rows  # no other columns
            for number, row in enumerate(rows):
                if not inside:
                    samples.append(_from_row(path, f"row {len(samples)}", row, image, slices))
                    continue
                label = row.get("label")
                if names and isinstance(label, int) and 0 <= label < len(names):
                    label = names[label]
                name = _text(row.get("id")) or f"{path.stem}-{len(samples):06d}"
                samples.append(
                    Sample(name, (group, number), _text(label), _text(row.get("target")), _groups(row, slices))
                )
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"source: {path} cannot be read as Parquet ({error})") from error
    if not inside:
        return Source("parquet", path, samples, _file, [])
    left = _unknown(columns, image, slices)
    notes = [f"columns not read: {', '.join(left)}"] if left else []
    return Source("parquet-bytes", path, samples, _RowGroups(path, image), notes)


def _label_names(schema: Any) -> list[str]:
    """Names of an integer label, where `datasets` wrote the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


class _RowGroups:
    """Image bytes out of a Parquet file, one row group held at a time."""

    def __init__(self, path: Path, image: str) -> None:
        self.path, self.image = path, image
        self.group: int | None = None
        self.column: Any = None
        self.lock = threading.Lock()

    def __call__(self, sample: Sample) -> io.BytesIO:
        pa, pq = need("pyarrow", "reading Parquet"), need("pyarrow.parquet", "reading Parquet")
        assert isinstance(sample.where, tuple)
        group, row = sample.where
        with self.lock:
            if group != self.group:
                try:
                    self.column = pq.ParquetFile(self.path).read_row_group(group, columns=[self.image]).column(0)
                except (OSError, pa.ArrowException) as error:
                    raise CounterlensError(f"{self.path}: row group {group} cannot be read ({error})") from error
                self.group = group
            value = self.column[row].as_py()
        return _bytes(value, sample)


def _bytes(value: Any, sample: Sample) -> io.BytesIO:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise CounterlensError(f"{sample.id}: no image bytes in this row")
    return io.BytesIO(data)


def _datasets(path: Path, slices: Sequence[str]) -> Source:
    datasets = need("datasets", f"{path} is a folder of Hugging Face datasets; reading it", extra=None)
    try:
        opened = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"source: {path} cannot be opened by datasets ({error})") from error
    if isinstance(opened, dict):
        raise UsageError(
            f"source: {path} holds the splits {', '.join(opened)}; name one, such as {path / next(iter(opened))}"
        )
    image = _image_column(path, list(opened.features), slices)
    plain = opened.cast_column(image, datasets.Image(decode=False))
    extra = [c for c in plain.features if c in (*KNOWN[1:], *slices)]
    names = getattr(plain.features.get("label"), "names", None)
    samples: list[Sample] = []
    columns = {c: plain[c] for c in extra}
    for number in range(len(plain)):
        row = {c: values[number] for c, values in columns.items()}
        label = row.get("label")
        if names is not None and isinstance(label, int) and label >= 0:
            label = names[label]
        name = _text(row.get("id")) or f"{number:06d}"
        samples.append(Sample(name, number, _text(label), _text(row.get("target")), _groups(row, slices)))

    def read(sample: Sample) -> Path | io.BytesIO:
        value = plain[sample.where][image]
        if value is not None and value.get("bytes") is None and value.get("path"):
            return Path(value["path"])
        return _bytes(value, sample)

    left = _unknown(list(plain.features), image, slices)
    return Source("datasets", path, samples, read, [f"columns not read: {', '.join(left)}"] if left else [])
