"""What every recorded result says about itself: device, versions, commit, date."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import typer

from counterlens.engine.files import write_atomically
from counterlens.engine.metrics import bootstrap
from counterlens.export.versions import versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "triton", "numpy")


def environment() -> dict[str, Any]:
    """Device, threads, versions, commit (with `+` if the tree was changed) and date."""
    root = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
    # Results being written do not change the code that was measured.
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", ":(top,exclude)bench/results"], cwd=root, capture_output=True, text=True
    )
    # A copy of the tree without its history is told which commit it is of.
    known, plus = commit.stdout.strip(), "+" if changed.stdout.strip() else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, {_cpu()}"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "commit": os.environ.get("COMMIT", known + plus),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_result(name: str, payload: dict[str, Any]) -> Path:
    """Write `bench/results/NAME.json` with the environment beside the payload."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_atomically(path, json.dumps({"environment": environment(), **payload}, indent=1) + "\n")
    return path


def say(*words: object) -> None:
    """For people: stderr, because stdout may belong to a machine."""
    print(*words, file=sys.stderr, flush=True)


def quantiles(seconds: list[float], levels: tuple[float, ...] = (0.2, 0.5, 0.8)) -> dict[str, float]:
    """Quantiles of times by name: p20, p50, ..."""
    values = torch.tensor(seconds, dtype=torch.float64)
    return {f"p{round(100 * q)}": values.quantile(q).item() for q in levels}


def wait() -> None:
    """For the device to have finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, the device waited for."""
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, *, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, all made once in every round so that a busy moment hits all; the first `warm` are free."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for i in range(warm + rounds):
            for name, call in calls.items():
                seconds = timed(call)
                if i >= warm:
                    times[name].append(seconds)
    return times


def spread(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 of each."""
    return {name: quantiles(values) for name, values in times.items()}


def time_calls(call: Callable[[], object], *, seconds: float = 2.0, least: int = 10) -> dict[str, float]:
    """p20, p50 and p80 of the wall time of a call, in seconds, after two warm-up calls."""
    timed(call)
    timed(call)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        times.append(timed(call))
    return quantiles(times) | {"calls": len(times)}


def keep_memory() -> None:
    """Have glibc keep what is freed: a call that gives tens of megabytes back each time pays for them anew each time.

    Whether it does depends on what else the process happens to hold, and moves a short call's time by a third.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            library.mallopt(parameter, 1 << 30)


def run_sections(
    asked: str, sections: Mapping[str, Callable[[], dict[str, Any]]], prefix: str, *, record: bool
) -> None:
    """Run comma-separated sections and print what each found; `record` writes bench/results/PREFIX-SECTION.json.

    Raises:
        typer.BadParameter: there is no such section. SystemExit: one found what must not be, in its list `bad`.
    """
    chosen = asked.split(",")
    if unknown := set(chosen) - set(sections):
        raise typer.BadParameter(f"no section {sorted(unknown)[0]}; expected some of {', '.join(sections)}")
    bad: list[str] = []
    for name in chosen:
        say(name)
        result = sections[name]()
        print(json.dumps({name: result}, indent=1))
        if record:
            write_result(f"{prefix}-{name}", result)
        bad += result.get("bad", [])
    if bad:
        raise SystemExit(f"bad: {len(bad)}, the first of them {bad[0]}")


def interval(values: torch.Tensor) -> dict[str, float]:
    """Mean of per-sample values with its 95 % bootstrap interval."""
    return asdict(bootstrap(values.flatten()))
