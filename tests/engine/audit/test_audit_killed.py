"""Audits whose processes are killed: ours by SIGKILL, Ray's workers in the middle of the work."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench.audit import ray_workers
from counterlens.engine.audit.results import Results
from tests.audit_child import audit
from tests.engine.audit.test_audit import comparable
from tests.engine.images.test_sources import save

ROOT = Path(__file__).parents[3]
COUNT = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    for i in range(COUNT):
        save(folder / str(i % 3) / f"{i}.png", i)
    return folder


@pytest.fixture(scope="module")
def unbroken(source: Path, tmp_path_factory) -> Results:
    out = tmp_path_factory.mktemp("unbroken")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    audit(str(source), str(out))
    torch.set_num_threads(threads)
    return Results.open(out)


@pytest.mark.slow
def test_killed_at_random_instants(source: Path, unbroken: Results, tmp_path: Path) -> None:
    """`python -m bench.audit kill` does the same 20 times with 300 digits."""
    command = [sys.executable, "-m", "tests.audit_child", str(source), str(tmp_path / "out")]
    rng = random.Random(7)
    done = []
    for _ in range(3):
        before = len(list((tmp_path / "out").glob("rows/*/*.parquet")))
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        while process.poll() is None and len(list((tmp_path / "out").glob("rows/*/*.parquet"))) == before:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        done.append(len(list((tmp_path / "out").glob("rows/*/*.parquet"))))
    assert done[0] < COUNT // 2  # killed before the end
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0
    assert comparable(Results.open(tmp_path / "out")) == comparable(unbroken)


@pytest.mark.slow
def test_ray_with_a_killed_worker(source: Path, unbroken: Results, tmp_path: Path, monkeypatch) -> None:
    """Two actors; one is killed as soon as a part is written. The same rows, nothing lost or doubled."""
    ray = pytest.importorskip("ray", reason="needs ray[data]")
    pytest.importorskip("ray.data", reason="needs ray[data]")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    killed: list[int] = []

    def kill_one() -> None:
        while not list((tmp_path / "out").glob("rows/*/*.parquet")):
            time.sleep(0.05)
        killed.append(ray_workers()[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        audit(str(source), str(tmp_path / "out"), ray="local", workers=2)
    finally:
        torch.set_num_threads(threads)
        killer.join()
        ray.shutdown()
    assert killed
    assert comparable(Results.open(tmp_path / "out")) == comparable(unbroken)
