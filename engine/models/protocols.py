"""What guidance needs of a diffusion model and of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .conditions import Condition
from .norms import PlainNorms


class Diffusion(Protocol):
    """A latent diffusion model with a null condition and one condition for each label.

    One whose denoiser says something else than noise also has `prediction` (one of `predictions.PREDICTIONS`) and
    `answer`, called like `predict_noise`: what the denoiser says of the same latents, from which guidance makes both
    noise and clean estimate (`predictions.to_noise`, `to_clean`).
    """

    alphas_cumprod: Tensor  # [T] float64, of variance-preserving latents
    latent_shape: tuple[int, int, int]
    image_size: int
    labels: list[str]
    conditioning: str  # "class" or "text"

    def modules(self) -> list[nn.Module]:
        """Every module that is differentiated through or run."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [0, 1] to scaled latents [B, *latent_shape]."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents to an image [B, 3, H, W], nominally in [-1, 1] and not clamped."""
        ...

    def predict_noise(self, z: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Noise in `z` [B, *latent_shape] at timesteps [B]."""
        ...

    def condition(self, targets: Tensor) -> Condition:
        """Conditions of label indices [B]: a tensor or several, each batch first."""
        ...

    def null_condition(self, batch: int) -> Condition:
        """The unconditional model's condition, `batch` times."""
        ...


class Decoder(Protocol):
    """A cheaper decoder that guidance differentiates through in place of the diffusion model's own."""

    module: nn.Module

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents to an image [B, 3, H, W], nominally in [-1, 1] and not clamped."""
        ...


class Classifier(Protocol):
    """A differentiable classifier of images in [0, 1], its preprocessing included."""

    labels: list[str]
    module: nn.Module
    link: Literal["softmax", "sigmoid"]  # from logits to probabilities: labels that exclude each other, or not

    def logits(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [0, 1] to logits [B, labels]."""
        ...

    def log_prob(self, image: Tensor, target: Tensor) -> Tensor:
        """log p(target | image): [B]."""
        ...


class SoftmaxClassifier:
    """A module from images in [0, 1] to logits over exclusive labels."""

    link: Literal["softmax", "sigmoid"] = "softmax"

    def __init__(self, module: nn.Module, labels: Sequence[str]) -> None:
        self.module = module
        self.labels = list(labels)

    def logits(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [0, 1] to logits [B, labels]."""
        with PlainNorms():
            return self.module(image)

    def log_prob(self, image: Tensor, target: Tensor) -> Tensor:
        """log p(target | image) under a softmax: [B]."""
        log_p = torch.log_softmax(self.logits(image), dim=1)
        return log_p.gather(1, target[:, None])[:, 0]


class SigmoidClassifier:
    """A module from images in [0, 1] to logits of labels that each may hold or not: SigLIP, multi-label models."""

    link: Literal["softmax", "sigmoid"] = "sigmoid"

    def __init__(self, module: nn.Module, labels: Sequence[str]) -> None:
        self.module = module
        self.labels = list(labels)

    def logits(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [0, 1] to logits [B, labels]."""
        with PlainNorms():
            return self.module(image)

    def log_prob(self, image: Tensor, target: Tensor) -> Tensor:
        """log p(target | image) under the target's own sigmoid: [B]."""
        return torch.nn.functional.logsigmoid(self.logits(image).gather(1, target[:, None])[:, 0])


def probabilities(classifier: Classifier, image: Tensor) -> Tensor:
    """Probabilities of the labels [B, labels]; under `sigmoid` they do not sum to one."""
    logits = classifier.logits(image)
    return torch.softmax(logits, dim=1) if classifier.link == "softmax" else torch.sigmoid(logits)
