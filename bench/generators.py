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
from counterlens.engine.profiling.costs import count_costs
from counterlens.engine.runtime.spec import flat

# Peaks of one H100 SXM on paper: dense bfloat16 FLOP/s, bytes/s.
H100 = {"flops": 989e12, "bandwidth": 3.35e12}
CHANNELS = (3, 4, 8, 16, 32)


def unmade(published: Published, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The family's own class over modules without memory; conditions are empty tensors of the right shape."""
    family: Any = resolve_name(f"counterlens.engine.models.{published.family}")
    denoiser, vae = (getattr(diffusers, kind) for kind in family.networks.values())
    with torch.device("meta"):
        parts = vae(**published.vae), denoiser(**published.denoiser)

    def made(self: Any, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(torch.empty(len(prompts), *shape, dtype=dtype) for shape in published.conditions)

    kind = type(family.__name__, (family,), {"embed": made})
    flow = published.family != "pixart:PixArt"
    levels = flow_levels(torch.arange(1000).double() / 1000) if flow else torch.linspace(0.999, 0.005, 1000).double()
    text: Any = type("NoText", (), {"tokenizers": {"text_encoder": type("Side", (), {"padding_side": "right"})()}})()
    for module in parts:
        nn.Module.to(module.eval().requires_grad_(False), dtype)
    model = kind(*parts, levels, text, prediction="flow" if flow else "epsilon", image_size=published.size)
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


def counted(name: str, published: Published) -> dict[str, Any]:
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


def main(
    export: Annotated[bool, typer.Option(help="Check ONNX files of tiny random models instead.")] = False,
    only: Annotated[str, typer.Option(help="One generator's name.")] = "",
    record: Annotated[bool, typer.Option(help="Write bench/results/generators*.json.")] = False,
) -> None:
    """Count what guided steps of published generators cost.

    Example: python -m bench.generators --record
    """
    if export:
        payload: dict[str, Any] = {"exports": exported()}
    else:
        rows = {}
        for name, published in PUBLISHED.items():
            if only in ("", name):
                rows[name] = counted(name, published)
                say(name, {key: value for key, value in rows[name].items() if key != "parts"})
        angles = {
            str(channels): {"share_at_45": share_kept(45, channels), "angle_of_45": carried_over(45, channels),
                            "angle_of_50": carried_over(50, channels)}
            for channels in CHANNELS
        }  # fmt: skip
        payload = {"dtype": "bfloat16", "batch": 1, "peaks_on_paper": H100, "generators": rows, "angles": angles}
    if record:
        say(write_result("generators-export" if export else "generators", payload))


if __name__ == "__main__":
    typer.run(main)
