"""Writes the tables of README.md, docs/ and the pack's card from bench/results: `python -m bench.report`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; no number in those files is written by hand.
`--compare A B` compares the figures of two recorded results instead, and fails where one became worse.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.counterfactual_tables import regions_table, several_table, turbo_table
from bench.explain_tables import costs_table, faithfulness_table, pointing_table, robust_table, seeds_table
from bench.record import RESULTS
from bench.surrogate_tables import surrogates_table
from bench.tables import load, number, provenance, rate, table

ROOT = Path(__file__).parent.parent
CARD = ROOT / "engine" / "packs" / "digits" / "README.md"
FILES = [ROOT / "README.md", CARD, *sorted((ROOT / "docs" / "pages").rglob("*.md"))]


def counterfactual_table() -> str:
    """Flip, transfer and closeness beside every control."""
    result = load("quality")
    flips = result["flips"]
    rows = [
        [name, rate(v["flip"]), rate(v["transfer"]), number(v["l1"]), rate(v["unconfirmed_flips"])]
        for name, v in flips["table"].items()
    ]
    n = flips["table"]["ours"]["flip"]["n"]
    header = ["method", "flips the classifier", "the judge agrees", "mean L1", "flips that the judge does not confirm"]
    return f"{table(header, rows)}\n\n{n} test digits, targets: the runner-up. {provenance(result, 'quality')}"


def truth_table() -> str:
    """Touched markers by classifier and filter."""
    result = load("quality")
    shortcut, clean = result["truth"]["shortcut"], result["truth"]["clean"]
    rows = [
        [name, rate(shortcut[name]["touched"]), rate(clean[name]["touched"]), rate(shortcut[name]["flip"])]
        for name in shortcut
    ]
    header = ["setting", "`shortcut`: marker touched", "`clean`: marker touched", "`shortcut`: flipped"]
    return f"{table(header, rows)}\n\n{provenance(result, 'quality')}"


def pack_table() -> str:
    """What the pack's parts can do."""
    result = load("quality")
    pack = result["pack"]
    rows = [
        ["VAE reconstruction, PSNR", f"{number(pack['psnr_db'], 1)} dB"],
        ["500 generated digits that the judge recognises, guidance 1", rate(pack["generated_recognised_guidance_1"])],
        ["500 generated digits that the judge recognises, guidance 2", rate(pack["generated_recognised_guidance_2"])],
    ]
    for name, rules in pack["accuracy"].items():
        for rule, value in rules.items():
            rows.append([f"accuracy of `{name}`, markers {rule}", rate(value)])
    return f"{table(['figure, test split', 'measured'], rows)}\n\n{provenance(result, 'quality')}"


def exactness_table() -> str:
    """Largest error of one step against the literal baseline."""
    result = load("exactness")
    rows = []
    for dtype in ("float64", "float32"):
        for mode in ("zero", "project", "global", "off"):
            chosen = [r for r in result["one_step"] if r["dtype"] == dtype and r["filter"] == mode]
            worst, left = max(r["worst"] for r in chosen), max(r["left_out"] for r in chosen)
            rows.append([dtype, mode, f"{worst:.1e}", f"{100 * left:.1f} %"])
    loop = result["whole_loop"]
    rows.append(["float64", f"whole `{loop['preset']}` loop, {loop['steps']} steps", f"{loop['worst']:.1e}", "none"])
    header = ["dtype", "filter", "largest relative error", "left out near the angle limit"]
    return f"{table(header, rows)}\n\n{provenance(result, 'exactness')}"


KERNELS = ("consensus", "guided_update", "perturb", "soft_perturb", "curve")


def kernel_row(name: str, result: dict[str, Any], *times: str) -> list[str]:
    """One kernel: what and on which shape, its times, against eager torch, against a copy."""
    what = f"`{name}`" + (f", {result['pass']}" if "pass" in result else "")
    share = f"{100 * result['share_of_memcpy']:.0f} %" if "share_of_memcpy" in result else ""
    return [what, "x".join(map(str, result["shape"])), *times, f"{result['speedup_over_eager']:.1f}x", share]


