"""Training LAX: a differentiable MSI of moved and smoothed maps, seeded, resumable, stopped early on validation."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from counterlens.export.store import tensors_digest, weights_digest
from counterlens.kernels.perturb import soft_perturb

from ..errors import CounterlensError, NotFinite, UsageError
from ..files import write_atomically
from ..metrics.imputation import impute
from ..metrics.inputs import blur, check_computed
from ..metrics.quantities import undefined
from ..metrics.robust import shifted, smooth
from ..models.freezing import frozen
from .lax import LAX, VERSION

LARGEST = math.log(1e6)  # -log(1 - p) with 1 - p clamped at 1e-6
BASELINES = ("mean", "blur", "colour", "noise", "image")
IMPUTED_TOLERANCE = 1e-3
EDGE = 0.02  # share of the pixels on either side of a level that `ranks` hides softly, mostly from 0.88 to 0.12
SMOOTHED = 0.4  # share of the maps that are smoothed
CHECKPOINT = "checkpoint.pt"
STATE = {"identity", "head", "optimizer", "step", "best", "best_state", "losses", "validations"}
CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class Schedule:
    """Every number of a training.

    Attributes:
        steps: of the optimiser.
        batch: images in a step.
        thresholds: K of a step: alpha_min and K - 1 from U(alpha_min, 1).
        forward_batch: perturbed images in one pass of the model, but at least two for each image of the batch; memory
            does not grow with `thresholds` beyond it.
        alpha_min: the lowest threshold of MSI.
        temperature: of the soft masks, from the first step to the last, geometrically.
        removal: beta, the weight of -log(1 - p(remove)).
        area: lambda, the weight of the soft mask's mean at alpha_min.
        variation: weight of the map's total variation.
        moved: the farthest that maps are moved before they are applied, as a share of the image's side, at random; some
            are smoothed as well. A pattern that only the model's strides see is worth nothing then. 0 leaves it out.
        ranks: weight of -log p(keep) and -log(1 - p(remove)) with a share of the most salient pixels marked, shares
            dense near 0: what insertion and deletion look at. 0 leaves it out.
        rank_temperature: the least softness of its masks, in deviations of the scores, from the first step to the last.
        rank_thresholds: its shares in a step.
        imputed: weight of -log(1 - p) of the image without its most salient pixels, filled in from their neighbours as
            in ROAD: what can be guessed from around it was not removed. 0 leaves it out.
        imputed_shares: of the pixels, the least and the most; beyond a half, hardly any answer survives.
        others: share of images whose target is a random label and not the prediction.
        baselines: what hides pixels, drawn for each image: `mean` (colour), `blur`, `colour` (random), `noise`,
            `image` (another one of the batch).
        learning_rate: of AdamW, cosine to a fiftieth. weight_decay: likewise; a long training at a high rate needs it,
            or the scores grow until nearly all of the map is saturated.
        every: steps between validations; after `patience` of them without a better score training stops.
        seed: of weights, batches and thresholds.

    Raises:
        UsageError: a number is out of range; the message names it.
    """

    steps: int = 600
    batch: int = 16
    thresholds: int = 3
    forward_batch: int = 256
    alpha_min: float = 0.5
    temperature: tuple[float, float] = (0.3, 0.05)
    removal: float = 1.0
    area: float = 1.0
    variation: float = 0.05
    moved: float = 1 / 32
    ranks: float = 4.0
    rank_temperature: tuple[float, float] = (0.3, 0.05)
    rank_thresholds: int = 3
    imputed: float = 0.0
    imputed_shares: tuple[float, float] = (0.08, 0.5)
    others: float = 0.0
    baselines: tuple[str, ...] = ("mean",)
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    every: int = 50
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "thresholds", "rank_thresholds", "every", "patience"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.alpha_min < 1:
            raise UsageError(f"alpha_min: expected a number in [0, 1) to train with, got {self.alpha_min}")
        if not 0 <= self.imputed_shares[0] <= self.imputed_shares[1] <= 1:
            raise UsageError(f"imputed_shares: expected two ascending numbers in [0, 1], got {self.imputed_shares}")
        if min(*self.temperature, *self.rank_temperature) <= 0:
            raise UsageError(f"temperature: expected numbers above 0, got {self.temperature}, {self.rank_temperature}")
        if unknown := set(self.baselines) - set(BASELINES) or (not self.baselines and {"none"}):
            raise UsageError(f"baselines: expected some of {', '.join(BASELINES)}, got {min(unknown)!r}")


@dataclass
class History:
    """Losses by step, and (step, score) of every validation."""

    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)


def _generator(seed: int, step: int) -> torch.Generator:
    key = hashlib.sha256(f"{seed}/lax/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))


def draw_baselines(
    images: Tensor,  # [B, 3, H, W]
    kinds: tuple[str, ...],
    mean_colour: Tensor,  # [3]
    g: torch.Generator,
) -> Tensor:
    """For each image one baseline of a kind drawn by `g`: [B, 3, H, W]."""
    b, c, h, _ = images.shape
    colour = torch.rand((b, c), generator=g).to(images.device)
    pick = torch.randint(len(kinds), (b,), generator=g).tolist()
    noise = torch.rand(images.shape, generator=g).to(images) if "noise" in kinds else images
    others = torch.randperm(b, generator=g).tolist() if "image" in kinds else []
    out = torch.empty_like(images)
    for i, kind in enumerate(kinds[p] for p in pick):
        if kind == "mean":
            out[i] = mean_colour[:, None, None]
        elif kind == "colour":
            out[i] = colour[i, :, None, None]
        elif kind == "noise":
            out[i] = noise[i]
        elif kind == "image":
            out[i] = images[others[i]]
        else:
            out[i] = blur(images[i : i + 1], h / 8)[0]
    return out


def faithfulness(
    adapter: LAX,
    images: Tensor,  # [B, 3, H, W]
    baseline: Tensor,  # [B, 3, H, W]
    saliency: Tensor,  # [B, H, W] in [0, 1]
    target: Tensor,  # [B]
    levels: Tensor,  # [B, K] strictly increasing in [0, 1], that of alpha_min first
    temperature: float,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """The expectation in LAX's loss and its gradient with respect to the map: a scalar and [B, H, W].

    Thresholds go through the model a few at a time, so that memory depends on `forward_batch` and not on K.
    """
    b, k = levels.shape
    # Half the weight at alpha_min, as in BaseScore; the mean over all the others for the rest.
    weights = torch.full((k,), 0.5 / max(1, k - 1))
    weights[0] = 0.5 if k > 1 else 1.0
    gradient, total = torch.zeros_like(saliency), saliency.new_zeros(())
    per_pass = max(1, schedule.forward_batch // (2 * b))
    for start in range(0, k, per_pass):
        part = slice(start, start + per_pass)
        leaf = saliency.detach().requires_grad_()
        mixed = soft_perturb(images, baseline, leaf, levels[:, part], temperature=temperature)  # [B, 2, k, 3, H, W]
        count = mixed.shape[2]
        # Channels last: a third faster through convolutions on the CPU.
        logits = adapter.classifier.logits(mixed.flatten(0, 2).contiguous(memory_format=torch.channels_last))
        odds = adapter.quantity.log_odds(logits, target.repeat_interleave(2 * count)).reshape(b, 2, count)
        # log p = -softplus(-odds) and log(1 - p) = -softplus(odds), exact where p itself would round to 0 or 1.
        keep, remove = F.softplus(-odds[:, 0]), F.softplus(odds[:, 1]).clamp(max=LARGEST)  # [B, k]
        loss = ((keep + schedule.removal * remove).mean(0) * weights[part].to(odds)).sum()
        if not loss.requires_grad:
            raise UsageError("classifier: not differentiable; LAX trains through it (explaining afterwards does not)")
        gradient += torch.autograd.grad(loss, leaf)[0]
        total += loss.detach()
    return total, gradient


def _draw(b: int, k: int, low: float, high: float, g: torch.Generator) -> Tensor:
    """K numbers for each of B samples, evenly spread over the batch between low and high, ascending: [B, K] float64."""
    strata = torch.stack([torch.randperm(b, generator=g) for _ in range(k)], 1) if k else torch.empty(b, 0)
    spread = (strata + torch.rand((b, k), generator=g)) / b
    return (low + (high - low) * spread.double()).sort(1).values


def _anneal(ends: tuple[float, float], share: float) -> float:
    """From the first to the last, geometrically."""
    return ends[0] * (ends[1] / ends[0]) ** share


def _at_shares(ordered: Tensor, shares: Tensor) -> Tensor:
    """Of values [B, P] in ascending order, those that a share [B, K] of the others is below: [B, K]."""
    return ordered.gather(1, (shares * (ordered.shape[1] - 1)).round().long().to(ordered.device))


def _increasing(levels: Tensor) -> Tensor:
    """Levels [B, K] made strictly increasing in [0, 1] by steps of 1e-6 where they tie."""
    k = levels.shape[1]
    steps = 1e-6 * torch.arange(k, dtype=levels.dtype, device=levels.device)
    return (levels.double() - steps).cummax(1).values.clamp(0, 1 - 1e-6 * k) + steps


def training_loss(
    adapter: LAX,
    images: Tensor,  # [B, 3, H, W]
    mean_colour: Tensor,  # [3]
    step: int,
    schedule: Schedule,
    g: torch.Generator,
) -> Tensor:
    """LAX's loss of one batch; its gradient reaches the head alone."""
    share = step / max(1, schedule.steps - 1)
    temperature = _anneal(schedule.temperature, share)
    low, b, k = schedule.alpha_min, len(images), schedule.thresholds
    logits, features = adapter.features(images)
    check_computed("classifier", torch.zeros(b, device=logits.device).masked_fill(undefined(logits), torch.nan))
    target = logits.argmax(1)
    other = torch.rand(b, generator=g) < schedule.others
    drawn = torch.randint(logits.shape[1], (b,), generator=g)
    target = torch.where(other.to(target.device), drawn.to(target.device), target)
    baseline = draw_baselines(images, schedule.baselines, mean_colour, g)
    scores = adapter.head(images, features, adapter.quantity.condition(target))
    if not bool(scores.isfinite().all()):
        raise CounterlensError(f"training: diverged before step {step + 1}; a lower learning_rate may help")
    scores = moved(scores, schedule.moved, g)
    saliency = torch.sigmoid(scores)
    levels = torch.cat([torch.full((b, 1), low, dtype=torch.float64), _draw(b, k - 1, low, 1, g)], 1)
    loss = _expectation(adapter, images, baseline, saliency, target, levels, temperature, schedule)
    # Ranks: the map standardised, so that terms on them neither shift nor stretch the scores. Level and contrast are
    # the value form's business.
    flat = scores.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp(min=1e-3)
    softness = _anneal(schedule.rank_temperature, share)
    if schedule.ranks:
        loss = loss + schedule.ranks * _by_ranks(adapter, images, baseline, flat, target, softness, schedule, g)
    if schedule.imputed:
        marked = soft_ranks(flat, _draw(b, 1, *schedule.imputed_shares, g), softness)[:, 0].view_as(saliency)
        hidden = impute(images, marked.detach() >= 0.5, tolerance=IMPUTED_TOLERANCE)
        odds = adapter.quantity.log_odds(adapter.classifier.logits(images.lerp(hidden, marked[:, None])), target)
        loss = loss + schedule.imputed * F.softplus(odds).clamp(max=LARGEST).mean()
    area = torch.sigmoid((saliency - low) / temperature).mean()
    variation = saliency.diff(dim=1).abs().mean() + saliency.diff(dim=2).abs().mean()
    return loss + schedule.area * area + schedule.variation * variation


