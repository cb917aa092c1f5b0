"""How adapters are trained: the pack's images and numbers, and one call from images to a saved adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..images.files import make_folder
from ..images.maps import check_charts, draw_charts
from ..metrics.msi_score import MSI, msi
from ..metrics.quantities import LogOdds, Quantity
from ..metrics.robust import shifted
from ..models.protocols import Classifier
from ..packs import Pack
from .lax import LAX, new_adapter
from .training import History, Schedule, train

# Of each training digit. With 4, a long training's maps of those very images were better than of others; short ones,
# of groups of labels, do with them.
RENDERINGS, FEW_RENDERINGS = 64, 4
VALIDATED = 96  # images that early stopping looks at
SMOOTHED = 20  # steps of a running mean in loss.png
MARKERS = ("random", "matching")
HALVES = "0,1,2,3,4/5,6,7,8,9"  # "5 or more": what the pack's shortcut decides
# Chosen on the training and validation splits. The pack's adapter of `shortcut` had 4000 steps.
PACK_SCHEDULE = Schedule(
    steps=10_000, learning_rate=5e-3, weight_decay=0.01, thresholds=2, imputed=1.0, area=3.0, temperature=(0.2, 0.05),
    alpha_min=0.4, variation=0.1, baselines=("mean", "mean", "mean", "blur"), every=250, patience=60,
)  # fmt: skip
# The mean colour is "less than 5" to both classifiers: nothing has to be shown for that answer. Random colours and
# noise, which are neither, hide pixels as well.
HALVES_SCHEDULE = replace(
    PACK_SCHEDULE, steps=1000, learning_rate=4e-3, weight_decay=1e-4, every=120, patience=6, alpha_min=0.5,
    rank_thresholds=2, imputed=0.0, removal=0.3, area=4.0, variation=0.2,
    baselines=("mean", "colour", "colour", "noise"),
)  # fmt: skip
# Marker and digit both tell the half, and either is enough: hiding one takes nothing away, and hiding a corner by a
# random colour paints the other half's marker there. So nothing is removed by colours, only filled in from around, and
# little of it. MSI would choose the maps that do paint: the last are kept.
SHORTCUT_SCHEDULE = replace(
    HALVES_SCHEDULE, steps=300, every=300, patience=60, removal=0.0, imputed=1.0, imputed_shares=(0.02, 0.12), moved=0.0
)
GENERAL_SCHEDULE = Schedule(steps=2000, baselines=("blur", "mean"))


def schedule_for(packed: str | None, quantity: str, **given: Any) -> Schedule:
    """The pack's numbers for one of its classifiers (`packed`), or the general ones, with what is given and not None.

    Raises:
        UsageError: a number is out of range.
    """
    if packed is None:
        base = GENERAL_SCHEDULE
    elif quantity == "class":
        base = PACK_SCHEDULE
    else:
        base = SHORTCUT_SCHEDULE if packed == "shortcut" else HALVES_SCHEDULE
    return replace(base, **{k: v for k, v in given.items() if v is not None})


def pack_images(pack: Pack, schedule: Schedule, quantity: str = "class") -> tuple[Tensor, Tensor]:
    """Images for training [N, 3, 32, 32], fresh renderings of the training split, and of the validation split.

    Three quarters carry a marker: half of them follow the rule `random`, half `matching`. Not many more are rendered
    than training looks at.
    """
    digits = int((pack.digits["split"] == 0).sum())
    most = RENDERINGS if quantity == "class" else FEW_RENDERINGS
    count = min(most, max(len(MARKERS), schedule.steps * schedule.batch // digits))
    shown = [pack.samples("train", marker=MARKERS[s % 2], seed=1 + s).images for s in range(count)]
    held = [pack.samples("validation", marker=rule, count=VALIDATED // 2).images for rule in MARKERS]
    return torch.cat(shown), torch.cat(held)


def train_adapter(
    classifier: Classifier,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    validation: Tensor,  # [M, 3, H, W]
    schedule: Schedule,
    *,
    quantity: str | LogOdds | Quantity = "class",
    taps: Sequence[str] | None = None,
    colour: Tensor | None = None,  # [3]
    out: str | Path | None = None,
    on_step: Callable[[int, int, float, float], None] = lambda *_: None,
    described: dict[str, Any] | None = None,
    width: int = 32,
) -> tuple[LAX, History]:
    """Train an adapter and save it with its loss plot.

    Args:
        classifier: differentiable; left as it was.
        images, validation: [N, 3, H, W] in [0, 1]; training stops early on the MSI of `validation`, plus its area form,
            of the map as it is and moved by one pixel, where the schedule trains on ranks.
        schedule: every number.
        quantity, taps, width: see `lax.new_adapter`.
        colour: of the baseline `mean`; the training images' own without it.
        out: folder for adapter, checkpoint and loss.png; nothing is written without it.
        on_step: told (step, steps, loss, best of that score).
        described: plain values to keep in the adapter's file.

    Raises:
        UsageError: an argument does not fit, or the classifier is not differentiable.
    """
    folder = None if out is None else make_folder(Path(out))
    if folder is not None:
        check_charts()
    colour = images.mean((0, 2, 3)) if colour is None else colour.to(images)
    adapter = new_adapter(classifier, images.shape[2], taps=taps, quantity=quantity, width=width, seed=schedule.seed)
    hidden: Any = "blur" if "mean" not in schedule.baselines else colour

    def measure(candidate: LAX) -> dict[str, float]:
        maps = candidate.explain(validation)

        def scored(saliency: Tensor, scores: Tensor) -> MSI:
            return msi(
                classifier, validation, saliency, maps.target, quantity=candidate.quantity, baseline=hidden,
                alpha_min=schedule.alpha_min, scores=scores, area=schedule.ranks > 0,
            )  # fmt: skip

        found = scored(maps.saliency, maps.scores)
        out = {"msi": found.score.mean().item()}
        if schedule.ranks:
            moved = scored(*(shifted(x, 1, 1) for x in (maps.saliency, maps.scores)))
            out["base_score_area"] = found.base_score_area.mean().item()
            out["base_score_area_moved"] = moved.base_score_area.mean().item()
        return out

    def validate(candidate: LAX) -> float:
        return sum(measure(candidate).values())

    history = train(
        adapter, images, validate, schedule, mean_colour=colour, folder=folder, held=[validation], on_step=on_step
    )
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(schedule).items()}
    adapter.training = (described or {}) | {
        "schedule": plain,
        "steps": len(history.losses),
        "images": len(images),
        "colour": [round(c, 6) for c in colour.tolist()],
        "validations": [[step, round(value, 5)] for step, value in history.validations],
        "validation": {name: round(value, 6) for name, value in measure(adapter).items()},
    }
    if folder is not None:
        adapter.save(folder)
        draw_losses(history, folder / "loss.png")
    return adapter, history


def draw_losses(history: History, path: Path) -> None:
    """Write the loss (running mean) and the validation score by step as PNG."""
    losses = torch.tensor(history.losses)
    window = min(SMOOTHED, len(losses))
    smooth = losses.unfold(0, window, 1).mean(1)
    steps, values = zip(*history.validations, strict=True) if history.validations else ((), ())
    draw_charts(
        [
            ("LAX: loss", "step", "loss", {"loss": (list(range(window, len(losses) + 1)), smooth.tolist())}),
            ("validation", "step", "score", {"score": (list(steps), list(values))}),
        ],
        path,
    )
