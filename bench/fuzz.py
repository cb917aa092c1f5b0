"""Mutated images, manifests and Parquet files through the reader: no exception but ours, no hang, bounded memory.

    python -m bench.fuzz [--images 20000] [--tables 2000] [--seed 0]

Every file is made from (seed, number) alone, so any finding can be made again. They are read in a child process: one
that ends it or takes too long is a finding too, and the next ones are read by a new child.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import struct
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from counterlens.engine.errors import CounterlensError
from counterlens.engine.images.files import load_pixels
from counterlens.engine.images.sources import open_source, open_sources

LIMIT_S = 20.0  # of computing, for one file
PATIENCE_S = 120.0  # until a file counts as one that hangs
LIMIT_MB = 1500  # above what the process needs for itself
SIZE = 32
FORMATS = ("png", "jpg", "webp", "tif", "gif", "bmp", "ppm", "avif", "jp2", "tga", "ico", "pcx")
TABLES = ("csv", "parquet")
# What real damage leaves and what decoders trip over: extreme numbers, in all sizes.
NUMBERS = [struct.pack(f, v) for f in ("<H", ">H", "<I", ">I") for v in (0, 1, 2, 255, 256, 0x7FFF, 0xFFFF)] + [
    struct.pack(f, v) for f in ("<I", ">I") for v in (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 100_000, 65_536 * 64)
]


@cache
def seeds(kind: str) -> tuple[bytes, ...]:
    """Sound files of a kind that mutations begin with."""
    if kind in TABLES:
        return _csv_seeds() if kind == "csv" else _parquet_seeds()
    y, x = np.mgrid[:40, :56]
    noise = np.random.default_rng(7).integers(0, 40, (40, 56, 3))
    rgb = Image.fromarray((np.stack([x * 4, y * 5, 200 - x], -1) + noise).clip(0, 255).astype(np.uint8))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.fromarray((x * 4).astype(np.uint8)))
    exif = Image.Exif()
    exif[274], exif[271], exif[282] = 6, "maker", 72.0
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    plain: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "png": [(rgb, {"exif": exif}), (alpha, {}), (rgb.quantize(16), {"transparency": 3}), (rgb.convert("1"), {}),
                (Image.fromarray((x * 1000).astype(np.uint16)), {}), (rgb, frames)],
        "jpg": [(rgb, {"exif": exif}), (rgb, {"progressive": True}), (rgb.convert("CMYK"), {}), (rgb.convert("L"), {})],
        "webp": [(rgb, {"exif": exif}), (alpha, {"lossless": True}), (rgb, frames)],
        "tif": [(rgb, {"exif": exif}), (rgb, {"compression": "tiff_lzw"}), (rgb, {"compression": "jpeg"}),
                (alpha, {"compression": "tiff_adobe_deflate"}), (rgb.convert("1"), {"compression": "group4"}),
                (Image.fromarray((x * 1000).astype(np.uint16)), {}), (Image.fromarray((x / 56).astype(np.float32)), {}),
                (Image.fromarray((x * 30_000_000).astype(np.int32)), {}), (rgb, frames)],
        "gif": [(rgb.quantize(32), {}), (rgb, frames)],
        "bmp": [(rgb, {}), (alpha, {}), (rgb.quantize(16), {}), (rgb.convert("1"), {})],
        "ppm": [(rgb, {}), (rgb.convert("L"), {}), (rgb.convert("1"), {})],
        "avif": [(rgb, {"exif": exif}), (alpha, {}), (rgb, frames)],
        "jp2": [(rgb, {}), (alpha, {"irreversible": True}), (Image.fromarray((x * 1000).astype(np.uint16)), {})],
        "tga": [(rgb, {}), (alpha, {"compression": "tga_rle"}), (rgb.quantize(16), {})],
        "ico": [(alpha, {"sizes": [(16, 16), (32, 32)]}), (rgb, {"sizes": [(32, 32)], "bitmap_format": "bmp"})],
        "pcx": [(rgb, {}), (rgb.quantize(16), {}), (rgb.convert("1"), {})],
    }  # fmt: skip
    names = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
    found = []
    for image, options in plain[kind]:
        buffer = io.BytesIO()
        image.save(buffer, format=names.get(kind, kind.upper()), **options)
        found.append(buffer.getvalue())
    if kind == "ppm":
        found.append(b"P3 4 4 1023\n" + b" ".join(str(i * 20).encode() for i in range(48)))
    if kind == "png":
        text = b"comment\0\0" + zlib.compress(bytes(4_000_000), 9)
        chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
        found.append(found[0][:33] + chunk + found[0][33:])
    return tuple(found)


def _csv_seeds() -> tuple[bytes, ...]:
    text = 'image,label,target,id\na.png,3,7,one\n"b c.png","two\nlines",,two\r\nlost.png,3.0,runner-up,\n'
    rows = text.replace("\n", "\r\n").replace(",", ";")
    return tuple(
        t.encode(e) for t in (text, rows, text.replace(",", "\t"), "sep=;\r\n" + rows)
        for e in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32")
    )  # fmt: skip


def _parquet_seeds() -> tuple[bytes, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    png = seeds("png")
    struct_of = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    held = pa.array([{"bytes": b, "path": None} for b in png[:3]] + [{"bytes": None, "path": "a.png"}, None], struct_of)
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"image": list(png[:4]), "label": [1.0, None, 3.0, 2.0]}, {"row_group_size": 2}),
        ({"image": held, "label": [0, 1, 2, 1, 0], "target": ["1", None, "2", "", "x"]}, {"compression": "zstd"}),
        ({"image": ["a.png", "b.png"] * 50, "label": list(range(100)), "id": [str(i) for i in range(100)]}, {}),
        ({"image": pa.array(["a.png", "b.png"] * 50).dictionary_encode()}, {"compression": "none"}),
    ]
    found = []
    for columns, options in tables:
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, **options)
        found.append(buffer.getvalue())
    return tuple(found)


def bomb(number: int) -> bytes:
    """A small PNG that is as large as is read (63.9 megapixels), in every kind of pixel; the last one is larger."""
    depth, colour, width = ((8, 6, 4), (16, 6, 8), (16, 0, 2), (8, 0, 1), (8, 3, 1), (8, 2, 3))[number % 6]
    side = 7996 if number < 6 else 60_000
    packer, row = zlib.compressobj(9), b"\0" + b"\x80" * (side * width)
    rows = b"".join(packer.compress(row) for _ in range(side if number < 6 else 1)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header)]
    if colour == 3:
        chunks += [(b"PLTE", bytes(range(256)) * 3), (b"tRNS", bytes(range(256)))]
    elif colour == 0:
        chunks += [(b"tRNS", b"\0\7")]
    chunks += [(b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def mutated(kind: str, seed: int, number: int) -> bytes:
    """One damaged file, decided by its arguments: some of cut, changed, doubled, swapped, spliced and zeroed."""
    if kind == "bomb":
        return bomb(number)
    r = np.random.default_rng([seed, sum(kind.encode()), number])
    pool = seeds(kind)
    data = bytearray(pool[r.integers(len(pool))])
    for _ in range(int(r.integers(1, 4))):
        n = max(len(data), 1)
        # Headers decide most: half of the places are in the first or (Parquet, ZIP-like) the last hundred bytes.
        at = int(r.choice([r.integers(n), r.integers(min(n, 100)), n - 1 - r.integers(min(n, 100))], p=[0.5, 0.4, 0.1]))
        length = int(r.integers(1, 1 + min(n, 200)))
        change = int(r.integers(9))
        if change == 0:
            del data[at:]
        elif change == 1:
            del data[at : at + length]
        elif change == 2:
            data[at:at] = data[at : at + length]
        elif change == 3:
            data[at : at + length] = bytes(length)
        elif change == 4:
            other = pool[r.integers(len(pool))]
            start = int(r.integers(len(other)))
            data[at:] = other[start:]
        elif change == 5:
            data[at:at] = r.bytes(length)
        elif change == 6:
            word = NUMBERS[r.integers(len(NUMBERS))]
            data[at : at + len(word)] = word
        else:
            for _ in range(int(r.integers(1, 9))):
                if data:
                    data[r.integers(len(data)) if change == 7 else min(at, len(data) - 1)] = r.integers(256)
                at += 1
    if kind == "png" and r.random() < 0.7:
        return _summed(bytes(data))
    return bytes(data)


def _summed(data: bytes) -> bytes:
    """A PNG with right sums, so that damage gets past them."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out + data[at:])


