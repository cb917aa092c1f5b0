"""Classifiers that can only be called: `python -m bench.blackbox [--sections resume,flaky,...] [--record]`.

`resume`: an audit of a box behind a real HTTP server is killed with SIGKILL several times and goes on: which stored
answers were asked for again (none), and how many images were asked about twice (at most the requests in flight).
`flaky`: the server fails in 20 % of the requests with an error, answers 5 % too late and 1 % with nonsense: the audit
completes, what got no answer is a row that says so, and no other row differs from one of a server that never fails.
Results: bench/results/blackbox-SECTION.json.
"""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.endpoint import FLAKY, Endpoint, answers_of, serving
from bench.record import run_sections
from counterlens.engine.audit.results import Results
from counterlens.engine.blackbox.answers import FILE, key_of
from counterlens.engine.blackbox.box import probes
from counterlens.engine.images.files import save_png
from counterlens.engine.packs import Pack

BATCH, CONCURRENCY = 4, 4
KILLS = 3
SEED = 11  # of the faults; the first two requests, which open the box, are answered
CLOSE = 1e-4  # numbers of two rows of one audit: sums of 8-bit answers in other batches
COMPARED = ("prediction", "confidence", "msi", "msi_base", "sufficient_area")


def write_digits(folder: Path, count: int) -> Path:
    """Test digits as files."""
    folder.mkdir()
    drawn = Pack("digits").samples("test", count=count)
    for i, image in zip(drawn.ids, drawn.images, strict=True):
        save_png(image, folder / f"{i:04d}.png", {})
    return folder


def audit(address: str, images: Path, out: Path, *more: str) -> list[str]:
    """The command of an audit that only asks."""
    return [
        sys.executable, "-m", "counterlens.engine.cli.main", "audit", str(images), "--classifier", address,
        "--no-counterfactuals", "--saliency", "ablation", "--part-size", "4", "--no-report",
        "--classifier-batch", str(BATCH), "--classifier-concurrency", str(CONCURRENCY), "--out", str(out), *more,
    ]  # fmt: skip


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(command, capture_output=True, text=True)


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """An audit's rows by id."""
    return {row["id"]: row for row in Results.open(out).rows(["id", "status", "error", *COMPARED])}


