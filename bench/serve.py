"""The server under load, on loopback, beside the bare engine.

`python -m bench.serve [--sections throughput,...] [--record]`

Load is open-loop: arrivals are a Poisson process with a fixed seed and do not wait for answers.

What saturation is compared with: on two cores, the generator takes a share of one, and a bare engine on both would be
compared with a server on what is left. So in `throughput` and `overload` the server has one core and the generator the
other, and the reference, `Engine.counterfactual` on 16 slots with the same images, runs on the server's core, on one
thread as the server does, in the same run.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import torch
import typer
from PIL import Image

from bench.hostile import attack, keys
from bench.record import quantiles, run_sections, say
from counterlens.engine import Config, Engine
from counterlens.engine.images.files import to_uint8
from counterlens.engine.packs import Pack
from counterlens.engine.serve.wire import png

Answer = tuple[int, float, dict[str, Any]]  # status, seconds, body
SECTIONS = ("start", "throughput", "latency", "mixed", "aborted", "overload", "terminate", "identity", "hostile")
MORE_BYTES = 512_000_000  # of memory after hostile input: more is a leak
LEVELS = (0.5, 0.95, 0.99)
RUNTIME = ("--runtime", "onnxruntime")  # `auto` would take whatever the store of this machine happens to hold


class Served:
    """A server in a process of its own, ready; `core` pins it."""

    def __init__(self, *options: str, core: int | None = None) -> None:
        began = time.perf_counter()
        command = [sys.executable, "-m", "counterlens.engine.cli.main", "serve", "--port", "0", *RUNTIME, *options]
        pinned = None if core is None else (lambda: os.sched_setaffinity(0, {core}))
        self.log = open(f"/tmp/counterlens-serve-{os.getpid()}.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stderr=self.log, preexec_fn=pinned)
        self.url = ""
        while not self.url:
            time.sleep(0.01)
            text = Path(self.log.name).read_text()
            if "serving at " in text:
                self.url = text.split("serving at ")[1].split()[0]
            elif self.process.poll() is not None:
                raise SystemExit(text)
        while True:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.01)
        self.start_s = time.perf_counter() - began

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=120)
        self.log.close()
        Path(self.log.name).unlink()

    def held(self) -> dict[str, int]:
        """Resident bytes, threads and open files of the process."""
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return {"bytes": int(status["VmRSS"].split()[0]) * 1024, "threads": int(status["Threads"]),
                "files": len(list((folder / "fd").iterdir()))}  # fmt: skip


def pictures(count: int) -> list[bytes]:
    return [png(image) for image in Pack("digits").samples("test", count=count).images]


async def ask(client: httpx.AsyncClient, image: bytes, **fields: Any) -> Answer:
    """One counterfactual."""
    began = time.perf_counter()
    answer = await client.post("/v1/counterfactuals", files={"image": image}, data=fields)
    return answer.status_code, time.perf_counter() - began, answer.json()


def with_client(url: str, run: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            return await run(client)

    return asyncio.run(main())


async def burst(client: httpx.AsyncClient, images: list[bytes], **fields: Any) -> list[Answer]:
    """All at once."""
    return await asyncio.gather(*(ask(client, image, **fields) for image in images))


def start() -> dict[str, Any]:
    """Process start to ready, artefacts in the store."""
    seconds = []
    for _ in range(3):
        with Served() as served:
            seconds.append(served.start_s)
    return {"seconds": quantiles(seconds)}


def throughput(count: int = 64) -> dict[str, Any]:
    """Images a second at saturation on 16 slots, against `Engine.counterfactual` on the same images and core."""
    torch.set_num_threads(1)
    engine = Engine.from_pack("digits", runtime=RUNTIME[1], config=Config(speed="fast"))
    images = Pack("digits").samples("test", count=count).images
    engine.warmup([16])
    engine.counterfactual(images[:16])
    shown = pictures(count)
    own, there, equal = [], [], []
    for _ in range(3):
        os.sched_setaffinity(0, {0})
        began = time.perf_counter()
        made = engine.counterfactual(images)
        own.append(time.perf_counter() - began)
        os.sched_setaffinity(0, {1})
        with Served("--slots", "16", "--max-queue", "256", core=0) as served:
            with_client(served.url, lambda client: burst(client, shown[:16], speed="fast"))
            began = time.perf_counter()
            answers = with_client(served.url, lambda client: burst(client, shown, speed="fast"))
            there.append(time.perf_counter() - began)
        said = [a["prediction"] for _, _, a in answers if a.get("status") == "done"]
        mine = [made.record(i)["prediction"] for i in range(count) if made.record(i)["status"] == "done"]
        equal.append(said == mine)
    ratio = statistics.median(own) / statistics.median(there)
    return {"engine_s": quantiles(own), "server_s": quantiles(there), "ratio": ratio, "equal": all(equal)}


def latency(count: int = 40) -> dict[str, Any]:
    """One request at a time on an idle server, against the bare engine on one slot."""
    engine = Engine.from_pack("digits", runtime=RUNTIME[1], config=Config(speed="fast"))
    images = Pack("digits").samples("test", count=count).images
    shown = pictures(count)
    engine.warmup([1])
    own = []
    with Served() as served:

        async def run(client: httpx.AsyncClient) -> list[float]:
            await ask(client, shown[0], speed="fast")
            seconds = []
            for i, image in enumerate(shown):
                began = time.perf_counter()
                engine.counterfactual(images[i : i + 1])
                own.append(time.perf_counter() - began)
                seconds.append((await ask(client, image, speed="fast"))[1])
            return seconds

        there = with_client(served.url, run)
    mine, theirs = quantiles(own, LEVELS), quantiles(there, LEVELS)
    return {"engine": mine, "server": theirs, "p50_more_ms": 1e3 * (theirs["p50"] - mine["p50"]),
            "p99_ratio": theirs["p99"] / mine["p99"]}  # fmt: skip


async def poisson(
    client: httpx.AsyncClient, images: list[bytes], rate: float, seconds: float, seed: int, **fields: Any
) -> list[Answer]:
    """Requests at random times for so many seconds, whatever the answers do."""
    chance, tasks, end = random.Random(seed), [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        tasks.append(asyncio.create_task(ask(client, chance.choice(images), **fields)))
        await asyncio.sleep(chance.expovariate(rate))
    return await asyncio.gather(*tasks)


def bare_rate(images: Any) -> float:
    """Images a second of `Engine.counterfactual` on the server's core."""
    torch.set_num_threads(1)
    engine = Engine.from_pack("digits", runtime=RUNTIME[1], config=Config(speed="fast"))
    engine.warmup([16])
    engine.counterfactual(images[:16])
    began = time.perf_counter()
    for _ in range(3):
        engine.counterfactual(images)
    return 3 * len(images) / (time.perf_counter() - began)


