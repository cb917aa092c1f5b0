"""Saliency methods on the digits pack's test split: `python -m bench.explain --record`.

LAX, captum's methods and RISE on the same images: whether they point at a planted cause, metrics with 95 % bootstrap
intervals (of maps as they are, moved by a pixel, smoothed, asked of the judge), LAX from other seeds, cost, what
becomes of LAX's maps when the model's weights are random, and the memory of training. Everything was chosen on the
training and validation splits. Results: bench/results/explain.json, pictures beside it; each section is written when it
is done, and what took long is kept in --work: the same command on the same commit goes on after an interruption.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bench.record import RESULTS, environment, interval, keep_memory, say, write_result
from counterlens.engine.guidance.memory import PeakMemory
from counterlens.engine.images.files import write_png
from counterlens.engine.images.maps import draw_methods
from counterlens.engine.metrics import load_alpha_min
from counterlens.engine.metrics.msi_score import msi
from counterlens.engine.metrics.quantities import make_quantity
from counterlens.engine.metrics.robust import brittle
from counterlens.engine.metrics.table import METRICS, check_metrics, compared
from counterlens.engine.models.freezing import frozen
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack
from counterlens.engine.packs.architectures import StridedClassifier
from counterlens.engine.packs.rendering import MARKER_SIZE, Marker
from counterlens.engine.saliency.explain import explain, pack_adapter
from counterlens.engine.saliency.lax import DESCRIPTION, LAX, new_adapter, open_adapter
from counterlens.engine.saliency.methods import explain_with, minmax
from counterlens.engine.saliency.recipes import HALVES, PACK_SCHEDULE, pack_images, train_adapter
from counterlens.engine.saliency.table import METHODS, check_methods
from counterlens.engine.saliency.training import Schedule, faithfulness
from counterlens.export.store import weights_digest

SECTIONS = ("truth", "pictures", "quality", "seeds", "cost", "sanity", "memory")
CLASSIFIERS = ("clean", "shortcut")
# Of `quality` and `seeds`. Group `robust` whole, with MSI and ROAD of moved maps, takes three times as long.
MEASURED = [
    "main",
    "shape",
    *(f"{n}_{how}" for n in ("insertion", "deletion") for how in ("moved", "smoothed", "judge")),
]
WORK = Path("runs/explain")
SEEDS = (1, 2)  # beside the pack's own
ALPHA_MIN = {c: load_alpha_min(RESULTS / f"calibration-{c}" / "calibration.json") for c in CLASSIFIERS}  # frozen
ROUNDS, SHORT_ROUNDS = 5, 25  # of the cost table, the second of what takes milliseconds


def predict(classifier: SoftmaxClassifier, images: Tensor) -> Tensor:
    """Predicted labels [N]."""
    with torch.no_grad():
        return torch.cat([classifier.logits(part).argmax(1) for part in images.split(128)])


def marker_boxes(markers: list[Marker | None]) -> Tensor:
    """Where each sample's marker is: [N, 32, 32] bool."""
    inside = torch.zeros(len(markers), 32, 32, dtype=torch.bool)
    for box, marker in zip(inside, markers, strict=True):
        assert marker is not None
        box[marker.box] = True
    return inside


