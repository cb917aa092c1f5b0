"""What a profile looks like: terminal, Perfetto trace, self-contained page."""

from __future__ import annotations

import json
from typing import Any

from ..terminal import Terminal
from .profile import Profile
from .recorder import Span

# One colour for one name everywhere: UNet blue, decoder orange, classifier violet, what is in no part grey.
COLOURS = {
    "UNet, conditional": "#8fc1e3",
    "UNet, unconditional": "#5b9bc8",
    "UNet, both": "#5b9bc8",
    "UNet, VJP": "#1f5a86",
    "decoder": "#e8b77d",
    "decoder, VJP": "#c0692b",
    "classifier and distance": "#b9a3d0",
    "classifier and distance, VJP": "#6a4c93",
    "filter and update": "#2e8b57",
    "predictions": "#d5c7e6",
    "encode": "#c9b458",
    "inversion": "#7fb7a4",
    "guided step": "#2f6f9f",
    "unguided step": "#a7cbd9",
    "decode": "#f0cfa6",
    "between the parts": "#8c8c8c",
    "bookkeeping": "#b5b5b5",
    "unattributed": "#dcdcdc",
}


def print_profile(profile: Profile, console: Terminal) -> None:
    """The tables of a terminal."""
    console.print(
        f"{profile.images} images in calls of {profile.batch} ({profile.slots} slots), {profile.steps} steps each; "
        f"{profile.runtime} on {profile.device} ({profile.why})"
    )
    total = sum(profile.stages.values())
    rows = [[name, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}"] for name, seconds in profile.stages.items()]
    console.table(["where the time of an image goes", "ms", "share"], rows)
    of = "" if profile.parts_runtime == profile.runtime else f" (in {profile.parts_runtime}: compiled, it is one call)"
    rows = []
    for name, part in profile.parts.items():
        times = f" ({part.calls:g} x)" if part.calls != 1 else ""
        rows.append([
            name + times, f"{part.seconds * 1e3:.2f}", f"{part.share:.1%}", f"{part.gflop:.2f}",
            f"{part.mbytes:.1f}", f"{part.roofline:.0%}", f"{part.peak_mbytes:.1f}",
        ])  # fmt: skip
    rows.append(["between the parts", "", f"{profile.gap_share:.1%}", "", "", "", ""])
    columns = ["part", "ms", "share", "GFLOP", "MB", "roofline", "peak MB"]
    console.table(columns, rows, title=f"a guided step{of}")
    rows = [
        [name, *(f"{levels[p] * 1e3:.2f} ms" for p in ("p50", "p95", "p99")), str(int(levels["count"]))]
        for name, levels in (("a call", profile.latency), ("a guided step", profile.step))
    ]
    console.table(["latency", "p50", "p95", "p99", "of"], rows)
    overhead = profile.overhead
    console.print(
        f"guidance overhead: {overhead['step']:.2f} times an unguided step ({overhead['guided_step'] * 1e3:.1f} ms "
        f"against {overhead['unguided_step'] * 1e3:.1f} ms), {overhead['image']:.2f} times an unguided image"
    )
    console.print(
        f"limits reached here: {profile.limits['flops'] / 1e9:.0f} GFLOP/s, "
        f"{profile.limits['bandwidth'] / 1e9:.1f} GB/s; unattributed: {profile.unattributed_share:.1%}"
    )


def perfetto(spans: list[Span]) -> str:
    """The spans as a trace for ui.perfetto.dev or chrome://tracing."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "counterlens"}},
        {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "guided sampling"}},
    ]
    events += [
        {"ph": "X", "pid": 1, "tid": 1, "name": s.name, "ts": s.start * 1e6, "dur": s.seconds * 1e6} for s in spans
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>counterlens profile</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; } @media (max-width: 700px) { td, th { padding-right: .45rem; font-size: .8rem; } }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } tr { border-bottom: 1px solid #eee; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; } .figures b { display: block; font-size: 1.5rem; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .85rem; margin: .5rem 0; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; border-radius: 2px; }
.note { color: #666; font-size: .9rem; } svg { display: block; width: 100%; height: auto; }
</style></head><body>
<h1>Where a counterfactual's time goes</h1>
<p class="note">{{ p.images }} images in calls of {{ p.batch }} ({{ p.slots }} slots), {{ p.steps }} steps each.
Runtime: {{ p.runtime }} ({{ p.why }}) on {{ p.device }}. Times in bars and table are means.</p>
<div class="figures">
<div><b>{{ ms(p.latency.p50) }}</b>a call, median (p95 {{ ms(p.latency.p95) }}, p99 {{ ms(p.latency.p99) }})</div>
<div><b>{{ ms(p.step.p50) }}</b>a guided step, median (p95 {{ ms(p.step.p95) }}, p99 {{ ms(p.step.p99) }})</div>
<div><b>{{ "%.2f" | format(p.overhead.step) }} x</b>an unguided step, {{ "%.2f" | format(p.overhead.image) }} x an
unguided image</div>
<div><b>{{ "%.1f" | format(100 * p.unattributed_share) }} %</b>of the time is in no stage</div>
</div>
{% macro bar(title, values) %}
<h2>{{ title }}</h2>
{% set total = values.values() | sum %}
<svg viewBox="0 0 1000 40" role="img" aria-label="{{ title }}" preserveAspectRatio="none">
{% set at = namespace(x=0) %}{% for name, seconds in values.items() %}{% set width = 1000 * seconds / total %}
<rect x="{{ at.x }}" y="0" width="{{ width }}" height="40" fill="{{ colour(name) }}"><title>{{ name }}: {{ ms(seconds)
}}, {{ "%.1f" | format(100 * seconds / total) }} %</title></rect>
{% set at.x = at.x + width %}{% endfor %}</svg>
<div class="key">{% for name, seconds in values.items() %}<span><i style="background:{{ colour(name) }}"></i>{{ name }}
{{ ms(seconds) }}, {{ "%.1f" | format(100 * seconds / total) }} %</span>{% endfor %}</div>
{% endmacro %}
{{ bar("An image", stages) }}
{{ bar("A guided step" ~ of, parts) }}
<div class="wide" tabindex="0"><table>
<tr><th>part</th><th>time</th><th>share</th><th>calls</th><th>GFLOP</th><th>MB moved</th>
<th>of roofline</th><th>peak MB</th></tr>
{% for name, part in p.parts.items() %}<tr><td>{{ name }}</td><td>{{ ms(part.seconds) }}</td>
<td>{{ "%.1f" | format(100 * part.share) }} %</td><td>{{ "%g" | format(part.calls) }}</td>
<td>{{ "%.2f" | format(part.gflop) }}</td><td>{{ "%.1f" | format(part.mbytes) }}</td>
<td>{{ "%.0f" | format(100 * part.roofline) }} %</td><td>{{ "%.1f" | format(part.peak_mbytes) }}</td></tr>{% endfor %}
<tr><td>between the parts</td><td>{{ ms(parts["between the parts"]) }}</td>
<td>{{ "%.1f" | format(100 * p.gap_share) }} %</td></tr></table></div>
<p class="note">Limits reached here: {{ "%.0f" | format(p.limits.flops / 1e9) }} GFLOP/s in a large matrix product,
{{ "%.1f" | format(p.limits.bandwidth / 1e9) }} GB/s in a large copy. Of roofline: the time that these allow over the
time that it took; what stays in caches can lift it over 100 %.</p>
<h2>Step by step</h2>
<div class="wide"><svg viewBox="0 0 {{ width }} 230" style="min-width:{{ [width, 300] | min }}px;
max-width:{{ [2 * width, 1100] | min }}px" role="img"
aria-label="Time of each part in each step">
{% for row in rows %}{% set at = namespace(y=200) %}{% for name, seconds in row.items() %}
{% set height = 200 * seconds / longest %}{% set at.y = at.y - height %}
<rect x="{{ loop0(row) * pitch + 2 }}" y="{{ at.y }}" width="{{ pitch - 4 }}" height="{{ height }}"
fill="{{ colour(name) }}"><title>step {{ loop0(row) + 1 }}, {{ name }}: {{ ms(seconds) }}</title></rect>
{% endfor %}{% if loop0(row) % every == 0 %}<text x="{{ loop0(row) * pitch + pitch / 2 }}" y="218" font-size="12"
text-anchor="middle" fill="#666">{{ loop0(row) + 1 }}</text>{% endif %}{% endfor %}</svg></div>
<div class="key">{% for name in step_names %}<span><i style="background:{{ colour(name) }}"></i>{{ name }}</span>
{% endfor %}<span>the highest column is {{ ms(longest) }}</span></div>
</body></html>
"""


def page(profile: Profile) -> str:
    """A page that needs nothing else: figures, stacked bars by part and by step, the table of the parts."""
    from jinja2 import Environment

    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

    rows = profile.per_step
    pitch = max(6, min(60, 1000 // max(len(rows), 1)))
    places = {id(row): i for i, row in enumerate(rows)}
    of = "" if profile.parts_runtime == profile.runtime else f" (timed in {profile.parts_runtime})"
    parts = {name: part.seconds * 1.0 for name, part in profile.parts.items()}
    parts["between the parts"] = max(0.0, profile.gap_share) * sum(parts.values()) / max(1e-9, 1 - profile.gap_share)
    return (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(PAGE)
        .render(
            p=profile, ms=ms, colour=COLOURS.__getitem__, stages=profile.stages, parts=parts, of=of, rows=rows,
            pitch=pitch, width=pitch * len(rows),
            longest=max(sum(row.values()) for row in rows), every=max(1, 40 // pitch),
            loop0=lambda row: places[id(row)], step_names=list(dict.fromkeys(n for row in rows for n in row)),
        )
    )  # fmt: skip
