"""Changes that several threads may need at once, of objects that they share; and options of one thread alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """A change that the first caller makes to an object, and the last one who leaves undoes.

    Args:
        change: makes it to one object, and returns what undoes it.
    """

    def __init__(self, change: Callable[[T], Callable[[], Any]]) -> None:
        self._change = change
        self._lock = threading.RLock()
        # By id: how many hold it, what undoes it, and the object, so that no other has its id meanwhile.
        self._held: dict[int, tuple[int, Callable[[], Any], T]] = {}

    @contextmanager
    def __call__(self, objects: Iterable[T]) -> Iterator[None]:
        """Hold the change on these objects."""
        taken: list[T] = []
        try:
            with self._lock:
                for one in {id(o): o for o in objects}.values():
                    count, undo, _ = self._held.get(id(one)) or (0, self._change(one), one)
                    self._held[id(one)] = count + 1, undo, one
                    taken.append(one)
            yield
        finally:
            with self._lock:
                for one in reversed(taken):
                    count, undo, _ = self._held.pop(id(one))
                    if count > 1:
                        self._held[id(one)] = count - 1, undo, one
                    else:
                        undo()


@contextmanager
def switched(option: ContextVar[T], value: T) -> Iterator[None]:
    """Give an option a value in this thread alone."""
    before = option.set(value)
    try:
        yield
    finally:
        option.reset(before)
