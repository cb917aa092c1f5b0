"""Cheaper guidance: a tiny decoder, distance in latents, and steps that reuse the last guidance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from counterlens.engine.config import Config, Settings, StepOptions
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.jobs import Job
from counterlens.engine.guidance.pullback import PULLBACK_MODES
from counterlens.engine.guidance.sampler import sample
from counterlens.engine.guidance.schedule import add_noise, ddim, make_schedule
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.tiny import (
    LatentResolutionDecoder,
    TinyDecoder,
    check_decoder,
    open_decoder,
    save_decoder,
)
from counterlens.engine.runtime import artefacts
from counterlens.engine.runtime.spec import Spec
from counterlens.export import Store

SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle_deg": 45.0}
NUMBERS = {
    "steps": 6, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 45,
    "gradient": "detached", "spacing": "trailing",
}  # fmt: skip


def decoder(channels: int = 4, factor: int = 4, scale: float | None = None) -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(LatentResolutionDecoder(channels, 8, 1, factor), "small", channels, scale)


def inputs(diffusion: Any, dtype: torch.dtype, batch: int = 4) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(batch, *diffusion.latent_shape, generator=g, dtype=dtype)
    image = torch.rand(batch, 3, 16, 16, generator=g, dtype=dtype)
    t = torch.full((batch,), 401)
    return z, t, t - 20, torch.arange(batch), image, torch.arange(batch)


def engine(tiny: Any, **options: Any) -> Engine:
    return Engine(*tiny, pack_settings={"realistic": NUMBERS, "audit": NUMBERS}, **options)


class Same:
    """The diffusion model's own decoder as a guidance decoder."""

    def __init__(self, diffusion: Any) -> None:
        self.module, self.decode = diffusion.vae, diffusion.decode


@pytest.mark.parametrize("gradient", ["exact", "detached"])
def test_the_own_decoder_as_guidance_decoder_changes_nothing(tiny: Any, gradient: Any) -> None:
    diffusion, _ = tiny
    given = inputs(diffusion, torch.float32)
    through_another = StepOptions(gradient=gradient, guidance_decoder="tiny")
    with torch.no_grad():
        plain = GuidedStep(*tiny, StepOptions(gradient=gradient))(*given, **SCALES)
        same = GuidedStep(*tiny, through_another, decoder=Same(diffusion))(*given, **SCALES)
        other = GuidedStep(*tiny, through_another, decoder=decoder())(*given, **SCALES)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    assert not torch.equal(plain[0], other[0])


