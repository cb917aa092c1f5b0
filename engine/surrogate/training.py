"""How a student learns from the answers of a box: seeded steps over all that was asked so far."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .student import Students

BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.02
NOISE = 0.02  # added to the images, in [0, 1]: labels stay
SMOOTHING = 0.1  # of hard labels
FLOOR = -7.0  # log-probabilities below it are all the same to the second term
LOG_WEIGHT = 0.05  # of the squared difference of log-probabilities: they change where probabilities are flat


def draws(seed: int, *what: object) -> torch.Generator:
    """A generator of its own for each thing that is drawn."""
    key = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))


def fit(
    students: Students,
    images: Tensor,  # [N, 3, H, W] uint8
    answers: Tensor,  # [N, labels] probabilities, or one-hot where the box says labels only
    *,
    hard: bool,
    steps: int,
    seed: int,
) -> list[float]:
    """Train every member in place; the mean loss of the last steps of each."""
    labels = answers.shape[1]
    wanted = answers * (1 - SMOOTHING) + SMOOTHING / labels if hard else answers
    floor = wanted.clamp(min=1e-9).log().clamp(min=FLOOR)
    losses = []
    for k, member in enumerate(students.members):
        member.train().requires_grad_(True)
        optimiser = torch.optim.AdamW(member.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        last = 0.0
        g = draws(seed, "fit", k)
        for _ in range(steps):
            rows = torch.randint(len(images), (BATCH,), generator=g)
            x, p, log_p = images[rows].float() / 255, wanted[rows], floor[rows]
            x = x + NOISE * torch.randn(x.shape, generator=g)
            said = torch.log_softmax(member(x), dim=1)
            loss = -(p * said).sum(1).mean()
            if not hard:
                loss = loss + LOG_WEIGHT * (said.clamp(min=FLOOR) - log_p).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            last = 0.9 * last + 0.1 * loss.item()
        losses.append(last)
        member.eval().requires_grad_(False)
    return losses
