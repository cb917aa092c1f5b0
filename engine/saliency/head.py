"""LAX's head: what is trained, small enough to read in one sitting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COARSE = 2  # pixels of the image to a side of what the head draws: bilinear between them, no pixel stands alone
ENCODER = (16, 24, 32)  # channels of the head's own features where the model's are hidden, each at half the resolution


class Head(nn.Module):
    """Feature maps of several resolutions and a condition to one map of logits.

    A decoder brings the maps together, coarsest first, each condition with gains of its own; a condition's weights of
    the channels make the map, at half the image's resolution at most. What is drawn in between is interpolated, so that
    a map cannot be a pattern of single pixels that only this model's strides can see.

    Args:
        channels: of the feature maps, finest first; empty where the model's features are hidden.
        conditions: how many explained things there are.
        width: channels inside.
    """

    def __init__(self, channels: Sequence[int], conditions: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList()
        if not channels:
            channels = ENCODER
            self.encoder.extend(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip((3, *ENCODER), ENCODER, strict=False))
        self.channels = list(channels)
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.gains = nn.Embedding(conditions, 2 * width * len(channels))  # a factor and a shift of each channel
        self.out = nn.Embedding(conditions, width + 1)  # a weight of each channel, and an offset
        with torch.no_grad():
            self.gains.weight.copy_(torch.tensor([1.0, 0.0]).repeat_interleave(width).repeat(len(channels)))
            alike = torch.randn(width + 1) / width**0.5  # conditions begin alike
            alike[-1] = 0
            self.out.weight.copy_(alike.expand(conditions, -1))

    @torch.no_grad()
    def standardise(self, image: Tensor, features: Sequence[Tensor]) -> None:
        """Fold each channel's mean and deviation over a batch into the projections, so that all start alike."""
        for conv, feature in zip(self.project, self._levels(image, features), strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            mean, std = feature.mean((0, 2, 3)), feature.std((0, 2, 3)).clamp(min=1e-6)
            conv.weight.div_(std[:, None, None])
            conv.bias.sub_((conv.weight[:, :, 0, 0] * mean).sum(1))

    def _levels(self, image: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps, finest first, none finer than what is drawn."""
        levels = list(features)
        for conv in self.encoder:
            levels.append(F.silu(conv(levels[-1] if levels else image)))
        times = [max(1, COARSE * x.shape[2] // image.shape[2]) for x in levels]
        return [F.avg_pool2d(x, k) if k > 1 else x for x, k in zip(levels, times, strict=True)]

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
        features: Sequence[Tensor],  # [B, C, h, w] each, finest first
        condition: Tensor,  # [B]
    ) -> Tensor:
        levels = self._levels(image, features)
        gains = self.gains(condition)[:, :, None, None].chunk(2 * len(levels), 1)  # [B, width, 1, 1] each
        x: Tensor | None = None
        for i in reversed(range(len(levels))):
            y = self.project[i](levels[i])  # [B, width, h, w]
            if x is not None:
                y = y + F.interpolate(x, size=y.shape[2:], mode="bilinear", align_corners=False)
            x = self.mix[i](F.relu(torch.addcmul(gains[2 * i + 1], gains[2 * i], y)))
        assert x is not None
        weights = self.out(condition)[:, :, None, None]
        drawn = (F.relu(x) * weights[:, :-1]).sum(1, keepdim=True) + weights[:, -1:]
        return F.interpolate(drawn, size=image.shape[2:], mode="bilinear", align_corners=False)[:, 0]  # [B, H, W]