def kernel_table() -> str:
    """The kernels on the CPU: time, against eager torch, against memcpy."""
    rows = []
    for name in KERNELS:
        result = load(f"kernels-{name}-cpu")
        seconds = result["seconds"]["ours"]
        rows.append(kernel_row(name, result, " / ".join(f"{1e3 * seconds[q]:.3g}" for q in ("p20", "p50", "p80"))))
    header = ["kernel (C++)", "shape", "ms, p20 / p50 / p80", "against eager torch", "of memcpy's bandwidth"]
    e = load("kernels-guided_update-cpu")["environment"]
    return (
        f"{table(header, rows)}\n\nRecorded in `bench/results/kernels-*-cpu.json` at commit `{e['commit']}`, "
        f"{e['date'][:10]}, {e['device']}, {e['threads']} threads, torch {e['versions']['torch']}."
    )


def gpu_kernel_table() -> str:
    """The Triton kernels on a GPU: time in a CUDA graph, against eager torch, against the device's copy."""
    rows = []
    for name in KERNELS:
        result = load(f"kernels-{name}-cuda")
        calls = result.get("calls_per_sample", 1)
        times = " / ".join(f"{1e6 * result['seconds']['ours'][q] / calls:.3g}" for q in ("p20", "p50", "p80"))
        called = result["seconds"].get("ours, called from Python")
        if name in ("consensus", "curve"):  # not in a graph
            called, times = result["seconds"]["ours"], ""
        rows.append(kernel_row(name, result, times, f"{1e6 * called['p50']:.0f}" if called else ""))
    header = [
        "kernel (Triton)", "shape", "us in a CUDA graph, p20 / p50 / p80", "us called from Python",
        "against eager torch", "of the copy's bandwidth",
    ]  # fmt: skip
    e, perturb = load("kernels-guided_update-cuda")["environment"], load("kernels-perturb-cuda")
    fill = perturb["fill_bytes_per_second"] / perturb["memcpy_bytes_per_second"]
    return (
        f"{table(header, rows)}\n\nRecorded in `bench/results/kernels-*-cuda.json` at commit `{e['commit']}`, "
        f"{e['date'][:10]}, {e['device']}, torch {e['versions']['torch']}, Triton {e['versions']['triton']}. "
        f"A GPU writes slower than it copies: a plain fill reaches {100 * fill:.0f} % of the copy's bandwidth."
    )


def gpu_table() -> str:
    """Stable Diffusion 1.x size on a GPU: counterfactuals under `fast` against the literal schedule."""
    result = load("gpu-counterfactual")
    rows = []
    for name, seconds in result["seconds_per_counterfactual"].items():
        gain = result["times_literal"][name]["same batch"]
        rows.append([name, f"{seconds['p50']:.3g} s", "" if name.startswith("literal") else f"{gain:.0f}x"])
    header = ["a counterfactual at 256x256, half precision", "p50", "times literal at the same batch"]
    tails = "; ".join(
        f"{name} {v['p50']:.2f}, {v['p95']:.2f}, {v['p99']:.2f} s" for name, v in result["latency_batch_1"].items()
    )
    return (
        f"{table(header, rows)}\n\nLatency at batch 1, CUDA graphs, p50, p95 and p99: {tails}. "
        f"{provenance(result, 'gpu-counterfactual')}"
    )


def gpu_step_table() -> str:
    """Stable Diffusion 1.x size on a GPU: one guided step in every runtime."""
    result = load("gpu-step")
    batches = [row["batch"] for row in result["rows"]]
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["seconds"]))
    rows = []
    for name in names:
        cells = []
        for row in result["rows"]:
            seconds, gain = row["seconds"].get(name), row["times_literal"].get(name)
            cells.append("" if seconds is None else f"{1e3 * seconds['p50']:.0f} ms ({gain:.2f}x)")
        rows.append([name, *cells])
    header = ["guided step at 256x256, half precision", *(f"batch {b} (times literal)" for b in batches)]
    notes: dict[str, list[int]] = {}
    for row in result["rows"]:
        for k, v in row["notes"].items():
            notes.setdefault(f"{k} ({v.split(': ', 1)[1].rstrip(': ')})", []).append(row["batch"])
    said = [f"{note} at batch {', '.join(map(str, b))}" for note, b in notes.items()]
    text = f"Not run: {'; '.join(said)}. " if said else ""
    return f"{table(header, rows)}\n\n{text}{provenance(result, 'gpu-step')}"