def overload(minutes: float = 1.0) -> dict[str, Any]:
    """0.5 to 3 times the capacity that was measured, queue of 64; the last for so many minutes."""
    seconds, memory = 60 * minutes, []
    os.sched_setaffinity(0, {0})
    engine = bare_rate(Pack("digits").samples("test", count=64).images)
    os.sched_setaffinity(0, {1})
    shown, rows = pictures(64), []
    with Served("--slots", "16", "--max-queue", "64", core=0) as served:
        with_client(served.url, lambda client: burst(client, shown[:16], speed="fast"))
        idle = quantiles(
            [with_client(served.url, lambda c: ask(c, shown[0], speed="fast"))[1] for _ in range(8)], LEVELS
        )
        began = time.perf_counter()
        with_client(served.url, lambda client: burst(client, shown, speed="fast"))
        capacity = len(shown) / (time.perf_counter() - began)
        for times in (0.5, 0.8, 1.0, 1.5, 3.0):
            before, began = served.held(), time.perf_counter()
            answers = []
            for part in range(max(1, round(minutes)) if times == 3.0 else 1):  # memory is looked at every minute
                span = min(20, seconds) if times < 3 else seconds / max(1, round(minutes))
                answers += with_client(
                    served.url,
                    lambda c, t=times, s=span, p=part: poisson(c, shown, t * capacity, s, 7 + p, speed="fast"),
                )
                memory.append(served.held())
            took = time.perf_counter() - began
            good = [s for status, s, _ in answers if status == 200]
            rows.append({
                "times": times, "asked": len(answers), "statuses": dict(Counter(str(s) for s, _, _ in answers)),
                "goodput": len(good) / took, "seconds": quantiles(good, LEVELS), "before": before,
                "after": served.held(),
            })  # fmt: skip
            say(json.dumps(rows[-1]))
    last = rows[-1]
    return {
        "capacity": capacity, "engine_per_s": engine, "idle": idle, "rows": rows, "minutes": minutes, "held": memory,
        "goodput_ratio": last["goodput"] / capacity, "saturation_ratio": last["goodput"] / engine,
        "p99_allowed_s": 64 / last["goodput"] + 2 * idle["p50"], "p99_s": last["seconds"]["p99"],
        "memory_ratio": last["after"]["bytes"] / rows[1]["after"]["bytes"],
    }  # fmt: skip


