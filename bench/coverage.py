"""What exports to ONNX, and whether it is right: `python -m bench.coverage [--kind K] [--only NAME...] [--record]`.

Every entry of a fixed list is exported with its gradient with respect to the first input, as a user would; the file is
loaded by ONNX Runtime and compared with eager at batches 1, 3 and 8. Each entry runs in a process of its own.

Eager is PyTorch in float32 with the gradients of its batch norms mended (`engine/models/norms.py`): on a CPU they are
noise for a single image. One rule holds for all entries: a file is within the tolerance of eager, or off from eager in
float64 by at most twice what eager in float32 is; never by more than ten times the tolerance.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from bench.coverage_list import ENTRIES, Entry
from bench.record import write_result
from counterlens.engine.models.norms import PlainNorms
from counterlens.export import ExportError, export_onnx
from counterlens.export.tracing import trace
from counterlens.export.versions import versions

BATCHES = (1, 3, 8)
TOLERANCE = 1e-4  # of each output's largest magnitude in the batch; of the entry itself where `Entry.each` says so
SECONDS = 300.0  # for one entry
KINDS = ("module", "operation", "architecture")
BAD = ("WRONG", "CRASH", "DOES NOT LOAD")
PACKAGES = ("onnx", "onnxruntime", "transformers")


def entries() -> list[Entry]:
    """The whole list."""
    from bench.coverage_architectures import ENTRIES as architectures

    return [*ENTRIES, *architectures]


def outputs(values: Any) -> tuple[Tensor, ...]:
    """A tuple of tensors from what a function returned."""
    return tuple(values) if isinstance(values, (list, tuple)) else (values,)


def with_gradient(fn: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The function, and its vector-Jacobian product with a cotangent of varying entries."""

    def both(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        y, pull = torch.func.vjp(lambda v: outputs(fn(v, *rest)), x)
        return (*y, pull(tuple(_cotangent(v.detach()) for v in y))[0])

    return both


def _cotangent(y: Tensor) -> Tensor:
    """Varies with y and in sign, and by at most half of y's relative error, however large y is (cos(y) would not)."""
    return torch.cos(1 + 2 * y / (1 + y.abs()))


def error_of(got: Tensor, want: Tensor, entry: Entry) -> float | str:
    """The largest error relative to the output's largest magnitude, or why there is none to tell."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, eager {list(want.shape)}"
    if not want.is_floating_point():
        return 0.0 if torch.equal(got.to(want.dtype), want) else "whole numbers differ"
    got, want = got.double(), want.double()
    if not torch.equal(got.isnan(), want.isnan()):
        return "NaN elsewhere"
    keep = ~want.isnan() & (got != want)  # equal infinities are equal
    if not keep.any():
        return 0.0
    finite = want[want.isfinite()].abs()
    scale = want.abs() if entry.each else finite.max() if finite.numel() else torch.tensor(1.0)
    return ((got - want).abs() / (scale + 1e-30))[keep].max().item()


def fault(got: Sequence[Tensor], want: Sequence[Tensor], entry: Entry, limits: Sequence[float]) -> str:
    """How the first wrong output is not the expected one; empty where none is."""
    for a, b, limit in zip(got, want, limits, strict=True):
        error = error_of(a, b, entry)
        if isinstance(error, str) or not error <= limit:
            return error if isinstance(error, str) else f"off by {error:.2g}"
    return ""


def measure(entry: Entry) -> tuple[str, str]:
    """An entry's outcome, and the reason of a bad or refused one or the rounding that was allowed for."""
    warnings.filterwarnings("ignore")
    onnxruntime.set_default_logger_severity(4)
    torch.manual_seed(0)
    fn = entry.make()
    called, why = with_gradient(fn) if entry.gradient else fn, ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = export_onnx(called, entry.inputs(2), Path(folder) / "model.onnx")
        except ExportError as error:
            return "refused", str(error)
        except Exception as error:  # noqa: BLE001  anything else is what this benchmark looks for
            return "CRASH", f"{type(error).__name__}: {error}".split("\n")[0]
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  the runtime's errors have no common type
            return "DOES NOT LOAD", str(error).split("\n")[0]
        names = [i.name for i in session.get_inputs()]
        for batch in BATCHES:
            torch.manual_seed(batch)
            inputs = entry.inputs(batch)
            with PlainNorms():
                want = outputs(called(*inputs))
            try:
                ran = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
            except Exception as error:  # noqa: BLE001  see above
                return "CRASH", f"batch {batch}: {error}".split("\n")[0]
            got = [torch.as_tensor(v) for v in ran]
            limits = [TOLERANCE] * len(want)
            wrong = fault(got, want, entry, limits)
            if wrong:
                exact = _exact(entry, inputs)
                own = [error_of(a, b, entry) for a, b in zip(want, exact, strict=True)]
                rounding = [0.0 if isinstance(e, str) else e for e in own]
                limits = [max(x, min(2 * e, 10 * TOLERANCE)) for x, e in zip(limits, rounding, strict=True)]
                if not fault(got, exact, entry, limits):
                    wrong, why = "", f"batch {batch}: {wrong}, eager itself by {max(rounding):.2g} from float64"
            if wrong:
                return "WRONG", f"batch {batch}: {wrong}"
    return "agrees", why


def _exact(entry: Entry, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Eager in float64 with the same weights, or what the entry says is exact."""
    torch.manual_seed(0)
    fn = entry.exact or entry.make()
    fn = fn.double() if isinstance(fn, nn.Module) else fn
    with PlainNorms():
        called = with_gradient(fn) if entry.gradient else fn
        return outputs(called(*(x.double() if x.is_floating_point() else x for x in inputs)))


def _answer(entry: Entry, connection: Connection) -> None:
    connection.send(measure(entry))


def alone(entry: Entry) -> tuple[str, str]:
    """`measure` in a process of its own: a crash of one entry is that entry's outcome."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(entry, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return "CRASH", f"no answer within {SECONDS:g} s"
        return ours.recv()
    except EOFError:
        process.join()
        return "CRASH", f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts of outcomes, per kind and in all."""
    kinds = {f"{kind}s": [r for r in rows if r["kind"] == kind] for kind in KINDS}
    both = [r for r in rows if r["kind"] != "architecture"]
    groups = {**kinds, "modules and operations": both, "all": list(rows)}
    return {
        name: {"entries": len(some), **Counter(r["outcome"] for r in some)} for name, some in groups.items() if some
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries of these names")
    parser.add_argument("--kind", choices=[f"{k}s" for k in KINDS], help="one kind of entries")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--record", action="store_true", help="write bench/results/coverage.json")
    options = parser.parse_args()
    if options.record and (options.only or options.kind):
        parser.error("--record takes the whole list")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    chosen = [e for e in entries() if options.kind in (None, f"{e.kind}s")]
    if options.only:
        if unknown := set(options.only) - {e.name for e in chosen}:
            parser.error(f"--only: no entry is called {', '.join(sorted(unknown))}")
        chosen = [e for e in chosen if e.name in options.only]
    # What the first trace of a process imports and compiles, once for all that are forked from here.
    trace(with_gradient(lambda x: x.sin()), [torch.ones(2, 1)])
    began, rows = time.perf_counter(), []
    for i, entry in enumerate(chosen, start=1):
        start = time.perf_counter()
        outcome, why = alone(entry)
        seconds = round(time.perf_counter() - start, 2)
        why = re.sub(r"/\S*/(site-packages|bench)/", r"\1/", why)  # places of this machine say nothing elsewhere
        rows.append({"name": entry.name, "kind": entry.kind, "gradient": entry.gradient, "outcome": outcome})
        rows[-1].update({"seconds": seconds, **({"reason": why} if why else {})})
        if not options.json:
            print(f"{i:3d}/{len(chosen)}  {outcome:13}  {entry.name}" + (f": {why[:150]}" if why else ""), flush=True)
    result = {
        "command": "python -m bench.coverage --record",
        "packages": versions(PACKAGES),
        "batches": BATCHES,
        "tolerance": TOLERANCE,
        "seconds": round(time.perf_counter() - began, 1),
        "summary": summary(rows),
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, counts in result["summary"].items():
            print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
        print(f"{result['seconds']} s in all")
    if options.record:
        write_result("coverage", result)
    raise SystemExit(any(r["outcome"] in BAD for r in rows))


if __name__ == "__main__":
    main()