def real_models_table() -> str:
    """Full-size models with random weights: one guided step, by part."""
    result = load("real-models-cpu")
    rows = []
    for name, row in result.items():
        if name == "environment":
            continue
        parts = row["seconds_by_part"]
        forward = sum(v for k, v in parts.items() if "backward" not in k)
        share = f"{100 * forward / sum(parts.values()):.0f} %" if parts else ""
        memory = [f"{row[k]:.1f} GB" for k in ("weights_gb", "peak_of_step_gb")]
        rows.append([name, *memory, f"{row['seconds_of_step']:.0f} s", share])
    header = ["one guided step, 256x256, float32", "weights", "peak besides", "time", "of it forward"]
    return f"{table(header, rows)}\n\n{provenance(result, 'real-models-cpu')}"


def runtimes_table() -> str:
    """One guided step of the digits pack under every runtime."""
    result = load("runtimes")
    rows = []
    for row in result["rows"]:
        times = [
            f"{name} {1e3 * s['p50']:.0f} ms ({1e3 * s['p20']:.0f} to {1e3 * s['p80']:.0f})"
            for name, s in row["seconds"].items()
        ]
        worst = max(p["worst"] for p in row["parity"].values())
        ratios = [f"{row['times_literal']:.1f}", f"{row['times_eager']:.1f}", f"{worst:.0e}"]
        rows.append([f"{row['gradient']}, batch {row['batch']}", "<br>".join(times), row["fastest"], *ratios])
    header = ["guided step", "p50 (p20 to p80)", "fastest", "times literal", "times eager", "worst relative error"]
    return f"{table(header, rows)}\n\n{provenance(result, 'runtimes')}"


def metrics_table() -> str:
    """Constructed maps under three metrics, and the planner's speed."""
    result = load("metrics")
    rows = [
        [name, *(f"{v[m]:.3f}" for m in ("msi", "insertion", "deletion"))] for name, v in result["constructed"].items()
    ]
    header = ["map", "MSI, higher is better", "insertion, higher", "deletion, lower"]
    speed = []
    for row in result["speed"]:
        compiled, took = row["compiled_times"], {name: f"{1e3 * s:.0f} ms" for name, s in row["seconds"].items()}
        cells = [f"{row['images']}, {row['steps']}", took["ours"], *_against(row["times_quantus"], row["times_plain"])]
        if isinstance(compiled, dict):
            theirs = compiled.get("quantus", row["times_quantus"])
            cells += [took["ours, onnxruntime"], *_against(theirs, compiled["plain loop"])]
        speed.append(cells)
    names = ["images, steps", "ours", "Quantus / ours", "plain loop / ours"]
    names += ["compiled", "Quantus / compiled", "plain loop / compiled"]
    quick = table(names[: len(speed[0])], speed)
    share = 100 * result["resnet50"]["share_of_forwards"]
    return (
        f"{table(header, rows)}\n\nPixel flipping on the digits classifier ({result['device']}), the same masks and "
        f"forwards:\n\n{quick}\n\nOn a CPU the forwards are nearly all of it. With a ResNet-50 at 224x224 "
        f"perturbing costs {share:.1f} % of the forwards. {provenance(result, 'metrics')}"
    )


def _against(quantus: float | str, plain: float) -> list[str]:
    return ["not installed" if isinstance(quantus, str) else f"{quantus:.1f}", f"{plain:.1f}"]


