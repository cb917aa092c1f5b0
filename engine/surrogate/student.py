"""The student of a black box: a few small networks with smooth activations, averaged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 64  # side in pixels that the convolutions see; larger images are averaged down to it
COARSEST = 4  # side of the last map
GROUPS = 8


class Student(nn.Module):
    """Strided convolutions and a head that knows places: image in [0, 1] to logits.

    Smooth everywhere (SiLU, group norm): its gradient is what it is for.

    Args:
        labels: logits.
        image_size: side of the images in pixels.
        width: channels of the first layer, a multiple of 8.
    """

    def __init__(self, labels: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        self.width, self.pool = width, shrinking(image_size)
        side, channels = (image_size // self.pool + 1) // 2, width
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, stride=2, padding=2), nn.SiLU()]
        while side > COARSEST:
            after = min(channels + width, 5 * width)
            layers += [nn.Conv2d(channels, after, 3, stride=2, padding=1), nn.GroupNorm(GROUPS, after), nn.SiLU()]
            channels, side = after, (side + 1) // 2
        self.features = nn.Sequential(*layers)
        self.places = nn.Conv2d(channels, width, 1)
        self.head = nn.Sequential(nn.Linear(channels + width * side * side, 128), nn.SiLU(), nn.Linear(128, labels))

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        x = image * 2 - 1
        maps = self.features(F.avg_pool2d(x, self.pool) if self.pool > 1 else x)
        seen = torch.cat([maps.mean(dim=(2, 3)), F.silu(self.places(maps)).flatten(1)], dim=1)
        return self.head(seen)  # [B, labels]


class Students(nn.Module):
    """Members that are averaged in log-probability, so that what only one of them believes moves little."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        return torch.stack([torch.log_softmax(member(image), dim=1) for member in self.members]).mean(0)

    def doubtful(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """The probabilities of the member that believes least in each label: [B, labels]."""
        return torch.stack([torch.softmax(member(image), dim=1) for member in self.members]).amin(0)


def shrinking(image_size: int) -> int:
    """How many pixels a side are averaged: the least that divides the image and leaves at most `LARGEST`."""
    for factor in range(1, image_size // COARSEST + 1):
        if image_size % factor == 0 and image_size // factor <= LARGEST:
            return factor
    return 1


def new_students(labels: int, image_size: int, members: int = 3, width: int = 32, seed: int = 0) -> Students:
    """Untrained students, each from a seed of its own."""
    made: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for k in range(members):
            torch.manual_seed(seed * 1000 + k)
            made.append(Student(labels, image_size, width))
    return Students(made)
