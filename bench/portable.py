"""The whole-run file: parity over modes, speeds and classifiers, its size and its speed beside the per-step file.

`python -m bench.portable [--sections parity,speed,start,node,page] [--record]`
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer

from bench.record import in_turns, quantiles, say, spread, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.core.whole_run import CARD, MODEL
from counterlens.engine.images.files import save_png
from counterlens.engine.packs import Pack
from counterlens.engine.portable.file import SALIENCY, card_of
from counterlens.engine.portable.page import web_runtime, write_page
from counterlens.engine.saliency.explain import pack_adapter
from counterlens.engine.saliency.one_file import export_saliency
from counterlens.export.errors import ExportError

SECTIONS = ("parity", "speed", "start", "node", "page")
SETTINGS: dict[str, dict[str, Any]] = {
    "official": {"mode": "official", "steps": 10},
    **{
        f"{mode} {speed}": {"mode": mode, "speed": speed}
        for mode, speed in itertools.product(("realistic", "audit"), ("exact", "balanced", "fast", "turbo"))
    },
}


def parity(work: Path) -> list[dict[str, Any]]:
    """Every setting and both classifiers against the eager run on 64 test digits."""
    return [parity_row(work, *row) for row in itertools.product(("clean", "shortcut"), SETTINGS)]


def parity_row(work: Path, classifier: str, setting: str) -> dict[str, Any]:
    """One setting and classifier."""
    say(f"{classifier}, {setting}")
    engine = Engine.from_pack("digits", classifier=classifier, runtime="eager", device="cpu")
    row: dict[str, Any] = {"classifier": classifier, "setting": setting}
    try:
        card = engine.export_counterfactual(work / "parity", Config(**SETTINGS[setting]), overwrite=True)
        row |= {"bytes": card["bytes"], "seconds": card["seconds"], **card["parity"]}
    except ExportError as error:
        row["refused"] = str(error)
    return row


def speed(work: Path, rounds: int) -> dict[str, Any]:
    """One counterfactual at batch 1 on one thread: the file and the engine on its per-step artefacts, turn by turn."""
    torch.set_num_threads(1)
    store = work / "store"
    engine = Engine.from_pack("digits", runtime="onnxruntime", store=store, device="cpu")
    config = Config(speed="fast")
    from counterlens.engine.core.exporting import ALL, export_artefact

    building = Engine.from_pack("digits", config=config, runtime="auto", store=store, device="cpu")
    for what in ALL:
        export_artefact(building, what=what, measure=False)
    image = Pack("digits").samples("test", count=1).images
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(work / MODEL, options, providers=["CPUExecutionProvider"])
    feeds = {"image": image.numpy(), "target": np.array([-1])}

    def whole() -> None:
        session.run(None, feeds)

    def stepwise() -> None:
        engine.counterfactual(image, config=config)

    times = in_turns({"whole": whole, "engine": stepwise}, rounds, warm=2)
    ratio = statistics.median(a / b for a, b in zip(times["whole"], times["engine"], strict=True))
    return spread(times) | {"whole / engine": ratio, "rounds": rounds}


def start(work: Path, rounds: int) -> dict[str, Any]:
    """`counterlens run`, process start to file written, and `import torch` beside it."""
    run = [sys.executable, "-c", "from counterlens.engine.cli.main import main; main()", "run", str(work / MODEL)]
    run += [str(work / "digit.png"), "--out", str(work / "run"), "--overwrite", "--threads", "1"]
    plain = [sys.executable, "-c", "import torch"]
    commands = {"counterlens run": run, "import torch": plain}
    calls = {name: partial(subprocess.run, c, check=True, capture_output=True) for name, c in commands.items()}
    return spread(in_turns(calls, rounds))


def node(work: Path, rounds: int) -> dict[str, Any]:
    """The examples in docs/examples: seconds of one run in Node and in Python, and whether they answer alike."""
    examples = Path(__file__).parent.parent / "docs" / "examples"
    packages = ["onnxruntime-node@1.30.0", "pngjs@7"]
    npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", "--prefix", str(work)]
    subprocess.run([*npm, *packages], check=True, capture_output=True)
    shutil.copy(examples / "run.mjs", work)
    commands = {"node": ["node", str(work / "run.mjs")], "python": [sys.executable, str(examples / "run.py")]}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            given = [str(work / MODEL), str(work / "digit.png"), "-1", str(work / f"{name}.png")]
            done = subprocess.run([*command, *given], check=True, capture_output=True, text=True)
            answers[name].append(json.loads(done.stdout))
    medians = {name: statistics.median(a["seconds"] for a in all_) for name, all_ in answers.items()}
    said = [[a[k] for k in ("from", "to", "now")] for all_ in answers.values() for a in all_]
    return {"seconds": medians, "node / python": medians["node"] / medians["python"],
            "same answers": all(a == said[0] for a in said)}  # fmt: skip


def page(work: Path, rounds: int) -> dict[str, Any]:
    """The single page in headless Chromium, offline: seconds to the first answer and to the next ones."""
    from playwright.sync_api import sync_playwright

    from counterlens.engine.core.whole_run import page_card
    from counterlens.engine.portable.page import VERSION

    engine = Engine.from_pack("digits", runtime="eager", device="cpu")
    card = json.loads((work / CARD).read_text()) | {"page": page_card(engine, VERSION) | {"saliency": True}}
    pack = Pack("digits")
    adapter = pack_adapter(pack, "clean", engine.classifier)
    cards = {
        CARD: card,
        card_of(SALIENCY): export_saliency(adapter, work / "map", baseline=pack.mean_colour, pack=pack),
    }
    shutil.copy(work / "map" / SALIENCY, work)
    (path,) = write_page(work, cards, web_runtime(), single=True)
    first, maps, following, said = [], [], [], []
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(rounds):
            tab = browser.new_context(offline=True).new_page()
            tab.on("console", lambda message: said.append(message.text))
            began = time.perf_counter()
            tab.goto(path.as_uri())
            tab.wait_for_selector("body[data-answers]", timeout=60_000)
            first.append(time.perf_counter() - began)
            tab.wait_for_selector("body[data-maps]", timeout=60_000)
            maps.append(time.perf_counter() - began)
            for i, name in enumerate("357", start=2):
                began = time.perf_counter()
                tab.get_by_role("button", name=name, exact=True).click()
                tab.wait_for_selector(f"body[data-answers='{i}']", timeout=60_000)
                following.append(time.perf_counter() - began)
            tab.context.close()
        browser.close()
    return {
        "bytes": path.stat().st_size, "first answer": quantiles(first), "first map": quantiles(maps),
        "next answers": quantiles(following), "console": said,
    }  # fmt: skip


def main(
    sections: Annotated[str, typer.Option(help=f"Of {', '.join(SECTIONS)}.")] = ",".join(SECTIONS),
    rounds: Annotated[int, typer.Option(help="Turns of every timing.")] = 10,
    record: Annotated[bool, typer.Option("--record", help="Write bench/results/portable-SECTION.json.")] = False,
) -> None:
    """Measure the whole-run file of the digits pack, speed fast."""
    asked = sections.split(",")
    if unknown := set(asked) - set(SECTIONS):
        raise typer.BadParameter(f"no section {sorted(unknown)[0]}; expected some of {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if set(asked) - {"parity"}:
            say("exporting the file")
            engine = Engine.from_pack("digits", runtime="eager", device="cpu")
            card = engine.export_counterfactual(work, Config(speed="fast"))
            say(f"{card['bytes'] / 1e6:.1f} MB, {card['seconds']}")
            save_png(Pack("digits").samples("test", count=1).images[0], work / "digit.png")
        timed = {"speed": speed, "start": start, "node": node, "page": page}
        for name in asked:
            say(name)
            result = {"rows": parity(work)} if name == "parity" else timed[name](work, rounds)
            print(json.dumps({name: result}, indent=1))
            if record:
                write_result(f"portable-{name}", result)


if __name__ == "__main__":
    typer.run(main)
