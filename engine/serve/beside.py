"""Calls that take as long as somebody else takes, in threads beside the one that owns the models."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
FAILURES = Exception  # a user's model may raise anything, classes of its own included: its requests fail, nobody else's


def taken() -> Future[Any]:
    """A future that only whoever took it ends: a caller who leaves does not."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class Beside:
    """Runs calls in threads of their own, which the end of the process does not wait for.

    Args:
        change: held while a call is begun, and when it is done.
        told: what callers hear of what a call raised.
        done: told that one is done.
        most: threads for parts of what is counted elsewhere.

    Attributes:
        calls: those that run and are no parts.
    """

    def __init__(
        self, change: threading.Condition, told: Callable[[Exception], Exception], done: Callable[[], None], most: int
    ) -> None:
        self.change, self.told, self.done, self.most = change, told, done, most
        self.calls: set[Future[Any]] = set()
        self._parts: deque[tuple[Callable[[], Any], Future[Any]]] = deque()  # that no thread has begun
        self._busy = 0  # threads for parts

    def run(self, call: Callable[[], T]) -> Future[T]:
        """Begin a call."""
        future: Future[T] = taken()
        with self.change:
            self._start(self._work, call, future)
            self.calls.add(future)
        return future

    def part(self, call: Callable[[], T]) -> Future[T]:
        """Have a part done once a thread is free; cancelling its future before then spares it."""
        future: Future[T] = Future()
        with self.change:
            self._parts.append((call, future))
            if self._busy < self.most:
                self._start(self._work_parts)
                self._busy += 1
        return future

    def _start(self, work: Callable[..., None], *given: Any) -> None:
        threading.Thread(target=work, args=given, name="counterlens-beside", daemon=True).start()

    def _work_parts(self) -> None:
        while True:
            with self.change:
                if not self._parts:
                    self._busy -= 1
                    return
                call, future = self._parts.popleft()
            if future.set_running_or_notify_cancel():
                self._work(call, future)

    def _work(self, call: Callable[[], T], future: Future[T]) -> None:
        result: Any = None
        said: BaseException | None = None
        try:
            result = call()
        except FAILURES as error:
            said = self.told(error)
        except BaseException as error:
            said = error
            raise
        finally:
            with self.change:
                self.calls.discard(future)
                if future.done():  # all were failed meanwhile
                    pass
                elif said is None:
                    future.set_result(result)
                else:
                    future.set_exception(said)
                self.done()

    def fail(self, error: Exception) -> None:
        """Nobody waits any longer for those that run."""
        with self.change:
            for future in self.calls:
                future.set_exception(error)
            self.calls.clear()
            self._parts.clear()
