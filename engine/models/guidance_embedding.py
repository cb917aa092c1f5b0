"""The guidance scale as a condition, of models that were distilled from guided ones (LCM).

Such a UNet answers for the scale that it is told: for a prompt what classifier-free guidance at that scale would have
said, for the empty prompt the same at every scale. What our filter compares, the difference of both, keeps its
direction and grows with the scale; so it is told the smallest scale that the distillation saw, for which the difference
is nearest to that of a model that was not distilled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .files import dtype_of

SCALE = 3.0  # as diffusers' pipelines say it: LCM was distilled for w = SCALE - 1 in [2, 14]


def guidance_condition(unet: Any, z: Tensor, scale: float = SCALE) -> Tensor | None:
    """The embedded scale [B, time_cond_proj_dim] of a UNet that takes one; None of others.

    Source: Luo et al., arXiv 2310.04378, and Vaswani et al. (arXiv 1706.03762) for the waves.
    """
    width = unet.config.time_cond_proj_dim
    if width is None:
        return None
    half = width // 2
    waves = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale - 1) * waves
    embedded = torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))
    return embedded.to(z.device, dtype_of(unet)).expand(len(z), -1)
