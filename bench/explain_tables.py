"""Tables of bench/results/explain.json, for `bench.report`."""

from __future__ import annotations

from bench.tables import load, number, provenance, rate, table
from counterlens.engine.metrics.table import METRICS


def pointing_table() -> str:
    """Does the map point at the planted cause?"""
    result = load("explain")
    truth = result["truth"]
    rows = [
        [f"`{m}`", *(rate(truth[name][m][k]) for name in ("shortcut", "clean") for k in ("pointing", "top_share"))]
        for m in truth["shortcut"]
    ]
    header = ["method", "`shortcut`: points at it", "top pixels in it", "`clean`: points at it", "top pixels in it"]
    n = truth["clean"]["lax"]["pointing"]["n"]
    text = f"{n} test digits with a matching marker."
    if "msi" in truth:
        box, lax = (number(truth["msi"][name], 2) for name in ("marker", "lax"))
        text += (
            f" MSI cannot rank these maps: for `shortcut`, the marker's box itself has {box}, LAX {lax}. Shown alone "
            "the marker is enough, but with it hidden the digit still tells the half."
        )
    return f"{table(header, rows)}\n\n{text} {provenance(result, 'explain', 'truth')}"


def faithfulness_table() -> str:
    """Every saliency method by every metric, and LAX against the best of the others."""
    return _methods_table("base_score_area", "insertion", "deletion", "road", first="msi")


def robust_table() -> str:
    """The same of maps moved by a pixel, smoothed and asked of the judge, and of how far they hang together."""
    moved = [f"{name}_{how}" for how in ("moved", "smoothed", "judge") for name in ("insertion", "deletion")]
    return _methods_table(*moved, first="islands")


def _methods_table(*others: str, first: str) -> str:
    result = load("explain")
    names = {name: METRICS[name].arrow for name in (first, *others)}
    if first not in result["quality"]["clean"]["methods"]["lax"]:
        return "Not recorded yet: `python -m bench.explain --sections quality --record`."
    rows = []
    for classifier in ("clean", "shortcut"):
        part = result["quality"][classifier]
        for method, values in part["methods"].items():
            rows.append([f"`{classifier}`, `{method}`", *(number(values[k], 3) for k in names)])
        verdicts = [
            f"{v['verdict']} ({v['difference']['mean']:+.3f} to `{v['best_other']}`)" if v else ""
            for v in (part["against_best"].get(k) for k in names)
        ]
        rows.append([f"`{classifier}`: LAX is", *verdicts])
    n = part["methods"]["lax"]["msi"]["n"]
    text = f'{n} test digits, 95 % intervals. "Tied": the 95 % lower bound to the best other is -0.01 or more.'
    return (
        f"{table(['classifier, method', *names.values()], rows)}\n\n{text} {provenance(result, 'explain', 'quality')}"
    )


def seeds_table() -> str:
    """LAX trained from other seeds."""
    result = load("explain")
    if "seeds" not in result:
        return "Not recorded yet: `python -m bench.explain --sections seeds --record`."
    shown = ("msi", "base_score_area", "insertion", "deletion", "road", "insertion_moved", "deletion_moved", "islands")
    rows = []
    for name, part in result["seeds"].items():
        if name == "steps":
            continue
        rows += [[f"`{name}`, {seed}", *(f"{r[m]:.3f}" for m in shown)] for seed, r in part["by_seed"].items()]
        rows.append([f"`{name}`: largest - least", *(f"{part['spread'][m]:.3f}" for m in shown)])
    text = f"Seeds 1 and 2: {result['seeds']['steps']} steps."
    header = ["classifier, seed", *(METRICS[m].arrow for m in shown)]
    return f"{table(header, rows)}\n\n{text} {provenance(result, 'explain', 'seeds')}"


def costs_table() -> str:
    """What a map costs."""
    result = load("explain")
    rows = [
        [f"`{name}`", f"{v['ms_per_image']['p50']:.3g}", f"{v['forwards']['p50']:.3g}"]
        for name, v in result["cost"].items()
    ]
    header = ["method, batch 64", "ms per image", "in forward passes of the classifier"]
    sanity, peaks = result["sanity"], {k: v["peak_mb"] for k, v in result["memory"]["forward_batch_8"].items()}
    kept, again = (sanity[k]["spearman"]["mean"] for k in ("kept", "retrained"))
    text = (
        "The maps do look at the model: with its weights drawn anew, their rank correlation with those before is "
        f"{kept:.2f} with the adapter kept and {again:.2f} with it trained again ({sanity['steps']} steps). A "
        f"training step's pass at 224x224 (two images, forward batch 8) peaks at {peaks['2']:.1f} MB with 2 thresholds "
        f"and at {peaks['16']:.1f} MB with 16."
    )
    costs, rest = (provenance(result, "explain", section) for section in ("cost", "sanity"))
    return f"{table(header, rows)}\n\n{costs}\n\n{text} {rest}"
