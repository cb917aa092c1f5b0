"""On what an audit runs: what changes rows in their last bits is recorded when it begins, and held when it goes on.

Threads are set and runtimes that `auto` chose are taken again, said aloud; what cannot be set (versions, the CPU's
instructions, the device) must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from counterlens.kernels.registry import operations

from ..errors import UsageError
from ..outputs import differences
from ..provenance import session
from ..runtime.registry import EAGER, find

if TYPE_CHECKING:
    from ..config import Config
    from ..core.core import EngineCore

COMPUTING = ("counterlens", "torch", "diffusers", "transformers", "pillow")  # packages that make pixels or numbers
_ALONE = Lock()
SET = ("threads", "runtimes", "parity")  # what is set to the recorded value instead of compared


def conditions(engine: EngineCore, config: Config) -> dict[str, Any]:
    """What decides the last bits of this engine's results, here and now, as JSON values."""
    here, runtimes = session(engine.device), engine.runners.taken(engine.settings(config), engine.slots)
    used = {name for by_slots in runtimes.values() for name in by_slots.values()}
    packages = {*COMPUTING, *(p for name in used - {EAGER} for p in find(name).packages)}
    return {
        "threads": here["threads"],
        "cpu": here["cpu"],
        "device": here["device"],
        "precision": torch.get_float32_matmul_precision(),
        "kernels": engine.backend if engine.backend != "auto" else operations()[0].automatic,
        "versions": {name: v for name, v in here["versions"].items() if name in packages},
        "runtimes": runtimes,
        "parity": {name: p for name, p in engine.runners.parities(engine.settings(config)).items() if name in used},
    }


def check_conditions(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to go on where the last bits would be others.

    Raises:
        UsageError: something differs that cannot be set; the message names it with both values.
    """
    was, is_now = ({k: v for k, v in x.items() if k not in SET} for x in (before, now))
    # A runtime that either side does not use brings no package into the numbers of both.
    shared = was.get("versions", {}).keys() & is_now["versions"].keys()
    for x in (was, is_now):
        x["versions"] = {k: v for k, v in x.get("versions", {}).items() if k in shared}
    if told := differences(was, is_now):
        hint = " (ATEN_CPU_CAPABILITY chooses the CPU's instructions)" if was.get("cpu") != is_now["cpu"] else ""
        raise UsageError(
            f"out: {where} was begun under other conditions: {told}; rows would differ in their last digits. Go on "
            f"under the same{hint}, replace it with --overwrite, or choose another folder"
        )


@contextmanager
def held(engine: EngineCore, before: Mapping[str, Any], config: Config, say: Callable[[str], None]) -> Iterator[None]:
    """Compute with the threads and the runtimes under which an audit began; `say` is told what that changes."""
    if not _ALONE.acquire(blocking=False):
        raise UsageError(
            "audit: another one runs in this process, whose number of threads it holds; run one after the other, or in "
            "another process"
        )
    threads, wanted = torch.get_num_threads(), before["threads"]
    try:
        if threads != wanted:
            say(f"threads: {wanted}, as this audit began, instead of {threads}; sums depend on them")
        torch.set_num_threads(wanted)  # of BLAS too, also where it is the same
        with engine.runners.pinned(
            before["runtimes"], engine.settings(config), engine.slots, say, fresh=threads != wanted
        ):
            yield
    finally:
        torch.set_num_threads(threads)
        _ALONE.release()
