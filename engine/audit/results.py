"""An audit's folder: manifest, plan, rows in atomic Parquet parts, images beside them, and a lock.

    manifest.json                         what was run on what, with hashes; one entry for every session
    plan.parquet                          the samples chosen, in order
    rows/000/part-000012.parquet          one row for each sample of part 12
    answers.sqlite                        of a classifier that can only be called; --overwrite leaves it
    images/000/000012/007-input.png       of its eighth sample; -counterfactual, -saliency, -true, -away
    disagreement/000003.npz               what was seen of 16 samples in the search for shortcuts (see `looks`)
    disagreement.npz, .json               where classifier and generator disagree (see `disagreement`)
    report.html

A part's file is the last thing written of it, under another name first; it stands there whole or not at all. Names come
from numbers, never from ids, so an id can be any text. No folder holds more than 1,000 parts or one part's images.
"""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from counterlens.export.files import newer

from ..blackbox.answers import FILE as ANSWERS
from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from ..images.files import png_text, to_uint8
from ..images.sources import need
from ..outputs import RUN, differences, read_run, remove_run
from ..provenance import session
from .conditions import check_conditions
from .looks import FOLDER as LOOKS
from .looks import look_files
from .rows import Row, table_bytes

FORMAT, SCHEMA_VERSION = "counterlens-audit", 1
MANIFEST, PLAN, LOCK = "manifest.json", "plan.parquet", ".lock"
FANOUT = 1000  # parts in one folder
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True, "quality": 50},
}
COMMAND = "counterlens audit"
GOES_ON = "finished parts are kept, the same command goes on"
TIMINGS = ("seconds", "wall_seconds")  # the columns that differ between two runs of the same audit


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows has no handle of a folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def encode_image(
    image: Tensor,  # [3, H, W] or [H, W] in [0, 1]
    kind: str,
    facts: dict[str, Any] | None = None,
) -> bytes:
    """The bytes of an 8-bit file that holds the image without loss: PNG, with what made it in its text, or WebP."""
    pixels = to_uint8(image).cpu()
    array = pixels.permute(1, 2, 0).contiguous().numpy() if pixels.ndim == 3 else pixels.numpy()
    buffer = io.BytesIO()
    more: dict[str, Any] = {"pnginfo": png_text(facts)} if facts and kind == "png" else {}
    Image.fromarray(array).save(buffer, **FORMATS[kind] | more)
    return buffer.getvalue()


def image_path(part: int, place: int, what: str, kind: str) -> str:
    """Path of a sample's image, relative to the audit's folder."""
    return f"images/{part // FANOUT:03d}/{part:06d}/{place:03d}-{what}.{kind}"


def part_path(part: int) -> str:
    """Path of a part's rows, relative to the audit's folder."""
    return f"rows/{part // FANOUT:03d}/part-{part:06d}.parquet"


