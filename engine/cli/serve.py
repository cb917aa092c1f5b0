"""`counterlens serve`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import Config
from ..errors import CounterlensError, UsageError, install_hint
from .generated import with_options
from .opening import EngineOptions, RunOptions, open_engine
from .options import errors

if TYPE_CHECKING:
    from ..engine import Engine
    from ..serve.guard import Keys
    from ..serve.worker import Worker

LOCAL = ("127.0.0.1", "localhost", "::1")
PANEL = "Server"


def _option(text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=PANEL, **more)


@with_options
def serve(
    config: RunOptions,
    opening: EngineOptions,
    host: Annotated[str, _option("Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, _option("Port; 0: any that is free.", min=0, max=65535)] = 8000,
    slots: Annotated[str, _option("Samples guided at once: auto, or 1, 2, 4, 8, 16 (always the same bits).")] = "auto",
    max_queue: Annotated[int, _option("Requests that may wait; one more gets 429.", min=1)] = 64,
    max_pixels: Annotated[int, _option("Of an uploaded image, before it is decoded.", min=1)] = 64_000_000,
    max_bytes: Annotated[int, _option("Of a request's body.", min=1024)] = 32_000_000,
    api_key_file: Annotated[Path | None, _option("Bearer keys, one a line; read again on SIGHUP.")] = None,
    per_key: Annotated[int, _option("Requests of one key at once; 0: any number.", min=0)] = 0,
    cors_origin: Annotated[list[str] | None, _option("Pages of this origin may ask; may be repeated.")] = None,
    preload_speeds: Annotated[str, _option("Speeds that are warm before the server is ready: a,b.")] = "fast",
    grace: Annotated[float, _option("Seconds that running requests have after SIGTERM.", min=0)] = 30.0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without keys.", rich_help_panel=PANEL)
    ] = False,
) -> None:
    """Answer over HTTP: counterfactuals, saliency and predictions, batched at every step.

    The interface is described at /docs; KServe's protocols (v1 and v2), Prometheus metrics and health checks are there
    too. What requests do not say is as the options of the run have it; without --speed that is `fast`.

    Example: counterlens serve --port 8000
    """
    if host not in LOCAL and api_key_file is None and not insecure:
        raise UsageError(f"host: {host} is beyond this machine; give --api-key-file, or --insecure to let everybody in")
    if slots != "auto" and not slots.isdigit():
        raise UsageError(f"slots: expected auto or a number, got {slots!r}")
    try:
        import uvicorn

        from ..serve.app import make_app
    except ImportError as error:
        raise CounterlensError(f"serve: {error.name} cannot be imported; {install_hint('serve')}") from error
    from ..serve.guard import Keys, Limits
    from ..serve.worker import Worker

    keys = Keys(api_key_file)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise CounterlensError(f"port: {port} at {host} cannot be listened at ({error.strerror or error})") from error
    said = config.model_dump(exclude_unset=True)
    configs = [Config.make(**said | {"speed": name.strip()}) for name in preload_speeds.split(",") if name.strip()]
    engine = open_engine(config if config.speed else (configs or [config])[0], opening)
    worker = Worker(engine, slots="auto" if slots == "auto" else int(slots), max_queue=max_queue)
    limits = Limits(body_bytes=max_bytes, pixels=max_pixels, per_key=per_key)
    app = make_app(engine, worker, keys=keys, limits=limits, cors_origins=cors_origin)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="error", access_log=False, timeout_keep_alive=5, lifespan="off",
            h11_max_incomplete_event_size=32_768, timeout_graceful_shutdown=max(1, int(grace)),
        )
    )  # fmt: skip
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]  # they are handled below
    place = f"{host}:{listening.getsockname()[1]}"
    asyncio.run(_serve(server, listening, place, worker, keys, grace, lambda: _warm(engine, worker, configs)))


def _warm(engine: Engine, worker: Worker, configs: list[Config]) -> None:
    """Open what the first requests need."""
    sizes = [1, worker.largest] if worker.slots == "auto" else [worker.largest]
    for config in configs:
        engine.warmup(sizes, config)


async def _serve(
    server: Any, listening: socket.socket, place: str, worker: Worker, keys: Keys, grace: float,
    warm: Callable[[], None],
) -> None:  # fmt: skip
    """Listen until SIGTERM or Ctrl-C; then finish what runs and refuse the rest."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: _read_again(keys))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    warming = worker.start(warm)
    warming.add_done_callback(lambda done: done.exception() and loop.call_soon_threadsafe(stopping.set))
    errors.print(f"serving at http://{place} (interface: /docs; Ctrl-C stops)")
    await stopping.wait()
    errors.print("stopping: what runs is finished")
    await asyncio.to_thread(worker.stop, grace)
    server.should_exit = True
    await serving
    if warming.done():
        warming.result()  # raises what stopped it


def _read_again(keys: Keys) -> None:
    """The keys' file; one that cannot be read leaves those of before."""
    try:
        keys.read()
    except UsageError as error:
        errors.print(f"error: {error}; the keys of before are kept", style="red")