@pytest.mark.parametrize("mode", PULLBACK_MODES)
@pytest.mark.parametrize("gradient", ["exact", "detached"])
def test_latent_distance_by_autograd(tiny64: Any, gradient: Any, mode: Any) -> None:
    """Guided by the latent distance alone: the noise must be eps_u plus its gradient, rescaled to |eps_c - eps_u|."""
    diffusion, _ = tiny64
    z, t, t_prev, condition, _, target = inputs(diffusion, torch.float64)
    reference = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
    abar = diffusion.alphas_cumprod[401]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    leaf = z.clone().requires_grad_()
    eps_u = diffusion.predict_noise(leaf, t, diffusion.null_condition(len(z)))
    seen = eps_u if gradient == "exact" else eps_u.detach()
    gradient_z = torch.autograd.grad(((leaf - sigma * seen) / alpha - reference).abs().sum(), leaf)[0]
    with torch.no_grad():
        eps_c = diffusion.predict_noise(z, t, condition)
        step = GuidedStep(*tiny64, StepOptions(gradient=gradient, distance="latent", guidance_every=2), mode=mode)
        scales = SCALES | {"class_scale": 0.0, "guidance_scale": 1.0, "distance_scale": 1.0}
        z_prev, z0, _, guidance = step(z, t, t_prev, condition, reference, target, **scales)
    eps_u = eps_u.detach()
    norm = (eps_c - eps_u).flatten(1).norm(dim=1) / gradient_z.flatten(1).norm(dim=1)
    expected = gradient_z * norm[:, None, None, None]
    torch.testing.assert_close(guidance, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(z0, (z - sigma * (eps_u + expected)) / alpha, rtol=1e-6, atol=1e-8)
    again, _ = ddim(z, eps_u + expected, abar.expand(len(z)), diffusion.alphas_cumprod[t_prev])
    torch.testing.assert_close(z_prev, again, rtol=1e-6, atol=1e-8)


def test_every_second_step_reuses_the_last_guidance(tiny64: Any) -> None:
    """Three steps by hand: guided, reused, unguided because the interval is over."""
    diffusion, classifier = tiny64
    _, _, _, condition, image, target = inputs(diffusion, torch.float64, 2)
    fields = NUMBERS | {"steps": 3, "guidance_every": 2, "guidance_end": 0.6}
    settings = Settings(**fields)
    run = sample(diffusion, classifier, image, target, [3, 4], settings)
    schedule = make_schedule(1000, 3, 0.5, "trailing")
    step = GuidedStep(*tiny64, StepOptions(gradient="detached", guidance_every=2))
    levels = diffusion.alphas_cumprod
    with torch.no_grad():
        noise = torch.stack(
            [torch.randn(diffusion.latent_shape, generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
        )
        z = add_noise(diffusion.encode(image), noise.double(), levels[schedule.start].expand(2))
        scales = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle_deg": 45.0}
        pairs = [
            (torch.full((2,), a), torch.full((2,), b))
            for a, b in zip(schedule.timesteps, schedule.timesteps_prev, strict=True)
        ]
        z, _, kept, guidance = step(z, *pairs[0], condition, image, target, **scales)
        for (t, t_prev), added in zip(pairs[1:], (guidance, 0.0), strict=True):
            eps = diffusion.predict_noise(z, t, diffusion.null_condition(2)) + added
            z, _ = ddim(z, eps, levels[t], levels[t_prev])
    torch.testing.assert_close(run.z, z, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(run.kept_fraction[:, 0], kept.float())
    assert run.kept_fraction[:, 1:].isnan().all()


def test_results_come_from_the_real_decoder(tiny: Any) -> None:
    diffusion, _ = tiny
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made = engine(tiny, guidance_decoder=decoder())
    config = Config(guidance_decoder="tiny", distance="latent", solver="unipc", noise="inversion")
    with made.frozen():
        sampler = made.sampler(config, slots=2)
        target = (made.probabilities(x).argmax(1) + 1) % 10
        for i in range(2):
            sampler.submit(Job(x[i], int(target[i]), i, made.settings(config)))
        outcomes = []
        while sampler.busy:
            outcomes += sampler.tick()
        with torch.no_grad():
            decoded = (diffusion.decode(torch.stack([o.z for o in outcomes])) + 1) / 2
    assert torch.equal(decoded, torch.stack([o.image for o in outcomes]))
    result = made.counterfactual(x, target, seeds=[0, 1], config=config)
    assert torch.equal(result.images, decoded.clamp(0, 1))


def test_a_decoder_for_other_latents_is_refused(tiny: Any) -> None:
    scale = tiny[0].vae.config.scaling_factor
    engine(tiny, guidance_decoder=decoder(scale=scale))
    for wrong, message in [
        (decoder(channels=8), "^guidance_decoder: small decodes 8 latent channels, the diffusion model has 4"),
        (decoder(scale=2 * scale), "^guidance_decoder: small was made for latents scaled by"),
        (decoder(factor=8), "^guidance_decoder: small makes images of 32 pixels, the diffusion model of 16"),
    ]:
        with pytest.raises(UsageError, match=message):
            engine(tiny, guidance_decoder=wrong)


def test_an_engine_without_a_tiny_decoder_says_so(tiny: Any) -> None:
    with pytest.raises(UsageError, match=r"^guidance_decoder: this engine has no tiny decoder.*AutoencoderTiny"):
        engine(tiny).counterfactual(torch.rand(1, 3, 16, 16), config=Config(guidance_decoder="tiny"))


def test_autoencoder_tiny_and_our_own_folders(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {f"{part}_block_out_channels": (8, 8, 8) for part in ("encoder", "decoder")}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    AutoencoderTiny(latent_channels=4, **sizes, **blocks).save_pretrained(tmp_path / "taesd")
    opened = open_decoder(tmp_path / "taesd")
    check_decoder(opened, tiny[0])
    z = torch.randn(2, 4, 4, 4)
    expected = AutoencoderTiny.from_pretrained(tmp_path / "taesd").eval().decode(z).sample
    torch.testing.assert_close(opened.decode(z), expected)
    AutoencoderTiny(latent_channels=4, scaling_factor=0.5, **sizes, **blocks).save_pretrained(tmp_path / "scaled")
    with pytest.raises(UsageError, match=r"^guidance_decoder: scaled was made for latents scaled by 0\.5"):
        engine(tiny, guidance_decoder=tmp_path / "scaled")
    module = LatentResolutionDecoder(4, 8, 1, 4)
    config = {"latent_channels": 4, "width": 8, "blocks": 1, "factor": 4}
    save_decoder(module, tmp_path / "own", config | {"scaling_factor": tiny[0].vae.config.scaling_factor})
    back = open_decoder(tmp_path / "own")
    torch.testing.assert_close(back.decode(z), module(z), atol=2e-3, rtol=2e-2)
    made = engine(tiny, guidance_decoder=str(tmp_path / "own"))
    assert made.settings(Config(guidance_decoder="tiny")).guidance_decoder == "tiny"


def test_broken_decoder_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^guidance_decoder: "):
        open_decoder(tmp_path / "none")
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UsageError, match=r"other/config\.json is neither an AutoencoderTiny nor"):
        open_decoder(folder)
    (folder / "config.json").write_text(json.dumps({"architecture": "latent-resolution", "latent_channels": 4}))
    with pytest.raises(CounterlensError, match=r"other: cannot be read as a decoder \(KeyError"):
        open_decoder(folder)
    sizes = {"latent_channels": 4, "width": 8, "blocks": 1, "factor": 4, "scaling_factor": 1.0}
    (folder / "config.json").write_text(json.dumps({"architecture": "latent-resolution", **sizes}))
    save_file({"enter.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CounterlensError, match=r"other: cannot be read as a decoder \(RuntimeError"):
        open_decoder(folder)


def test_every_option_has_its_own_artefact(tiny: Any) -> None:
    specs = [
        Spec(*tiny), Spec(*tiny, options=StepOptions(gradient="detached")),
        Spec(*tiny, options=StepOptions(distance="latent")), Spec(*tiny, options=StepOptions(guidance_every=2)),
        Spec(*tiny, options=StepOptions(guidance_decoder="tiny"), decoder=decoder()),
    ]  # fmt: skip
    keys = [json.dumps(artefacts.key_of(spec, "onnx"), sort_keys=True) for spec in specs]
    assert len(set(keys)) == len(keys)
    made = engine(tiny, guidance_decoder=decoder())
    chosen = made.settings(Config(guidance_decoder="tiny", distance="latent", guidance_every=2))
    spec = made.spec(chosen)
    assert (spec.decoder is not None, spec.options.distance, spec.outputs[-1]) == (True, "latent", "guidance")
    assert spec.example(3)[4].shape == (3, 4, 4, 4)


@pytest.mark.slow
def test_all_options_compiled_agree_with_eager(tiny: Any, tmp_path: Path) -> None:
    options = {"guidance_decoder": "tiny", "distance": "latent", "guidance_every": 2, "solver": "unipc"}
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for runtime in ("eager", "onnxruntime"):
        made = engine(tiny, guidance_decoder=decoder(), runtime=runtime, store=tmp_path)
        results.append(made.counterfactual(x, config=Config(**options)))
    assert Store(tmp_path).entries()[0].report["parity"]["worst"] <= 1e-4
    assert (results[0].images - results[1].images).abs().max() < 1e-3


def test_speeds_lie_over_modes_and_presets(tiny: Any) -> None:
    made = engine(tiny, guidance_decoder=decoder())
    plain, exact = (made.settings(Config(speed=s)) for s in (None, "exact"))
    assert plain.gradient == "detached"
    assert exact == plain.model_copy(update={"gradient": "exact"})
    published = made.settings(Config(preset="pairs-class"))
    assert made.settings(Config(preset="pairs-class", speed="exact")) == published
    fast = made.settings(Config(preset="pairs-class", speed="fast"))
    for kept in ("strength", "class_scale", "distance_scale", "guidance_scale", "angle", "filter"):
        assert getattr(fast, kept) == getattr(published, kept)
    assert fast.steps < 20
    assert made.settings(Config(speed="fast", steps=17)).steps == 17
    assert math.isclose(made.settings(Config(mode="audit", speed="fast")).angle, NUMBERS["angle"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^speed: .*'warp'"):
        Config.make(speed="warp")
