"""What an audit can read, and what it says of what it cannot."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterlens.engine.audit.sources import open_source
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images import load_image


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed))
    return path


def test_folders_flat_and_by_class(tmp_path: Path) -> None:
    name = "é" * 60 + "界.png"
    for where in (tmp_path / "3" / "a.png", tmp_path / "7" / name, tmp_path / "b.png"):
        save(where)
    (tmp_path / "3" / "notes.txt").touch()
    save(tmp_path / "3" / "deeper" / "c.png")
    source = open_source(tmp_path)
    assert [(s.id, s.label) for s in source.samples] == [("b.png", None), ("3/a.png", "3"), (f"7/{name}", "7")]
    assert ["deeper" in n for n in source.notes] == [True, False]
    assert "1 files are no images" in source.notes[1]
    before = source.digest()
    (tmp_path / "b.png").write_bytes(b"more" + picture())
    assert open_source(tmp_path).digest() != before


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("needs a file system that takes any bytes as a name")
    import os

    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(picture())
    source = open_source(tmp_path)
    assert source.samples[0].id == "\\xff.png"
    assert load_image(source.read(source.samples[0]), 8).shape == (3, 8, 8)


def test_links_that_lead_back_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"loop is a link back to"):
        open_source(tmp_path)
    (tmp_path / "loop").unlink()
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert [s.id for s in open_source(tmp_path).samples] == ["a.png", "lost.png"]  # recorded when it is read


def test_csv_manifest(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("\ufeffimage,label,target,id,camera\nx/a.png,3,,one,left\nb.png,,7,,\n")
    source = open_source(path, ["camera"])
    one, two = source.samples
    assert (one.id, one.where, one.label, one.target, one.slices) == (
        "one", tmp_path / "x" / "a.png", "3", None, {"camera": "left"},
    )  # fmt: skip
    assert (two.id, two.label, two.target, two.slices) == ("b.png", None, "7", {"camera": "none"})
    (tmp_path / "labels.csv").write_text("file,label,marker\na.png,1,none\n")
    assert open_source(tmp_path / "labels.csv", ["marker"]).samples[0].slices == {"marker": "none"}
    for text, slices, words in [
        ("picture\na.png\n", (), "no column `image`; it has picture"),
        ("image,lable\na.png,3\n", (), "unknown columns 'lable'.*--slice"),
        ("image\na.png\n", ("camera",), "no column 'camera'"),
        ("image,label\n,3\n", (), "line 2: no image"),
        ("image\na.png,3\n", (), "line 2: more fields"),
        ("image\na.png\nb.png\na.png\n", (), "id 'a.png' stands twice"),
        ("image\n", (), "holds no sample"),
        ("", (), "it has no column"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            open_source(path, slices)


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    for name, words in [("empty", "no image"), ("none", "no such file"), ("a.txt", "expected a folder"),
                        ("a.parquet", "cannot be read as Parquet")]:  # fmt: skip
        with pytest.raises(UsageError, match=words):
            open_source(tmp_path / name)
    save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"^slice: .*folder"):
        open_source(tmp_path, ["camera"])


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_parquet_with_bytes(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [picture(i) for i in range(5)]
    images = pa.array(data) if kind == "binary" else pa.array([{"bytes": b, "path": None} for b in data])
    table = pa.table({"image": images, "label": pa.array(["3", "4", "5", None, "7"]), "other": pa.array(range(5))})
    path = tmp_path / "set.parquet"
    pq.write_table(table, path, row_group_size=2)
    source = open_source(path)
    assert source.kind == "parquet-bytes"
    assert [s.label for s in source.samples] == ["3", "4", "5", None, "7"]
    assert source.notes == ["columns not read: other"]
    for i in (4, 0, 3):
        expected = load_image(io.BytesIO(data[i]), 16)
        assert (load_image(source.read(source.samples[i]), 16) - expected).abs().max() == 0
    pq.write_table(pa.table({"image": pa.array([1, 2])}), path)
    with pytest.raises(UsageError, match="column `image` is int64"):
        open_source(path)


def test_parquet_manifest_and_missing_bytes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "label": [3, None]}), path)
    source = open_source(path)
    assert [(s.where, s.label) for s in source.samples] == [(tmp_path / "a.png", "3"), (tmp_path / "b.png", None)]
    pq.write_table(pa.table({"image": pa.array([picture(), None])}), path)
    source = open_source(path)
    with pytest.raises(CounterlensError, match="no image bytes"):
        source.read(source.samples[1])


def test_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        | {"camera": datasets.Value("string")}
    )  # fmt: skip
    rows = {"image": [{"bytes": picture(i)} for i in range(3)], "label": [1, 0, 1], "camera": ["l", "r", "l"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set", ["camera"])
    assert source.kind == "datasets"
    assert [(s.id, s.label, s.slices["camera"]) for s in source.samples] == [
        ("000000", "dog", "l"), ("000001", "cat", "r"), ("000002", "dog", "l"),
    ]  # fmt: skip
    expected = load_image(io.BytesIO(picture(2)), 16)
    assert (load_image(source.read(source.samples[2]), 16) - expected).abs().max() == 0


def test_bytes_that_are_no_image(tmp_path: Path) -> None:
    for data, words in [(b"", "an empty file"), (b"text", "not an image"), (picture()[:60], "cannot be read|not an")]:
        with pytest.raises(CounterlensError, match=f"^sample 7: ({words})"):
            load_image(io.BytesIO(data), 16, "sample 7")
