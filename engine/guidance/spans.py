"""Names for the parts of a run, so that a profiler can time them; free when nobody listens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol

import torch

from ..models.holding import switched

# The parts of a guided step, in the order in which they run.
STEP_PARTS = (
    "UNet, conditional",
    "UNet, unconditional",
    "UNet, both",
    "decoder",
    "classifier and distance",
    "classifier and distance, VJP",
    "decoder, VJP",
    "UNet, VJP",
    "filter and update",
)


class Listener(Protocol):
    """Whoever times spans."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Enter a part of this name."""
        ...


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def span(name: str) -> AbstractContextManager[None]:
    """The part `name` of a run, as a context."""
    if torch.compiler.is_compiling() or (listener := _listener.get()) is None:  # what is compiled is one part
        return nullcontext()
    return listener.span(name)


def listening(listener: Listener) -> AbstractContextManager[None]:
    """Have every span that this thread enters inside told to `listener`."""
    return switched(_listener, listener)
