"""Where images come from, for every command: files, folders, manifests, Parquet with images, `datasets` folders."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from counterlens.export.hashing import file_digest

from ..errors import CounterlensError, UsageError, install_hint
from ..labels import NUMBER
from .collect import ENDINGS, PARQUET, read_folder, read_table, shown
from .files import check_file, decoding, load_image, load_pixels

if TYPE_CHECKING:  # `counterlens run` reads images without PyTorch
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

KNOWN = ("image", "label", "target", "id")
IMAGE_NAMES = ("image", "file", "file_name", "path")  # what other tools call the column `image`
TABLES = (".csv", ".tsv", *PARQUET)
DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")  # one of them is in a folder of `datasets`


@dataclass(frozen=True)
class Stored:
    """An image inside a file of many: the file, and how to get its bytes, or the path of the image's own file."""

    file: Path
    read: Callable[[], io.BytesIO | Path]


@dataclass(frozen=True)
class Sample:
    """One image to explain, not yet read.

    Attributes:
        id: unique in its source.
        where: a file, or a place inside one.
        label: its true label's name, if the source says.
        target: the target asked for it; None is the run's.
        slices: groups it belongs to, by column.
        problem: why it cannot be read, where that is known already.
    """

    id: str
    where: Path | Stored
    label: str | None = None
    target: str | None = None
    slices: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def name(self) -> str:
        """What a person calls it, also in messages: its file, or its id."""
        return str(self.where) if isinstance(self.where, Path) else self.id

    @property
    def path(self) -> Path:
        """Where names of outputs come from: its file, or its id."""
        return Path(self.name)

    def file(self) -> Path | io.BytesIO:
        """Its file, or the bytes of one.

        Raises:
            CounterlensError: it is known to be unreadable, or its bytes cannot be had; the message begins with `name`.
        """
        if self.problem is not None:
            raise CounterlensError(f"{self.name}: {self.problem}")
        return self.where if isinstance(self.where, Path) else self.where.read()

    @property
    def own_file(self) -> Path | None:
        """Its file, where it has one of its own that can be opened."""
        return self.where if isinstance(self.where, Path) and os.path.isfile(self.where) else None

    def sha256(self) -> str:
        """Hash of its file's bytes; see `file`."""
        file = self.file()
        return file_digest(file) if isinstance(file, Path) else hashlib.sha256(file.getbuffer()).hexdigest()

    def load(self, size: int, interpolation: str = "lanczos") -> Tensor:
        """The image [3, size, size] in [0, 1]; see `file` and `load_image`."""
        return load_image(self.file(), size, self.name, interpolation)

    def pixels(self, size: int, fit: str = "squash") -> NDArray[np.float32]:
        """The same as an array [size, size, 3], without PyTorch; `fit`: see `load_image`."""
        return load_pixels(self.file(), size, self.name, fit=fit)


@dataclass(frozen=True)
class Source:
    """The samples of a data set in a fixed order.

    Attributes:
        kind: folder, file, csv, parquet, parquet-bytes, datasets, or several.
        path: what was opened, the first of several.
        samples: in order.
        notes: what a person should know, such as folders that are not read.
    """

    kind: str
    path: Path
    samples: list[Sample]
    notes: list[str]

    def read(self, sample: Sample) -> Path | io.BytesIO:
        """The file of a sample, or its bytes; see `Sample.file`."""
        return sample.file()

    def digest(self) -> str:
        """Hash of every sample's id, label, target, slices and file size: what must not change under an audit."""
        h = hashlib.sha256()
        holders: dict[Path, None] = {}
        for s in self.samples:
            size = -1
            if isinstance(s.where, Path):
                size = os.path.getsize(s.where) if os.path.isfile(s.where) else -1
            else:
                holders[s.where.file] = None
            h.update(json.dumps([s.id, s.label, s.target, s.slices, size], sort_keys=True).encode())
        for file in holders:
            if file.is_file():
                h.update(str(file.stat().st_size).encode())
        return h.hexdigest()[:16]


