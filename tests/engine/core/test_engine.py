"""The Engine on tiny random models: measures, failures, and independence of a sample's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from counterlens.engine.config import Config, Settings
from counterlens.engine.core.result import image_seed
from counterlens.engine.core.session import padded_batches
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.jobs import seeded_noise
from counterlens.engine.guidance.sampler import invert, sample
from counterlens.engine.guidance.schedule import ddim, make_schedule
from counterlens.engine.images.files import as_saved, load_image
from counterlens.engine.models.protocols import SoftmaxClassifier

SETTINGS = {
    "steps": 8, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
}  # fmt: skip


def make_engine(tiny, **config) -> Engine:
    return Engine(*tiny, Config(**config), pack_settings={"realistic": SETTINGS, "audit": SETTINGS | {"angle": 90}})


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_result_is_measured_on_the_saved_file(tiny, tmp_path: Path) -> None:
    engine = make_engine(tiny)
    x = as_saved(images(5))
    result = engine.counterfactual(x)
    assert result.images.shape == (5, 3, 16, 16)
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.kept_fraction.shape == (5, 4)
    assert ((result.kept_fraction > 0) & (result.kept_fraction < 1)).any()
    second = engine.probabilities(x).topk(2).indices[:, 1]
    assert torch.equal(result.target, second)
    for i, path in enumerate(result.save(tmp_path / "out")):
        back = load_image(path, 16)
        torch.testing.assert_close(result.l1[i], (back - x[i]).abs().mean())
        torch.testing.assert_close(result.l2[i], (back - x[i]).square().mean().sqrt())
        p = engine.probabilities(back[None])[0]
        assert int(p.argmax()) == int(result.prediction[i])
        torch.testing.assert_close(p.max(), result.confidence[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(p[result.target[i]], result.target_confidence[i], atol=1e-5, rtol=0)
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [r["path"] for r in records] == [f"{i:04d}.png" for i in range(5)]


def test_bit_identical_in_any_place_and_neighbourhood(tiny) -> None:
    """Sixteen samples, then one of them in every place among others: the same bits."""
    engine = make_engine(tiny)
    x = images(47)
    expected = engine.counterfactual(x[:16]).images[3]
    for place in range(16):
        others = x[16 + place : 31 + place]
        batch = torch.cat([others[:place], x[3:4], others[place:]])
        assert torch.equal(engine.counterfactual(batch).images[place], expected), place


def test_padding_keeps_the_bits(tiny) -> None:
    """Five samples are padded to the same eight slots as eight samples."""
    engine = make_engine(tiny)
    x = images(8)
    assert torch.equal(engine.counterfactual(x[:5]).images, engine.counterfactual(x).images[:5])


def test_batches_cover_every_row_once() -> None:
    for count in (0, 1, 2, 3, 5, 15, 16, 17, 40):
        batches = padded_batches(count)
        assert [r for rows, n in batches for r in rows[:n]] == list(range(count))
        assert {len(rows) for rows, _ in batches} <= {1, 2, 4, 8, 16}


def test_seed_comes_from_the_pixels(tiny) -> None:
    x = images(2)
    assert image_seed(x[0], 0) != image_seed(x[1], 0)
    assert image_seed(x[0], 0) != image_seed(x[0], 1)
    engine = make_engine(tiny)
    given = engine.counterfactual(x, seeds=[7, 8])
    assert given.seeds == [7, 8]
    assert not torch.equal(given.images, engine.counterfactual(x).images)


def test_a_sample_with_nan_stops_and_the_others_go_on(tiny) -> None:
    diffusion, classifier = tiny
    x = images(4)

    class Sick(torch.nn.Module):
        """Returns NaN for the third sample's batch row once guidance has begun."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = classifier.module, 0

        def forward(self, image: Tensor) -> Tensor:
            self.calls += 1
            logits = self.inner(image)
            if self.calls == 4:  # predictions, then the third step
                sick = torch.zeros(len(image), 1)
                sick[2] = torch.nan
                logits = logits + sick
            return logits

    tuned = {"realistic": SETTINGS, "audit": SETTINGS}
    engine = Engine(diffusion, SoftmaxClassifier(Sick(), classifier.labels), pack_settings=tuned)
    result = engine.counterfactual(x)
    healthy = make_engine(tiny).counterfactual(x)
    assert result.errors[2] == "the model returned NaN or infinite values at step 3 of 4"
    assert [e is None for e in result.errors] == [True, True, False, True]
    assert torch.equal(result.images[[0, 1, 3]], healthy.images[[0, 1, 3]])
    assert not result.flipped[2]
    assert result.l1[2].isnan()
    assert int(result.prediction[2]) == -1
    assert result.kept_fraction[2].isfinite().tolist() == [True, True, False, False]


def test_target_that_is_already_predicted_is_reported(tiny) -> None:
    engine = make_engine(tiny)
    x = images(3)
    predicted = engine.probabilities(x).argmax(1).tolist()
    other = (predicted[1] + 1) % 10
    result = engine.counterfactual(x, [predicted[0], other, str(predicted[2])])
    assert [e is None for e in result.errors] == [False, True, False]
    assert "already the prediction" in str(result.errors[0])
    assert [result.status(i) for i in range(3)] == ["skipped", "done", "skipped"]
    assert torch.equal(result.images[0], x[0])