def detector_table() -> str:
    """Planted causes: what the search for shortcuts finds, and false alarms."""
    if not (RESULTS / "audit-detector.json").exists():
        return "Not recorded yet: `python -m bench.audit detector`."
    result = load("audit-detector")
    rows = []
    for name, row in result["rows"].items():
        found = [
            f"rows {box[0]}-{box[2]}, columns {box[1]}-{box[3]} ({place['ratio']:.1f})"
            for place in row["places"][:1]
            for box in [place["box"]]
        ]
        found += [
            f"{s['name']} ({s['push'] / max(s['evidence'], 1e-12):.1f})"
            for s in row.get("statistics", ())  # records before there were any
            if s["found"]
        ]
        power = ", ".join(f"{100 * p:.0f} % of {n}" for n, p in row["power"].items())
        follows = f"{100 * row['reliance']['matching']:.0f} %, {100 * row['reliance']['conflicting']:.0f} %"
        same = rate(row["redrawn"]["same_answer"])
        rows.append([name, follows, f"{row['smallest_p']:.3f}", ", ".join(found[:3]), power, same])
    header = [
        "cause, classifier", "right side of 5 with the cause, against it", "smallest p",
        "what stands out (push over evidence)", "found in random subsets", "same answer when redrawn",
    ]  # fmt: skip
    text = f"{result['images']} {result['split']} digits."
    if nulls := result.get("nulls"):
        text += (
            f" Of {nulls['nulls']} sets of {nulls['images_each']} digits, markers and colours drawn anew for each, "
            f"{nulls['alarms']} raised a false alarm about the honest classifier; of as many random sets of 240 "
            f"among them, {nulls['alarms_of_240']}."
        )
    return f"{table(header, rows)}\n\n{text} {provenance(result, 'audit-detector')}"


def audits_table() -> str:
    """What audits were put through, as far as it was recorded."""
    said = {
        "kill": lambda r: (
            f"killed {r['kills']} times, {r['images']} images",
            f"every sample once: {r['ids_once']}; rows identical: {r['identical']}",
        ),
        "lock": lambda r: ("two processes on one folder", f"the second exits {r['second']}; {r['ids']} rows"),
        "disk": lambda r: (
            "disk full, unreadable images",
            f"{r['rows_kept']} rows kept, {r['rows']} at last; identical: {r['identical']}"
        ),
        "overhead": lambda r: (f"over bare counterfactuals, {r['images']} images", f"{100 * r['overhead']:.1f} %"),
        "memory": lambda r: (
            "peak memory, " + " and ".join(f"{k} images" for k in r["peak_mb"]),
            ", ".join(f"{v:.0f} MB" for v in r["peak_mb"].values()),
        ),
        "ray": lambda r: ("Ray, two actors, one killed", f"{r['rows']} rows, identical: {r['identical']}"),
        "report": lambda r: (
            f"report of {r['images']} images",
            f"{r['megabytes']:.1f} MB, opens in {max(v['seconds'] for v in r['opened'].values()):.1f} s",
        ),
    }  # fmt: skip
    recorded = {name: load(f"audit-{name}") for name in said if (RESULTS / f"audit-{name}.json").exists()}
    if not recorded:
        return "Not recorded yet: `python -m bench.audit --help`."
    rows = [list(said[name](result)) for name, result in recorded.items()]
    last = max(recorded, key=lambda name: recorded[name]["environment"]["date"])
    return f"{table(['audit', 'measured'], rows)}\n\n{provenance(recorded[last], f'audit-{last}')}"


def speed_table() -> str:
    """Time and quality of the speeds beside the literal loop, what is algorithm apart from what is compilation."""
    times, quality = load("speed-counterfactual"), load("speed-quality")
    seconds, gains = times["seconds_per_counterfactual"], times["times_literal"]
    best = times["best_literal_batch"]
    first = quality["rows"]["literal"]
    rows = [
        [f"literal, 171 steps, {best.split(', ')[1]}", f"{seconds[best]['p50']:.2f} s", "", "", "",
         rate(first["flip"]), rate(first["transfer"]), number(first["l1"]), f"{first['kid']['mean']:.4f}"]
    ]  # fmt: skip
    for name, row in quality["rows"].items():
        for label, what in (("full", "64 images"), ("one", "batch 1")):
            if f"{name}, {label}" in gains:
                gain, q = gains[f"{name}, {label}"], seconds[f"{name}, onnxruntime, {label}"]
                tail = f" (p95 {q['p95']:.2f}, p99 {q['p99']:.2f})" if label == "one" else ""
                shown = label == "full"
                rows.append([
                    f"`{name}`, {what}", f"{q['p50']:.3f} s{tail}", f"{gain['algorithm']:.0f}x",
                    f"{gain['compile']:.2f}x", f"**{gain['both']:.0f}x**",
                    *([rate(row["flip"]), rate(row["transfer"]), number(row["l1"]), f"{row['kid']['mean']:.4f}"]
                      if shown else [""] * 4),
                ])  # fmt: skip
    header = ["", "a counterfactual, p50", "by algorithm", "by compiling", "times literal", "flips", "the judge agrees",
              "mean L1", "KID"]  # fmt: skip
    return (
        f"{table(header, rows)}\n\nQuality: {quality['images']} pairs of test digits and targets. "
        f"{provenance(times, 'speed-counterfactual')}"
    )


