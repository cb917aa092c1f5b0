"""LAX: a small head on a frozen model's own features that draws its saliency map in one pass.

Source: arXiv 2605.18681, as reconstructed: S = sigmoid(head(features)). The decoder's shape, matrices of each
target's own and the projection from several resolutions are ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from counterlens.export.store import file_digest, weights_digest
from counterlens.kernels.dispatch import exporting

from ..errors import CounterlensError, UsageError
from ..guidance.pullback import frozen
from ..images import make_folder
from ..models.load import read_json
from ..models.protocols import Classifier
from .quantities import LogOdds, Quantity, check_targets, make_quantity
from .taps import choose_taps, tapped

FORMAT, VERSION = "counterlens-adapter", 2
WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
SHUFFLED = 4  # how much finer than its finest maps the head draws at most; beyond that, it is interpolated
ONE_PRODUCT = 1 << 14  # entries of a matrix for rows and columns at once: more multiplications, but one product
CODES = 32  # numbers that tell conditions apart, at most
ENCODER = (16, 24, 32)  # channels of the head's own features where the model's are hidden, each at half the resolution


def resize(
    x: Tensor,  # [B, C, h, w]
    size: Sequence[int],
) -> Tensor:
    """Bilinear interpolation (`align_corners=False`) as products with small matrices: [B, C, *size].

    Faster on small maps than `F.interpolate`, which reorders them to channels last and back.
    """
    # Made by a traced graph, the weights belong to it, and must not be kept.
    make = _weights.__wrapped__ if exporting() or torch.compiler.is_compiling() else _weights
    weights = make(*x.shape[2:], *size, x.dtype, x.device)
    if len(weights) == 1:
        return (x.flatten(2) @ weights[0]).unflatten(2, tuple(size))
    return weights[0] @ (x @ weights[1])


@lru_cache(maxsize=64)
def _weights(h: int, w: int, to_h: int, to_w: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """What `resize` multiplies maps with: [h * w, to_h * to_w], or where that is large, [to_h, h] and [w, to_w]."""
    with torch.inference_mode(False):
        rows, columns = _linear(h, to_h, dtype, device), _linear(w, to_w, dtype, device)
        if rows.numel() * columns.numel() <= ONE_PRODUCT:
            return (torch.kron(rows, columns).T.contiguous(),)
        return rows, columns.T.contiguous()


def _linear(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights [m, n] of linear interpolation from n to m places."""
    places = ((torch.arange(m, dtype=dtype, device=device) + 0.5) * (n / m) - 0.5).clamp(0, n - 1)
    return (1 - (places[:, None] - torch.arange(n, dtype=dtype, device=device)).abs()).clamp(min=0)


