"""A classifier that can only be called, behind the protocol of all classifiers: whatever needs a forward alone runs."""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import CounterlensError, UsageError
from ..images.files import to_uint8
from .answers import Answers, key_of
from .asking import Asker, Pixels
from .options import BoxOptions
from .reading import Row, Unusable
from .sources import Source, open_source

FLOOR = 1e-9  # of a probability as a logit: a label alone is no endless log-odds
PROBES = 4  # images by whose answers a box is known again
TWICE = 2  # of them are asked twice
SAME = 1e-3  # what answers of one box may differ by, beside what two answers to one image differ by
REASONS = 10_000  # why images got no answer: of so many, the latest
SPREADS = 5  # times the latter: of two noisy answers to two images the largest difference says little


@dataclass(frozen=True)
class Queries:
    """How often a box was asked, in images, and in requests.

    Attributes:
        asked: images sent, probes and repetitions included: what `max_queries` bounds.
        retried: of them, those sent again after a failure.
        failed: images that got no answer.
        cached: images whose answer was known.
        requests: made; each holds one image or several.
    """

    asked: int = 0
    retried: int = 0
    failed: int = 0
    cached: int = 0
    requests: int = 0


@dataclass(frozen=True)
class Fingerprint:
    """What a box says of the probe images: whether it is still the same.

    Attributes:
        box: its identity, of where it is and how it is asked.
        name: as people know it. labels: of the answers.
        answers: probabilities of each probe.
        spread: what two answers to one image differed by; above 0 it is not deterministic.
    """

    box: str
    name: str
    labels: tuple[str, ...]
    answers: tuple[tuple[float, ...], ...]
    spread: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Fingerprint:
        """From a `record`."""
        answers = tuple(tuple(map(float, row)) for row in record["answers"])
        return cls(**{**record, "labels": tuple(record["labels"]), "answers": answers})

    def change(self, now: Fingerprint) -> str:
        """How a box differs from what it was when this was taken; empty where it does not."""
        if self.labels != now.labels:
            return f"its labels were {', '.join(self.labels[:8])}, they are {', '.join(now.labels[:8])}"
        before, after = np.array(self.answers), np.array(now.answers)
        if before.shape != after.shape:
            return f"it answered {before.shape[0]} probe images, now {after.shape[0]}"
        off = np.abs(before - after).max(1)
        changed = off > SAME + SPREADS * max(self.spread, now.spread)
        if not changed.any():
            return ""
        i = int(off.argmax())
        was, is_now = (f"{self.labels[int(p[i].argmax())]!r} at {p[i].max():.3f}" for p in (before, after))
        return (
            f"{int(changed.sum())} of {len(off)} probe images have another answer; of one it said {was}, now {is_now}"
        )


