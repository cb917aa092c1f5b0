"""A classifier's forward pass through ONNX Runtime: a perturbation metric is thousands of them and no gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from counterlens.export.errors import ExportError
from counterlens.export.store import Store, weights_digest
from counterlens.export.versions import OPSET

from ..blackbox.box import as_box
from ..errors import UsageError
from ..models.freezing import frozen
from ..models.protocols import Classifier, SigmoidClassifier, SoftmaxClassifier
from . import onnxruntime
from .artefacts import CPU
from .fingerprint import fingerprint
from .parity import TOLERANCE
from .record import read_record, write_record
from .spec import code_version

FORWARD = ("eager", "onnxruntime")


class CompiledForward(nn.Module):
    """An ONNX file as a module from images [B, 3, size, size] to logits; it has no parameters and no gradients."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__()
        self.size = size
        self.run = onnxruntime.load(path)

    def forward(
        self,
        image: Tensor,  # [B, 3, size, size] float32 on the CPU
    ) -> Tensor:
        if image.ndim != 4 or image.shape[1:] != (3, self.size, self.size):
            raise UsageError(f"images: expected [B, 3, {self.size}, {self.size}], got {list(image.shape)}")
        if image.dtype != torch.float32 or image.device.type != "cpu":
            raise UsageError(f"images: expected float32 on the CPU, got {image.dtype} on {image.device}")
        if image.requires_grad and torch.is_grad_enabled():
            raise UsageError("images: no gradient goes through a compiled forward pass; use the classifier itself")
        return self.run(image)[0]


def compile_classifier(
    classifier: Classifier, image_size: int, *, store: Store | None = None, images: Tensor | None = None
) -> Classifier:
    """The same classifier with its logits computed by ONNX Runtime: faster on a CPU, and without gradients.

    Built once into the store (seconds), and compared with eager once on each machine; a batch of any size goes through
    it. Its weights are those of now.

    Args:
        classifier: float32, on the CPU; left as it was.
        image_size: side in pixels of its images.
        store: the user's without it.
        images: [N, 3, H, W] in [0, 1], real ones to compare on; random ones without them.

    Raises:
        ExportError: onnx or ONNX Runtime is missing or does not agree, the model is elsewhere than on the CPU or not in
            float32, or holds an operation that has no ONNX form.
    """
    module = classifier.module
    require_onnx(module)
    from counterlens.export.onnx import export_onnx

    key = {
        "what": "forward", "target": "onnx", "opset": OPSET, "code": code_version(), "image": image_size,
        "weights": weights_digest([module]), "models": fingerprint(classifier, hashed=[module]),
    }  # fmt: skip
    asked = torch.rand((3, 3, image_size, image_size), generator=torch.Generator().manual_seed(0))
    real = images is not None
    if images is not None:
        asked = torch.cat([asked, images[:3].to(asked)])
    fresh: list[dict[str, Any]] = []

    def build(folder: Path) -> dict[str, Any]:
        path = folder / onnxruntime.FILE
        export_onnx(classifier.logits, [asked[:2]], path, input_names=["image"], output_names=["logits"])
        fresh.append(compare("classifier", classifier.logits, onnxruntime.load(path), [asked]))
        return {"what": "forward", "parity": fresh[0]}

    with frozen(module), torch.no_grad():
        artefact = (store or Store()).get(key, build)
        compiled = CompiledForward(artefact.file(onnxruntime.FILE), image_size)
        if fresh or read_record(artefact, CPU, real=real) is None:
            agreed = fresh[0] if fresh else compare("classifier", classifier.logits, compiled.run, [asked])
            write_record(artefact, CPU, real=real, parity=agreed)
    kind = SoftmaxClassifier if classifier.link == "softmax" else SigmoidClassifier
    return kind(compiled, classifier.labels)


def require_onnx(module: nn.Module) -> None:
    """ExportError where a module cannot become an ONNX file for the CPU here."""
    if reasons := onnxruntime.RUNTIME.missing(CPU):
        raise ExportError(f"onnxruntime: {'; '.join(reasons)}")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ExportError(
                f"onnxruntime: {name} is {tensor.dtype} on {tensor.device}; the classifier has to be in float32 on the "
                "CPU for that: move it (device cpu)"
            )


def forward_by(runtime: str, classifier: Classifier, image_size: int, images: Tensor | None = None) -> Classifier:
    """The classifier itself (`eager`), or compiled (`onnxruntime`) and compared on real images where they are given.

    Raises:
        UsageError: there is no such runtime. ExportError: see `compile_classifier`.
    """
    if runtime not in FORWARD:
        raise UsageError(f"runtime: expected {' or '.join(FORWARD)} for forward passes, got {runtime!r}")
    if runtime != "eager" and (box := as_box(classifier)) is not None:
        raise UsageError(f"runtime: {box.name} can only be called, and is not compiled; leave --runtime out")
    return classifier if runtime == "eager" else compile_classifier(classifier, image_size, images=images)


@torch.no_grad()
def compare(
    what: str, function: Callable[..., Any], run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> dict[str, Any]:
    """Worst error of an opened ONNX file at a batch that was not traced; ExportError above fp32's tolerance.

    Relative to a sample's largest magnitude where that is above 1: tiny probabilities stay what they are.
    """
    result = function(*inputs)
    expected = result if isinstance(result, tuple) else (result,)
    worst = max(
        ((a - b).abs().flatten(1).amax(1) / b.abs().flatten(1).amax(1).clamp(min=1)).max().item()
        for a, b in zip(run(*inputs), expected, strict=True)
    )
    if not worst <= TOLERANCE["fp32"]:  # so that NaN fails
        raise ExportError(
            f"the compiled {what} does not agree with eager: error {worst:.2g} (at most "
            f"{TOLERANCE['fp32']:g}); not used"
        )
    return {"samples": len(inputs[0]), "tolerance": TOLERANCE["fp32"], "worst": worst}
