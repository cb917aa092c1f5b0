"""Audits on tiny models: rows, resuming after every kind of stop, refusals, failures, merging, the command line."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.engine.audit import results as results_module
from counterlens.engine.audit.auditor import open_auditor
from counterlens.engine.audit.merge import estimate, merge
from counterlens.engine.audit.results import TIMINGS, Results, part_path
from counterlens.engine.audit.rows import changes
from counterlens.engine.audit.run import Interrupted
from counterlens.engine.audit.summary import interval, summarise
from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images.files import as_saved, load_image, save_png
from counterlens.engine.metrics.msi_score import msi
from counterlens.engine.models.protocols import SoftmaxClassifier
from counterlens.engine.models.tiny import TinyDecoder
from counterlens.engine.outputs import locked
from counterlens.engine.saliency.methods import explain_with
from tests.engine.images.test_sources import picture, save

SETTINGS = {
    "steps": 4, "strength": 0.5, "guidance_scale": 3.0, "class_scale": 2.0, "distance_scale": 0.25, "angle": 60,
}  # fmt: skip
COUNT, PART = 11, 4


def make_engine(
    tiny, module: torch.nn.Module | None = None, guidance_decoder: TinyDecoder | None = None, **config: Any
) -> Engine:
    diffusion, classifier = tiny
    explained = classifier if module is None else SoftmaxClassifier(module, classifier.labels)
    tuned = {"realistic": SETTINGS, "audit": SETTINGS | {"angle": 90}}
    return Engine(diffusion, explained, Config(**config), pack_settings=tuned, guidance_decoder=guidance_decoder)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(COUNT - 1):
        save(folder / str(i % 3) / f"{i}.png", i)
    (folder / "1" / "broken.png").write_bytes(picture()[:50])
    return folder


def run(engine: Engine, source: Path, out: Path, **options: Any) -> Results:
    options = {"part_size": PART, "insight": False, "report": False, "workers": 1} | options
    return engine.audit(source, out, **options)


def comparable(results: Results) -> list[dict[str, Any]]:
    """Rows without timings, and the images' bytes."""
    rows = []
    for row in results.rows():
        files = [row[k] for k in row if isinstance(row[k], str) and row[k].startswith("images/")]
        row |= {f"bytes of {f}": (results.folder / f).read_bytes() for f in files}
        rows.append({k: v for k, v in row.items() if k not in TIMINGS})
    return rows


@pytest.fixture(scope="module")
def unbroken(tiny, source: Path, tmp_path_factory) -> Results:
    return run(make_engine(tiny), source, tmp_path_factory.mktemp("unbroken"), judges={"other": tiny[1]})


def test_rows_say_what_the_engine_says(tiny, source: Path, unbroken: Results) -> None:
    rows = list(unbroken.rows())
    assert [r["number"] for r in rows] == list(range(COUNT))
    assert len({r["id"] for r in rows}) == COUNT
    broken = next(r for r in rows if r["id"] == "1/broken.png")
    assert (broken["status"], broken["image"], broken["flipped"]) == ("failed", None, None)
    assert "cannot be read" in broken["error"] or "not an image" in broken["error"]
    engine = make_engine(tiny)
    part = [r for r in rows if r["part"] == 0]
    images = torch.stack([load_image(source / r["id"], 16) for r in part])
    direct = engine.counterfactual(images)
    for i, row in enumerate(part):
        record = direct.record(i)
        assert row["prediction"] == record["source"]
        assert row["label"] == row["id"][0]
        assert row["correct"] == (row["label"] == row["prediction"])
        for name in ("target", "flipped", "seed"):
            assert row[name] == record[name]
        for name in ("l1", "l2", "target_confidence"):
            assert row[name] == pytest.approx(record[name], abs=1e-6)
        assert torch.equal(load_image(unbroken.folder / row["counterfactual"], 16), as_saved(direct.images[i]))
        assert torch.equal(load_image(unbroken.folder / row["image"], 16), images[i])
        assert row["judges"] == {"other": row["counterfactual_prediction"]}
        assert row["transfer"] == row["flipped"]
        assert sum(row["change_grid"]) / 64 == pytest.approx(row["l1"], abs=1e-5)


