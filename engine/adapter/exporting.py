"""A LAX adapter, or a classifier's perturbation curve, as one ONNX file: frozen model and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from counterlens.export import export_onnx
from counterlens.kernels.perturb.reference import perturb

from ..guidance.pullback import frozen
from ..metrics.msi_score import threshold_grid
from ..models.protocols import Classifier
from .lax import LAX
from .quantities import LogOdds, Quantity, make_quantity
from .taps import tapped


def saliency_function(adapter: LAX) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """image [B, 3, H, W] and target [B] int64 to (saliency [B, H, W], scores [B, H, W], logits [B, C])."""

    def lax(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with tapped(adapter.classifier.module, adapter.taps) as features:
            logits = adapter.classifier.logits(image)
        scores = adapter.head(image, list(features), adapter.quantity.condition(target))
        return torch.sigmoid(scores), scores, logits

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
        return quantity(logits, target[:, None].expand(b, 2 * k).reshape(-1)).reshape(b, 2, k)

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
