"""An audit of tiny models in a process of its own, to be killed: `python audit_child.py SOURCE OUT [ray]`."""

from __future__ import annotations

import sys
from typing import Any

import torch

from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from tests.conftest import make_tiny

SETTINGS = {
    "steps": 8, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
}  # fmt: skip


def audit(source: str, out: str, **options: Any) -> None:
    """Parts of two samples, so that there are many instants to be killed at."""
    engine = Engine(*make_tiny(), Config(), pack_settings={"realistic": SETTINGS}, runtime="eager")
    engine.audit(source, out, part_size=2, report=False, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    audit(sys.argv[1], sys.argv[2])
