"""What is decided for GPUs, tried without one: slots by memory, one pass for two predictions, shared memory, parity."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.engine import Engine
from counterlens.engine.config import StepOptions
from counterlens.engine.core import core
from counterlens.engine.guidance.memory import step_bytes, weight_bytes
from counterlens.engine.guidance.pullback import PULLBACK_MODES
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models import attention
from counterlens.engine.runtime.here import LARGER_SLOTS, LAUNCH_BOUND, Replay, Turns, memory_of, slots_on, together
from counterlens.engine.runtime.parity import errors_of_most, own_rounding
from counterlens.engine.runtime.spec import SLOTS, Spec, flat, relative_errors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_slots_are_as_many_as_the_measured_memory_holds(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots_on(CPU, "auto") == SLOTS == slots_on(CUDA, "tensorrt")
    assert slots_on(CUDA, "auto") == SLOTS + LARGER_SLOTS
    assert memory_of(CPU, 10) is None
    assert Engine(*tiny).slots == SLOTS
    engine = Engine(*tiny)
    settings, weights = engine.settings(engine.config), weight_bytes(engine.modules())
    one, two = (step_bytes(*tiny, batch, settings) for batch in (1, 2))
    monkeypatch.setattr(core, "slots_on", lambda device, runtime: SLOTS + LARGER_SLOTS)
    for fits in (1, 4, 32, 64):
        there = weights + one + (fits - 1) * (two - one)
        monkeypatch.setattr(core, "memory_of", lambda device, held, there=there: there)
        assert Engine(*tiny).slots[-1] == fits


def test_free_memory_counts_what_the_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory_of(CUDA, 300) == 300 + 0.8 * 1200


@pytest.mark.parametrize("mode", PULLBACK_MODES)
@torch.no_grad()
def test_both_predictions_in_one_pass_are_the_same_step(tiny64: Any, mode: Any) -> None:
    assert (together(CPU), together(CUDA)) == (0, LAUNCH_BOUND)
    for options in (StepOptions(), StepOptions(reuse_features=2)):
        inputs = [x.double() if x.is_floating_point() else x for x in Spec(*tiny64, options=options).example(3)]
        apart = flat(GuidedStep(*tiny64, options, mode=mode))(*inputs)
        one = flat(GuidedStep(*tiny64, options, mode=mode, together=3))(*inputs)
        for a, b in zip(apart, one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        beyond = flat(GuidedStep(*tiny64, options, mode=mode, together=2))(*inputs)
        assert all(map(torch.equal, apart, beyond))


def test_launches_that_share_memory_take_turns() -> None:
    """Two graphs of one pool: what one holds between its kernels is the other's scratch space."""
    pool, made = torch.zeros(4), [torch.zeros(4), torch.zeros(4)]
    held, turns = [torch.zeros(4), torch.zeros(4)], Turns(CPU)

    def launch(i: int) -> None:
        pool.copy_(held[i])
        time.sleep(0.001)
        made[i].copy_(pool + 10 * i)

    replays = [Replay([held[i]], [made[i]], lambda i=i: launch(i), turns) for i in (0, 1)]
    wrong: list[float] = []

    def call(i: int) -> None:
        for n in range(10):
            value = replays[i](torch.full((4,), float(n)))[0]
            if not (value == n + 10 * i).all():
                wrong.append(n)

    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_locations_that_changed_sides_in_pairs_are_left_out_of_parity() -> None:
    expected = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    got = expected.clone()
    got[0, :, 3, 4] += 0.2
    got[0, :, 9, 9] -= 0.2
    assert errors_of_most(got, expected, 0.005).tolist() == [0, 0]
    assert relative_errors(got, expected)[0] > 0.03
    wrong = expected.clone()
    wrong[1, :, 0] += 0.2  # a row of 32
    assert errors_of_most(wrong, expected, 0.005)[1] > 0.03
    small = expected[..., :4, :4]
    assert torch.equal(errors_of_most(small + 0.1, small, 0.005), relative_errors(small + 0.1, small))  # none of 16
    assert errors_of_most(got * torch.nan, expected, 0.005).isnan().all()


@torch.no_grad()
def test_eager_is_only_so_near_to_itself(tiny: Any) -> None:
    spec = Spec(*tiny, options=StepOptions(gradient="detached"), dtype="bf16")
    eager, inputs = spec.function(), spec.example(2)
    expected = eager(*inputs)
    rounding = own_rounding(spec, eager, inputs, expected)
    assert 0 <= rounding < 0.2

    def rounds_otherwise(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * (1 + 0.01 * (len(given[0]) > 2)) if x.ndim == 4 else x for x in expected_of(given))

    def expected_of(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.cat([x, x]) if len(given[0]) > 2 else x for x in expected)

    assert own_rounding(spec, rounds_otherwise, inputs, expected) == pytest.approx(0.01, rel=0.1)


def test_all_reasons_of_xformers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "No operator found for `memory_efficient_attention_forward` with inputs:\n"
        "     query       : shape=(1, 64, 8, 40) (torch.float16)\n     p           : 0.0\n"
        "`fa2F@2.5.7` is not supported because:\n    xFormers wasn't build with CUDA support\n"
        "    operator wasn't built - see `python -m xformers.info` for more info\n"
        "`cutlassF-pt` is not supported because:\n    xFormers wasn't build with CUDA support\n"
    )

    def refuse(*args: Any) -> Tensor:
        raise NotImplementedError(told)

    missing = OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
    lib = SimpleNamespace(_cpp_library_load_exception=missing)
    ops = SimpleNamespace(memory_efficient_attention=refuse)
    fake = SimpleNamespace(ops=ops, __version__="0.0.35", _cpp_lib=lib, __path__=[])
    for name, module in (("xformers", fake), ("xformers.ops", ops), ("xformers._cpp_lib", lib)):
        monkeypatch.setitem(__import__("sys").modules, name, module)
    operators, library = attention._operator_reasons(torch.zeros(1))
    wanted = "xFormers wasn't build with CUDA support"
    assert operators.startswith("xformers 0.0.35 has no operator here: No operator found for `memory_efficient_")
    assert operators.endswith(
        f"p           : 0.0; `fa2F@2.5.7`: {wanted}, operator wasn't built - see `python -m xformers.info` for more "
        f"info; `cutlassF-pt`: {wanted}"
    )
    assert "libcudart.so.12" in library
    assert library.endswith("; pip install nvidia-cuda-runtime-cu12 and put its lib folder on LD_LIBRARY_PATH)")
