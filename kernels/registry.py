"""What there is to run here: every operation, and per backend the reasons why it cannot."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from counterlens.kernels.dispatch import BACKENDS, environment_reasons

# Public functions as module:name, relative to counterlens.kernels.
OPERATIONS = (
    "consensus:consensus_filter",
    "guided_update:guided_update",
    "perturb:perturb",
    "perturb:soft_perturb",
    "curve:curve_scores",
)


@dataclass(frozen=True)
class Operation:
    """One operation as it stands on this machine."""

    name: str
    reasons: dict[str, list[str]]  # per backend, why it cannot run here; empty when it can
    automatic: str  # what backend="auto" runs, on the GPU where there is one
    why: str  # and for what reason


def operations() -> list[Operation]:
    """Every operation with the state of its backends and the choice of `auto` (for float32 tensors)."""
    reasons = {backend: environment_reasons(backend) for backend in BACKENDS}
    automatic, why = _automatic(reasons)
    return [Operation(path.partition(":")[2], reasons, automatic, why) for path in OPERATIONS]


def _automatic(reasons: dict[str, list[str]]) -> tuple[str, str]:
    asked = os.environ.get("COUNTERLENS_BACKEND", "auto")
    if asked != "auto":
        return asked, "COUNTERLENS_BACKEND asks for it"
    preferred, device = ("triton", "CUDA") if torch.cuda.is_available() else ("cpp", "CPU")
    if reasons[preferred]:
        return "reference", f"{preferred} cannot run: {'; '.join(reasons[preferred])}"
    return preferred, f"preferred on {device} tensors"