def moved(
    scores: Tensor,  # [B, H, W]
    share: float,
    g: torch.Generator,
) -> Tensor:
    """Maps moved by whole pixels, up to a share of the side each way, some of them smoothed: [B, H, W]."""
    most = round(share * scores.shape[2])
    if not most:
        return scores
    steps = torch.randint(-most, most + 1, (len(scores), 2), generator=g).tolist()
    smoothed = (torch.rand(len(scores), generator=g) < SMOOTHED).tolist()
    out = []
    for one, (dy, dx), soft in zip(scores.split(1), steps, smoothed, strict=True):
        there = shifted(one, dy, dx)
        out.append(smooth(there) if soft else there)
    return torch.cat(out)


def soft_ranks(
    scores: Tensor,  # [B, P] standardised
    shares: Tensor,  # [B, K] in [0, 1]
    softness: float,
) -> Tensor:
    """Soft masks of a share of the highest scores: [B, K, P].

    As soft as scores lie apart there, and `softness` at least: the ends of a map hold few, far from each other, and its
    middle many.
    """
    ordered = scores.detach().sort(1).values
    level, high, low = (_at_shares(ordered, (1 - shares + d).clamp(0, 1))[:, :, None] for d in (0.0, EDGE, -EDGE))
    return torch.sigmoid(4 * (scores[:, None] - level) / (high - low).clamp(min=softness))


