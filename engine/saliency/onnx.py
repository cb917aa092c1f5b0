"""A LAX adapter, or a classifier's perturbation curve, as one ONNX file: frozen model and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterlens.export import export_onnx
from counterlens.export.store import Artefact, Store, sources_digest, weights_digest
from counterlens.export.versions import OPSET
from counterlens.kernels.perturb.reference import perturb

from ..metrics.msi_score import threshold_grid
from ..metrics.quantities import LogOdds, Quantity, make_quantity
from ..models.freezing import frozen
from ..models.protocols import Classifier
from ..runtime import onnxruntime
from ..runtime.fingerprint import fingerprint
from ..runtime.forward import compare, require_onnx
from ..runtime.onnxruntime import FILE
from ..runtime.spec import code_version
from .lax import LAX
from .taps import tapped


def logistic(x: Tensor) -> Tensor:
    """A sigmoid whose small values keep their digits; ONNX Runtime's own is right to about 1e-7, not relatively."""
    return torch.reciprocal(1 + torch.exp(-x))


def saliency_function(adapter: LAX) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """image [B, 3, H, W] and target [B] int64 to (saliency [B, H, W], scores [B, H, W], logits [B, C])."""

    def lax(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with tapped(adapter.classifier.module, adapter.taps) as features:
            logits = adapter.classifier.logits(image)
        scores = adapter.head(image, list(features), adapter.quantity.condition(target))
        return logistic(scores), scores, logits

    return lax


def curve_function(
    classifier: Classifier, thresholds: Tensor, quantity: Quantity
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """image and baseline [B, 3, H, W], saliency [B, H, W] in [0, 1], target [B] to Ins and Del: [B, 2, K].

    Maps are compared as they are (`normalize="none"`); saliency >= threshold is marked.
    """
    k = len(thresholds)
    levels = thresholds.float()

    def curve(image: Tensor, baseline: Tensor, saliency: Tensor, target: Tensor) -> Tensor:
        b = image.shape[0]
        mixed = perturb(image, baseline, saliency, levels.expand(b, k), [], [], True, True)  # [B, 2, K, 3, H, W]
        logits = classifier.logits(mixed.reshape(b * 2 * k, *image.shape[1:]))
        odds = quantity.log_odds(logits, target[:, None].expand(b, 2 * k).reshape(-1))
        return logistic(odds).reshape(b, 2, k)

    return curve


def export_adapter(adapter: LAX, path: str | Path) -> Path:
    """Write `saliency_function` with an open batch; inputs image, target, outputs saliency, scores, logits.

    Raises:
        ExportError: the classifier holds an operation that has no ONNX form.
    """
    size = adapter.image_size
    inputs = [torch.rand(2, 3, size, size), torch.zeros(2, dtype=torch.long)]
    with frozen(adapter.classifier.module, adapter.head), torch.no_grad():
        return export_onnx(
            saliency_function(adapter), inputs, path, input_names=["image", "target"],
            output_names=["saliency", "scores", "logits"],
        )  # fmt: skip


def export_curve(
    classifier: Classifier,
    image_size: int,
    path: str | Path,
    *,
    alpha_min: float = 0.5,
    steps: int = 16,
    quantity: str | LogOdds | Quantity = "class",
) -> Path:
    """Write `curve_function` on MSI's thresholds with an open batch; the output `values` is [B, 2, K], Ins then Del.

    Raises:
        UsageError: a number is out of range. ExportError: an operation has no ONNX form.
    """
    function = curve_function(classifier, threshold_grid(alpha_min, steps), make_quantity(classifier, quantity))
    image = torch.rand(2, 3, image_size, image_size)
    inputs = [image, torch.zeros_like(image), torch.rand(2, image_size, image_size), torch.zeros(2, dtype=torch.long)]
    with frozen(classifier.module), torch.no_grad():
        return export_onnx(
            function, inputs, path, input_names=["image", "baseline", "saliency", "target"], output_names=["values"]
        )


def build_artefacts(
    adapter: LAX, store: Store, *, alpha_min: float = 0.5, steps: int = 16, force: bool = False
) -> dict[str, Artefact]:
    """An adapter (`adapter`) and the curve of its classifier and quantity (`curve`) in a store, checked against eager.

    Args:
        adapter: trained.
        store: where the artefacts are found again by model, weights and code.
        alpha_min, steps: MSI's thresholds.
        force: build again.

    Raises:
        UsageError: a number is out of range. ExportError: it cannot be exported, or ONNX Runtime does not agree.
    """
    require_onnx(adapter.classifier.module)
    classifier, size, levels = adapter.classifier, adapter.image_size, threshold_grid(alpha_min, steps)
    key = {
        "target": "onnx", "opset": OPSET, "code": [code_version(), sources_digest([Path(__file__).parent])[:16]],
        "weights": weights_digest([classifier.module]), "quantity": adapter.quantity.name, "image": size,
        "models": fingerprint(classifier, adapter.head, adapter.quantity, hashed=[classifier.module, adapter.head]),
    }  # fmt: skip
    g = torch.Generator().manual_seed(0)
    image, target = torch.rand((3, 3, size, size), generator=g), torch.arange(3) % len(classifier.labels)
    given = [image, target]
    asked = [image, torch.full_like(image, 0.4), torch.rand((3, size, size), generator=g), target]
    heads = weights_digest([adapter.head])

    def build_adapter(folder: Path) -> dict[str, Any]:
        path = export_adapter(adapter, folder / FILE)
        return {
            "what": "adapter",
            "parity": compare("adapter", saliency_function(adapter), onnxruntime.load(path), given),
        }

    def build_curve(folder: Path) -> dict[str, Any]:
        path = export_curve(
            classifier, size, folder / FILE, alpha_min=alpha_min, steps=steps, quantity=adapter.quantity
        )
        function = curve_function(classifier, levels, adapter.quantity)
        return {"what": "curve", "parity": compare("curve", function, onnxruntime.load(path), asked)}

    with frozen(classifier.module, adapter.head):
        return {
            "adapter": store.get(
                key | {"what": "adapter", "adapter": heads, "taps": adapter.taps}, build_adapter, force=force
            ),
            "curve": store.get(key | {"what": "curve", "levels": levels.tolist()}, build_curve, force=force),
        }
