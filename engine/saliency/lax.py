"""LAX: a small head on a frozen model's own features that draws its saliency map in one pass.

Source: arXiv 2605.18681, as reconstructed: S = sigmoid(head(features)). The decoder's shape is ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from counterlens.export.files import newer
from counterlens.export.hashing import file_digest
from counterlens.export.store import weights_digest

from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from ..images.files import make_folder
from ..metrics.inputs import check_computed
from ..metrics.quantities import LogOdds, Quantity, check_labels, make_quantity
from ..models.files import read_json
from ..models.freezing import frozen
from ..models.protocols import Classifier
from ..showing import one_line
from .head import COARSE, Head
from .taps import choose_taps, resolve_taps, tapped

FORMAT, VERSION = "counterlens-adapter", 4
WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"


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
    coarse = [i for i in order if COARSE * features[i].shape[2] <= image_size]
    order = coarse or order  # finer maps than what is drawn bring little and cost most
    names, features = [names[i] for i in order], [features[i] for i in order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head([f.shape[1] for f in features], explained.conditions, width)
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
        channels = list(description["channels"])
        size, width = (int(description[k]) for k in ("image_size", "width"))
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
    head = Head(channels, explained.conditions, width)
    try:
        head.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise CounterlensError(f"{weights}: {str(error).splitlines()[0]}") from error
    parameter = next(classifier.module.parameters(), torch.empty(0))
    head.to(parameter.device).eval().requires_grad_(False)
    return LAX(classifier, head, taps, explained, size, width, training)
