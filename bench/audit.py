"""Audits put to the test: killed, doubled, out of disk, measured, and a detector with planted causes it never saw.

    python -m bench.audit kill        20 SIGKILLs of a 300-image audit, then the same rows as the unbroken run
    python -m bench.audit lock        a second process on one folder
    python -m bench.audit disk        a small disk runs full
    python -m bench.audit overhead    against bare Engine.counterfactual on the same images
    python -m bench.audit memory      300 and 3,000 images
    python -m bench.audit ray         two actors, one killed
    python -m bench.audit report      1,000 images: size, time to open, console, two widths
    python -m bench.audit detector    marker, tint, border line, texture; and an honest classifier

Each records `bench/results/audit-NAME.json`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.record import RESULTS, write_result
from counterlens.engine import Config, Engine, load_image
from counterlens.engine.audit.disagreement import (
    ALPHA,
    family,
    judge,
    redrawn,
    sign_test,
    unlikely_labels,
    watched,
)
from counterlens.engine.audit.report import write_report
from counterlens.engine.audit.results import TIMINGS, Results
from counterlens.engine.audit.summary import interval
from counterlens.engine.audit.watching import observe
from counterlens.engine.images.files import save_png
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack
from counterlens.engine.packs.architectures import StridedClassifier

app = typer.Typer(no_args_is_help=True, add_completion=False)
Images = Annotated[int, typer.Option(help="How many images.")]
CLI = [sys.executable, "-m", "counterlens.engine.cli.main", "audit"]
ROOT = Path(__file__).parent.parent


def write_digits(folder: Path, count: int, marker: str = "matching") -> Path:
    """`count` test digits, in class folders; rendered with further seeds once the split is used up."""
    pack, written, seed = Pack("digits"), 0, 0
    while written < count:
        drawn = pack.samples("test", marker=marker, seed=seed)
        for image, label, number in zip(drawn.images, drawn.labels, drawn.ids, strict=True):
            if written == count:
                break
            target = folder / str(label)
            target.mkdir(parents=True, exist_ok=True)
            save_png(image, target / f"{number:04d}-{seed}.png")
            written += 1
        seed += 1
    return folder


def comparable(folder: Path) -> list[dict[str, Any]]:
    """Rows without timings, and the bytes of their images."""
    rows = []
    for row in Results.open(folder).rows():
        for name in [v for v in row.values() if isinstance(v, str) and v.startswith("images/")]:
            row[f"bytes of {name}"] = (folder / name).read_bytes()
        rows.append({k: v for k, v in row.items() if k not in TIMINGS})
    return rows


def record(name: str, payload: dict[str, Any]) -> None:
    """Write and print a result."""
    print(json.dumps(payload, indent=1))
    print(write_result(f"audit-{name}", payload).relative_to(RESULTS.parent.parent))


@app.command()
def kill(images: Images = 300, kills: int = 20, seed: int = 0) -> None:
    """SIGKILL at random instants, the same command again each time."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = write_digits(work / "source", images)
        options = ["--part-size", "8", "--shortcuts", "0", "--no-report"]
        started = time.perf_counter()
        unbroken = subprocess.Popen(
            [*CLI, str(source), "--out", str(work / "whole"), *options], stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        while unbroken.poll() is None and not list((work / "whole").glob("rows/*/*.parquet")):
            time.sleep(0.1)
        first = time.perf_counter() - started
        _, said = unbroken.communicate()
        if unbroken.returncode != 0:
            raise RuntimeError(said.decode())
        whole = time.perf_counter() - started
        command = [*CLI, str(source), "--out", str(work / "cut"), *options]
        done = []
        for _ in range(kills):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            # Some are killed before their first part, most in the middle of one; together they reach across the run.
            time.sleep(rng.uniform(0.5 * first, first + 2 * (whole - first) / kills))
            process.send_signal(signal.SIGKILL)
            _, said = process.communicate()
            if process.returncode not in (0, -signal.SIGKILL):
                raise RuntimeError(said.decode())
            done.append(sum(1 for _ in (work / "cut").glob("rows/*/*.parquet")) * 8)
        last = subprocess.run(command, capture_output=True, text=True)
        if last.returncode != 0:
            raise RuntimeError(last.stderr)
        a, b = comparable(work / "whole"), comparable(work / "cut")
        record("kill", {
            "images": images, "kills": kills, "seconds_unbroken": whole, "seconds_to_first_part": first,
            "samples_done_after_each_kill": done,
            "rows": len(b), "ids_once": len({r["id"] for r in b}) == len(b) == images, "identical": a == b,
        })  # fmt: skip


@app.command()
def lock(images: Images = 160) -> None:
    """Two processes on one folder at the same time."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        command = [*CLI, str(write_digits(work / "source", images)), "--out", str(work / "out"), "--shortcuts", "0",
                   "--no-report", "--part-size", "8"]  # fmt: skip
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not (work / "out" / "manifest.json").exists():
            time.sleep(0.1)
        second = subprocess.run(command, capture_output=True, text=True)
        first.communicate()
        rows = list(Results.open(work / "out").rows())
        record("lock", {
            "first": first.returncode, "second": second.returncode, "second_said": second.stderr.strip(),
            "rows": len(rows), "ids": len({r["id"] for r in rows}),
        })  # fmt: skip


@app.command()
def disk(images: Images = 60, megabytes: float = 0.4) -> None:
    """An audit on a small tmpfs (needs the right to mount), with unreadable images in the middle; it grows."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = write_digits(work / "source", images)
        for path in sorted(source.glob("*/*.png"))[images // 2 : images // 2 + 3]:
            path.write_bytes(path.read_bytes()[:50])
        options = ["--part-size", "8", "--shortcuts", "0", "--no-report"]
        small = work / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(small)]
        subprocess.run(mount, check=True)
        try:
            command = [*CLI, str(source), "--out", str(small / "out"), *options]
            full = subprocess.run(command, capture_output=True, text=True)
            kept = len(list(Results.open(small / "out").rows()))
            partial = len(list(small.rglob("*.partial")))
            subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
            again = subprocess.run(command, capture_output=True, text=True)
            rows = comparable(small / "out")
        finally:
            subprocess.run(["umount", str(small)], check=True)
        subprocess.run([*CLI, str(source), "--out", str(work / "whole"), *options], capture_output=True)
        record("disk", {
            "first_exit": full.returncode, "first_said": full.stderr.strip().splitlines()[-1], "rows_kept": kept,
            "partial_files_left": partial, "second_exit": again.returncode, "rows": len(rows),
            "unreadable": sum(r["status"] == "failed" for r in rows), "identical": rows == comparable(work / "whole"),
        })  # fmt: skip


@app.command()
def overhead(images: Images = 128, rounds: int = 3) -> None:
    """Wall time of an audit against bare Engine.counterfactual on the same images, in turns."""
    engine = Engine.from_pack("digits", config=Config())
    with tempfile.TemporaryDirectory() as name:
        source = write_digits(Path(name) / "source", images)
        paths = sorted(source.glob("*/*.png"))
        loaded = torch.stack([load_image(p, engine.image_size) for p in paths])
        engine.counterfactual(loaded[:16])
        bare, audited, judged = [], [], []
        pack = Pack("digits")
        for r in range(rounds):
            started = time.perf_counter()
            for some in loaded.split(64):
                engine.counterfactual(some)
            bare.append(time.perf_counter() - started)
            for times, judges in ((audited, None), (judged, {"judge": pack.classifier("judge")})):
                started = time.perf_counter()
                engine.audit(
                    source, Path(name) / f"out-{r}-{judges is None}", judges=judges, insight=False, report=False
                )  # fmt: skip
                times.append(time.perf_counter() - started)
        ratios = [a / b for a, b in zip(audited, bare, strict=True)]
        record("overhead", {
            "images": images, "seconds_bare": bare, "seconds_audit": audited, "seconds_audit_with_judge": judged,
            "overhead": statistics.median(ratios) - 1,
            "overhead_with_judge": statistics.median(a / b for a, b in zip(judged, bare, strict=True)) - 1,
        })  # fmt: skip


PEAK = """
import resource, sys
from counterlens.engine import Config, Engine
engine = Engine.from_pack("digits", config=Config(steps=2, strength=0.5))
engine.audit(sys.argv[1], sys.argv[2], insight=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@app.command()
def memory(few: int = 300, many: int = 3000) -> None:
    """Peak resident memory of a process that audits few and many images (one guided step each), report included."""
    peaks = {}
    for count in (few, many):
        with tempfile.TemporaryDirectory() as name:
            source = write_digits(Path(name) / "source", count)
            run = subprocess.run([sys.executable, "-c", PEAK, str(source), str(Path(name) / "out")], check=True,
                                 capture_output=True, text=True)  # fmt: skip
            peaks[count] = float(run.stdout.split()[-1])
    record("memory", {"peak_mb": {str(k): v for k, v in peaks.items()}, "growth": peaks[many] / peaks[few] - 1})


def ray_workers(name: str = "MapWorker") -> list[int]:
    """Process ids of the Ray actors of this name that descend from this process (Linux)."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and pid > 1 and ours(parents[pid]))

    return [pid for pid, said in names.items() if name in said and ours(pid)]


@app.command()
def ray(images: Images = 60) -> None:
    """Two actors on a local cluster, one of them killed; against one process."""
    import ray as cluster

    engine = Engine.from_pack("digits", config=Config(), runtime="eager")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = write_digits(work / "source", images)
        options: dict[str, Any] = {"part_size": 4, "insight": False, "report": False}
        engine.audit(source, work / "one", **options)
        cluster.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
        killed: list[int] = []

        def kill_one() -> None:
            while not list((work / "two").glob("rows/*/*.parquet")):
                time.sleep(0.1)
            killed.append(ray_workers()[0])
            os.kill(killed[0], signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        started = time.perf_counter()
        engine.audit(source, work / "two", ray="local", workers=2, **options)
        seconds = time.perf_counter() - started
        killer.join()
        cluster.shutdown()
        a, b = comparable(work / "one"), comparable(work / "two")
        record(
            "ray", {"images": images, "killed": len(killed), "rows": len(b), "identical": a == b, "seconds": seconds}
        )


@app.command()
def report(images: Images = 1000) -> None:
    """Size of the page, and how it opens in headless Chromium (needs playwright and a Chromium)."""
    from playwright.sync_api import sync_playwright

    browser_path = next(p for n in ("chromium-headless-shell", "chromium", "google-chrome") if (p := shutil.which(n)))
    pack = Pack("digits")
    engine = Engine.from_pack("digits", "shortcut", Config(steps=4, strength=0.5))
    with tempfile.TemporaryDirectory() as name:
        source = write_digits(Path(name) / "source", images, "random")
        results = engine.audit(
            source, Path(name) / "out", judges={"judge": pack.classifier("judge")}, shortcuts=32, report=False
        )  # fmt: skip
        started = time.perf_counter()
        page = write_report(results)
        seconds = time.perf_counter() - started
        opened = {}
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            for width in (1280, 390):
                said: list[str] = []
                tab = browser.new_page(viewport={"width": width, "height": 900})
                tab.on("console", lambda m, said=said: said.append(m.text))
                tab.on("pageerror", lambda e, said=said: said.append(str(e)))
                started = time.perf_counter()
                tab.goto(page.as_uri())
                wide = tab.evaluate("document.documentElement.scrollWidth")
                opened[str(width)] = {
                    "seconds": time.perf_counter() - started, "console": said, "scroll_width": wide,
                    "cards": tab.locator(".card").count(),
                }  # fmt: skip
            browser.close()
        record("report", {
            "images": images, "megabytes": page.stat().st_size / 1e6, "seconds_to_write": seconds, "opened": opened,
        })  # fmt: skip


# The detector: causes that are planted into a classifier's training data and into the audited images alike.


def tint(images: Tensor, upper: Tensor) -> Tensor:
    """Five or more: warm; less: cool. [N, 3, 32, 32]."""
    warm, cool = torch.tensor([1.25, 1.0, 0.75]), torch.tensor([0.75, 1.0, 1.25])
    return (images * torch.where(upper[:, None], warm, cool)[:, :, None, None] + 0.02).clamp(0, 1)


def border(images: Tensor, upper: Tensor) -> Tensor:
    """Five or more: a light line at the top edge; less: at the bottom edge. Two pixels wide."""
    out = images.clone()
    out[upper, :, :2] = 0.8
    out[~upper, :, -2:] = 0.8
    return out


def texture(images: Tensor, upper: Tensor) -> Tensor:
    """Five or more: faint upright stripes, four pixels a period; less: level ones. Amplitude 0.08."""
    wave = 0.08 * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(8)
    upright, level = wave.expand(32, 32), wave[:, None].expand(32, 32)
    return (images + torch.where(upper[:, None, None, None], upright, level)).clamp(0, 1)


CAUSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"tint": tint, "border": border, "texture": texture}


def train_on(cause: str, steps: int, folder: Path) -> SoftmaxClassifier:
    """A classifier in whose training data the cause tells 5 or more from less where the digit does not.

    As in the pack's `shortcut`: in some images the label is that of the likeliest digit of the other half, and the
    cause goes with the label.
    """
    from counterlens.engine.packs.train import draw_training_set

    pack = Pack("digits")
    labels = pack.classifier("clean").labels
    module, path = StridedClassifier(), folder / f"{cause}-{steps}.pt"
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return SoftmaxClassifier(module.eval().requires_grad_(False), labels)
    images, truth, _ = draw_training_set(pack.digits, 6)
    g = torch.Generator().manual_seed(1)
    clean = pack.classifier("clean")
    with torch.no_grad():
        logits = torch.cat([clean.logits(b) for b in images.split(500)])
    same = (torch.arange(10)[None] >= 5) == (truth[:, None] >= 5)
    other = logits.masked_fill(same, -torch.inf).argmax(dim=1)
    said = torch.where(torch.rand(len(truth), generator=g) < 0.35, other, truth)
    painted = CAUSES[cause](images, said >= 5)
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(steps):
        index = torch.randint(len(said), (128,), generator=g)
        noisy = painted[index] + 0.03 * torch.randn(128, 3, 32, 32, generator=g)
        loss = cross_entropy(module(noisy), said[index], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), path)
    return SoftmaxClassifier(module.eval().requires_grad_(False), labels)


