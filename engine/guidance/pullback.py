"""One helper for every vector-Jacobian product, in two modes that a test holds together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

PullbackMode = Literal["functional", "autograd"]
PULLBACK_MODES: tuple[PullbackMode, ...] = ("functional", "autograd")


Pull = Callable[[Tensor], Tensor]


def in_eager(mode: PullbackMode, modules: Iterable[nn.Module]) -> PullbackMode:
    """The mode of steps of these models that run as they are: on a CPU `autograd`, of the same bits.

    The first use of `torch.func` imports torch's compiler, which takes longer than many a run. Weights that were made
    in inference mode need it: autograd keeps none of them.
    """
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return "autograd" if all(t.device.type == "cpu" and not t.is_inference() for t in held) else mode


@overload
def pullback(fn: Callable[[Tensor], Tensor], x: Tensor, mode: PullbackMode = ...) -> tuple[Tensor, Pull]: ...


@overload
def pullback(
    fn: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, mode: PullbackMode = ..., *, aside: Literal[True]
) -> tuple[Tensor, Pull, Tensor]: ...


def pullback(fn: Any, x: Tensor, mode: PullbackMode = "functional", *, aside: bool = False) -> Any:
    """Evaluate `fn` at `x` and return (y, pull) with `pull(v)` the vector-Jacobian product v^T dy/dx, shaped like x.

    `pull` may be called several times. `functional` (`torch.func.vjp`) can be traced, compiled and exported; `autograd`
    (`torch.autograd.grad`) also takes activation checkpointing, xformers and custom operators. With `aside` the
    function returns a second tensor, which is not differentiated and comes back third.
    """
    if mode == "autograd" and torch.is_inference_mode_enabled():  # where autograd records nothing, and torch.func does
        mode = "functional"
    if mode == "functional" and aside:
        y, pull, other = torch.func.vjp(fn, x, has_aux=True)  # type: ignore[misc]
        return y, lambda v: pull(v)[0], other
    if mode == "functional":
        y, pull = torch.func.vjp(fn, x)  # type: ignore[misc]  # a third value only with has_aux
        return y, lambda v: pull(v)[0]
    if mode != "autograd":
        raise ValueError(f"pullback: expected one of {', '.join(PULLBACK_MODES)}, got {mode!r}")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y, *others = fn(leaf) if aside else (fn(leaf),)
    return y.detach(), lambda v: torch.autograd.grad(y, leaf, v, retain_graph=True)[0], *(x.detach() for x in others)
