"""The same application on Ray Serve: several replicas behind one address, each with an engine of its own.

What replicas share lies with one small actor, the board: the tasks that callers come back for (any replica answers for
all of them, also for those whose replica is gone), each replica's metrics, the keys, and the word that it is time to
stop. Replicas call it every `BEAT_S`; one that has not for `GONE_S` is dead, and what it ran has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response

from ..core.core import EngineCore
from ..errors import CounterlensError, UsageError, install_hint
from ..saliency.explain import find_adapter
from .app import make_app
from .guard import Keys, Limits
from .sizing import Fit, check_slots, fit, free_bytes
from .tasks import LAST, Event, Tasks
from .telemetry import Metrics
from .wire import Problem
from .worker import Worker

NAME = "counterlens"  # of the Ray Serve application, and of the board's namespace
BEAT_S, GONE_S = 0.5, 10.0
OTHERS = 64  # requests that a replica takes beside those it guides or keeps waiting: polls, streams, metrics
MOST_SLOTS = 16  # of an engine
# What the environment says wins. Nothing is reported to Ray's makers.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


@dataclass(frozen=True)
class Fleet:
    """How many replicas there are, and of what size.

    Attributes:
        address: `local` starts Ray on this machine; `auto` or `ray://...` joins a cluster.
        least, most: replicas; between them as many as there is work for.
        cpus: cores and threads of each; 0: this machine's, shared by `most`.
        gpus: of each; a fraction shares one.
    """

    address: str = "local"
    least: int = 1
    most: int = 4
    cpus: int = 0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise UsageError(f"replicas: expected MIN..MAX with 1 <= MIN <= MAX, got {self.least}..{self.most}")

    @property
    def threads(self) -> int:
        """Of each replica."""
        return self.cpus or max(1, (os.cpu_count() or 1) // self.most)

    def neighbours(self, node_cpus: float) -> int:
        """How many replicas may share the memory of one machine of so many CPUs, or of one GPU."""
        return max(1, min(self.most, int(1 / self.gpus if self.gpus else node_cpus / self.threads)))


@dataclass(frozen=True)
class Serving:
    """What every replica serves: all of it travels to other machines.

    Attributes:
        make: opens the engine; the second part is what is warmed up before a replica is ready.
        slots, max_queue: see `Worker`, of each replica.
        keys: bearer keys; none let everybody in.
        limits, cors_origins: see `make_app`.
        grace_s: that running requests have when it is stopped.
        adapter: folder of one, for `lax`.
    """

    make: Callable[[], tuple[EngineCore, Callable[[Worker], None]]]
    slots: int | str = "auto"
    max_queue: int = 64
    keys: list[bytes] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)
    cors_origins: list[str] | None = None
    grace_s: float = 30.0
    adapter: Path | None = None


class Board:
    """What the replicas share; an actor."""

    def __init__(self, keys: list[bytes]) -> None:
        self.tasks = Tasks()
        self.keys = keys
        self.grace_s: float | None = None
        self.owner: dict[str, str] = {}
        self.forgotten: dict[str, asyncio.Future[bool]] = {}
        self.beats: dict[str, tuple[float, bytes]] = {}

    async def open(self, name: str, replica: str) -> bool:
        """Keep a task that a replica runs."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def cancel() -> None:
            if not future.done():
                future.set_result(True)

        if not await self.tasks.open(name, cancel):
            return False
        self.owner[name], self.forgotten[name] = replica, future
        return True

    async def say(self, name: str, event: str, data: dict[str, Any]) -> None:
        """See `Tasks.say`."""
        self.tasks.say(name, event, data)
        if event in LAST and name in self.owner:
            del self.owner[name]
            future = self.forgotten.pop(name)
            if not future.done():
                future.set_result(False)

    async def events(self, name: str, after: int, wait_s: float) -> list[Event] | None:
        """See `Tasks.events`."""
        await self._bury()
        return await self.tasks.events(name, after, min(wait_s, GONE_S / 2))

    async def forget(self, name: str) -> bool:
        """See `Tasks.forget`."""
        return await self.tasks.forget(name)

    async def is_forgotten(self, name: str) -> bool:
        """Waits until a task is forgotten (True) or done (False)."""
        return await self.forgotten[name] if name in self.forgotten else False

    async def beat(self, replica: str, metrics: bytes) -> tuple[list[bytes], float | None]:
        """A replica lives: the keys, and the grace period once it is to stop."""
        self.beats[replica] = time.monotonic(), metrics
        await self._bury()
        return self.keys, self.grace_s

    async def leave(self, replica: str) -> None:
        """A replica has stopped."""
        self.beats.pop(replica, None)

    async def metrics(self) -> dict[str, bytes]:
        """Of each living replica."""
        await self._bury()
        return {replica: text for replica, (_, text) in self.beats.items()}

    async def renew(self, keys: list[bytes]) -> None:
        """Keys that replicas hear of with their next beat."""
        self.keys = keys

    async def stop(self, grace_s: float) -> None:
        """Replicas hear with their next beat that they are to finish."""
        self.grace_s = grace_s

    async def _bury(self) -> None:
        now = time.monotonic()
        for replica in [r for r, (beaten, _) in self.beats.items() if now - beaten > GONE_S]:
            del self.beats[replica]
            gone = Problem(503, "server: the replica that ran this is gone; ask again").body()
            for name in [n for n, r in self.owner.items() if r == replica]:
                await self.say(name, "error", gone)


