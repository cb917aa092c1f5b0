"""Perturbation metrics: speed against Quantus and a plain loop, cost of perturbing, constructed cases.

`field` holds the field's other metrics beside Quantus: the same images, maps, masks and passes, values compared.

`python -m bench.metrics --record` writes bench/results/metrics.json. Ratios are of runs side by side, in one process,
with the same classifier, the same masks and the same number of forwards: on a CPU the forwards are nearly all of it. A
ratio is the median over rounds of what both took in that round, so that other work on the machine hits both.
What compiling the classifier (ONNX Runtime) adds is recorded apart.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench.record import in_turns, keep_memory, timed, write_result
from counterlens.engine import metrics
from counterlens.engine.metrics import deletion, faithfulness, gradient_maps, insertion, msi
from counterlens.engine.packs import Pack
from counterlens.engine.runtime import onnxruntime
from counterlens.engine.runtime.forward import compile_classifier

BATCHES = (1, 7, 64)
CASES = ((1, 1, 1), (1, 16, 5), (16, 64, 3))  # images, features in a step, rounds


@dataclass(frozen=True)
class Times:
    """Wall times of functions that were called in turns, and what they returned."""

    seconds: dict[str, list[float]]
    results: dict[str, Tensor]

    @property
    def median(self) -> dict[str, float]:
        """Of each function."""
        return {name: statistics.median_low(times) for name, times in self.seconds.items()}

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long the one takes: the median over rounds, in each of which both saw the same load."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)


def measured(functions: dict[str, Callable[[], Tensor]], rounds: int) -> Times:
    """Call each function once, and then in turns: `rounds` times, or more often until they took half a second."""
    results, once = {}, 0.0
    for name, fn in functions.items():
        results[name] = fn()
        once += timed(fn)
    return Times(in_turns(functions, max(rounds, min(25, round(0.5 / once))), warm=0), results)


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
    times = measured(functions, rounds)
    values = dict(times.results)
    mine = values.pop("ours")
    return {
        "images": count,
        "steps": mine.shape[1],
        "batch_size": batch_size,
        "seconds": times.median,
        "times_plain": times.ratio("plain loop", "ours"),
        "times_quantus": quantus if isinstance(quantus, str) else times.ratio("quantus", "ours"),
        "compiled_times": without
        or {
            name: times.ratio(name, "ours, onnxruntime")
            for name in ("ours", "plain loop", "quantus")
            if name in functions
        },
        "largest_difference": {name: (v - mine).abs().max().item() for name, v in values.items()},
    }


def resnet_flipping(device: str, count: int, steps: int, side: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Pixel flipping of a ResNet-50 (random weights), ours and Quantus': the size at which a GPU is worth it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = ResNetForImageClassification(ResNetConfig(num_labels=1000))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.network(x).logits
            return out

    torch.manual_seed(0)
    module = Logits().eval().requires_grad_(False).to(device)
    images = torch.rand(count, 3, side, side, device=device)
    saliency, targets = torch.rand(images.shape, device=device), torch.arange(count, device=device)
    per_step = images[0].numel() // steps

    def ours() -> Tensor:
        return deletion(
            module, images, saliency, targets, compat="quantus", per_step=per_step, batch_size=batch_size
        ).values

    functions: dict[str, Callable[[], Tensor]] = {"ours": ours}
    quantus = quantus_flipping(module, images, saliency, targets, per_step)
    if not isinstance(quantus, str):
        functions["quantus"] = quantus
    times = measured(functions, rounds)
    values, found = times.results, "quantus" in functions
    return {
        "images": count, "steps": steps, "side": side, "batch_size": batch_size, "seconds": times.median,
        "times_quantus": times.ratio("quantus", "ours") if found else quantus,
        "largest_difference": (values["quantus"].cpu() - values["ours"].cpu()).abs().max().item() if found else None,
    }  # fmt: skip


def field_speed(pack: Pack, count: int, rounds: int, device: str) -> dict[str, Any] | str:
    """Each metric of the field on the digits classifier: ours and Quantus', seconds, ratio, largest difference."""
    if find_spec("quantus") is None:
        return "not measured: quantus is not installed; pip install '.[comparisons]'"
    import numpy as np
    import quantus

    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # type: ignore[attr-defined]  # Quantus 0.6 asks for the name that NumPy dropped
    module = pack.classifier("clean").module.to(device)
    images = pack.samples("test", count=count, marker="matching").images.to(device)
    g = torch.Generator().manual_seed(0)
    maps = (torch.rand(images.shape, generator=g) - 0.3).to(device)
    inside = torch.zeros(count, 32, 32, dtype=torch.bool)
    inside[:, 4:20, 8:24] = True
    with torch.no_grad():
        target = module(images).argmax(1)

    def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(model(x).gather(1, y[:, None]).sum(), x)[0]

    def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> Any:
        x = torch.tensor(inputs, dtype=torch.float32, device=device)
        return gradients(model, x, torch.tensor(targets, device=device)).cpu().numpy()

    own, one = gradients(module, images, target), maps[:, 0]
    quiet = {"disable_warnings": True, "display_progressbar": False}
    black = {"baseline": faithfulness.darkest(images)}
    arrays = {"x_batch": images.cpu().numpy(), "y_batch": target.cpu().numpy(), "channel_first": True, "softmax": True}

    def theirs(metric: Any, given: Tensor = maps, **more: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            numbers = given.cpu().numpy().copy()
            return torch.tensor(np.asarray(metric(model=module, a_batch=numbers, device=device, **arrays, **more)))

        return run

    def ours(function: Any, given: Tensor = maps, **options: Any) -> Callable[[], Tensor]:
        return lambda: function(module, images, given, target, batch_size=count, **black, **options)

    masked = {"s_batch": inside[:, None].numpy()}
    perturbing = {"explain_func": explain}
    unit = maps / maps.abs().max()
    noise = torch.rand(10, *images.shape, generator=g).to(device) * 0.1 - 0.05
    q, m = quantus, metrics
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], bool]] = {  # the last: are values the same?
        "faithfulness_correlation": (ours(m.faithfulness_correlation, subset_size=224, runs=100, channels="apart"),
            theirs(q.FaithfulnessCorrelation(abs=False, return_aggregate=False, **quiet)), False),
        "faithfulness_estimate": (ours(m.faithfulness_estimate, per_step=32, channels="apart"),
            theirs(q.FaithfulnessEstimate(features_in_step=32, abs=False, **quiet)), True),
        "region_perturbation": (lambda: ours(m.region_perturbation, patch=4, regions=64)().score,  # type: ignore[attr-defined]
            lambda: theirs(q.RegionPerturbation(patch_size=4, regions_evaluation=64, **quiet))().mean(1), True),
        "infidelity": (ours(m.infidelity, patches=(4,), cumulative=True),
            theirs(q.Infidelity(perturb_patch_sizes=[4], n_perturb_samples=1, **quiet)), True),
        "sparseness": (lambda: m.sparseness(unit), theirs(q.Sparseness(**quiet)), True),
        "complexity": (lambda: m.complexity(maps), theirs(q.Complexity(**quiet)), True),
        "effective_complexity": (lambda: m.effective_complexity(unit, 0.3),
            theirs(q.EffectiveComplexity(eps=0.3, **quiet)), True),
        "pointing_game": (lambda: m.pointing_game(one, inside),
            theirs(q.PointingGame(**quiet), maps[:, :1], **masked), True),
        "relevance_mass": (lambda: m.relevance_mass(one.abs(), inside),
            theirs(q.RelevanceMassAccuracy(abs=True, **quiet), maps[:, :1], **masked), True),
        "relevance_rank": (lambda: m.relevance_rank(one, inside),
            theirs(q.RelevanceRankAccuracy(**quiet), maps[:, :1], **masked), True),
        "mask_auc": (lambda: m.mask_auc(one, inside), theirs(q.AUC(**quiet), maps[:, :1], **masked), True),
        "top_k_intersection": (lambda: m.top_k_intersection(one, inside, 100),
            theirs(q.TopKIntersection(k=100, **quiet), maps[:, :1], **masked), True),
        "max_sensitivity": (
            lambda: m.sensitivity(lambda x, y: gradients(module, x, y), images, own, target, noise=noise).maximum,
            theirs(q.MaxSensitivity(nr_samples=10, lower_bound=0.05, **quiet), own, **perturbing), False),
        "mprt": (lambda: m.mprt(gradients, module, images, own, target).last,
            theirs(q.MPRT(return_last_correlation=True, abs=False, normalise=False, **quiet), own, **perturbing), True),
    }  # fmt: skip
    out: dict[str, Any] = {}
    for name, (mine, other, same) in pairs.items():
        times = measured({"ours": mine, "quantus": other}, rounds)
        values = times.results
        difference = (values["ours"].double().cpu() - values["quantus"].double()).abs()
        scale = values["quantus"].double().abs().clamp(min=1)
        out[name] = {
            "seconds": times.median,
            "times_quantus": times.ratio("quantus", "ours"),
            "largest_difference": (difference / scale).max().item() if same else "drawn otherwise: see the tests",
        }
    ratios = [row["times_quantus"] for row in out.values()]
    return {"images": count, "metrics": out, "geometric_mean": statistics.geometric_mean(ratios)}


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
    forwards, rounds = 0, 3
    # In turns, and the share of each round: a load that comes and goes changes both.
    times = [(run(network), sorted(run(free) for _ in range(3))[1]) for _ in range(rounds)]
    whole, without = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "images": count,
        "forwards": forwards // (3 * rounds),
        "seconds": {"whole": whole, "perturbing": without},
        "share_of_forwards": statistics.median(b / (a - b) for a, b in times),
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
    dry_run: Annotated[bool, typer.Option(help="The part for GPUs at a tiny size, nothing recorded.")] = False,
) -> None:
    """Measure the perturbation metrics.

    Example: python -m bench.metrics --record
    """
    keep_memory()
    if dry_run:
        print(json.dumps(resnet_flipping(device, count=1, steps=6, side=32, rounds=1, batch_size=4), indent=1))
        return
    pack = Pack("digits")
    result = {
        "device": device,
        "quantus": version("quantus") if find_spec("quantus") else "not installed",
        "constructed": constructed_cases(),
        "batch_invariance": batch_invariance(),
        "speed": [speed(pack, *case, device, batch_size) for case in CASES],
        "field": field_speed(pack, 16, 3, device),
        "resnet50": perturbation_share(device),
    }
    if device != "cpu":
        result["resnet50_flipping"] = resnet_flipping(device, 16, 192, 224, rounds=3, batch_size=256)
    print(json.dumps(result, indent=1))
    if record:
        print(write_result("metrics" if device == "cpu" else f"metrics-{device}", result))


if __name__ == "__main__":
    typer.run(main)
