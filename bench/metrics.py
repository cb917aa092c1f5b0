"""Perturbation metrics: speed against Quantus and a plain loop, cost of perturbing, constructed cases.

`python -m bench.metrics --record` writes bench/results/metrics.json. Ratios are of runs side by side, in one process,
with the same classifier, the same masks and the same number of forwards: on a CPU the forwards are nearly all of it.
What compiling the classifier (ONNX Runtime) adds is recorded apart.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench.record import in_turns, keep_memory, timed, write_result
from counterlens.engine.metrics import deletion, gradient_maps, insertion, msi
from counterlens.engine.packs import Pack
from counterlens.engine.runtime import onnxruntime
from counterlens.engine.runtime.forward import compile_classifier

BATCHES = (1, 7, 64)
CASES = ((1, 1, 1), (1, 16, 5), (16, 64, 3))  # images, features in a step, rounds


def median_seconds(
    functions: dict[str, Callable[[], Tensor]], rounds: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median wall time of each function, taken in turns so that a busy moment hits all of them, and their results."""
    results = {name: fn() for name, fn in functions.items()}
    times = in_turns(functions, rounds, warm=0)
    return {name: statistics.median_low(t) for name, t in times.items()}, results


@torch.no_grad()
def plain_loop(module: nn.Module, images: Tensor, saliency: Tensor, targets: Tensor, per_step: int) -> Tensor:
    """Pixel flipping as one would write it: one image, one step, one forward at a time: [N, K]."""
    order = (-saliency.flatten(1)).argsort(dim=1, stable=True)
    rows = []
    for image, ranks, target in zip(images, order, targets, strict=True):
        flat, black, curve = image.flatten().clone(), image.min(), []
        for start in range(0, flat.numel(), per_step):
            flat[ranks[start : start + per_step]] = black
            p = torch.softmax(module(flat.view(1, *image.shape)), 1)
            curve.append(p[0, target].item())
        rows.append(curve)
    return torch.tensor(rows)


def quantus_flipping(module: nn.Module, images: Tensor, saliency: Tensor, targets: Tensor, per_step: int) -> Any:
    """Quantus' own PixelFlipping, or the reason why it cannot run here."""
    try:
        import quantus
    except ImportError as error:
        return f"not measured: quantus cannot be imported ({error}); pip install '.[comparisons]'"
    metric = quantus.PixelFlipping(features_in_step=per_step, disable_warnings=True, display_progressbar=False)
    device = str(images.device)
    arrays = {"x_batch": images, "y_batch": targets, "a_batch": saliency}
    numbers = {name: x.cpu().numpy() for name, x in arrays.items()}

    def measure() -> Tensor:
        return torch.tensor(metric(model=module, **numbers, softmax=True, channel_first=True, device=device))

    return measure


def speed(pack: Pack, count: int, per_step: int, rounds: int, device: str, batch_size: int) -> dict[str, Any]:
    """Pixel flipping on the digits classifier: ours, Quantus' and a plain loop, with how well they agree."""
    classifier = pack.classifier("clean")
    module = classifier.module.to(device)
    images = pack.samples("test", count=count, marker="random").images.to(device)
    g = torch.Generator().manual_seed(0)
    maps = gradient_maps(classifier, images)[:, None]
    # Channels differ a little, since Quantus' sort is not stable.
    saliency = maps + 0.01 * maps.max() * torch.rand(images.shape, generator=g).to(device)
    targets = classifier.logits(images).argmax(1)

    def ours(forward: Any) -> Tensor:
        result = deletion(
            forward, images, saliency, targets, compat="quantus", per_step=per_step, batch_size=batch_size
        )  # fmt: skip
        return result.values

    functions: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(module),
        "plain loop": lambda: plain_loop(module, images, saliency, targets, per_step),
    }
    without = onnxruntime.RUNTIME.missing(torch.device("cpu")) if device == "cpu" else ["measured on a CPU only"]
    if not without:
        compiled = compile_classifier(classifier, images.shape[2])
        functions["ours, onnxruntime"] = lambda: ours(compiled)
    quantus = quantus_flipping(module, images, saliency, targets, per_step)
    if not isinstance(quantus, str):
        functions["quantus"] = quantus
    seconds, values = median_seconds(functions, rounds)
    mine = values.pop("ours")
    return {
        "images": count,
        "steps": mine.shape[1],
        "batch_size": batch_size,
        "seconds": seconds,
        "times_plain": seconds["plain loop"] / seconds["ours"],
        "times_quantus": quantus if isinstance(quantus, str) else seconds["quantus"] / seconds["ours"],
        "compiled_times": without
        or {
            name: seconds[name] / seconds["ours, onnxruntime"]
            for name in ("ours", "plain loop", "quantus")
            if name in seconds
        },
        "largest_difference": {name: (v - mine).abs().max().item() for name, v in values.items()},
    }