def different(rows: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> list[str]:
    """Ids of the rows that are done and say something else than they should."""

    def same(a: Any, b: Any) -> bool:
        return a == b if not isinstance(a, float) or not isinstance(b, float) else abs(a - b) <= CLOSE

    return [
        id
        for id, row in rows.items()
        if row["status"] == "done" and not all(same(row[name], expected[id][name]) for name in COMPARED)
    ]


def stored(out: Path) -> dict[bytes, np.ndarray]:
    """The answers that an output folder keeps, by image."""
    if not (out / FILE).exists():
        return {}
    rows = sqlite3.connect(out / FILE).execute("SELECT image, answer FROM answers").fetchall()
    return {image: np.frombuffer(answer, np.float32) for image, answer in rows}


def resume(digits: int) -> dict[str, Any]:
    """Kill an audit, and let it go on."""
    answer, of_probes = answers_of(Pack("digits").classifier("shortcut")), {key_of(image) for image in probes(32)}
    with tempfile.TemporaryDirectory() as folder:
        images, out, whole = write_digits(Path(folder) / "digits", digits), Path(folder) / "out", Path(folder) / "whole"
        with serving(Endpoint(answer)) as server:
            expected = run(audit(server.address, images, whole))
            queries = sum(server.asked.values())
        if expected.returncode:
            raise SystemExit(expected.stderr)
        sessions: list[dict[str, Any]] = []
        with serving(Endpoint(answer)) as server:
            for kill in range(KILLS + 1):
                before, kept = server.asked.copy(), stored(out)
                process = subprocess.Popen(audit(server.address, images, out), stderr=subprocess.PIPE, text=True)
                if kill < KILLS:
                    wanted = sum(before.values()) + queries // (KILLS + 1)
                    while sum(server.asked.values()) < wanted and process.poll() is None:
                        time.sleep(0.002)
                    process.send_signal(signal.SIGKILL)
                _, text = process.communicate()
                time.sleep(0.3)  # what is in flight is answered to nobody
                now = {key: n for key, n in (server.asked - before).items() if key not in of_probes}
                sessions.append({
                    "killed": process.returncode == -signal.SIGKILL, "asked": sum(now.values()),
                    "known_before": len(kept), "known_asked_again": len(kept.keys() & now.keys()),
                    "asked_again": sum(before[key] > 0 for key in now),
                })  # fmt: skip
            if process.returncode:
                raise SystemExit(text)
            wrong = different(rows_of(out), rows_of(whole))
            counted = Results.open(out).manifest["queries"][0]["asked_in_all"]
            asked = sum(server.asked.values())
        most, known = BATCH * CONCURRENCY, sum(s["known_asked_again"] for s in sessions)
        bad = [f"{known} stored answers were asked for again"] if known else []
        bad += [f"{s['asked_again']} images were asked about again" for s in sessions if s["asked_again"] > most]
        bad += [f"{len(wrong)} rows differ"] if wrong else []
        honest = asked <= counted <= asked + KILLS * most  # what a kill stopped on its way was counted before
        bad += [] if honest else [f"{asked} queries arrived, {counted} were counted"]
        return {
            "digits": digits, "queries_without_a_kill": queries, "queries": asked, "counted": counted,
            "requests_in_flight": CONCURRENCY, "images_in_flight": most, "sessions": sessions,
            "rows_differ": len(wrong), "bad": bad,
        }  # fmt: skip


def flaky(digits: int) -> dict[str, Any]:
    """An audit of a server that fails, with the retries that are the default and with fewer."""
    answer, bad = answers_of(Pack("digits").classifier("shortcut")), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        images, whole = write_digits(Path(folder) / "digits", digits), Path(folder) / "whole"
        with serving(Endpoint(answer)) as server:
            expected = run(audit(server.address, images, whole))
        if expected.returncode:
            raise SystemExit(expected.stderr)
        right, figures = rows_of(whole), dict[str, Any]()
        truth = stored(whole)
        for name, retries in (("retries 5", 5), ("retries 2", 2)):
            out = Path(folder) / name
            with serving(Endpoint(answer, faults=FLAKY, slow_s=2.0, seed=SEED)) as server:
                command = audit(server.address, images, out, "--classifier-timeout", "1")
                done = run([*command, "--classifier-retries", str(retries)])
                said, asked = [*server.said], sum(server.asked.values())
            if done.returncode not in (0, 1) or not out.exists():
                raise SystemExit(done.stderr)
            rows, kept = rows_of(out), stored(out)
            failed = {id: row["error"] for id, row in rows.items() if row["status"] == "failed"}
            wrong = different(rows, right)
            off = [key for key, row in kept.items() if key in truth and np.abs(row - truth[key]).max() > CLOSE]
            record = Results.open(out).manifest["queries"][0]
            figures[name] = {
                "rows": len(rows), "failed_rows": len(failed), "wrong_rows": len(wrong), "stored": len(kept),
                "stored_wrong": len(off), "asked": asked, "counted": record["asked"], "retried": record["retried"],
                "without_answer": record["failed"], "requests": {kind: said.count(kind) for kind in sorted({*said})},
                "reasons": sorted({error[:100] for error in failed.values()})[:8],
            }  # fmt: skip
            bad += [f"{name}: {len(rows)} rows of {digits}"] if len(rows) != digits else []
            bad += [f"{name}: {len(wrong)} wrong rows, {len(off)} wrong stored answers"] if wrong or off else []
            bad += [f"{name}: a failed row says nothing"] if not all(failed.values()) else []
            bad += [f"{name}: exit code {done.returncode}"] if done.returncode != bool(failed) else []
            bad += [f"{name}: {asked} arrived, {record['asked']} counted"] if asked > record["asked"] else []
        return {"digits": digits, "faults": FLAKY, **figures, "bad": bad}


SECTIONS: dict[str, Callable[[int], dict[str, Any]]] = {"resume": resume, "flaky": flaky}


def main(
    sections: Annotated[str, typer.Option(help=f"Of {', '.join(SECTIONS)}.")] = ",".join(SECTIONS),
    digits: Annotated[int, typer.Option(help="Test digits in each.", min=8)] = 60,
    record: Annotated[bool, typer.Option("--record", help="Write bench/results/blackbox-SECTION.json.")] = False,
) -> None:
    """Measure how black boxes are asked.

    Example: python -m bench.blackbox --record
    """
    run_sections(
        sections, {name: partial(section, digits) for name, section in SECTIONS.items()}, "blackbox", record=record
    )


if __name__ == "__main__":
    typer.run(main)
