"""What `counterlens export` does: build an artefact of an engine's models, measure it, copy it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from counterlens.export.store import MANIFEST

from ..files import write_atomically
from ..models.freezing import frozen
from ..models.placing import computing_on
from ..outputs import open_run
from ..runtime import artefacts
from ..runtime.choice import StepRunner
from ..runtime.registry import AUTO, of_format
from ..runtime.runners import PARTS
from ..runtime.spec import SLOTS, STEP
from .core import EngineCore

ALL = (STEP, *PARTS.values())  # what an engine runs


def export_artefact(
    engine: EngineCore,
    *,
    what: str = STEP,
    target: str = "onnx",
    dtype: str = "fp32",
    force: bool = False,
    measure: bool = True,
    out: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Build an artefact into the engine's store and return its report with `built`, `files` and `measured`.

    Args:
        engine: its models, config (filter and gradient) and store.
        what, target, dtype: see `runtime.spec.Spec` and `runtime.registry.formats`.
        force: build again.
        measure: time what the engine runs, in float32, against eager at every slot count, for `runtime="auto"`.
        out: folder for a copy of the files, and run.json.
        overwrite: remove what an earlier run wrote there.
        say: told what is being done.

    Raises:
        UsageError: what or dtype is none that there is. ExportError: it cannot be built, or is wrong.
        CounterlensError: the copy cannot be written.
    """
    settings = engine.settings(engine.config)
    spec = engine.spec(settings, what=what, dtype=dtype)
    # A run whose steps reuse something takes several kinds of them; the report is that of the one that does not.
    kinds = engine.runners.kinds(settings) if what == STEP else []
    specs = [spec, *(engine.spec(settings, what=what, dtype=dtype, reused=kind) for kind in kinds)]
    with ExitStack() as stack:
        facts = {"command": "counterlens export", "what": what, "format": target, "dtype": dtype}
        facts = engine.facts(engine.config) | facts
        run = None if out is None else stack.enter_context(open_run(out, facts, overwrite=overwrite))
        stack.enter_context(computing_on(spec.device))
        stack.enter_context(frozen(*spec.modules))
        before = engine.store.path(artefacts.key_of(spec, target)).exists()
        artefact, *_ = [artefacts.build(one, target, engine.store, force=force, say=say) for one in specs]
        measured: dict[str, dict[str, float]] = {}
        if measure and what != "classifier" and dtype == "fp32":
            runner, *more = (StepRunner(one, AUTO, engine.store) for one in specs)
            for slots in SLOTS:
                say(f"measuring batch {slots}")
                measured[str(slots)] = runner.measure(slots)
                for other in more:
                    other.measure(slots)
        folder = artefact.folder
        if run is not None:
            folder = run.folder
            run.claim(path.name for path in artefact.folder.iterdir())
            for path in artefact.folder.iterdir():
                with path.open("rb") as file:
                    write_atomically(folder / path.name, partial(shutil.copyfileobj, file))
    files = sorted(str(folder / name) for name in (MANIFEST, *artefact.hashes))
    return {
        **artefact.report,
        "built": force or not before,
        "runtime": of_format(target).name,
        "measured": measured,
        "files": files,
    }