class SharedTasks(Tasks):
    """Tasks that lie with the board."""

    def __init__(self, board: Any, replica: str) -> None:
        super().__init__()
        self.board, self.replica = board, replica
        self.watching: dict[str, asyncio.Task[None]] = {}

    async def open(self, name: str, cancel: Callable[[], None]) -> bool:
        """See `Tasks.open`."""
        opened = await _answered(self.board.open.remote(name, self.replica))
        if opened:
            self.watching[name] = asyncio.create_task(self._watch(name, cancel))
        return opened

    async def _watch(self, name: str, cancel: Callable[[], None]) -> None:
        try:
            if await _answered(self.board.is_forgotten.remote(name)):
                cancel()
        except Problem:
            cancel()  # nobody can fetch it any more
        finally:
            del self.watching[name]

    def say(self, name: str, event: str, data: dict[str, Any]) -> None:
        """See `Tasks.say`."""
        self.board.say.remote(name, event, data)

    async def events(self, name: str, after: int, wait_s: float) -> list[Event] | None:
        """See `Tasks.events`."""
        return await _answered(self.board.events.remote(name, after, wait_s))

    async def forget(self, name: str) -> bool:
        """See `Tasks.forget`."""
        return await _answered(self.board.forget.remote(name))


async def _answered(call: Any) -> Any:
    """What the board answers.

    Raises:
        Problem: 503, it cannot be reached.
    """
    from ray.exceptions import RayError

    try:
        return await call
    except RayError as error:
        raise Problem(
            503, "server: the replicas' board cannot be reached; ask again", None, {"Retry-After": "5"}
        ) from (error)


class Replica:
    """One engine and its worker, as Ray Serve starts it; ready once it is warm."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, serving: Serving, board: Any, folder: str, fleet: Fleet
    ) -> None:
        import torch

        if Path(folder).is_dir():  # where relative paths of the command line lie, on this machine
            os.chdir(folder)
        torch.set_num_threads(fleet.threads)
        self.name, self.board, self.serving = uuid.uuid4().hex[:8], board, serving
        engine, warm, measured = await asyncio.to_thread(_opened, serving, fleet)
        self.worker = Worker(engine, slots=serving.slots, max_queue=serving.max_queue)
        self.keys, self.metrics = Keys(None), Metrics(self.worker)
        self.keys.keys = serving.keys
        self.tasks = SharedTasks(board, self.name)
        self.inner = make_app(
            engine, self.worker, keys=self.keys, limits=serving.limits, cors_origins=serving.cors_origins,
            tasks=self.tasks, metrics=self.metrics, measured=measured,
            adapter=None if serving.adapter is None else find_adapter(serving.adapter, engine.classifier),
        )  # fmt: skip
        await asyncio.wrap_future(self.worker.start(lambda: warm(self.worker)))
        self.stopping = False
        self.beating = asyncio.create_task(self._beat())

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve asks for it: the application, but /metrics are those of all replicas."""

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def without_id(message: Any) -> None:  # Ray's proxy says it itself
                if message["type"] == "http.response.start":
                    message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                await send(message)

            if scope["type"] == "http" and scope["path"] == "/metrics":
                told = await _answered(self.board.metrics.remote())
                text = merged(told | {self.name: self.metrics.text()})
                await Response(text, media_type="text/plain; version=0.0.4")(scope, receive, send)
            else:
                await self.inner(scope, receive, without_id)

        return answer

    async def _beat(self) -> None:
        """Say that this one lives, and hear what is new."""
        while True:
            with contextlib.suppress(Problem):  # the board may be about to be started again
                self.keys.keys, grace_s = await _answered(self.board.beat.remote(self.name, self.metrics.text()))
                if grace_s is not None:
                    await self._finish(grace_s)
                    return
            await asyncio.sleep(BEAT_S)

    async def _finish(self, grace_s: float) -> None:
        """Finish what runs, refuse the rest, tell what became of it, and leave the board."""
        self.stopping = True
        await asyncio.to_thread(self.worker.stop, grace_s)
        await asyncio.wait([*self.tasks.watching.values(), asyncio.create_task(asyncio.sleep(0))], timeout=5)
        await _answered(self.board.leave.remote(self.name))

    async def check_health(self) -> None:
        """Ray Serve starts another one if this raises."""
        if not self.worker.accepting and not self.stopping:
            raise RuntimeError("the worker has ended")

    async def __del__(self) -> None:
        """Ray Serve has sent its requests elsewhere: fewer replicas are needed."""
        if hasattr(self, "beating") and not self.beating.done():
            self.beating.cancel()
            await self._finish(self.serving.grace_s)