def overhead_table() -> str:
    """What guidance costs: a guided step over an unguided one, and how near to the exact guidance it is."""
    result = load("speed-guided-step")
    rows = []
    for name, ratio in result["overhead"].items():
        if name.endswith(", compiled"):
            continue
        compiled = result["overhead"].get(f"{name}, compiled")
        fidelity = result["fidelity"].get(name)
        rows.append([
            name, f"{1e3 * result['seconds'][name]['p50']:.0f} ms", f"{ratio:.2f}",
            "" if compiled is None else f"{compiled:.2f}",
            "" if fidelity is None else f"{fidelity['p50']:.2f} ({fidelity['p20']:.2f} to {fidelity['p80']:.2f})",
        ])  # fmt: skip
    header = ["guided step", "eager", "times unguided, eager", "times unguided, compiled", "cosine to exact guidance"]
    return f"{table(header, rows)}\n\nBatch {result['batch']}. {provenance(result, 'speed-guided-step')}"


def pareto_table() -> str:
    """Every option alone, and the best of them combined."""
    result = load("pareto")
    rows = [
        [name, f"{r['cpu_seconds']:.2f} s", rate(r["flip"]), rate(r["transfer"]), number(r["l1"], 3), f"{r['kid']:.4f}"]
        for name, r in result["rows"].items()
    ]
    header = ["validation split", "CPU time an image", "flips", "the judge agrees", "mean L1", "KID"]
    return f"{table(header, rows)}\n\n{provenance(result, 'pareto')}"


def headline_table() -> str:
    """The figures that README shows, one a subject."""
    speed, quality, gpu = load("speed-counterfactual"), load("quality"), load("gpu-counterfactual")
    exact, explained, kill = load("exactness")["whole_loop"], load("explain"), load("audit-kill")
    files, coverage = load("portable-speed"), load("coverage")["summary"]["all"]
    flips, truth = quality["flips"]["table"]["ours"], quality["truth"]
    fast = speed["seconds_per_counterfactual"]["fast, onnxruntime, full"]["p50"]
    tiny = "fast, tiny decoder, cudagraphs, batch 16"
    on_gpu, gain = gpu["seconds_per_counterfactual"][tiny]["p50"], gpu["times_literal"][tiny]["same batch"]
    points = [explained["truth"][name]["lax"]["pointing"] for name in ("shortcut", "clean")]
    touched = [truth[name]["audit, 90 degrees"]["touched"] for name in ("shortcut", "clean")]
    rows = [
        ["speed-counterfactual", "a counterfactual, digits, `fast`, compiled, 2 CPU cores",
         f"{fast:.3f} s, {speed['times_literal']['fast, full']['both']:.0f}x the literal loop"],
        ["gpu-counterfactual", "a counterfactual, Stable Diffusion 1.x size, 256x256, one H200",
         f"{on_gpu:.3f} s, {gain:.0f}x the literal loop"],
        ["quality", "digits that flip the classifier", rate(flips["flip"])],
        ["quality", "digits for which a judge that guidance never sees says the target", rate(flips["transfer"])],
        ["quality", "planted shortcut, mode `audit`: the marker is touched (for a clean classifier)",
         f"{rate(touched[0])}, {rate(touched[1])}"],
        ["explain", "LAX points at the planted cause (for a clean classifier)",
         f"{rate(points[0])}, {rate(points[1])}"],
        ["exactness", f"a whole loop of {exact['steps']} steps against plain PyTorch, float64, largest relative error",
         f"{exact['worst']:.1e}"],
        ["portable-speed", "a counterfactual from its one file, one CPU core", f"{files['whole']['p50']:.3f} s"],
        ["audit-kill", f"an audit of {kill['images']} images, killed {kill['kills']} times: no row differs",
         "yes" if kill["identical"] else "no"],
        ["coverage", f"of {coverage['entries']} modules, operations and architectures, exported and equal; "
         "the rest is refused", str(coverage["agrees"])],
    ]  # fmt: skip
    return table(["figure", "measured", "recorded in bench/results"], [[w, m, f"`{name}.json`"] for name, w, m in rows])


