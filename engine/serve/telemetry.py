"""What the server says of itself: Prometheus metrics, and one JSON line a request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily

from .tracing import past_spans

if TYPE_CHECKING:
    from ..blackbox.box import BlackBox
    from .worker import Ticket

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Counted(Protocol):
    """A worker's numbers."""

    largest: int  # slots of a lane
    ticks: int
    steps: int
    places: int
    rate: float

    @property
    def waiting(self) -> int: ...

    @property
    def busy_slots(self) -> int: ...

    @property
    def accepting(self) -> bool: ...

    @property
    def tick_s(self) -> float: ...


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, worker: Counted) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("counterlens_requests", "Requests by route and status.", ["route", "status"], **named)
        self.errors = Counter("counterlens_errors", "Answers that are errors, by kind.", ["kind"], **named)
        # KServe's name for the same.
        self.explain = Histogram("request_explain_seconds", "Seconds from arrival to answer.", buckets=SECONDS, **named)
        self.queue_s = Histogram("counterlens_queue_seconds", "Seconds in the queue.", buckets=SECONDS, **named)
        self.run_s = Histogram("counterlens_run_seconds", "Seconds in the slots, encoding included.", buckets=SECONDS,
                               **named)  # fmt: skip
        self.stages = {
            name: Histogram(f"counterlens_{name}_seconds", text, buckets=SECONDS, **named)
            for name, text in (
                ("prepare", "Seconds from a lane to the first step: encoding, noise or inversion."),
                ("steps", "Seconds from the first guided step to the last."),
                ("decode", "Seconds from the last step to the measured result."),
            )
        } | {"queue": self.queue_s}
        for name, text, read in (
            ("queue_depth", "Requests that wait.", lambda: worker.waiting),
            ("slots_busy", "Requests in the slots or prepared for them.", lambda: worker.busy_slots),
            ("slots", "Samples guided at once at most; half as many after memory was full.", lambda: worker.largest),
            ("ticks", "Batched steps taken.", lambda: worker.ticks),
            ("steps", "Steps of samples taken.", lambda: worker.steps),
            ("batch_occupancy", "Share of the slots of all ticks that held a sample.",
             lambda: worker.steps / worker.places if worker.places else 0.0),
            ("samples_per_second", "Measured lately, while there was work.", lambda: worker.rate),
            ("tick_seconds", "Of a step in the slowest slots.", lambda: worker.tick_s),
            ("ready", "1 once warm-up is over and until draining.",
             lambda: float(worker.accepting)),
        ):  # fmt: skip
            Gauge(f"counterlens_{name}", text, **named).set_function(read)

    def count_queries(self, box: BlackBox) -> None:
        """Also say how often a black box was asked."""
        self.registry.register(_Asked(box))
        if box.left is not None:
            left = Gauge("counterlens_queries_left", "Images that may still be asked about.", registry=self.registry)
            left.set_function(lambda: float(box.left or 0))

    def answered(self, ticket: Ticket[Any]) -> None:
        """A counterfactual is done."""
        for name, start, end in ticket.stages:
            self.stages[name].observe(max(0.0, end - start))
        past_spans(ticket.stages, {"counterlens.slots": ticket.slots, "counterlens.steps": ticket.step})
        self.run_s.observe(max(0.0, ticket.finished - ticket.started))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Asked:
    """What a box counts, as Prometheus has it."""

    def __init__(self, box: BlackBox) -> None:
        self.box = box

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Both counters."""
        counts = asdict(self.box.queries)
        made = CounterMetricFamily("counterlens_query_requests", "Requests to the black box, of one image or several.")
        made.add_metric([], counts.pop("requests"))
        images = CounterMetricFamily(
            "counterlens_queries", "Images that the black box was asked about: asked (retried and failed are some of "
            "them) or cached, whose answer was known.", labels=["kind"],
        )  # fmt: skip
        for kind, count in counts.items():
            images.add_metric([kind], count)
        yield from (made, images)


def log(event: str, **fields: Any) -> None:
    """One line of JSON on stderr; never anything of an image."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
    sys.stderr.write(json.dumps(line, default=str) + "\n")
