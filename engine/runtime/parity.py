"""No compiled step is used before it has agreed with eager, on real images where there are some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError

from .spec import STEP, Spec, relative_errors

# Relative to each sample's largest magnitude. Half precision is compared with eager in the same precision, whose own
# rounding is of this size.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1}
SLACK = {"fp32": 0.1, "fp16": 0.5, "bf16": 0.5}  # share of samples in which a location may change sides at the limit
SAMPLES = 24


@torch.no_grad()
def check_parity(
    spec: Spec,
    run: Callable[..., Sequence[Tensor]],
    *,
    batches: tuple[int, ...] = (1, 3, 8),
) -> dict[str, Any]:
    """Compare what was compiled with eager and return the report: tolerance, worst error, share left out.

    R comes after the filter, so one location that changes sides at the angle limit rescales its whole sample. Such
    samples show themselves by another `kept_fraction`; they are left out and may be a tenth at most (fp32).

    Raises:
        ExportError: it is wrong; the message says by how much.
    """
    eager = spec.function()
    errors: list[Tensor] = []
    moved: list[Tensor] = []
    own = 0.0
    for batch in batches:
        for seed in range(max(2, SAMPLES // batch // len(batches))):
            inputs = spec.example(batch, seed, real=seed % 2 == 0)
            result = eager(*inputs)
            expected = result if isinstance(result, tuple) else (result,)
            got = run(*inputs)
            errors.append(relative_errors(got[0], expected[0]))
            sides = torch.zeros(batch, dtype=torch.bool, device=got[0].device)
            if spec.what == STEP:
                sides = (expected[2] - got[2]).abs() > 1e-6
            if got[0].is_cuda:
                # Some backward kernels add up in any order: eager does not agree with itself better than this.
                result = eager(*inputs)
                again = result if isinstance(result, tuple) else (result,)
                spread = relative_errors(again[0], expected[0])
                if spec.what == STEP:  # a location that changes sides says nothing about rounding
                    spread = spread[(again[2] - expected[2]).abs() <= 1e-6]
                own = max([own, *spread.tolist()])
            moved.append(sides)
    error, left_out = torch.cat(errors), torch.cat(moved)
    tolerance, slack = max(TOLERANCE[spec.precision], 2 * own), SLACK[spec.precision]
    worst = error[~left_out].max().item() if not left_out.all() else float("nan")
    report: dict[str, Any] = {
        "samples": len(error),
        "inputs": "random" if spec.images is None else "real images and random",
        "batches": list(batches),
        "tolerance": tolerance,
        "eager_with_itself": own,
        "worst": worst,
        "median": error.median().item(),
        "left_out": left_out.double().mean().item(),
        "worst_with_left_out": error.max().item(),
    }
    # `not <=` so that NaN fails.
    if not worst <= tolerance or report["left_out"] > slack:
        raise ExportError(
            f"the compiled {spec.what} does not agree with eager: relative error {worst:.2g} (at most {tolerance:g}), "
            f"{report['left_out']:.0%} of samples filtered differently (at most {slack:.0%}); not used"
        )
    return report
