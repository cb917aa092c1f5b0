"""Black boxes of the digits pack explained through surrogates: `python -m bench.surrogate`.

Boxes: the pack's `judge` (behind a small HTTP server) and `shortcut` (an ONNX file that is never differentiated), and
two that scikit-learn trains on pixels here: an SVM and gradient-boosted trees. The user's images are drawn from the
training split, without labels; choices were made on the validation split; the test split is scored once.

    confirmed   counterfactuals of test digits that the box confirms, beside guidance by `clean` alone, paired
    shortcut    is the marker touched, where the box is `shortcut`
    lax         LAX through the student and with the white box by one recipe, and RISE at as many queries
    curve       share confirmed over queries, probabilities and labels alone

Trainings are kept in build/bench-surrogates and go on where they were stopped. Results: bench/results/surrogate.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bench.explain import ALPHA_MIN, marker_boxes, pointing
from bench.measure import targets_across, touched
from bench.record import RESULTS, environment, interval, say, write_result
from counterlens.engine import Config, Counterfactuals, Engine
from counterlens.engine.blackbox.answers import FILE
from counterlens.engine.blackbox.box import open_box
from counterlens.engine.images.files import as_saved
from counterlens.engine.images.maps import draw_charts
from counterlens.engine.metrics.msi_score import msi
from counterlens.engine.models.protocols import Classifier, probabilities
from counterlens.engine.packs import Pack
from counterlens.engine.saliency import methods
from counterlens.engine.saliency.lax import LAX, open_adapter
from counterlens.engine.saliency.recipes import HALVES, pack_images, schedule_for, train_adapter
from counterlens.engine.surrogate.rounds import Plan
from counterlens.engine.surrogate.surrogate import is_surrogate, open_surrogate

LABELS = [str(digit) for digit in range(10)]
SECTIONS = ("confirmed", "shortcut", "lax", "curve")
BOXES = ("judge", "svm", "trees")
KEPT = Path("build/bench-surrogates")
QUERIES = 1500  # of every training but the curve's: half of what is allowed was enough on validation digits
EACH = 4  # queries for a counterfactual, its image's own included
CURVE = (100, 300, 1000, 3000, 10000)
RENDERINGS = (("random", 1), ("matching", 2), ("random", 3), ("random", 4))  # of the user's images: marker rule, seed
FITTED = (50, 51, 52, 53)  # seeds of the renderings that scikit-learn's models are fitted on
LAX_STEPS = 500  # of both adapters: a shortened training, the same for white box and student
HIDDEN = 0.25  # share of the queries with a part hidden, of the surrogate that LAX is trained through


def of_tensors(probability: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """A function of uint8 arrays [N, H, W, 3], as boxes are, of one of images [N, 3, H, W] in [0, 1]."""

    def answer(images: Any) -> Any:
        p = probability(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).double()
        return (p / p.sum(1, keepdim=True)).numpy()

    return answer


def of_pack(pack: Pack, name: str) -> Callable[[Any], Any]:
    """One of the pack's classifiers, called and never differentiated."""
    classifier = pack.classifier(name)

    @torch.no_grad()
    def probability(images: Tensor) -> Tensor:
        return torch.cat([probabilities(classifier, some) for some in images.split(128)])

    return of_tensors(probability)


def of_sklearn(pack: Pack, name: str) -> Callable[[Any], Any]:
    """An SVM on principal components of the pixels, or boosted trees on pixels averaged two by two."""
    from sklearn.decomposition import PCA
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    drawn = [pack.samples("train", marker="random", seed=seed) for seed in FITTED]
    images, labels = torch.cat([d.images for d in drawn]), [label for d in drawn for label in d.labels]
    halves = 2 if name == "trees" else 1
    model: Any
    if name == "trees":
        model = HistGradientBoostingClassifier(
            max_iter=80, learning_rate=0.15, max_leaf_nodes=15, max_features=0.2, random_state=0, early_stopping=False
        )
    else:
        model = make_pipeline(
            PCA(100, random_state=0, svd_solver="randomized"), SVC(C=10, random_state=0, probability=True)
        )
    model.fit(F.avg_pool2d(images, halves).flatten(1).numpy(), labels)
    return of_tensors(lambda x: torch.from_numpy(model.predict_proba(F.avg_pool2d(x, halves).flatten(1).numpy())))


