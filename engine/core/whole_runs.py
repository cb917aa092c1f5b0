"""A whole run's file as one of the ways in which an engine runs a batch: taken where it was measured to be faster."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError
from counterlens.export.hashing import file_digest
from counterlens.export.store import Artefact, tensors_digest
from counterlens.export.versions import versions

from ..config import Settings
from ..files import write_atomically
from ..guidance.jobs import Job, Outcome, seeded_noise
from ..guidance.schedule import schedule_of
from ..guidance.solvers import coefficients
from ..multistep import SOLVERS
from ..portable.file import COUNTERFACTUAL
from ..runtime import onnxruntime
from ..runtime.choice import Choice
from ..runtime.registry import AUTO
from ..runtime.runners import Runners
from ..runtime.spec import machine

NAME, STEPS = "whole-run", "steps"
WholeRun = Callable[..., tuple[Tensor, ...]]


class WholeRuns:
    """The whole runs of one engine's models in its store: found by key, as everything there.

    Args:
        runners: of the engine; whole runs are used under `auto` on a CPU.
    """

    def __init__(self, runners: Runners) -> None:
        self.runners, self.store = runners, runners.store
        self._keys: dict[Settings, dict[str, Any]] = {}
        self._found: dict[Settings, Artefact | None] = {}
        self._open: dict[Settings, WholeRun] = {}

    def key(self, settings: Settings) -> dict[str, Any]:
        """Everything that a whole run depends on."""
        if settings not in self._keys:
            levels = self.runners.diffusion.alphas_cumprod
            table = coefficients(schedule_of(settings, levels), levels, settings.solver)
            own = {
                "what": "counterfactual",
                "settings": settings.model_dump(mode="json"),
                "program": file_digest(Path(__file__).with_name("whole_run.py"))[:16],
                # The solver's own numbers: it may be another package's.
                "solver": [tensors_digest(table)[:16], *SOLVERS[settings.solver].remembers],
            }
            self._keys[settings] = self.runners.spec(settings).key("onnx") | own
        return self._keys[settings]

    def find(self, settings: Settings) -> Artefact | None:
        """The artefact in the store, if whole runs can be used here at all; of a damaged one a warning is given."""
        spec = self.runners.spec(settings)
        if self.runners.runtime != AUTO or spec.device.type != "cpu" or not self.store.folder.exists():
            return None
        if settings not in self._found:
            self._found[settings] = None
            try:
                if not onnxruntime.missing():
                    self._found[settings] = self.store.find(self.key(settings))
            except ExportError as error:  # nothing asked for it, and the steps run
                warnings.warn(f"{NAME} is not used: {error}", stacklevel=2)
        return self._found[settings]

    def keep(self, settings: Settings, path: Path, parity: Mapping[str, Any]) -> None:
        """Put a file that agreed with the eager run, its batch open, into the store."""

        def copy(folder: Path) -> dict[str, Any]:
            for part in path.parent.glob(f"{path.name}*"):  # above 2 GB its data beside it
                shutil.copyfile(part, folder / part.name)
            return {"what": "counterfactual", "target": "onnx", "parity": dict(parity)}

        self._found[settings] = self.store.get(self.key(settings), copy, force=True)
        self._open.pop(settings, None)

    def choose(self, settings: Settings, slots: int) -> Choice | None:
        """The whole run for batches of this size, and why; None where it is none, or not the fastest measured here."""
        if self.find(settings) is None:
            return None
        times = self.measurements(settings).get(str(slots), {})
        if not times or times[NAME] >= times[STEPS]:
            return None
        listed = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in sorted(times.items()))
        return Choice(NAME, f"fastest measured here for a run of batch {slots}: {listed}")

    def open(self, settings: Settings) -> WholeRun:
        """The file of these settings, which is in the store, as a function of its inputs in order."""
        if settings not in self._open:
            artefact = self.find(settings)
            assert artefact is not None
            self._open[settings] = onnxruntime.load(artefact.file(COUNTERFACTUAL))
        return self._open[settings]

    def measurements(self, settings: Settings) -> dict[str, dict[str, float]]:
        """Batch size to seconds of a run, by steps and whole, as measured on this machine with these versions."""
        try:
            known = json.loads(self._measured(settings).read_text())
            return {str(slots): {name: float(times[name]) for name in (STEPS, NAME)} for slots, times in known.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError, KeyError):  # none, or damaged: the steps run
            return {}

    def remember(self, settings: Settings, slots: int, times: Mapping[str, float]) -> None:
        """Keep what was measured for a batch size."""
        known = self.measurements(settings) | {str(slots): dict(times)}
        write_atomically(self._measured(settings), json.dumps(known, indent=1) + "\n", folders=True)

    def _measured(self, settings: Settings) -> Path:
        packages = versions(("torch", "onnxruntime", "counterlens"))
        where = {"machine": machine(), "threads": torch.get_num_threads(), "versions": packages}
        key = json.dumps(self.key(settings) | where, sort_keys=True)
        return self.store.folder / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


class WholeSampler:
    """Runs jobs of the same settings by a whole run's file, so many at a time; to a session, a `Sampler` of one tick.

    Args:
        run: see `WholeRuns.open`.
        settings: of all jobs.
        slots: every batch is padded to so many, so that a result does not depend on what is beside it.
        latents: [C, h, w], the noise's shape.
    """

    def __init__(self, run: WholeRun, settings: Settings, slots: int, latents: tuple[int, int, int]) -> None:
        self.run, self.settings, self.slots, self.latents = run, settings, slots, latents
        self.live, self.patience, self.ticks, self.z0 = False, 0, 0, torch.empty(0)
        self.stepped: list[tuple[int, int]] = []
        self.progress: dict[int, tuple[int, int]] = {}
        self._jobs: dict[int, Job] = {}
        self._next_id = 0

    def submit(self, job: Job) -> int:
        """Add a job and return its id."""
        self._next_id += 1
        self._jobs[self._next_id] = job
        return self._next_id

    def cancel(self, id: int) -> bool:
        """Drop a job; False if its outcome was given already."""
        return self._jobs.pop(id, None) is not None

    def tick(self) -> list[Outcome]:
        """Run everything that was submitted."""
        todo, self._jobs = list(self._jobs.items()), {}
        outcomes: list[Outcome] = []
        for start in range(0, len(todo), self.slots):
            some = todo[start : start + self.slots]
            jobs = [job for _, job in some]
            jobs += [jobs[0]] * (self.slots - len(jobs))
            began = time.perf_counter()
            images = torch.stack([job.image for job in jobs]).float()
            given = [images, torch.tensor([job.target for job in jobs])]
            if self.settings.noise != "inversion":
                given.append(seeded_noise(self.latents, [job.seed for job in jobs], images))
            changed, _, _, _, said, _, _, kept = self.run(*given)
            seconds = (time.perf_counter() - began) / len(some)
            for row, (id, _) in enumerate(some):
                steps = kept[row].tolist()
                if int(said[row]) < 0:
                    error = "the model returned NaN or infinite values in the run"
                    outcomes.append(Outcome(id, None, None, [], len(steps), False, seconds, error))
                else:
                    outcomes.append(Outcome(id, None, changed[row], steps, len(steps), True, seconds))
        return outcomes
