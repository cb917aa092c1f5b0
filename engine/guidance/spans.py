"""Names for the parts of a run, so that a profiler can time them; free when nobody listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

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


_listener: Listener | None = None


def span(name: str) -> AbstractContextManager[None]:
    """The part `name` of a run, as a context."""
    return nullcontext() if _listener is None else _listener.span(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have every span inside told to `listener`; for one thread at a time."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
