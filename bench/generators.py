"""What one guided step of a published generator costs, counted on the meta device: `python -m bench.generators`.

No weights are needed: the step is traced through empty tensors, and floating point operations, bytes and the peak of
memory are counted, in bfloat16 at batch 1 and each generator's own image size; the classifier is one convolution, which
weighs nothing beside the rest. `--export` writes and checks ONNX files of the guided steps of tiny random models.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Annotated, Any

import diffusers
import torch
import typer
from torch import Tensor, nn

from bench.published import PUBLISHED, Published
from bench.record import say, write_result
from counterlens.engine.chance import carried_over, share_kept
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.predictions import flow_levels
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.models.stable_diffusion import StableDiffusion
from counterlens.engine.profiling.costs import count_costs
from counterlens.engine.runtime.spec import flat

# Peaks of one H100 SXM on paper: dense bfloat16 FLOP/s, bytes/s.
H100 = {"flops": 989e12, "bandwidth": 3.35e12}
CHANNELS = (3, 4, 8, 16, 32)


def unmade(published: Published, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Any:
    """The family's own class over modules without memory, or with random weights on a device; so are conditions."""
    family: Any = resolve_name(f"counterlens.engine.models.{published.family}")
    denoiser, vae = (getattr(diffusers, kind) for kind in family.networks.values())
    with torch.device(device):
        parts = vae(**published.vae), denoiser(**published.denoiser)

    def made(self: Any, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        where = "cpu" if device == "meta" else device  # prompts' embeddings are kept on the CPU: they need values
        return tuple(torch.randn(len(prompts), *shape, dtype=dtype, device=where) for shape in published.conditions)

    flow = "transformer" in family.networks and published.family != "pixart:PixArt"
    own = {"embed": made, "_embed": lambda self, prompt: made(self, [prompt])[0]}  # of several tensors, or of one
    kind = type(family.__name__, (family,), own)
    levels = flow_levels(torch.arange(1000).double() / 1000) if flow else torch.linspace(0.999, 0.005, 1000).double()
    text: Any = type("NoText", (), {"tokenizers": {"text_encoder": type("Side", (), {"padding_side": "right"})()}})()
    for module in parts:
        nn.Module.to(module.eval().requires_grad_(False), dtype)
    options = {"prediction": "flow" if flow else "epsilon", "image_size": published.size}
    if issubclass(family, StableDiffusion):
        encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=published.conditions[0][-1]))
        model = kind(*parts, encoder, None, levels, **options)
    else:
        model = kind(*parts, levels, text, **options)
    model.labels = ["a", "b"]
    return model


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as one operation that keeps no scores, which is what a GPU runs."""
    given = nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if query.device.type != "meta":
            return given(query, key, value, attn_mask=attn_mask, **options)
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False)[0]
        return out  # a mask over 300 tokens weighs nothing beside the rest

    nn.functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = given


def counted(published: Published) -> dict[str, Any]:
    """FLOPs, bytes and memory of one guided step, and how long an H100 would take at its peaks on paper."""
    diffusion = unmade(published)
    with torch.device("meta"):
        module = nn.Sequential(
            nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2)
        )
    classifier = SoftmaxClassifier(module.requires_grad_(False), ["a", "b"])
    step = flat(GuidedStep(diffusion, classifier, mode="autograd", backend="reference"))
    z = torch.empty(1, *diffusion.latent_shape, device="meta")
    timestep = torch.empty(1, dtype=torch.long, device="meta")
    condition = [torch.empty(1, *shape, device="meta") for shape in published.conditions]
    image = torch.empty(1, 3, published.size, published.size, device="meta")
    scales = [torch.empty(1, device="meta") for _ in range(4)]
    with fused_attention():
        costs = count_costs(step, (z, timestep, timestep, *condition, image, timestep, *scales))
    weights = {part: sum(p.numel() * p.element_size() for p in m.parameters())
               for part, m in (("denoiser", diffusion.denoiser), ("vae", diffusion.vae))}  # fmt: skip
    flops, moved = sum(c.flops for c in costs.values()), sum(c.bytes for c in costs.values())
    return {
        "parameters": sum(p.numel() for p in diffusion.denoiser.parameters()),
        "latents": list(diffusion.latent_shape),
        "image_size": published.size,
        "weights_gib": round(sum(weights.values()) / 2**30, 2),
        "peak_gib": round(max(c.peak_bytes for c in costs.values()) / 2**30, 2),
        "tflop": round(flops / 1e12, 2),
        "gib_moved": round(moved / 2**30, 1),
        "h100_seconds_by_flops": round(flops / H100["flops"], 4),
        "h100_seconds_by_bytes": round(moved / H100["bandwidth"], 4),
        "parts": {part: {"tflop": round(c.flops / 1e12, 3), "gib": round(c.bytes / 2**30, 2),
                         "peak_gib": round(c.peak_bytes / 2**30, 2)} for part, c in costs.items()},
    }  # fmt: skip


def exported() -> dict[str, Any]:
    """Worst relative difference of each exported guided step from eager, at batches 1, 3 and 8."""
    from counterlens.engine.models.load import open_diffusion
    from counterlens.engine.packs.architectures import StridedClassifier
    from counterlens.engine.runtime import artefacts
    from counterlens.engine.runtime.spec import Spec
    from counterlens.export import Store
    from tests.tiny import IMAGE_SIZE, LABELS
    from tests.tiny_generators import GENERATORS, VARIANTS

    rows = {}
    for name, save in (GENERATORS | VARIANTS).items():
        with tempfile.TemporaryDirectory() as folder:
            diffusion = open_diffusion(save(Path(folder) / name), image_size=IMAGE_SIZE)
            diffusion.describe(LABELS)
            torch.manual_seed(0)
            classifier = SoftmaxClassifier(StridedClassifier(width=8).eval().requires_grad_(False), LABELS)
            report = artefacts.build(Spec(diffusion, classifier), "onnx", Store(Path(folder) / "store")).report[
                "parity"
            ]
        rows[name] = {key: report[key] for key in ("batches", "worst", "median", "left_out")}
        say(name, rows[name])
    return rows


@torch.no_grad()
def unconditional(folder: str, image: Path, prompt: str, image_size: int | None, dtype: str) -> list[dict[str, Any]]:
    """How much it matters what stands for FLUX.1's unconditional prediction: directions that the filter compares with.

    Ours is eps(prompt) - eps("") at the same guidance; beside it the empty prompt at guidance 1, and both at 1. Angles
    are means over locations, in degrees; lengths are of the whole direction, in units of ours.
    """
    from counterlens.engine.images.files import load_image
    from counterlens.engine.models.load import open_diffusion

    diffusion: Any = open_diffusion(folder, image_size=image_size, dtype=dtype)
    diffusion.describe([prompt], prompts=[prompt])
    z0 = diffusion.encode(load_image(image, diffusion.image_size)[None])
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    given, rows = diffusion.guidance, []
    for t in (200, 400, 600, 800):
        abar, time = diffusion.alphas_cumprod[t].to(z0), torch.tensor([t])
        z = abar.sqrt() * z0 + (1 - abar).sqrt() * noise
        said: dict[tuple[str, float], Tensor] = {}
        for guidance in (given, 1.0):
            diffusion.guidance = guidance
            said["prompt", guidance] = diffusion.predict_noise(z, time, diffusion.condition(torch.tensor([0])))
            said["", guidance] = diffusion.predict_noise(z, time, diffusion.null_condition(1))
        ours = said["prompt", given] - said["", given]
        others = {"empty at 1": said["prompt", given] - said["", 1.0], "both at 1": said["prompt", 1.0] - said["", 1.0]}
        row: dict[str, Any] = {"timestep": t, "guidance": given}
        for name, other in others.items():
            cosine = torch.cosine_similarity(ours, other, dim=1).clamp(-1, 1)
            row[name] = {"angle": cosine.acos().rad2deg().mean().item(), "length": (other.norm() / ours.norm()).item()}
        rows.append(row)
        say(row)
    return rows


def main(
    export: Annotated[bool, typer.Option(help="Check ONNX files of tiny random models instead.")] = False,
    only: Annotated[str, typer.Option(help="One generator's name.")] = "",
    flux: Annotated[str, typer.Option(help="A FLUX.1-dev folder: what stands for no prompt is compared instead.")] = "",
    image: Annotated[Path | None, typer.Option(help="An image for --flux.")] = None,
    prompt: Annotated[str, typer.Option(help="A prompt for --flux.")] = "a photo of a cat",
    image_size: Annotated[int | None, typer.Option(help="Side in pixels for --flux.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights for --flux.")] = "bfloat16",
    record: Annotated[bool, typer.Option(help="Write bench/results/generators*.json.")] = False,
) -> None:
    """Count what guided steps of published generators cost.

    Example: python -m bench.generators --record
    """
    name = "generators-export" if export else "generators-unconditional" if flux else "generators"
    if export:
        payload: dict[str, Any] = {"exports": exported()}
    elif flux:
        if image is None:
            raise typer.BadParameter("--flux needs --image")
        payload = {"directions": unconditional(flux, image, prompt, image_size, dtype)}
    else:
        rows = {}
        for generator, published in PUBLISHED.items():
            if only in ("", generator):
                rows[generator] = counted(published)
                say(generator, {key: value for key, value in rows[generator].items() if key != "parts"})
        angles = {
            str(channels): {"share_at_45": share_kept(45, channels), "angle_of_45": carried_over(45, channels),
                            "angle_of_50": carried_over(50, channels)}
            for channels in CHANNELS
        }  # fmt: skip
        payload = {"dtype": "bfloat16", "batch": 1, "peaks_on_paper": H100, "generators": rows, "angles": angles}
    if record:
        say(write_result(name, payload))


if __name__ == "__main__":
    typer.run(main)
