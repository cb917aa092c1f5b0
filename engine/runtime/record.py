"""Where an artefact was held to eager: a file beside it for each machine, so that it is done once.

A record holds for the artefact's files (by their SHA-256), the processor or GPU, and the versions of what runs it. A
folder that was copied to another machine brings records of machines that this one is not.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

import torch

from counterlens.export.store import Artefact
from counterlens.export.versions import versions

from ..errors import CounterlensError
from ..files import write_atomically
from .registry import of_format
from .spec import machine


def here(artefact: Artefact, device: torch.device) -> dict[str, Any]:
    """What a comparison with eager holds for: this machine, this kind of device and these versions."""
    packages = ("torch", "counterlens", *of_format(artefact.key["target"]).packages)
    return {"machine": machine(), "device": device.type, "versions": versions(packages)}


def read_record(artefact: Artefact, device: torch.device, *, real: bool) -> dict[str, Any] | None:
    """The record of this artefact on this machine, if it was held to eager here.

    Args:
        artefact: with the hashes of its files.
        device: where it runs.
        real: there are real images now: a record of random numbers is not enough.
    """
    try:
        record = json.loads(_path(artefact, device).read_text())
        good = record["where"] == here(artefact, device) and record["files"] == artefact.hashes
        return record if good and (record["real"] or not real) else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is made again
        return None


def write_record(artefact: Artefact, device: torch.device, *, real: bool, parity: dict[str, Any]) -> None:
    """Say beside the artefact that it agreed with eager here."""
    path = _path(artefact, device)
    record = {"where": here(artefact, device), "files": artefact.hashes, "real": real, "parity": parity}
    # A store that cannot be written, such as one that is shared: compared again the next time.
    with suppress(CounterlensError):
        write_atomically(path, json.dumps(record, indent=1) + "\n")


def _path(artefact: Artefact, device: torch.device) -> Any:
    name = hashlib.sha256(json.dumps(here(artefact, device), sort_keys=True).encode()).hexdigest()[:12]
    return artefact.folder / f"agrees-{name}.json"
