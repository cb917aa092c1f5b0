"""Classifiers whose perturbation curves can be done on paper, and a small random one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Logit 1 is a weighted sum of the first channel, logit 0 is 0."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)  # [H, W]

    def forward(self, image: Tensor) -> Tensor:
        value = (image[:, 0] * self.weight.to(image.dtype)).sum((1, 2))
        return torch.stack([torch.zeros_like(value), value], 1)


class Needs(nn.Module):
    """Class 1, as good as certainly, where any of the given sets of pixels is wholly bright; else class 0."""

    def __init__(self, *sets: Tensor) -> None:
        super().__init__()
        self.sets = sets  # each [H, W] bool

    def forward(self, image: Tensor) -> Tensor:
        bright = image.amin(1) > 0.5
        found = torch.stack([bright[:, s].all(1) for s in self.sets]).any(0).to(image.dtype)
        return torch.stack([-40 * found + 20, 40 * found - 20], 1)


class Random(nn.Module):
    """A small convolutional classifier with random weights; remembers how many images it saw at once."""

    def __init__(self, classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, channels, 3, 3, generator=g))
        self.b = nn.Parameter(torch.randn(classes, 6, generator=g) * 4)
        self.seen: list[int] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(len(image))
        features = torch.nn.functional.conv2d(image, self.a.to(image.dtype), padding=1).relu()
        return features.mean((2, 3)) @ self.b.to(image.dtype).T


def sample(n: int = 3, size: tuple[int, int] = (9, 7), channels: int = 3) -> tuple[Tensor, Tensor]:
    """Random images and maps."""
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, channels, *size, generator=g), torch.rand(n, *size, generator=g)
