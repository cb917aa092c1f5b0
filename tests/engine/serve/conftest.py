"""One engine of tiny models, its worker and its application, for the tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from counterlens.engine.core.core import EngineCore
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.guard import Limits
from counterlens.engine.serve.worker import Worker
from tests.engine.serve.test_worker import NUMBERS, working


@pytest.fixture(scope="package")
def engine(tiny: Any) -> EngineCore:
    made = EngineCore(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS}, runtime="eager")
    made.names = {"model": "tiny"}
    return made


@pytest.fixture(scope="module")
def worker(engine: EngineCore) -> Iterator[Worker]:
    with working(engine, slots=2, max_queue=8) as made:
        yield made


@pytest.fixture(scope="module")
def client(engine: EngineCore, worker: Worker) -> Iterator[TestClient]:
    limits = Limits(body_bytes=100_000, body_seconds=2, pixels=10_000)
    with TestClient(make_app(engine, worker, limits=limits), raise_server_exceptions=False) as made:
        yield made
