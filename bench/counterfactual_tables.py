"""The recorded figures of regions, of several answers and of speed `turbo` elsewhere, as Markdown."""

from __future__ import annotations

from bench.tables import load, number, provenance, rate, table


def _points(v: dict[str, float]) -> str:
    """A paired difference of shares, in points."""
    mean, low, high = (f"{100 * v[k]:+.1f}" for k in ("mean", "low", "high"))
    return f"{mean} points ({low} to {high})"


def regions_table() -> str:
    """A region that is found against none, and what flips where the marker may change or may not."""
    result = load("regions")
    auto = result["auto"]
    paired = auto["paired"]
    rows = [
        ["flips", rate(auto["anywhere"]["flip"]), rate(auto["auto"]["flip"]), _points(paired["flip"])],
        ["confirmed by the judge", rate(auto["anywhere"]["transfer"]), rate(auto["auto"]["transfer"]),
         _points(paired["transfer"])],
        ["L1", number(auto["anywhere"]["l1"]), number(auto["auto"]["l1"]), number(paired["l1"])],
        ["share of the image", "100 %", rate(auto["auto"]["region_area"]), ""],
    ]  # fmt: skip
    header = ["`clean`, towards the runner-up", "anywhere", "`--region auto`", "difference, paired"]
    text = f"{table(header, rows)}\n\n"
    modes = result["marker"]
    rows = [[name, *(rate(modes[mode][name]["flip"]) for mode in modes)] for name in modes["realistic"]]
    header = ["`shortcut`, across 5 or more; what may change", *(f"flips, {mode}" for mode in modes)]
    return f"{text}{table(header, rows)}\n\n{provenance(result, 'regions')}"


def several_table() -> str:
    """How far apart several flips of one digit lie, beside two digits of a class and of two."""
    result = load("several")
    count, scale = result["count"], result["median_distance"]
    rows = [[f"{float(t):g}", rate(share)] for t, share in result["by_threshold"].items()]
    header = ["pairwise at least so far apart", f"digits with 3 such flips among {count} answers"]
    said = (
        f"Median distance of two test digits: {scale['same class']:.1f} of one class, {scale['different classes']:.1f} "
        f"of two. All answers of a digit are aimed at one class. Distances are those of {result['features']}."
    )
    return f"{table(header, rows)}\n\n{said} {provenance(result, 'several')}"


def turbo_table() -> str:
    """Speed `turbo` on a classifier that its student was not taught with, against `fast`."""
    result = load("turbo")
    rows = []
    for mode in ("realistic", "audit"):
        fast, turbo, paired = (result[mode][k] for k in ("fast", "turbo", "turbo against fast"))
        rows += [
            [f"{mode}: flips", rate(fast["flip"]), rate(turbo["flip"]), _points(paired["flip"])],
            [f"{mode}: change of the marker, times the rest's", *(number(v["marker_ratio"], 1) for v in (fast, turbo)),
             number(paired["marker_ratio"], 1)],
        ]  # fmt: skip
    header = ["`shortcut`, matching markers, across 5 or more", "`fast`", "`turbo`", "difference, paired"]
    return f"{table(header, rows)}\n\n{provenance(result, 'turbo')}"
