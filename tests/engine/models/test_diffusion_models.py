"""Stable Diffusion, the ImageNet LDM and DiT from folders on disk: numbers, traces and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bench.baselines.literal import filter_angles, literal_step
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.files import read_tensors
from counterlens.engine.models.ldm import quantise
from counterlens.engine.models.load import open_diffusion
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.models.stable_diffusion import make_prompts
from counterlens.engine.packs.architectures import StridedClassifier
from tests.tiny import DIFFUSIONS, IMAGE_SIZE, LABELS, tiny_vq

pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
BATCH = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: save(base / name) for name, save in DIFFUSIONS.items()}


def inputs(diffusion, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(BATCH, *diffusion.latent_shape, generator=g, dtype=torch.float64).to(dtype)
    image = torch.rand(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, generator=g, dtype=torch.float64).to(dtype)
    return z, image, torch.arange(BATCH) % 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_step_equals_literal(folders, name: str, dtype: torch.dtype) -> None:
    diffusion = open_diffusion(folders[name], dtype=str(dtype).removeprefix("torch."))
    diffusion.describe(LABELS)
    torch.manual_seed(0)
    classifier = SoftmaxClassifier(StridedClassifier(width=8).to(dtype).eval().requires_grad_(False), LABELS)
    z, image, target = inputs(diffusion, dtype)
    timestep = torch.full((BATCH,), 401)
    with torch.no_grad():
        expected, score, reference = literal_step(
            diffusion, classifier, z, 401, 381, image, target, **SCALES, angle_deg=45.0
        )
        condition = diffusion.condition(target)
        got, _, kept = GuidedStep(diffusion, classifier)(
            z, timestep, timestep - 20, condition, image, target, **SCALES, angle_deg=45.0
        )
    assert len(condition) == BATCH
    assert diffusion.null_condition(BATCH).shape == condition.shape
    near = ((filter_angles(score, reference, "zero").flatten(1) - math.radians(45)).abs() < 1e-3).any(1)
    assert near.float().mean() <= 0.05
    assert ((got - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1))[~near].max() <= TOLERANCE[
        dtype
    ]
    assert 0.02 < kept.mean() < 0.98


@pytest.mark.parametrize(
    "name", [pytest.param("sd-v", marks=pytest.mark.slow), pytest.param("ldm", marks=pytest.mark.slow), "dit"]
)
def test_step_can_be_traced(folders, name: str) -> None:
    """The condition is an input like any other, and nothing branches on values: one graph for every sample."""
    diffusion = open_diffusion(folders[name])
    diffusion.describe(LABELS)
    classifier = SoftmaxClassifier(StridedClassifier(width=8).eval().requires_grad_(False), LABELS)
    step = GuidedStep(diffusion, classifier, backend="reference")

    def run(z: Tensor, timestep: Tensor, condition: Tensor, image: Tensor, target: Tensor) -> Tensor:
        return step(z, timestep, timestep - 20, condition, image, target, **SCALES, angle_deg=45.0)[0]

    z, image, target = inputs(diffusion, torch.float32)
    z, image, target = z[:2], image[:2], target[:2]
    with torch.no_grad():
        graph = make_fx(run)(z, torch.tensor([401, 401]), diffusion.condition(target), image, target)
        z, target, timestep = z.flip(0) * 0.9, torch.tensor([7, 3]), torch.tensor([101, 301])
        arguments = (z, timestep, diffusion.condition(target), image, target)
        torch.testing.assert_close(graph(*arguments), run(*arguments), rtol=1e-4, atol=1e-4)


def test_text_embeddings_are_the_pipelines(folders) -> None:
    from diffusers import StableDiffusionPipeline

    diffusion = open_diffusion(folders["sd-eps"])
    diffusion.describe(LABELS)
    parts = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    pipeline = StableDiffusionPipeline(
        diffusion.vae, diffusion.text_encoder, diffusion.tokenizer, diffusion.unet, None, **parts,
        requires_safety_checker=False,
    )  # fmt: skip
    prompts = ["a photo of a thing 3.", "a photo of a thing 8."]
    text, empty = pipeline.encode_prompt(prompts, "cpu", 1, True, negative_prompt=["", ""])
    torch.testing.assert_close(diffusion.condition(torch.tensor([3, 8])), text)
    torch.testing.assert_close(diffusion.null_condition(2), empty)
    assert not torch.equal(text[0], text[1])


def test_velocity_becomes_noise(folders) -> None:
    """With v = sqrt(abar) eps - sqrt(1 - abar) z0, what predict_noise returns must be eps: as diffusers' DDIM says."""
    from diffusers import DDIMScheduler

    diffusion = open_diffusion(folders["sd-v"])
    diffusion.describe(LABELS)
    z, _, target = inputs(diffusion, torch.float32)
    scheduler = DDIMScheduler.from_pretrained(folders["sd-v"] / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(50)
    condition, t = diffusion.condition(target), int(scheduler.timesteps[20])
    v = diffusion.unet(z, t, encoder_hidden_states=condition).sample
    z0 = scheduler.step(v, t, z).pred_original_sample
    abar = diffusion.alphas_cumprod[t].float()
    eps = diffusion.predict_noise(z, torch.full((BATCH,), t), condition)
    expected = (z - abar.sqrt() * z0) / (1 - abar).sqrt()
    inside = z0.abs() < 1  # the scheduler clips the others
    assert inside.float().mean() > 0.2
    torch.testing.assert_close(eps[inside], expected[inside], rtol=1e-4, atol=1e-4)


def test_vq_decoding_requantises_straight_through(folders) -> None:
    diffusion = open_diffusion(folders["ldm"])
    z, image, _ = inputs(diffusion, torch.float32)
    torch.testing.assert_close(diffusion.decode(z), diffusion.vqvae.decode(z).sample)
    torch.testing.assert_close(diffusion.encode(image), diffusion.vqvae.encode(image * 2 - 1).latents)
    codes = diffusion.vqvae.quantize.embedding.weight
    _, pull = torch.func.vjp(diffusion.decode, z)
    cotangent = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
    _, pull_rest = torch.func.vjp(
        lambda q: diffusion.vqvae.decoder(diffusion.vqvae.post_quant_conv(q)), quantise(z, codes)
    )
    torch.testing.assert_close(pull(cotangent), pull_rest(cotangent))
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 3), codes)
    nearest = codes[distances.argmin(1)].reshape(BATCH, 4, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantise(z, codes), nearest)