def mixed(seconds: float = 40) -> dict[str, Any]:
    """`fast` requests now and then among two `exact` ones that follow each other without a pause."""
    shown = pictures(32)
    with Served("--slots", "auto", "--preload-speeds", "fast,exact") as served:

        async def run(client: httpx.AsyncClient) -> dict[str, Any]:
            idle = [(await ask(client, shown[i], speed="fast"))[1] for i in range(8)]
            end = time.perf_counter() + seconds / 2
            alone = await _loop(client, shown, end)
            end = time.perf_counter() + seconds
            began = time.perf_counter()
            both = asyncio.create_task(_loop(client, shown, end))
            quick = await poisson(client, shown, 0.5, seconds * 0.9, 3, speed="fast")
            done = await both
            return {
                "idle": quantiles(idle, LEVELS), "fast": quantiles([s for _, s, _ in quick], LEVELS),
                "exact_alone_per_s": alone / (seconds / 2), "exact_beside_per_s": done / (time.perf_counter() - began),
            }  # fmt: skip

        found = with_client(served.url, run)
        text = httpx.get(f"{served.url}/metrics").text
    ticks = {
        line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("counterlens_tick_s")
    }
    found["tick_seconds"] = ticks
    found["goodput_ratio"] = found["exact_beside_per_s"] / found["exact_alone_per_s"]
    return found


async def _loop(client: httpx.AsyncClient, images: list[bytes], end: float) -> float:
    """Exact counterfactuals, two at a time, until then: how many steps of one they come to."""
    done = 0.0

    async def one(offset: int) -> None:
        nonlocal done
        i = offset
        while time.perf_counter() < end:
            left = end - time.perf_counter()
            status, _, answer = await ask(client, images[i % len(images)], speed="exact", budget_s=max(left, 0.1))
            if status == 200 and answer.get("complete"):
                done += 1
            i += 2

    await asyncio.gather(one(0), one(1))
    return done


def aborted(count: int = 500) -> dict[str, Any]:
    """Callers that go away in mid-run: threads, memory and files afterwards, and how soon the slots are free."""
    shown = pictures(8)
    with Served("--slots", "4", "--max-queue", "600") as served:
        with_client(served.url, lambda client: burst(client, shown, speed="exact"))
        before = served.held()

        async def run(client: httpx.AsyncClient) -> None:
            for i in range(0, count, 20):
                tasks = [asyncio.create_task(ask(client, shown[k % 8], speed="exact")) for k in range(20)]
                await asyncio.sleep(0.1 + 0.01 * (i % 7))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        with_client(served.url, run)
        began = time.perf_counter()
        while "counterlens_slots_busy 0.0" not in httpx.get(f"{served.url}/metrics").text:
            time.sleep(0.01)
        free = time.perf_counter() - began
        time.sleep(1)
        return {"count": count, "before": before, "after": served.held(), "free_s": free}


def terminate() -> dict[str, Any]:
    """SIGTERM under load: what became of every request, and the exit code."""
    shown = pictures(32)
    with Served("--slots", "4", "--grace", "30") as served:

        async def run(client: httpx.AsyncClient) -> Counter[str]:
            tasks = [asyncio.create_task(ask(client, image, speed="fast")) for image in shown]
            await asyncio.sleep(0.8)
            served.process.send_signal(signal.SIGTERM)
            later = [asyncio.create_task(ask(client, image, speed="fast")) for image in shown[:8]]
            results = await asyncio.gather(*tasks, *later, return_exceptions=True)
            return Counter(type(r).__name__ if isinstance(r, BaseException) else str(r[0]) for r in results)

        statuses = with_client(served.url, run)
        code = served.process.wait(timeout=60)
    return {"statuses": dict(statuses), "exit_code": code}


