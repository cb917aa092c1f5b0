"""What can be compiled: the guided step or a part of it, with its inputs, its outputs and what identifies it."""

from __future__ import annotations

import copy
import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import counterlens.export
import counterlens.kernels
from counterlens.export.store import sources_digest, weights_digest

from .. import guidance, models
from ..config import StepOptions
from ..errors import UsageError
from ..guidance.step import CARRIED, EXACT, GuidedStep, carried_names
from ..models.conditions import CONDITION, floats_to, grouped, named, tensors
from ..models.protocols import Classifier, Decoder, Diffusion
from .fingerprint import fingerprint
from .precision import in_precision

# Batches are padded to these sizes: with the same shape a sample's result never depends on its neighbours.
SLOTS = (1, 2, 4, 8, 16)
STEP = "guided-step"
SCALES = ("guidance_scale", "class_scale", "distance_scale", "angle_deg")
INPUTS = ("z", "timestep", "timestep_prev", "condition", "image", "target", *SCALES)
OUTPUTS = ("z_prev", "z0", "kept_fraction")
SIGNATURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    STEP: (INPUTS, OUTPUTS),
    "unet": (("z", "timestep", "condition"), ("noise",)),
    "vae-encoder": (("image",), ("z",)),
    "vae-decoder": (("z",), ("image",)),  # nominally in [-1, 1]
    "classifier": (("image",), ("logits",)),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@cache
def code_version() -> str:
    """Hash of the sources that a compiled step is made from."""
    packages = (counterlens.export, counterlens.kernels, guidance, models)
    folders = [Path(p).resolve() for package in packages for p in package.__path__]
    return sources_digest([*folders, Path(__file__).parent])[:16]


