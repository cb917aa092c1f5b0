"""Scores of an audit's saliency maps beside MSI: moved maps, shape, a judge's; and what is called brittle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from counterlens.engine.audit.report import write_report
from counterlens.engine.audit.results import Results
from counterlens.engine.audit.rows import Row, table_bytes
from counterlens.engine.audit.summary import summarise
from counterlens.engine.errors import UsageError
from counterlens.engine.images.files import load_image
from counterlens.engine.metrics.robust import brittle
from counterlens.engine.saliency.explain import explain
from tests.engine.audit.test_audit import COUNT, make_engine, run, source  # noqa: F401

METRICS = ("shape", "insertion", "insertion_moved", "deletion_judge")


@pytest.fixture(scope="module")
def scored(tiny, source: Path, tmp_path_factory) -> Results:  # noqa: F811
    out = tmp_path_factory.mktemp("scored")
    options = {"saliency": "occlusion", "metrics": METRICS, "counterfactuals": False, "judges": {"other": tiny[1]}}
    return run(make_engine(tiny), source, out, report=True, **options)


def test_rows_hold_what_explain_says(tiny, source: Path, scored: Results) -> None:  # noqa: F811
    rows = [r for r in scored.rows() if r["status"] == "done"]
    assert len(rows) == COUNT - 1
    images = torch.stack([load_image(source / r["id"], 16) for r in rows[:4]])
    found = explain(tiny[1], images, "occlusion", metrics=METRICS, judge=tiny[1])
    for i, row in enumerate(rows[:4]):
        assert row["scores"] == pytest.approx({name: v[i].item() for name, v in found.values.items()}, abs=1e-5)
        assert row["brittle"] == bool(brittle({name: v[i : i + 1] for name, v in found.values.items()}))
        assert row["scores"]["deletion_judge"] == pytest.approx(row["scores"]["deletion_judge"])
    failed = next(r for r in scored.rows() if r["status"] == "failed")
    assert failed["scores"] is failed["brittle"] is None


def test_what_is_brittle() -> None:
    """Only what gets worse by more than a tenth, whichever way is better."""
    values = {
        "insertion": torch.tensor([0.9, 0.7]), "insertion_moved": torch.tensor([0.6, 0.7]),
        "deletion": torch.tensor([0.1, 0.1]), "deletion_moved": torch.tensor([0.1, 0.25]),
        "msi": torch.tensor([0.5, 0.5]), "msi_moved": torch.tensor([0.9, 0.9]),
    }  # fmt: skip
    assert brittle(values) == {"insertion": pytest.approx(0.15)}
    assert brittle({k: v[1:] for k, v in values.items()}) == {"deletion": pytest.approx(0.15)}


def test_summary_and_report_say_the_scores(scored: Results, tmp_path: Path) -> None:
    summary = summarise(scored)
    rows = [r for r in scored.rows() if r["scores"]]
    assert summary.scores["insertion"].mean == pytest.approx(sum(r["scores"]["insertion"] for r in rows) / len(rows))
    assert summary.record()["scores"]["insertion_moved"]["n"] == len(rows)
    assert any(line.startswith("insertion, moved ↑: ") for line in summary.lines())
    assert "How good the saliency maps are" in (scored.folder / "report.html").read_text()
    # The same audit, of maps that fall apart.
    made = Results.open(scored.folder)
    bad = Results(tmp_path, made.manifest)
    fallen = [
        Row(**r | {"scores": r["scores"] | {"insertion": 0.9, "insertion_moved": 0.5}, "brittle": True}) for r in rows
    ]
    (tmp_path / "rows" / "000").mkdir(parents=True)
    (tmp_path / "rows" / "000" / "part-000000.parquet").write_bytes(table_bytes(fallen, {}))
    broken = summarise(bad)
    assert broken.brittle == {"insertion": pytest.approx(0.4)}
    assert broken.brittle_maps.mean == 1
    assert "insertion gets worse by 0.40" in broken.lines()[-1] + broken.lines()[-2]
    shutil.copytree(scored.folder / "images", tmp_path / "images")
    assert "The saliency maps are brittle" in write_report(bad).read_text()


def test_older_audits_are_read_and_go_on(tiny, source: Path, tmp_path: Path) -> None:  # noqa: F811
    """Without metrics an audit is the same as before there were any; rows of then lack the columns."""
    import pyarrow.parquet as pq

    options = {"saliency": "gradxinput", "counterfactuals": False, "limit": 3}
    engine = make_engine(tiny)
    results = run(engine, source, tmp_path, **options)
    assert "metrics" not in results.manifest["identity"]["options"]
    path = results.part_files()[0]
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.drop_columns(["scores", "brittle"]), path)
    assert summarise(results).scores == {}
    assert next(iter(results.rows(["id", "scores"])))["scores"] is None
    assert "scores" not in json.dumps(summarise(results).record())
    run(engine, source, tmp_path, report=True, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": ["robust"]}, "metrics: they score saliency maps; give saliency"),
        ({"saliency": "rise", "metrics": ["robusd"]}, "metrics: expected groups"),
        ({"saliency": "rise", "metrics": ["judge"]}, "metrics: msi_judge needs another classifier"),
        ({"saliency": "rise", "metrics": ["masks"]}, "metrics: pointing_game needs masks"),
    ],
)
def test_what_cannot_be_scored_is_refused(tiny, source: Path, tmp_path: Path, options: dict, said: str) -> None:  # noqa: F811
    with pytest.raises(UsageError, match=said):
        run(make_engine(tiny), source, tmp_path, **options)
    assert not (tmp_path / "manifest.json").exists()
