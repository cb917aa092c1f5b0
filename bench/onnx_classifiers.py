"""ONNX classifiers opened as differentiable modules: `python -m bench.onnx_classifiers --record`.

Architectures of transformers with random weights, exported by torch's own two exporters, opened again from the file
alone, and compared with the modules that they were: scores, and gradients of a random sum of the logits.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.coverage_architectures import ENTRIES
from bench.record import say, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.errors import CounterlensError
from counterlens.engine.models.onnx_classifier import conversion_of, natural_images, open_onnx_classifier
from counterlens.engine.models.onnx_operators import NoGradient
from counterlens.engine.packs import Pack

ASKED = ("ResNet", "ViT", "EfficientNet", "ConvNeXt", "MobileNetV2")
MORE = ("Swin", "DeiT", "RegNet", "MobileViT", "BiT")  # BiT: a ResNet with group norms and "same" padding
EXPORTERS = ("dynamo", "torchscript")
EXACT = 1e-4  # of a gradient, relative to its largest entry
BATCH = 3


def export(module: nn.Module, example: Tensor, path: Path, exporter: str, *, fixed: bool = False, **more: Any) -> Path:
    """Write a module by one of torch's exporters, with an open batch."""
    names = {"input_names": ["pixels"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            shapes = None if fixed else ({0: torch.export.Dim("batch")},)
            torch.onnx.export(
                module, (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False,
                **names, **more,
            )  # fmt: skip
        else:
            axes = None if fixed else {"pixels": {0: "batch"}, "logits": {0: "batch"}}
            torch.onnx.export(module, (example,), path, dynamo=False, dynamic_axes=axes, **names, **more)
    return path


def gradient(logits: Callable[[Tensor], Tensor], images: Tensor, weights: Tensor) -> Tensor:
    """Of a weighted sum of the logits, with respect to the images."""
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad((logits(leaf) @ weights).sum(), leaf)[0]


def measure(name: str, module: nn.Module, size: int, exporter: str, folder: Path, **more: Any) -> dict[str, Any]:
    """One row: whether a module's file converts, and how far its scores and gradients are from the module's."""
    row: dict[str, Any] = {"architecture": name, "exporter": exporter, "converted": False, "reason": ""}
    images = natural_images(size, BATCH)
    path = folder / f"{name}-{exporter}.onnx"
    try:
        export(module, images[:2], path, exporter, **more)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        return row | {"reason": f"torch does not export it: {' '.join(str(error).split())[:160]}"}
    start = time.perf_counter()
    with torch.no_grad():
        expected = module(images)
    labels = [f"label {i}" for i in range(expected.shape[1])]
    try:
        classifier = open_onnx_classifier(path, image_size=size, labels=labels, images=images)
    except NoGradient as error:
        return row | {"reason": "; ".join(error.reasons)}
    found = conversion_of(classifier)
    assert found is not None
    weights = torch.randn(len(labels), generator=torch.Generator().manual_seed(0))
    ours, theirs = (gradient(f, images, weights) for f in (classifier.logits, module))
    with torch.no_grad():
        logits = classifier.logits(images)
    return row | {
        "converted": True,
        "logits": ((logits - expected).abs().max() / expected.abs().max()).item(),
        "gradient": ((ours - theirs).abs().max() / theirs.abs().max()).item(),
        "forward_onnxruntime": found.forward,
        "slope_onnxruntime": found.gradient,
        "seconds": round(time.perf_counter() - start, 2),
        "operators": found.operators,
        "assumed": list(found.assumed),
    }


def digits(folder: Path, count: int) -> dict[str, Any]:
    """Whole counterfactuals of the pack's `clean`, through its ONNX file and as it is."""
    images = Pack("digits").samples("test", count=count).images
    path = export(Pack("digits").classifier("clean").module, images[:2], folder / "clean.onnx", "dynamo")
    config = Config(speed="fast")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_file = Engine.from_pretrained("digits", path, config).counterfactual(images)
    as_it_is = Engine.from_pack("digits", "clean", config).counterfactual(images)
    pairs = list(zip(by_file, as_it_is, strict=True))
    return {
        "images": count,
        "speed": "fast",
        "flips": sum(a.flipped for a, _ in pairs) / count,
        "flips_equal": sum(a.flipped == b.flipped for a, b in pairs) / count,
        "within_1e-4": sum(bool((a.image - b.image).abs().max() <= 1e-4) for a, b in pairs) / count,
        "worst": max((a.image - b.image).abs().max().item() for a, b in pairs),
    }


class Bytes(nn.Module):
    """A model that takes 8-bit pixels, as many in production do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float() / 255)


class Choice(nn.Module):
    """A model that says the label alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).argmax(dim=1, keepdim=True).float()


def refusals(folder: Path) -> list[dict[str, str]]:
    """What stays a black box, and the reason that is said."""
    entry = next(e for e in ENTRIES if e.name == "ResNet")
    module: Any = entry.make()
    x = natural_images(32, 2)
    made = {
        "8-bit pixels": export(Bytes(module), (x * 255).byte(), folder / "bytes.onnx", "dynamo"),
        "the label alone": export(Choice(module), x, folder / "choice.onnx", "dynamo"),
        "quantised (QDQ)": _quantised(export(module, x, folder / "plain.onnx", "dynamo"), folder / "qdq.onnx"),
    }
    rows = []
    for what, path in made.items():
        try:
            open_onnx_classifier(path, image_size=32, labels=["a", "b"])
            said = "converted"
        except CounterlensError as error:
            said = "; ".join(error.reasons) if isinstance(error, NoGradient) else f"{error}"
        rows.append({"model": what, "said": said})
    return rows


def _quantised(path: Path, to: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"pixels": natural_images(32, 4).numpy()}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    logging.disable(logging.WARNING)
    quantize_static(path, to, Reader())
    logging.disable(logging.NOTSET)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write bench/results/onnx-classifiers.json")
    parser.add_argument("--all", action="store_true", help="all 41 architectures instead of ten")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--exporters", default=",".join(EXPORTERS))
    options = parser.parse_args()
    names = options.only.split(",") if options.only else None if options.all else [*ASKED, *MORE]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for entry in ENTRIES:
            if names is not None and entry.name not in names:
                continue
            size = entry.inputs(1)[0].shape[-1]
            for exporter in options.exporters.split(","):
                torch.manual_seed(0)
                module: Any = entry.make()
                row = measure(entry.name, module, size, exporter, Path(folder))
                rows.append(row)
                said = f"gradient {row['gradient']:.1e}" if row["converted"] else f"black box: {row['reason']}"
                say(f"{entry.name:22} {exporter:12} {said}")
        whole = names is None or set(ASKED) <= set(names)
        refused = refusals(Path(folder)) if whole else []
        through = digits(Path(folder), 32) if whole else {}
    for refusal in refused:
        say(f"{refusal['model']:35} {refusal['said']}")
    for name, value in through.items():
        say(f"digits through clean.onnx: {name} {value}")
    met = {r["architecture"] for r in rows if r["exporter"] == "dynamo" and r.get("gradient", 1) <= EXACT}
    say(f"{len(met & set(ASKED))} of {len(ASKED)} asked for, and {len(met)} of all, convert within {EXACT:g}")
    if options.record:
        payload = {"tolerance": EXACT, "asked": list(ASKED), "rows": rows, "refused": refused, "digits": through}
        write_result("onnx-classifiers", payload)


if __name__ == "__main__":
    main()
