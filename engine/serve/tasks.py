"""Counterfactuals that their callers come back for: what has been told of each, kept for a while."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Event = tuple[str, dict[str, Any]]  # progress, and at last result or error
KEPT, KEPT_S = 256, 600.0  # finished ones that are kept for a caller that comes back, and for how long
KEPT_CHARACTERS = 256_000_000  # of images in all that are kept: a long run's previews are many
LAST = ("result", "error")


def _characters(data: dict[str, Any]) -> int:
    return sum(len(value) for value in data.values() if isinstance(value, str))


@dataclass
class Task:
    """One of them; `cancel` is called if it is forgotten while it runs."""

    cancel: Callable[[], None]
    characters: int = 0
    events: list[Event] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> bool:
        """Whether its last event is there."""
        return bool(self.events) and self.events[-1][0] in LAST


class Tasks:
    """Those of one process, by name; for one event loop.

    Where several processes answer (`fleet`), one of them holds this and the others ask it.
    """

    def __init__(self) -> None:
        self.tasks: OrderedDict[str, Task] = OrderedDict()

    async def open(self, name: str, cancel: Callable[[], None]) -> bool:
        """Keep a new one; the oldest finished ones make room. False: `KEPT` run already."""
        while len(self.tasks) >= KEPT:
            if not self._drop_oldest():
                return False
        self.tasks[name] = Task(cancel)
        return True

    def _drop_oldest(self, but: str = "") -> bool:
        """Forget the oldest finished one; False: there is none."""
        oldest = next((name for name, task in self.tasks.items() if task.done and name != but), None)
        if oldest is not None:
            del self.tasks[oldest]
        return oldest is not None

    def say(self, name: str, event: str, data: dict[str, Any]) -> None:
        """Add an event, and wake whoever listens; nothing is added to one that is done or forgotten."""
        task = self.tasks.get(name)
        if task is not None and not task.done:
            task.events.append((event, data))
            task.characters += _characters(data)
            self._wake(task)
            if task.done:
                asyncio.get_running_loop().call_later(KEPT_S, self.tasks.pop, name, None)
            while (over := sum(t.characters for t in self.tasks.values()) - KEPT_CHARACTERS) > 0:
                if not self._drop_oldest(name):
                    self._thin_out(over)
                    break

    def _thin_out(self, over: int) -> None:
        """Forget the pictures of steps of the fullest one, the oldest first: runs are many, and none is done."""
        task = max(self.tasks.values(), key=lambda task: task.characters)
        for i, (event, data) in enumerate(task.events):
            if event == "progress" and "image" in data:
                task.events[i] = event, {key: value for key, value in data.items() if key != "image"}
                task.characters -= len(data["image"])
                over -= len(data["image"])
                if over <= 0:
                    break

    async def events(self, name: str, after: int, wait_s: float) -> list[Event] | None:
        """The events behind the first `after`, waited for if there are none yet; None: no such task, or no more."""
        task = self.tasks.get(name)
        if task is None:
            return None
        if len(task.events) <= after and wait_s:
            changed = task.changed
            try:
                await asyncio.wait_for(changed.wait(), wait_s)
            except asyncio.TimeoutError:
                return []
        return task.events[after:] if name in self.tasks else None

    async def forget(self, name: str) -> bool:
        """Cancel it if it runs, and drop it; False: there is none."""
        task = self.tasks.pop(name, None)
        if task is None:
            return False
        self._wake(task)
        if not task.done:
            task.cancel()
        return True

    @staticmethod
    def _wake(task: Task) -> None:
        task.changed.set()
        task.changed = asyncio.Event()