def read_one(kind: str, data: bytes, folder: Path) -> str:
    """`read`, or the beginning of the error that a person sees; anything else is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if kind in (*FORMATS, "bomb"):
                pixels = load_pixels(io.BytesIO(data), SIZE, "file")
                assert pixels.shape == (SIZE, SIZE, 3)
                assert 0 <= pixels.min() <= pixels.max() <= 1
                return "read"
            path = folder / f"m.{kind}"
            path.write_bytes(data)
            source = open_sources([path])
            source.digest()
            for sample in source.samples[:8]:
                with suppress(CounterlensError):
                    sample.pixels(SIZE)
            with suppress(CounterlensError):
                open_source(path, ["id"])
            return "read"
        except CounterlensError as error:
            message = str(error)
            assert "\n" not in message, f"an error of several lines: {message!r}"
            return "refused"


def _child(jobs: list[tuple[str, int]], seed: int, out: Connection) -> None:
    """Read files and say of each how it went and how long it took; memory at the end and at the beginning."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what decoders written in C print
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for image in ("a.png", "b c.png"):
            (folder / image).write_bytes(seeds("png")[0])
        for kind in {kind for kind, _ in jobs} - {"bomb"}:
            read_one(kind, seeds(kind)[0], folder)
        before = _peak_mb()
        for kind, number in jobs:
            data = mutated(kind, seed, number)
            started = time.process_time()
            try:
                result = read_one(kind, data, folder)
            # Whatever it is, it is what is looked for here.
            except Exception as error:  # noqa: BLE001
                result = f"escaped: {type(error).__name__}: {error}"
            out.send((kind, number, result, time.process_time() - started, _peak_mb() - before))


