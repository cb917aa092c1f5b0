"""Projected gradient descent on pixels: flips any classifier and means nothing; the adversarial control."""

from __future__ import annotations

import torch
from torch import Tensor

from counterlens.engine.models.protocols import Classifier


def pgd(
    classifier: Classifier,
    image: Tensor,  # [B, 3, H, W] in [0, 1]
    target: Tensor,  # [B]
    *,
    radius: float = 16 / 255,
    steps: int = 20,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] within `radius` of the input in every pixel and channel."""
    x = image.clone()
    for _ in range(steps):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(classifier.log_prob(leaf, target).sum(), leaf)
        x = x + 2.5 * radius / steps * gradient.sign()
        x = (image + (x - image).clamp(-radius, radius)).clamp(0, 1).detach()
    return x
