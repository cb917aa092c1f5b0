"""Where the classifier keeps pushing although the generator sees no evidence of the class: a shortcut detector.

At every guided step the classifier has a score s_c (minus sqrt(1 - abar) times its gradient of log p) and the generator
its own class direction r = eps_c - eps_u. Both are maps over the latent locations, and what is observed are those of
the very run whose counterfactuals are shown, whatever its speed (in eager under every runtime). For each sample,

    push      share of |s_c|^2 at a location, averaged over the guided steps
    removed   the part of it that the consensus filter takes away
    evidence  share of |r|^2 there

A model that looks at what the class is made of pushes where the generator has evidence. Absolute shares say little:
both are small in empty corners, and what the filter removes follows the push. So the evidence at a place is the excess
d = push - FACTOR x evidence. A shortcut shows in some samples only (those that have the mark, towards some labels), and
there strongly: differences within the DEAD band count as none, and no sample counts for more than CAP (both in shares
of an even spread).

The null is a permutation: under "the classifier pushes at most FACTOR times the generator's evidence" the two may
change places within a sample, which turns the sign of its whole map. The largest studentised mean over all places in
1,000 such draws says what chance does anywhere (family-wise error ALPHA). What is nowhere in particular (a tint, a
border, a texture) is tested in the same draws (`statistics`): the largest of places and statistics decides for all.

Targets matter: the runner-up of a model with a shortcut lies on the shortcut's own side. Each sample is led to a label
drawn from the less likely half, which whatever the model leans on speaks against.

What the autoencoder cannot draw is out of reach of all this: it is gone from the first decoded estimate on, and so from
every counterfactual. That shows in another way: the images are encoded and decoded, nothing else, and the classifier is
asked again. Where its answer changes, it leans on something that was lost (`redrawn`).

FACTOR, DEAD and CAP were chosen on the digits pack's validation split; `python -m bench.audit detector` measures the
test split and causes that were not looked at.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..config import Config
from ..errors import CounterlensError
from ..files import write_atomically
from ..images.files import as_saved
from .looks import AGAIN, Look, joined, look_files, look_path, read_arrays, read_look, write_look
from .plan import parts_of
from .results import GOES_ON, Results
from .statistics import STATISTICS, colours, contrasts, energy, mean_colour, measure, moved, sentence
from .summary import interval
from .watching import BATCH, Evidence, observe, too_few

if TYPE_CHECKING:
    from ..core.core import EngineCore
    from .auditor import Auditor
    from .plan import Chosen

FACTOR = 2.0
DEAD, CAP = 1.5, 2.0
ALPHA = 0.05
DRAWS = 1000
TIE = 1e-9  # of a mean in root mean squares
# In `bench.audit detector` a planted marker that decides every answer is found in under half of random subsets of 32
# images and in nearly all of 64: fewer than these cannot say that there is no shortcut, and a weaker one needs more.
ENOUGH = 64
LEAST = 16  # samples from which a class is tested on its own
MAPS, FACTS = "disagreement.npz", "disagreement.json"


@dataclass(frozen=True)
class Tested:
    """A permutation test over K places: mean contrast [K], the same by its root mean square [K], family-wise p [K].

    At given root mean squares, which signs do not change, the second orders as the studentised mean does.
    """

    excess: np.ndarray
    statistic: np.ndarray
    p: np.ndarray


def contrast(push: np.ndarray, evidence: np.ndarray, factor: float = FACTOR) -> np.ndarray:
    """push - factor x evidence, nothing within the dead band and at most the cap: [N, K]; odd in the difference."""
    even = 1 / push.shape[1]
    d = push - factor * evidence
    return np.sign(d) * np.clip(np.abs(d) - DEAD * even, 0, CAP * even)


def sign_test(
    d: np.ndarray,  # [N, K]
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Tested:
    """Test whether any mean is above 0, against turning the signs of whole samples; the largest decides for all K."""
    n = len(d)
    length = np.sqrt((d * d).mean(axis=0))  # does not change with the signs

    def ratio(mean: np.ndarray) -> np.ndarray:
        return mean / np.where(length > 0, length, 1.0)

    rng = np.random.default_rng(seed)
    mean = d.mean(axis=0)
    statistic = ratio(mean)
    highest = np.empty(draws)
    for start in range(0, draws, 200):
        signs = rng.choice([-1.0, 1.0], (min(200, draws - start), n))
        highest[start : start + 200] = ratio(signs @ d / n).max(axis=1)
    # Where few samples differ at all, many draws give what was seen; the last bits of their sums do not make it rarer.
    p = (1 + (highest[:, None] >= statistic[None] - TIE).sum(axis=0)) / (draws + 1)
    return Tested(mean, statistic, p)


def regions(
    significant: np.ndarray,  # [h, w] bool
) -> list[list[tuple[int, int]]]:
    """Connected groups of cells (sharing a side), in reading order."""
    left = {(int(r), int(c)) for r, c in np.argwhere(significant)}
    groups = []
    for start in sorted(left):
        if start not in left:
            continue
        group, open_cells = [], [start]
        left.discard(start)
        while open_cells:
            r, c = open_cells.pop()
            group.append((r, c))
            for near in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if near in left:
                    left.discard(near)
                    open_cells.append(near)
        groups.append(sorted(group))
    return groups


def family(each: Mapping[str, np.ndarray]) -> np.ndarray:
    """What is tested together, of every sample: contrasts of the places, then of the statistics: [N, h w + K]."""
    push, evidence = (each[name].reshape(len(each[name]), -1) for name in ("push", "evidence"))
    whole = contrasts(each["push statistics"], each["evidence statistics"])
    return np.concatenate([contrast(push, evidence), whole], axis=1)


def judge(
    each: Mapping[str, np.ndarray],  # push, removed, evidence [N, h, w]; push statistics, evidence statistics [N, K]
    size: int,
    *,
    tests: int = 1,
    more: np.ndarray | None = None,  # [h, w] what an open filter changes more
) -> dict[str, Any]:
    """Test one group of samples and name the places and the statistics that stand out, most excess first.

    Args:
        each: of the group, see `look`.
        size: side of the images in pixels, for the places' boxes.
        tests: groups that are tested beside this one; p values are multiplied by it (Bonferroni).
        more: mean change of the audit mode less that of the run, by place.
    """
    n, h, w = each["push"].shape
    whole = [each[f"{name} statistics"] for name in ("push", "evidence")]
    tested = sign_test(family(each))
    p = np.minimum(tested.p * tests, 1)
    p, of_whole = p[: h * w].reshape(h, w), p[h * w :]
    push, removed, evidence = (each[name].mean(axis=0) for name in ("push", "removed", "evidence"))
    found: list[dict[str, Any]] = []
    for cells in regions(p < ALPHA):
        rows, columns = [r for r, _ in cells], [c for _, c in cells]
        at = (np.array(rows), np.array(columns))
        place: dict[str, Any] = {
            "box": [
                min(rows) * size // h, min(columns) * size // w,
                (max(rows) + 1) * size // h, (max(columns) + 1) * size // w,
            ],
            "cells": [list(c) for c in cells],
            "push": float(push[at].sum()),
            "evidence": float(evidence[at].sum()),
            "ratio": float(push[at].sum() / max(evidence[at].sum(), 1e-12)),
            "removed": float(removed[at].sum()),
            "excess": float((push - FACTOR * evidence)[at].sum()),
            "p": float(p[at].min()),
        }  # fmt: skip
        if more is not None:
            place["audit_changes_more"] = float(more[at].mean())
        found.append(place)
    found.sort(key=lambda f: -f["excess"])
    order = np.argsort(-tested.excess[: h * w])[:10]
    ranking = [
        {"cell": [int(i) // w, int(i) % w], "excess": float(tested.excess[i]), "p": float(p.flat[i])} for i in order
    ]  # fmt: skip
    statistics = [
        {
            "name": s.name, "family": s.family, "push": float(a), "evidence": float(b), "p": float(chance),
            "found": bool(chance < ALPHA),
        }
        for s, a, b, chance in zip(STATISTICS, *(x.mean(axis=0) for x in whole), of_whole, strict=True)
    ]  # fmt: skip
    by_rank = np.argsort(-tested.statistic[h * w :], kind="stable")
    return {
        "samples": n, "places": found, "ranking": ranking,
        "statistics": [statistics[i] for i in by_rank], "smallest_p": float(min(p.min(), of_whole.min())),
        "smallest_p_of_places": float(p.min()),
    }  # fmt: skip


def draw_samples(chosen: Sequence[Chosen], count: int, seed: int) -> list[Chosen]:
    """`count` samples of the plan, drawn by their ids."""

    def key(c: Chosen) -> str:
        return hashlib.sha256(f"disagreement:{seed}:{c.sample.id}".encode()).hexdigest()

    return sorted(sorted(chosen, key=key)[:count], key=lambda c: c.number)


def unlikely_labels(
    probabilities: Tensor,  # [N, labels]
    ids: Sequence[str],
    seed: int,
) -> list[int]:
    """For each sample a label drawn, by its id, from the half of the labels that the classifier finds less likely."""
    order = probabilities.argsort(dim=1, stable=True)[:, : max(1, probabilities.shape[1] // 2)].tolist()
    out = []
    for name, half in zip(ids, order, strict=True):
        drawn = int.from_bytes(hashlib.sha256(f"target:{seed}:{name}".encode()).digest()[:6], "little")
        out.append(half[drawn % len(half)])
    return out


@torch.no_grad()
def redrawn(
    engine: EngineCore,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
) -> tuple[list[bool], Tensor]:
    """Encode and decode, and ask the classifier again: where its answer stays [N], and the differences [N, H, W]."""
    with engine.frozen():
        decode, encode = engine.diffusion.decode, engine.diffusion.encode
        parts = [(decode(encode(x.to(engine.device))).cpu() + 1) / 2 for x in images.split(BATCH)]
    again = as_saved(torch.cat(parts))
    same = engine.probabilities(again).argmax(dim=1) == engine.probabilities(images).argmax(dim=1)
    return same.tolist(), (again - images).abs().mean(dim=1)


def watched(
    engine: EngineCore,
    images: Tensor,  # [n, 3, H, W] in [0, 1]
    targets: Sequence[int],
    seen: Evidence,
) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """What is kept of samples that were watched: arrays [n, ...], and where push and evidence lie [n, H, W]."""
    each = {"push": seen.push, "removed": seen.removed, "evidence": seen.evidence, "target": np.array(targets)}
    moves = {"push": moved(engine, images, seen.towards), "evidence": moved(engine, images, seen.of_class)}
    each |= {f"{name} statistics": measure(p) for name, p in moves.items()} | {"colour": mean_colour(moves["push"])}
    return each, {f"{name} picture": energy(p) for name, p in moves.items()}


def look(
    engine: EngineCore,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    ids: Sequence[str],
    config: Config,
    on_step: Callable[[int, int], None] | None = None,
) -> Look:
    """Watch counterfactuals towards unlikely labels, with the filter as it is and open, and redraw the images."""
    targets = unlikely_labels(engine.probabilities(images), ids, config.seed)
    seen, made, good = observe(engine, images, targets, config, on_step, least=0)
    same, lost = redrawn(engine, images)
    found = Look({
        "targets": {str(t): engine.labels[t] for t in sorted(set(targets))}, "same": same,
        "errors": [error for error in made.errors if error is not None],
        "angle": engine.settings(config).angle, "counts": {"lost": len(images)},
    }, sums={"lost": lost.sum(dim=0).numpy()})  # fmt: skip
    if seen is None:
        return found
    found.each, pictures = watched(engine, images[good], [targets[i] for i in good], seen)
    found.sums |= {name: picture.sum(dim=0).numpy() for name, picture in pictures.items()}
    found.facts["counts"] |= dict.fromkeys(pictures, len(good))
    open_filter = config.model_copy(update={"angle": 90.0, "filter": "zero"})
    # Both are observed runs, so that nothing but the filter tells them apart.
    _, opened, also = observe(engine, images[good], [targets[i] for i in good], open_filter, on_step, least=0)
    found.facts["errors"] += [error for error in opened.errors if error is not None]
    for name, run, rows, before in (
        ("change", made, good, images[good]), ("change_open", opened, also, images[good][also]),
    ):  # fmt: skip
        if rows:
            found.sums[name] = (as_saved(run.images[rows]) - before).abs().mean(dim=1).sum(dim=0).numpy()
            found.facts["counts"][name] = len(rows)
    return found


def conclude(looks: Sequence[Look]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Test where, and how, the classifier pushes on its own.

    Args:
        looks: at batches of samples, in order.

    Returns:
        Facts as JSON values (of all samples, and of each target class with enough of them), and mean maps by name:
        push, removed, evidence [h, w], change, change_open, lost, push picture, evidence picture [H, W], and
        push:LABEL, evidence:LABEL.

    Raises:
        CounterlensError: there are no two counterfactuals.
    """
    each, maps = joined(looks)
    if len(each.get("push", ())) < 2 or "change_open" not in maps:
        raise too_few(sum(x.facts["counts"]["lost"] for x in looks), [e for x in looks for e in x.facts["errors"]])
    size, (h, w) = maps["lost"].shape[0], each["push"].shape[1:]
    more = torch.from_numpy(maps["change_open"] - maps["change"])
    pooled = adaptive_avg_pool2d(more[None], (h, w))[0].numpy()
    maps = {name: each[name].mean(axis=0) for name in ("push", "removed", "evidence")} | maps
    names = {int(t): label for x in looks for t, label in x.facts["targets"].items()}
    by_class = {}
    groups = {t: np.flatnonzero(each["target"] == t) for t in sorted(set(each["target"].tolist()))}
    large = {t: at for t, at in groups.items() if len(at) >= LEAST}
    for t, at in large.items():
        by_class[names[t]] = judge({k: v[at] for k, v in each.items()}, size, tests=len(large))
        maps |= {f"{k}:{names[t]}": each[k][at].mean(axis=0) for k in ("push", "evidence")}
    facts = {
        "size": size, "factor": FACTOR, "alpha": ALPHA, "draws": DRAWS, "least": LEAST,
        "angle": looks[0].facts["angle"], "runtime": "eager",
        "all": judge(each, size, more=pooled), "by_class": by_class,
        "redrawn": {
            "same_answer": interval([same for x in looks for same in x.facts["same"]]).record(),
            "mean_difference": float(maps["lost"].mean()),
        },
        "colours": colours(each["colour"], each["target"], names),
    }  # fmt: skip
    return facts, maps


