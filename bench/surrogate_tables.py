"""The recorded figures of surrogates as Markdown."""

from __future__ import annotations

from bench.tables import load, number, points, provenance, rate, table


def surrogates_table() -> str:
    """Counterfactuals through students of black boxes, beside guidance by one that knows nothing of them."""
    result = load("surrogate")
    rows = []
    for box, r in result["confirmed"].items():
        rows.append([f"`{box}`", str(r["queries"]), rate(r["confirmed"]), f"{r['queries_each']['mean']:.1f}",
                     rate(r["clean_alone"]), points(r["difference_to_clean_alone"])])  # fmt: skip
    header = [
        "box",
        "queries of the training",
        "confirmed by the box",
        "queries each",
        "by `clean` alone",
        "difference",
    ]
    text = f"{table(header, rows)}\n\n{provenance(result, 'surrogate', 'confirmed')}"
    r = result["shortcut"]
    who = {"student": f"the student ({r['surrogate']['queries']} queries)", "white box": "`shortcut` itself",
           "clean": "`clean`"}  # fmt: skip
    rows = [[said, rate(r[name]["touched"]), rate(r[name]["confirmed"])] for name, said in who.items()]
    header = ["`shortcut` as a box, across 5 or more; guided by", "marker touched", "confirmed by the box"]
    text += f"\n\n{table(header, rows)}\n\n{provenance(result, 'surrogate', 'shortcut')}"
    curve = result["curve"]
    rows = [[f"{int(q):,}", *(rate(row[q]["confirmed_at_once"]) for row in curve.values())]
            for q in next(iter(curve.values()))]  # fmt: skip
    least = min(cell["confirmed"]["mean"] for row in curve.values() for cell in row.values())
    header = ["queries of the training", *(f"{name}: confirmed at the first try" for name in curve)]
    said = f"After all tries at least {100 * least:.1f} % of each."
    text += f"\n\n{table(header, rows)}\n\n{said} {provenance(result, 'surrogate', 'curve')}"
    r = result["lax"]
    who = {"student": "LAX through the student", "white box": "LAX on `shortcut` itself",
           "rise, 5 queries": "RISE, 5 queries", "rise, 400 queries": "RISE, 400 queries"}  # fmt: skip
    rows = [[said, number(r[name]["msi"], 2), rate(r[name]["pointing"]) if "pointing" in r[name] else ""]
            for name, said in who.items()]  # fmt: skip
    header = ["maps of `shortcut`, scored by it", "MSI of the label", "points at the marker, 5 or more"]
    said = f"Both adapters of {r['steps']} steps."
    return f"{text}\n\n{table(header, rows)}\n\n{said} {provenance(result, 'surrogate', 'lax')}"
