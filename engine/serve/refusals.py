"""Why a request is not taken, or not finished."""

from __future__ import annotations

from ..errors import CounterlensError


class Full(CounterlensError):
    """The queue is full; `retry_after` is when there should be room, in seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"queue: {waiting} requests wait already; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class Exhausted(CounterlensError):
    """Memory was full while the sample was worked on; it may be asked for again."""


class Draining(CounterlensError):
    """The server is being stopped and takes nothing new."""


class Late(CounterlensError):
    """The budget ends before an answer can be there."""


class Cancelled(CounterlensError):
    """The caller does not want the answer any more."""
