"""The server on Ray: two replicas under load, one of them killed.

`python -m bench.serve_ray [--record]`
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from typing import Annotated, Any

import httpx
import typer

from bench.audit import ray_workers
from bench.record import quantiles, say, write_result
from bench.serve import Served, ask, burst, pictures, with_client

REPLICA = "ServeReplica:counterlens"
LEVELS = (0.5, 0.95, 0.99)


async def asked_twice(client: httpx.AsyncClient, image: bytes, **fields: Any) -> tuple[list[str], float]:
    """What became of a request, and of it once more if its server was gone; and the seconds of both."""
    said, began = [], time.perf_counter()
    for _ in range(2):
        try:
            answer = await client.post("/v1/counterfactuals", files={"image": image}, data=fields)
            said.append(str(answer.status_code))
        except httpx.TransportError as error:
            said.append(type(error).__name__)
        if not said[-1].startswith("5") and said[-1].isdigit():
            break
    return said, time.perf_counter() - began


def killed(served: Served, count: int, rate: float, **fields: Any) -> dict[str, Any]:
    """SIGKILL of one of the replicas amidst `count` requests that come at random times, `rate` a second."""
    shown, chance, before, at = pictures(16), random.Random(7), ready(served), 0.0

    async def run(client: httpx.AsyncClient) -> list[tuple[list[str], float]]:
        nonlocal at
        tasks = []
        for i in range(count):
            tasks.append(asyncio.create_task(asked_twice(client, shown[i % len(shown)], **fields)))
            if i == count // 2:
                os.kill(ray_workers(REPLICA)[0], signal.SIGKILL)
                at = time.perf_counter()
            await asyncio.sleep(chance.expovariate(rate))
        return await asyncio.gather(*tasks)

    answers = with_client(served.url, run)
    return {
        "asked": count, "first": dict(Counter(said[0] for said, _ in answers)),
        "asked_again": sum(len(said) > 1 for said, _ in answers),
        "answered": sum(said[-1] == "200" for said, _ in answers),
        "seconds": quantiles([seconds for _, seconds in answers], LEVELS), "replaced_s": replaced(served, before, at),
    }  # fmt: skip


def ready(served: Served) -> set[str]:
    """Which replicas say that they are ready."""
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return {line.split('"')[1] for line in lines if line.startswith("counterlens_ready{") and line.endswith(" 1.0")}


def replaced(served: Served, before: set[str], since: float) -> float:
    """Seconds until a replica that was not there before is ready."""
    while time.perf_counter() - since < 120 and not ready(served) - before:
        time.sleep(0.1)
    return time.perf_counter() - since


def measure(requests: int = 120) -> dict[str, Any]:
    """Start, idle latency, throughput of two replicas, and a replica that is killed."""
    shown = pictures(64)
    with Served("--ray", "local", "--replicas", "2", "--slots", "8") as served:
        idle = [with_client(served.url, lambda c: ask(c, shown[0], speed="fast"))[1] for _ in range(12)][2:]
        with_client(served.url, lambda c: burst(c, shown[:16], speed="fast"))
        began = time.perf_counter()
        with_client(served.url, lambda c: burst(c, shown, speed="fast"))
        rate = len(shown) / (time.perf_counter() - began)
        result = {
            "replicas": 2, "start_s": served.start_s, "idle": quantiles(idle, LEVELS), "per_second": rate,
            "killed": killed(served, requests, 0.6 * rate, speed="fast"),
        }  # fmt: skip
        began = time.perf_counter()
        served.process.send_signal(signal.SIGTERM)
        code = served.process.wait(timeout=120)
        result |= {"stop_s": time.perf_counter() - began, "exit_code": code, "left": len(ray_workers("ray::"))}
    return result


def main(
    record: Annotated[bool, typer.Option("--record", help="Write bench/results/serve-ray.json.")] = False,
) -> None:
    """Measure; `counterlens export --what all --speed fast` builds artefacts before."""
    say("ray")
    result = measure()
    print(json.dumps(result, indent=1))
    if record:
        write_result("serve-ray", result)


if __name__ == "__main__":
    typer.run(main)
