"""The digits pack's figures on the test split: `python -m bench.quality`.

Everything is judged on images as their saved 8-bit files hold them, over all test digits, wrongly classified ones
included, with 95 % bootstrap intervals. Settings come from the pack (chosen by bench.sweep on the validation split).
Results: bench/results/quality.json, and pictures beside it.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor

from bench.baselines.img2img import generate
from bench.baselines.pgd import pgd
from bench.measure import (
    open_engines,
    predictions,
    quality,
    run_img2img,
    run_ours,
    summary,
    targets_across,
    touched,
)
from bench.record import RESULTS, interval, write_result
from counterlens.engine.config import Settings
from counterlens.engine.engine import Engine
from counterlens.engine.images.drawing import Strip, draw_strips
from counterlens.engine.images.files import as_saved, to_uint8, write_png
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.packs import Pack

SECTIONS = ("pack", "flips", "truth", "independence")


def psnr(before: Tensor, after: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: [N]."""
    return -10 * (after - before).square().mean(dim=(1, 2, 3)).log10()


@torch.no_grad()
def pack_figures(pack: Pack, engines: dict[str, Engine], judge: SoftmaxClassifier) -> dict[str, Any]:
    """Reconstruction, generation and classification on the test split."""
    diffusion = engines["clean"].diffusion
    samples = pack.samples("test", marker="random")
    x = samples.images
    decoded = torch.cat([((diffusion.decode(diffusion.encode(b)) + 1) / 2).clamp(0, 1) for b in x.split(64)])
    out: dict[str, Any] = {"psnr_db": interval(psnr(x, as_saved(decoded)))}
    classes = torch.arange(500) % 10
    for weight in (1.0, 2.0):
        parts = [
            generate(diffusion, classes[i : i + 100], list(range(i, i + 100)), steps=25, weight=weight)
            for i in range(0, 500, 100)
        ]
        drawn = as_saved(torch.cat(parts))
        out[f"generated_recognised_guidance_{weight:g}"] = interval((predictions(judge, drawn) == classes).double())
        sheet = to_uint8(drawn[:100].reshape(10, 10, 3, 32, 32).permute(2, 0, 3, 1, 4).reshape(3, 320, 320))
        out_path = RESULTS / f"generated-{weight:g}.png"
        write_png(Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()), out_path)
    pairs = torch.stack([x[:20], as_saved(decoded)[:20]]).reshape(2, 20, 3, 32, 32)
    sheet = to_uint8(pairs.permute(2, 0, 3, 1, 4).reshape(3, 64, 640))
    write_png(Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()), RESULTS / "reconstructions.png")
    accuracy: dict[str, Any] = {}
    for rule in ("random", "none", "matching", "conflicting"):
        samples = pack.samples("test", marker=rule)
        labels = torch.tensor(samples.labels)
        for name, classifier in (*((n, e.classifier) for n, e in engines.items()), ("judge", judge)):
            assert isinstance(classifier, SoftmaxClassifier)
            correct = (predictions(classifier, samples.images) == labels).double()
            accuracy.setdefault(name, {})[rule] = interval(correct)
    out["accuracy"] = accuracy
    return out


def nearest_training_image(pack: Pack, images: Tensor, targets: Tensor) -> Tensor:
    """For each image the nearest (L1) training image of its target class, over 20 renderings of each: [N, 3, H, W]."""
    best = torch.full((len(images),), torch.inf)
    out = torch.zeros_like(images)
    for seed in range(20):
        samples = pack.samples("train", marker="random", seed=1000 + seed)
        labels = torch.tensor(samples.labels)
        for c in range(10):
            rows = (targets == c).nonzero().flatten()
            candidates = samples.images[labels == c]
            distance = torch.cdist(images[rows].flatten(1), candidates.flatten(1), p=1) / images[0].numel()
            value, index = distance.min(dim=1)
            better = value < best[rows]
            best[rows[better]] = value[better]
            out[rows[better]] = candidates[index[better]]
    return out