def some_images(
    given: Path | Sequence[Path] | Sequence[Sample], recursive: bool = False, most: int = 8
) -> Callable[[int], Tensor | None]:
    """What reads the first few images that can be read, at a size: [n, 3, size, size] in [0, 1], None where none can.

    Args:
        given: samples, or what `open_sources` takes, which is not opened before.
    """

    def read(size: int) -> Tensor | None:
        import torch

        items = [given] if isinstance(given, Path) else list(given)
        samples = [item for item in items if isinstance(item, Sample)]
        if paths := [item for item in items if isinstance(item, Path)]:
            with suppress(CounterlensError):  # the command itself says so
                samples += open_sources(paths, recursive).samples
        found: list[Tensor] = []
        for sample in samples[: 4 * most]:
            with suppress(CounterlensError, OSError):  # likewise, in its row
                found.append(sample.load(size))
            if len(found) == most:
                break
        return torch.stack(found) if found else None

    return read


def open_source(path: Path, slices: Sequence[str] = (), recursive: bool = False) -> Source:
    """Open an image, a folder of images, a manifest, Parquet with images, a folder of that, or one of `datasets`.

    Of a folder the images in it and in its subfolders are read, whose names are labels; of all folders below with
    `recursive`. What cannot be read is a sample with a problem, and what is passed over is in the notes.

    Args:
        path: what to open. Columns are image (or file, file_name, path), label, target, id; paths are relative to it.
        slices: further columns, whose values are groups in the report; of a table of paths, all that are not known.
        recursive: of folders.

    Raises:
        UsageError: there is no sample, columns are missing, unknown or misspelt, or ids stand twice; the message names
            the file, the column or the id.
    """
    if not os.path.lexists(path):
        raise UsageError(f"source: {path}: no such file or folder")
    source = _open(path, slices, recursive)
    if not source.samples:
        raise UsageError(f"source: {path} holds no sample")
    twice = [name for name, n in Counter(s.id for s in source.samples).items() if n > 1]
    if twice:
        raise UsageError(f"source: {path}: id {twice[0]!r} stands twice ({len(twice)} ids do); add a column `id`")
    return source


def open_sources(paths: Sequence[Path], recursive: bool = False, manifest: Path | None = None) -> Source:
    """Open several of what `open_source` opens as one. An image that folders or names give twice is read once.

    Args:
        paths: what to open.
        recursive: of folders.
        manifest: one more, which is a table whatever its ending.

    Raises:
        UsageError: as `open_source`, but an image may stand in a manifest twice, with two targets.
    """
    opened = [_open(path, None, recursive) for path in paths]
    if manifest is not None:
        opened.append(_table(manifest, None) if not manifest.is_dir() else _open(manifest, None, recursive))
    if not opened:
        raise UsageError("images: none given; name files, folders or a manifest")
    samples: list[Sample] = []
    seen: set[tuple[str, str]] = set()
    twice = 0
    for source in opened:
        if not source.samples:
            raise UsageError(f"images: {source.path} holds no sample")
        for sample in source.samples:
            if isinstance(sample.where, Path) and source.kind in ("file", "folder"):
                place = (os.path.realpath(sample.where.parent), sample.where.name)
                if place in seen:
                    twice += 1
                    continue
                seen.add(place)
            samples.append(sample)
    notes = [note for source in opened for note in source.notes]
    if twice:
        notes.append(f"{twice} images are named twice and read once")
    return Source(opened[0].kind if len(opened) == 1 else "several", opened[0].path, samples, notes)


def _open(path: Path, slices: Sequence[str] | None, recursive: bool) -> Source:
    if os.path.isdir(path):
        if any(os.path.isfile(path / name) for name in DATASETS):
            return _datasets(path, slices)
        return _folder(path, slices, recursive)
    if path.suffix.lower() in TABLES:
        return _table(path, slices)
    if slices:
        raise UsageError(f"slice: {path} is no table and has no column {slices[0]!r}")
    # Whatever its ending, what is named is taken for an image; where it is none, its own row says so.
    return Source("file", path, [Sample(shown(path), path)], [])


