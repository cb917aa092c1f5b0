"""`counterlens serve`."""

from __future__ import annotations

import asyncio
import functools
import os
import queue
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..blackbox.kinds import is_box
from ..blackbox.options import BoxOptions
from ..config import Config
from ..errors import CounterlensError, UsageError, install_hint
from .generated import with_options
from .opening import AskedBox, EngineOptions, RunOptions, open_engine
from .options import errors

if TYPE_CHECKING:
    from ..engine import Engine
    from ..serve.file import FileWorker
    from ..serve.fleet import Fleet
    from ..serve.guard import Keys
    from ..serve.worker import Worker

LOCAL = ("127.0.0.1", "localhost", "::1")
MOST = 1000  # connections
AT_ONCE_S = 1.0  # that answers of 503 have after a second signal
PANEL = "Server"


def _option(text: str, *names: str, panel: str = PANEL, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


@with_options
def serve(
    config: RunOptions,
    opening: EngineOptions,
    box: AskedBox,
    file: Annotated[
        Path | None, _option("counterfactual.onnx of `counterlens export`, instead of models; needs no PyTorch.")
    ] = None,
    host: Annotated[str, _option("Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, _option("Port; 0: any that is free.", min=0, max=65535)] = 8000,
    slots: Annotated[str, _option("Samples guided at once: auto, or 1, 2, 4, 8, 16 (always the same bits).")] = "auto",
    max_queue: Annotated[int, _option("Requests that may wait; one more gets 429.", min=1)] = 64,
    max_pixels: Annotated[int, _option("Of an uploaded image, before it is decoded.", min=1)] = 64_000_000,
    max_bytes: Annotated[int, _option("Of a request's body.", min=1024)] = 32_000_000,
    api_key_file: Annotated[Path | None, _option("Bearer keys, one a line; read again on SIGHUP.")] = None,
    per_key: Annotated[int, _option("Requests of one key at once; 0: any number.", min=0)] = 0,
    max_connections: Annotated[int, _option("Open at once; health probes of a few more are answered.", min=1)] = MOST,
    allow_host: Annotated[
        list[str] | None,
        _option("Name in requests' Host that is this server, beside localhost (a proxy's); may be repeated."),
    ] = None,
    cors_origin: Annotated[list[str] | None, _option("Pages of this origin may ask; may be repeated.")] = None,
    preload_speeds: Annotated[
        str, _option("Speeds that are warm before the server is ready: a,b. Requests get the first, or --speed's.")
    ] = "fast",
    grace: Annotated[float, _option("Seconds that running requests have after SIGTERM.", min=0)] = 30.0,
    insecure: Annotated[bool, _option("Listen beyond this machine without keys.", "--insecure")] = False,
    answers: Annotated[
        Path | None,
        _option("Of a black box: folder for its answers, of all sessions and replicas; in memory without it."),
    ] = None,
    adapter: Annotated[
        Path | None, _option("Folder of a trained adapter, for lax (a surrogate's, say); the pack's own without it.")
    ] = None,
    ray: Annotated[
        str | None, _option("On Ray Serve: `local` starts Ray here, `auto` or ray://... joins a cluster.", panel="Ray")
    ] = None,
    replicas: Annotated[str, _option("MIN..MAX or a number; an engine each.", panel="Ray")] = "1..4",
    replica_cpus: Annotated[int, _option("Of each; 0: its share of this machine.", panel="Ray", min=0)] = 0,
    replica_gpus: Annotated[float | None, _option("Of each; else 1 where there is CUDA.", panel="Ray", min=0)] = None,
) -> None:
    """Answer over HTTP: counterfactuals, saliency and predictions, batched at every step.

    The interface is described at /docs; KServe's protocols (v1 and v2), Prometheus metrics and health checks are there
    too. What requests do not say is as the options of the run have it; without --speed, the first of --preload-speeds.

    What can only be called (--classifier python:..., https://..., an ONNX file without a gradient) is asked for every
    answer; with --surrogate FOLDER its student guides counterfactuals, and it judges them.

    With --ray it does so with several engines, one a replica; slots and the queue are those of each. With --file it
    serves a whole run in one file, one image at a time.

    Example: counterlens serve --port 8000
    """
    if config.count > 1:
        raise UsageError("count: the service makes one counterfactual a request; ask again with another seed")
    if host not in LOCAL and api_key_file is None and not insecure:
        raise UsageError(f"host: {host} is beyond this machine; give --api-key-file, or --insecure to let everybody in")
    if slots != "auto" and not slots.isdigit():
        raise UsageError(f"slots: expected auto or a number, got {slots!r}")
    try:
        import uvicorn  # noqa: F401

        from ..serve.guard import Keys, Limits, host_name
    except ImportError as error:
        raise CounterlensError(f"serve: {error.name} cannot be imported; {install_hint('serve')}") from error
    keys = Keys(api_key_file)
    hosts = [host_name(name) for name in allow_host or ()]
    for name, told in zip(hosts, allow_host or (), strict=True):
        if not re.fullmatch(r"[\w.-]+|\[[\da-f:.]+\]", name) or "/" in told:
            raise UsageError(f"allow-host: expected a name such as lens.example, or [2001:db8::1], got {told!r}")
    if hosts or host in LOCAL:  # whoever asks by another name has been led here by a page of another site
        hosts += ["127.0.0.1", "localhost", "[::1]"]
    limits = Limits(body_bytes=max_bytes, pixels=max_pixels, per_key=per_key, hosts=tuple(hosts))
    said = config.model_dump(exclude_unset=True)
    if ray is None and (replicas != "1..4" or replica_cpus or replica_gpus is not None):
        raise UsageError("ray: --replicas, --replica-cpus and --replica-gpus are for replicas on Ray; give --ray too")
    if ray is not None and max_connections != MOST:
        raise UsageError("max-connections: has no use with --ray, whose proxies hold the connections")
    if config.region not in (None, "auto"):
        raise UsageError(
            f"region: {config.region} lies in one picture, and uploads are many; requests say their own, a server auto"
        )
    if file is not None:
        own = {
            "ray": ray is not None, "answers": answers is not None, "adapter": adapter is not None,
            "slots": slots != "auto", "preload-speeds": preload_speeds != "fast",
        }  # fmt: skip
        if given := [
            *said,
            *opening.model_dump(exclude_unset=True),
            *(f"classifier_{name}" for name in box.model_fields_set),
            *(name for name, is_given in own.items() if is_given),
        ]:
            raise UsageError(f"{given[0].replace('_', '-')}: has no use with --file, which was exported with its own")
        from ..serve.file import FileWorker, make_file_app

        whole = FileWorker(file, max_queue)
        app = make_file_app(whole, keys=keys, limits=limits, cors_origins=cors_origin)
        return _run(app, whole, _listen(host, port), host, keys, grace, max_connections)
    from ..saliency.explain import find_adapter
    from ..serve.app import make_app
    from ..serve.sizing import check_slots, fit
    from ..serve.worker import Worker

    names = dict.fromkeys([*([config.speed] if config.speed else []), *map(str.strip, preload_speeds.split(","))])
    configs = [Config.make(**said | {"speed": name}) for name in names if name]
    if answers is not None and not is_box(opening.classifier):
        raise UsageError("answers: of a black box; name it (--classifier model.onnx, python:module:function, ...)")
    if ray is not None and box.max_queries is not None and answers is None:
        raise UsageError("max_queries: replicas count together in one file; give --answers FOLDER")
    if ray not in (None, "local") and answers is not None:
        raise UsageError(f"answers: its file is of one machine, and replicas at {ray} may be on others; --ray local")
    opens = functools.partial(_open, (configs or [config])[0], opening, configs, box, answers)
    width = "auto" if slots == "auto" else int(slots)
    if ray is not None:
        return _on_ray(
            opens, _fleet(ray, replicas, replica_cpus, replica_gpus, opening), host, port, keys,
            slots=width, max_queue=max_queue, limits=limits, cors_origins=cors_origin, grace_s=grace, adapter=adapter,
        )  # fmt: skip
    listening = _listen(host, port)
    engine, warm = opens()
    measured = fit(engine)
    check_slots(width, measured)
    worker = Worker(engine, slots=width, max_queue=max_queue)
    maps = None if adapter is None else find_adapter(adapter, engine.classifier)
    app = make_app(engine, worker, keys=keys, limits=limits, cors_origins=cors_origin, measured=measured, adapter=maps)
    said_of = [str(measured)] if measured else ["no counterfactuals without --surrogate"]
    said_of += [f"asks {worker.box.name}"] if worker.box is not None else []
    _run(app, worker, listening, host, keys, grace, max_connections, lambda: warm(worker), f"{'; '.join(said_of)}; ")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        CounterlensError: it cannot.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise CounterlensError(f"port: {port} at {host} cannot be listened at ({error.strerror or error})") from error


def _run(
    app: Any, worker: Worker | FileWorker, listening: socket.socket, host: str, keys: Keys, grace: float,
    most: int, warm: Callable[[], None] = lambda: None, said: str = "",
) -> None:  # fmt: skip
    """Serve in this process until SIGTERM or Ctrl-C."""
    from ..serve.connection import http_server, room_for

    if (fits := room_for(most)) < most:
        errors.print(f"connections: {fits} at once and not {most}; this process may open no more files (ulimit -n)")
        most = fits
    server = http_server(app, grace, most=most)
    place = f"http://{host}:{listening.getsockname()[1]} ({said}interface: /docs; Ctrl-C stops)"
    asyncio.run(_serve(server, listening, place, worker, keys, grace, warm))


def _open(
    config: Config, opening: EngineOptions, configs: list[Config], asked: BoxOptions, answers: Path | None
) -> tuple[Engine, Callable[[Worker], None]]:
    """The engine, and what opens what its first requests need."""
    from ..blackbox.answers import FILE
    from ..blackbox.box import as_box
    from ..images.files import make_folder

    engine = open_engine(config, opening, asked)
    if answers is not None:
        if (box := engine.box or as_box(engine.classifier)) is None:
            raise UsageError(
                f"answers: {opening.classifier} has a gradient and is asked nothing; --classifier-convert never has it "
                "asked"
            )
        box.keep(make_folder(answers) / FILE)

    def warm(worker: Worker) -> None:
        sizes = [1, worker.largest] if worker.slots == "auto" else [worker.largest]
        for each in configs if as_box(engine.classifier) is None else ():
            engine.warmup(sizes, each)

    return engine, warm


async def _serve(
    server: Any, listening: socket.socket, place: str, worker: Worker | FileWorker, keys: Keys, grace: float,
    warm: Callable[[], None],
) -> None:  # fmt: skip
    """Listen until SIGTERM or Ctrl-C; then finish what runs and refuse the rest. A second one ends it at once."""
    loop, stopping, hurrying = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (hurrying if stopping.is_set() else stopping).set())
    loop.add_signal_handler(signal.SIGHUP, lambda: _read_again(keys))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    warming = worker.start(warm)
    warming.add_done_callback(lambda done: done.exception() and loop.call_soon_threadsafe(stopping.set))
    errors.print(f"serving at {place}")
    await stopping.wait()
    errors.print("stopping: what runs is finished; a second signal ends it at once")

    async def finish() -> None:
        await asyncio.to_thread(worker.stop, grace)
        server.should_exit = True
        await serving

    finishing = asyncio.create_task(finish())
    hurried = asyncio.create_task(hurrying.wait())
    await asyncio.wait({finishing, hurried}, return_when=asyncio.FIRST_COMPLETED)
    if not finishing.done():
        lost = max(worker.unfinished, len(server.server_state.tasks))
        worker.hurry()
        server.should_exit = True
        await asyncio.wait({finishing}, timeout=AT_ONCE_S)  # those whose step ends by then hear of it
        errors.print(f"stopped at once; requests without an answer: {lost}", style="red" if lost else "")
        sys.stderr.flush()
        os._exit(int(lost > 0))  # the models' thread may be in the middle of a step, and nothing ends that
    hurried.cancel()
    await finishing
    if warming.done():
        warming.result()  # raises what stopped it


def _read_again(keys: Keys) -> None:
    """The keys' file; one that cannot be read leaves those of before."""
    try:
        keys.read()
    except UsageError as error:
        errors.print(f"error: {error}; the keys of before are kept", style="red")


def _fleet(address: str, replicas: str, cpus: int, gpus: float | None, opening: EngineOptions) -> Fleet:
    """What the options for Ray say."""
    import torch

    from ..serve.fleet import Fleet

    least, _, most = replicas.partition("..")
    if not (least.isdecimal() and (most or least).isdecimal()):
        raise UsageError(f"replicas: expected MIN..MAX such as 1..4, or a number, got {replicas!r}")
    if gpus is None:
        gpus = float(torch.cuda.is_available() and opening.device != "cpu")
    return Fleet(address, int(least), int(most or least), cpus, gpus)


def _on_ray(
    opens: Callable[[], Any], fleet: Fleet, host: str, port: int, keys: Keys, **serving: Any
) -> None:  # fmt: skip
    """Serve with replicas until SIGTERM or Ctrl-C."""
    from ..serve.fleet import Serving, serve_on_ray

    with _listen(host, port) as found:  # Ray's own proxies listen there
        port = found.getsockname()[1]

    def wait(renew: Callable[[], None]) -> None:
        asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: asked.put(number))
        while asked.get() == signal.SIGHUP:
            _read_again(keys)
            renew()

    serve_on_ray(
        Serving(make=opens, keys=keys.keys, **serving), fleet, host, port,
        wait=wait, read_keys=lambda: keys.keys, say=errors.print,
    )  # fmt: skip