def _by_ranks(
    adapter: LAX,
    images: Tensor,  # [B, 3, H, W]
    baseline: Tensor,  # [B, 3, H, W]
    scores: Tensor,  # [B, H * W] standardised
    target: Tensor,  # [B]
    softness: float,
    schedule: Schedule,
    g: torch.Generator,
) -> Tensor:
    """Mean of -log p(keep) - beta log(1 - p(remove)) over drawn shares of the most salient pixels: a scalar."""
    b, k = len(images), schedule.rank_thresholds
    shares = _draw(b, k, 0, 1, g).square()
    mask = soft_ranks(scores, shares, softness).view(b, k, 1, *images.shape[2:])
    keep, remove = baseline[:, None].lerp(images[:, None], mask), images[:, None].lerp(baseline[:, None], mask)
    mixed = torch.stack([keep, remove], 1).flatten(0, 2).contiguous(memory_format=torch.channels_last)
    logits = adapter.classifier.logits(mixed)
    odds = adapter.quantity.log_odds(logits, target.repeat_interleave(2 * k)).view(b, 2, k)
    kept, removed = F.softplus(-odds[:, 0]), F.softplus(odds[:, 1])
    return (kept + schedule.removal * removed).clamp(max=2 * LARGEST).mean()


def _expectation(
    adapter: LAX,
    images: Tensor,
    baseline: Tensor,
    saliency: Tensor,
    target: Tensor,
    levels: Tensor,
    temperature: float,
    schedule: Schedule,
) -> Tensor:
    """`faithfulness` as a scalar with a gradient: the gradient taken piece by piece enters as a linear term."""
    value, gradient = faithfulness(
        adapter, images, baseline, saliency.detach(), target, _increasing(levels).to(images.device), temperature,
        schedule,
    )  # fmt: skip
    linear = (saliency * gradient).sum()
    return linear - linear.detach() + value