def _table(path: Path, slices: Sequence[str] | None) -> Source:
    try:
        check_file(path, path)
    except CounterlensError as error:
        raise UsageError(f"source: {error}") from error
    return _parquet(path, slices) if path.suffix.lower() in PARQUET else _csv(path, slices)


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


def _folder(path: Path, slices: Sequence[str] | None, recursive: bool) -> Source:
    found = read_folder(path, recursive)
    unread = [
        Sample(shown(folder.relative_to(path)), folder, problem=f"the folder cannot be read ({why})")
        for folder, why in found.unread
    ]
    if found.parquet:
        return _shards(path, found.parquet, slices, unread, found.notes)
    if slices:
        raise UsageError(f"slice: {path} is a folder of images and has no column {slices[0]!r}")
    samples = [Sample(shown(image.relative_to(path)), image, label) for image, label in found.images] + unread
    if not samples:
        raise UsageError("; ".join([f"images: {path} holds no image ({', '.join(ENDINGS)})", *found.notes]))
    return Source("folder", path, samples, found.notes)


def _csv(path: Path, slices: Sequence[str] | None) -> Source:
    try:
        table = read_table(path, (*IMAGE_NAMES, *KNOWN[1:]))
    except UsageError as error:
        raise UsageError(f"source: {error}") from error
    image = _image_column(path, table.columns, slices)
    rows = [dict(zip(table.columns, cells, strict=False)) for _, cells in table.rows]
    notes = table.notes + _unknown(path, table.columns, image, slices, listed=True)
    if not rows:
        raise UsageError(f"source: {path} holds no sample: no line below the first ({_listed(table.columns)})")
    _forget_nan(rows)
    samples = [
        _from_row(path, f"line {number}", row, image, slices, table.encoding)
        for (number, _), row in zip(table.rows, rows, strict=True)
    ]
    return Source("csv", path, samples, notes)


def _forget_nan(rows: list[dict[str, str]]) -> None:
    """Empty the cells that pandas wrote as nan into a column of numbers."""
    for column in ("label", "target"):
        values = {row.get(column, "").lower() for row in rows} - {""}
        if "nan" in values and all(v == "nan" or NUMBER.fullmatch(v) for v in values):
            for row in rows:
                if row.get(column, "").lower() == "nan":
                    row[column] = ""


def _image_column(path: Path, columns: Sequence[str], slices: Sequence[str] | None) -> str:
    """The column that holds the image; refuses slices that are no columns, and a column that is there twice."""
    if lost := [c for c in slices or () if c not in columns]:
        raise UsageError(f"slice: {path} has no column {lost[0]!r}; it has {_listed(columns)}")
    if twice := [c for c, n in Counter(columns).items() if c and n > 1]:
        raise UsageError(f"source: {path}: column {twice[0]!r} stands twice")
    found = [c for c in IMAGE_NAMES if c in columns]
    if not found:
        raise UsageError(f"source: {path} has no column `image`; it has {_listed(columns)}")
    return found[0]


def _listed(columns: Sequence[str]) -> str:
    """Names of columns on one line."""
    return ", ".join(" ".join(name.split()) for name in columns[:20]) + (", ..." if len(columns) > 20 else "")


def _unknown(path: Path, columns: Sequence[str], image: str, slices: Sequence[str] | None, listed: bool) -> list[str]:
    """A note of columns that are not read.

    Raises:
        UsageError: in a table of paths (`listed`, made for this) one is not known: a misspelt column must not pass for
            one that was left out. Where there are no groups (`slices` is None), it must look like a known one that is
            not there.
    """
    unknown = [
        c for c in columns if c not in (image, *KNOWN[1:], *(slices or ())) and not c.startswith("__index_level_")
    ]
    bad = unknown
    if slices is None:
        lost = [k for k in ("label", "target") if k not in columns]
        bad = [c for c in unknown if difflib.get_close_matches(c.lower(), lost, 1, 0.8)]
    if bad and listed:
        raise UsageError(
            f"source: {path} has unknown columns {', '.join(map(repr, bad[:5]))}; expected {', '.join(KNOWN)}"
            + ("" if slices is None else "; --slice COLUMN makes one a group of the report")
        )
    named = [repr(c) if c else "one without a name" for c in unknown]
    return [f"{path}: columns not read: {', '.join(named)}"] if named else []