def perturbation_share(device: str, count: int = 2, steps: int = 4) -> dict[str, Any]:
    """MSI with a ResNet-50 (random weights) at 224x224: time of everything but the forwards, as a share of them."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    network = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval().to(device)
    images = torch.rand(count, 3, 224, 224, device=device)
    saliency = nn.functional.avg_pool2d(torch.rand(count, 1, 256, 256), 33, 1)[:, 0].to(device)
    forwards = 0

    def free(x: Tensor) -> Tensor:
        nonlocal forwards
        forwards += len(x)
        return x.new_zeros(len(x), 1000)

    def run(model: Callable[[Tensor], Any], batch_size: int = 16) -> float:
        return timed(lambda: msi(model, images, saliency, 0, steps=steps, batch_size=batch_size))

    run(free)
    forwards = 0
    whole, without = run(network), sorted(run(free) for _ in range(5))[2]
    return {
        "images": count,
        "forwards": forwards // 5,
        "seconds": {"whole": whole, "perturbing": without},
        "share_of_forwards": without / (whole - without),
    }


def batch_invariance() -> dict[str, float]:
    """Largest difference of MSI on the digits between forward batches 1, 7 and 64."""
    pack = Pack("digits")
    classifier = pack.classifier("clean")
    images = pack.samples("test", count=8, marker="random").images
    maps = gradient_maps(classifier, images, sigma=2)
    results = [msi(classifier, images, maps, steps=8, baseline=pack.mean_colour, batch_size=b) for b in BATCHES]
    return {
        name: max((getattr(r, name) - getattr(results[0], name)).abs().max().item() for r in results[1:])
        for name in ("score", "base_score_area")
    }


class Needs(nn.Module):
    """Class 1 where any of the given sets of pixels is wholly bright."""

    def __init__(self, *sets: Tensor) -> None:
        super().__init__()
        self.sets = sets  # each [H, W] bool

    def forward(self, image: Tensor) -> Tensor:
        bright = image.amin(1) > 0.5
        found = torch.stack([bright[:, s].all(1) for s in self.sets]).any(0).to(image.dtype)
        return torch.stack([-40 * found + 20, 40 * found - 20], 1)


def constructed_cases() -> dict[str, dict[str, float]]:
    """MSI, insertion and deletion of maps of which the order is known; bright 16x16 images on a black baseline.

    One region is enough and needed: a tight map should beat one that marks the region's surroundings as well. Two
    regions are each enough: marking both should be at least as good as one, and one better than neither.
    """
    image = torch.ones(1, 3, 16, 16)
    first, second, nowhere = (torch.zeros(16, 16, dtype=torch.bool) for _ in range(3))
    first[2:5, 2:5], second[10:13, 10:13], nowhere[2:5, 10:13] = True, True, True
    wide = torch.zeros(16, 16)
    wide[0:9, 0:9] = 0.7
    wide[first] = 1.0
    one, two = Needs(first), Needs(first, second)
    cases = {
        "tight": (one, first.float()),
        "oversized": (one, wide),
        "both of two": (two, (first | second).float()),
        "one of two": (two, first.float()),
        "irrelevant": (two, nowhere.float()),
    }
    out = {}
    for name, (model, saliency) in cases.items():
        # Ties are everywhere in such maps: over 20 permutations of them.
        images, maps, seeds = image.expand(20, -1, -1, -1), saliency.expand(20, -1, -1), list(range(20))
        scores = {
            "msi": msi(model, images, maps, 1, baseline="zero", seeds=seeds).score,
            "insertion": insertion(model, images, maps, 1, baseline="zero", per_step=1, seeds=seeds).score,
            "deletion": deletion(model, images, maps, 1, baseline="zero", per_step=1, seeds=seeds).score,
        }
        out[name] = {metric: values.mean().item() for metric, values in scores.items()}
    return out


def main(
    record: Annotated[bool, typer.Option(help="Write bench/results/metrics.json, on a GPU metrics-cuda.json.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images in a forward of ours, for the digits.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Measure the perturbation metrics.

    Example: python -m bench.metrics --record
    """
    keep_memory()
    pack = Pack("digits")
    result = {
        "device": device,
        "quantus": version("quantus") if find_spec("quantus") else "not installed",
        "constructed": constructed_cases(),
        "batch_invariance": batch_invariance(),
        "speed": [speed(pack, *case, device, batch_size) for case in CASES],
        "resnet50": perturbation_share(device),
    }
    print(json.dumps(result, indent=1))
    if record:
        print(write_result("metrics" if device == "cpu" else f"metrics-{device}", result))


if __name__ == "__main__":
    typer.run(main)
