"""PixArt, Stable Diffusion 3, FLUX.1 and Sana from folders on disk: against their pipelines and the literal step."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from functools import cache
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
from counterlens.engine.chance import carried_over
from counterlens.engine.config import PRESETS, Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.schedule import carried_strength, ddim
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.images.files import save_png
from counterlens.engine.models import prompted
from counterlens.engine.models.backbone import check_parts
from counterlens.engine.models.conditions import tensors
from counterlens.engine.models.image_classifiers import open_classifier
from counterlens.engine.models.load import open_diffusion
from counterlens.engine.models.predictions import flow_sigmas
from counterlens.engine.models.protocols import SigmoidClassifier, SoftmaxClassifier
from counterlens.engine.models.wide import WideFloats
from counterlens.engine.packs.architectures import StridedClassifier
from counterlens.engine.runtime import artefacts
from counterlens.engine.runtime.spec import Spec
from counterlens.export import Store
from tests import tiny
from tests.engine.cli.test_cli import run
from tests.tiny import IMAGE_SIZE, LABELS
from tests.tiny_generators import GENERATORS, SD_BETAS, VARIANTS

pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
pytest.importorskip("sentencepiece", reason="needs sentencepiece, which trains the tiny T5 tokenizer")
SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
NEAR_LIMIT = {torch.float64: 1e-7, torch.float32: 1e-3}  # radians
BATCH = 4
PROMPTS = ["a photo of a thing 1.", "a photo of a thing 3."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("generators")
    made = {name: save(base / name) for name, save in (GENERATORS | VARIANTS).items()}
    return made | {"clip": tiny.save_clip(base / "clip")}


@cache
def opened(folder: Path, dtype: str = "float32") -> Any:
    diffusion = open_diffusion(folder, dtype=dtype, image_size=IMAGE_SIZE)
    diffusion.describe(LABELS[:BATCH])  # of the classifiers' labels, the targets here
    return diffusion


def classifiers(folders: dict[str, Path], dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    module = StridedClassifier(width=8).to(dtype).eval().requires_grad_(False)
    clip = open_classifier(folders["clip"], image_size=IMAGE_SIZE, labels=LABELS)
    clip.module.to(dtype).requires_grad_(False)
    return {"softmax": SoftmaxClassifier(module, LABELS), "sigmoid": SigmoidClassifier(module, LABELS), "clip": clip}


def inputs(diffusion: Any, dtype: torch.dtype, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(batch, *diffusion.latent_shape, generator=g, dtype=torch.float64).to(dtype)
    image = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=g, dtype=torch.float64).to(dtype)
    return z, image, torch.arange(batch) % 10


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["sdxl", "pixart", "sd3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lcm", "flux", "sana"))]
)
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


@pytest.mark.parametrize("name", KINDS)
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


SLOW_DPM = pytest.param("sana-dpm", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*UNETS, "pixart", "alpha", "sd3", "sd3.5", "flux", "flux-schnell", "sana", SLOW_DPM])
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


@pytest.mark.parametrize(
    "name",
    [
        *UNETS,
        "pixart",
        "sd3",
        "flux",
        "sana",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd3.5", "flux-schnell")),
    ],
)
def test_unguided_run_equals_diffusers_pipeline(folders: dict[str, Path], name: str) -> None:
    diffusion = opened(folders[name])
    noise, image, _ = inputs(diffusion, torch.float32, 2)
    with torch.no_grad():
        z0 = diffusion.encode(image)
        expected = through_pipeline(name, folders[name], diffusion, z0, noise)
        got = ours(diffusion, noised(diffusion, z0, noise))
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "part", "fields", "said"),
    [
        ("sana", "transformer", {"guidance_embeds": True}, r"guidance_embeds is True: the guidance scale"),
        ("flux", "vae", {"latent_channels": 4}, "vae"),
        ("pixart", "transformer", {"mystery": 3}, "mystery"),
        ("sd3", "text_encoder_3", {"model_type": "umt5"}, r"text_encoder_3/config\.json: model_type is 'umt5'"),
        ("flux", "scheduler", {"shift_terminal": 0.1}, "shift_terminal"),
        ("sana", "scheduler", {"prediction_type": "mystery"}, "prediction_type"),
        ("sd3", "scheduler", {"invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_fields_that_do_not_fit_are_named(
    folders: dict[str, Path], name: str, part: str, fields: dict[str, object], said: str, tmp_path: Path
) -> None:
    folder = copied(folders[name], tmp_path / name)
    config = "scheduler_config.json" if part == "scheduler" else "config.json"
    edit(folder / part / config, **fields)
    with pytest.raises((UsageError, CounterlensError), match=said) as caught:
        open_diffusion(folder, image_size=IMAGE_SIZE)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_not_its_own_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["sd3"], tmp_path / "sd3")
    shutil.rmtree(folder / "tokenizer_2")
    shutil.rmtree(folder / "text_encoder")
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "text_encoder_3" / "model.safetensors.index.json").write_text(json.dumps(shards))
    (folder / "text_encoder_3" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CounterlensError, match="is not complete") as caught:
        open_diffusion(folder)
    for path in ("text_encoder/config.json", "tokenizer_2/tokenizer_config.json"):
        assert path in str(caught.value)
    assert "text_encoder_3/model-00002-of-00002.safetensors" in str(caught.value)
    assert "00001-of" not in str(caught.value)

    shutil.rmtree(folder)
    folder = copied(folders["sd3"], folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    with pytest.warns(UserWarning, match="no text_encoder_3/.*zeros"):
        open_diffusion(folder, image_size=IMAGE_SIZE)
    with pytest.raises(UsageError, match=r"^image_size: 80 is more than the 64 .*pos_embed_max_size"):
        open_diffusion(folders["sd3-without-t5"], image_size=80)
    with pytest.raises(UsageError, match=r"^image_size: 20 is no multiple of 8"):
        open_diffusion(folders["flux"], image_size=20)

    folder = copied(folders["pixart"], tmp_path / "pixart")
    shutil.rmtree(folder / "vae")
    shutil.copytree(folders["sd3"] / "vae", folder / "vae")
    with pytest.raises(UsageError, match=r"^latent channels: the denoiser takes 4, the VAE makes 16"):
        open_diffusion(folder)
    folder = copied(folders["flux"], tmp_path / "flux")
    for part in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(folder / part)
        shutil.copytree(folders["sd3"] / part.replace("2", "3"), folder / part)
    with pytest.raises(UsageError, match=r"^text_encoder_2: its 40 channels are not the denoiser's 24 \(joint"):
        open_diffusion(folder, image_size=IMAGE_SIZE)
    diffusion = opened(folders["pixart"])
    with pytest.raises(UsageError, match=r"^prompts: .* tokens, text_encoder reads 300"):
        diffusion.describe(["a"], prompts=["word " * 400])
    with pytest.raises(UsageError, match=r"^classes: this model is text-conditional"):
        diffusion.describe(["a"], classes=[1])


def test_models_that_take_an_image_beside_the_latents_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["flux"], tmp_path / "flux")
    edit(folder / "model_index.json", _class_name="FluxKontextPipeline")
    with pytest.raises(UsageError, match=r"model_index\.json: _class_name is 'FluxKontextPipeline': .*an image beside"):
        open_diffusion(folder)


@pytest.mark.parametrize("name", GENERATORS)
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


def test_files_that_are_no_models_are_refused_by_name(tmp_path: Path) -> None:
    files = {"flux1-dev-Q4.gguf": "GGUF", "pytorch_lora_weights.safetensors": "LoRA", "sd3.safetensors": "convert"}
    for name, said in files.items():
        folder = tmp_path / said
        folder.mkdir()
        (folder / name).touch()
        for given in (folder, folder / name):
            with pytest.raises(UsageError, match=rf"^model: .*{name}.*{said}"):
                open_diffusion(given)


def test_a_gated_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args: object, **options: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CounterlensError, match=r"^model: 'black-forest-labs/FLUX.1-dev' is gated: accept its terms"):
        open_diffusion("black-forest-labs/FLUX.1-dev")


def test_encoders_are_read_again_for_other_prompts(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompted, "AT_ONCE", 2)
    diffusion = open_diffusion(folders["pixart"], image_size=IMAGE_SIZE)
    before = diffusion.null_condition(1)
    diffusion.describe(LABELS)
    assert set(diffusion._embeddings) == {""}
    many = diffusion.condition(torch.tensor([2, 5, 2]))
    assert diffusion.text.held == {}
    assert len(diffusion._embeddings) == 3
    diffusion.describe(["thing 2"], prompts=["a photo of a thing 2."])
    for one, other in zip(diffusion.condition(torch.tensor([0])), many, strict=True):
        assert torch.equal(one, other[:1])
        assert torch.equal(other[0], other[2])
    assert all(map(torch.equal, before, diffusion.null_condition(1)))


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
    classifier = classifiers(folders, torch.float32)["softmax"]
    diffusion.describe(LABELS)
    report = artefacts.build(Spec(diffusion, classifier), "onnx", Store(tmp_path / "store")).report["parity"]
    assert {1, 3} <= set(report["batches"])
    assert report["worst"] <= 1e-4


def test_a_counterfactual_by_command_says_its_angle(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    save_png(torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)), tmp_path / "photo.png")
    result = run(
        "counterfactual", tmp_path / "photo.png", "--model", folders["sd3"], "--classifier", folders["clip"],
        "--labels", tmp_path / "labels.txt", "--image-size", IMAGE_SIZE, "--steps", 6, "--strength", 0.5,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["target"] in LABELS
    settings = (tmp_path / "out" / "run.json").read_text()
    assert '"strength_asked": 0.5' in settings  # of a flow, whose run begins at another share of its steps
    assert '"strength": 0.5' not in settings
    assert f'"angle": {carried_over(PRESETS["imagenet-text"].angle, 16)}' in settings


@pytest.mark.parametrize("name", GENERATORS)
def test_rectangles_are_the_networks_own(name: str, folders: dict[str, Path]) -> None:
    """Another shape than the square: latents, noise and image have it, and a run ends well."""
    from counterlens.engine import Config, Engine

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


def test_fast_is_four_steps_where_the_generator_is_distilled(folders: dict[str, Path]) -> None:
    """What a folder says of itself: LCM's scheduler, or trailing timesteps of a model that predicts noise."""
    classifier = classifiers(folders, torch.float32)["softmax"]
    for name in ("sdxl", "sd-turbo", "lcm", "sdxl-turbo"):
        diffusion = open_diffusion(folders[name], image_size=IMAGE_SIZE)
        diffusion.describe(LABELS)
        assert diffusion.distilled == (name != "sdxl")
        engine = Engine(diffusion, classifier)
        settings = engine.settings(Config.make(speed="fast"))
        assert settings.steps == (4 if diffusion.distilled else 7)
        assert settings.noise == ("random" if diffusion.distilled else "inversion")
    made = engine.counterfactual(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5), config=Config.make(speed="fast"))
    assert made.errors == [None]


