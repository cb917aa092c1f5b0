"""Models in half precision behind float32 borders."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models.protocols import Classifier, Diffusion


class _CastDiffusion:
    """A diffusion model in half precision behind float32 inputs and outputs."""

    def __init__(self, inner: Diffusion, dtype: torch.dtype) -> None:
        self.inner = inner
        self.dtype = dtype
        self.alphas_cumprod = inner.alphas_cumprod
        self.latent_shape = inner.latent_shape
        self.image_size = inner.image_size
        self.labels = inner.labels
        self.conditioning = inner.conditioning

    def modules(self) -> list[nn.Module]:
        return self.inner.modules()

    def encode(self, image: Tensor) -> Tensor:
        return self.inner.encode(image.to(self.dtype)).float()

    def decode(self, z: Tensor) -> Tensor:
        return self.inner.decode(z.to(self.dtype)).float()

    def predict_noise(self, z: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.inner.predict_noise(z.to(self.dtype), timestep, self._like_weights(condition)).float()

    def condition(self, targets: Tensor) -> Tensor:
        return self._wide(self.inner.condition(targets))

    def null_condition(self, batch: int) -> Tensor:
        return self._wide(self.inner.null_condition(batch))

    def _like_weights(self, condition: Tensor) -> Tensor:
        return condition.to(self.dtype) if condition.is_floating_point() else condition

    def _wide(self, condition: Tensor) -> Tensor:
        return condition.float() if condition.is_floating_point() else condition


def in_precision(diffusion: Diffusion, classifier: Classifier, dtype: torch.dtype) -> tuple[Diffusion, Classifier]:
    """The models with weights and activations in `dtype` and float32 at their borders; the given ones stay as they are.

    float32 gives the models themselves.
    """
    if dtype == torch.float32:
        return diffusion, classifier
    diffusion, classifier = copy.deepcopy(diffusion), copy.deepcopy(classifier)
    for module in (*diffusion.modules(), classifier.module):
        module.to(dtype).requires_grad_(False)
    logits = classifier.logits
    # log_prob goes through logits, so that its softmax is in float32.
    classifier.logits = lambda image: logits(image.to(dtype)).float()  # type: ignore[method-assign]
    return _CastDiffusion(diffusion, dtype), classifier
