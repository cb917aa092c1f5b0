"""Seconds from a process's start to its end: what every command waits for before and after it computes.

`python -m bench.startup` times, in turns, `import torch`, `counterlens --help`, and `counterlens counterfactual IMAGE
--speed fast` in eager and with everything that it runs compiled in the store. The ratios are to `import torch`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bench.record import in_turns, say, spread, write_result

PROGRAM = [sys.executable, "-m", "counterlens.engine.cli.main"]


def runs(folder: Path) -> dict[str, Callable[[], object]]:
    """The processes by name, once artefacts, measurements and records of parity are in a store of their own."""
    store = os.environ | {"COUNTERLENS_STORE": str(folder / "store")}

    def run(*words: str) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        subprocess.run(words, env=store, check=True, capture_output=True, cwd=folder)

    say("compiling what a run uses")
    run(*PROGRAM, "samples", "--count", "1", "--out", str(folder / "images"))
    run(*PROGRAM, "export", "--what", "all", "--speed", "fast")
    (image,) = (folder / "images").glob("*.png")
    command = [*PROGRAM, "counterfactual", str(image), "--speed", "fast", "--out", str(folder / "out")]
    return {
        "import torch": lambda: run(sys.executable, "-c", "import torch"),
        "counterlens --help": lambda: run(*PROGRAM, "--help"),
        "eager": lambda: run(*command, "--runtime", "eager"),
        "with artefacts": lambda: run(*command),
    }


def main(rounds: Annotated[int, typer.Option(help="Of one process each.", min=3)] = 5) -> None:
    """Time the start of processes and record the result."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = spread(in_turns(runs(Path(folder)), rounds))
    base = seconds["import torch"]["p50"]
    ratios = {name: round(times["p50"] / base, 2) for name, times in seconds.items()}
    for name, times in seconds.items():
        say(f"{name}: {times['p50']:.2f} s ({times['p20']:.2f} to {times['p80']:.2f}), {ratios[name]} x import torch")
    say(write_result("startup", {"rounds": rounds, "seconds": seconds, "times_import_torch": ratios}))


if __name__ == "__main__":
    typer.run(main)
