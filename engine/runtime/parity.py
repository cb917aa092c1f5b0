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
LARGEST = 0.2  # no rounding excuses more
# Share of a sample's locations that may have changed sides in pairs, one in and one out, which `kept_fraction` cannot
# tell: in half precision many lie within rounding of the limit. Seen on an H200: one location changes the step by up to
# 0.005 over two timesteps, and so by some 0.03 over the fifty that are compared here.
SWAPPED = {"fp32": 0.0, "fp16": 0.005, "bf16": 0.005}


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

    On a GPU the tolerance is at least twice what eager differs from itself by (`own_rounding`): libraries choose their
    algorithms by shape and workspace, and some add up in any order, so what is compiled or recorded may run others.

    Raises:
        ExportError: it is wrong; the message says by how much.
    """
    eager = spec.function()
    errors: list[Tensor] = []
    at_all: list[Tensor] = []  # with the locations that may have changed sides in pairs
    moved: list[Tensor] = []
    own = 0.0
    for batch in batches:
        for seed in range(max(2, SAMPLES // batch // len(batches))):
            inputs = spec.example(batch, seed, real=seed % 2 == 0)
            result = eager(*inputs)
            expected = result if isinstance(result, tuple) else (result,)
            got = run(*inputs)
            swapped = SWAPPED[spec.precision] if spec.what == STEP else 0.0
            errors.append(errors_of_most(got[0], expected[0], swapped))
            at_all.append(relative_errors(got[0], expected[0]))
            moved.append(changed_sides(spec, got, expected))
            if got[0].is_cuda:
                own = max(own, own_rounding(spec, eager, inputs, expected))
    error, left_out = torch.cat(errors), torch.cat(moved)
    tolerance, slack = max(TOLERANCE[spec.precision], min(2 * own, LARGEST)), SLACK[spec.precision]
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
        "worst_with_swapped": torch.cat(at_all)[~left_out].max().item() if not left_out.all() else float("nan"),
    }
    # `not <=` so that NaN fails.
    if not worst <= tolerance or report["left_out"] > slack:
        raise ExportError(
            f"the compiled {spec.what} does not agree with eager: relative error {worst:.2g} (at most {tolerance:g}), "
            f"{report['left_out']:.0%} of samples filtered differently (at most {slack:.0%}); not used"
        )
    return report


def errors_of_most(
    got: Tensor,  # [B, C, h, w], or of any shape where none are left out
    expected: Tensor,
    share: float,
) -> Tensor:
    """`relative_errors` [B] without this share of each sample's locations, those that differ most."""
    if not (dropped := int(share * expected[0, 0].numel()) if share else 0):
        return relative_errors(got, expected)
    difference = (got.double() - expected.double()).abs().amax(1).flatten(1)  # [B, h w]
    return difference.topk(dropped + 1, dim=1).values[:, -1] / expected.double().abs().flatten(1).amax(1)


def changed_sides(spec: Spec, got: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Samples [B] of a step in which a location changed sides at the angle limit: they say nothing about rounding."""
    if spec.what != STEP:
        return torch.zeros(len(got[0]), dtype=torch.bool, device=got[0].device)
    return (expected[2] - got[2]).abs() > 1e-6


def own_rounding(spec: Spec, eager: Callable[..., Any], inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far eager is from itself on the same samples, run again and run at twice the batch; relative as parity is.

    Both are right, so nothing that only rounds otherwise can be asked to be nearer.
    """
    batch = len(inputs[0])
    largest = 0.0
    for given in (inputs, [torch.cat([x, x]) for x in inputs]):
        result = eager(*given)
        again = [x[:batch] for x in (result if isinstance(result, tuple) else (result,))]
        spread = relative_errors(again[0], expected[0])[~changed_sides(spec, again, expected)]
        largest = max([largest, *spread.tolist()])
    return largest