class Projection(nn.Module):
    """A 1x1 convolution of which each condition has its own: a shared one, and what the condition's code makes of it.

    Used as a batched product of matrices: twice as fast on the CPU as `conv2d`, which reorders its input first, and no
    slower with a matrix for each sample.
    """

    def __init__(self, channels: int, width: int, codes: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(channels, width, 1)
        self.own = nn.Linear(codes, width * (channels + 2), bias=False)
        nn.init.zeros_(self.own.weight)

    def forward(
        self,
        code: Tensor,  # [N, codes]
        condition: Tensor,  # [B] places in `code`
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = self.own(code).unflatten(1, (-1, self.shared.in_channels + 2))
        gain, shift, weight = 1 + own[..., :1], own[..., 1:2], own[..., 2:]
        assert self.shared.bias is not None
        matrix = gain * (weight + self.shared.weight[:, :, 0, 0])
        shift = torch.addcmul(shift, gain, self.shared.bias[:, None])
        matrix, shift, gain = (x.index_select(0, condition) for x in (matrix, shift, gain))
        return matrix, shift, gain  # [B, width, C], [B, width, 1] twice


class Head(nn.Module):
    """Feature maps of several resolutions, the image and a condition to one map of logits.

    A decoder brings the maps together, coarsest first. From the finest it gives every pixel four numbers, an offset and
    one weight for each of three factors of that pixel: its colour channels, and what a matrix adds to them of features
    at the image's own resolution. A gradient times input without the gradient: nothing but that product happens at full
    resolution.

    Args:
        channels: of the feature maps, finest first; empty where the model's features are hidden.
        conditions: how many explained things there are.
        width: channels inside.
        ratio: side of the image over that of the finest maps.
        detail: channels of maps at the image's own resolution, in front of the others; 0 where there are none.
    """

    def __init__(self, channels: Sequence[int], conditions: int, width: int, ratio: int, detail: int = 0) -> None:
        super().__init__()
        self.encoder = nn.ModuleList()
        if not channels:
            channels, ratio = ENCODER, 2
            self.encoder.extend(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip((3, *ENCODER), ENCODER, strict=False))
        self.channels, codes = list(channels), min(conditions, CODES)
        self.code = nn.Embedding(conditions, codes)
        self.shuffle = nn.PixelShuffle(min(ratio, SHUFFLED))
        self.project = nn.ModuleList(Projection(c, width, codes) for c in channels)
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels[1:])
        cell = self.shuffle.upscale_factor**2
        self.out = Projection(width, 4 * cell, codes)
        self.detail = nn.Linear(codes, 3 * detail, bias=False) if detail else None
        with torch.no_grad():
            if codes == conditions:
                self.code.weight.copy_(torch.eye(codes))
            # A cell's pixels begin alike, or maps begin as checkerboards.
            for parameter in self.out.shared.parameters():
                parameter.copy_(parameter[::cell].repeat_interleave(cell, 0))
            if self.detail is not None:
                self.detail.weight.zero_()

    @torch.no_grad()
    def standardise(self, image: Tensor, features: Sequence[Tensor]) -> None:
        """Fold each channel's mean and deviation over a batch into the projections, so that all start alike."""
        for projection, feature in zip(self.project, self._levels(image, features), strict=True):
            mean, std = feature.mean((0, 2, 3)), feature.std((0, 2, 3)).clamp(min=1e-6)
            assert isinstance(projection, Projection)
            conv = projection.shared
            assert conv.bias is not None
            conv.weight.div_(std[:, None, None])
            conv.bias.sub_((conv.weight[:, :, 0, 0] * mean).sum(1))

    def _levels(self, image: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        levels = list(features if self.detail is None else features[1:])
        for conv in self.encoder:
            levels.append(F.silu(conv(levels[-1] if levels else image)))
        return levels

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
        features: Sequence[Tensor],  # [B, C, h, w] each, finest first
        condition: Tensor,  # [B]
    ) -> Tensor:
        code, levels, factors = self.code.weight, self._levels(image, features), image
        if len(code) > CODES:  # too many to make everyone's matrices: those of each sample
            code, condition = self.code(condition), torch.arange(len(condition), device=condition.device)
        x: Tensor | None = None
        for i in reversed(range(len(levels))):
            weight, bias, gain = self.project[i](code, condition)
            level, size = levels[i].flatten(2), levels[i].shape[2:]  # [B, C, h * w]
            if x is None:
                y = torch.baddbmm(bias, weight, level)
            else:
                below = torch.addcmul(bias[..., None], gain[..., None], self.mix[i](x))
                y = resize(below, size).flatten(2).baddbmm_(weight, level)
            x = F.relu_(y).unflatten(2, size)
        assert x is not None
        weight, bias, _ = self.out(code, condition)
        local = self.shuffle(torch.baddbmm(bias, weight, x.flatten(2)).unflatten(2, x.shape[2:]))
        if local.shape[2:] != image.shape[2:]:
            local = resize(local, image.shape[2:])  # [B, 4, H, W]
        if self.detail is not None:
            matrix = self.detail(code).index_select(0, condition).unflatten(1, (3, -1))  # [B, 3, detail]
            factors = torch.baddbmm(image.flatten(2), matrix, features[0].flatten(2)).view_as(image)
        return local[:, 0] + (local[:, 1:] * factors).sum(1)  # [B, H, W]


@dataclass(frozen=True)
class Maps:
    """Saliency of B images.

    Attributes:
        saliency: [B, H, W] in [0, 1].
        scores: [B, H, W], the same before the sigmoid: finer ranks, since a saturated map has only ties.
        logits: [B, C] of the explained model, bit-identical to its own.
        target: [B] the explained label.
    """

    saliency: Tensor
    scores: Tensor
    logits: Tensor
    target: Tensor


@dataclass
class LAX:
    """A frozen classifier with a trained head.

    Attributes:
        classifier: see `engine.models.protocols.Classifier`; never changed.
        head: what was trained.
        taps: names of the classifier's modules whose outputs the head reads; none: the pixels alone.
        quantity: what the maps explain.
        image_size: side in pixels of the images that it was trained on.
        training: how it was trained, as plain values.
    """

    classifier: Classifier
    head: Head
    taps: list[str]
    quantity: Quantity
    image_size: int
    width: int
    training: dict[str, Any]

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's logits [B, C] and the tapped features, from one forward pass.

        Raises:
            UsageError: the classifier returns something else, or a tap is not there.
        """
        with frozen(self.classifier.module), torch.no_grad(), tapped(self.classifier.module, self.taps) as features:
            logits = self.classifier.logits(images)
        if not isinstance(logits, Tensor) or logits.shape != (len(images), len(self.classifier.labels)):
            got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UsageError(f"classifier: expected logits [B, {len(self.classifier.labels)}], got {got}")
        return logits, [f.float() for f in features]

    @torch.no_grad()
    def explain(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        target: int | Sequence[int] | Tensor | None = None,
        *,
        batch: int = 64,
    ) -> Maps:
        """Saliency maps in one pass of the model and the head.

        Args:
            images: [B, 3, H, W] in [0, 1].
            target: labels to explain, one for all or one per image; the predictions without it.
            batch: images in one forward pass.

        Raises:
            UsageError: images or targets do not fit.
        """
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise UsageError(f"images: expected [B, 3, {size}, {size}] as in training, got {list(images.shape)}")
        given = None
        if target is not None:
            given = check_targets(target, len(images), len(self.classifier.labels), images.device)
        logits, scores, targets = [], [], []
        for start in range(0, max(1, len(images)), batch):
            x = images[start : start + batch]
            out, features = self.features(x)
            wanted = out.argmax(1) if given is None else given[start : start + batch]
            logits.append(out)
            targets.append(wanted)
            scores.append(self.head(x, features, self.quantity.condition(wanted)))
        joined = torch.cat(scores)
        return Maps(torch.sigmoid(joined), joined, torch.cat(logits), torch.cat(targets))

    def save(self, folder: str | Path) -> Path:
        """Write `adapter.safetensors` and `adapter.json`, which holds the model's hash; returns the folder.

        Raises:
            UsageError: the folder cannot be written. CounterlensError: a file cannot.
        """
        folder = make_folder(Path(folder))
        try:
            partial = folder / f".{WEIGHTS}.partial"
            save_file({k: v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()}, partial)
            os.replace(partial, folder / WEIGHTS)
            description = {
                "format": FORMAT,
                "version": VERSION,
                "model": weights_digest([self.classifier.module]),
                "labels": len(self.classifier.labels),
                "quantity": self.quantity.name,
                "taps": self.taps,
                "channels": self.head.channels if self.taps else [],
                "detail": 0 if self.head.detail is None else self.head.detail.out_features // 3,
                "ratio": self.head.shuffle.upscale_factor,
                "image_size": self.image_size,
                "width": self.width,
                "weights": file_digest(folder / WEIGHTS),
                "training": self.training,
            }
            (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        except OSError as error:
            raise CounterlensError(f"{folder}: the adapter cannot be written ({error.strerror or error})") from error
        return folder


def new_adapter(
    classifier: Classifier,
    image_size: int,
    *,
    taps: Sequence[str] | None = None,
    quantity: str | LogOdds | Quantity = "class",
    width: int = 32,
    seed: int = 0,
) -> LAX:
    """An untrained adapter.

    Args:
        classifier: see `engine.models.protocols.Classifier`.
        image_size: side in pixels.
        taps: names of modules, finest first; chosen by `choose_taps` without it, and none of them (`[]`) means that the
            head sees the pixels alone.
        quantity: see `make_quantity`.
        width: channels inside the head.
        seed: of its weights.

    Raises:
        UsageError: a tap or the quantity does not fit.
    """
    parameter = next(classifier.module.parameters(), torch.empty(0))
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    image = torch.full((1, 3, image_size, image_size), 0.5, device=parameter.device, dtype=dtype)
    explained = make_quantity(classifier, quantity)
    with frozen(classifier.module):
        names = choose_taps(classifier, image) if taps is None else list(taps)
    adapter = LAX(classifier, nn.Module(), names, explained, image_size, width, {})  # type: ignore[arg-type]
    _, features = adapter.features(image)
    order = sorted(range(len(features)), key=lambda i: -features[i].shape[2])
    names, features = [names[i] for i in order], [features[i] for i in order]
    detail = features.pop(0).shape[1] if len(features) > 1 and features[0].shape[2:] == image.shape[2:] else 0
    ratio = max(1, round(image_size / features[0].shape[2])) if features else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head([f.shape[1] for f in features], explained.conditions, width, ratio, detail)
    adapter.taps, adapter.head = names, head.to(parameter.device)
    return adapter


def open_adapter(folder: str | Path, classifier: Classifier, quantity: LogOdds | Quantity | None = None) -> LAX:
    """Open a saved adapter for the classifier that it was trained on.

    Args:
        folder: as `LAX.save` wrote it.
        classifier: the same weights as in training.
        quantity: the function again, where the adapter explains a scalar of your own.

    Raises:
        CounterlensError: files are missing or changed, or the adapter was saved for another model.
        UsageError: it explains a scalar of its own that was not given.
    """
    folder = Path(folder)
    description = read_json(folder / DESCRIPTION)
    if (description.get("format"), description.get("version")) != (FORMAT, VERSION):
        raise CounterlensError(f"{folder / DESCRIPTION}: expected {FORMAT} version {VERSION}")
    try:
        model, name, taps = description["model"], description["quantity"], list(description["taps"])
        channels, ratio = list(description["channels"]), int(description["ratio"])
        size, width, detail = (int(description[k]) for k in ("image_size", "width", "detail"))
        digest, training = description["weights"], dict(description["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise CounterlensError(f"{folder / DESCRIPTION}: not an adapter ({type(error).__name__}: {error})") from error
    own = weights_digest([classifier.module])
    if model != own:
        raise CounterlensError(
            f"{folder}: the adapter was trained for another model (weights {model[:12]}..., these are {own[:12]}...); "
            "train one for this model: counterlens adapter train"
        )
    explained = make_quantity(classifier, name) if quantity is None else make_quantity(classifier, quantity)
    weights = folder / WEIGHTS
    if not weights.is_file() or file_digest(weights) != digest:
        raise CounterlensError(f"{weights}: missing, or not the file that {DESCRIPTION} describes")
    head = Head(channels, explained.conditions, width, ratio, detail)
    try:
        head.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise CounterlensError(f"{weights}: {str(error).splitlines()[0]}") from error
    parameter = next(classifier.module.parameters(), torch.empty(0))
    head.to(parameter.device).eval().requires_grad_(False)
    return LAX(classifier, head, taps, explained, size, width, training)
