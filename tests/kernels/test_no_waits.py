"""No operation waits for a GPU where its arguments are trusted: without one, on tensors that say they are on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counterlens.kernels.consensus import consensus_filter
from counterlens.kernels.curve import curve_scores
from counterlens.kernels.curve import triton as curve_launch
from counterlens.kernels.guided_update import guided_update
from counterlens.kernels.perturb import perturb, soft_perturb

# What reads a value of a tensor, and what makes a tensor of the host's numbers.
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "lift_fresh")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class NoWaits(TorchDispatchMode):
    """Fails on what would wait for a device; operations of ours count as one, and are what is launched."""

    launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in WAITS, f"{name} waits for the device"
        self.launched += func.namespace == "counterlens"
        return func(*args, **(kwargs or {}))


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if dtype == torch.int64:
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    values = torch.linspace(0.01, 1, shape[0], device=DEVICE)
    return values.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()


def latents(count: int) -> list[Tensor]:
    return [on_device(2, 4, 8, 8) for _ in range(count)]


def update(**more: Any) -> Any:
    numbers = {name: on_device(2) for name in ("guidance_scale", "class_scale", "distance_scale", "angle_deg")}
    return guided_update(*latents(5), on_device(2), on_device(2), **numbers, **more)


def maps() -> tuple[Tensor, float, Tensor, Tensor]:
    return on_device(2, 3, 8, 8), 0.5, on_device(2, 8, 8), on_device(4)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "consensus, a number": lambda: consensus_filter(*latents(2), 45.0),
    "consensus, angles": lambda: consensus_filter(*latents(2), on_device(2), mode="project"),
    "guided_update": update,
    "curve": lambda: curve_scores(
        on_device(2, 2, 4, 10), on_device(2, dtype=torch.int64), on_device(4), trusted=True
    ),
    "perturb": lambda: perturb(*maps(), trusted=True),
    "perturb, by ranks": lambda: perturb(
        *maps(), order="rank", rank=on_device(2, 8, 8, dtype=torch.int64), trusted=True
    ),
    "soft_perturb": lambda: soft_perturb(*maps(), temperature=0.1, mean=(0.5,) * 3, std=(0.2,) * 3, trusted=True),
}  # fmt: skip
CHECKED = {
    "curve": lambda: curve_scores(on_device(2, 2, 4, 10), on_device(2, dtype=torch.int64), on_device(4)),
    "perturb": lambda: perturb(*maps()),
    "soft_perturb": lambda: soft_perturb(*maps(), temperature=0.1),
}


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # as outside of a capture
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_trusted_waits_for_nothing(name: str) -> None:
    OPERATIONS[name]()  # constants are copied to a device once
    with torch.no_grad(), NoWaits() as watch:
        OPERATIONS[name]()
    assert watch.launched == 1


@pytest.mark.parametrize("name", CHECKED)
def test_what_is_not_trusted_is_looked_at(name: str) -> None:
    with torch.no_grad(), pytest.raises(AssertionError, match="waits for the device"), NoWaits():
        CHECKED[name]()


def test_a_target_that_is_no_class_reads_nobody_elses_memory() -> None:
    logits, thresholds = torch.randn(3, 2, 4, 10, device=DEVICE), torch.linspace(0.5, 1, 4, device=DEVICE)
    targets = torch.tensor([3, 10, -1], device=DEVICE)
    probability, insertion, _ = curve_launch.curve_scores(logits, targets, thresholds.expand(3, -1).contiguous())
    assert probability[0].isfinite().all()
    assert probability[1:].isnan().all()
    assert insertion.isnan().tolist() == [False, True, True]