def test_links_to_themselves_are_rows(tiny, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    for name in ("self.png", "self", "cat"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "in" / name)
    engine = make_engine(tiny)
    for _ in range(2):
        results = run(engine, tmp_path / "in", tmp_path / "out")
        assert {r["id"]: r["status"] for r in results.rows()} == {"a.png": "done", "self.png": "failed"}
    run(engine, tmp_path / "in" / "self.png", tmp_path / "alone", overwrite=True)
    with pytest.raises(UsageError, match="cannot be written"):
        run(engine, tmp_path / "in", tmp_path / "in" / "self")


def test_the_folder_explains_itself(unbroken: Results) -> None:
    manifest = json.loads((unbroken.folder / "manifest.json").read_text())
    assert manifest["identity"]["source"]["samples"] == COUNT
    assert manifest["identity"]["config"]["steps"] == 4
    assert set(manifest["finished"]["parts"]) == {part_path(p) for p in range(3)}
    assert manifest["sessions"][0]["versions"]["torch"] == torch.__version__
    assert not list(unbroken.folder.rglob("*.partial"))


def test_other_tools_read_it(unbroken: Results) -> None:
    import pyarrow.dataset as ds

    assert ds.dataset(unbroken.folder / "rows").count_rows() == COUNT
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.read_parquet(unbroken.folder / "rows")
    assert len(frame) == COUNT
    assert frame.loc[frame.status == "done", "l1"].notna().all()


@pytest.mark.parametrize("package", ["polars", "duckdb"])
def test_other_databases_read_it(unbroken: Results, package: str) -> None:
    module = pytest.importorskip(package, reason=f"needs {package}")
    pattern = f"{unbroken.folder}/rows/*/*.parquet"
    if package == "polars":
        assert module.read_parquet(pattern).height == COUNT
    else:
        assert module.sql(f"select count(distinct id) from '{pattern}'").fetchall() == [(COUNT,)]


def test_stopped_at_every_write_it_goes_on(tiny, source: Path, unbroken: Results, tmp_path: Path, monkeypatch) -> None:
    """A crash before and after each of several files, also in the middle of a part; then the same command again."""

    class Crash(BaseException):
        pass

    engine, judges = make_engine(tiny), {"other": tiny[1]}
    real = results_module.write_atomically
    for stop in (0, 1, 2, 7, 11, 12):
        writes = 0

        def crashing(path: Path, data: bytes | str, stop: int = stop, **options: object) -> None:
            nonlocal writes
            if writes == stop:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f".{path.name}.1.partial").touch()
                raise Crash
            writes += 1
            real(path, data, **options)

        for module in ("results", "run"):
            monkeypatch.setattr(f"counterlens.engine.audit.{module}.write_atomically", crashing)
        out = tmp_path / str(stop)
        with pytest.raises(Crash):
            run(engine, source, out, judges=judges)
        for module in ("results", "run"):
            monkeypatch.setattr(f"counterlens.engine.audit.{module}.write_atomically", real)
        assert comparable(run(engine, source, out, judges=judges)) == comparable(unbroken)


def test_another_audit_is_not_mixed_in(tiny, source: Path, unbroken: Results, tmp_path: Path) -> None:
    engine, out, judges = make_engine(tiny), unbroken.folder, {"other": tiny[1]}
    before = comparable(unbroken)
    for words, change in [
        (r"config\.steps was 4, is 6", {"config": Config(steps=6)}),
        (r"config\.seed was 0, is 1", {"config": Config(seed=1)}),
        (r"options\.target was \"runner-up\", is \"3\"", {"target": "3"}),
        (r"model\.judges\.other was .*, is none", {"judges": None}),
        (r"shard was null, is \[1, 2\]", {"shard": (1, 2)}),
    ]:
        with pytest.raises(UsageError, match=f"holds another audit: .*{words}"):
            run(engine, source, out, **({"judges": judges} | change))
    other = SoftmaxClassifier(torch.nn.Sequential(tiny[1].module, torch.nn.Identity()), tiny[1].labels)
    with pytest.raises(UsageError, match=r"model\.weights was"):
        run(make_engine(tiny, other.module), source, out, judges=judges)
    (tmp_path / "a.png").write_bytes(picture(1))
    with pytest.raises(UsageError, match=r"source\.digest was"):
        run(engine, tmp_path, out, judges=judges)
    assert comparable(unbroken) == before


