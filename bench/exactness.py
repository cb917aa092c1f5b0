"""Our guided step and whole loop against the literal baseline on the digits pack: `python -m bench.exactness`.

R comes after the filter, so one location that flips at the angle limit rescales the rest of its sample: samples with a
location so near the limit that rounding could flip it are left out, and their share is reported.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.baselines.literal import filter_angles, literal_loop, literal_step
from bench.record import RESULTS, write_result
from counterlens.engine.config import PRESETS, StepOptions
from counterlens.engine.core.result import image_seed
from counterlens.engine.guidance.jobs import seeded_noise
from counterlens.engine.guidance.pullback import PULLBACK_MODES
from counterlens.engine.guidance.sampler import sample
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.latent import ClassConditionalLatentDiffusion
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack
from counterlens.kernels.consensus import MODES

NEAR_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4}  # radians; gradients agree about ten times closer
SCALES = {"guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25}


def relative_error(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference of each sample over its largest magnitude: [B]."""
    return (a - b).abs().flatten(1).amax(1) / b.abs().flatten(1).amax(1)


def open_models(pack: Pack, dtype: torch.dtype) -> tuple[ClassConditionalLatentDiffusion, SoftmaxClassifier]:
    """The pack's generator and its clean classifier in `dtype`."""
    diffusion, classifier = pack.diffusion(), pack.classifier("clean")
    for module in (*diffusion.modules(), classifier.module):
        module.to(dtype)
    return diffusion, classifier


@torch.no_grad()
def one_step(
    pack: Pack, dtype: torch.dtype, count: int = 32, timesteps: tuple[int, ...] = (61, 341)
) -> list[dict[str, Any]]:
    """Errors of one step for every filter mode, pullback mode and gradient, at the given timesteps."""
    diffusion, classifier = open_models(pack, dtype)
    image = pack.samples("validation", count=count, marker="random").images.to(dtype)
    target = (classifier.logits(image).topk(2).indices[:, 1]).long()
    noise = seeded_noise(diffusion.latent_shape, list(range(count)), image)
    z_clean, angle = diffusion.encode(image), 45.0
    rows = []
    for mode, detached in itertools.product(MODES, (False, True)):
        errors: dict[str, list[Tensor]] = {pull: [] for pull in PULLBACK_MODES}
        near: list[Tensor] = []
        for t in timesteps:
            abar = diffusion.alphas_cumprod[t].to(dtype)
            z = abar.sqrt() * z_clean + (1 - abar).sqrt() * noise
            expected, score, reference = literal_step(
                diffusion, classifier, z, t, t - 20, image, target,
                **SCALES, angle_deg=angle, mode=mode, detached=detached,
            )  # fmt: skip
            angles = filter_angles(score, reference, mode).reshape(count, -1)
            near.append(((angles - math.radians(angle)).abs() < NEAR_LIMIT[dtype]).any(1) & (mode != "off"))
            timestep = torch.full((count,), t)
            for pull in PULLBACK_MODES:
                step = GuidedStep(
                    diffusion,
                    classifier,
                    StepOptions(filter=mode, gradient="detached" if detached else "exact"),
                    mode=pull,
                )
                got, _, _ = step(
                    z, timestep, timestep - 20, target, image, target, **SCALES, angle_deg=angle
                )  # fmt: skip
                errors[pull].append(relative_error(got, expected))
        left_out = torch.cat(near)
        for pull in PULLBACK_MODES:
            error = torch.cat(errors[pull])
            rows.append(
                {
                    "filter": mode,
                    "gradient": "detached" if detached else "exact",
                    "pullback": pull,
                    "dtype": str(dtype).removeprefix("torch."),
                    "worst": error[~left_out].max().item(),
                    "left_out": left_out.double().mean().item(),
                    "worst_with_left_out": error.max().item(),
                }
            )
    return rows


@torch.no_grad()
def whole_loop(pack: Pack, count: int = 8, preset: str = "pairs-class") -> dict[str, Any]:
    """Relative error of the final latents of a published schedule in float64."""
    diffusion, classifier = open_models(pack, torch.float64)
    image = pack.samples("test", count=count, marker="random").images.double()
    target = classifier.logits(image).topk(2).indices[:, 1]
    seeds = [image_seed(x, 0) for x in image]
    settings = PRESETS[preset]
    run = sample(diffusion, classifier, image, target, seeds, settings)
    expected = literal_loop(
        diffusion, classifier, image, target, seeded_noise(diffusion.latent_shape, seeds, image),
        steps=settings.steps, strength=settings.strength, guidance_scale=settings.guidance_scale,
        class_scale=settings.class_scale, distance_scale=settings.distance_scale, angle_deg=settings.angle,
    )  # fmt: skip
    error = relative_error(run.z, expected)
    return {"preset": preset, "steps": run.kept_fraction.shape[1], "samples": count, "worst": error.max().item()}


def main(
    pack: Annotated[str, typer.Option(help="Pack or folder.")] = "digits",
    loop: Annotated[bool, typer.Option(help="Also run the whole loop (minutes).")] = True,
) -> None:
    """Compare with the literal baseline and record the errors.

    Example: python -m bench.exactness --no-loop
    """
    opened = Pack(pack)
    rows = one_step(opened, torch.float64) + one_step(opened, torch.float32)
    path = RESULTS / "exactness.json"
    payload: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    payload.pop("environment", None)
    payload["one_step"] = rows
    for row in rows:
        print(json.dumps(row))
    if loop:
        payload["whole_loop"] = whole_loop(opened)
        print(json.dumps(payload["whole_loop"]))
    write_result("exactness", payload)


if __name__ == "__main__":
    typer.run(main)