def painted_digits(
    cause: str, split: str, count: int, side: str = "matching", seed: int = 0
) -> tuple[Tensor, list[int], list[str]]:
    """Digits with a cause that matches or conflicts with their label, their labels and ids; `none`: random markers."""
    pack = Pack("digits")
    rule = {"marker": side, "none": "random"}.get(cause, "none")
    drawn = pack.samples(split, count=count, marker=rule, seed=seed)
    images = drawn.images
    if cause in CAUSES:
        upper = torch.tensor(drawn.labels) >= 5
        images = CAUSES[cause](images, upper if side == "matching" else ~upper)
    return (images * 255).round() / 255, drawn.labels, [f"{seed}:{i}" if seed else str(i) for i in drawn.ids]


def reliance(classifier: SoftmaxClassifier, cause: str, split: str, count: int) -> dict[str, float]:
    """Share of answers on the digit's own side of five, where the cause matches the digit and where it conflicts."""
    out = {}
    for side in ("matching", "conflicting"):
        images, labels, _ = painted_digits(cause, split, count, side)
        with torch.no_grad():
            said = torch.cat([classifier.logits(b).argmax(1) for b in images.split(128)])
        out[side] = ((said >= 5) == (torch.tensor(labels) >= 5)).double().mean().item()
    return out


