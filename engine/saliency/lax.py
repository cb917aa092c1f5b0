"""LAX: a small head on a frozen model's own features that draws its saliency map in one pass.

Source: arXiv 2605.18681, as reconstructed: S = sigmoid(head(features)). The decoder's shape, matrices of each
target's own and the projection from several resolutions are ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from counterlens.export.files import newer
from counterlens.export.hashing import file_digest
from counterlens.export.store import weights_digest
from counterlens.kernels.dispatch import exporting

from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from ..images.files import make_folder
from ..metrics.inputs import check_computed
from ..metrics.quantities import LogOdds, Quantity, check_labels, make_quantity
from ..models.files import read_json
from ..models.freezing import frozen
from ..models.protocols import Classifier
from ..showing import one_line
from .taps import choose_taps, resolve_taps, tapped

FORMAT, VERSION = "counterlens-adapter", 3
WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
SHUFFLED = 4  # how much finer than its finest maps the head draws at most; beyond that, it is interpolated
CODES = 32  # numbers that tell conditions apart, at most
ENCODER = (16, 24, 32)  # channels of the head's own features where the model's are hidden, each at half the resolution


class Projection(nn.Module):
    """A 1x1 convolution of which each condition has its own: a shared one, and what the condition's code makes of it.

    Used as a batched product of matrices, one for each sample: twice as fast on the CPU as `conv2d`.
    """

    def __init__(self, channels: int, width: int, codes: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(channels, width, 1)
        self.own = nn.Linear(codes, width * (channels + 2), bias=False)
        nn.init.zeros_(self.own.weight)

    def forward(
        self,
        code: Tensor,  # [N, codes]
    ) -> Tensor:
        """Each condition's matrix, and below it shift and gain of the outputs: [N, C + 2, width]."""
        own = self.own(code).unflatten(1, (-1, self.shared.in_channels + 2)).transpose(1, 2)
        gain, shift, weight = 1 + own[:, :1], own[:, 1:2], own[:, 2:]
        assert self.shared.bias is not None
        matrix = gain * (weight + self.shared.weight[:, :, 0, 0].T)
        return torch.cat([matrix, torch.addcmul(shift, gain, self.shared.bias), gain], 1)


