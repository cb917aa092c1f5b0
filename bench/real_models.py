"""Full-size models with random weights, one guided step each: memory and time by part, `python -m bench.real_models`.

On a GPU: `python -m bench.real_models --model cin256-v2 --dtype fp16 --batch 8 --record`.

Stable Diffusion 1.x and cin256-v2 from their published configurations, with ResNet-50 as the classifier. Random weights
cost what trained ones cost.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench.record import RESULTS, timed, wait, write_result
from counterlens.engine.config import PRESETS
from counterlens.engine.guidance.memory import PeakMemory, checkpointed, weight_bytes
from counterlens.engine.guidance.pullback import PullbackMode, pullback
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.image_classifiers import Logits
from counterlens.engine.models.ldm import ClassContextLatentDiffusion
from counterlens.engine.models.placing import choose_device, full_precision, place
from counterlens.engine.models.preprocessing import Preprocessing
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.models.stable_diffusion import StableDiffusion
from counterlens.engine.runtime.spec import DTYPES

LABELS = [f"class {i}" for i in range(1000)]
IMAGE_SIZE = 256


def alphas_cumprod(start: float, end: float) -> Tensor:
    """Of a scaled-linear schedule over 1000 steps."""
    return (1 - torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def stable_diffusion() -> StableDiffusion:
    """Stable Diffusion 1.x's published configuration at 256x256, as miniSD."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, attention_head_dim=8,
        cross_attention_dim=768,
    )  # fmt: skip
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz0123456789."]
    vocab = {w: i for i, w in enumerate(words + [f"{w}</w>" for w in words[2:]])}
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=1,
            bos_token_id=0, pad_token_id=1, projection_dim=768,
        )
    )  # fmt: skip
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    model = StableDiffusion(vae, unet, text, tokenizer, alphas_cumprod(0.00085, 0.012), image_size=IMAGE_SIZE)
    model.describe(LABELS)
    return model


def cin256() -> ClassContextLatentDiffusion:
    """cin256-v2's published configuration."""
    from diffusers import UNet2DConditionModel, VQModel

    vqvae = VQModel(
        block_out_channels=(128, 256, 512), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2, latent_channels=3, sample_size=256,
        num_vq_embeddings=8192, vq_embed_dim=3, scaling_factor=1.0,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, block_out_channels=(192, 384, 576, 960), layers_per_block=2,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"), cross_attention_dim=512,
        attention_head_dim=[6, 12, 18, 30],
    )  # fmt: skip
    model = ClassContextLatentDiffusion(vqvae, unet, nn.Embedding(1001, 512), alphas_cumprod(0.0015, 0.0195))
    model.describe(LABELS)
    return model


Diffusions = StableDiffusion | ClassContextLatentDiffusion
MODELS: dict[str, Callable[[], Diffusions]] = {
    "stable-diffusion-1.x": stable_diffusion,
    "cin256-v2": cin256,
}


def resnet50() -> SoftmaxClassifier:
    """ResNet-50, resized to 256 and cropped to 224."""
    from transformers import ResNetConfig, ResNetForImageClassification

    module = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    return SoftmaxClassifier(Logits(Preprocessing(IMAGE_SIZE, crop=224), module), LABELS)


