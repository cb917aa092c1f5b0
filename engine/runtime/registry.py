"""The runtimes there are, by name: what chooses, builds, opens, records and explains one reads this table.

A runtime is one object in one file: a `Runtime` that a module of this package holds as `RUNTIME`, that another package
gave to `register`, or that it names in the group `counterlens.runtimes` of its entry points. Beside them stand `eager`,
which everything is held to, and `auto`, which chooses. Names need no torch, so that `--help` can say them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CounterlensError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import torch
    from torch import Tensor
    from torch.fx import GraphModule

    from .spec import Spec

Run = Callable[..., "tuple[Tensor, ...]"]  # from tensors in the order of a spec's inputs
Timed = Callable[[str, str, Callable[[], Any]], Any]  # (what is said, its label among the report's seconds, the work)
GROUP = "counterlens.runtimes"
EAGER, AUTO = "eager", "auto"
# Each is a module beside this one: with what `--format` calls the artefacts that it keeps in the store.
_BUILTIN = {"cudagraphs": "", "inductor": "", "onnxruntime": "onnx", "aoti": "aoti", "tensorrt": "tensorrt"}
_registered: dict[str, Runtime] = {}


class Runtime:
    """One way to run a function of tensors; its results are held to eager before any is used.

    One that keeps artefacts in the store says their `file` and has `build` and `load`; one that compiles or records in
    this process has `prepare`.
    """

    name: str
    file: str = ""  # an artefact's main file; none is kept without it
    packages: tuple[str, ...] = ()  # whose versions decide its results
    portable = False  # its artefacts are the same from every device
    recorded = False  # eager's own kernels in order: `auto` may take it with nothing built, and no bit differs

    @property
    def format(self) -> str:
        """Of its artefacts, in their keys and for `counterlens export --format`; empty where none are kept."""
        return _BUILTIN.get(self.name, self.name if self.file else "")

    def missing(self, device: torch.device) -> list[str]:
        """Why it cannot run on this device; empty when it can."""
        return []

    def key(self, spec: Spec) -> dict[str, Any]:
        """What its artefacts depend on beside the spec, as JSON values."""
        return {}

    def build(self, graph: GraphModule, spec: Spec, path: Path, timed: Timed) -> None:
        """Write the artefact of a traced spec to `path`, its work `timed`; ExportError where that cannot be done."""
        raise NotImplementedError

    def load(self, path: Path, device: torch.device) -> Run:
        """An artefact as a function of its inputs in order; ExportError where it cannot run here."""
        raise NotImplementedError

    def prepare(self, spec: Spec, eager: Callable[..., Any]) -> Callable[[int], Run]:
        """From a batch size to what runs the spec for it in this process; `eager` is the same in eager."""
        raise NotImplementedError


def register(runtime: Runtime) -> None:
    """Add a runtime of your own, or another one of the same name."""
    _registered[runtime.name] = runtime


@cache
def _outside() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """All runtimes, those of other packages behind ours."""
    return list(dict.fromkeys([*_BUILTIN, *_registered, *_outside()]))


def choices() -> list[str]:
    """What `runtime=` takes."""
    return [AUTO, EAGER, *names()]


def formats() -> list[str]:
    """What `--format` takes: of other packages' runtimes, their names."""
    kept = [name for name in names() if name not in _registered or _registered[name].file]
    return [format for name in kept if (format := _BUILTIN.get(name, name))]


def check(runtime: str) -> None:
    """UsageError if `runtime=` does not take this."""
    if runtime not in (AUTO, EAGER, *_BUILTIN) and runtime not in choices():
        raise UsageError(f"runtime: expected one of {', '.join(choices())}, got {runtime!r}")


def find(name: str) -> Runtime:
    """The runtime of this name.

    Raises:
        UsageError: there is none. CounterlensError: another package's cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    if name in _BUILTIN:
        runtime: Runtime = import_module(f".{name}", __package__).RUNTIME
        return runtime
    if name not in _outside():
        raise UsageError(f"runtime: expected one of {', '.join(names())}, got {name!r}")
    point = _outside()[name]
    try:
        runtime = point.load()
    except (ImportError, AttributeError) as error:
        raise CounterlensError(f"runtime {name}: {point.value} cannot be imported ({error}); uninstall it") from error
    if not isinstance(runtime, Runtime) or runtime.name != name:
        raise CounterlensError(f"runtime {name}: {point.value} is no Runtime of this name; uninstall it")
    _registered[name] = runtime
    return runtime


def of_format(format: str) -> Runtime:
    """The runtime whose artefacts are of this format. UsageError: there is none."""
    for name in names():
        if format == _BUILTIN.get(name, name) and (runtime := find(name)).file:
            return runtime
    raise UsageError(f"format: expected one of {', '.join(formats())}, got {format!r}")


def same_as_eager(name: str) -> bool:
    """Whether what runs under this name are eager's own kernels, in order."""
    return name == EAGER or (name in names() and find(name).recorded)
