"""How many samples fit into the memory that is free: measured when the server starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..blackbox.box import as_box
from ..config import Config
from ..core.core import EngineCore
from ..errors import CounterlensError, UsageError
from ..guidance.memory import step_bytes
from ..guidance.pullback import in_eager
from ..runtime.spec import SLOTS

SHARE = 0.5  # of what is free is for steps; the rest for images and answers in memory, and what other graphs keep


@dataclass(frozen=True)
class Fit:
    """What was measured.

    Attributes:
        slots: samples that may be guided at once.
        sample_bytes: what a step needs for one more sample; the larger of the first one's and the second one's.
        free_bytes: what was free, and of what: `memory`, `cgroup` (a container's limit) or `gpu`;
            of a replica, its share.
    """

    slots: int
    sample_bytes: int
    free_bytes: int
    of: str

    def __str__(self) -> str:
        free, each = self.free_bytes / 1e9, self.sample_bytes / 1e6
        return f"up to {self.slots} samples at once: {each:.0f} MB each, {free:.1f} GB free ({self.of})"

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def free_bytes(device: torch.device, root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that may be taken on a device, and what sets that: the GPU, a container's limit, or the machine's memory.

    `root` is where `proc` and `sys` are.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]), "gpu"
    found: list[tuple[int, str]] = []
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append((int(line.split()[1]) * 1024, "memory"))
    group = root / "sys/fs/cgroup"
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        if (most := _text(limit).strip()).isdigit() and (now := _text(used).strip()).isdigit():
            found.append((max(0, int(most) - int(now)), "cgroup"))
    if not found:  # no Linux
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "memory"
    return min(found)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def fit(engine: EngineCore, config: Config | None = None, free: tuple[int, str] | None = None) -> Fit | None:
    """Measure a guided step of one sample and of two, and hold the engine to the slots that fit.

    None where the classifier can only be called, and guides no step.

    Args:
        engine: its `slots` are cut to those that fit.
        config: whose step is measured; the engine's without it.
        free: see `free_bytes`, which says it by default.

    Raises:
        CounterlensError: not one sample fits.
    """
    if as_box(engine.classifier) is not None:
        return None
    settings = engine.settings(config or engine.config)
    with engine.frozen():
        decoder, mode = engine.runners.decoder(settings), in_eager(engine.pullback, engine.modules())
        one, two = (step_bytes(engine.diffusion, engine.classifier, batch, settings, mode, decoder) for batch in (1, 2))
    each = max(one, two - one)
    there, of = free or free_bytes(engine.device)
    fitting = tuple(s for s in engine.slots if s * each <= SHARE * there)
    if not fitting:
        raise CounterlensError(
            f"memory: a step of one sample needs {each / 1e9:.2f} GB, and of the {there / 1e9:.2f} GB that are free "
            f"({of}) {SHARE:.0%} may be used; --checkpointing or a half-precision --dtype need less"
        )
    engine.slots = fitting
    return Fit(fitting[-1], each, there, of)


def check_slots(slots: int | str, measured: Fit | None) -> None:
    """Refuse more slots than fit.

    Raises:
        UsageError: says how many do.
    """
    if measured is not None and slots != "auto" and int(slots) in SLOTS and int(slots) > measured.slots:
        raise UsageError(
            f"slots: {slots} samples at once need {int(slots) * measured.sample_bytes / 1e9:.2f} GB, and of the "
            f"{measured.free_bytes / 1e9:.2f} GB that are free ({measured.of}) {SHARE:.0%} may be used; "
            f"{measured.slots} fit"
        )
