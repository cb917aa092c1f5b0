"""Steps that take features or gradients from an earlier one: what they compute, in slots, and where it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.engine import Config, Engine
from counterlens.engine.config import StepOptions
from counterlens.engine.core.whole_run import counterfactual_program
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.jobs import Job, reused_kinds
from counterlens.engine.guidance.pullback import PULLBACK_MODES
from counterlens.engine.guidance.step import CARRIED, GuidedStep, carried_names
from counterlens.engine.models.deep import no_deep_features
from counterlens.engine.models.load import open_diffusion
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack
from counterlens.engine.runtime.spec import Spec, flat
from tests.engine.guidance.test_slots import run
from tests.tiny import LABELS, save_dit, save_ldm, save_stable_diffusion
from tests.tiny_generators import save_sdxl

NUMBERS = {
    "steps": 6, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
    "gradient": "detached", "spacing": "trailing",
}  # fmt: skip
REUSE: dict[str, Any] = {"reuse_features": 2, "reuse_gradients": 3}
KINDS: list[dict[str, Any]] = [
    {"steps": 5}, {"steps": 3, "solver": "dpm++"}, {"steps": 7, "noise": "inversion"},
    {"steps": 6, "guidance_start": 0.3, "guidance_end": 0.9},
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[Engine]:
    made = Engine(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS}, runtime="eager")
    with made.frozen():
        yield made


def job(engine: Engine, number: int, **more: Any) -> Job:
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    settings = engine.settings(Config(**(KINDS[number % len(KINDS)] | REUSE | more)))
    return Job(images[number], number, number, settings)


def opened(name: str, folder: Path) -> Any:
    save = {"sd": save_stable_diffusion, "ldm": save_ldm, "sdxl": save_sdxl}
    if name in save:
        diffusion = open_diffusion(save[name](folder / name), image_size=None if name == "ldm" else 16)
        diffusion.describe(LABELS)
        return diffusion
    return Pack("digits").diffusion(plain=name == "plain")


@pytest.mark.parametrize("name", ["plain", "digits", "sd", "ldm", "sdxl"])
@torch.no_grad()
def test_a_unet_in_two_pieces_says_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    diffusion = opened(name, tmp_path)
    z, t = torch.randn(2, *diffusion.latent_shape), torch.tensor([301, 500])
    condition = diffusion.condition(torch.tensor([3, 7]))
    expected = diffusion.answer(z, t, condition)
    said, deep = diffusion.answer_reusing(z, t, condition)
    assert torch.equal(said, expected)
    assert torch.equal(diffusion.answer_reusing(z, t, condition, deep)[0], expected)
    other = diffusion.answer_reusing(z, t, condition, deep.roll(1, 0))[0]
    assert not torch.equal(other, expected)
    assert deep.shape[0] == 2
    assert deep.shape[1] > z.shape[1]


@pytest.mark.parametrize("mode", PULLBACK_MODES)
@pytest.mark.parametrize("gradient", ["exact", "detached"])
@torch.no_grad()
def test_a_step_that_reuses_its_own_is_the_same_step(tiny64: Any, gradient: str, mode: Any) -> None:
    options = StepOptions(gradient=gradient, reuse_features=2, reuse_gradients=2)  # type: ignore[arg-type]
    inputs = [x.double() if x.is_floating_point() else x for x in Spec(*tiny64, options=options).example(3)]
    plain = flat(GuidedStep(*tiny64, StepOptions(gradient=gradient), mode=mode))(*inputs)  # type: ignore[arg-type]
    z_prev, z0, kept, *made = flat(GuidedStep(*tiny64, options, mode=mode))(*inputs)
    assert all(map(torch.equal, plain, (z_prev, z0, kept)))
    named = dict(zip(carried_names(options.reuses), made, strict=True))
    for reused in (("features",), ("gradients",), ("features", "gradients")):
        step = flat(GuidedStep(*tiny64, options, reused=reused, mode=mode))
        again = step(*inputs, *(named[name] for name in carried_names(reused)))
        left = [named[n] for kind in options.reuses if kind not in reused for n in CARRIED[kind]]
        for got, expected in zip(again, [z_prev, z0, kept, *left], strict=True):
            if gradient == "exact" and reused == ("features",):
                assert got.shape == expected.shape  # the Jacobian is the outermost level's alone
            else:
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_which_steps_reuse_what() -> None:
    settings = Config(mode="official", **REUSE).settings({})
    plan = reused_kinds(settings, [False, *[True] * 7, False])
    both, features, gradients = ("features", "gradients"), ("features",), ("gradients",)
    assert plan == [(), (), both, gradients, features, gradients, both, (), ()]


@torch.no_grad()
def test_a_run_is_what_a_swapped_hidden_state_makes_of_it(tiny: Any, engine: Engine) -> None:
    """The UNet's own forward pass, whose last level is handed the hidden state of an earlier call."""
    diffusion, _ = tiny
    settings = engine.settings(Config(steps=5, reuse_features=2))
    one = Job(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(5)), 3, 1, settings)
    got = run(engine.sampler(Config(reuse_features=2), slots=1), [one])[0]
    held: list[Tensor] = []
    calls = 0

    def swap(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2:
            held[:] = [given[0]]
        return (held[0], *given[1:]), named

    hook = diffusion.denoiser.up_blocks[-1].register_forward_pre_hook(swap, with_kwargs=True)
    try:
        plain = Engine(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS}, runtime="eager")
        other = engine.settings(Config(steps=5))
        with plain.frozen():
            expected = run(plain.sampler(slots=1), [Job(one.image, one.target, one.seed, other)])[0]
    finally:
        hook.remove()
    assert calls == 5  # both conditions are one batch
    torch.testing.assert_close(got.z, expected.z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("live", [False, True])
def test_samples_that_reuse_are_the_same_bits_beside_any_neighbours(engine: Engine, live: bool) -> None:
    """Samples of four lengths come and go in three slots, one is cancelled: nobody takes another's features."""
    config = Config(**REUSE)
    alone = [run(engine.sampler(config, slots=3), [job(engine, i)])[0] for i in range(8)]
    sampler = engine.sampler(config, slots=3)
    sampler.live = live
    together = run(sampler, [job(engine, i) for i in range(8)], lambda ticks: ticks == 2 and sampler.cancel(1))
    assert sorted(together) == [0, 2, 3, 4, 5, 6, 7]
    for i, outcome in together.items():
        assert outcome.error is None
        assert torch.equal(outcome.image, alone[i].image), i


def test_steps_of_several_kinds_in_one_tick_keep_apart(engine: Engine) -> None:
    """A sample placed between the others' whole steps by hand: each still gets what its own step needs."""
    config = Config(**REUSE)
    alone = [run(engine.sampler(config, slots=3), [job(engine, i)])[0] for i in range(3)]
    sampler = engine.sampler(config, slots=3)
    cls = type("Eager", (type(sampler),), {"_has_place": property(lambda self: None in self._running)})
    sampler.__class__ = cls
    sampler.submit(job(engine, 0))
    out = {o.id: o for o in sampler.tick()}
    for i in (1, 2):
        sampler.submit(job(engine, i))
        out |= {o.id: o for o in sampler.tick()}
    while sampler.busy:
        out |= {o.id: o for o in sampler.tick()}
    for i in range(3):
        assert torch.equal(out[i].image, alone[i].image), i


def test_it_changes_a_run_and_less_often_more(engine: Engine) -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    target = (engine.probabilities(images).argmax(1) + 1) % 10

    def made(**fields: Any) -> Tensor:
        return engine.counterfactual(images, target, config=Config(steps=9, **fields)).images

    plain = made()
    assert torch.equal(made(reuse_features=1, reuse_gradients=1), plain)
    for name in ("reuse_features", "reuse_gradients"):
        assert not torch.equal(made(**{name: 2}), plain)


def test_compiled_steps_agree(tiny: Any, tmp_path: Path, engine: Engine) -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    target = (engine.probabilities(images).argmax(1) + 1) % 10
    config = Config(steps=5, reuse_features=2, reuse_gradients=2)
    tuned = {"realistic": NUMBERS, "audit": NUMBERS}
    compiled = Engine(*tiny, config, pack_settings=tuned, runtime="onnxruntime", store=tmp_path)
    got = compiled.counterfactual(images, target)
    assert len(list(tmp_path.glob("*/model.onnx"))) == 2
    expected = engine.counterfactual(images, target, config=config)
    close = (got.images - expected.images).abs().flatten(1).amax(1) < 1e-4
    assert close.double().mean() >= 0.75
    assert got.flipped.tolist() == expected.flipped.tolist()
    taken = compiled.runners.taken(compiled.settings(config), [4])
    assert taken["guided-step-reusing-features-gradients"] == {"4": "onnxruntime"}


def test_what_cannot_reuse_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    dit = open_diffusion(save_dit(tmp_path / "dit"))
    assert "this model's denoiser is a DiTTransformer2DModel" in str(no_deep_features(dit))
    dit.describe(LABELS)
    other = Engine(dit, SoftmaxClassifier(engine.classifier.module, LABELS))
    with pytest.raises(UsageError, match=r"^reuse_features: deep features are those of a UNet.*DiT.*leave it out"):
        other.settings(Config(reuse_features=2))
    other.settings(Config(reuse_gradients=2))
    with pytest.raises(UsageError, match=r"^reuse_gradients: with guidance_every 2 .*give one of both"):
        engine.settings(Config(reuse_gradients=2, guidance_every=2))
    with pytest.raises(UsageError, match=r"^reuse_features: a file of the whole run"):
        counterfactual_program(engine, engine.settings(Config(reuse_features=3)))
    with pytest.raises(UsageError, match=r"^region: auto .* leave reuse_features out"):
        engine.counterfactual(torch.rand(1, 3, 16, 16), 3, config=Config(reuse_features=2, region="auto"))
    with pytest.raises(UsageError, match=r"^reuse_features: samples in the same slots"):
        engine.sampler(slots=2).submit(job(engine, 0, reuse_gradients=1))
