"""PixArt, Stable Diffusion 3, FLUX.1, Sana and few-step models against their pipelines and the literal step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from bench.baselines.literal import filter_angles, literal_step
from bench.published import AUTOENCODERS, PUBLISHED
from counterlens.engine import Config, Engine
from counterlens.engine.chance import carried_over
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.schedule import ddim
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.backbone import check_parts
from counterlens.engine.models.conditions import tensors
from counterlens.engine.models.load import open_diffusion
from counterlens.engine.models.predictions import flow_sigmas
from counterlens.engine.models.wide import WideFloats
from counterlens.engine.runtime import artefacts
from counterlens.engine.runtime.spec import Spec
from counterlens.export import Store
from tests.engine.models.generators import BATCH, classifiers, inputs, opened, softmax_classifier
from tests.tiny import IMAGE_SIZE, LABELS
from tests.tiny_generators import GENERATORS, SD_BETAS

SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
NEAR_LIMIT = {torch.float64: 1e-7, torch.float32: 1e-3}  # radians
PROMPTS = ["a photo of a thing 1.", "a photo of a thing 3."]


def some(*fast: str, of: Iterable[str] = GENERATORS) -> list[Any]:
    """Names for `parametrize`: the fast tier has these, the slow one the others."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in of]


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some("sdxl", "sd3"))
def test_step_equals_literal_in_both_pullbacks(folders: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    diffusion = opened(folders[name], str(dtype).removeprefix("torch."))
    z, image, target = inputs(diffusion, dtype)
    timestep, angle = torch.full((BATCH,), 401), carried_over(45.0, diffusion.latent_shape[0])
    for kind, classifier in classifiers(folders, dtype).items():
        with torch.no_grad():
            expected, score, reference = literal_step(
                diffusion, classifier, z, 401, 381, image, target, **SCALES, angle_deg=angle
            )
            condition = diffusion.condition(target)
            got, both = (
                GuidedStep(diffusion, classifier, mode=mode)(
                    z, timestep, timestep - 20, condition, image, target, **SCALES, angle_deg=angle
                )[0]
                for mode in ("functional", "autograd")
            )
        off = filter_angles(score, reference, "zero").flatten(1) - math.radians(angle)
        kept = (off.abs() >= NEAR_LIMIT[dtype]).all(1)
        assert kept.sum() >= BATCH - 2
        for made in (got, both):
            error = (made - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)
            assert error[kept].max() <= TOLERANCE[dtype], (kind, error)
        assert score.abs().amax() > 0


def pipeline_of(folder: Path, kind: str, **options: Any) -> Any:
    made = getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False, **options)
    made.set_progress_bar_config(disable=True)
    return made


