"""Models in half precision behind float32 borders."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..models.conditions import Condition, floats_to
from ..models.predictions import EPSILON, to_noise
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
        self.prediction: str = getattr(inner, "prediction", EPSILON)

    def modules(self) -> list[nn.Module]:
        return self.inner.modules()

    def encode(self, image: Tensor) -> Tensor:
        return self.inner.encode(image.to(self.dtype)).float()

    def decode(self, z: Tensor) -> Tensor:
        return self.inner.decode(z.to(self.dtype)).float()

    def predict_noise(self, z: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        if self.prediction == EPSILON:
            return self.inner.predict_noise(z.to(self.dtype), timestep, floats_to(condition, self.dtype)).float()
        abar = self.alphas_cumprod.to(z)[timestep].reshape(-1, 1, 1, 1)
        return to_noise(self.prediction, self.answer(z, timestep, condition), z, abar.sqrt(), (1 - abar).sqrt())

    def answer(self, z: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        # Not rounded here: another answer than noise is put together with the latents, and in half precision what is
        # left of the image where nearly all is noise would be lost.
        return self.inner.answer(z, timestep, floats_to(condition, self.dtype))  # type: ignore[attr-defined]

    def answer_reusing(
        self, z: Tensor, timestep: Tensor, condition: Condition, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        seen = z.to(self.dtype) if self.prediction == EPSILON else z
        inner: Any = self.inner
        said, deep = inner.answer_reusing(seen, timestep, floats_to(condition, self.dtype), deep)
        return said.to(z.dtype), deep.to(z.dtype)

    def condition(self, targets: Tensor) -> Condition:
        return floats_to(self.inner.condition(targets), torch.float32)

    def null_condition(self, batch: int) -> Condition:
        return floats_to(self.inner.null_condition(batch), torch.float32)


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