def _text(value: Any) -> str | None:
    """A cell as text; None for what is missing. Whole numbers that pandas made floating point are whole again."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    text = "" if value is None else str(value).strip()
    return text or None


def _groups(row: dict[str, Any], slices: Sequence[str] | None) -> dict[str, str]:
    return {c: _text(row.get(c)) or "none" for c in slices or ()}


def _from_row(
    path: Path, place: str, row: dict[str, Any], image: str, slices: Sequence[str] | None, encoding: str = "utf-8"
) -> Sample:
    name = _text(row.get(image))
    if name is None:
        raise UsageError(f"source: {path}, {place}: no image")
    if "\0" in name:
        raise UsageError(f"source: {path}, {place}: image {name!r} is no path")
    groups = _groups(row, slices)
    where = _named(path, place, name, encoding)
    return Sample(_text(row.get("id")) or name, where, _text(row.get("label")), _text(row.get("target")), groups)


def _named(table: Path, place: str, name: str, encoding: str = "utf-8") -> Path:
    """The file that a table names, relative to the table: as written, else as other systems write paths.

    Raises:
        UsageError: it is the address of something that is no file here.
    """
    url = urlsplit(name) if "://" in name else None
    if url is not None and url.scheme == "file" and url.netloc in ("", "localhost"):
        return Path(unquote(url.path))
    if url is not None:
        raise UsageError(f"source: {table}, {place}: {name!r} is an address; images are read from files")
    path = table.parent / name
    if os.path.lexists(path):
        return path
    if name.startswith("~"):
        others = [os.path.expanduser(name)]
    else:
        others = [str(table.parent / name.replace("\\", "/"))]
        if encoding == "cp1252":  # the table's bytes are the file's name as it is
            others.append(str(table.parent / os.fsdecode(name.encode(encoding))))
    return next((Path(other) for other in others if os.path.lexists(other)), path)


def _shards(
    path: Path, files: Sequence[Path], slices: Sequence[str] | None, unread: list[Sample], notes: list[str]
) -> Source:
    """A folder of Parquet files as one source; one that is damaged is a sample that cannot be read."""
    samples: list[Sample] = []
    notes = [*notes, f"{path}: {len(files)} Parquet files are read as one"]
    for file in files:
        try:
            opened = _parquet(file, slices, shown(file.relative_to(path).with_suffix("")))
        except UsageError:
            raise
        except CounterlensError as error:
            problem = str(error).removeprefix(f"{file}: ")
            samples.append(Sample(shown(file.relative_to(path)), file, problem=problem))
            continue
        samples += opened.samples
        notes += [note for note in opened.notes if note not in notes]
    return Source("parquet-bytes", path, samples + unread, notes)


def _parquet(path: Path, slices: Sequence[str] | None, prefix: str | None = None) -> Source:
    """A Parquet file of paths or of image bytes; `prefix` begins the ids of a shard, which may be damaged."""
    pa = need("pyarrow", "reading Parquet")
    pq = need("pyarrow.parquet", "reading Parquet")
    with decoding(path, "cannot be read as Parquet") if prefix else _refused(path, "cannot be read as Parquet"):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        columns = list(schema.names)
        image = _image_column(path, columns, slices)
        kind = schema.field(image).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
        held = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view()
        inside = held or (pa.types.is_struct(kind) and {"bytes", "path"} & {f.name for f in kind} != set())
        if not text and not inside:
            raise UsageError(
                f"source: {path}: column `{image}` is {kind}; expected paths, bytes or a struct of bytes and path"
            )
        notes = _unknown(path, columns, image, slices, listed=not inside)
        wanted = [c for c in (*KNOWN[1:], *(slices or ())) if c in columns] + ([] if inside else [image])
        names = _label_names(schema)
        reader = _RowGroups(path, image)
        samples: list[Sample] = []
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=wanted).to_pylist()
            rows = rows or [{}] * file.metadata.row_group(group).num_rows  # no other columns
            for number, row in enumerate(rows):
                if not inside:
                    samples.append(_from_row(path, f"row {len(samples)}", row, image, slices))
                    continue
                name = _text(row.get("id")) or f"{prefix or path.stem}-{len(samples):06d}"
                where = Stored(path, reader.at(group, number, name))
                label = _named_label(row.get("label"), names)
                samples.append(Sample(name, where, label, _text(row.get("target")), _groups(row, slices)))
    return Source("parquet-bytes" if inside else "parquet", path, samples, notes)


@contextmanager
def _refused(path: Path, what: str) -> Iterator[None]:
    """A table that cannot be read is a source that cannot be used."""
    try:
        with decoding(path, what):
            yield
    except UsageError:
        raise
    except CounterlensError as error:
        raise UsageError(f"source: {error}") from error


def _named_label(label: Any, names: Sequence[str]) -> str | None:
    """A label's name, where the data set numbers names; -1 is none, by the convention of `datasets`."""
    if names and isinstance(label, int):
        if label < 0:
            return None
        label = names[label] if label < len(names) else label
    return _text(label)


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

    def at(self, group: int, row: int, name: str) -> Callable[[], io.BytesIO | Path]:
        """What reads the image in a row of a group."""
        return lambda: self.read(group, row, name)

    def read(self, group: int, row: int, name: str) -> io.BytesIO | Path:
        pq = need("pyarrow.parquet", "reading Parquet")
        with self.lock, decoding(name, f"row group {group} of {self.path} cannot be read"):
            if group != self.group:
                self.column = pq.ParquetFile(self.path).read_row_group(group, columns=[self.image]).column(0)
                self.group = group
            value = self.column[row].as_py()
        return _held(value, name, self.path)


