"""GuidedStep: one denoising step under a classifier's gradient, cleaned by the consensus filter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from counterlens.kernels.consensus import Mode
from counterlens.kernels.guided_update import guided_update

from ..models.protocols import Classifier, Diffusion
from .pullback import PullbackMode, pullback

Gradient = Literal["exact", "detached"]
Scale = float | Tensor  # a number or [B]


def unit_largest(v: Tensor) -> Tensor:
    """Divide each sample by its largest magnitude; a zero sample stays zero.

    Once the target is certain, gradients of log p shrink below what half precision can hold, and their squares below
    what single precision can; the direction, all that guidance uses, is still there.
    """
    largest = v.abs().amax(dim=(1, 2, 3), keepdim=True)
    return v / torch.where(largest == 0, 1.0, largest)


class GuidedStep:
    """One guided denoising step (z_t -> z_prev) over a diffusion model and a classifier.

    Three pullbacks are chained (UNet, decoder, classifier and distance), so that one linearisation serves both
    cotangents. The conditional half of the noise prediction is never differentiated.

    Args:
        diffusion, classifier: see `engine.models.protocols`; frozen by the caller (`pullback.frozen`).
        filter_mode, chunk: of the consensus filter.
        gradient: `exact`, or `detached`: the UNet's Jacobian is left out.
        mode: of the pullback, `functional` or `autograd`.
        backend: of the kernels.

    Source: LDCE (arXiv 2310.06668), section 3 and algorithm 1; no classifier-free term is added, as in its code.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        classifier: Classifier,
        *,
        filter_mode: Mode = "zero",
        chunk: int = 1,
        gradient: Gradient = "exact",
        mode: PullbackMode = "functional",
        backend: str = "auto",
    ) -> None:
        if gradient not in ("exact", "detached"):
            raise ValueError(f"gradient: expected exact or detached, got {gradient!r}")
        self.diffusion = diffusion
        self.classifier = classifier
        self.filter_mode = filter_mode
        self.chunk = chunk
        self.gradient = gradient
        self.mode = mode
        self.backend = backend

    def __call__(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        timestep_prev: Tensor,  # [B]
        condition: Tensor,  # of the targets, as the diffusion model makes it
        image: Tensor,  # [B, 3, H, W] in [0, 1]
        target: Tensor,  # [B] label indices of the classifier
        *,
        guidance_scale: Scale,
        class_scale: Scale,
        distance_scale: Scale,
        angle_deg: Scale,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step; every scale and the angle is a number or [B].

        Returns:
            z_prev [B, C, h, w]; z0 [B, C, h, w], the clean latents that the guided noise implies; kept_fraction [B],
            the share of locations that the filter kept.
        """
        diffusion = self.diffusion
        alphas_cumprod = diffusion.alphas_cumprod.to(z)
        abar, abar_prev = alphas_cumprod[timestep], alphas_cumprod[timestep_prev]
        alpha, sigma = abar.sqrt().reshape(-1, 1, 1, 1), (1 - abar).sqrt().reshape(-1, 1, 1, 1)
        null = diffusion.null_condition(z.shape[0])

        def unconditional(z: Tensor) -> Tensor:
            return diffusion.predict_noise(z, timestep, null)

        def decode(z0: Tensor) -> Tensor:
            return (diffusion.decode(z0) + 1) / 2

        def objectives(x0: Tensor) -> Tensor:
            distance = (x0.clamp(0, 1) - image).abs().sum(dim=(1, 2, 3))
            return torch.stack([self.classifier.log_prob(x0, target), distance])  # [2, B]

        eps_c = diffusion.predict_noise(z, timestep, condition)
        if self.gradient == "exact":
            eps_u, pull_unet = pullback(unconditional, z, self.mode)
        else:
            eps_u = unconditional(z)
        x0, pull_decoder = pullback(decode, (z - sigma * eps_u) / alpha, self.mode)
        values, pull_objectives = pullback(objectives, x0, self.mode)

        def gradient(row: int) -> Tensor:
            cotangent = torch.zeros_like(values)
            cotangent[row] = 1
            # R and the filter are free of scale, so every cotangent may be brought back to a safe range.
            g = unit_largest(pull_decoder(unit_largest(pull_objectives(cotangent))))
            if self.gradient == "exact":
                g = g - sigma * pull_unet(g)
            return g / alpha  # [B, C, h, w]

        return guided_update(
            z, eps_u, eps_c, gradient(0), gradient(1), abar, abar_prev,
            guidance_scale=guidance_scale, class_scale=class_scale, distance_scale=distance_scale,
            angle_deg=angle_deg, mode=self.filter_mode, chunk=self.chunk, backend=self.backend,
        )  # fmt: skip
