"""Holding modules as they are while something is differentiated through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .norms import plain_norms


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Hold modules in eval mode without parameter gradients, their norms made right, and leave them as they were.

    Without this the graph of every step would also reach the parameters, and memory would grow with the steps.
    """
    parts = {id(m): m for module in modules for m in module.modules()}.values()
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    training = [m for m in parts if m.training]
    try:
        for m in training:
            m.training = False
        for p in parameters:
            p.requires_grad_(False)
        with plain_norms(parts):
            yield
    finally:
        for m in training:
            m.training = True
        for p in parameters:
            p.requires_grad_(True)