def _held(value: Any, name: str, table: Path) -> io.BytesIO | Path:
    """The bytes of an image, or the path that stands there instead of them."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return io.BytesIO(data)
    if isinstance(value, dict) and _text(value.get("path")):
        return _named(table, name, str(value["path"]))
    raise CounterlensError(f"{name}: no image bytes in this row")


def _datasets(path: Path, slices: Sequence[str] | None) -> Source:
    datasets = need("datasets", f"{path} is a folder of Hugging Face datasets; reading it", extra=None)
    with _refused(path, "cannot be opened by datasets"):
        opened = datasets.load_from_disk(str(path))
        if isinstance(opened, dict):
            raise UsageError(
                f"source: {path} holds the splits {', '.join(opened)}; name one, such as {path / next(iter(opened))}"
            )
        image = _image_column(path, list(opened.features), slices)
        plain = opened.cast_column(image, datasets.Image(decode=False))
        extra = [c for c in plain.features if c in (*KNOWN[1:], *(slices or ()))]
        names = getattr(plain.features.get("label"), "names", None) or ()
        columns = {c: list(plain[c]) for c in extra}
        samples: list[Sample] = []
        for number in range(len(plain)):
            row = {c: values[number] for c, values in columns.items()}
            name = _text(row.get("id")) or f"{number:06d}"

            def read(number: int = number, name: str = name) -> io.BytesIO | Path:
                with decoding(name, f"row {number} of {path} cannot be read"):
                    value = plain[number][image]
                return _held(value, name, path / "data")

            label = _named_label(row.get("label"), names)
            samples.append(Sample(name, Stored(path, read), label, _text(row.get("target")), _groups(row, slices)))
    return Source("datasets", path, samples, _unknown(path, list(plain.features), image, slices, listed=False))