def _opened(serving: Serving, fleet: Fleet) -> tuple[EngineCore, Callable[[Worker], None], Fit | None]:
    """A replica's engine, held to its share of the memory: those beside it may start at the same time."""
    import ray

    engine, warm = serving.make()
    here = ray.get_runtime_context().get_node_id()
    cpus = next(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["NodeID"] == here)
    there, of = free_bytes(engine.device)
    if (count := fleet.neighbours(cpus)) > 1:
        there, of = there // count, f"{of}, shared by {count} replicas"
    measured = fit(engine, free=(there, of))
    check_slots(serving.slots, measured)
    return engine, warm, measured


def merged(texts: dict[str, bytes]) -> bytes:
    """Prometheus texts of several replicas as one, each sample with its replica as a label."""
    found: dict[str, Any] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            kept = found.setdefault(family.name, family)
            samples = [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
            kept.samples = samples if kept is family else kept.samples + samples

    class All:
        def collect(self) -> Iterator[Any]:
            yield from found.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(All())
    return generate_latest(registry)


def serve_on_ray(
    serving: Serving, fleet: Fleet, host: str, port: int, *, wait: Callable[[Callable[[], None]], None],
    read_keys: Callable[[], list[bytes]], say: Callable[[str], None],
) -> None:  # fmt: skip
    """Serve until `wait` returns, then finish what runs and leave no process behind.

    Args:
        wait: returns when it is time to stop; until then it calls its argument when the keys are to be read again.
        read_keys: reads them.
        say: for people.

    Raises:
        UsageError: the cluster cannot be reached, or a replica says so. CounterlensError: a replica cannot be started.
    """
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise CounterlensError(f"ray: {error.name} cannot be imported; {install_hint('serve-ray')}") from error
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _join(ray, fleet)
    try:
        board = ray.remote(Board).options(
            name="board", namespace=NAME, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=-1,
            max_concurrency=10_000,
        ).remote(serving.keys)  # fmt: skip
        ray.get([board.renew.remote(serving.keys), board.stop.remote(None)])
        try:
            serve.start(http_options={"host": host, "port": port})
            serve.run(_application(serving, fleet, board), name=NAME, route_prefix="/", logging_config=_QUIET_LOGS)
            count = f"{fleet.least} to {fleet.most}" if fleet.most > fleet.least else f"{fleet.most}"
            say(f"serving at http://{host}:{port} ({count} replicas, interface: /docs; Ctrl-C stops)")

            def renew() -> None:
                ray.get(board.renew.remote(read_keys()))

            wait(renew)
            say("stopping: what runs is finished")
            ray.get(board.stop.remote(serving.grace_s))
            end = time.monotonic() + serving.grace_s + GONE_S
            while ray.get(board.metrics.remote()) and time.monotonic() < end:
                time.sleep(0.1)
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise _told(f"{error}\n{_status(serve)}") from error
        finally:
            serve.delete(NAME)
            if fleet.address != "local" and not serve.status().applications:
                serve.shutdown()  # else with Ray itself, below
            ray.kill(board)
    finally:
        ray.shutdown()


_QUIET_LOGS = {"log_level": "WARNING", "enable_access_log": False}


def _join(ray: Any, fleet: Fleet) -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if fleet.address == "local":
            # Replicas are placed by logical CPUs; there are enough of them on a small machine, too.
            count = max(os.cpu_count() or 1, fleet.most * fleet.threads + 1)
            ray.init(num_cpus=count, include_dashboard=False, **quiet)
        else:
            ray.init(address=fleet.address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"ray: {fleet.address} cannot be joined ({str(error).splitlines()[0]})") from error


def _application(serving: Serving, fleet: Fleet, board: Any) -> Any:
    from ray import serve

    slots = MOST_SLOTS if serving.slots == "auto" else int(serving.slots)
    deployed = serve.deployment(
        name="engine",
        ray_actor_options={"num_cpus": fleet.threads, "num_gpus": fleet.gpus},
        autoscaling_config={
            "min_replicas": fleet.least, "max_replicas": fleet.most, "initial_replicas": fleet.least,
            "target_ongoing_requests": slots,
        },
        # A replica refuses by itself, with a problem and the time when there is room; Ray's bounds lie behind its own.
        max_ongoing_requests=2 * slots + serving.max_queue + OTHERS,
        max_queued_requests=serving.max_queue,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=serving.grace_s + GONE_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        max_constructor_retry_count=1,
    )(serve.ingress()(Replica))  # fmt: skip
    return deployed.bind(serving, board, os.getcwd(), replace(fleet, cpus=fleet.threads))


def _status(serve: Any) -> str:
    """What Ray Serve says of the replicas."""
    found = serve.status().applications.get(NAME)
    return "" if found is None else "\n".join(d.message for d in found.deployments.values())


def _told(text: str) -> CounterlensError:
    """A replica's own error out of what Ray tells of it."""
    if found := re.findall(r"^counterlens\.engine\.[\w.]*?(\w+): (.*)$", text, re.MULTILINE):
        kind, said = found[-1]
        return UsageError(said) if kind == "UsageError" else CounterlensError(said)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return CounterlensError(f"ray: {lines[-1] if lines else 'a replica ended'}")