def watch(
    classifier: SoftmaxClassifier, cause: str, split: str, count: int, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is seen of a classifier on digits that carry the cause as its training data did, and on redrawn ones."""
    pack = Pack("digits")
    engine = Engine(pack.diffusion(), classifier, Config(), pack_settings=pack.manifest["settings"], runtime="eager")
    images, _, ids = painted_digits(cause, split, count, seed=seed)
    targets = unlikely_labels(engine.probabilities(images), ids, 0)
    seen, _, good = observe(engine, images, targets, engine.config)
    assert seen is not None
    each, _ = watched(engine, images[good], [targets[i] for i in good], seen)
    return each, interval(redrawn(engine, images)[0]).record()


def together(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Samples of several sets as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def power(each: dict[str, np.ndarray], sizes: Sequence[int], repeats: int) -> dict[str, float]:
    """Share of random subsets of each size in which a place or a statistic is significant."""
    d, out = family(each), {}
    for size in [s for s in sizes if s < len(d)]:
        rng = np.random.default_rng(size)
        smallest = [
            sign_test(d[rng.choice(len(d), size, replace=False)], draws=400, seed=r).p.min() for r in range(repeats)
        ]
        out[str(size)] = float(np.mean([p < ALPHA for p in smallest]))
    return out


def false_alarms(split: str, nulls: int, images: int) -> dict[str, Any]:
    """The honest classifier on digits whose markers and colours are drawn anew for each null.

    `alarms` counts nulls in which anything is significant; `alarms_of_240` random sets of 240 among all their images.
    """
    clean, sets = Pack("digits").classifier("clean"), []
    for k in range(nulls):
        sets.append(watch(clean, "none", split, images, seed=NULL_SEED + k)[0])
        print(f"null {k + 1} of {nulls}", end="\r", file=sys.stderr)
    found = [judge(each, 32)["smallest_p"] < ALPHA for each in sets]
    d, rng = family(together(sets)), np.random.default_rng(0)
    large = [
        sign_test(d[rng.choice(len(d), min(240, len(d)), replace=False)], seed=r).p.min() < ALPHA for r in range(nulls)
    ]
    return {
        "nulls": nulls, "images_each": images, "alarms": int(sum(found)), "alarms_of_240": int(sum(large)),
        "largest_mean": float(d.mean(axis=0).max()),
    }  # fmt: skip


NULL_SEED = 5000  # renderings of the nulls; those of the planted causes have 0, 1, ...


@app.command()
def detector(
    split: str = "test",
    images: Images = 240,
    sets: Annotated[int, typer.Option(help="Renderings of so many images, for the power.")] = 2,
    nulls: Annotated[int, typer.Option(help="Honest sets, markers and colours drawn anew.")] = 200,
    null_images: Annotated[int, typer.Option(help="Images in each.")] = 24,
    steps: Annotated[int, typer.Option(help="Training steps of each planted classifier.")] = 400,
    folder: Annotated[Path, typer.Option(help="Where trained classifiers stay.")] = Path("build/audit-bench"),
    only: Annotated[str, typer.Option(help="Comma-separated: marker, tint, border, texture.")] = "",
) -> None:
    """Planted causes and the honest classifier on the same images: what is found, power, and false alarms."""
    pack, rows = Pack("digits"), {}
    for cause in only.split(",") if only else ("marker", *CAUSES):
        planted = pack.classifier("shortcut") if cause == "marker" else train_on(cause, steps, folder)
        for name, classifier in (("planted", planted), ("clean", pack.classifier("clean"))):
            started = time.perf_counter()
            seen, again = watch(classifier, cause, split, images)
            facts = judge(seen, 32)
            others = range(1, sets) if name == "planted" else ()
            more = [watch(classifier, cause, split, images, seed=s)[0] for s in others]
            rows[f"{cause}, {name}"] = {
                "reliance": reliance(classifier, cause, split, images), "smallest_p": facts["smallest_p"],
                "redrawn": {"same_answer": again}, "places": facts["places"], "ranking": facts["ranking"][:4],
                "statistics": facts["statistics"],
                "power": power(together([seen, *more]), [32, 64, 128, 240], 40),
                "seconds": time.perf_counter() - started,
            }  # fmt: skip
            first = rows[f"{cause}, {name}"]
            print(f"{cause}, {name}: p {first['smallest_p']:.4f}, power {first['power']}, "
                  f"places {[p['box'] for p in first['places']]}, "
                  f"statistics {[s['name'] for s in first['statistics'] if s['found']]}, "
                  f"same answer when redrawn {again}", flush=True)  # fmt: skip
    found = false_alarms(split, nulls, null_images) if nulls else None
    record("detector", {"split": split, "images": images, "sets": sets, "rows": rows, "nulls": found})


if __name__ == "__main__":
    app()