def _peak_mb() -> float:
    """Peak of this process's memory. On Linux not getrusage's, which begins with the parent's."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(jobs: list[tuple[str, int]], seed: int, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Read every file of the jobs (kind, number); counts, findings, the slowest, and the peak of memory in MB."""
    counts: dict[str, Counter[str]] = {}
    findings: list[dict[str, Any]] = []
    slowest, memory, done = (0.0, "", 0), 0.0, 0
    context = multiprocessing.get_context("spawn")
    while done < len(jobs):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(jobs[done : done + 4000], seed, sender), daemon=True)
        child.start()
        sender.close()
        try:
            last = min(done + 4000, len(jobs))
            while done < last:
                if not receiver.poll(PATIENCE_S):
                    raise TimeoutError
                kind, number, result, seconds, mb = receiver.recv()
                done += 1
                counts.setdefault(kind, Counter())[result.split(":")[0]] += 1
                slowest, memory = max(slowest, (seconds, kind, number)), max(memory, mb)
                if result.startswith("escaped") or seconds > LIMIT_S:
                    findings.append({"kind": kind, "number": number, "what": result, "seconds": seconds})
                if done % 2000 == 0:
                    say(f"{done} of {len(jobs)} files, {len(findings)} findings")
        except (EOFError, TimeoutError) as error:
            kind, number = jobs[done]
            what = "hangs" if isinstance(error, TimeoutError) else "ends the process"
            findings.append({"kind": kind, "number": number, "what": what})
            counts.setdefault(kind, Counter())[what] += 1
            done += 1
        finally:
            child.kill()
            child.join()
    return {
        "files": len(jobs), "seed": seed, "by_kind": {k: dict(c) for k, c in sorted(counts.items())},
        "findings": findings, "slowest": {"seconds": round(slowest[0], 3), "kind": slowest[1], "number": slowest[2]},
        "peak_memory_mb": round(memory, 1), "limit_seconds": LIMIT_S, "limit_memory_mb": LIMIT_MB,
    }  # fmt: skip


def plan(images: int, tables: int) -> list[tuple[str, int]]:
    """Which files: kinds in turn, numbered; bombs at last."""
    files = [(FORMATS[i % len(FORMATS)], i) for i in range(images)] + [(TABLES[i % 2], i) for i in range(tables)]
    return files + [("bomb", i) for i in range(7)]


def main() -> None:
    """Fuzz and record."""
    from bench.record import RESULTS, environment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--tables", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    started = time.perf_counter()
    result = fuzz(plan(asked.images, asked.tables), asked.seed, lambda text: print(text, flush=True))
    result |= {"seconds": round(time.perf_counter() - started, 1), "environment": environment()}
    (RESULTS / "fuzz.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))
    if result["findings"] or result["peak_memory_mb"] > LIMIT_MB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
