"""The same audit on a Ray cluster: actors that hold one engine each, parts streamed to them, results written there."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.factory import EngineFactory
from ..errors import CounterlensError, UsageError
from ..files import real
from ..images.sources import need
from .results import Results, part_path
from .rows import Row

if TYPE_CHECKING:
    from .auditor import Auditor
    from .plan import Chosen


def check_travels(parts: Mapping[str, Any]) -> None:
    """Refuse what cannot be sent to another process, before anything is started.

    Raises:
        UsageError: names the part, the module in it and why.
    """
    from ray import cloudpickle

    for name, part in parts.items():
        why = _unpicklable(cloudpickle, part)
        if why is None:
            continue
        module = getattr(part, "module", None)
        inside = [
            f"{path} ({type(m).__name__})"
            for path, m in (module.named_modules() if isinstance(module, nn.Module) else ())
            if path and _unpicklable(cloudpickle, m) is not None
        ]
        where = f", in {inside[-1]}" if inside else ""
        raise UsageError(
            f"ray: the {name} cannot be sent to another process{where}: {why}; leave out ray=, or remove what cannot "
            "be pickled (locks, generators, parametrizations: torch.nn.utils.parametrize.remove_parametrizations)"
        )


def _unpicklable(pickler: Any, part: Any) -> str | None:
    """Why a part cannot be pickled, in one line; None where it can."""
    try:
        pickler.dump(part, _Nowhere())
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
    return None


class _Nowhere:
    """A file that keeps nothing: gigabytes of weights are not held a second time."""

    def write(self, data: Any) -> int:
        return len(memoryview(data).cast("B"))


class Worker:
    """One engine in an actor; called with a batch of part numbers, it writes them and says what they hold.

    Args:
        make: an `EngineFactory`, in Ray's object store.
        job: source, options, judges, config, folder, and the conditions that are held (threads, runtimes).
    """

    def __init__(self, make: Any, job: Any) -> None:
        import ray

        from ..images.sources import open_source
        from .auditor import Auditor
        from .conditions import check_conditions, conditions, held
        from .plan import parts_of

        engine = ray.get(make)()
        details = ray.get(job)
        options = details["options"]
        source = open_source(Path(details["source"]), options.slices, options.recursive)
        self.auditor = Auditor(engine, source, details["options"], details["config"], details["judges"])
        self.results = Results.open(Path(details["out"]))
        mine, theirs = self.auditor.identity["hash"], self.results.manifest["identity"]["hash"]
        if mine != theirs:
            raise CounterlensError(f"this machine sees another model or source (hash {mine}, not {theirs})")
        check_conditions(details["conditions"], conditions(engine, self.auditor.config), details["out"])
        # Until the actor's end.
        self.holding = held(engine, details["conditions"], self.auditor.config, lambda text: None)
        self.holding.__enter__()
        self.results.made = conditions(engine, self.auditor.config)
        self.parts = parts_of(self.auditor.read_plan(self.results.folder), details["options"].part_size)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        said: dict[str, list[Any]] = {"part": [], "samples": [], "flips": [], "failures": []}
        for number in batch["item"].tolist():
            chosen = self.parts[number]
            rows, files = self.auditor.explain(number, chosen, self.auditor.read([c.sample for c in chosen]))
            self.results.write_part(number, rows, files)
            said["part"].append(number)
            said["samples"].append(len(rows))
            said["flips"].append(sum(bool(r.flipped) for r in rows))
            said["failures"].append(sum(r.status == "failed" for r in rows))
        return said


def run_on_ray(
    auditor: Auditor,
    results: Results,
    todo: Sequence[int],
    parts: Mapping[int, list[Chosen]],
    address: str,
    *,
    workers: int,
    stop: threading.Event,
    on_rows: Callable[[Sequence[Row]], None],
) -> None:
    """Stream part numbers to actors; one that dies is started again, and its part is done again.

    A part is the same whoever makes it, and its file appears whole: done twice, it is written twice the same.

    Args:
        address: `local` starts Ray here; else a cluster's address, whose machines must see source and folder.

    Raises:
        CounterlensError: ray is missing or cannot be reached, or an actor fails with what is no worker's death.
    """
    need("ray", "running on Ray", "ray", "ray")
    import ray
    import ray.data
    import torch

    if not todo:
        return
    engine = auditor.engine
    job = {
        "source": str(real(auditor.source.path)),
        "options": auditor.options,
        "judges": auditor.judges,
        "config": auditor.config,
        "out": str(real(results.folder)),
        "conditions": results.manifest["conditions"],
    }
    make = EngineFactory.of(engine)
    check_travels(make.parts | {f"judge {name}": judge for name, judge in auditor.judges.items()})
    started = not ray.is_initialized()
    if started:
        try:
            if address == "local":
                # Actors are placed by logical CPUs; on a small machine the operators' own needs would leave none.
                ray.init(num_cpus=max(8, 2 * workers + 4), include_dashboard=False, log_to_driver=False)
            else:
                ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"ray: {address} cannot be reached ({error})") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        # Held here for as long as actors may have to be started again with them.
        held = (ray.put(make), ray.put(job))
        data = ray.data.from_items(list(todo), override_num_blocks=len(todo)).map_batches(
            Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=1 if torch.cuda.is_available() else None,
            fn_constructor_args=held,
        )
        for said in data.iter_rows():
            rows = results_rows(results, said["part"])
            on_rows(rows)
            if stop.is_set():
                break
    except ray.exceptions.RayError as error:
        raise CounterlensError(f"ray: {_first_line(error)}") from error
    finally:
        if started:
            ray.shutdown()


def results_rows(results: Results, part: int) -> list[Row]:
    """The rows of a part that a worker says it wrote.

    Raises:
        CounterlensError: it is not in this folder.
    """
    pq = need("pyarrow.parquet", "an audit's results")
    path = results.folder / part_path(part)
    try:
        return [Row(**row) for row in pq.ParquetFile(path).read().to_pylist(maps_as_pydicts="strict")]
    except FileNotFoundError as error:
        raise CounterlensError(f"{path}: a worker wrote it elsewhere; all machines must see the same folder") from error


def _first_line(error: BaseException) -> str:
    """What went wrong in an actor, without the traceback that Ray puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
