"""The recorded figures of regions, of several answers and of speed `turbo` elsewhere, as Markdown."""

from __future__ import annotations

from bench.tables import load, number, points, provenance, rate, table


def regions_table() -> str:
    """A region that is found against none, and what flips where the marker may change or may not."""
    result = load("regions")
    auto = result["auto"]
    paired = auto["paired"]
    rows = [
        ["flips", rate(auto["anywhere"]["flip"]), rate(auto["auto"]["flip"]), points(paired["flip"])],
        ["confirmed by the judge", rate(auto["anywhere"]["transfer"]), rate(auto["auto"]["transfer"]),
         points(paired["transfer"])],
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
    targets = result["targets"]
    asked = result["asked"]["threshold"]
    rows = [
        [f"{float(t):g}", *(rate(r["by_threshold"][t]) for r in targets.values())]
        for t in targets["runner-up"]["by_threshold"]
    ]
    rows += [
        [f"**{asked:.1f}**", *(rate(r["share_with_3_distinct_flips"]) for r in targets.values())],
        ["answers that flip", *(rate(r["flip"]) for r in targets.values())],
        ["L1 of the nearest, of all", *(f"{r['l1']['nearest']['mean']:.3f}, {r['l1']['all']['mean']:.3f}"
                                        for r in targets.values())],
    ]  # fmt: skip
    header = ["3 flips pairwise at least so far apart", *(f"digits, {count} answers, `{name}`" for name in targets)]
    said = (
        f"Median distance of two test digits: {scale['same class']:.1f} of one class, {scale['different classes']:.1f} "
        f"of two, half of which is {asked:.1f}. Distances are those of {result['features']}."
    )
    return f"{table(header, rows)}\n\n{said} {provenance(result, 'several')}"


def turbo_table() -> str:
    """Speed `turbo` on a classifier that its student was not taught with, against `fast`."""
    result = load("turbo")
    rows = []
    for mode in ("realistic", "audit"):
        fast, turbo, paired = (result[mode][k] for k in ("fast", "turbo", "turbo against fast"))
        rows += [
            [f"{mode}: flips", rate(fast["flip"]), rate(turbo["flip"]), points(paired["flip"])],
            [f"{mode}: change of the marker, times the rest's", *(number(v["marker_ratio"], 1) for v in (fast, turbo)),
             number(paired["marker_ratio"], 1)],
        ]  # fmt: skip
    header = ["`shortcut`, matching markers, across 5 or more", "`fast`", "`turbo`", "difference, paired"]
    return f"{table(header, rows)}\n\n{provenance(result, 'turbo')}"