def flip_figures(
    pack: Pack, engine: Engine, judge: SoftmaxClassifier, off: Settings, weight: float, plain_weight: float
) -> dict[str, Any]:
    """Flip, transfer and L1 of ours and of every control, runner-up targets, all test digits."""
    samples = pack.samples("test", marker="random")
    x = samples.images
    targets = engine.resolve_targets("runner-up", engine.probabilities(x))
    settings = Settings(**engine.pack_settings["realistic"])
    classifier = engine.classifier
    assert isinstance(classifier, SoftmaxClassifier)
    started = time.perf_counter()
    ours = run_ours(engine, x, targets, settings)
    seconds = (time.perf_counter() - started) / len(x)
    images = {
        "ours": ours,
        "ours, filter off (own sweep)": run_ours(engine, x, targets, off),
        "ours, filter off (same scales)": run_ours(engine, x, targets, settings.model_copy(update={"filter": "off"})),
        f"img2img, w {weight:g}": run_img2img(engine, x, targets, settings, weight),
        f"img2img, w {plain_weight:g}": run_img2img(engine, x, targets, settings, plain_weight),
        "nearest training image": nearest_training_image(pack, x, targets),
        "pixel PGD": as_saved(pgd(classifier, x, targets)),
    }
    values = {name: quality(x, image, targets, classifier, judge) for name, image in images.items()}
    table = {name: summary(v) for name, v in values.items()}
    # Paired bootstrap over test digits: the same resample for both settings.
    a, b = values["ours"], values["ours, filter off (own sweep)"]
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(len(x), (4000, len(x)), generator=g)

    def unconfirmed(v: dict[str, Tensor]) -> Tensor:
        flips = v["flip"][rows]
        return (flips * (1 - v["transfer"][rows])).sum(1) / flips.sum(1).clamp(min=1)

    ratio = unconfirmed(a) / unconfirmed(b).clamp(min=1e-9)
    low, median, high = ratio.quantile(torch.tensor([0.025, 0.5, 0.975]).double()).tolist()
    strip = Strip(
        "clean, mode realistic: the first test digits",
        x[:20],
        ours[:20],
        [str(int(p)) for p in predictions(classifier, x[:20])],
        [str(int(p)) for p in predictions(classifier, ours[:20])],
        (values["ours"]["flip"][:20] > 0).tolist(),
    )
    write_png(draw_strips([strip]), RESULTS / "counterfactuals.png")
    return {
        "settings": settings.model_dump(),
        "off_settings": off.model_dump(),
        "seconds_per_image": seconds,
        "table": table,
        "unconfirmed_ratio_to_off": {
            "ratio": (table["ours"]["unconfirmed_flips"]["mean"])
            / max(table["ours, filter off (own sweep)"]["unconfirmed_flips"]["mean"], 1e-9),
            "bootstrap": {"low": low, "median": median, "high": high},
            "share_of_resamples_at_most_two_thirds": (ratio <= 2 / 3).double().mean().item(),
        },
        "transfer_given_flip_by_true_label": _by_correctness(values["ours"], engine, x, samples.labels),
    }


def _by_correctness(values: dict[str, Tensor], engine: Engine, x: Tensor, labels: list[int]) -> dict[str, Any]:
    right = engine.probabilities(x).argmax(1) == torch.tensor(labels)
    return {
        name: {k: v[mask].mean().item() for k, v in values.items()} | {"n": int(mask.sum())}
        for name, mask in (("correct", right), ("wrong", ~right))
        if mask.any()
    }


def truth_figures(pack: Pack, engines: dict[str, Engine], weight: float) -> dict[str, Any]:
    """Share of test digits whose marker is changed when the target lies across the shortcut's boundary."""
    samples = pack.samples("test", marker="matching")
    x = samples.images
    out: dict[str, Any] = {}
    for name, engine in engines.items():
        targets = targets_across(engine, x)
        classifier = engine.classifier
        assert isinstance(classifier, SoftmaxClassifier)
        base = Settings(**engine.pack_settings["realistic"])
        variants = {
            "realistic, 45 degrees": base,
            "audit, 90 degrees": Settings(**engine.pack_settings["audit"]),
            "off": base.model_copy(update={"filter": "off"}),
        }
        rows = {}
        for variant, settings in variants.items():
            after = run_ours(engine, x, targets, settings)
            flip = (predictions(classifier, after) == targets).double()
            rows[variant] = {"touched": interval(touched(x, after, samples)), "flip": interval(flip)}
        after = run_img2img(engine, x, targets, base, weight)
        flip = (predictions(classifier, after) == targets).double()
        rows["img2img"] = {"touched": interval(touched(x, after, samples)), "flip": interval(flip)}
        out[name] = rows
    return out


def independence_figures(pack: Pack, engine: Engine) -> dict[str, Any]:
    """The same samples in other places of equal-shaped batches, and across batch shapes."""
    x = pack.samples("test", count=144, marker="random").images
    first = engine.counterfactual(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    moved = engine.counterfactual(x[order])
    back = torch.empty_like(moved.images)
    back[order] = moved.images
    out: dict[str, Any] = {"samples": len(x), "bit_identical_after_shuffling": bool(torch.equal(back, first.images))}
    for size in (1, 4):
        parts = [engine.counterfactual(x[i : i + size]) for i in range(0, len(x), size)]
        images = torch.cat([p.images for p in parts])
        flipped = torch.cat([p.flipped for p in parts])
        difference = (images - first.images).abs().flatten(1).amax(1)
        out[f"batch_{size}_against_16"] = {
            "within_1e-4": (difference <= 1e-4).double().mean().item(),
            "flips_equal": (flipped == first.flipped).double().mean().item(),
            "worst": difference.max().item(),
        }
    return out


def main(
    pack: Annotated[str, typer.Option(help="Pack or folder.")] = "digits",
    sections: Annotated[str, typer.Option(help="Comma-separated: pack, flips, truth, independence.")] = "all",
) -> None:
    """Measure the pack on the test split and record the figures.

    Example: python -m bench.quality --sections pack,flips
    """
    chosen = SECTIONS if sections == "all" else tuple(sections.split(","))
    opened, engines, judge = open_engines(pack)
    sweep = opened.manifest["sweep"]
    off, weight = Settings(**sweep["off"]), float(sweep["img2img_weight"])
    path = RESULTS / "quality.json"
    payload: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    payload.pop("environment", None)
    if "pack" in chosen:
        payload["pack"] = pack_figures(opened, engines, judge)
    if "flips" in chosen:
        payload["flips"] = flip_figures(opened, engines["clean"], judge, off, weight, 1.0)
    if "truth" in chosen:
        payload["truth"] = truth_figures(opened, engines, weight)
    if "independence" in chosen:
        payload["independence"] = independence_figures(opened, engines["clean"])
    write_result("quality", payload)
    print(json.dumps({k: payload[k] for k in chosen}, indent=1))


if __name__ == "__main__":
    typer.run(main)
