"""The offline page: a counterfactual's file with onnxruntime-web, as a folder for a static host or as one HTML file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CounterlensError, UsageError
from ..files import write_atomically

VERSION = "1.30.0"  # of the npm package onnxruntime-web
DIGEST = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
# What a page needs of the package: the wasm backend with its glue in one module, and the wasm itself.
FILES = {"ort.mjs": "dist/ort.wasm.bundle.min.mjs", "ort.wasm": "dist/ort-wasm-simd-threaded.wasm"}
HERE = Path(__file__).parent
SINGLE, INDEX = "counterfactual.html", "index.html"
NOWHERE, OWN_HOST = "'none'", "'self'"
HOW = f"get it with `npm pack onnxruntime-web@{VERSION}` where npm reaches its registry, and give the file (--ort-web)"


@dataclass(frozen=True)
class WebRuntime:
    """onnxruntime-web's files by the names that the page uses."""

    files: dict[str, bytes]
    version: str = VERSION


def web_runtime(given: str | Path | None = None, cache: str | Path | None = None) -> WebRuntime:
    """onnxruntime-web, from a file that is given, from the cache, or by `npm pack` into it.

    Args:
        given: the package as npm packs it (.tgz), held to its hash; or its unpacked folder, held to its version.
        cache: folder; the user's without one.

    Raises:
        UsageError: what is given is another version or no such package. CounterlensError: it cannot be had; the message
            says how to.
    """
    if given is not None and Path(given).is_dir():
        return _from_folder(Path(given))
    if given is not None:
        return _from_archive(Path(given))
    home = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "counterlens"
    kept = home / ARCHIVE
    if not kept.exists():
        if shutil.which("npm") is None:
            raise CounterlensError(f"the page needs onnxruntime-web {VERSION}, and npm is not installed here; {HOW}")
        with tempfile.TemporaryDirectory() as work:
            command = ["npm", "pack", f"onnxruntime-web@{VERSION}", "--silent", "--ignore-scripts"]
            try:
                done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
            except subprocess.TimeoutExpired as error:
                raise CounterlensError(f"npm pack did not end within {error.timeout:.0f} s; {HOW}") from error
            if done.returncode or not (Path(work) / ARCHIVE).exists():
                reason = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
                raise CounterlensError(f"npm pack onnxruntime-web@{VERSION} failed ({reason}); {HOW}")
            write_atomically(kept, (Path(work) / ARCHIVE).read_bytes(), folders=True)
    return _from_archive(kept)


def _from_archive(path: Path) -> WebRuntime:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"ort-web: {path} cannot be read ({error.strerror or error}); {HOW}") from error
    digest = "sha512-" + base64.b64encode(hashlib.sha512(raw).digest()).decode()
    if digest != DIGEST:
        raise UsageError(f"ort-web: {path} is not onnxruntime-web {VERSION} (its hash differs); {HOW}")
    with tarfile.open(path) as archive:
        members = {name: archive.extractfile(f"package/{inside}") for name, inside in FILES.items()}
        return WebRuntime({name: member.read() for name, member in members.items() if member is not None})


def _from_folder(path: Path) -> WebRuntime:
    root = path.parent if path.name == "dist" else path
    try:
        version = json.loads((root / "package.json").read_text())["version"]
        if version != VERSION:
            raise UsageError(f"ort-web: {root} holds version {version}, the page is made for {VERSION}; {HOW}")
        return WebRuntime({name: (root / inside).read_bytes() for name, inside in FILES.items()})
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UsageError(f"ort-web: {path} is no unpacked onnxruntime-web ({error}); {HOW}") from error


def html_of(page: Path, **values: str) -> str:
    """A page with the parts that all pages share, and these values, in the places named `@LIKE_THIS@`."""
    parts = re.split(r"<!-- ([A-Z]+) -->\n", (HERE / "parts.html").read_text())[1:]
    held = dict(zip(parts[::2], map(str.rstrip, parts[1::2]), strict=True)) | values
    return re.sub(r"@([A-Z]+)@", lambda place: held[place[1]], page.read_text())


def script_of(page: Path) -> str:
    """A page's script, after what all pages share."""
    return (HERE / "page.js").read_text() + "\n" + page.read_text()


def page_files(single: bool) -> list[str]:
    """Names of what `write_page` writes."""
    return [SINGLE] if single else [INDEX, *FILES]


def write_page(folder: Path, cards: dict[str, dict[str, Any]], runtime: WebRuntime, *, single: bool) -> list[Path]:
    """Write the page beside `counterfactual.onnx`: `index.html` and what it loads, or all in `counterfactual.html`.

    Args:
        folder: with counterfactual.onnx, and saliency.onnx if the page shows a map too.
        cards: by name what counterfactual.json says, its entry `page` included, and saliency.json if it is there.
        runtime: see `web_runtime`.
        single: one file, which opens by double click, instead of files for a static host.

    Raises:
        CounterlensError: a file cannot be written.
    """
    script = script_of(HERE / "offline.js")
    style = (HERE / "page.css").read_text()
    assets = ""
    if single:
        held = runtime.files | {
            asset: data
            for name, card in cards.items()
            for asset, data in ((card["file"], (folder / card["file"]).read_bytes()), (name, json.dumps(card).encode()))
        }
        assets = "\n".join(
            f'<script type="text/plain" data-asset="{name}">'
            f"{base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()}</script>"
            for name, data in held.items()
        )
    policy = (
        f"default-src 'none'; script-src {_hash(script)} blob: 'wasm-unsafe-eval'; worker-src blob:; "
        f"style-src {_hash(style)}; img-src data: blob:; connect-src {NOWHERE if single else OWN_HOST}"
    )
    page = html_of(HERE / "offline.html", CSP=policy, STYLE=style, ASSETS=assets, SCRIPT=script)
    if single:
        write_atomically(folder / SINGLE, page)
    else:
        write_atomically(folder / INDEX, page)
        for name, data in runtime.files.items():
            write_atomically(folder / name, data)
    return [folder / name for name in page_files(single)]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
