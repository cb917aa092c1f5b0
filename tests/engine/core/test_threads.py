"""Calls from several threads at once: each gives what it gives alone, and the models come out as they went in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_processor
from PIL import Image
from torch import Tensor, nn

from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.memory import checkpointed
from counterlens.engine.guidance.spans import listening, span
from counterlens.engine.images.files import load_image
from counterlens.engine.models.attention import memory_efficient_attention
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.holding import Shared
from counterlens.engine.models.placing import full_precision
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.saliency.taps import tapped
from tests.conftest import LABELS, make_tiny

CONFIG = Config.make(steps=8, strength=0.5, filter="zero")
WAIT = 60  # seconds, for the other thread


class Normed(nn.Module):
    """A classifier with batch norms, which are made right while it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
        self.head = nn.Linear(8, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def models() -> tuple[Any, SoftmaxClassifier]:
    """Models as somebody trains them: in training mode, with gradients."""
    diffusion, _ = make_tiny()
    module = Normed()
    for part in (*diffusion.modules(), module):
        part.train().requires_grad_(True)
    return diffusion, SoftmaxClassifier(module, LABELS)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def state(*modules: nn.Module) -> list[Any]:
    """All that an engine changes of modules."""
    parts = [m for module in modules for m in module.modules()]
    return [
        (m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks), [p.requires_grad for p in m.parameters()],
         *(vars(m).get(name) for name in ("processor", "gradient_checkpointing", "_gradient_checkpointing_func")))
        for m in parts
    ]  # fmt: skip


def overlapping(
    first: AbstractContextManager[Any], second: AbstractContextManager[Any], between: Callable[[], Any]
) -> Any:
    """Enter the first, then the second in another thread; leave the first; then ask `between` there."""
    inside, left = Event(), Event()

    def other() -> Any:
        with second:
            inside.set()
            assert left.wait(WAIT)
            return between()

    with ThreadPoolExecutor(1) as pool:
        with first:
            answer = pool.submit(other)
            assert inside.wait(WAIT)
        left.set()
        return answer.result(WAIT)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The calls' results, each in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result(WAIT) for f in [pool.submit(call) for call in calls]]


def meeting(parties: int) -> Callable[[int, int], None]:
    """An `on_step` that waits for the others: no call runs ahead."""
    barrier = Barrier(parties)
    return lambda step, total: (barrier.wait(WAIT), None)[1]


def test_frozen_modules_stay_frozen_until_the_last_has_left(models: Any) -> None:
    module = models[1].module
    before = state(module)

    def held() -> tuple[bool, bool, int]:
        hooks = sum(len(m._forward_hooks) for m in module.modules())
        return any(m.training for m in module.modules()), any(p.requires_grad for p in module.parameters()), hooks

    assert overlapping(frozen(module), frozen(module), held) == (False, False, 1)
    assert state(module) == before
    # A part of it beside the whole.
    assert overlapping(frozen(module.body), frozen(module), held) == (False, False, 1)
    assert state(module) == before


def test_parts_that_were_frozen_before_stay_so(models: Any) -> None:
    module = models[1].module
    module.body.eval()
    module.head.requires_grad_(False)
    before = state(module)
    overlapping(frozen(module), frozen(module), lambda: None)
    assert state(module) == before


