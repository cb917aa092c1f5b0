"""Holding modules as they are while something is differentiated through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .holding import Shared
from .norms import make_plain


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Hold modules in eval mode without parameter gradients, their norms made right, and leave them as they were.

    Without this the graph of every step would also reach the parameters, and memory would grow with the steps. Several
    threads may hold the same modules: they are as before when the last has left.
    """
    parts = {id(m): m for module in modules for m in module.modules()}.values()
    with _still(parts), _constant(p for module in modules for p in module.parameters()):
        yield


def _hold_module(module: nn.Module) -> Callable[[], None]:
    training, hooks = module.training, make_plain(module)
    if training:
        module.training = False

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        if training:
            module.training = True

    return undo


def _hold_parameter(parameter: Tensor) -> Callable[[], Tensor]:
    if not parameter.requires_grad:
        return lambda: parameter
    parameter.requires_grad_(False)
    return lambda: parameter.requires_grad_(True)


_still = Shared(_hold_module)
_constant = Shared(_hold_parameter)
