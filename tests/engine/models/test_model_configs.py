"""Fields of configurations that change what a diffusion model means: respected, or refused by file and field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from counterlens.engine import Config, Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.schedule import SPACINGS
from counterlens.engine.guidance.solvers import SOLVERS
from counterlens.engine.models.fields import SCHEDULERS, read_noise_levels
from counterlens.engine.models.flow import FLOW_SCHEDULERS
from counterlens.engine.models.load import open_diffusion
from tests.tiny import DIFFUSIONS, IMAGE_SIZE, LABELS, tiny_unet

pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
KINDS = ("sd-eps", "ldm", "dit")
Z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("configs")
    return {name: DIFFUSIONS[name](base / name) for name in KINDS}


def variant(folder: Path, to: Path, part: str, **change: Any) -> Path:
    """A copy with other fields in one part's configuration."""
    shutil.copytree(folder, to)
    path = to / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return to


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_backbone_predicts_what_its_scheduler_says(folders, tmp_path: Path, kind: str, prediction: str) -> None:
    """The clean latents of diffusers' own scheduler, from what the network says."""
    folder = variant(folders[kind], tmp_path / "v", "scheduler", prediction_type=prediction)
    diffusion = open_diffusion(folder, dtype="float64")
    diffusion.describe(LABELS)
    z = Z[:, : diffusion.latent_shape[0]]
    said: list[Tensor] = []
    network = diffusion.transformer if kind == "dit" else diffusion.unet
    with torch.no_grad(), network.register_forward_hook(lambda m, i, out: said.append(out.sample)):
        eps = diffusion.predict_noise(z, torch.full((2,), 701), diffusion.condition(torch.tensor([3, 5])))
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    expected = scheduler.step(said[0][:, : z.shape[1]], 701, z).pred_original_sample
    abar = diffusion.alphas_cumprod[701]
    torch.testing.assert_close((z - (1 - abar).sqrt() * eps) / abar.sqrt(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["sd-eps", "dit"])
@pytest.mark.parametrize(
    ("fields", "mean", "std"),
    [
        ({"shift_factor": 0.1159}, [0.1159] * 4, [1.0] * 4),
        ({"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 3.0, 0.5, 1.0]},
         [0.1, -0.2, 0.3, 0.0], [2.0, 3.0, 0.5, 1.0]),
        ({"scaling_factor": 0.3611}, [0.0] * 4, [1.0] * 4),
    ],
)  # fmt: skip
def test_latents_have_the_scale_of_their_vae(
    folders, tmp_path: Path, kind: str, fields: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    diffusion = open_diffusion(variant(folders[kind], tmp_path / "v", "vae", **fields), dtype="float64")
    m, s = (torch.tensor(v, dtype=torch.float64).reshape(4, 1, 1) for v in (mean, std))
    image = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    scaling = fields.get("scaling_factor", 0.18215)
    raw = diffusion.vae.encode(image * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(diffusion.encode(image), (raw - m) / s * scaling)
    torch.testing.assert_close(diffusion.decode(Z), diffusion.vae.decode(Z / scaling * s + m).sample)


REFUSED = [
    ("sd-eps", "unet", {"class_embed_type": "projection"}),
    ("sd-eps", "unet", {"class_embed_type": "simple_projection"}),
    ("sd-eps", "unet", {"num_class_embeds": 1000}),
    ("sd-eps", "unet", {"addition_embed_type": "text_image"}),
    ("sd-eps", "unet", {"addition_embed_type": "image"}),
    ("sd-eps", "unet", {"encoder_hid_dim_type": "image_proj"}),
    ("sd-eps", "unet", {"encoder_hid_dim": 24}),
    ("sd-eps", "unet", {"attention_type": "gated"}),
    ("sd-eps", "unet", {"dual_cross_attention": True}),
    ("sd-eps", "unet", {"sample_size": [4, 8]}),
    ("sd-eps", "unet", {"sample_size": None}),
    ("sd-eps", "unet", {"guidance_embeds": True}),
    ("sd-eps", "unet", {"time_cond_proj_dim": 8}),
    ("ldm", "unet", {"time_cond_proj_dim": 8}),
    ("ldm", "unet", {"num_class_embeds": 10}),
    ("dit", "transformer", {"sample_size": "4"}),
    ("dit", "transformer", {"caption_channels": 4096}),
    ("dit", "transformer", {"norm_type": "ada_norm_single"}),
    ("sd-eps", "vae", {"scaling_factor": 0}),
    ("sd-eps", "vae", {"scaling_factor": None}),
    ("sd-eps", "vae", {"shift_factor": "a little"}),
    ("sd-eps", "vae", {"latents_mean": [0.5] * 4}),
    ("sd-eps", "vae", {"latents_mean": [0.5] * 3, "latents_std": [1.0] * 3}),
    ("sd-eps", "vae", {"latents_std": [0.0] * 4, "latents_mean": [0.5] * 4}),
    ("sd-eps", "vae", {"shift_factor": 0.1, "latents_std": [1.0] * 4, "latents_mean": [0.5] * 4}),
    ("sd-eps", "vae", {"in_channels": 4}),
    ("dit", "vae", {"temporal_compression_ratio": 4}),
    ("ldm", "vqvae", {"norm_type": "spatial"}),
    ("ldm", "vqvae", {"lookup_from_codebook": True}),
    ("sd-eps", "text_encoder", {"model_type": "t5"}),
    ("sd-eps", "text_encoder", {"use_attention_mask": True}),
    ("sd-eps", "scheduler", {"prediction_type": "flow_prediction"}),
    ("dit", "scheduler", {"prediction_type": "original"}),
    ("sd-eps", "scheduler", {"timestep_spacing": "quadratic"}),
    ("sd-eps", "scheduler", {"thresholding": True}),
    ("sd-eps", "scheduler", {"beta_schedule": "exponential"}),
    ("sd-eps", "scheduler", {"trained_betas": [0.1, 0.2, 0.3]}),
    ("sd-eps", "scheduler", {"trained_betas": [0.1, -0.2], "num_train_timesteps": 2}),
    ("ldm", "scheduler", {"beta_start": 0.0}),
    ("ldm", "scheduler", {"rescale_betas_zero_snr": True}),
    ("ldm", "scheduler", {"snr_shift_scale": 3.0}),
    ("ldm", "scheduler", {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}),
    ("ldm", "scheduler", {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}),
    ("ldm", "scheduler", {"_class_name": None}),
]


@pytest.mark.parametrize(("kind", "part", "change"), REFUSED)
def test_what_is_not_done_here_is_refused_by_file_and_field(
    folders, tmp_path: Path, kind: str, part: str, change: dict[str, Any]
) -> None:
    folder = variant(folders[kind], tmp_path / "v", part, **change)
    words = "|".join([*change, "betas"]) if part == "scheduler" else "|".join(change)
    with pytest.raises(UsageError, match=rf"{part}/\w*config\.json: .*({words})") as caught:
        open_diffusion(folder)
    assert "\n" not in str(caught.value)


def test_every_family_of_schedulers_is_known_or_refused() -> None:
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    assert set(SCHEDULERS) < set(names)
    for name in set(names) - {*SCHEDULERS, *FLOW_SCHEDULERS}:
        with pytest.raises(UsageError, match=rf"^here\.json: _class_name is '{name}'"):
            read_noise_levels(Path("here.json"), {"_class_name": name, "beta_start": 1e-4, "beta_end": 0.02})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_are_the_schedulers_own(name: str) -> None:
    """Its own defaults and kinds of betas, whatever else of its sampler the file says."""
    kinds = [{}, {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
             {"beta_schedule": "scaled_linear", "beta_end": 0.3, "num_train_timesteps": 50},
             {"trained_betas": torch.linspace(0.01, 0.02, 40).tolist(), "num_train_timesteps": 40}]  # fmt: skip
    for fields in kinds:
        scheduler = getattr(diffusers, name)(**fields)
        got = read_noise_levels(Path("here.json"), json.loads(scheduler.to_json_string()))
        assert torch.equal(got.alphas_cumprod, scheduler.alphas_cumprod.double())
        least = read_noise_levels(Path("here.json"), {"_class_name": name, **fields})
        assert torch.equal(got.alphas_cumprod, least.alphas_cumprod)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        # as published: Stable Diffusion 1.5 and 2.1, DiT, and files of other versions
        ("scheduler", {"_class_name": "PNDMScheduler", "clip_sample": False, "skip_prk_steps": True}),
        ("scheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None}),
        ("scheduler", {"variance_type": "learned_range", "clip_sample": False}),
        ("transformer", {"_class_name": "Transformer2DModel", "vector_embeds": None, "use_linear_projection": False}),
        ("vae", {"force_upcast": False, "sample_size": 512, "_name_or_path": "somewhere", "some_new_field": None}),
    ],
)  # fmt: skip
def test_fields_of_samplers_and_of_nothing_are_passed(
    folders, tmp_path: Path, part: str, change: dict[str, Any]
) -> None:
    plain = open_diffusion(folders["dit"])
    diffusion = open_diffusion(variant(folders["dit"], tmp_path / "v", part, **change))
    assert torch.equal(diffusion.alphas_cumprod, plain.alphas_cumprod)
    assert torch.equal(diffusion.decode(Z.float()), plain.decode(Z.float()))


@pytest.mark.parametrize(("channels", "words"), [(9, "inpainting"), (8, "editing"), (5, "depth"), (6, "belong")])
def test_denoisers_that_take_more_than_latents_are_refused(folders, tmp_path: Path, channels: int, words: str) -> None:
    folder = tmp_path / "v"
    shutil.copytree(folders["sd-eps"], folder)
    config = dict(tiny_unet(4, 16).config) | {"in_channels": channels}
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(UsageError, match=rf"in_channels.*{words}"):
        open_diffusion(folder)


@pytest.mark.parametrize(("kind", "words"), [("sd-eps", "text encoder"), ("ldm", "class embedder")])
def test_contexts_of_another_width_are_refused(folders, tmp_path: Path, kind: str, words: str) -> None:
    folder = tmp_path / "v"
    shutil.copytree(folders[kind], folder)
    tiny_unet(4 if kind == "sd-eps" else 3, 24).save_pretrained(folder / "unet")
    with pytest.raises(UsageError, match=rf"^{words}: its 16 channels are not the UNet's 24 \(cross_attention_dim\)"):
        open_diffusion(folder)


@pytest.mark.parametrize("name", ["AutoencoderTiny", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE", "VQModel"])
def test_other_vaes_are_refused(folders, tmp_path: Path, name: str) -> None:
    folder = variant(folders["sd-eps"], tmp_path / "v", "vae", _class_name=name)
    with pytest.raises(CounterlensError, match=rf"vae/config\.json: expected a AutoencoderKL, got a {name}"):
        open_diffusion(folder)


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_that_overflows_in_float16_stays_in_float32(folders, tmp_path: Path, upcast: bool) -> None:
    folder = variant(folders["sd-eps"], tmp_path / "v", "vae", force_upcast=upcast)
    half = open_diffusion(folder, dtype="float16")
    assert half.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert half.unet.dtype == torch.float16
    if upcast:
        assert half.decode(Z.float()).isfinite().all()
    assert open_diffusion(folder, dtype="bfloat16").vae.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def zero_snr(folders, tmp_path_factory) -> dict[str, Engine]:
    """Engines of models that leave nothing but noise at the last timestep, by what they predict."""
    engines = {}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    for prediction, kind in (("v_prediction", "sd-eps"), ("sample", "dit")):
        folder = variant(
            folders[kind], tmp_path_factory.mktemp("zero") / "v", "scheduler",
            prediction_type=prediction, rescale_betas_zero_snr=True,
        )  # fmt: skip
        engines[prediction] = Engine.from_pretrained(folder, net, labels=LABELS, runtime="eager", device="cpu")
    return engines


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_runs_from_pure_noise(zero_snr, prediction: str, spacing: str, solver: str) -> None:
    config = Config(mode="official", steps=5, strength=1.0, spacing=spacing, solver=solver)
    got = zero_snr[prediction].counterfactual(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE), config=config)
    assert got.errors == [None]
    assert got.images.isfinite().all()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_at_zero_snr_the_clean_latents_are_what_the_model_says(zero_snr, prediction: str) -> None:
    """There z0 is -v, and a predicted sample itself: noise in between must not lose it in float32."""
    diffusion = zero_snr[prediction].diffusion
    t = len(diffusion.alphas_cumprod) - 1
    z, condition = Z.float(), diffusion.condition(torch.tensor([3, 5]))
    said: list[Tensor] = []
    network = diffusion.transformer if prediction == "sample" else diffusion.unet
    with torch.no_grad(), network.register_forward_hook(lambda m, i, out: said.append(out.sample)):
        eps = diffusion.predict_noise(z, torch.full((2,), t), condition)
    abar = diffusion.alphas_cumprod[t].float()
    assert 0 < abar <= 2.0**-24
    got = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
    expected = said[0][:, :4] if prediction == "sample" else -said[0]
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


def test_noise_levels_of_ones_own_model_are_checked(zero_snr) -> None:
    engine = zero_snr["v_prediction"]
    levels = engine.diffusion.alphas_cumprod
    for wrong in (levels.flip(0), torch.cat([levels[:-1], torch.zeros(1)]), torch.cat([torch.ones(1), levels[1:]])):
        engine.diffusion.alphas_cumprod = wrong
        try:
            with pytest.raises(UsageError, match=r"^diffusion: alphas_cumprod"):
                Engine(engine.diffusion, engine.classifier)
        finally:
            engine.diffusion.alphas_cumprod = levels


def test_a_models_own_spacing_is_said(folders, tmp_path: Path) -> None:
    folder = variant(folders["dit"], tmp_path / "v", "scheduler", timestep_spacing="trailing")
    with pytest.warns(UserWarning, match=r"scheduler_config\.json: timestep_spacing is trailing"):
        open_diffusion(folder)
