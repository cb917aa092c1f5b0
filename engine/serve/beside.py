"""Calls that take as long as somebody else takes, in threads beside the one that owns the models."""

from __future__ import annotations

import threading
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
    """Runs each call in a thread of its own, which the end of the process does not wait for.

    Args:
        change: held while a call is begun, and when it is done.
        told: what callers hear of what a call raised.
        done: told that one is done.

    Attributes:
        calls: those that run and were not begun as somebody's part.
    """

    def __init__(
        self, change: threading.Condition, told: Callable[[Exception], Exception], done: Callable[[], None]
    ) -> None:
        self.change, self.told, self.done = change, told, done
        self.calls: set[Future[Any]] = set()

    def run(self, call: Callable[[], T], *, part: bool = False) -> Future[T]:
        """Begin a call; `part`: of something that is counted elsewhere."""
        future: Future[T] = taken()
        with self.change:
            if not part:
                self.calls.add(future)
        threading.Thread(target=self._work, args=(call, future), name="counterlens-beside", daemon=True).start()
        return future

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
