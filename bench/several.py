"""Several counterfactuals of each test digit: `python -m bench.several`.

How many flips of an image are distinct, that is pairwise at least a threshold apart in the features of the judge's last
hidden layer. The threshold that was asked for is half the median distance between digits of different classes. It is
recorded beside that of two digits of the same class, which differ less than that, and a curve of other thresholds.
Twice: all answers of an image aimed at its runner-up, and each at another of the likeliest labels. Results:
bench/results/several.json.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.measure import open_engines
from bench.record import interval, write_result
from counterlens.engine import Config
from counterlens.engine.core.answers import SAME, Features
from counterlens.engine.core.result import Counterfactual, Counterfactuals
from counterlens.engine.images.files import as_saved

WANTED, SHARE = 3, 0.9  # distinct flips, and on so many of the digits
TARGETS = ("runner-up", "runners-up")
THRESHOLDS = (0.5, 1.0, 1.33, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0)


def between(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Median distances of two digits: of different classes, and of the same."""
    distances = torch.cdist(features, features)
    same = labels[:, None] == labels[None]
    upper = torch.ones_like(same).triu(1)
    return {
        "different classes": distances[upper & ~same].median().item(),
        "same class": distances[upper & same].median().item(),
    }


def distinct(distances: Tensor, threshold: float) -> int:
    """The size of the largest set whose members are pairwise that far apart; `distances` [n, n]."""
    far = (distances >= threshold).tolist()
    for size in range(len(far), 1, -1):
        for chosen in combinations(range(len(far)), size):
            if all(far[a][b] for a, b in combinations(chosen, 2)):
                return size
    return min(1, len(far))


def flips_apart(answers: list[Counterfactual], features: Features) -> Tensor:
    """Distances between the answers that flip: [n, n]."""
    flips = [as_saved(answer.image) for answer in answers if answer.flipped]
    if not flips:
        return torch.zeros(0, 0)
    found = features(torch.stack(flips))
    return torch.cdist(found, found)


def answered(result: Counterfactuals, features: Features, asked: float) -> dict[str, Any]:
    """How many flips of an image are distinct, how far apart they are, and how near to the input."""
    if failed := [e for e in result.errors if e is not None]:
        raise RuntimeError(f"{len(failed)} answers failed: {failed[0]}")
    found = result.by_image()
    apart = [flips_apart(answers, features) for answers in found]

    def share(threshold: float) -> dict[str, float]:
        return interval(torch.tensor([distinct(d, threshold) >= WANTED for d in apart]).double())

    first = torch.tensor(
        [next(a.l1 for a in answers if a.k == 0) for answers in found if any(a.k == 0 for a in answers)]
    )
    reached = share(asked)
    return {
        f"share_with_{WANTED}_distinct_flips": reached, "met": reached["mean"] >= SHARE,
        "by_threshold": {str(t): share(t) for t in THRESHOLDS}, "without_duplicates": share(0.0),
        "answers": interval(torch.tensor([len(answers) for answers in found]).double()),
        "flip": interval(result.flipped.double()),
        "diversity": interval(torch.stack([d[d > 0].mean() for d in apart if (d > 0).any()]).double()),
        "l1": {
            "k 0": interval(first.double()), "nearest": interval(torch.tensor([a[0].l1 for a in found]).double()),
            "all": interval(result.l1.double()),
        },
    }  # fmt: skip


def main(
    count: Annotated[int, typer.Option(help="Counterfactuals of each digit.", min=2)] = 4,
    limit: Annotated[int | None, typer.Option(help="Digits; all without it.")] = None,
    speed: Annotated[str, typer.Option(help="exact, balanced, fast or turbo.")] = "fast",
    split: Annotated[str, typer.Option(help="test; validation while something is being chosen.")] = "test",
) -> None:
    """Measure several counterfactuals and record the figures; other splits and parts of one are only shown.

    Example: python -m bench.several
    """
    pack, engines, judge = open_engines("digits")
    engine, features = engines["clean"], Features(judge, "judge")
    samples = pack.samples(split, count=limit, marker="random")
    x = samples.images
    scale = between(features(x), torch.as_tensor(samples.labels))
    asked = scale["different classes"] / 2
    figures: dict[str, Any] = {
        "split": split, "digits": len(x), "count": count, "speed": speed,
        "features": "the judge's last hidden layer, Euclidean", "median_distance": scale,
        "asked": {"threshold": asked, "distinct_flips": WANTED, "share": SHARE}, "duplicate_levels": 255 * SAME,
        "targets": {
            target: answered(engine.counterfactual(x, target, config=Config(speed=speed, count=count)), features, asked)
            for target in TARGETS
        },
    }  # fmt: skip
    if limit is None and split == "test" and (count, speed) == (4, "fast"):
        write_result("several", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
