"""The simplest saliency maps, to calibrate and to test with; real methods are in `counterlens.engine.saliency`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UsageError
from ..models.freezing import frozen
from .inputs import blur, check_computed
from .quantities import Explained, QuantityLike


def gradient_maps(
    classifier: Any,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    *,
    quantity: QuantityLike = "log_prob",
    sigma: float = 0.0,
    batch_size: int = 64,
) -> Tensor:
    """Absolute gradient of the explained quantity of the predicted class, summed over channels: [N, H, W].

    Args:
        quantity: see `Explained`. sigma: of a Gaussian that smooths the map, in pixels; 0 leaves it.

    Source: Simonyan et al. (arXiv 1312.6034), with the sum over channels instead of their maximum.
    """
    explained = Explained(classifier, quantity)
    maps = []
    with frozen(*explained.modules), torch.enable_grad():
        for part in images.split(batch_size):
            x = part.detach().requires_grad_()
            logits = explained.logits(x)
            (gradient,) = torch.autograd.grad(explained(logits, logits.detach().argmax(1)).sum(), x)
            maps.append(gradient.abs().sum(1))
    planes = torch.cat(maps)
    check_computed("gradient", planes)
    return blur(planes[:, None], sigma)[:, 0] if sigma > 0 else planes


def read_maps(path: Path, images: Tensor) -> Tensor:
    """Maps `saliency` [N, H, W] of the images from a safetensors file.

    Raises:
        UsageError: the file cannot be read, holds no `saliency`, or maps of another number or size.
    """
    try:
        content = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"maps: {path} cannot be read ({error})") from error
    if "saliency" not in content:
        raise UsageError(f"maps: {path} holds no tensor `saliency`: {', '.join(sorted(content)) or 'nothing'}")
    saliency = content["saliency"]
    if saliency.shape != (len(images), *images.shape[2:]):
        expected = [len(images), *images.shape[2:]]
        raise UsageError(f"maps: {path}: expected saliency {expected} beside the images, got {list(saliency.shape)}")
    return saliency