def identity(count: int = 200) -> dict[str, Any]:
    """All at once, speeds and modes mixed: `--slots 4` against the engine on four slots, `auto` against it on 16."""
    images = Pack("digits").samples("test", count=count).images
    shown, found = pictures(count), {}
    mix = [{"speed": "fast"}, {"speed": "balanced"}, {"speed": "fast", "mode": "audit"}]
    engine = Engine.from_pack("digits", runtime=RUNTIME[1], config=Config(speed="fast"))

    def reference(slots: int) -> list[Any]:
        made: list[Any] = [None] * count
        for k, fields in enumerate(mix):
            with engine.session(Config(**fields), slots=slots) as session:
                places = {session.submit(images[i]): i for i in range(k, count, len(mix))}
                while session.busy:
                    for result in session.tick():
                        made[places[result.id]] = result
        return made

    async def run(client: httpx.AsyncClient) -> list[Answer]:
        return await asyncio.gather(*(ask(client, shown[i], **mix[i % len(mix)]) for i in range(count)))

    for said, slots in (("4", 4), ("auto", 16)):
        expected = reference(slots)
        with Served("--slots", said, "--max-queue", "256", "--preload-speeds", "fast,balanced") as served:
            answers = with_client(served.url, run)
        bits = predictions = compared = 0
        worst = 0
        for want, (status, _, got) in zip(expected, answers, strict=True):
            if status != 200 or got.get("status") == "skipped" or want.error is not None:
                bits += (want.error is not None) == (got.get("status") == "skipped")
                predictions += (want.error is not None) == (got.get("status") == "skipped")
                compared += 1
                continue
            png_ = torch.frombuffer(bytearray(_pixels(got["image"])), dtype=torch.uint8).reshape(32, 32, 3)
            apart = (png_.int() - to_uint8(want.image).permute(1, 2, 0).int()).abs().max().item()
            worst, compared = max(worst, int(apart)), compared + 1
            bits += apart == 0
            predictions += got["prediction"] == engine.labels[want.prediction]
        found[said] = {
            "count": compared, "equal_bits": bits, "equal_predictions": predictions, "worst_of_255": worst,
            "slots": dict(Counter(str(a.get("slots")) for _, _, a in answers)),
            "statuses": dict(Counter(str(s) for s, _, _ in answers)),
        }  # fmt: skip
    return found


def _pixels(text: str) -> bytes:
    return Image.open(BytesIO(base64.b64decode(text))).convert("RGB").tobytes()


def hostile(cases: int = 2000) -> dict[str, Any]:
    """Everything of `bench.hostile`: nothing is a 500 or shows a traceback, and a good request is answered after it."""
    image = pictures(1)[0]
    with TemporaryDirectory() as folder:
        file = Path(folder, "keys")
        file.write_text("a-key-of-the-bench\n")
        with Served("--slots", "1", "--api-key-file", str(file)) as served:
            let_in = keys(served.url, "a-key-of-the-bench")
    with Served("--slots", "4") as served:
        with_client(served.url, lambda client: burst(client, [image] * 8, speed="fast"))
        before = served.held()
        found = attack(served.url, image, cases)
        time.sleep(6)  # connections that were left open are closed
        status, _, answer = with_client(served.url, lambda client: ask(client, image, speed="fast"))
        after = served.held()
        bad = found.pop("bad") + let_in
        if status != 200:
            bad.append(f"a good request afterwards: {status} {answer}")
        if after["bytes"] > before["bytes"] + MORE_BYTES:
            bad.append(f"memory: {before['bytes']} bytes became {after['bytes']}")
        return found | {"good_after": [status, answer.get("status")], "before": before, "after": after, "bad": bad}


def main(
    sections: Annotated[str, typer.Option(help=f"Of {', '.join(SECTIONS)}.")] = ",".join(SECTIONS),
    minutes: Annotated[float, typer.Option(help="Of overload at three times the capacity.")] = 1.0,
    cases: Annotated[int, typer.Option(help="Of schemathesis, in hostile.")] = 2000,
    record: Annotated[bool, typer.Option("--record", help="Write bench/results/serve-SECTION.json.")] = False,
) -> None:
    """Measure the server of the digits pack; `counterlens export --what all --speed fast` builds artefacts before."""
    given = {"overload": [minutes], "hostile": [cases]}
    ran = {name: partial(globals()[name], *given.get(name, [])) for name in SECTIONS}
    run_sections(sections, ran, "serve", record=record)


if __name__ == "__main__":
    typer.run(main)
