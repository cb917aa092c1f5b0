"""Asks a box: requests again after failures, with back-off and jitter, at a bounded rate, within the budget."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .options import BoxOptions
from .reading import Refused, Row, Unanswered, Unusable, plain, read
from .sources import Source

Pixels = NDArray[np.uint8]  # [N, H, W, 3]

IN_A_ROW = 20  # images without any answer after which a server is taken for gone
LONGEST_REASON = 300  # characters
FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0  # seconds before a request is made again, doubled each time


class BudgetSpent(Unusable):
    """A box was asked as often as it may be; what it answered is kept."""


class Asker:
    """Makes the requests of one box; threads may share it, and make no more at once than the source's concurrency.

    Args:
        source: answers. labels: of the answers. options: how it is asked.
        spend: given a request's images and those that were sent before, counts what the budget allows and returns that.

    Attributes:
        hard: it says labels alone; None before its first answer.
    """

    def __init__(
        self,
        source: Source,
        labels: Sequence[str],
        options: BoxOptions,
        spend: Callable[[Sequence[Any], set[Any]], list[Any]],
    ) -> None:
        self.source, self.labels, self.options, self.spend = source, labels, options, spend
        self.hard: bool | None = None
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(source.concurrency)
        self._lost, self._next = 0, 0.0

    def ask(
        self,
        items: Sequence[tuple[Any, Pixels]],
        stop: threading.Event,
        keep: Callable[[dict[Any, Row]], None],
    ) -> dict[Any, Row | str]:
        """One request's images, asked until each has an answer or no try is left; the last try asks one by one.

        What a server refuses, and what fails here, is not asked again; if others were with it, each is asked alone.
        """
        left, found, reasons = dict(items), dict[Any, Row | str](), dict[Any, str]()
        tries = self.options.retries if self.source.remote else 0
        sent: set[Any] = set()
        for attempt in range(tries + 1):
            alone = attempt == tries > 0
            groups = [[key] for key in left] if alone else [list(left)]
            wait = 0.0
            while groups:
                self._pace(stop)
                if stop.is_set():
                    break
                group = groups.pop(0)
                allowed = self.spend(group, sent)
                try:
                    rows = self._request([left[key] for key in allowed]) if allowed else []
                except Unanswered as failure:
                    wait = max(wait, failure.after)
                    if not self.source.remote and len(allowed) > 1:
                        groups += [[key] for key in allowed]
                    reasons |= dict.fromkeys(allowed, self._shown(failure))
                except Refused as refusal:
                    if len(allowed) > 1:
                        groups += [[key] for key in allowed]
                    else:
                        found[allowed[0]] = self._shown(refusal)
                        del left[allowed[0]]
                else:
                    good = {key: row for key, row in zip(allowed, rows, strict=True) if not isinstance(row, str)}
                    reasons |= {key: row for key, row in zip(allowed, rows, strict=True) if isinstance(row, str)}
                    if good:
                        keep(good)
                        self._lost = 0
                    found |= good
                    left = {key: image for key, image in left.items() if key not in good}
                if len(allowed) < len(group):
                    raise BudgetSpent(
                        f"classifier: {self.source.name} was asked {self.options.max_queries} times, as often as "
                        "max_queries allows; its answers are kept: more queries go on from them"
                    )
            if not left or stop.is_set():
                break
            if attempt < tries:
                backed_off = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.5)
                stop.wait(max(wait, backed_off))
        if left and not stop.is_set():
            self._lost += len(left)
            if self._lost >= IN_A_ROW and self.source.remote:
                raise Unusable(
                    f"classifier: {self.source.name} gave no answer for {self._lost} images in a row, the last time it "
                    f"{reasons[next(iter(left))]}; what it answered before is kept, the same command goes on"
                )
        return found | {key: reasons.get(key, "was stopped") for key in left}

    def _pace(self, stop: threading.Event) -> None:
        """Wait until a request may be made."""
        if self.options.rate is not None:
            with self._lock:
                now = time.monotonic()
                start = max(now, self._next)
                self._next = start + 1 / self.options.rate
            stop.wait(start - now)

    def _shown(self, why: object) -> str:
        """A reason for people: secrets are hidden before it is cut, so that no half of one is left."""
        return self.source.hide(str(why))[:LONGEST_REASON]

    def _request(self, images: Sequence[Pixels]) -> list[Row | str]:
        """One request: probabilities of each image, or what is wrong with its answer."""
        with self._room:
            said = plain(self.source.ask(np.stack(images)), len(images))
        rows: list[Row | str] = []
        for one in said:
            row = read(one, self.labels, self.source.output)
            if isinstance(row, str):
                rows.append(self._shown(row))
                continue
            if self.hard is None:
                self.hard = row[1]
            same = self.hard == row[1]
            rows.append(row[0] if same else f"answers with a label{'' if row[1] else ' no more'}, not as before")
        return rows