def test_folders_that_are_no_audit_or_an_older_one(tiny, source: Path, unbroken: Results, tmp_path: Path) -> None:
    engine = make_engine(tiny)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match=r"is no audit and holds 'thesis.txt'"):
        run(engine, source, tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    for schema, words in (
        (0, "made as version 0 of the format, this is version 1; nothing was changed"),
        (3, r"manifest\.json: written by a newer counterlens \(schema 3; this one knows 1\): update.*; nothing was"),
    ):
        manifest = json.dumps(unbroken.manifest | {"schema_version": schema})
        (old / "manifest.json").write_text(manifest)
        with pytest.raises(UsageError, match=words):
            run(engine, source, old)
        assert (old / "manifest.json").read_text() == manifest
    with pytest.raises(UsageError, match="no audit there"):
        Results.open(source)


def test_a_second_process_is_refused(tiny, source: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(CounterlensError, match="is in use by another process"):
        run(make_engine(tiny), source, tmp_path)


def test_a_part_that_is_damaged_is_named(tiny, source: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny)
    results = run(engine, source, tmp_path, limit=5)
    path = tmp_path / part_path(1)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CounterlensError, match=r"part-000001\.parquet: cannot be read.*remove it"):
        run(engine, source, tmp_path, limit=5)
    path.unlink()
    run(engine, source, tmp_path, limit=5)
    assert len(list(results.rows())) == 5


def test_a_full_disk(tiny, source: Path, unbroken: Results, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: plan and manifest fit, a part does not; then there is room."""
    engine, judges = make_engine(tiny), {"other": tiny[1]}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
        with pytest.raises(CounterlensError, match=r"part-000000\.parquet: cannot be written \(File too large\)"):
            run(engine, source, tmp_path, judges=judges)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.rglob("*.partial"))
    assert comparable(run(engine, source, tmp_path, judges=judges)) == comparable(unbroken)


class Taste(Exception):
    """A model's own class of errors."""


class Stubborn(torch.nn.Module):
    """Raises on any batch with an image whose first pixel is `mark`."""

    def __init__(self, inner: torch.nn.Module, mark: float) -> None:
        super().__init__()
        self.inner, self.mark = inner, mark

    def forward(self, image: Tensor) -> Tensor:
        if (image[:, 0, 0, 0] - self.mark).abs().min() < 1e-4:
            raise Taste("this image is not to my taste")
        return self.inner(image)


def test_the_culprit_of_a_failing_batch_is_found(tiny, source: Path, tmp_path: Path) -> None:
    mark = load_image(source / "1" / "4.png", 16)[0, 0, 0].item()
    rows = {r["id"]: r for r in run(make_engine(tiny, Stubborn(tiny[1].module, mark)), source, tmp_path).rows()}
    assert rows["1/4.png"]["status"] == "failed"
    assert rows["1/4.png"]["error"] == "Taste: this image is not to my taste"
    assert [i for i, r in rows.items() if r["status"] == "failed"] == ["1/4.png", "1/broken.png"]
    assert all(r["l1"] > 0 for r in rows.values() if r["status"] == "done")


def test_ctrl_c_finishes_the_running_part(tiny, source: Path, unbroken: Results, tmp_path: Path) -> None:
    engine, judges, said = make_engine(tiny), {"other": tiny[1]}, []
    pressed = threading.Event()

    def press(progress: Any, part: float) -> None:
        if part > 0 and not pressed.is_set():
            pressed.set()
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"interrupted with 4 of {COUNT} samples done; the same command goes on"):
        run(engine, source, tmp_path, judges=judges, on_progress=press, say=said.append)
    assert signal.getsignal(signal.SIGINT) is before
    assert "press Ctrl-C again" in said[0]
    assert comparable(run(engine, source, tmp_path, judges=judges, say=said.append)) == comparable(unbroken)
    assert said[1] == f"going on: 4 of {COUNT} samples are done"


def test_shards_merge_to_the_same_rows(tiny, source: Path, unbroken: Results, tmp_path: Path) -> None:
    engine, judges = make_engine(tiny), {"other": tiny[1]}
    for n in (1, 2, 3):
        run(engine, source, tmp_path / str(n), judges=judges, shard=(n, 3))
    with pytest.raises(CounterlensError, match=r"1 of 3 parts are missing; run or finish shards 2/3"):
        merge([tmp_path / "1", tmp_path / "3"], tmp_path / "all")
    merged = merge([tmp_path / n for n in "123"], tmp_path / "all")
    assert comparable(merged) == comparable(unbroken)
    assert comparable(run(engine, source, tmp_path / "all", judges=judges)) == comparable(unbroken)
    run(engine, source, tmp_path / "other", shard=(2, 3), target="3", judges=judges)
    with pytest.raises(UsageError, match=r"options\.target was"):
        merge([tmp_path / "1", tmp_path / "other"], tmp_path / "mixed")
    with pytest.raises(UsageError, match="is one of the shards"):
        merge([tmp_path / "1"], tmp_path / "1")
    with pytest.raises(UsageError, match=r"^shard: "):
        run(engine, source, tmp_path / "4", shard=(4, 3))


def chosen(engine: Engine, source: Path, **options: Any) -> list[str]:
    return [c.sample.id for c in open_auditor(engine, source, **options).plan()]


def test_filters(tiny, source: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny)
    everything = chosen(engine, source)
    assert len(everything) == COUNT
    assert chosen(engine, source, limit=3) == everything[:3]
    drawn = chosen(engine, source, per_class=2)
    assert [d[0] for d in drawn] == list("001122")
    assert chosen(engine, source, per_class=2, sample_seed=1) != drawn
    images = torch.stack([load_image(source / i, 16) for i in everything if "broken" not in i])
    p = engine.probabilities(images).max(dim=1)
    readable = [i for i in everything if "broken" not in i]
    wrong = [i for i, label in zip(readable, p.indices.tolist(), strict=True) if int(i[0]) != label]
    assert chosen(engine, source, only_misclassified=True) == wrong
    limit = p.values.median().item()
    below = [i for i, c in zip(readable, p.values.tolist(), strict=True) if c < limit]
    assert chosen(engine, source, only_below=limit) == below
    assert chosen(engine, source, only_below=limit, limit=2) == below[:2]
    with pytest.raises(CounterlensError, match="passes the filters"):
        chosen(engine, source, only_below=1e-6)


def test_options_that_do_not_fit(tiny, source: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny)
    for options, words in [
        ({"limit": 0}, "^limit:"), ({"only_below": 2.0}, "^only_below:"), ({"budget_s": 0.0}, "^budget_s:"),
        ({"image_format": "gif"}, "^image_format:"), ({"counterfactuals": False}, "^counterfactuals:"),
        ({"target": "eleven"}, "^target: 'eleven'"), ({"colour": 1}, "^colour: no option"),
        ({"judges": {"j": SoftmaxClassifier(tiny[1].module, ["a"])}}, "^judge: the labels of j"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=words):
            run(engine, source, tmp_path, **options)
    save(tmp_path / "src" / "a.png")
    with pytest.raises(UsageError, match=r"^only_misclassified: needs true labels; 1 of 1"):
        chosen(engine, tmp_path / "src", only_misclassified=True)
    save(tmp_path / "src" / "cats" / "a.png")
    auditor = open_auditor(engine, tmp_path / "src")
    assert auditor.notes == ["the folders (cats, ...) are no labels of the classifier; taken as groups"]
    save(tmp_path / "src" / "3" / "a.png")
    with pytest.raises(UsageError, match=r"^label: 'cats' .* is none of the classifier's labels"):
        chosen(engine, tmp_path / "src")


def test_wrong_predictions_are_led_to_the_truth_and_away(tiny, source: Path, tmp_path: Path) -> None:
    rows = [r for r in run(make_engine(tiny), source, tmp_path, insight=True, limit=8).rows() if r["correct"] is False]
    assert rows
    labels = tiny[1].labels
    for row in rows:
        image = load_image(tmp_path / row["image"], 16)
        towards = load_image(tmp_path / row["true_counterfactual"], 16)
        assert (towards - image).abs().mean().item() == pytest.approx(row["true_l1"], abs=1e-6)
        p = make_engine(tiny).probabilities(towards[None])[0]
        assert row["true_flipped"] == (labels[int(p.argmax())] == row["label"])
        assert row["true_grid"] == pytest.approx(changes(image, towards)["change_grid"], abs=1e-6)
        if row["away_l1"] is not None:
            assert row["away_prediction"] != row["prediction"]
            candidates = [row["l1"]] if row["counterfactual_prediction"] != row["prediction"] else []
            assert row["away_l1"] <= min([*candidates, 9.0])


def test_estimate_writes_nothing(tiny, source: Path, tmp_path: Path) -> None:
    auditor = open_auditor(make_engine(tiny), source, part_size=PART, insight=False)
    e = estimate(auditor)
    assert (e.samples, e.measured_on) == (COUNT, PART)
    assert e.seconds > 0
    assert e.bytes > COUNT * 500


def test_intervals() -> None:
    assert interval([]).mean is None
    assert interval([None, 3.0]) == interval([3.0])
    assert (interval([3.0]).low, interval([3.0]).n) == (None, 1)
    v = interval([0.0] * 30 + [1.0] * 70)
    assert (v.mean, v.n) == (0.7, 100)
    assert 0.59 < v.low < 0.63 < 0.77 < v.high < 0.81  # 0.7 -+ 1.96 sqrt(0.21 / 100)
    assert interval([1.0] * 20).low == pytest.approx(0.05 ** (1 / 20))
    w = interval([float(i) for i in range(100)])
    assert 43 < w.low < 45 < 54 < w.high < 56  # 49.5 -+ 1.96 * 28.9 / 10


def test_summary_counts(unbroken: Results) -> None:
    rows, s = list(unbroken.rows()), summarise(unbroken)
    assert (s.samples, s.done, s.failed) == (COUNT, COUNT - 1, 1)
    flips = [r["flipped"] for r in rows if r["flipped"] is not None]
    assert s.overall["flipped"].mean == pytest.approx(sum(flips) / len(flips))
    assert sum(g["samples"] for g in s.by_class) == COUNT - 1
    moved = sum(1 for r in rows if r["counterfactual_prediction"] not in (None, r["prediction"]))
    assert sum(s.pairs.values()) == moved
    assert "1 failed" in s.lines()[0]


def test_webp_and_paths(tiny, source: Path, tmp_path: Path) -> None:
    results = run(make_engine(tiny), source, tmp_path, image_format="webp", limit=4)
    row = next(results.rows())
    assert row["counterfactual"] == "images/000/000000/000-counterfactual.webp"
    assert (load_image(tmp_path / row["image"], 16) - load_image(source / row["id"], 16)).abs().max() == 0


class RootOfCorner(torch.nn.Module):
    """A classifier of which the gradient is NaN where the first pixel is black; its answers are finite."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.1 * x[:, :1, 0, 0].sqrt()


@pytest.mark.parametrize("method", ["gradxinput", "rise"])
def test_saliency_and_its_scores(tiny, source: Path, tmp_path: Path, method: str) -> None:
    """Rows hold what saliency and MSI say, the smallest sufficient area too; one image without a gradient is said."""
    folder = tmp_path / "images"
    shutil.copytree(source, folder)
    black = load_image(source / "1" / "4.png", 16)
    black[:, 0, 0] = 0
    save_png(black, folder / "1" / "4.png")
    engine = make_engine(tiny, RootOfCorner(tiny[1].module))
    results = run(engine, folder, tmp_path / "out", saliency=method, counterfactuals=False)
    rows = {r["id"]: r for r in results.rows()}
    failed = {name for name, r in rows.items() if r["status"] == "failed"} - {"1/broken.png"}
    assert failed == ({"1/4.png"} if method == "gradxinput" else set())
    if failed:
        assert rows["1/4.png"]["error"] == "saliency: gradxinput: NaN or infinity for this image"
        assert not rows["0/0.png"]["retried"]
    done = {name: r for name, r in rows.items() if r["status"] == "done"}
    for name, row in done.items():
        image = load_image(folder / name, 16)[None]
        saliency = explain_with(method, engine.classifier, image, baseline="blur")[0]
        expected = msi(engine.classifier, image, saliency, baseline="blur")
        assert row["msi"] == pytest.approx(expected.score.item(), abs=1e-4)
        assert row["sufficient_area"] == pytest.approx(expected.sufficient_area.item(), abs=1e-6)
        assert row["deletion_curve"] == pytest.approx(expected.curves.remove[0].tolist(), abs=1e-4)
        assert (load_image(tmp_path / "out" / row["saliency"], 16) - saliency).abs().max() < 0.003
        assert row["target"] is row["counterfactual"] is None
    assert summarise(results).overall["msi"].n == len(done) >= COUNT - 2


def test_nan_of_classifier_or_judge_is_that_row_s(tiny, source: Path, tmp_path: Path, unbroken: Results) -> None:
    class NaNFor(torch.nn.Module):
        """An answer of NaN for one image."""

        def __init__(self, image: Tensor) -> None:
            super().__init__()
            self.inner, self.image = tiny[1].module, image

        def forward(self, x: Tensor) -> Tensor:
            same = (x.detach() - self.image).flatten(1).abs().amax(1) < 1e-6
            return self.inner(x).masked_fill(same[:, None], torch.nan)

    made = {r["id"]: r for r in unbroken.rows()}
    picture = load_image(source / "1" / "4.png", 16)
    changed = load_image(unbroken.folder / made["2/5.png"]["counterfactual"], 16)
    judge = SoftmaxClassifier(NaNFor(changed), tiny[1].labels)
    results = run(make_engine(tiny, NaNFor(picture)), source, tmp_path, judges={"other": judge})
    rows = {r["id"]: r for r in results.rows()}
    assert rows["1/4.png"]["error"] == "classifier: NaN or infinity for this image"
    assert rows["2/5.png"]["error"] == "judge other: NaN or infinity for this image"
    assert rows["2/5.png"]["transfer"] is None
    assert {n for n, r in rows.items() if r["status"] == "failed"} == {"1/4.png", "2/5.png", "1/broken.png"}
    assert rows["0/3.png"]["l1"] == pytest.approx(made["0/3.png"]["l1"], abs=1e-5)


def test_every_row_of_an_audit_with_lax_has_its_area(source: Path, tmp_path: Path) -> None:
    """By the ranks of the logits: LAX's maps are saturated, and a saturated map has only ties."""
    from counterlens.engine.packs import Pack
    from counterlens.engine.saliency.explain import pack_adapter

    pack = Pack("digits")
    engine = Engine.from_pack("digits", runtime="eager", device="cpu")
    drawn = pack.samples("test", count=4)
    (tmp_path / "in").mkdir()
    for i, image in enumerate(drawn.images):
        save_png(image, tmp_path / "in" / f"{i}.png")
    rows = list(run(engine, tmp_path / "in", tmp_path / "out", saliency="lax", counterfactuals=False).rows())
    adapter = pack_adapter(pack, "clean", engine.classifier)
    images = torch.stack([load_image(tmp_path / "in" / r["id"], 32) for r in rows])
    maps = adapter.explain(images)
    by_rank = msi(engine.classifier, images, maps.scores, quantity=adapter.quantity, baseline=pack.mean_colour)
    assert [r["sufficient_area"] for r in rows] == pytest.approx(by_rank.sufficient_area.tolist(), abs=1e-6)
    assert all(0 < r["sufficient_area"] <= 1 for r in rows)
    explained = engine.explain(images)
    assert explained.record(0)["sufficient_area"] == pytest.approx(rows[0]["sufficient_area"], abs=1e-6)


def test_saliency_of_the_engine(tiny, source: Path, tmp_path: Path) -> None:
    rows = list(run(make_engine(tiny), source, tmp_path, saliency="gradxinput", limit=2).rows())
    assert all(r["msi"] is not None and r["saliency"] and r["flipped"] is not None for r in rows)
    assert all(0 < r["sufficient_area"] <= 1 for r in rows)