def one_file_table() -> str:
    """The whole counterfactual's file: speed, start and the page."""
    speed, start, node, page = (load(f"portable-{name}") for name in ("speed", "start", "node", "page"))
    rows = [
        ["a counterfactual in ONNX Runtime", f"{speed['whole']['p50']:.3f} s"],
        ["the same by the engine with compiled parts", f"{speed['engine']['p50']:.3f} s"],
        ["the same in Node", f"{node['seconds']['node']:.3f} s; same answers: {node['same answers']}"],
        ["`counterlens run`, process start to end", f"{start['counterlens run']['p50']:.2f} s"],
        ["`import torch` there, for comparison", f"{start['import torch']['p50']:.2f} s"],
        ["the page, one file", f"{page['bytes'] / 1e6:.1f} MB"],
        [
            "its first answer, and the next ones",
            f"{page['first answer']['p50']:.1f} s, {page['next answers']['p50']:.2f} s",
        ],
    ]
    return f"{table(['whole-run file, one thread', 'p50'], rows)}\n\n{provenance(speed, 'portable-speed')}"


def startup_table() -> str:
    """What a command waits for before and after it computes."""
    result = load("startup")
    ratios = result["times_import_torch"]
    rows = [[name, f"{t['p50']:.2f} s", f"{ratios[name]:.2f}"] for name, t in result["seconds"].items()]
    header = ["process, start to end", "p50", "times `import torch`"]
    return f"{table(header, rows)}\n\n{provenance(result, 'startup')}"


def coverage_table() -> str:
    """What the exporter was tried on."""
    result = load("coverage")
    rows = [[k, *(str(v.get(n, 0)) for n in ("entries", "agrees", "refused"))] for k, v in result["summary"].items()]
    header = ["what, with gradients where there are any", "tried", "agree with eager", "refused, with the reason"]
    return (
        f"{table(header, rows)}\n\nBatches {', '.join(map(str, result['batches']))}. {provenance(result, 'coverage')}"
    )


def converted_table() -> str:
    """ONNX files of torch's exporters as differentiable modules, against the modules that they were."""
    result = load("onnx-classifiers")
    made: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        said = f"{row['gradient']:.0e}" if row["converted"] else row["reason"]
        made.setdefault(row["architecture"], {})[row["exporter"]] = said
    rows = [[name, *(by.get(exporter, "") for exporter in ("dynamo", "torchscript"))] for name, by in made.items()]
    refused = "; ".join(f"{r['model']}: {r['said']}" for r in result["refused"])
    header = ["architecture, random weights", "gradient off by, `dynamo=True`", "`dynamo=False`"]
    said = "Relative to the largest entry of the original module's gradient."
    return f"{table(header, rows)}\n\n{said} Refused: {refused}. {provenance(result, 'onnx-classifiers')}"


def generators_table() -> str:
    """What a guided step of each published generator costs on paper."""
    result = load("generators")
    rows = [
        [name, f"{r['parameters'] / 1e9:.2f} B", " x ".join(map(str, r["latents"])), f"{r['weights_gib']:.1f} GiB",
         f"{r['peak_gib']:.1f} GiB", f"{r['tflop']:.0f}", f"{r['gib_moved']:.0f}",
         f"{max(r['h100_seconds_by_flops'], r['h100_seconds_by_bytes']):.2f} s"]
        for name, r in result["generators"].items()
    ]  # fmt: skip
    header = ["generator", "denoiser", "latents", "weights", "memory of a step", "TFLOP", "GiB moved", "H100 on paper"]
    return f"{table(header, rows)}\n\n{provenance(result, 'generators')}"