def encoded(pipeline: Any, name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Two prompts and the empty one, as the pipeline gives them to its denoiser."""
    if name == "sdxl":
        said, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS)
        return (said, pooled), (empty, empty_pooled)
    if name in ("pixart", "alpha"):
        said, mask, empty, empty_mask = pipeline.encode_prompt(PROMPTS, True, negative_prompt="")
        return (said, mask), (empty, empty_mask)
    if name.startswith("sd3"):
        said, empty, pooled, empty_pooled = pipeline.encode_prompt(PROMPTS, None, None)
        return (said, pooled), (empty, empty_pooled)
    if name.startswith("flux"):
        options = {"max_sequence_length": 512 if pipeline.transformer.config.guidance_embeds else 256}
        return tuple(pipeline.encode_prompt(p, None, **options)[:2] for p in (PROMPTS, ["", ""]))  # type: ignore[return-value]
    instruction = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    said, mask, empty, empty_mask = pipeline.encode_prompt(PROMPTS, True, complex_human_instruction=instruction)
    return (said, mask), (empty, empty_mask)


KINDS = {
    "sdxl": "StableDiffusionXLPipeline",
    "pixart": "PixArtSigmaPipeline", "alpha": "PixArtAlphaPipeline", "sd3": "StableDiffusion3Pipeline",
    "sd3-without-t5": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "flux-schnell": "FluxPipeline",
    "sana": "SanaPipeline",
}  # fmt: skip


@pytest.mark.parametrize("name", some("sdxl", "pixart", "sd3", "sd3-without-t5", "flux", "sana", of=KINDS))
def test_conditions_are_the_pipelines_and_encoders_are_freed(folders: dict[str, Path], name: str) -> None:
    diffusion = opened(folders[name])
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    with torch.no_grad():
        expected = encoded(pipeline_of(folders[name], KINDS[name], **absent), name)
    assert diffusion.text.held == {}
    assert all(module in (diffusion.vae, diffusion.denoiser) for module in diffusion.modules())
    for got, want in zip(
        (diffusion.condition(torch.tensor([1, 3])), diffusion.null_condition(2)), expected, strict=True
    ):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-6, atol=1e-6)
    assert not torch.equal(*diffusion.condition(torch.tensor([1, 3]))[0])
    if name == "sd3-without-t5":
        assert diffusion.null_condition(1)[0][:, -256:].abs().max() == 0


# Timesteps of a short run, and where its last step arrives: at the clean latents.
TAUS = (800, 600, 400, 200, 100)
UNETS = ("sdxl", "sdxl-turbo", "sd-turbo", "lcm")


def ours(diffusion: Any, z: Tensor) -> Tensor:
    """The run without guidance, from noised latents to the clean estimate of its last step."""
    levels, null = diffusion.alphas_cumprod, diffusion.null_condition(len(z))
    z0 = z
    for t, t_prev in zip(TAUS, (*TAUS[1:], 0), strict=True):
        eps = diffusion.predict_noise(z, torch.full((len(z),), t), null)
        z, z0 = ddim(z, eps, levels[t].to(z).expand(len(z)), levels[t_prev].to(z).expand(len(z)))
    return z if levels[0] == 1 or diffusion.prediction == "epsilon" else z0


def noised(diffusion: Any, z0: Tensor, noise: Tensor) -> Tensor:
    abar = diffusion.alphas_cumprod[TAUS[0]].to(z0)
    return abar.sqrt() * z0 + (1 - abar).sqrt() * noise


def transcribed_flow(diffusion: Any, velocity: Callable[[Tensor, float], Tensor], z0: Tensor, noise: Tensor) -> Tensor:
    """A flow pipeline's loop in its own latents: x += (next share of noise - share) velocity."""
    shares = [float(flow_sigmas(diffusion.alphas_cumprod)[t]) for t in TAUS] + [0.0]
    x = (1 - shares[0]) * z0 + shares[0] * noise
    for share, after in pairwise(shares):
        x = x + (after - share) * velocity(x, share)
    return x


def transcribed_ddim(diffusion: Any, noise_in: Callable[[Tensor, int], Tensor], z0: Tensor, noise: Tensor) -> Tensor:
    """DDIM between noise levels."""
    levels = diffusion.alphas_cumprod
    x = levels[TAUS[0]].sqrt() * z0 + (1 - levels[TAUS[0]]).sqrt() * noise
    for t, t_prev in zip(TAUS, (*TAUS[1:], 0), strict=True):
        eps = noise_in(x, t)
        clean = (x - (1 - levels[t]).sqrt() * eps) / levels[t].sqrt()
        x = levels[t_prev].sqrt() * clean + (1 - levels[t_prev]).sqrt() * eps
    return x


def transcribed(name: str, diffusion: Any, z0: Tensor, noise: Tensor) -> Tensor:
    """The pipeline's loop written out; in its own latents, with the denoiser called as the pipeline calls it."""
    denoiser, b = diffusion.denoiser, len(z0)
    said, second = (*tensors(diffusion.null_condition(b)), None)[:2]
    if name in UNETS:
        told: dict[str, Any] = {"encoder_hidden_states": said}
        if name.startswith("sdxl"):
            sizes = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]] * b).to(z0)
            told["added_cond_kwargs"] = {"text_embeds": second, "time_ids": sizes}
        if name == "lcm":
            waves = torch.exp(-math.log(10000.0) / 2 * torch.arange(3)) * 2000.0  # the scale 3, of which 1 is none
            told["timestep_cond"] = torch.cat([waves.sin(), waves.cos()]).to(z0).expand(b, -1)
        return transcribed_ddim(diffusion, lambda x, t: denoiser(x, torch.full((b,), t), **told).sample, z0, noise)
    if name in ("pixart", "alpha"):
        levels = diffusion.alphas_cumprod
        x = levels[TAUS[0]].sqrt() * z0 + (1 - levels[TAUS[0]]).sqrt() * noise
        sizes = {"resolution": None, "aspect_ratio": None}
        if name == "alpha":
            sizes = {"resolution": torch.full((b, 2), float(IMAGE_SIZE)), "aspect_ratio": torch.ones(b, 1)}
            sizes = {key: value.to(z0) for key, value in sizes.items()}
        for t, t_prev in zip(TAUS, (*TAUS[1:], 0), strict=True):
            eps = denoiser(
                x, encoder_hidden_states=said, encoder_attention_mask=second, timestep=torch.full((b,), t),
                added_cond_kwargs=sizes,
            ).sample.chunk(2, dim=1)[0]  # fmt: skip
            clean = (x - (1 - levels[t]).sqrt() * eps) / levels[t].sqrt()
            x = levels[t_prev].sqrt() * clean + (1 - levels[t_prev]).sqrt() * eps
        return x

    def velocity(x: Tensor, share: float) -> Tensor:
        time = torch.full((b,), 1000 * share, dtype=x.dtype)
        if name == "sana-dpm":  # whose scheduler tells whole timesteps
            time = (time + 1e-6).floor()
        if name.startswith("sd3"):
            return denoiser(x, encoder_hidden_states=said, pooled_projections=second, timestep=time).sample
        if name.startswith("sana"):
            return denoiser(x, encoder_hidden_states=said, encoder_attention_mask=second, timestep=time).sample
        places = torch.tensor([[0, row, column] for row in range(2) for column in range(2)], dtype=x.dtype)
        tokens = torch.stack(
            [x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(b, -1) for r in range(2) for c in range(2)], dim=1
        )
        guidance = torch.full((b,), 3.5, dtype=torch.float32) if denoiser.config.guidance_embeds else None
        out = denoiser(
            tokens, encoder_hidden_states=said, pooled_projections=second, timestep=time / 1000, img_ids=places,
            txt_ids=torch.zeros(said.shape[1], 3, dtype=x.dtype), guidance=guidance,
        ).sample  # fmt: skip
        made = torch.empty_like(x)
        for i in range(4):
            r, c = divmod(i, 2)
            made[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = out[:, i].reshape(b, 16, 2, 2)
        return made

    return transcribed_flow(diffusion, velocity, z0, noise)


WRITTEN_OUT = (*UNETS, "pixart", "alpha", "sd3", "sd3.5", "flux", "flux-schnell", "sana", "sana-dpm")


@pytest.mark.parametrize("name", some(*set(WRITTEN_OUT) - {"sdxl-turbo", "sana-dpm"}, of=WRITTEN_OUT))
def test_unguided_run_equals_the_pipelines_loop_written_out(folders: dict[str, Path], name: str) -> None:
    diffusion = opened(folders[name], "float64")
    noise, image, _ = inputs(diffusion, torch.float64, 2)
    with torch.no_grad():
        z0 = diffusion.encode(image)
        got = ours(diffusion, noised(diffusion, z0, noise))
        with WideFloats():
            expected = transcribed(name, diffusion, z0, noise)
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


def through_pipeline(name: str, folder: Path, diffusion: Any, z0: Tensor, noise: Tensor) -> Tensor:
    """The same run by diffusers' own pipeline: image to image where there is one, else from the noised latents."""
    told: dict[str, Any] = {"prompt": ["", ""], "output_type": "latent", "num_inference_steps": len(TAUS)}
    if name in UNETS:
        scheduler = Between.from_config(
            diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False).config
        )
        said = tensors(diffusion.null_condition(2))
        told |= {"prompt": None, "prompt_embeds": said[0], "latents": noised(diffusion, z0, noise)}
        told |= {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        if name.startswith("sdxl"):
            pipeline = pipeline_of(folder, "StableDiffusionXLPipeline", scheduler=scheduler)
            return pipeline(**told, pooled_prompt_embeds=said[1], guidance_scale=1.0).images
        pipeline = diffusers.StableDiffusionPipeline(
            diffusion.vae, diffusion.text_encoder, diffusion.tokenizer, diffusion.unet, scheduler, None, None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**told, guidance_scale=3.0 if name == "lcm" else 1.0).images
    if name == "pixart":
        pipeline = pipeline_of(folder, "PixArtSigmaPipeline")
        pipeline.scheduler = Between.from_config(
            diffusers.DDIMScheduler(
                beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=False
            ).config
        )
        x = noised(diffusion, z0, noise)
        return pipeline(**told, latents=x, guidance_scale=1.0, use_resolution_binning=False).images
    told["sigmas"] = [t / 1000 for t in TAUS]
    if name == "sana":
        pipeline = pipeline_of(folder, "SanaPipeline")
        share = flow_sigmas(diffusion.alphas_cumprod)[TAUS[0]].float()
        x, options = (1 - share) * z0 + share * noise, {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        options |= {"use_resolution_binning": False, "guidance_scale": 1.0, "complex_human_instruction": None}
        pipeline.check_inputs = lambda *args, **kwargs: None  # asks for multiples of 32 of every autoencoder
        return pipeline(**told, latents=x, **options).images
    kind = "StableDiffusion3Img2ImgPipeline" if name.startswith("sd3") else "FluxImg2ImgPipeline"
    pipeline = pipeline_of(folder, kind)
    given = pipeline.scheduler.scale_noise
    pipeline.scheduler.scale_noise = lambda sample, timestep, _: given(sample, timestep, noise)  # instead of a seed's
    told |= {"strength": 1.0, "height": IMAGE_SIZE, "width": IMAGE_SIZE, "image": z0}
    if name.startswith("sd3"):
        return pipeline(**told, guidance_scale=1.0).images
    told["max_sequence_length"] = 512 if name == "flux" else 256
    out = pipeline(**told, guidance_scale=3.5).images
    return pipeline._unpack_latents(out, IMAGE_SIZE, IMAGE_SIZE, 4)


class Between(diffusers.DDIMScheduler):
    """DDIM at the timesteps of this file instead of its own."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps, self.timesteps = num_inference_steps, torch.tensor(TAUS)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        after = (*TAUS[1:], 0)[TAUS.index(int(timestep))]
        self.num_inference_steps = 1000 // (int(timestep) - after)
        self.config["num_train_timesteps"] = self.num_inference_steps * (int(timestep) - after)
        return super().step(model_output, timestep, sample, **options)


PIPED = (*UNETS, "pixart", "sd3", "sd3.5", "flux", "flux-schnell", "sana")


@pytest.mark.parametrize("name", some(*set(PIPED) - {"sdxl-turbo", "sd3.5", "flux-schnell"}, of=PIPED))
def test_unguided_run_equals_diffusers_pipeline(folders: dict[str, Path], name: str) -> None:
    diffusion = opened(folders[name])
    noise, image, _ = inputs(diffusion, torch.float32, 2)
    with torch.no_grad():
        z0 = diffusion.encode(image)
        expected = through_pipeline(name, folders[name], diffusion, z0, noise)
        got = ours(diffusion, noised(diffusion, z0, noise))
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", some("sdxl", "flux", "sana"))
def test_half_precision_weights_keep_float32_sums(folders: dict[str, Path], name: str) -> None:
    exact, half = opened(folders[name]), opened(folders[name], "bfloat16")
    z, image, target = inputs(exact, torch.float32)
    time = torch.full((BATCH,), 401)
    with torch.no_grad():
        a, b = (d.predict_noise(z, time, d.condition(target)) for d in (exact, half))
        assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
        assert b.dtype == half.decode(z).dtype == half.encode(image).dtype == torch.float32
    most = 0.3 if name == "flux" else 0.1  # its transformer rounds the timestep, too, as in its own pipeline
    assert 0 < (a - b).abs().mean() / a.abs().mean() < most


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_layouts(name: str) -> None:
    said = PUBLISHED[name]
    family = resolve_name(f"counterlens.engine.models.{said.family}")
    denoiser, vae = (getattr(diffusers, kind) for kind in family.networks.values())
    with torch.device("meta"):
        made, autoencoder = denoiser(**said.denoiser), vae(**said.vae)
    count = sum(p.numel() for p in made.parameters())
    assert count == said.counted
    assert f"{count / 1e9:.{len(said.said.split('.')[1]) - 2}f} B" == said.said
    assert sum(p.numel() for p in autoencoder.parameters()) == AUTOENCODERS[autoencoder.config.latent_channels]
    held = made.state_dict()
    assert {key: tuple(held[key].shape) for key in said.layout} == said.layout
    check_parts(autoencoder, made, family.packed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "lcm", "sd3"])
def test_step_is_exported_and_matches(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """The others by `python -m bench.generators --export`."""
    diffusion = open_diffusion(folders[name], image_size=IMAGE_SIZE)
    classifier = softmax_classifier()
    diffusion.describe(LABELS)
    report = artefacts.build(Spec(diffusion, classifier), "onnx", Store(tmp_path / "store")).report["parity"]
    assert {1, 3} <= set(report["batches"])
    assert report["worst"] <= 1e-4


@pytest.mark.parametrize("name", some("sdxl", "sd3", "flux"))
def test_rectangles_are_the_networks_own(name: str, folders: dict[str, Path]) -> None:
    """Another shape than the square: latents, noise and image have it, and a run ends well."""
    labels = {"labels": LABELS, "prompts": "a photo of a {label}."}
    engine = Engine.from_pretrained(folders[name], folders["clip"], Config(steps=4, strength=0.5), **labels)
    assert engine.multiple is not None
    short, long = engine.multiple, 3 * engine.multiple
    images = torch.rand(2, 3, long, short, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = engine.diffusion.encode(images)
        assert z.shape[2] == 3 * z.shape[3]
        assert engine.diffusion.decode(z).shape == images.shape
        noise = engine.diffusion.predict_noise(
            z, torch.tensor([50, 50]), engine.diffusion.condition(torch.tensor([1, 2]))
        )
        assert noise.shape == z.shape
        alone = engine.diffusion.predict_noise(z[1:], torch.tensor([50]), engine.diffusion.condition(torch.tensor([2])))
    torch.testing.assert_close(noise[1:], alone, rtol=1e-4, atol=1e-5)
    made = engine.counterfactual(images, targets="runner-up")
    assert made.errors == [None, None]
    assert made.images.shape == images.shape
    if (longest := engine.diffusion.longest) is not None:
        with pytest.raises(UsageError, match=r"^images: a side of \d+ pixels is longer than the \d+ that this model"):
            engine.counterfactual(torch.rand(1, 3, longest + engine.multiple, short))