def find(
    engine: EngineCore,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    ids: Sequence[str],
    config: Config,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Look at images and conclude, in one go; see `look` and `conclude`."""
    parts = range(0, len(images), BATCH)
    return conclude([look(engine, images[i : i + BATCH], ids[i : i + BATCH], config, on_step) for i in parts])


def run_disagreement(
    auditor: Auditor,
    results: Results,
    chosen: Sequence[Chosen],
    count: int,
    shard: tuple[int, int] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Look for shortcuts, or go on with it: a file for each batch, and the facts once all are there.

    Args:
        count: samples to look at.
        shard: (number from 1, count): only this share of the batches; `merge` puts them together.
        stopped: asked after every batch whether to leave it at that.

    Returns:
        The facts; None if batches are missing, or no two images could be read.
    """
    facts = read_facts(results.folder)
    whole = facts is not None and "statistics" in facts["all"] and (results.folder / MAPS).exists()
    if facts is not None and facts["asked"] == count and whole:
        return facts
    drawn = draw_samples(chosen, count, auditor.config.seed)
    if len(auditor.engine.labels) < 2:
        return None
    batches = parts_of(drawn, BATCH)
    for path in look_files(results.folder):  # of another number of samples
        if int(path.stem) not in batches or read_look(path).facts["asked"] != count:
            path.unlink()
    anywhere = auditor.config.model_copy(update={"region": None})  # the filter is asked about the whole image
    for batch, some in batches.items():
        if look_path(results.folder, batch).exists() or (shard is not None and batch % shard[1] != shard[0] - 1):
            continue
        images = auditor.squares(some)
        seen = (
            look(auditor.engine, torch.stack([*images.values()]), [*images], anywhere, on_step) if images else Look({})
        )
        seen.facts |= {"asked": count, "batches": len(batches)}
        write_look(results.folder, batch, seen, GOES_ON)
        if stopped():
            break
    return conclude_folder(results.folder)


def conclude_folder(folder: Path) -> dict[str, Any] | None:
    """Write the facts and maps of a folder whose batches are all there; None if they are not, or show no two images.

    Raises:
        CounterlensError: a file cannot be read or written.
    """
    looks = {int(path.stem): read_look(path) for path in look_files(folder)}
    if not looks or looks.keys() != set(range(next(iter(looks.values())).facts["batches"])):
        return None
    shown = [look for look in looks.values() if "counts" in look.facts]
    if sum(look.facts["counts"]["lost"] for look in shown) < 2:
        return None
    facts, maps = conclude(shown)
    facts["asked"] = looks[0].facts["asked"]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **maps)  # type: ignore[arg-type]
    write_atomically(folder / MAPS, buffer.getvalue(), hint=GOES_ON)
    write_atomically(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n", hint=GOES_ON)
    return facts


def verdict(facts: dict[str, Any], size: int) -> str:
    """What the test says, in a sentence; nothing found in few images is no finding.

    Args:
        facts: of `find`.
        size: side of the images in pixels.
    """
    n, places = facts["all"]["samples"], facts["all"]["places"]
    said = []
    if places:
        first = places[0]
        said.append(
            f"Possible shortcut: around {box_name(first['box'], size)} the model spends {first['push']:.0%} of its "
            f"push, although only {first['evidence']:.0%} of what the classes are made of is there (chance: "
            f"p = {first['p']:.3f}, {n} images)."
        )
    said += [sentence(s, facts["colours"], n) for s in alarms(facts)]
    if "statistics" not in facts["all"]:
        said.append(LACKS)
    return " ".join(said if places or alarms(facts) else [_nothing(n), *said])


LACKS = (
    "Tints, borders and textures were not tested: an older counterlens looked at this audit; the same command again "
    "tests them."
)


def alarms(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The statistic of each family that stands out most, where one does."""
    found: dict[str, dict[str, Any]] = {}
    for s in facts["all"].get("statistics", ()):  # none in audits of an older counterlens
        if s["found"]:
            found.setdefault(s["family"], s)
    return list(found.values())


def _nothing(n: int) -> str:
    if n < ENOUGH:
        return (
            f"Nothing can be said about shortcuts: {n} images show none, but they are few. A planted mark that decides "
            f"every answer was found in nearly all random sets of {ENOUGH} images and in under half of those of 32; a "
            "tint or a border takes more."
        )
    return (
        f"No shortcut found in {n} images: nowhere does the model push clearly more than the image generator's "
        "evidence. One that decides few answers, or that the generator cannot draw, may be there."
    )


def box_name(box: Iterable[int], size: int) -> str:
    """A place in words: box (row, column, row, column) in pixels of an image of that side."""
    r0, c0, r1, c1 = box
    if (r1 - r0) * (c1 - c0) > 0.5 * size * size:
        return "most of the image"
    row = ("top", "middle", "bottom")[min(2, int(3 * (r0 + r1) / 2 / size))]
    column = ("left", "middle", "right")[min(2, int(3 * (c0 + c1) / 2 / size))]
    if row == column == "middle":
        return "the middle"
    return "the " + " ".join(w for w in (row, column) if w != "middle")


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of an audit's disagreement map; None where it has none.

    Raises:
        CounterlensError: the file cannot be read.
    """
    try:
        return json.loads((folder / FACTS).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CounterlensError(f"{folder / FACTS}: cannot be read ({error}); {AGAIN}") from error


def read_maps(folder: Path) -> dict[str, np.ndarray]:
    """The maps of an audit's disagreement map, by name.

    Raises:
        CounterlensError: the file cannot be read.
    """
    return read_arrays(folder / MAPS)