def test_nan_input_is_reported(tiny) -> None:
    x = images(2)
    x[1, 0, 0, 0] = torch.nan
    result = make_engine(tiny).counterfactual(x)
    assert result.errors[0] is None
    assert "NaN" in str(result.errors[1])
    said = int(result.source[1])
    again = make_engine(tiny).counterfactual(x, [int(result.target[0]), max(said, 0)])
    assert [again.status(i) for i in range(2)] == ["done", "failed"]  # whatever its prediction is


def test_bad_arguments_are_named(tiny) -> None:
    engine = make_engine(tiny)
    x = images(2)
    for arguments, name in [
        ((images(2)[:, :, :8],), "images"),
        ((x * 2,), "images"),
        (((x * 255).byte(),), "images"),
        ((x, "eleven"), "target"),
        ((x, 10), "target"),
        ((x, [1]), "targets"),
        ((x, "runner-up", [1]), "seeds"),
    ]:
        with pytest.raises(UsageError, match=f"^{name}:"):
            engine.counterfactual(*arguments)
    with pytest.raises(UsageError, match="labels"):
        Engine(tiny[0], SoftmaxClassifier(tiny[1].module, ["a", "b"]), pack_settings={})


def test_a_config_for_another_classifier_is_refused(tiny) -> None:
    source = {"pack": "digits", "classifier": "clean"}
    engine = Engine(*tiny, pack_settings={"realistic": SETTINGS}, source=source)
    with pytest.raises(UsageError, match=r"^classifier:.*'clean'.*'shortcut'"):
        engine.counterfactual(images(1), config=Config(classifier="shortcut"))
    assert len(engine.counterfactual(images(1), config=Config(classifier="clean"))) == 1


def test_no_images_is_no_error(tiny) -> None:
    result = make_engine(tiny).counterfactual(images(0))
    assert result.images.shape == (0, 3, 16, 16)
    assert result.errors == []


def test_progress_sees_every_step(tiny) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    steps: list[tuple[int, int]] = []
    make_engine(tiny).counterfactual(
        images(18),
        progress=lambda step, total, x0: seen.append((step, total, tuple(x0.shape))),
        on_step=lambda step, total: steps.append((step, total)),
    )
    assert [s[:2] for s in seen] == [(i + 1, 8) for i in range(8)] == steps
    assert {s[2] for s in seen} == {(16, 3, 16, 16), (2, 3, 16, 16)}


def test_an_exception_in_progress_leaves_the_modules_as_they_were(tiny) -> None:
    engine = make_engine(tiny)
    engine.classifier.module.train()

    def fail(step: int, total: int, x0: Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        engine.counterfactual(images(1), progress=fail)
    assert engine.classifier.module.training
    engine.classifier.module.eval()


def test_names_must_fit(tiny, tmp_path: Path) -> None:
    result = make_engine(tiny).counterfactual(images(2))
    with pytest.raises(UsageError, match=r"^names:"):
        result.save(tmp_path, ["a", "a"])
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(CounterlensError, match=r"results\.jsonl"):
        result.save(tmp_path)


def test_detached_is_another_gradient_and_official_mode_runs(tiny) -> None:
    x = images(1)
    exact, detached = (make_engine(tiny, gradient=g).counterfactual(x).images for g in ("exact", "detached"))
    assert not torch.equal(exact, detached)
    assert make_engine(tiny, mode="official", steps=20).counterfactual(x).kept_fraction.shape == (1, 6)


def test_inversion_leads_back_to_the_latents(tiny) -> None:
    """Unguided DDIM from inverted latents returns to them, closer with more steps."""
    diffusion, _ = tiny
    z = torch.randn(2, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (20, 200):
        schedule = make_schedule(1000, steps, 0.4)
        with torch.no_grad():
            back = invert(diffusion, z, schedule)
            assert (back - z).abs().mean() > 0.1
            for t, t_prev in zip(schedule.timesteps, schedule.timesteps_prev, strict=True):
                abar, abar_prev = (diffusion.alphas_cumprod[i].float().expand(2) for i in (t, t_prev))
                eps = diffusion.predict_noise(back, torch.full((2,), t), diffusion.null_condition(2))
                back, _ = ddim(back, eps, abar, abar_prev)
        errors.append((back - z).abs().mean().item())
    assert errors[1] < errors[0] < 0.1
    assert errors[1] < 0.02


def test_noise_belongs_to_the_sample() -> None:
    like = torch.zeros(1)
    together = seeded_noise((4, 2, 2), [5, 6, 7], like)
    assert torch.equal(together[1:2], seeded_noise((4, 2, 2), [6], like))


def test_memory_does_not_hold_graphs(tiny) -> None:
    diffusion, classifier = tiny
    settings = Settings(**SETTINGS)
    run = sample(diffusion, classifier, images(1), torch.tensor([1]), [0], settings)
    assert run.z.grad_fn is None
    assert not run.z.requires_grad
