"""A compiled step that is called like a GuidedStep: names and checks its inputs, and watches its first results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CounterlensError, UsageError
from ..guidance.step import CARRIED, Scale, carried_names
from ..models.conditions import CONDITION, Condition, named, tensors
from .spec import INPUTS

WATCHED = 3  # first calls whose results are looked at for NaN


class CompiledStep:
    """One guided denoising step, executed by `run`.

    Args:
        run: from the tensors of `INPUTS` to (z_prev, z0, kept_fraction), and the guidance where it was asked for.
        runtime: its name, for messages.
        dtype: `fp32`, `fp16` or `bf16`.
        expected: input name to (dtype, shape without the batch).
        batches: the batch sizes it takes; None: any.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        *,
        runtime: str,
        dtype: str,
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        batches: tuple[int, ...] | None = None,
    ) -> None:
        self.run = run
        self.runtime = runtime
        self.dtype = dtype
        self.expected = expected
        self.batches = batches
        self.reused = tuple(kind for kind, names in CARRIED.items() if names[0] in expected)
        self._calls = 0

    def __call__(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        timestep_prev: Tensor,  # [B]
        condition: Condition,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
        target: Tensor,  # [B]
        *,
        guidance_scale: Scale,
        class_scale: Scale,
        distance_scale: Scale,
        angle_deg: Scale,
        carried: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """See `GuidedStep`."""
        scales = (guidance_scale, class_scale, distance_scale, angle_deg)
        held = tensors(condition)
        kinds = [self.expected[name][0] for name in named([CONDITION], len(held)) if name in self.expected]
        # A half-precision model's own are half.
        held = tuple(c.to(kind) for c, kind in zip(held, kinds, strict=True))
        given = (z, timestep, timestep_prev, *held, image, target, *(_per_sample(s, z) for s in scales), *carried)
        self._check(given)
        out = tuple(self.run(*given))
        if self._calls < WATCHED:
            self._calls += 1
            self._watch(z, out[0])
        return out

    def _check(self, given: Sequence[Tensor]) -> None:
        batch = given[0].shape[0]
        if self.batches is not None and batch not in self.batches:
            known = ", ".join(map(str, self.batches))
            raise UsageError(f"{self.runtime}: built for batches of {known}, got {batch}; pad or build it for that too")
        carried = carried_names(self.reused)
        count = len(given) - len(carried) - len(INPUTS) + 1
        for name, tensor in zip([*named(INPUTS, count), *carried], given, strict=True):
            dtype, shape = self.expected[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != (batch, *shape):
                raise UsageError(
                    f"{self.runtime}: {name}: expected {_text(dtype, (batch, *shape))}, "
                    f"got {_text(tensor.dtype, tensor.shape)}"
                )

    def _watch(self, z: Tensor, z_prev: Tensor) -> None:
        if self.dtype == "fp32" or not z.isfinite().all() or z_prev.isfinite().all():
            return
        bad = (~z_prev.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        largest = torch.finfo(torch.float16).max
        why = f"activations above {largest:g} overflow" if self.dtype == "fp16" else "an activation overflows"
        raise CounterlensError(
            f"{self.runtime}: the step in {self.dtype} returned NaN or infinite values for samples {bad} of finite "
            f"inputs, most likely because {why} in {self.dtype}; use {'bf16 or ' * (self.dtype == 'fp16')}fp32"
        )


def _per_sample(value: Scale, z: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=z.device, dtype=torch.float32).expand(z.shape[0])
    return torch.full((z.shape[0],), float(value), device=z.device)


def _text(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def expected_inputs(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a step takes, from examples."""
    return {name: (t.dtype, tuple(t.shape[1:])) for name, t in tensors.items()}


def as_json(expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Any]:
    """For an artefact's report."""
    return {name: [str(dtype).removeprefix("torch."), list(shape)] for name, (dtype, shape) in expected.items()}


def from_json(stored: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Back from an artefact's report."""
    return {name: (getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in stored.items()}
