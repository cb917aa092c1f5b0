"""Many callers at once over real HTTP: each gets the engine's own bits, whoever is beside it."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from typing import Any

import httpx
import pytest

from counterlens.engine import Engine
from counterlens.engine.config import Config
from counterlens.engine.images.files import to_uint8
from counterlens.engine.packs import Pack
from counterlens.engine.serve.app import make_app
from counterlens.engine.serve.wire import png
from tests.engine.serve.test_connection import listening
from tests.engine.serve.test_http import pixels
from tests.engine.serve.test_worker import working

KINDS: list[dict[str, Any]] = [
    {"speed": "fast", "steps": 3}, {"speed": "balanced", "steps": 4}, {"speed": "fast", "mode": "audit", "steps": 3},
    {"speed": "turbo", "steps": 2},
]  # fmt: skip


@pytest.mark.slow
def test_each_of_many_callers_gets_the_bits_of_the_engine_on_as_many_slots() -> None:
    """Speeds, modes, seeds and targets by chance; they arrive in another order than the engine had them."""
    engine = Engine.from_pack("digits", config=Config(speed="fast"), runtime="eager")
    chance, count = random.Random(11), 24
    shown = Pack("digits").samples("test", count=count).images
    kinds = [chance.choice(KINDS) | {"seed": chance.randrange(4)} for _ in shown]
    targets = [chance.choice(engine.labels) for _ in shown]
    expected: dict[int, Any] = {}
    for kind in KINDS:
        with engine.session(Config(**kind), slots=4) as session:
            mine = [i for i in range(count) if kinds[i] | {"seed": 0} == kind | {"seed": 0}]
            places = {session.submit(shown[i], targets[i], config=Config(**kinds[i])): i for i in mine}
            while session.busy:
                expected |= {places[done.id]: done for done in session.tick()}
    assert len(expected) == count
    order = chance.sample(range(count), count)

    async def all_at_once(port: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:

            async def one(i: int) -> httpx.Response:
                fields = {k: v for k, v in kinds[i].items() if k != "steps"} | {"target": targets[i]}
                config = json.dumps({"steps": kinds[i]["steps"]})
                return await client.post(
                    "/v1/counterfactuals", files={"image": png(shown[i])}, data=fields | {"config": config}
                )

            return await asyncio.gather(*(one(i) for i in order))

    with working(engine, slots=4) as worker, listening(make_app(engine, worker)) as port:
        answers = dict(zip(order, asyncio.run(all_at_once(port)), strict=True))
    for i, want in expected.items():
        got = answers[i].json()
        assert answers[i].status_code == 200, got
        record = want.record()
        assert {k: got[k] for k in record if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}
        assert got["slots"] == 4
        if want.error is None:
            same = pixels(base64.b64decode(got["image"])) == to_uint8(want.image).permute(1, 2, 0).numpy()
            assert same.all(), (i, kinds[i])
    assert sum(want.error is None for want in expected.values()) >= 18  # the others are the target already
