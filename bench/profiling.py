"""What profiling costs and how much it leaves unexplained: `python -m bench.profiling`.

Five pairs of calls, with and without a recorder in turns; and a profile of the digits pack in eager.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bench.record import RESULTS, in_turns, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.guidance.spans import listening
from counterlens.engine.packs import Pack
from counterlens.engine.profiling.profile import profile
from counterlens.engine.profiling.recorder import Recorder


def main(
    batch: Annotated[int, typer.Option(help="Images per call.", min=1)] = 8,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.", min=1)] = 5,
    record: Annotated[bool, typer.Option(help="Write bench/results/profiling.json.")] = False,
) -> None:
    """Measure the profiler.

    Example: python -m bench.profiling --record
    """
    images = Pack("digits").samples("test", count=max(24, 2 * batch), marker="random").images
    rows: dict[str, Any] = {}
    for gradient in ("exact", "detached"):
        engine = Engine.from_pack("digits", config=Config(gradient=gradient), runtime="eager")

        def plain(engine: Engine = engine) -> None:
            engine.counterfactual(images[:batch])

        def profiled(plain: Callable[[], None] = plain, engine: Engine = engine) -> None:
            with listening(Recorder(engine.device)):
                plain()

        times = in_turns({"plain": plain, "profiled": profiled}, pairs)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        result = profile(engine, images, batch=batch)
        rows[gradient] = {
            "seconds": times,
            "cost_of_profiling": medians["profiled"] / medians["plain"] - 1,
            "unattributed_share": result.unattributed_share,
            "gap_share": result.gap_share,
            "overhead": result.overhead,
            "profile": result.as_json(),
        }
        print(json.dumps({k: v for k, v in rows[gradient].items() if k not in ("profile", "seconds")}))
    if record:
        print(write_result("profiling", {"batch": batch, "rows": rows}).relative_to(RESULTS.parent.parent))


if __name__ == "__main__":
    typer.run(main)
