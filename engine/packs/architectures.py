"""The digits pack's classifiers: image in [0, 1] to logits, normalisation included."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class StridedClassifier(nn.Module):
    """Stride-2 convolutions and a global mean: the architecture of `clean` and `shortcut`."""

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
        sizes = [width, width * 2, width * 3, width * 4]
        for before, after in pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], classes)

    def forward(
        self,
        image: Tensor,  # [B, 3, 32, 32] in [0, 1]
    ) -> Tensor:
        return self.head(self.features(image * 2 - 1).mean(dim=(2, 3)))  # [B, classes]


class PooledClassifier(nn.Module):
    """Max-pooled 5x5 convolutions and a hidden layer: the architecture of `judge`, which guidance never sees."""

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 5, padding=2),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width * 2, 5, padding=2),
            nn.GroupNorm(1, width * 2),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width * 2, width * 2, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(width * 2 * 16, 128), nn.GELU(), nn.Linear(128, classes))

    def forward(
        self,
        image: Tensor,  # [B, 3, 32, 32] in [0, 1]
    ) -> Tensor:
        return self.head(self.features(image * 2 - 1))  # [B, classes]


ARCHITECTURES = {"strided": StridedClassifier, "pooled": PooledClassifier}