def answering(pack: Pack, name: str, hard: bool = False) -> Callable[[Any], Any]:
    """The function of a box; with `hard` it says labels alone."""
    soft = of_sklearn(pack, name) if name in ("svm", "trees") else of_pack(pack, name)
    return (lambda images: soft(images).argmax(1)) if hard else soft


def users_images(pack: Pack, count: int) -> Tensor:
    """The user's images: renderings of the training split with markers that are random or match; no labels."""
    drawn = [pack.samples("train", marker=rule, seed=seed).images for rule, seed in RENDERINGS]
    order = torch.randperm(sum(map(len, drawn)), generator=torch.Generator().manual_seed(0))
    return torch.cat(drawn)[order][:count]


def opened(pack: Pack, function: Callable[[Any], Any], name: str, config: Config, queries: int, **plan: Any) -> Engine:
    """An engine of a box through its surrogate, trained into build/bench-surrogates unless it is there."""
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    box = open_box(function, LABELS, image_size=32)
    box.keep(folder / FILE)
    chosen = Plan(queries=queries, **plan)
    images = users_images(pack, max(100, int(queries * (chosen.own + chosen.held))))
    engine = Engine.from_pretrained("digits", box, Config(speed="fast"), runtime="eager", device="cpu")

    def told(stage: int, stages: int, what: str, trainer: Any) -> None:
        say(
            f"{name}: {what}, {sum(trainer.queries.values())} queries",
            *(trainer.records[-1:] if "round" in what else []),
        )

    if not is_surrogate(folder):
        trained = engine.train_surrogate(images, folder, chosen, told)
        say(f"{name}: {trained.training['agreement']}")
    engine = engine.with_surrogate(folder, queries_each=EACH)
    engine.config = config
    return engine


def facts(name: str) -> dict[str, Any]:
    """Queries of the training, rounds and agreement."""
    training = open_surrogate(KEPT / name).training
    return {"queries": sum(training["queries"].values()), **{k: training[k] for k in ("rounds", "agreement")}}


def at_once(made: Counterfactuals) -> Tensor:
    """Whether the box confirmed the first image that it was asked about: [N]."""
    return made.flipped.double() * torch.tensor([float(student.get("queries") == 2) for student in made.students])


def confirmed_figures(pack: Pack, count: int | None, boxes: list[str], speed: str, asked: int) -> dict[str, Any]:
    """Runner-up targets: confirmed through the student, and by guidance by `clean`, once and as often."""
    x = pack.samples("test", marker="random", count=count).images
    config = Config.make(speed=speed)
    out: dict[str, Any] = {}
    for name in boxes:
        engine = opened(pack, answering(pack, name), f"{name}-{asked}", config, asked)
        made = engine.counterfactual(x)
        ours = made.flipped.double()
        used = torch.tensor([float(s.get("queries", 1)) for s in made.students])
        first = torch.tensor(
            [bool(f) and s.get("queries") == 2 for f, s in zip(made.flipped, made.students, strict=True)]
        )
        clean = Engine.from_pack("digits", "clean", config, runtime="eager", device="cpu")
        alone = clean.counterfactual(x, made.target)
        assert engine.box is not None
        with torch.no_grad():
            said = engine.box.logits(alone.images.clamp(0, 1)).argmax(1)
        theirs = (said == made.target).double()
        clean.box, clean.queries_each = engine.box, EACH
        again = clean.counterfactual(x, made.target).flipped.double()
        out[name] = {
            **facts(f"{name}-{asked}"),
            "confirmed": interval(ours), "confirmed_at_once": interval(first),
            "queries_each": {"mean": used.mean().item(), "most": used.max().item()},
            "l1": interval(made.l1.nan_to_num().double()),
            "clean_alone": interval(theirs), "clean_as_often": interval(again),
            "difference_to_clean_alone": interval(ours - theirs),
            "difference_to_clean_as_often": interval(ours - again),
        }  # fmt: skip
        say(name, {k: round(out[name][k]["mean"], 4) for k in ("confirmed", "clean_alone", "clean_as_often")})
    return out