@cache
def machine() -> str:
    """The processor and operating system, for what is only right where it was made or measured."""
    names = [platform.machine(), platform.system()]
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names += [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "flags"))][:2]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Spec:
    """A guided step, or a part of it, with everything fixed that decides its graph; scales and angle stay inputs.

    Args:
        diffusion, classifier: see `engine.models.protocols`.
        what: `guided-step`, `unet`, `vae-encoder`, `vae-decoder` or `classifier`.
        options, reused, chunk, decoder: see `GuidedStep`.
        dtype: of weights and activations, `fp32`, `fp16` or `bf16`; inputs, outputs and guidance stay float32.
        weights: hash of the models' weights where it is known already, such as a pack's manifest.
        images: [N, 3, H, W] in [0, 1], real ones to compare on where there are some; they are no part of the key.
    """

    diffusion: Diffusion
    classifier: Classifier
    what: str = STEP
    options: StepOptions = EXACT
    reused: tuple[str, ...] = ()
    chunk: int = 1
    dtype: str = "fp32"
    weights: str | None = None
    decoder: Decoder | None = None
    images: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.what not in SIGNATURES:
            raise UsageError(f"what: expected one of {', '.join(SIGNATURES)}, got {self.what!r}")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order; a condition of several tensors is several inputs."""
        names = SIGNATURES[self.what][0]
        if CONDITION in names:
            names = named(names, len(tensors(self.diffusion.null_condition(1))))
        return names + carried_names(self.reused)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        if self.what != STEP:
            return SIGNATURES[self.what][1]
        more = ("guidance",) if self.options.with_guidance else ()
        return OUTPUTS + more + carried_names(kind for kind in self.options.reuses if kind not in self.reused)

    @property
    def modules(self) -> list[nn.Module]:
        """Every module of the models."""
        own = [] if self.decoder is None else [self.decoder.module]
        return [*self.diffusion.modules(), self.classifier.module, *own]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(p for m in self.modules for p in m.parameters()).device

    @property
    def precision(self) -> str:
        """The coarsest of `dtype` and the data types of the weights as they are given: what parity can be asked of."""
        held = {p.dtype for m in self.modules for p in m.parameters()} | {DTYPES[self.dtype]}
        return next(name for name in ("bf16", "fp16", "fp32") if DTYPES[name] in held or name == "fp32")

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of all weights."""
        return self.weights or weights_digest(self.modules)

    @cached_property
    def models_hash(self) -> str:
        """SHA-256 of everything else that the models are: noise levels, scaling, settings, constants, code."""
        return fingerprint(self.diffusion, self.classifier, self.decoder, hashed=self.modules)

    def key(self, target: str) -> dict[str, Any]:
        """Everything an artefact depends on, as JSON values; `target` is a format of the registry."""
        key = {
            "what": self.what,
            "target": target,
            "weights": self.weights_hash,
            "models": self.models_hash,
            "code": code_version(),
            "latent": list(self.diffusion.latent_shape),
            "image": self.diffusion.image_size,
            "dtype": self.dtype,
        }
        if self.what == STEP:
            key |= {"options": self.options.model_dump(), "reused": list(self.reused), "chunk": self.chunk}
        return key

    def step(self) -> GuidedStep:
        """The guided step in eager PyTorch, kernels and all."""
        diffusion, classifier = in_precision(self.diffusion, self.classifier, DTYPES[self.dtype])
        decoder = self.decoder
        if decoder is not None and self.dtype != "fp32":
            decoder = copy.deepcopy(decoder)
            decoder.module.to(DTYPES[self.dtype]).requires_grad_(False)
        return GuidedStep(diffusion, classifier, self.options, chunk=self.chunk, reused=self.reused, decoder=decoder)

    def function(self) -> Callable[..., Any]:
        """What is compiled, as a function of `inputs`, all tensors."""
        if self.what == STEP:
            return flat(self.step())
        diffusion, classifier = in_precision(self.diffusion, self.classifier, DTYPES[self.dtype])
        parts: dict[str, Callable[..., Any]] = {
            "unet": lambda z, timestep, *condition: diffusion.predict_noise(z, timestep, grouped(condition)),
            "vae-encoder": diffusion.encode,
            "vae-decoder": diffusion.decode,
            "classifier": classifier.logits,
        }
        return parts[self.what]

    @torch.no_grad()
    def example(self, batch: int, seed: int = 0, *, real: bool = False) -> tuple[Tensor, ...]:
        """Inputs of the right shapes and dtypes, in the order of `inputs`: random, or of the `images` as they are."""
        g = torch.Generator().manual_seed(seed)
        steps, size = len(self.diffusion.alphas_cumprod), self.diffusion.image_size
        target = torch.randint(len(self.diffusion.labels), (batch,), generator=g)
        timestep = torch.randint(steps // 10, steps * 7 // 10, (batch,), generator=g)
        condition = tensors(floats_to(self.diffusion.condition(target.to(self.device)), torch.float32))
        scales = dict(zip(SCALES, (3.0, 2.0, 0.25, 45.0), strict=True))
        z = torch.randn((batch, *self.diffusion.latent_shape), generator=g)
        image = torch.rand((batch, 3, size, size), generator=g)
        wants_latents = self.what == STEP and self.options.distance == "latent"
        if real and self.images is not None:
            image = self.images[(torch.arange(batch) + seed) % len(self.images)].to(image)
            clean = self.diffusion.encode(image.to(self.device)).float().cpu()
            abar = self.diffusion.alphas_cumprod.cpu().float()[timestep].reshape(-1, 1, 1, 1)
            z = clean if self.what == "vae-decoder" else abar.sqrt() * clean + (1 - abar).sqrt() * z
            image = clean if wants_latents else image
        elif wants_latents:
            image = torch.rand(z.shape, generator=g)
        given = {
            "z": z,
            "timestep": timestep,
            "timestep_prev": timestep - steps // 20,
            **dict(zip(named([CONDITION], len(condition)), condition, strict=True)),
            "image": image,
            "target": target,
            **{name: torch.full((batch,), value) for name, value in scales.items()},
        }
        if self.reused:
            given |= self._carried(z, timestep, steps // 20, condition, g)
        return tuple(given[name].to(self.device) for name in self.inputs)

    def _carried(
        self, z: Tensor, timestep: Tensor, earlier: int, condition: tuple[Tensor, ...], g: torch.Generator
    ) -> dict[str, Tensor]:
        """What a step would reuse: features of an earlier timestep, and random gradients."""
        made = {name: torch.randn(z.shape, generator=g) for name in CARRIED["gradients"]}
        if "features" in self.reused:
            model: Any = self.diffusion
            at = timestep.to(self.device) + earlier
            asked = (model.null_condition(len(z)), grouped(condition))
            for name, c in zip(CARRIED["features"], asked, strict=True):
                made[name] = model.answer_reusing(z.to(self.device), at, floats_to(c, torch.float32))[1]
        return made


def flat(step: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A GuidedStep as a function of positional tensors: `INPUTS` in order, a condition's tensors one by one, then what
    it reuses.
    """
    before, behind = INPUTS.index(CONDITION), len(INPUTS) - INPUTS.index(CONDITION) - 1
    count = len(carried_names(getattr(step, "reused", ())))

    def guided_step(*inputs: Tensor) -> tuple[Tensor, ...]:
        more: dict[str, Any] = {"carried": inputs[-count:]} if count else {}
        inputs = inputs[: len(inputs) - count]
        last = len(inputs) - behind
        models, scales = inputs[last : len(inputs) - len(SCALES)], inputs[-len(SCALES) :]
        condition = grouped(inputs[before:last])
        return step(*inputs[:before], condition, *models, **dict(zip(SCALES, scales, strict=True)), **more)

    return guided_step


# Precision


def relative_errors(got: Tensor, expected: Tensor) -> Tensor:
    """Largest difference of each sample over its largest magnitude: [B]."""
    difference = (got.double() - expected.double()).abs().flatten(1).amax(1)
    return difference / expected.double().abs().flatten(1).amax(1)