def angles_table() -> str:
    """What an angle limit keeps of random directions."""
    result = load("generators")
    rows = [[n, f"{a['share_at_45']:.2g}", f"{a['angle_of_45']:.1f}", f"{a['angle_of_50']:.1f}"]
            for n, a in result["angles"].items()]  # fmt: skip
    header = ["channels", "share kept at 45 degrees", "limit in place of 45", "limit in place of 50"]
    return f"{table(header, rows)}\n\n{provenance(result, 'generators')}"


TABLES = {
    "generators": generators_table,
    "angles": angles_table,
    "headline": headline_table,
    "onefile": one_file_table,
    "startup": startup_table,
    "coverage": coverage_table,
    "converted": converted_table,
    "surrogates": surrogates_table,
    "metrics": metrics_table,
    "pointing": pointing_table,
    "faithfulness": faithfulness_table,
    "robust": robust_table,
    "seeds": seeds_table,
    "costs": costs_table,
    "detector": detector_table,
    "audits": audits_table,
    "speed": speed_table,
    "overhead": overhead_table,
    "pareto": pareto_table,
    "runtimes": runtimes_table,
    "real": real_models_table,
    "kernels": kernel_table,
    "gpukernels": gpu_kernel_table,
    "gpu": gpu_table,
    "gpusteps": gpu_step_table,
    "counterfactuals": counterfactual_table,
    "truth": truth_table,
    "pack": pack_table,
    "exactness": exactness_table,
    "regions": regions_table,
    "several": several_table,
    "turbo": turbo_table,
}


def fill(text: str) -> str:
    """Replace every marked table in a text."""

    def one(match: re.Match[str]) -> str:
        name = match.group(1)
        try:
            content = TABLES[name]()
        except FileNotFoundError as error:
            content = f"Not recorded yet: {Path(error.filename).name} is missing in `bench/results`."
        return f"<!-- {name} -->\n{content}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", one, text, flags=re.S)


WORSE = 0.10  # a figure that became worse by more than this is a regression


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Figures of two recorded results that became worse by more than `WORSE`, as lines.

    Raises:
        ValueError: they were recorded on different devices or thread counts, or have no figure in common.
    """
    for key in ("device", "threads"):
        a, b = old["environment"][key], new["environment"][key]
        if a != b:
            raise ValueError(f"{key}: {a!r} and {b!r} cannot be compared")
    before, after = old.get("figures", {}), new.get("figures", {})
    common = [name for name in before if name in after]
    if not common:
        raise ValueError("figures: the two results have none in common")
    out = []
    for name in common:
        a, b = before[name]["value"], after[name]["value"]
        change = (b / a if before[name]["better"] == "lower" else a / b) - 1
        if not change <= WORSE:
            out.append(f"{name}: {a:.4g} became {b:.4g} {before[name]['unit']}, {100 * change:.0f} % worse")
    return out


def compare(old: Path, new: Path) -> None:
    """Print what became worse; exit code 1 if anything did, 2 if the files cannot be compared."""
    try:
        lines = regressions(*(json.loads(path.read_text()) for path in (old, new)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        typer.echo(f"error: compare: {error}", err=True)
        raise typer.Exit(2) from error
    for line in lines:
        typer.echo(line)
    if lines:
        raise typer.Exit(1)


def main(
    check: Annotated[bool, typer.Option(help="Fail if that would change a file.")] = False,
    compared: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", help="Two recorded results, old and new.")
    ] = None,
) -> None:
    """Rewrite the tables, or compare two recorded results (fails where a figure became 10 % worse).

    Example: python -m bench.report --compare old.json bench/results/speed-counterfactual.json
    """
    if compared is not None:
        compare(*compared)
        return
    for path in FILES:
        old = path.read_text()
        new = fill(old)
        if check and new != old:
            raise SystemExit(f"{path.name}: its tables are not those of bench/results; run python -m bench.report")
        path.write_text(new)


if __name__ == "__main__":
    typer.run(main)