class Results:
    """The folder of one audit.

    Args:
        folder: exists once `begin` or `open` was called.
        manifest: its manifest.
        made: on what this session computes, for its parts.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.made: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Results({str(self.folder)!r})"

    @classmethod
    def open(cls, folder: Path) -> Results:
        """Open an audit's folder for reading.

        Raises:
            UsageError: there is none, or another version of counterlens made it.
        """
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise UsageError(f"{folder}: no audit there (no {MANIFEST})") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UsageError(f"{path}: cannot be read ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UsageError(f"{path}: not an audit's manifest")
        schema = manifest.get("schema_version")
        if problem := newer(schema, SCHEMA_VERSION):
            raise UsageError(f"{path}: {problem}, or choose another --out; nothing was changed")
        if schema != SCHEMA_VERSION:
            raise UsageError(
                f"{folder}: made as version {schema} of the format, this is version {SCHEMA_VERSION}; nothing was "
                "changed. Go on with the counterlens that made it, or choose another --out"
            )
        return cls(folder, manifest)

    @classmethod
    def begin(
        cls,
        folder: Path,
        identity: dict[str, Any],
        shard: tuple[int, int] | None,
        conditions: dict[str, Any] | None,
        *,
        overwrite: bool = False,
        read: Collection[Path] = (),
    ) -> Results:
        """Open a folder for writing, a new one or the same audit's again; the caller holds its lock.

        An audit that has no finished part gives way to another one; `overwrite` removes one that has, but no file of
        `read`. Without `conditions` nothing is computed under any.

        Raises:
            UsageError: another audit is there, or this one under other conditions; the message says in what it differs.
        """
        replaced = overwrite
        if (folder / MANIFEST).exists():
            results = cls.open(folder)
            told = differences(
                results.manifest["identity"] | {"shard": results.manifest["shard"]},
                json.loads(json.dumps(identity | {"shard": shard})),
            )
            replaced |= bool(told) and not results.part_files()
            if replaced:
                results.remove()
            elif told:
                raise UsageError(
                    f"out: {folder} holds another audit: {told}. Ask for the same, replace it with --overwrite, or "
                    "choose another folder"
                )
        if not (folder / MANIFEST).exists():
            if overwrite:
                remove_run(folder, {*read})
            if (before := read_run(folder)) is not None and before["command"] != COMMAND:
                raise UsageError(f"out: {folder} holds what {before['command']} wrote; choose another folder")
            strange = sorted(p.name for p in folder.iterdir() if not p.name.startswith((".", ANSWERS)))
            if strange and not (replaced and {*strange} <= {"images", "rows", LOOKS}):  # with foreign files in them
                raise UsageError(f"out: {folder} is no audit and holds {strange[0]!r}; choose another folder")
            manifest = {
                "format": FORMAT, "schema_version": SCHEMA_VERSION, "identity": identity, "shard": shard,
                "sessions": [],
            }  # fmt: skip
            results = cls(folder, json.loads(json.dumps(manifest)))
        if conditions is None:
            pass
        elif "conditions" in results.manifest and results.part_files():
            check_conditions(results.manifest["conditions"], conditions, str(folder))
        else:
            results.manifest["conditions"] = conditions
        results.manifest["sessions"].append(environment())
        results.save()
        return results

    def remove(self) -> None:
        """Remove all that an audit writes, the manifest last; foreign files stay.

        Raises:
            UsageError: a file cannot be removed.
        """
        images = (self.folder / "images").glob("[0-9][0-9][0-9]/[0-9][0-9][0-9][0-9][0-9][0-9]/[0-9][0-9][0-9]-*.*")
        named = (self.folder / name for name in (PLAN, "report.html", "disagreement.npz", "disagreement.json", RUN))
        path = self.folder / MANIFEST
        try:
            for path in (*self.part_files(), *images, *look_files(self.folder), *named, self.folder / MANIFEST):
                path.unlink(missing_ok=True)
            for path in sorted((self.folder / "images").rglob("*"), reverse=True):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            for name in ("images", "rows/000", "rows", LOOKS):
                path = self.folder / name
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        except OSError as error:
            raise UsageError(f"out: {path} cannot be removed ({error.strerror or error})") from error

    def save(self) -> None:
        """Write the manifest."""
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / MANIFEST, text, hint=GOES_ON)

    @property
    def metadata(self) -> dict[str, str]:
        """What every part says about itself; `made` is on what it was computed (see `conditions`)."""
        made = {"made": json.dumps(self.made)} if self.made else {}
        return {
            "format": FORMAT, "schema_version": str(SCHEMA_VERSION), "audit": self.manifest["identity"]["hash"], **made,
        }  # fmt: skip

    def finished(self, sizes: dict[int, int]) -> set[int]:
        """Which of the parts, given with their sizes, are there.

        Raises:
            CounterlensError: a file in its place is none of this audit's parts; the message names it.
        """
        pa, pq = need("pyarrow", "an audit's results"), need("pyarrow.parquet", "an audit's results")
        done = set()
        for part, size in sizes.items():
            path = self.folder / part_path(part)
            if not path.exists():
                continue
            try:
                meta = pq.read_metadata(path)
            except (OSError, pa.ArrowException) as error:
                raise CounterlensError(f"{path}: cannot be read ({error}); remove it, and it is done again") from error
            audit = (meta.metadata or {}).get(b"audit", b"").decode()
            if audit != self.metadata["audit"] or meta.num_rows != size:
                raise CounterlensError(f"{path}: not a part of this audit; remove it, and it is done again")
            done.add(part)
        return done

    def write_part(self, part: int, rows: Sequence[Row], images: dict[str, bytes]) -> None:
        """Write a part's images, then its rows.

        Raises:
            CounterlensError: a file cannot be written.
        """
        for name, data in images.items():
            write_atomically(self.folder / name, data, hint=GOES_ON, folders=True)
        if images:
            sync_folder((self.folder / next(iter(images))).parent)
        path = self.folder / part_path(part)
        write_atomically(path, table_bytes(rows, self.metadata), hint=GOES_ON, folders=True)
        sync_folder(path.parent)

    def part_files(self) -> list[Path]:
        """Every part that is there, in order."""
        return sorted((self.folder / "rows").glob("*/part-*.parquet"))

    def made_by(self) -> list[dict[str, Any]]:
        """On what the parts were computed, each that is different once.

        Raises:
            CounterlensError: a part cannot be read; the message names it.
        """
        pa, pq = need("pyarrow", "an audit's results"), need("pyarrow.parquet", "an audit's results")
        found: dict[str, None] = {}
        for path in self.part_files():
            try:
                text = (pq.read_metadata(path).metadata or {}).get(b"made")
            except (OSError, pa.ArrowException) as error:
                raise CounterlensError(f"{path}: cannot be read ({error}); remove it, and it is done again") from error
            if text is not None:
                found[text.decode()] = None
        return [json.loads(text) for text in found]

    def rows(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """Every row in order, one part in memory at a time; what an older part lacks is None.

        Raises:
            CounterlensError: a part cannot be read; the message names it.
        """
        pa, pq = need("pyarrow", "an audit's results"), need("pyarrow.parquet", "an audit's results")
        for path in self.part_files():
            try:
                table = pq.ParquetFile(path).read(columns=columns)
            except (OSError, pa.ArrowException) as error:
                raise CounterlensError(f"{path}: cannot be read ({error})") from error
            lacks = dict.fromkeys(name for name in columns or () if name not in table.column_names)
            yield from (lacks | row for row in table.to_pylist(maps_as_pydicts="strict"))


def environment() -> dict[str, Any]:
    """When and where a session ran, and with which versions."""
    there = torch.device("cuda") if torch.cuda.is_available() else None
    return {"host": socket.gethostname(), **session(there)}