class Clock:
    """Seconds by part, in order."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def __call__(self, name: str, fn: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = fn()
        wait()
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start
        return out


@torch.no_grad()
def by_part(
    diffusion: Diffusions,
    classifier: SoftmaxClassifier,
    z: Tensor,
    mode: PullbackMode,
) -> dict[str, float]:
    """Seconds of each part of a guided step, in the order in which `GuidedStep` runs them."""
    clock = Clock()
    batch = len(z)
    t, target = torch.full((batch,), 301, device=z.device), torch.zeros(batch, dtype=torch.long, device=z.device)
    condition, null = diffusion.condition(target), diffusion.null_condition(batch)
    clock("unet, conditional", lambda: diffusion.predict_noise(z, t, condition))
    eps, pull_unet = clock(
        "unet, unconditional", lambda: pullback(lambda z: diffusion.predict_noise(z, t, null), z, mode)
    )
    x0, pull_decoder = clock("decoder", lambda: pullback(lambda z: (diffusion.decode(z) + 1) / 2, z - 0.1 * eps, mode))
    log_p, pull_class = clock("classifier", lambda: pullback(lambda x: classifier.log_prob(x, target), x0, mode))
    g = clock("classifier, backward", lambda: pull_class(torch.ones_like(log_p)))
    for cotangent in (g, torch.sign(x0)):
        g = clock("decoder, backward (two)", lambda c=cotangent: pull_decoder(c))
        clock("unet, backward (two)", lambda g=g: pull_unet(g))
    return {name: round(seconds, 5) for name, seconds in clock.parts.items()}


def build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Diffusions, SoftmaxClassifier]:
    """A diffusion model in `dtype` and the classifier in float32 on a device, where their weights are drawn as well."""
    torch.manual_seed(0)
    with torch.device(device):
        diffusion, classifier = MODELS[name](), resnet50()
    for module in diffusion.modules():
        module.to(dtype)
    classifier.module.to(device)
    place(diffusion, device)
    return diffusion, classifier


@torch.no_grad()
def measure(name: str, batch: int, checkpointing: bool, device: torch.device, dtype: str) -> dict[str, Any]:
    """One model: seconds by part and of a whole step, and the peak of the tensors' memory."""
    diffusion, classifier = build(name, device, DTYPES[dtype])
    modules = [*diffusion.modules(), classifier.module]
    z = torch.randn(batch, *diffusion.latent_shape, device=device)
    image = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    target = torch.zeros(batch, dtype=torch.long, device=device)
    t, settings = torch.full((batch,), 301, device=device), PRESETS["imagenet-class"]
    mode: PullbackMode = "autograd" if checkpointing else "functional"
    step = GuidedStep(diffusion, classifier, mode=mode)
    saving = checkpointed(diffusion.modules()) if checkpointing else nullcontext()
    cuda = device.type == "cuda"
    with frozen(*modules), saving, full_precision():
        condition = diffusion.condition(target)
        # Recomputing is done block by block in the backward pass; parts would say little.
        if cuda and not checkpointing:  # kernels are chosen in the first call
            by_part(diffusion, classifier, z, mode)
        parts = {} if checkpointing else by_part(diffusion, classifier, z, mode)

        def take_step() -> Tensor:
            return step(
                z, t, t - 2, condition, image, target, guidance_scale=settings.guidance_scale,
                class_scale=settings.class_scale, distance_scale=settings.distance_scale, angle_deg=settings.angle,
            )[0]  # fmt: skip

        z_prev = take_step()
        times = [timed(take_step) for _ in range(5 if cuda else 1)]
        with PeakMemory() as memory:
            take_step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            take_step()
    return {
        "batch": batch,
        "image_size": IMAGE_SIZE,
        "dtype": dtype,
        "checkpointing": checkpointing,
        "parameters": {type(m).__name__: sum(p.numel() for p in m.parameters()) for m in modules},
        "weights_gb": round(weight_bytes(modules) / 1e9, 3),
        "peak_of_step_gb": round(memory.peak / 1e9, 3),
        "peak_of_process_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "peak_of_device_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None,
        "seconds_of_step": round(sorted(times)[len(times) // 2], 5),
        "seconds_by_part": parts,
        "finite": bool(z_prev.isfinite().all()),
    }


def main(
    model: Annotated[str, typer.Option(help="stable-diffusion-1.x or cin256-v2.")],
    batch: Annotated[int, typer.Option(help="Samples in the step.")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the diffusion model: fp32, fp16 or bf16.")] = "fp32",
    record: Annotated[bool, typer.Option(help="Write bench/results/real-models-cpu.json, or -cuda.")] = False,
) -> None:
    """Measure one full-size model in a process of its own, whose peak memory is then the model's.

    Example: python -m bench.real_models --model cin256-v2 --record
    """
    where = choose_device(device)
    row = measure(model, batch, checkpointing, where, dtype)
    print(json.dumps({model: row}, indent=1))
    if record:
        name = f"real-models-{where.type}"
        path = RESULTS / f"{name}.json"
        payload: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        payload.pop("environment", None)
        kind = "" if dtype == "fp32" else f", {dtype}"
        key = f"{model}, batch {batch}{kind}{', checkpointing' if checkpointing else ''}"
        write_result(name, payload | {key: row})


if __name__ == "__main__":
    typer.run(main)