class BlackBox(nn.Module):
    """A classifier that answers what an image is, and nothing else: images go in as 8 bits, probabilities come out.

    It stands where any classifier does that is not differentiated: `logits` are log-probabilities, or log-odds where
    labels are independent. Answers are cached by the image's pixels; an image without an answer is a row of NaN, and
    `why` says the reason. Threads may share it.

    Attributes:
        name: as people know it, without secrets. labels: of the answers. module: itself.
        image_size: side of the images that it was opened for; it is asked about any that it takes.
        link: `sigmoid` where labels are independent.
    """

    module: nn.Module

    def __init__(self, source: Source, image_size: int, options: BoxOptions) -> None:
        super().__init__()
        self.source, self.labels, self.image_size, self.options = source, source.labels, image_size, options
        object.__setattr__(self, "module", self)  # as classifiers have it; no child of itself
        object.__setattr__(self, "preprocessing", source.preprocessing)  # likewise
        self.name = source.name
        self.link: Literal["softmax", "sigmoid"] = "sigmoid" if source.output == "independent" else "softmax"
        deciding = {**source.identity, "labels": self.labels, "output": source.output, "size": image_size}
        self.identity = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
        self._answers = Answers(None, self.identity, self.name)
        self._lock = threading.RLock()
        self._reasons: dict[bytes, str] = {}
        self._flying: dict[bytes, threading.Event] = {}  # images that are asked about now
        self._last = ""
        self._asking: set[threading.Event] = set()  # what ends each call that asks just now
        self._stopped = False
        self._caller = threading.local()  # see `unless`
        self._asker = Asker(source, self.labels, options, self._spend)
        self._print = self._probe()

    # As a classifier

    @property
    def hard(self) -> bool:
        """Whether it says labels alone, which are probabilities of 0 and 1 here."""
        return bool(self._asker.hard)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.identity}"  # what digests of models tell boxes apart by

    def forward(self, image: Tensor) -> Tensor:
        """See `logits`."""
        return self.logits(image)

    def logits(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """Log-probabilities [B, labels] of the images rounded to 8 bits; NaN where there is no answer.

        Raises:
            UsageError: a gradient is asked for. See `answer` as well.
        """
        if torch.is_grad_enabled() and image.requires_grad:
            raise UsageError(f"classifier: {no_gradient(self.name)}")
        shown = image.detach().cpu()
        there = shown.isfinite().flatten(1).all(1)
        p = torch.full((len(shown), len(self.labels)), torch.nan)
        p[there] = torch.from_numpy(self.answer(to_uint8(shown[there]).permute(0, 2, 3, 1).contiguous().numpy()))
        p = p.to(image.device).clamp(FLOOR, 1)
        if self.link == "softmax":
            return p.log()
        return torch.logit(p.double(), eps=FLOOR).float()

    def log_prob(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
        target: Tensor,  # [B]
    ) -> Tensor:
        """log p(target | image) [B]; see `logits`."""
        logits = self.logits(image)
        log_p = logits.log_softmax(1) if self.link == "softmax" else nn.functional.logsigmoid(logits)
        return log_p.gather(1, target[:, None])[:, 0]

    # As a box

    def answer(self, images: Pixels) -> NDArray[np.float32]:
        """Probabilities [N, labels] of images [N, H, W, 3]: what is known, and the rest asked for and kept.

        An image without an answer is a row of NaN; `why` says the reason.

        Raises:
            BudgetSpent: `max_queries` does not reach. CounterlensError: nobody answers any more, or the box refuses to.
            UsageError: images do not fit.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UsageError(f"images: expected uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        if hasattr(self._caller, "left") and self._caller.left.is_set():
            raise Unusable(f"classifier: nobody waits for what {self.name} says any more")
        keys = [key_of(image) for image in images]
        known = self._ask_once(dict(zip(keys, images, strict=True)))
        nothing = np.full(len(self.labels), np.nan, np.float32)
        return np.stack([known.get(key, nothing) for key in keys]) if keys else np.zeros((0, len(self.labels)), "f4")

    def why(self, image: Tensor | None = None) -> str:
        """Why there was no answer: of an image [3, H, W] in [0, 1], else of the last one that failed; empty if none."""
        if image is not None:
            return self._reasons.get(key_of(_pixels(image)), self._last)
        return self._last

    def knows(self, image: Tensor) -> bool:
        """Whether its answer to an image [3, H, W] in [0, 1] is known, or there is none to ask for."""
        return not image.isfinite().all() or bool(self._answers.get([key_of(_pixels(image))]))

    @property
    def queries(self) -> Queries:
        """How often it was asked in this session."""
        return Queries(**self._answers.session)

    @property
    def queries_in_all(self) -> Queries:
        """How often it was asked in all sessions whose answers are kept in one file."""
        return Queries(**self._answers.counts())

    @property
    def left(self) -> int | None:
        """How many images may still be sent; None without a budget."""
        most = self.options.max_queries
        return None if most is None else max(0, most - self.queries_in_all.asked)

    def keep(self, path: Path) -> None:
        """Keep answers in a file from now on, those known already too, and take over what it holds.

        Raises:
            CounterlensError: the file cannot be used, or the box is not what it was when these answers were kept.
        """
        with self._lock:
            if self._answers.path is not None and path.exists() and self._answers.path.samefile(path):
                return
            kept = Answers(path, self.identity, self.name)
            if (record := kept.fingerprint) is None:
                kept.fingerprint = self._print.record()
            elif change := Fingerprint.of(record).change(self._print):
                kept.close()
                raise CounterlensError(
                    f"classifier: {self.name} is not what it was when the answers in {path} were kept: {change}. "
                    "Choose another folder for them, or remove that file"
                )
            kept.merge(self._answers)
            self._answers.close()
            self._answers = kept

    def stop(self) -> None:
        """Ask nothing any more: whoever is asking gets what there is after the requests that are under way."""
        with self._lock:
            self._stopped = True
            for asking in self._asking:
                asking.set()

    @contextmanager
    def unless(self, left: threading.Event) -> Iterator[None]:
        """Within this, the thread is given no answer once that is set: `Unusable`."""
        self._caller.left = left
        try:
            yield
        finally:
            del self._caller.left

    def fingerprint(self) -> Fingerprint:
        """What it said of the probe images when it was opened."""
        return self._print

    def record(self) -> dict[str, Any]:
        """Queries of this session and of all, and what the probes told, as JSON values."""
        return {
            "name": self.name, "box": self.identity, **asdict(self.queries), "asked_in_all": self.queries_in_all.asked,
            "max_queries": self.options.max_queries, "hard": self.hard, "spread": round(self._print.spread, 6),
        }  # fmt: skip

    # Asking

    def _probe(self) -> Fingerprint:
        """Ask about the probe images, two of them twice: does it answer, labels alone, and always the same?"""
        images = probes(self.image_size)
        rows = [self._answers_now(list(enumerate(images[:n]))) for n in (PROBES, TWICE)]
        for row in (row for some in rows for row in some.values()):
            if isinstance(row, str):
                raise CounterlensError(f"classifier: {self.name} {row}")
        first, again = (np.stack([some[i] for i in range(len(some))]) for some in rows)
        spread = float(np.abs(first[:TWICE] - again).max())
        if spread > 1e-6:
            warnings.warn(
                f"{self.name} is not deterministic: two answers to one image differ by {spread:.3g}; the first is kept",
                stacklevel=4,
            )
        shown = tuple(tuple(round(float(p), 7) for p in row) for row in first)
        return Fingerprint(self.identity, self.name, tuple(self.labels), shown, spread)

    def _answers_now(self, items: Sequence[tuple[Any, Pixels]]) -> dict[Any, Row | str]:
        """Answers to these images, or why there is none, of requests one after the other; nothing is kept."""
        found: dict[Any, Row | str] = {}
        for start in range(0, len(items), self.source.batch):
            found |= self._asker.ask(items[start : start + self.source.batch], threading.Event(), lambda rows: None)
        return found

    def _ask_once(self, images: Mapping[bytes, Pixels]) -> dict[bytes, Row]:
        """Answers to these images; those that are known, or that another thread asks for now, are not asked again."""
        done = threading.Event()
        with self._lock:
            found = self._answers.get(list(images))
            others = {key: self._flying[key] for key in images if key in self._flying and key not in found}
            mine = [(key, image) for key, image in images.items() if key not in found and key not in others]
            self._flying |= {key: done for key, _ in mine}
        self._answers.count(cached=len(found))
        try:
            found |= self._ask_all(mine)
        finally:
            with self._lock:
                for key, _ in mine:
                    del self._flying[key]
            done.set()
        if others:
            for event in others.values():
                event.wait()
            theirs = self._answers.get(list(others))
            self._answers.count(cached=len(theirs))
            found |= theirs | self._ask_all([(key, images[key]) for key in others if key not in theirs])
        return found

    def _ask_all(self, todo: Sequence[tuple[bytes, Pixels]]) -> dict[bytes, Row]:
        """Answers to these images, kept as they arrive; several requests at once."""
        size, found, stop = self.source.batch, dict[bytes, Row](), threading.Event()
        batches = [todo[i : i + size] for i in range(0, len(todo), size)]

        def keep(rows: dict[Any, Row]) -> None:
            self._answers.put(rows.items())
            found.update(rows)

        def ask(batch: Sequence[tuple[bytes, Pixels]]) -> None:
            said = self._asker.ask(batch, stop, keep)
            lost = {key: why for key, why in said.items() if isinstance(why, str) and not stop.is_set()}
            with self._lock:
                self._reasons |= lost
                for key in [*self._reasons][: max(0, len(self._reasons) - REASONS)]:
                    del self._reasons[key]
                self._last = next(iter(lost.values()), self._last)
            if lost:
                self._answers.count(failed=len(lost))

        with self._stoppable(stop):
            if len(batches) <= 1 or self.source.concurrency == 1:
                for batch in batches:
                    ask(batch)
                return found
            with ThreadPoolExecutor(self.source.concurrency) as pool:
                futures = [pool.submit(ask, batch) for batch in batches]
                try:
                    for future in as_completed(futures):  # a failure ends it, whatever waits before it
                        future.result()
                finally:
                    stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        return found

    @contextmanager
    def _stoppable(self, stop: threading.Event) -> Iterator[None]:
        """Within this, `stop` sets that event."""
        with self._lock:
            self._asking.add(stop)
            if self._stopped:
                stop.set()
        try:
            yield
        finally:
            with self._lock:
                self._asking.discard(stop)

    def _spend(self, group: Sequence[Any], sent: set[Any]) -> list[Any]:
        """Those of a request's images that the budget allows, counted before they are sent."""
        with self._lock:
            allowed = [*group][: self._answers.spend(len(group), self.options.max_queries)]
            if again := sum(key in sent for key in allowed):
                self._answers.count(retried=again)
            sent.update(allowed)
        return allowed


def _pixels(image: Tensor) -> Pixels:
    """An image [3, H, W] in [0, 1] as it is sent."""
    return to_uint8(image.detach()).permute(1, 2, 0).cpu().contiguous().numpy()


def no_gradient(name: str) -> str:
    """What a person reads who asks a box for a gradient."""
    return (
        f"{name} can only be called, it has no gradient to guide or to differentiate with; `counterlens surrogate "
        "train` makes a student of it that has one"
    )


def said(record: Mapping[str, Any]) -> str:
    """A `BlackBox.record` as a line for people."""
    parts = [f"{record['asked']} images asked in {record['requests']} requests"]
    parts += [f"{record['retried']} of them again"] if record["retried"] else []
    parts += [f"{record['cached']} answers were known"] if record["cached"] else []
    parts += [f"{record['failed']} got no answer"] if record["failed"] else []
    parts += [f"{record['asked_in_all']} asked in all sessions"] if record["asked_in_all"] != record["asked"] else []
    parts += [f"at most {record['max_queries']}"] if record["max_queries"] else []
    return f"{record['name']}: {', '.join(parts)}"


def probes(size: int) -> Pixels:
    """The images [PROBES, size, size, 3] by which a box is known again: slopes of light with noise, always the same."""
    g = np.random.Generator(np.random.PCG64(0))
    across = np.linspace(0, 1, size)
    slopes = g.random((PROBES, 2, 3))
    light = slopes[:, 0, None, None] * across[:, None, None] + slopes[:, 1, None, None] * across[None, :, None]
    noisy = 0.4 * light + 0.2 * g.random((PROBES, size, size, 3))
    return np.clip(np.round(255 * noisy), 0, 255).astype(np.uint8)


def open_box(
    name: str | Path | Callable[[Pixels], Any],
    labels: Sequence[str],
    *,
    image_size: int,
    options: BoxOptions | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    **given: Any,
) -> BlackBox:
    """Open a classifier that can only be called, and ask it about a few images: does it answer, and always the same?

    Args:
        name: an ONNX file, `python:package.module:function`, an address (`https://...`, `http://localhost...`), or a
            function from uint8 [N, H, W, 3] to probabilities [N, labels], or to N labels. Never from a request.
        labels: of its answers, in their order; none of an ONNX file that names its own.
        image_size: side of the images that it is asked about.
        options: how it is asked; `given` are single fields of it.
        preprocessing: of an ONNX file, see `models.onnx_classifier.open_onnx_classifier`.

    Raises:
        UsageError: an option does not fit, or there is no such thing. CounterlensError: it does not answer.
    """
    chosen = options or BoxOptions(**given)
    return BlackBox(open_source(name, list(labels), image_size, chosen, preprocessing), image_size, chosen)


def as_box(classifier: object) -> BlackBox | None:
    """The classifier, if it is one that can only be called."""
    return classifier if isinstance(classifier, BlackBox) else None