def test_checkpointing_is_on_in_its_own_thread_alone_and_ends(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from counterlens.engine.guidance import memory

    diffusion, calls = models[0], []
    real = memory.checkpoint
    monkeypatch.setattr(memory, "checkpoint", lambda run, *a, **k: (calls.append(1), real(run, *a, **k))[1])
    before = state(*diffusion.modules())

    def decode() -> int:
        calls.clear()
        diffusion.decode(torch.zeros(1, 4, 4, 4))
        return len(calls)

    assert decode() == 0
    assert overlapping(checkpointed(diffusion.modules()), checkpointed(diffusion.modules()), decode) > 0
    assert state(*diffusion.modules()) == before
    with checkpointed(diffusion.modules()):
        assert at_once(decode) == [0]
        assert decode() > 0
    assert decode() == 0


def test_xformers_is_on_in_its_own_thread_alone_and_ends(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = models[0]
    used: list[str] = []
    for name in ("XFormersAttnProcessor", "AttnProcessor2_0"):

        def call(self: Any, attn: Any, hidden_states: Tensor, *args: Any, name: str = name, **kwargs: Any) -> Tensor:
            used.append(name)
            return hidden_states

        monkeypatch.setattr(getattr(attention_processor, name), "__call__", call)
    before = state(*diffusion.modules())

    def predict() -> set[str]:
        used.clear()
        diffusion.predict_noise(torch.zeros(1, 4, 4, 4), torch.tensor([3]), diffusion.null_condition(1))
        return set(used)

    held = [memory_efficient_attention(diffusion.modules()) for _ in range(2)]
    assert overlapping(*held, predict) == {"XFormersAttnProcessor"}
    assert state(*diffusion.modules()) == before
    with memory_efficient_attention(diffusion.modules()):
        assert at_once(predict) == [{"AttnProcessor2_0"}]
    assert predict() == {"AttnProcessor2_0"}


def test_convolutions_stay_exact_until_the_last_has_left() -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "tf32"
    try:
        assert overlapping(full_precision(), full_precision(), lambda: conv.fp32_precision) != "tf32"
        assert conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision = before


def test_a_change_that_fails_takes_back_the_others() -> None:
    undone: list[str] = []

    def change(name: str) -> Callable[[], None]:
        if name == "third":
            raise ValueError(name)
        return lambda: undone.append(name)

    hold = Shared(change)
    first, second, third = "first", "second", "third"
    with hold([first]):
        with pytest.raises(ValueError, match="third"), hold([first, second, third]):
            pass
        assert undone == ["second"]
    assert undone == ["second", "first"]


def test_spans_are_told_to_the_listener_of_their_thread() -> None:
    class Names:
        def __init__(self) -> None:
            self.names: list[str] = []

        @contextmanager
        def span(self, name: str) -> Iterator[None]:
            self.names.append(name)
            yield

    mine, barrier = [Names(), Names()], Barrier(2)

    def listen(i: int) -> None:
        with listening(mine[i]):
            barrier.wait(WAIT)
            with span(f"of {i}"):
                barrier.wait(WAIT)

    at_once(lambda: listen(0), lambda: listen(1))
    assert [m.names for m in mine] == [["of 0"], ["of 1"]]
    with span("of nobody"):
        pass


def test_features_are_those_of_the_threads_own_pass(models: Any) -> None:
    module, barrier = models[1].module.eval(), Barrier(2)
    inputs = [torch.full((1, 3, 16, 16), v) for v in (0.2, 0.8)]

    def features(x: Tensor) -> Tensor:
        with torch.no_grad(), tapped(module, ["body.0"]) as held:
            barrier.wait(WAIT)
            module(x)
            barrier.wait(WAIT)
            return held[0]

    found = at_once(*(lambda x=x: features(x) for x in inputs))
    for x, feature in zip(inputs, found, strict=True):
        assert torch.equal(feature, module.body[0](x))


def test_one_engine_in_two_threads_gives_what_it_gives_in_one(models: Any, images: Tensor) -> None:
    engine = Engine(*models, CONFIG, runtime="eager")
    modules = (*engine.diffusion.modules(), engine.classifier.module)
    before = state(*modules)
    halves = [(images, "runner-up"), (images.flip(3), "runner-up")]
    alone = [engine.counterfactual(x, t) for x, t in halves]
    meet = meeting(2)
    beside = at_once(*(lambda x=x, t=t: engine.counterfactual(x, t, on_step=meet) for x, t in halves))
    for a, b in zip(alone, beside, strict=True):
        assert a.errors == b.errors == [None, None]
        assert torch.equal(a.images, b.images)
        assert a.images.ne(a.inputs).any()
        torch.testing.assert_close(a.kept_fraction, b.kept_fraction, rtol=0, atol=0, equal_nan=True)
    assert state(*modules) == before


def test_two_engines_with_the_same_models_do_not_disturb_each_other(models: Any, images: Tensor) -> None:
    """One recomputes its activations, which the pullback of the other could not be differentiated with."""
    engines = [Engine(*models, CONFIG, runtime="eager", checkpointing=c) for c in (False, True)]
    modules = (*models[0].modules(), models[1].module)
    before = state(*modules)
    alone = [e.counterfactual(images, "runner-up").images for e in engines]
    meet = meeting(2)
    beside = at_once(*(lambda e=e: e.counterfactual(images, "runner-up", on_step=meet).images for e in engines))
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert state(*modules) == before


@pytest.mark.parametrize("method", ["rise", "gradcam"])
def test_explain_beside_a_counterfactual(models: Any, images: Tensor, method: str) -> None:
    engine = Engine(*models, CONFIG, runtime="eager")
    modules = (*engine.diffusion.modules(), engine.classifier.module)
    before = state(*modules)
    maps = engine.explain(images, method=method).saliency
    changed = engine.counterfactual(images, "runner-up").images
    begun, done = Event(), Event()

    def explain() -> Tensor:
        assert begun.wait(WAIT)
        try:
            return engine.explain(images, method=method).saliency
        finally:
            done.set()

    def step(n: int, total: int) -> None:
        begun.set()
        if n == total - 1:  # the explanation begins and ends within the run
            assert done.wait(WAIT)

    beside, again = at_once(explain, lambda: engine.counterfactual(images, "runner-up", on_step=step).images)
    assert torch.equal(maps, beside)
    assert torch.equal(changed, again)
    assert state(*modules) == before


def test_a_thread_that_fails_leaves_nothing_behind(models: Any, images: Tensor) -> None:
    engine = Engine(*models, CONFIG, runtime="eager")
    modules = (*engine.diffusion.modules(), engine.classifier.module)
    before = state(*modules)
    alone = engine.counterfactual(images, "runner-up").images
    begun, failed = Event(), Event()

    def fail(n: int, total: int) -> None:
        if n == 2:
            assert begun.wait(WAIT)
            raise ArithmeticError("mine")

    def failing() -> None:
        try:
            with pytest.raises(ArithmeticError, match="mine"):
                engine.counterfactual(images, "runner-up", on_step=fail)
        finally:
            failed.set()

    def step(n: int, total: int) -> None:
        begun.set()
        if n == 1:
            assert failed.wait(WAIT)

    _, beside = at_once(failing, lambda: engine.counterfactual(images, "runner-up", on_step=step).images)
    assert torch.equal(alone, beside)
    assert state(*modules) == before


def test_files_are_read_in_eight_threads(tmp_path: Path) -> None:
    """Each warns of its own several pictures, and nobody's filters are changed."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(8):
        pictures = [Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)) for _ in range(2)]
        paths.append(tmp_path / f"{i}.gif")
        pictures[0].save(paths[-1], save_all=True, append_images=pictures[1:])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        alone = [load_image(path, 16) for path in paths]
        assert len(said) == 8
        said.clear()
        for _ in range(5):
            together = at_once(*(lambda p=p: load_image(p, 16) for p in paths))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        assert warnings.filters == filters
        assert len(said) == 40
        assert {str(w.message).split(":")[0] for w in said} == {str(p) for p in paths}


def test_a_second_audit_in_the_process_is_refused(tmp_path: Path, models: Any) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for i in range(2):
        save = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(save).save(source / f"{i}.png")
    engine = Engine(*models, CONFIG, runtime="eager")
    threads, refused = torch.get_num_threads(), []

    def second(progress: Any, fraction: float) -> None:
        if not refused:
            with pytest.raises(UsageError, match=r"^audit: another one runs in this process") as caught:
                engine.audit(source, tmp_path / "other")
            refused.append(str(caught.value))

    results = engine.audit(source, tmp_path / "out", on_progress=second)
    assert len(list(results.rows())) == 2
    assert len(refused) == 1
    assert "\n" not in refused[0]
    assert torch.get_num_threads() == threads
    assert len(list(engine.audit(source, tmp_path / "other").rows())) == 2