def pointing(scores: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the largest 3x3 mean is inside the box, and the share of the k largest pixels inside (k: its area): [N].

    Windows are whole, so that none is centred on the image's border: nothing is padded.
    """
    smooth = F.avg_pool2d(scores[:, None], 3, 1).flatten(1)
    centres = inside[:, 1:-1, 1:-1].flatten(1)
    hit = centres.gather(1, smooth.argmax(1, keepdim=True))[:, 0].double()
    top = scores.flatten(1).topk(MARKER_SIZE**2, dim=1).indices
    return hit, inside.flatten(1).gather(1, top).double().mean(1)


def truth_figures(pack: Pack, count: int | None, methods: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """Do maps of "5 or more, or not" point at the marker: for the classifier that reads it, and for the other?

    And what is the MSI of the marker itself as a map, beside LAX? Rows of methods that are not run again are kept from
    `known`.
    """
    samples = pack.samples("test", marker="matching", count=count)
    inside = marker_boxes(samples.markers)
    out: dict[str, Any] = {"chance": MARKER_SIZE**2 / 32**2}
    shortcut = pack.classifier("shortcut")
    maps = pack_adapter(pack, "shortcut", shortcut, HALVES).explain(samples.images)
    out["msi"] = {
        name: interval(
            msi(
                shortcut, samples.images, saliency, maps.target, quantity=make_quantity(shortcut, HALVES),
                baseline=pack.mean_colour,
            ).score
        )
        for name, saliency in (("marker", inside.float()), ("lax", maps.saliency))
    }  # fmt: skip
    for name in CLASSIFIERS:
        classifier = pack.classifier(name)
        adapter = pack_adapter(pack, name, classifier, HALVES)
        rows = dict(known.get(name, {}) if len(methods) < len(METHODS) else {})
        for method in methods:
            _, scores = explain_with(
                method, classifier, samples.images, quantity=HALVES, adapter=adapter, baseline=pack.mean_colour
            )
            hit, share = pointing(scores, inside)
            rows[method] = {"pointing": interval(hit), "top_share": interval(share)}
            say("truth", name, method, f"pointing {hit.mean():.3f}, top {share.mean():.3f}")
        out[name] = {method: rows[method] for method in METHODS if method in rows}
    return out


def draw_pictures(pack: Pack, record: bool) -> list[str]:
    """Ten digits by every method: of "5 or more, or not" by both classifiers, and of the label by `clean`."""
    drawn = [(f"saliency-{name}.png", name, HALVES, "matching") for name in CLASSIFIERS]
    drawn.append(("saliency-labels.png", "clean", "class", "random"))
    for file, name, quantity, rule in drawn:
        samples = pack.samples("test", marker=rule, count=10)
        classifier = pack.classifier(name)
        adapter, maps, notes = pack_adapter(pack, name, classifier, quantity), {}, {}
        for method in METHODS:
            saliency, scores = explain_with(
                method, classifier, samples.images, quantity=quantity, adapter=adapter, baseline=pack.mean_colour
            )
            maps[method], notes[method] = minmax(saliency), [""] * len(scores)
            if quantity == HALVES:
                hit, _ = pointing(scores, marker_boxes(samples.markers))
                notes[method] = ["hit" if h else "" for h in hit.tolist()]
        captions = [str(int(p)) for p in predict(classifier, samples.images)]
        if record:
            write_png(draw_methods(samples.images, captions, maps, notes), RESULTS / file)
    return [file for file, *_ in drawn]


def measured(
    pack: Pack, name: str, method: str, count: int | None, work: Path, adapter: LAX | None = None, row: str = ""
) -> dict[str, Tensor]:
    """Every metric of one method on one classifier, [N] each, kept in `work` (`row`: under which name)."""
    classifier = pack.classifier(name)
    adapter = adapter or pack_adapter(pack, name, classifier)
    path, commit = work / f"{name}-{row or method}.pt", environment()["commit"]
    key = {"commit": commit, "count": count, "adapter": weights_digest([adapter.head])}
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["key"] == key and commit and not commit.endswith("+"):  # of exactly this code
            return dict(kept["values"])
    started = time.perf_counter()
    values = explain(
        classifier, pack.samples("test", marker="random", count=count).images, method, adapter=adapter,
        alpha_min=ALPHA_MIN[name], pack=pack, metrics=MEASURED, judge=pack.classifier("judge"),
    ).values  # fmt: skip
    torch.save({"key": key, "values": values}, path)
    say("quality", name, row or method, f"{time.perf_counter() - started:.0f} s")
    return values


def means(values: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Metric to mean and interval."""
    return {metric: interval(v) for metric, v in values.items()}


def quality_figures(
    pack: Pack, count: int | None, methods: list[str], known: dict[str, Any], work: Path
) -> dict[str, Any]:
    """Every metric of every method with its interval, and the paired difference between LAX and the best other one.

    Rows of methods that are not run again are kept from `known`; the best other method has to be among those that are.
    """
    out: dict[str, Any] = {"alpha_min": ALPHA_MIN}  # chosen on the validation split, before methods were compared
    for name in CLASSIFIERS:
        scored = {method: measured(pack, name, method, count, work) for method in methods}
        rows = known.get(name, {}).get("methods", {}) if len(methods) < len(METHODS) else {}
        rows = rows | {m: means(v) | {"brittle": brittle(v)} for m, v in scored.items()}
        against = {m: against_best(scored, m) for m in compared(check_metrics(MEASURED, ["judge"]))}
        for metric, row in against.items():
            others = {m: direction(metric) * r[metric]["mean"] for m, r in rows.items() if m != "lax" and metric in r}
            if (best := max(others, key=lambda m: others[m])) != row["best_other"]:
                raise SystemExit(f"--methods: {best} is the best other method by {metric}; run it as well")
        out[name] = {"methods": {m: rows[m] for m in METHODS if m in rows}, "against_best": against}
    return out


def seed_figures(pack: Pack, count: int | None, steps: int, names: list[str], work: Path) -> dict[str, Any]:
    """LAX for labels trained by the pack's recipe, with so many steps, from other seeds: means by seed.

    A training that was interrupted goes on, and one that is done is not made again.
    """
    out: dict[str, Any] = {"steps": steps}
    for name in names:
        classifier = pack.classifier(name)
        found = {f"the pack's, {PACK_SCHEDULE.steps} steps": measured(pack, name, "lax", count, work)}
        for seed in SEEDS:
            folder, schedule = work / f"{name}-seed-{seed}", replace(PACK_SCHEDULE, seed=seed, steps=steps)
            if not (folder / DESCRIPTION).exists():
                images = pack_images(pack, schedule)
                train_adapter(classifier, *images, schedule, colour=pack.mean_colour, out=folder)
            adapter = open_adapter(folder, classifier)
            if (trained := adapter.training["schedule"]["steps"]) != steps:
                raise SystemExit(f"{folder}: an adapter of {trained} steps; choose another --work")
            found[str(seed)] = measured(pack, name, "lax", count, work, adapter, f"lax-seed-{seed}")
        by_seed = {seed: {metric: v.mean().item() for metric, v in values.items()} for seed, values in found.items()}
        metrics = next(iter(by_seed.values()))
        spread = {m: max(r[m] for r in by_seed.values()) - min(r[m] for r in by_seed.values()) for m in metrics}
        out[name] = {"by_seed": by_seed, "spread": spread}
    return out


def direction(metric: str) -> int:
    """1 where more is better, else -1."""
    return 1 if METRICS[metric].higher_is_better else -1


def against_best(scored: Mapping[str, Mapping[str, Tensor]], metric: str) -> dict[str, Any]:
    """LAX minus the best other method on the same images, so that more is better, with its bootstrap interval."""
    sign = direction(metric)
    others = {name: sign * v[metric] for name, v in scored.items() if name != "lax"}
    best = max(others, key=lambda name: others[name].mean().item())
    difference = interval(sign * scored["lax"][metric] - others[best])
    # Tied: the lower bound of the paired difference is above -0.01.
    verdict = "first" if difference["low"] > 0 else "tied" if difference["low"] >= -0.01 else "behind"
    return {"best_other": best, "difference": difference, "verdict": verdict}


def cost_figures(pack: Pack) -> dict[str, Any]:
    """Milliseconds per image at batch 64, and in forward passes of the classifier, timed in turns."""
    keep_memory()
    classifier = pack.classifier("clean")
    images = pack.samples("test", count=64, marker="random").images
    adapter, target = pack_adapter(pack, "clean", classifier), predict(classifier, images)
    times: dict[str, list[tuple[float, float]]] = {"forward": [], **{m: [] for m in METHODS}}  # itself, a forward

    def once(name: str) -> None:
        if name == "forward":
            with torch.no_grad():
                classifier.logits(images)
        elif name == "lax":
            adapter.explain(images)
        else:
            explain_with(name, classifier, images, target, baseline=pack.mean_colour)

    def timed(name: str, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            once(name)
        return (time.perf_counter() - start) / repeats

    # Every method beside a forward pass of its own: this machine's speed changes within a minute. Short calls are
    # repeated (a single one would measure the clock), and more often.
    for name, values in times.items():
        short = name in ("forward", "lax")
        once("forward")
        once(name)
        for _ in range(SHORT_ROUNDS if short else ROUNDS):
            values.append((timed(name, 10 if short else 1), timed("forward", 10)))
    out: dict[str, Any] = {}
    for name, values in times.items():
        v, forward = torch.tensor(values).unbind(1)
        ratio = (v / forward).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        ms = (1e3 * v / len(images)).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        out[name] = {
            "ms_per_image": dict(zip(("p20", "p50", "p80"), ms, strict=True)),
            "forwards": dict(zip(("p20", "p50", "p80"), ratio, strict=True)),
        }
    return out


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of each pair of maps [N, H, W]: [N]."""
    ranks = [x.flatten(1).argsort(1).argsort(1).double() for x in (a, b)]
    centred = [F.normalize(r - r.mean(1, keepdim=True), dim=1) for r in ranks]
    return (centred[0] * centred[1]).sum(1)


def randomised(classifier: SoftmaxClassifier) -> SoftmaxClassifier:
    """The same architecture with fresh weights."""
    module = copy.deepcopy(classifier.module)
    torch.manual_seed(7)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return SoftmaxClassifier(module.eval().requires_grad_(False), classifier.labels)


def sanity_figures(pack: Pack, steps: int) -> dict[str, Any]:
    """Similarity of LAX's maps with those for a model of random weights: the adapter kept, and trained again."""
    classifier = pack.classifier("clean")
    images = pack.samples("test", marker="random", count=100).images
    adapter = pack_adapter(pack, "clean", classifier)
    target = predict(classifier, images)
    reference = adapter.explain(images, target).scores
    random = randomised(classifier)
    kept = replace(adapter, classifier=random).explain(images, target).scores
    schedule = replace(PACK_SCHEDULE, steps=steps)
    retrained, history = train_adapter(random, *pack_images(pack, schedule), schedule, colour=pack.mean_colour)
    again = retrained.explain(images, target).scores
    same: LAX = replace(adapter)
    top = {"kept": kept, "retrained": again, "itself": same.explain(images, target).scores}
    return {
        "steps": len(history.losses),
        **{name: {"spearman": interval(rank_correlation(reference, maps))} for name, maps in top.items()},
    }


def memory_figures() -> dict[str, Any]:
    """Peak bytes of one training batch's expectation at 224x224 by K, with a bounded forward batch and without."""
    torch.manual_seed(0)
    classifier = SoftmaxClassifier(StridedClassifier(width=8).eval(), [str(i) for i in range(10)])
    adapter = new_adapter(classifier, 224)
    images, target = torch.rand(2, 3, 224, 224), torch.zeros(2, dtype=torch.long)
    saliency, hidden = torch.rand(2, 224, 224), torch.zeros(2, 3, 224, 224)
    out: dict[str, Any] = {}
    for name, forward_batch in (("forward_batch_8", 8), ("unbounded", 10**6)):
        rows = {}
        for k in (2, 4, 8, 16):
            levels = torch.linspace(0.5, 0.95, k).double().expand(2, k)
            schedule = Schedule(forward_batch=forward_batch, thresholds=k)
            with frozen(classifier.module), PeakMemory() as memory:
                faithfulness(adapter, images, hidden, saliency, target, levels, 0.1, schedule)
            # The perturbed images and their gradient are the forward batch itself.
            batch = min(forward_batch, 4 * k) * images[0].numel() * 4
            rows[str(k)] = {"peak_mb": memory.peak / 1e6, "perturbed_images_mb": batch / 1e6}
        out[name] = rows
    return out


def main(
    pack: Annotated[str, typer.Option(help="Pack or folder.")] = "digits",
    sections: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SECTIONS)}.")] = "all",
    count: Annotated[int | None, typer.Option(help="Test digits; all of them without it.")] = None,
    methods: Annotated[
        str, typer.Option(help="Run only these again in `truth` and `quality`; the rest is kept.")
    ] = "all",
    classifiers: Annotated[str, typer.Option(help="Of `seeds`.")] = ",".join(CLASSIFIERS),
    steps: Annotated[int, typer.Option(help="Of the trainings in `seeds`.")] = 1500,
    sanity_steps: Annotated[int, typer.Option(help="Of the training in `sanity`.")] = 500,
    work: Annotated[Path, typer.Option(help="Folder for what took long, and for adapters of `seeds`.")] = WORK,
    record: Annotated[bool, typer.Option(help="Write bench/results/explain.json and pictures.")] = False,
) -> None:
    """Measure saliency methods on the test split.

    Example: python -m bench.explain --sections truth,quality --record
    """
    chosen = SECTIONS if sections == "all" else tuple(sections.split(","))
    if unknown := set(chosen) - set(SECTIONS):
        raise SystemExit(f"--sections: expected {', '.join(SECTIONS)}, got {min(unknown)}")
    again = list(METHODS) if methods == "all" else check_methods(methods.split(","))
    if "lax" not in again:
        raise SystemExit("--methods: lax is what the others are compared with; name it as well")
    opened = Pack(pack)
    work.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "explain.json"
    payload: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    payload.pop("environment", None)
    calls: dict[str, Callable[[], Any]] = {
        "truth": lambda: truth_figures(opened, count, again, payload.get("truth", {})),
        "pictures": lambda: draw_pictures(opened, record),
        "quality": lambda: quality_figures(opened, count, again, payload.get("quality", {}), work),
        "seeds": lambda: seed_figures(opened, count, steps, classifiers.split(","), work),
        "cost": lambda: cost_figures(opened),
        "sanity": lambda: sanity_figures(opened, sanity_steps),
        "memory": memory_figures,
    }
    # Sections are measured on different days and machines: each has its own environment.
    environments = payload.setdefault("environments", {})
    for section in chosen:
        before = environments.get(section) or {}
        started = time.perf_counter()
        payload[section] = calls[section]()
        environments[section] = environment() | {"seconds": round(time.perf_counter() - started)}
        if section in ("truth", "quality") and len(again) < len(METHODS):
            environments[section] |= {"methods": again, "others": before.get("others", before)}
        if record:
            write_result("explain", payload)
    print(json.dumps({k: payload[k] for k in chosen}, indent=1))


if __name__ == "__main__":
    typer.run(main)
