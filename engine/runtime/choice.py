"""Which runtime runs a guided step or a part of the models: the one that was named, or the fastest measured here."""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from counterlens.export.errors import ExportError
from counterlens.export.store import Artefact, Store

from ..files import write_atomically
from ..guidance.pullback import PullbackMode, in_eager
from ..guidance.step import GuidedStep
from . import artefacts, registry
from .compiled import CompiledStep, expected_inputs
from .here import Here, together
from .registry import AUTO, EAGER
from .spec import STEP, Spec, flat, machine

AnyStep = GuidedStep | CompiledStep


@dataclass(frozen=True)
class Choice:
    """A runtime and why it was taken."""

    runtime: str
    why: str


class StepRunner:
    """The guided step of one spec, or one part of the models, under one `runtime`, for every batch size.

    Args:
        spec: what is run.
        runtime: one of `registry.choices()`. A runtime that is named runs or raises; `auto` takes the fastest that was
            measured on this machine for the batch size among those that are ready, else eager.
        store: of artefacts and measurements.
        backend, pullback: of the kernels and of the pullbacks in eager.
        say: told when something is built, which takes tens of seconds.
        pins: what `auto` takes by batch size, whatever is ready or was measured.
    """

    def __init__(
        self,
        spec: Spec,
        runtime: str = AUTO,
        store: Store | None = None,
        backend: str = "auto",
        pullback: PullbackMode = "functional",
        say: Callable[[str], None] = lambda _: None,
        pins: Mapping[str, str] | None = None,
    ) -> None:
        registry.check(runtime)
        self.spec = spec
        self.runtime = runtime
        self.store = store or Store()
        self.backend = backend
        self.pullback: PullbackMode = pullback
        self.say = say
        self.pins = pins or {}
        self._steps: dict[str, AnyStep] = {}
        self._functions: dict[str, Callable[..., Any]] = {}
        self._here: dict[str, Here] = {}  # what is compiled or recorded in this process, by runtime
        self._found: dict[str, Artefact] | None = None
        self._remeasure = False  # measurements were damaged
        self._refused: dict[int, dict[str, str]] = {}  # by batch size: what could not be recorded for it, and why
        self._opening = threading.RLock()

    def choose(self, batch: int) -> Choice:
        """The runtime for a batch size, and why."""
        if self.runtime != AUTO:
            return Choice(self.runtime, "asked for")
        ready = self.ready()
        refused = self._refused.get(batch, {})
        usable = {EAGER, *ready} - refused.keys()
        if (pin := self.pins.get(str(batch))) is not None:
            return Choice(pin if pin in usable else EAGER, "as this run began")
        if not ready:
            return Choice(EAGER, "no compiled step in the store; `counterlens export` builds one")
        measured = self.measurements().get(str(batch), {})
        times = {name: seconds for name, seconds in measured.items() if name in usable}
        if set(times) <= {EAGER}:
            why = f"nothing was measured here for batch {batch}; Engine.warmup measures"
            return Choice(EAGER, "; ".join(refused.values()) or why)
        best = min(times, key=lambda name: times[name])
        listed = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in sorted(times.items()))
        return Choice(best, f"fastest measured here for batch {batch}: {listed}")

    def step(self, batch: int) -> AnyStep:
        """The step for a batch size, called like a GuidedStep; what a named runtime needs is built now."""
        with self._opening:
            name = self._chosen(batch)
            if name not in self._steps:
                self._steps[name] = self._open(name)
            return self._steps[name]

    def reports(self) -> dict[str, Any]:
        """How what was compiled or recorded agreed with eager, by runtime and, where it is made here, by batch size."""
        return {n: a.report["parity"] for n, a in self.found().items()} | {n: h.reports for n, h in self._here.items()}

    def eager(self, with_directions: bool = False) -> GuidedStep:
        """The step in eager, whatever the runtime; with the directions that its filter compares."""
        step = self.spec.step()
        step.backend, step.with_directions = self.backend, with_directions
        step.mode = in_eager(self.pullback, self.spec.modules)
        step.together = together(self.spec.device)
        return step

    def part(self, batch: int) -> Callable[..., torch.Tensor]:
        """A part of the models for a batch size. Under a named runtime it is compiled only if the store has it."""
        with self._opening:
            name = self._chosen(batch)
            if name not in self.ready():
                name = EAGER
            run = self._function(name)
        return run if name == EAGER else lambda *inputs: run(*inputs)[0]

    def taken(self, batch: int) -> str:
        """The runtime that a batch of this size gets: of a part that the store does not have, eager."""
        name = self.choose(batch).runtime
        return name if self.spec.what == STEP or name in self.ready() else EAGER

    def _chosen(self, batch: int) -> str:
        """The runtime for a batch size; what `auto` takes is opened or recorded now, while it can still change."""
        name = self.choose(batch).runtime
        if self.runtime == AUTO and self._remeasure and name == EAGER and self.ready():
            self.measure(batch)
            name = self.choose(batch).runtime
        if self.runtime != AUTO or name == EAGER:
            return name
        try:
            self._function(name)
            if name in self._here:
                self._here[name].record(batch)
        except ExportError as error:
            self._leave_out(name, batch, error)
            return self._chosen(batch)
        return name

    def _leave_out(self, name: str, batch: int, error: ExportError) -> None:
        """Under `auto`: what cannot be opened or recorded here, or does not agree with eager, is no candidate."""
        if name not in self.found():
            self._refused.setdefault(batch, {})[name] = str(error)
            return
        warnings.warn(f"{name} is not used: {error}", stacklevel=2)
        self.found().pop(name)

    def ready(self) -> list[str]:
        """Runtimes beside eager that need no building: artefacts in the store, and on a GPU CUDA graphs of eager."""
        recorded = [n for n in registry.names() if registry.find(n).recorded] if self.pullback == "functional" else []
        return [*self.found(), *(n for n in recorded if not registry.find(n).missing(self.spec.device))]

    def found(self) -> dict[str, Artefact]:
        """The artefacts of this step that are in the store and can run here, by runtime."""
        if self._found is None:
            found = {}
            # Without a store there is nothing to look for: large weights need not be hashed.
            for name in registry.names() if self.store.folder.exists() else ():
                runtime = registry.find(name)
                if not runtime.file or runtime.missing(self.spec.device):
                    continue
                if (artefact := self._find(runtime.format)) is not None:
                    found[name] = artefact
            self._found = found
        return self._found

    def _find(self, target: str) -> Artefact | None:
        """The artefact in the store; under `auto` a damaged one is built again."""
        try:
            return self.store.find(artefacts.key_of(self.spec, target))
        except ExportError as error:
            if self.runtime != AUTO:
                raise
            warnings.warn(f"{error.args[0].split('; ')[0]}: built again", stacklevel=2)
            return artefacts.build(self.spec, target, self.store, force=True, say=self.say)

    def measure(self, batch: int, seconds: float = 1.0) -> dict[str, float]:
        """Time eager and whatever is `ready` for a batch size, in seconds a step, and remember it."""
        inputs = self.spec.example(batch)
        times = {}
        for name in (EAGER, *self.ready()):
            try:
                times[name] = _median_time(self._function(name), inputs, seconds)
            except ExportError as error:  # nothing was asked for: it is no candidate, and eager is
                if self.runtime != AUTO and name in self.found():
                    raise
                self._leave_out(name, batch, error)
        path = self._calibration()
        known = self.measurements() | {str(batch): times}
        write_atomically(path, json.dumps(known, indent=1) + "\n", folders=True)
        return times

    def measurements(self) -> dict[str, dict[str, float]]:
        """Batch size to runtime to seconds a step, as measured on this machine."""
        if not self.store.folder.exists():  # large weights need not be hashed
            return {}
        path = self._calibration()
        try:
            known = json.loads(path.read_text())
            return {str(batch): {str(k): float(v) for k, v in times.items()} for batch, times in known.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            if self.runtime != AUTO:
                raise ExportError(f"{path}: damaged ({error}); delete it") from error
            warnings.warn(f"{path}: damaged ({error}): measured again", stacklevel=2)
            path.unlink(missing_ok=True)
            self._remeasure = True
            return {}

    def _calibration(self) -> Any:
        threads = torch.get_num_threads()
        where = {"machine": machine(), "threads": threads}
        if self.spec.device.type != "cpu":
            where["device"] = self.spec.device.type
        key = json.dumps(self.spec.key("any") | where, sort_keys=True)
        return self.store.folder / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    def _function(self, runtime: str) -> Callable[..., Any]:
        """What runs under this runtime, as a function of the spec's inputs in order."""
        if runtime not in self._functions:
            if self.spec.what == STEP:
                if runtime not in self._steps:
                    self._steps[runtime] = self._open(runtime)
                self._functions[runtime] = flat(self._steps[runtime])
            elif runtime == EAGER:
                self._functions[runtime] = self.spec.function()
            elif registry.find(runtime).file:
                self._functions[runtime] = artefacts.open_checked(self.found()[runtime], self.spec, self.say)
            else:
                self._functions[runtime] = self._prepared(runtime)
        return self._functions[runtime]

    def _open(self, runtime: str) -> AnyStep:
        if runtime == EAGER:
            return self.eager()
        if registry.find(runtime).file:
            artefact = artefacts.build(self.spec, registry.find(runtime).format, self.store, say=self.say)
            run = artefacts.open_checked(artefact, self.spec, self.say)
            return artefacts.open_step(artefact, self.spec.device, run)
        expected = expected_inputs(dict(zip(self.spec.inputs, self.spec.example(1), strict=True)))
        return CompiledStep(self._prepared(runtime), runtime=runtime, dtype=self.spec.dtype, expected=expected)

    def _prepared(self, name: str) -> Here:
        """What runs it in this process, prepared and held to eager at the first call with each batch size."""
        if name not in self._here:
            runtime = registry.find(name)
            if reasons := runtime.missing(self.spec.device):
                raise ExportError(f"{name}: {'; '.join(reasons)}")
            self.say(f"preparing {name} at the first step of each batch size")
            self._here[name] = Here(self.spec, runtime.prepare(self.spec, self._function(EAGER)))
        return self._here[name]


@torch.no_grad()
def _median_time(run: Callable[..., Any], inputs: tuple[torch.Tensor, ...], seconds: float) -> float:
    cuda = inputs[0].is_cuda
    times: list[float] = []
    run(*inputs)
    if cuda:
        torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run(*inputs)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