def shortcut_figures(pack: Pack, count: int | None, speed: str, asked: int) -> dict[str, Any]:
    """Matching markers, targets across "5 or more", mode audit: is the marker touched?"""
    samples = pack.samples("test", marker="matching", count=count)
    x, config = samples.images, Config.make(mode="audit", speed=speed)
    engine = opened(pack, of_pack(pack, "shortcut"), f"shortcut-{asked}", config, asked)
    targets = targets_across(engine, x)
    rows: dict[str, Any] = {"surrogate": facts(f"shortcut-{asked}")}
    white = Engine.from_pack("digits", "shortcut", config, runtime="eager", device="cpu")
    clean = Engine.from_pack("digits", "clean", config, runtime="eager", device="cpu")
    for name, one in (("student", engine), ("white box", white), ("clean", clean)):
        made = one.counterfactual(x, targets)
        after = as_saved(made.images)
        with torch.no_grad():
            said = probabilities(white.classifier, after).argmax(1)
        rows[name] = {
            "touched": interval(touched(x, after, samples)),
            "confirmed": interval((said == targets).double()),
        }
        say(name, {k: round(v["mean"], 3) for k, v in rows[name].items()})
    return rows


def lax_figures(pack: Pack, count: int | None, steps: int, asked: int) -> dict[str, Any]:
    """`shortcut` as a box: MSI of labels, pointing of "5 or more"; adapters through the student and the white box."""
    config = Config(mode="audit", speed="fast")
    engine = opened(pack, of_pack(pack, "shortcut"), f"shortcut-hidden-{asked}", config, asked, hidden=HIDDEN)
    box, white = engine.box, pack.classifier("shortcut")
    assert box is not None
    plain = pack.samples("test", marker="random", count=count)
    marked = pack.samples("test", marker="matching", count=count)
    inside = marker_boxes(marked.markers)
    trained = facts(f"shortcut-hidden-{asked}")
    each = -(-trained["queries"] // len(plain.images))  # queries for each image that is explained
    out: dict[str, Any] = {"surrogate": trained, "steps": steps, "queries_each": each}
    for name, guide in (("student", engine.classifier), ("white box", white)):
        row: dict[str, Any] = {}
        for quantity in ("class", HALVES):
            adapter = trained_adapter(
                pack,
                guide,
                f"{name.replace(' ', '-')}-{quantity[:5].replace(',', '')}-{asked}-{steps}",
                quantity,
                steps,
            )
            if quantity == "class":
                with torch.no_grad():
                    wanted = probabilities(white, plain.images).argmax(1)
                row["msi"] = interval(scored(pack, white, "lax", plain.images, wanted, adapter))
            else:
                with torch.no_grad():
                    wanted = probabilities(white, marked.images).argmax(1)
                hit, share = pointing(adapter.explain(marked.images, wanted).scores, inside)
                row |= {"pointing": interval(hit), "top_share": interval(share)}
        out[name] = row
        say(name, {k: round(v["mean"], 3) for k, v in row.items()})
    with torch.no_grad():
        wanted = probabilities(white, plain.images).argmax(1)
    for masks in (each, 400):
        before, methods.RISE = methods.RISE, (masks, *methods.RISE[1:])
        try:
            out[f"rise, {masks} queries"] = {"msi": interval(scored(pack, white, "rise", plain.images, wanted, None))}
        finally:
            methods.RISE = before
        say("rise", masks, round(out[f"rise, {masks} queries"]["msi"]["mean"], 3))
    return out


def trained_adapter(pack: Pack, classifier: Classifier, name: str, quantity: str, steps: int) -> LAX:
    """An adapter by the pack's recipe, shortened; kept in build/bench-surrogates."""
    folder = KEPT / f"lax-{name}"
    if (folder / "adapter.json").exists():
        return open_adapter(folder, classifier)
    schedule = schedule_for("shortcut", quantity, steps=steps, every=max(1, steps // 4))
    say(f"{name}: {steps} steps of LAX")
    images, held = pack_images(pack, schedule, quantity)
    return train_adapter(
        classifier, images, held, schedule, quantity=quantity, colour=pack.mean_colour, out=folder
    )[0]  # fmt: skip


def scored(pack: Pack, judge: Classifier, method: str, images: Tensor, target: Tensor, adapter: LAX | None) -> Tensor:
    """MSI [N] of a method's maps, by the judge's probabilities."""
    maps, scores = methods.explain_with(method, judge, images, target, baseline=pack.mean_colour, adapter=adapter)
    alpha_min = ALPHA_MIN["shortcut"]
    return msi(judge, images, maps, target, baseline=pack.mean_colour, alpha_min=alpha_min, scores=scores).score


def curve_figures(pack: Pack, count: int | None, boxes: list[str], queries: list[int], speed: str) -> dict[str, Any]:
    """The share confirmed over the queries that the training had, probabilities and labels alone."""
    x = pack.samples("test", marker="random", count=count).images
    out: dict[str, Any] = {}
    for name in boxes:
        for hard in (False, True):
            function, kind = answering(pack, name, hard), "labels" if hard else "probabilities"
            for asked in queries:
                engine = opened(pack, function, f"curve-{name}-{kind}-{asked}", Config.make(speed=speed), asked)
                made = engine.counterfactual(x)
                row = {"confirmed": interval(made.flipped.double()), "confirmed_at_once": interval(at_once(made))}
                out.setdefault(f"{name}, {kind}", {})[str(asked)] = row
                say(name, kind, asked, {k: round(v["mean"], 3) for k, v in row.items()})
    return out


def draw_curve(rows: dict[str, Any], path: Path) -> None:
    """Write the curve as a picture."""
    lines = {
        name: ([math.log10(int(q)) for q in row], [cell["confirmed_at_once"]["mean"] for cell in row.values()])
        for name, row in rows.items()
    }
    draw_charts([("Confirmed at the first try", "log10 of the queries of the training", "share", lines)], path)


def main(
    sections: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SECTIONS)}.")] = "all",
    count: Annotated[int | None, typer.Option(help="Test digits; all of them without it.")] = None,
    boxes: Annotated[str, typer.Option(help=f"Of confirmed and curve: {', '.join(BOXES)}.")] = ",".join(BOXES),
    queries: Annotated[str, typer.Option(help="Of curve.")] = ",".join(map(str, CURVE)),
    speed: Annotated[str, typer.Option(help="Of the counterfactuals.")] = "balanced",
    asked: Annotated[int, typer.Option(help="Queries of the other trainings, at most 3,000.")] = QUERIES,
    steps: Annotated[int, typer.Option(help="Of LAX.")] = LAX_STEPS,
    record: Annotated[bool, typer.Option(help="Write bench/results/surrogate.json and the plot.")] = False,
) -> None:
    """Measure surrogates of black boxes on the test split.

    Example: python -m bench.surrogate --sections confirmed --boxes svm --count 60
    """
    chosen, named = SECTIONS if sections == "all" else tuple(sections.split(",")), boxes.split(",")
    pack, path = Pack("digits"), RESULTS / "surrogate.json"
    payload: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    payload.pop("environment", None)
    ran: dict[str, Callable[[], dict[str, Any]]] = {
        "confirmed": lambda: confirmed_figures(pack, count, named, speed, asked),
        "shortcut": lambda: shortcut_figures(pack, count, speed, asked),
        "lax": lambda: lax_figures(pack, count, steps, asked),
        "curve": lambda: curve_figures(pack, count, named, [int(q) for q in queries.split(",")], speed),
    }
    for section in chosen:
        found = ran[section]()
        merged = payload.get(section, {}) | found if section in ("confirmed", "curve") else found
        payload[section] = merged
        payload.setdefault("environments", {})[section] = environment() | {"count": count, "speed": speed}
        if record:
            write_result("surrogate", payload)
            if section == "curve":
                draw_curve(merged, RESULTS / "surrogate-curve.png")
    print(json.dumps({k: payload[k] for k in chosen}, indent=1))


if __name__ == "__main__":
    typer.run(main)