def test_dit_leaves_the_learned_variance_out(folders) -> None:
    diffusion = open_diffusion(folders["dit"])
    diffusion.describe(LABELS)
    z, _, target = inputs(diffusion, torch.float32)
    t = torch.full((BATCH,), 301)
    both = diffusion.transformer(z, t, class_labels=target).sample
    assert both.shape[1] == 8
    torch.testing.assert_close(diffusion.predict_noise(z, t, target), both[:, :4])
    assert diffusion.null_condition(3).tolist() == [10, 10, 10]


def test_labels_find_their_classes(folders) -> None:
    for name in ("ldm", "dit"):
        diffusion = open_diffusion(folders[name])
        diffusion.describe(["thing 7", "thing 2"])  # found by name
        assert diffusion.classes.tolist() == [7, 2]
        diffusion.describe(["cat", "dog"], classes=[4, 9])
        assert diffusion.labels == ["cat", "dog"]
        assert len(diffusion.condition(torch.tensor([1]))) == 1
        diffusion.describe([f"other {i}" for i in range(10)])  # as many: in the same order
        assert diffusion.classes.tolist() == list(range(10))
        with pytest.raises(UsageError, match=r"^labels:.*'cat'"):
            diffusion.describe(["cat", "thing 1"])
        with pytest.raises(UsageError, match=r"^classes: 10 is out of range"):
            diffusion.describe(["cat"], classes=[10])
    assert make_prompts(["cat"], "pets") == ["a photo of a cat, a type of pet."]
    assert make_prompts(["no", "yes"], "smile") == ["a photo of a non-smiling person", "a photo of a smiling person"]
    for prompts in ("a photo", ["one"]):
        with pytest.raises(UsageError, match=r"^prompts:"):
            make_prompts(["a", "b"], prompts)


def test_half_precision_weights_keep_float32_sums(folders) -> None:
    for name in DIFFUSIONS:
        exact = open_diffusion(folders[name])
        half = open_diffusion(folders[name], dtype="bfloat16")
        z, image, target = inputs(exact, torch.float32)
        t = torch.full((BATCH,), 401)
        for diffusion in (exact, half):
            diffusion.describe(LABELS)
        with torch.no_grad():
            a, b = (d.predict_noise(z, t, d.condition(target)) for d in (exact, half))
            assert b.dtype == half.decode(z).dtype == half.encode(image).dtype == torch.float32
        assert 0 < (a - b).abs().mean() / a.abs().mean() < 0.05