def test_flows_that_are_distilled_are_known_by_their_config_or_their_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    hub = tmp_path / "models--stabilityai--stable-diffusion-3.5-large-turbo" / "snapshots"
    hub.mkdir(parents=True)
    (hub / "abc").symlink_to(folders["sd3.5"])
    (tmp_path / "turbo").mkdir()  # of other folders the names say nothing
    (tmp_path / "turbo" / "sd3.5").symlink_to(folders["sd3.5"])
    for folder, distilled in (
        (folders["flux"], False), (folders["flux-schnell"], True), (tmp_path / "turbo" / "sd3.5", False),
        (hub / "abc", True),
    ):  # fmt: skip
        assert open_diffusion(folder, image_size=IMAGE_SIZE).distilled == distilled
    diffusion = open_diffusion(hub / "abc", image_size=IMAGE_SIZE)
    diffusion.describe(LABELS)
    engine = Engine(diffusion, classifiers(folders, torch.float32)["softmax"])
    settings = engine.settings(Config.make(speed="fast"))
    assert (settings.steps, settings.noise) == (4, "random")
    made = engine.counterfactual(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5), config=Config.make(speed="fast"))
    assert made.errors == [None]


def test_sdxl_keeps_its_vae_in_float32_and_its_null_condition_as_its_folder_says(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    half = open_diffusion(folders["sdxl"], dtype="float16", image_size=IMAGE_SIZE)
    assert (half.vae.dtype, half.unet.dtype) == (torch.float32, torch.float16)
    assert all(not part.any() for part in half.null_condition(2))
    folder = tmp_path / "sdxl"
    shutil.copytree(folders["sdxl"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert all(part.any() for part in open_diffusion(folder, image_size=IMAGE_SIZE).null_condition(1))
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_aesthetics_score": True}))
    with pytest.raises(UsageError, match=r"model_index\.json: requires_aesthetics_score is true: a refiner"):
        open_diffusion(folder, image_size=IMAGE_SIZE)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_of_many_labels_a_prompt_that_is_too_long_is_refused_at_once(name: str, folders: dict[str, Path]) -> None:
    diffusion = open_diffusion(folders[name], image_size=IMAGE_SIZE)
    labels = [*(f"thing {i}" for i in range(80)), " ".join(["thing"] * 400), "a thing"]
    with pytest.raises(UsageError, match=r"^prompts: .* tokens, text_encoder"):
        diffusion.describe(labels, prompts="a photo of {label}")
    diffusion.describe(labels[:80], prompts="a photo of {label}")
    assert not diffusion.text.held  # the encoders are not kept for labels that nobody asked for yet
    assert diffusion.condition(torch.tensor([79, 3]))[0].shape[0] == 2


def test_strengths_are_carried_over_to_linear_betas(folders: dict[str, Path]) -> None:
    classifier = classifiers(folders, torch.float32)["softmax"]
    for name, carried in (("pixart", True), ("sdxl", False)):
        diffusion = open_diffusion(folders[name], image_size=IMAGE_SIZE)
        diffusion.describe(LABELS)
        engine = Engine(diffusion, classifier)
        used = engine.settings(Config(strength=0.382)).strength
        wanted = carried_strength(0.382, diffusion.alphas_cumprod) if carried else 0.382
        assert used == wanted
        assert (engine.facts(Config(strength=0.382)).get("strength_asked") == 0.382) == carried


def changed(folder: Path, tmp_path: Path, file: str, **fields: Any) -> Path:
    """A copy of a model's folder with other fields in one of its files; None takes one out."""
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / file
    said = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
def test_a_flows_denoiser_with_another_familys_scheduler_is_refused(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders[name], tmp_path, "model_index.json")
    shutil.copytree(folders["sdxl"] / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    with pytest.raises(UsageError, match=r"scheduler_config\.json: _class_name is .* trained on a flow; take the") as e:
        open_diffusion(folder, image_size=IMAGE_SIZE)
    assert "\n" not in str(e.value)


def test_a_tokenizer_that_names_no_length_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["sdxl"], tmp_path, "tokenizer/tokenizer_config.json", model_max_length=None)
    with pytest.raises(UsageError, match=r"tokenizer_config\.json says no model_max_length; expected"):
        open_diffusion(folder, image_size=IMAGE_SIZE)