def train(
    adapter: LAX,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    validate: Callable[[LAX], float],
    schedule: Schedule,
    *,
    mean_colour: Tensor | None = None,  # [3]
    folder: Path | None = None,
    held: Sequence[Tensor] = (),
    on_step: Callable[[int, int, float, float], None] = lambda *_: None,
    stop_after: int | None = None,
) -> History:
    """Train an adapter's head in place; the model stays as it is. Leaves the weights of the best validation.

    Args:
        adapter: as `new_adapter` made it.
        images: [N, 3, H, W] in [0, 1].
        validate: a number to make large, such as the MSI on images that training does not see.
        schedule: every number.
        mean_colour: baseline `mean`; the images' own without it.
        folder: for a checkpoint; a training of the same model with the same numbers and images that was interrupted
            goes on from there.
        held: what `validate` looks at; a checkpoint belongs to it as well.
        on_step: told (step, steps, loss, best score).
        stop_after: steps after which this call returns early, as if interrupted; its checkpoint is written.

    Raises:
        UsageError: the classifier is not differentiable, or the checkpoint is of another training.
        CounterlensError: the checkpoint cannot be read or written, or training diverged. NotFinite: the classifier
            gives NaN or infinity for an image.
    """
    head, device = adapter.head, images.device
    mean_colour = images.mean((0, 2, 3)) if mean_colour is None else mean_colour.to(images)
    history, best, best_state, first = History(), -math.inf, {}, 0
    head.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.99)
    )
    path, identity = None, dict[str, str]()
    if folder is not None:
        path = folder / CHECKPOINT
        facts = {
            "version": VERSION, **asdict(schedule), "model": weights_digest([adapter.classifier.module])[:16],
            "quantity": adapter.quantity.name, "taps": adapter.taps, "width": adapter.width,
            "images": tensors_digest(images, mean_colour, *held)[:16],
        }  # fmt: skip
        identity = {name: repr(value) for name, value in facts.items()}
    if path is not None and path.exists():
        state = _read_checkpoint(path)
        if state["identity"] != identity:
            raise UsageError(
                f"out: {path} is of another training ({_differences(state['identity'], identity)}); ask for the same, "
                "or choose another folder"
            )
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        best, best_state, first = state["best"], state["best_state"], state["step"]
        history = History(state["losses"], [tuple(v) for v in state["validations"]])
    else:
        picked = images[torch.randperm(len(images), generator=_generator(schedule.seed, -1))[:64]]
        head.standardise(picked, adapter.features(picked)[1])
    saved, stale = time.monotonic(), 0
    for step in range(first, schedule.steps):
        g = _generator(schedule.seed, step)
        index = torch.randint(len(images), (schedule.batch,), generator=g)
        warm = min(1.0, (step + 1) / 20)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * warm * decay
        with frozen(adapter.classifier.module):
            try:
                loss = training_loss(adapter, images[index.to(device)], mean_colour, step, schedule, g)
            except NotFinite as error:  # of the batch: said of the images
                raise NotFinite(error.what, sorted({int(index[k]) for k in error.samples})) from error
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 5.0)
        optimizer.step()
        history.losses.append(loss.item())
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            value = validate(adapter)
            history.validations.append((step + 1, value))
            if value > best:
                best, best_state = value, {k: v.clone() for k, v in head.state_dict().items()}
        on_step(step + 1, schedule.steps, history.losses[-1], best)
        values = [v for _, v in history.validations]
        stale = len(values) - 1 - values.index(max(values)) if values else 0
        done = step + 1 == schedule.steps or stale >= schedule.patience
        halted = stop_after is not None and step + 1 - first >= stop_after
        if path is not None and (done or halted or time.monotonic() - saved > CHECKPOINT_SECONDS):
            state = {
                "identity": identity, "head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                "best": best, "best_state": best_state, "losses": history.losses, "validations": history.validations,
            }  # fmt: skip
            _write_checkpoint(state, path)
            saved = time.monotonic()
        if halted and not done:
            return history
        if done:
            break
    if not best_state:
        raise CounterlensError("training: no validation gave a number; a lower learning_rate may help")
    head.load_state_dict(best_state)
    head.eval().requires_grad_(False)
    return history


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CounterlensError(f"{path}: not a checkpoint that can be read ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or set(state) != STATE:
        raise CounterlensError(f"{path}: not a checkpoint of an adapter's training; choose another folder")
    return state


def _differences(theirs: object, mine: dict[str, str]) -> str:
    """What a checkpoint's training was made with, and this one is not."""
    if not isinstance(theirs, dict):
        return "an older counterlens made it"
    names = [name for name in sorted({*theirs, *mine}) if theirs.get(name) != mine.get(name)]
    return "; ".join(f"{name} was {theirs.get(name, 'none')}, is {mine.get(name, 'none')}" for name in names)


def _write_checkpoint(state: dict[str, Any], path: Path) -> None:
    # torch.save turns an OSError of the file that it writes to into a RuntimeError without the reason.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())
