"""What was exported against the function that it was made from, on random inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from counterlens.export.capture import without_onednn
from counterlens.export.simplify import Size

# Relative to each sample's largest magnitude, by the coarsest type in the graph.
TOLERANCE = {torch.bfloat16: 2e-1, torch.float16: 3e-2}
FINE = 1e-4
BATCHES = (1, 3, 8)  # at which an open batch is checked
UNKNOWN_MEMORY = 4 << 30  # bytes
NUDGE = 1e-6  # relative change of the inputs that tells what rounding may do to a result
NUDGES = 12  # at most: one alone misses a kink (of a ReLU6) that rounding has crossed half of the time
UNSTABLE = 1e-2  # a sample that moves by more under such a change says nothing


@dataclass(frozen=True)
class Comparison:
    """Worst relative error, share of samples that rounding decides, and what is wrong (nothing if it agrees)."""

    worst: float
    unstable: float
    fault: str = ""


def outputs(result: Any) -> list[Tensor]:
    """All tensors of what a function returned."""
    return [v for v in tree_leaves(result) if isinstance(v, Tensor)]


def sample(examples: Sequence[Tensor], batched: Sequence[int], batch: int | None, seed: int) -> list[Tensor]:
    """Random inputs in the examples' own ranges; inputs without the batch keep their values.

    Args:
        batch: None keeps every shape.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        shape = x.shape if batch is None else (batch, *x.shape[1:])
        if x.numel() == 0 or x.dtype == torch.bool:
            return (torch.randint(0, 2, shape, generator=g) * bool(x.any())).to(x)
        known = x[x.isfinite()] if x.is_floating_point() else x
        low, high = (known.min().item(), known.max().item()) if known.numel() else (0.0, 1.0)
        if not x.is_floating_point():
            return torch.randint(int(low), int(high) + 1, shape, generator=g).to(x)
        if low == high:  # a stand-in such as zeros or ones
            low, high = (0.0, 1.0) if low == 0 else sorted((low / 2, low * 1.5))
        return (torch.rand(shape, generator=g, dtype=torch.float64) * (high - low) + low).to(x)

    return [draw(x) if i in batched else x for i, x in enumerate(examples)]


def call(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """All results on the CPU, without gradients; the inputs stay what they are."""
    with torch.no_grad(), without_onednn():
        return [v.detach().cpu() for v in outputs(function(*(x.clone() for x in inputs)))]


def compare(
    got: Sequence[Tensor],
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    tolerance: float = FINE,
    want: Sequence[Tensor] | None = None,
) -> Comparison:
    """Results `got` against what `function` returns (`want`, where that is known); NaN equals NaN.

    Where they differ, the inputs are nudged: a sample whose own result jumps then (an index of a tie, noise around
    zero) is left out, and one that moves is allowed ten times as much.
    """

    want = call(function, inputs) if want is None else want
    if len(got) != len(want):
        return Comparison(float("nan"), 0, f"{len(got)} outputs instead of {len(want)}")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            found, due = (f"{v.dtype} {list(v.shape)}".removeprefix("torch.") for v in (a, b))
            return Comparison(float("nan"), 0, f"output {i} is {found}, where the function gives {due}")
    errors = [_errors(a, b) for a, b in zip(got, want, strict=True)]
    moved = [torch.zeros_like(e) for e in errors]
    if any((e > tolerance).any() for e in errors):
        for seed in range(NUDGES):
            if seed > 1 and not any(_wrong(e, m, tolerance).any() for e, m in zip(errors, moved, strict=True)):
                break
            again = call(function, _nudged(inputs, seed))
            fits = [a.shape == b.shape for a, b in zip(again, want, strict=True)]
            moved = [
                torch.maximum(m, _errors(a, b)) if fit else m
                for m, a, b, fit in zip(moved, again, want, fits, strict=True)
            ]
    worst, left_out, count, fault = 0.0, 0, 0, ""
    for i, (error, own) in enumerate(zip(errors, moved, strict=True)):
        stable = own <= UNSTABLE
        left_out += int((~stable).sum())
        count += len(own)
        wrong = _wrong(error, own, tolerance)
        if stable.any():
            worst = max(worst, error[stable].max().item())
        if wrong.any():
            fault = fault or f"output {i} differs by {error[wrong].max().item():.2g} of the largest magnitude"
    return Comparison(worst, left_out / max(1, count), fault)


def _wrong(error: Tensor, own: Tensor, tolerance: float) -> Tensor:
    """Samples that differ although they are stable: [B]."""
    return (own <= UNSTABLE) & ~(error <= (10 * own).clamp(min=tolerance))  # so that NaN is wrong


def _errors(got: Tensor, want: Tensor) -> Tensor:
    """Largest difference of each sample over its largest magnitude: [B]; infinite where only one is finite."""
    a, b = (v.double().flatten(1) if v.ndim > 1 else v.double().reshape(-1, 1) for v in (got, want))
    if a.shape[1] == 0:
        return a.new_zeros(a.shape[0])
    same = (a == b) | (a.isnan() & b.isnan())
    finite = b.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
    # Where the function gives nothing but zeros, rounding may give a little.
    scale = torch.where(finite == 0, FINE / 10 if got.is_floating_point() else 1.0, finite)
    return torch.where(same, 0.0, ((a - b).abs() / scale).nan_to_num(torch.inf, torch.inf)).amax(1)


def _nudged(inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        x * (1 + NUDGE * (2 * torch.rand(x.shape, generator=g).to(x) - 1)) if x.is_floating_point() else x
        for x in inputs
    ]


def tolerance_of(graph: GraphModule) -> float:
    """What can be asked of a graph with these types."""
    held = {n.meta["val"].dtype for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    return max([FINE, *(t for dtype, t in TOLERANCE.items() if dtype in held)])


def free_memory(device: torch.device) -> int:
    """Half of the bytes that are free on a device: what a check may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows and macOS do not say
        return UNKNOWN_MEMORY


def fitting(graph: GraphModule, batches: Sequence[int], memory: int) -> tuple[tuple[int, ...], dict[str, str]]:
    """The batches whose activations fit, and what to say of the others."""
    need = {b: peak_bytes(graph, b) for b in batches}
    beyond = {
        str(b): f"takes about {n / 1e9:.1f} GB, allowed are {memory / 1e9:.1f}" for b, n in need.items() if n > memory
    }
    return tuple(b for b in batches if str(b) not in beyond), beyond


def peak_bytes(graph: GraphModule, batch: int) -> int:
    """Memory of the tensors that are alive together at this batch, weights aside."""
    nodes = list(graph.graph.nodes)
    last = {used: i for i, node in enumerate(nodes) for used in node.all_input_nodes}
    ends: dict[int, int] = {}
    now = peak = 0
    for i, node in enumerate(nodes):
        value, shape = node.meta.get("val"), node.meta.get("shape")
        if node.op != "get_attr" and isinstance(value, Tensor) and shape is not None:
            size = value.element_size()
            for n in shape:
                size *= n.at(batch) if isinstance(n, Size) else n
            now += size
            ends[last.get(node, i)] = ends.get(last.get(node, i), 0) + size
        peak = max(peak, now)
        now -= ends.pop(i, 0)
    return peak