def test_image_size_may_be_chosen_for_stable_diffusion(folders) -> None:
    diffusion = open_diffusion(folders["sd-eps"], image_size=32)
    assert diffusion.latent_shape == (4, 8, 8)
    assert diffusion.encode(torch.rand(1, 3, 32, 32)).shape == (1, 4, 8, 8)
    with pytest.raises(UsageError, match=r"^image_size: 20 is no multiple of 8.*16 or 24"):
        open_diffusion(folders["sd-eps"], image_size=20)
    with pytest.raises(UsageError, match=r"^image_size:"):
        open_diffusion(folders["dit"], image_size=32)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_incomplete_and_foreign_folders_are_named(folders, tmp_path: Path) -> None:
    folder = copied(folders["sd-eps"], tmp_path / "a")
    shutil.rmtree(folder / "text_encoder")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CounterlensError, match=r"vae/diffusion_pytorch_model.safetensors, text_encoder/config.json"):
        open_diffusion(folder)
    with pytest.raises(UsageError, match=r"^model: .*neither a folder nor a hub id"):
        open_diffusion(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.ckpt").touch()
    with pytest.raises(UsageError, match=r"model\.ckpt.*counterlens convert"):
        open_diffusion(tmp_path / "empty")
    folder = copied(folders["dit"], tmp_path / "b")
    edit(folder / "transformer" / "config.json", _class_name="SD3Transformer2DModel")
    with pytest.raises(CounterlensError, match=r"config\.json: expected a DiTTransformer2DModel"):
        open_diffusion(folder)
    folder = copied(folders["ldm"], tmp_path / "c")
    shutil.rmtree(folder / "vqvae")
    tiny = tiny_vq()
    tiny.register_to_config(latent_channels=4)
    tiny.save_pretrained(folder / "vqvae")
    with pytest.raises(CounterlensError, match="vqvae"):
        open_diffusion(folder)


def test_wrong_latent_channels(folders, tmp_path: Path) -> None:
    folder = copied(folders["sd-eps"], tmp_path / "a")
    shutil.rmtree(folder / "unet")
    shutil.copytree(folders["ldm"] / "unet", folder / "unet")
    with pytest.raises(UsageError, match=r"^latent channels: the denoiser takes 3, the VAE makes 4"):
        open_diffusion(folder)


def test_tiling_and_mixed_dtypes_are_refused(folders) -> None:
    diffusion = open_diffusion(folders["dit"])
    parts = (diffusion.vae, diffusion.transformer, diffusion.alphas_cumprod)
    diffusion.transformer.proj_out_1.half()
    with pytest.raises(UsageError, match=r"^dtype: the denoiser's weights mix float16 and float32"):
        type(diffusion)(*parts)
    diffusion.transformer.float()
    diffusion.vae.enable_tiling()
    with pytest.raises(UsageError, match=r"^tiling:"):
        type(diffusion)(*parts)


def test_weights_that_do_not_fit_are_named(folders, tmp_path: Path) -> None:
    folder = copied(folders["dit"], tmp_path / "a")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(weights)
    from safetensors.torch import save_file

    save_file({k: v for k, v in tensors.items() if k != "proj_out_2.bias"}, weights)
    with pytest.raises(CounterlensError, match=r"missing keys: proj_out_2\.bias"):
        open_diffusion(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CounterlensError, match="transformer"):
        open_diffusion(folder)


class Malicious:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple:
        return print, ("code ran",)


def test_pickles_with_code_are_refused_and_plain_ones_read(folders, tmp_path: Path, capsys) -> None:
    folder = copied(folders["dit"], tmp_path / "a")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(weights)
    weights.unlink()
    pickled = folder / "vae" / "diffusion_pytorch_model.bin"
    torch.save(tensors, pickled)
    assert open_diffusion(folder).image_size == IMAGE_SIZE
    torch.save({"state_dict": tensors, "callbacks": Malicious()}, pickled)
    with pytest.raises(CounterlensError, match=r"diffusion_pytorch_model\.bin: refused.*print"):
        open_diffusion(folder)
    assert "code ran" not in capsys.readouterr().out
    pickled.write_bytes(b"no pickle")
    with pytest.raises(CounterlensError, match=r"diffusion_pytorch_model\.bin"):
        open_diffusion(folder)


def test_unknown_dtype(folders) -> None:
    with pytest.raises(UsageError, match=r"^dtype: expected one of float32"):
        open_diffusion(folders["dit"], dtype="int8")


def test_half_precision_that_the_device_lacks(folders, monkeypatch) -> None:
    def without_half(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        raise RuntimeError(f'"slow_conv2d_cpu" not implemented for {x.dtype}')

    monkeypatch.setattr(torch.nn.functional, "conv2d", without_half)
    with pytest.raises(UsageError, match=r"^dtype: float16 is not implemented on this cpu .*use float32"):
        open_diffusion(folders["dit"], dtype="float16")