class Head(nn.Module):
    """Feature maps of several resolutions, the image and a condition to one map of logits.

    A decoder brings the maps together, coarsest first. From the finest and what is next to it, every pixel gets four
    numbers, an offset and one weight for each of three factors of that pixel: its colour channels, and what a matrix
    adds to them of features at the image's own resolution. A gradient times input without the gradient: nothing but
    that product happens at full resolution. In eval mode, whoever changes weights in place calls `eval()` again.

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
        self.side = min(ratio, SHUFFLED)  # of a cell: the pixels that one place of the finest maps draws
        self.project = nn.ModuleList(Projection(c, width, codes) for c in channels)
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels[1:])
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)  # a pixel's effect reaches its neighbours
        cell = self.side**2
        self.out = Projection(width, 4 * cell, codes)
        self.detail = nn.Linear(codes, 3 * detail, bias=False) if detail else None
        self.table: Tensor | None
        self.register_buffer("table", None, persistent=False)
        self.register_load_state_dict_post_hook(_made_again)
        with torch.no_grad():
            if codes == conditions:
                self.code.weight.copy_(torch.eye(codes))
            # A cell's pixels begin alike, or maps begin as checkerboards.
            for parameter in self.out.shared.parameters():
                parameter.copy_(parameter[::cell].repeat_interleave(cell, 0))
            nn.init.dirac_(self.near.weight, groups=width)
            assert self.near.bias is not None
            self.near.bias.zero_()
            if self.detail is not None:
                self.detail.weight.zero_()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the convolutions' inputs are

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
        self.train(self.training)

    def _levels(self, image: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        levels = list(features if self.detail is None else features[1:])
        for conv in self.encoder:
            levels.append(F.silu(conv(levels[-1] if levels else image)))
        return levels

    def _make_table(self, code: Tensor) -> Tensor:
        """Of conditions' codes [N, codes] everything that does not depend on the image, side by side: [N, ...]."""
        parts = [part(code).flatten(1) for part in (*self.project, self.out)]
        return torch.cat(parts if self.detail is None else [*parts, self.detail(code)], 1)

    def train(self, mode: bool = True) -> Head:
        """See `nn.Module.train`; eval mode keeps what does not depend on the image, of the weights at that moment."""
        super().train(mode)
        self.table = None
        if not mode and len(self.code.weight) <= CODES:
            with torch.inference_mode(False), torch.no_grad():
                self.table = self._make_table(self.code.weight)
        return self

    def _tables(self, condition: Tensor) -> list[Tensor]:
        """Each sample's matrix, shift and gain of every projection [B, C + 2, width], and of the detail [B, 3, C]."""
        code = self.code.weight
        if len(code) > CODES:  # too many to make everyone's: those of each sample
            rows = self._make_table(self.code(condition))
        else:
            table = self.table
            if table is None or (code.requires_grad and torch.is_grad_enabled()):  # a gradient has to reach the weights
                table = self._make_table(code)
            rows = table.index_select(0, condition)
        shapes = [(p.shared.in_channels + 2, p.shared.out_channels) for p in (*self.project, self.out)]
        if self.detail is not None:
            shapes.append((3, self.detail.out_features // 3))
        parts = rows.split([a * b for a, b in shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
        features: Sequence[Tensor],  # [B, C, h, w] each, finest first
        condition: Tensor,  # [B]
    ) -> Tensor:
        levels, factors = self._levels(image, features), image
        tables = self._tables(condition)
        x: Tensor | None = None  # [B, h * w, width]: channels last throughout, as convolution and resizing want them
        for i in reversed(range(len(levels))):
            size = levels[i].shape[2:]
            matrix, shift, gain = tables[i].split((self.channels[i], 1, 1), 1)
            level = levels[i].flatten(2).transpose(1, 2)  # [B, h * w, C]
            if x is None:
                y = torch.baddbmm(shift, level, matrix)
            else:
                coarser = levels[i + 1].shape[2:]
                below = torch.addcmul(shift, gain, _rows(self.mix[i](_maps(x, coarser))))
                up = F.interpolate(_maps(below, coarser), size=size, mode="bilinear", align_corners=False)
                y = _rows(up).baddbmm_(level, matrix)
            x = F.relu_(y)
        assert x is not None
        h, w = levels[0].shape[2:]
        x = _rows(self.near(_maps(x, (h, w))))
        matrix, shift, _ = tables[len(levels)].split((x.shape[2], 1, 1), 1)
        local = self._spread(torch.baddbmm(shift, x, matrix), h, w)
        if local.shape[2:] != image.shape[2:]:  # [B, 4, H, W]
            local = F.interpolate(local, size=image.shape[2:], mode="bilinear", align_corners=False)
        if self.detail is not None:
            factors = torch.baddbmm(image.flatten(2), tables[-1], features[0].flatten(2)).view_as(image)
        out, *weights = local.unbind(1)
        for weight, factor in zip(weights, factors.unbind(1), strict=True):
            out = torch.addcmul(out, weight, factor)
        return out  # [B, H, W]

    def _spread(
        self,
        cells: Tensor,  # [B, h * w, 4 * r * r]
        h: int,
        w: int,
    ) -> Tensor:
        """Each cell's numbers at the pixels that they are of, a pixel shuffle as one lookup: [B, 4, h * r, w * r]."""
        make = _places.__wrapped__ if exporting() or torch.compiler.is_compiling() else _places
        r = self.side
        places = make(h, w, r, cells.device)
        return cells.flatten(1).index_select(1, places).view(-1, 4, h * r, w * r)


def _made_again(head: Head, _: Any) -> None:
    """What is kept belongs to the weights before."""
    head.train(head.training)


def _rows(x: Tensor) -> Tensor:
    """Maps [B, C, h, w] as [B, h * w, C], without a copy where channels lie last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _maps(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, h * w, C] as maps [B, C, h, w], channels last: no copy."""
    return x.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _places(h: int, w: int, r: int, device: torch.device) -> Tensor:
    """Where the numbers of [4, h * r, w * r] stand in [h * w, 4 * r * r]: int64."""
    with torch.inference_mode(False):
        cells = torch.arange(h * w * 4 * r * r, device=device).view(h, w, 4, r, r)
        return cells.permute(2, 0, 3, 1, 4).flatten()


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

    __repr__ = one_line


@dataclass(repr=False)
class LAX:
    """A frozen classifier with a trained head.

    Attributes:
        classifier: see `engine.models.protocols.Classifier`; never changed.
        head: what was trained.
        taps: the classifier's modules whose outputs the head reads, see `taps`; none: the pixels alone.
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

    def __repr__(self) -> str:
        side, taps = self.image_size, ", ".join(self.taps) or "pixels"
        return f"LAX({len(self.classifier.labels)} labels, quantity {self.quantity.name}, {side}x{side}, on {taps})"

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
            UsageError: images or targets do not fit. NotFinite: the model gives NaN or infinity.
        """
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise UsageError(f"images: expected [B, 3, {size}, {size}] as in training, got {list(images.shape)}")
        given = None
        if target is not None:
            given = check_labels(target, len(images), len(self.classifier.labels), images.device)
        logits, scores, targets = [], [], []
        for start in range(0, max(1, len(images)), batch):
            x = images[start : start + batch]
            out, features = self.features(x)
            wanted = out.argmax(1) if given is None else given[start : start + batch]
            logits.append(out)
            targets.append(wanted)
            scores.append(self.head(x, features, self.quantity.condition(wanted)))
        joined, *others = (x[0] if len(x) == 1 else torch.cat(x) for x in (scores, logits, targets))
        check_computed("lax", joined)
        return Maps(torch.sigmoid(joined), joined, *others)

    def save(self, folder: str | Path) -> Path:
        """Write `adapter.safetensors` and `adapter.json`, which holds the model's hash; returns the folder.

        Raises:
            UsageError: the folder cannot be written. CounterlensError: a file cannot.
        """
        folder = make_folder(Path(folder))
        head = {k: v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()}
        write_atomically(folder / WEIGHTS, save(head))
        description = {
            "format": FORMAT,
            "schema_version": VERSION,
            "model": weights_digest([self.classifier.module]),
            "labels": len(self.classifier.labels),
            "quantity": self.quantity.name,
            "taps": self.taps,
            "channels": self.head.channels if self.taps else [],
            "detail": 0 if self.head.detail is None else self.head.detail.out_features // 3,
            "ratio": self.head.side,
            "image_size": self.image_size,
            "width": self.width,
            "weights": file_digest(folder / WEIGHTS),
            "training": self.training,
        }
        write_atomically(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
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
        taps: modules, finest first, see `taps`; layouts are found where they are not said. Chosen by `choose_taps`
            without it, and none of them (`[]`) means that the head sees the pixels alone.
        quantity: see `make_quantity`.
        width: channels inside the head.
        seed: of its weights.

    Raises:
        UsageError: a tap or the quantity does not fit.
    """
    if isinstance(classifier, nn.Module):
        raise UsageError("classifier: a bare module has no labels; use wrap_classifier(module, labels, image_size=...)")
    parameter = next(classifier.module.parameters(), torch.empty(0))
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    image = torch.full((1, 3, image_size, image_size), 0.5, device=parameter.device, dtype=dtype)
    explained = make_quantity(classifier, quantity)
    with frozen(classifier.module):
        names = choose_taps(classifier, image) if taps is None else resolve_taps(classifier, image, taps)
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
    if description.get("format") != FORMAT:
        raise CounterlensError(f"{folder / DESCRIPTION}: expected {FORMAT}, got {description.get('format')!r}")
    version = description.get("schema_version", description.get("version"))  # the pack's adapters say `version`
    if problem := newer(version, VERSION):
        raise CounterlensError(f"{folder / DESCRIPTION}: {problem}, or train it again: counterlens adapter train")
    if version != VERSION:
        raise CounterlensError(
            f"{folder / DESCRIPTION}: version {version}, this counterlens reads {VERSION}; train it again: "
            "counterlens adapter train"
        )
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
