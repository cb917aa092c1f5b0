"""A saliency method and a metric from outside the package: one file each, registered or found by its entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.metrics.table import METRICS, Metric
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.saliency.methods import explain_with
from counterlens.engine.saliency.table import METHODS, Method, check_methods
from counterlens.engine.tables import Table

BRIGHTNESS = """
from counterlens.engine.saliency.table import Method

def brightness(question, images):
    return images.mean(1)

METHOD = Method("brightness", brightness, "how bright a pixel is")
"""
MEAN = """
import torch
from counterlens.engine.metrics.table import Metric

def mean(scoring):
    return scoring.saliency.mean((1, 2))

def by_image(scoring):
    return list(range(len(scoring.images))), mean(scoring).tolist()

METRIC = Metric("mean_saliency", mean, False, "mean", "mean of the map", curve=by_image, axes=("mean", "image", "mean"))
"""
ENTRIES = """
[counterlens.methods]
brightness = outside_method:METHOD
[counterlens.metrics]
mean_saliency = outside_metric:METRIC
"""
# What people type, one after another in one process: opening torch takes seconds each time.
SESSION = """
import sys
from counterlens.engine.cli.main import app

def command(*words):
    app(list(words), prog_name="counterlens", standalone_mode=False)

registered, out = sys.argv[1] == "registered", sys.argv[2]
if registered:
    from outside_method import METHOD
    from counterlens.engine.saliency.table import METHODS
    METHODS.register(METHOD)
for name in ("saliency", "evaluate", "audit"):
    command(name, "--help")
if registered:
    from outside_metric import METRIC
    from counterlens.engine.metrics.table import METRICS
    METRICS.register(METRIC)
assert registered or "outside_method" not in sys.modules
assert registered or "torch" not in sys.modules
command("samples", "--count", "2", "--out", out + "/digits")
command("saliency", out + "/digits", "--method", "brightness", "--out", out + "/maps")
command("evaluate", "--methods", "brightness,gradcam", "--count", "3", "--out", out + "/compared")
command(
    "audit", out + "/digits", "--saliency", "brightness", "--no-counterfactuals", "--shortcuts", "0", "--no-report",
    "--out", out + "/audit",
)
from counterlens.engine import Engine, load_image
import torch
engine = Engine.from_pack("digits")
images = torch.stack([load_image(p, 32) for p in __import__("pathlib").Path(out, "digits").glob("*.png")])
found = engine.explain(images, method="brightness", metrics=["mean_saliency", "msi"])
low, high = images.mean(1).flatten(1).amin(1), images.mean(1).flatten(1).amax(1)
assert torch.equal(found.saliency, (images.mean(1) - low[:, None, None]) / (high - low)[:, None, None])
assert torch.equal(found.values["mean_saliency"], found.saliency.mean((1, 2)))
assert "mean_saliency" in found.record(0)
"""


@pytest.mark.parametrize("how", ["registered", "installed"])
def test_a_method_and_a_metric_of_another_package(how: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    site = tmp_path / "site"
    site.mkdir()
    (site / "outside_method.py").write_text(BRIGHTNESS)
    (site / "outside_metric.py").write_text(MEAN)
    if how == "installed":
        info = site / "outside-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(ENTRIES)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SESSION, how, str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("brightness") >= 3  # of saliency, evaluate and audit
    lines = [json.loads(line) for line in (tmp_path / "maps" / "results.jsonl").read_text().splitlines()]
    assert [0 < line["mean_saliency"] < 1 for line in lines] == [True, True]
    summary = json.loads((tmp_path / "compared" / "summary.json").read_text())
    assert list(summary) == ["brightness", "gradcam"]
    assert summary["gradcam"]["mean_saliency"]["n"] == 3
    rows = parquet.read_table(tmp_path / "compared" / "scores.parquet").to_pylist()
    assert len(rows) == 6
    assert all(0 < row["mean_saliency"] < 1 for row in rows)
    charts = sum(metric.curve is not None for metric in METRICS.values())  # of our own; one more is the outsider's
    assert Image.open(tmp_path / "compared" / "curves.png").width == round(110 * 5.2 * (charts + 1))
    audited = next((tmp_path / "audit").glob("**/*.parquet"))
    assert audited.exists()


def test_what_no_table_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("counterlens.methods", Method, METHODS.values())
    with pytest.raises(UsageError, match=r"counterlens\.methods: 'ig' is there already"):
        table.register(Method("ig", "nowhere:f", ""))
    with pytest.raises(UsageError, match=r"counterlens\.methods: expected a Method, got Metric"):
        table.register(Metric("m", lambda s: s, None, "", ""))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"method: expected one of lax, .*rise, got 'brightness'"):
        check_methods(["brightness"])
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[counterlens.methods]\nig = broken:METHOD\nb = broken:METHOD\nc = broken:NONE\nd = nothing_there:METHOD\n"
    )
    (tmp_path / "broken.py").write_text("METHOD = 'a text'\n")
    monkeypatch.syspath_prepend(tmp_path)
    table = Table("counterlens.methods", Method, METHODS.values())
    assert {"b", "c", "d"} <= set(table)
    for name, words in (
        ("ig", "'ig' of broken has a name that is taken"),
        ("b", "'b' of broken: expected a Method of that name, got 'a text'"),
        ("c", "'c' of broken cannot be imported"),
        ("d", "'d' of broken cannot be imported"),
    ):
        with pytest.raises(CounterlensError, match=words):
            table[name]


class Opaque(nn.Module):
    """What a runtime or a service gives: logits without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean((2, 3)) @ self.weight.T).detach()


@pytest.mark.parametrize("name", METHODS)
def test_the_table_says_what_a_method_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, images = METHODS[name], torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    opaque = SoftmaxClassifier(Opaque(), ["0", "1"])
    if method.adapter:
        with pytest.raises(UsageError, match=f"adapter: method {name} needs"):
            explain_with(name, opaque, images)
    elif method.gradients:
        with pytest.raises((RuntimeError, UsageError)):
            explain_with(name, opaque, images)
    else:
        assert explain_with(name, opaque, images)[0].shape == (1, 16, 16)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    if method.captum:
        with pytest.raises(CounterlensError, match="captum cannot be imported"):
            explain_with(name, opaque, images)
    elif not (method.adapter or method.gradients):
        assert explain_with(name, opaque, images)[0].shape == (1, 16, 16)
    assert method.about
