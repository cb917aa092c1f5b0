"""What an audit can read, and what it says of what it cannot."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images.files import load_image
from counterlens.engine.images.sources import open_source, open_sources


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
    assert "1 file left out, not read by the ending: 3/notes.txt" in source.notes[1]
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


def test_each_image_once_whatever_links_lead_back(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for where in ("a.png", "cat/b.png", "cat/deep/c.png"):
        save(root / where)
    save(tmp_path / "elsewhere" / "d.png")
    links = {"loop": root, "up": tmp_path, "alias": root / "cat", "cat/back": root, "cat/deep/round": root / "cat",
             "other": tmp_path / "elsewhere", "other2": tmp_path / "elsewhere"}  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "self").symlink_to(root / "self")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "lost.png").symlink_to(root / "nowhere.png")
    ids = ["a.png", "lost.png", "self.png", "cat/b.png", "other/d.png"]  # lost and self are recorded when read
    source = open_source(root)
    assert [s.id for s in source.samples] == ids
    for name in ("loop", "up", "alias", "other2"):
        assert any(f"in/{name} is a link to" in note for note in source.notes)
    deep = open_source(root, recursive=True)
    assert [(s.id, s.label) for s in deep.samples] == [
        ("a.png", None), ("lost.png", None), ("self.png", None), ("cat/b.png", "cat"), ("cat/deep/c.png", "cat"),
        ("other/d.png", "other"),
    ]  # fmt: skip
    everything = open_sources([root, root / "loop", root / "a.png", root / "cat"])
    assert [s.path.name for s in everything.samples] == ["a.png", "lost.png", "self.png", "b.png", "d.png", "c.png"]
    assert any("named twice" in note for note in everything.notes)


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in ("IMG_1.CR3", "b.xyz", "notes.txt", "x.parquet"):
        (tmp_path / name).touch()
    save(tmp_path / "cat" / "deep" / "c.png")
    deeper, left = open_source(tmp_path).notes
    assert "1 folder below class folders not read (--recursive does): cat/deep" in deeper
    assert left == "4 files left out, not read by the ending: IMG_1.CR3, b.xyz, notes.txt, x.parquet"
    (tmp_path / "a.png").unlink()
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(UsageError, match=r"holds no image \(.*IMG_1\.CR3"):
        open_source(tmp_path)


def test_pipes_and_unreadable_folders_are_samples_that_fail() -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's own folders are closed to others
        folder = Path(made)
        folder.chmod(0o755)
        save(folder / "a.png")
        os.mkfifo(folder / "pipe.png")
        os.mkfifo(folder / "m.csv")
        save(folder / "locked" / "b.png")
        (folder / "locked").chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may read all
            source = open_source(folder)
            assert [s.id for s in source.samples] == ["a.png", "pipe.png", "locked"]
            assert source.samples[0].load(8).shape == (3, 8, 8)
            for sample, words in zip(source.samples[1:], ["a named pipe", "the folder cannot be read"], strict=True):
                with pytest.raises(CounterlensError, match=rf"{sample.id}: {words}"):
                    sample.load(8)
            assert len(source.digest()) == 16
            with pytest.raises(UsageError, match="locked cannot be read"):
                open_source(folder / "locked")
            with pytest.raises(UsageError, match=r"m\.csv: a named pipe"):
                open_source(folder / "m.csv")
        finally:
            os.seteuid(user)
            (folder / "locked").chmod(0o700)


ROWS = [("a.png", "3", "7"), ("sub/b c.png", "4", None)]
WRITTEN: dict[str, bytes] = {
    "plain": b"image,label,target\na.png,3,7\nsub/b c.png,4,\n",
    "mark": b"\xef\xbb\xbfimage,label,target\r\na.png,3,7\r\nsub/b c.png,4,\r\n",
    "semicolons": b'"image";"label";"target"\na.png;3;7\nsub/b c.png;4;\n',
    "tabs": b"image\tlabel\ttarget\na.png\t3\t7\nsub/b c.png\t4\t\n",
    "bars": b"image|label|target\na.png|3|7\nsub/b c.png|4|\n",
    "excel's line": b"sep=;\r\nimage;label;target\r\na.png;3;7\r\nsub/b c.png;4;\r\n",
    "old mac": b"image,label,target\ra.png,3,7\rsub/b c.png,4,\r",
    "no last end, blank lines, spaces": b"\n image , Label,TARGET\n\n a.png ,3, 7\n,,\n  \nsub/b c.png,4",
    "trailing commas": b"image,label,target,\na.png,3,7,\nsub/b c.png,4,,\n",
    "utf-16": "image,label,target\na.png,3,7\nsub/b c.png,4,\n".encode("utf-16"),
    "utf-16 be": b"\xfe\xff" + "image;label;target\na.png;3;7\nsub/b c.png;4;\n".encode("utf-16-be"),
    "utf-16 without a mark": "image,label,target\na.png,3,7\nsub/b c.png,4,\n".encode("utf-16-le"),
    "utf-32": "image,label,target\na.png,3,7\nsub/b c.png,4,\n".encode("utf-32"),
    "quotes": b'"image","label","target"\r\n"a.png","3","7"\r\n"sub/b c.png","4",""\r\n',
    "backslashes": b"image,label,target\na.png,3,7\nsub\\b c.png,4,\n",
    "pandas": b",file,label,target\n0,a.png,3,7.0\n1,sub/b c.png,4,nan\n",
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_tables_as_programs_write_them(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "sub" / "b c.png")
    path = tmp_path / "m.csv"
    path.write_bytes(WRITTEN[kind])
    source = open_sources([path])
    found = [(s.where, s.label, "7" if s.target == "7.0" else s.target) for s in source.samples]
    assert found == [(tmp_path / image, label, target) for image, label, target in ROWS]
    assert all(s.load(8).shape == (3, 8, 8) for s in source.samples)


def test_tables_in_windows_1252_and_lines_inside_quotes(tmp_path: Path) -> None:
    save(tmp_path / "café.png")
    with open(os.fsencode(tmp_path) + b"/na\xefve.png", "wb") as file:
        file.write(picture())
    (tmp_path / "m.csv").write_bytes(b'image,label\ncaf\xe9.png,"two\nlines"\nna\xefve.png,\xe9\n')
    source = open_source(tmp_path / "m.csv")
    assert [(s.id, s.label) for s in source.samples] == [("café.png", "two\nlines"), ("naïve.png", "é")]
    assert "is not UTF-8 (line 2); read as Windows-1252" in source.notes[0]
    assert all(s.load(8).shape == (3, 8, 8) for s in source.samples)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file"), (b"\xef\xbb\xbf\n\n", "the file is empty"),
        (b"image,target\n", r"holds no sample: no line below the first \(image, target\)"),
        (b"image;label\r\n;\r\n", r"no line below the first \(image, label\)"),
        (b"picture\na.png\n", "no column `image`; it has picture"),
        (b"name;klass\na.png;3\n", "no column `image`; it has name, klass"),
        (b"image,lable\na.png,3\n", "unknown columns 'lable'; expected image, label, target, id; --slice"),
        (b"image,taget\na.png,3\n", "unknown columns 'taget'"),
        (b"image,label,label\na.png,3,4\n", "column 'label' stands twice"),
        (b"image,label\n,3\n", "line 2: no image"), (b"image,label\n\na.png,1\n\n,3\n", "line 5: no image"),
        (b"image\na.png,3\n", "line 2: more fields"), (b"image\na.png\nb.png\na.png\n", "id 'a.png' stands twice"),
        (b"image,id\na.png,x\nb.png,x\n", "id 'x' stands twice"),
        (b"image,label\na.png,3\nb\0.png,3\n", "line 3: a NUL byte"), (b"\0\0\0\0", "NUL|no text|not text"),
        (b'image,label\n"a.png,3\nb.png,4\n', "line 2: .*quote"), (b"image\n\x81\x8d\n", "line 2: not text"),
        (b"image\n" + b"x" * 200_000, "field larger"), (b"image\nhttps://e.org/a.png\n", "line 2: .*is an address"),
    ],
)  # fmt: skip
def test_tables_that_are_refused_say_where_and_why(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=rf"^source: .*m\.csv.*({words})") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lable", "Labels", "taget", "targets"])
def test_misspelt_columns_are_not_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.csv").write_text(f"image,camera,{name}\na.png,left,3\n")
    with pytest.raises(UsageError, match=f"unknown columns '{name}'; expected image, label, target, id$"):
        open_sources([tmp_path / "m.csv"])


def test_paths_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here, home, far = (save(tmp_path / p) for p in ("lists/a.png", "home/b b.png", "far/c.png"))
    tilde = save(tmp_path / "lists" / "~d.png")
    path = tmp_path / "lists" / "m.csv"
    url = far.as_uri().replace("c.png", "%63.png")
    path.write_text(f"image\na.png\n~/b b.png\n../far/c.png\n{far}\n{url}\n~d.png\n")
    found = [s.path.resolve() for s in open_source(path).samples]
    assert found == [here, home, far, far, far, tilde]


def test_an_image_may_have_two_targets_but_not_two_rows_of_an_audit(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("image,target\na.png,3\na.png,4\n")
    assert [s.target for s in open_sources([tmp_path / "m.csv"]).samples] == ["3", "4"]
    with pytest.raises(UsageError, match="stands twice"):
        open_source(tmp_path / "m.csv")


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
    with pytest.raises(UsageError, match=r"unknown columns 'marker'.*--slice"):
        open_source(tmp_path / "labels.csv")
    note = open_sources([tmp_path / "labels.csv"]).notes  # what `counterlens samples` writes, for other commands
    assert note == [f"{tmp_path / 'labels.csv'}: columns not read: 'marker'"]
    with pytest.raises(UsageError, match="no column 'camera'"):
        open_source(tmp_path / "labels.csv", ["camera"])


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    for name, words in [("empty", "no image"), ("none.csv", "no such file"), ("none", "none: no such file"),
                        ("none.png", "none.png: no such file"),
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
    assert source.notes == [f"{path}: columns not read: 'other'"]
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


def write_parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_structs_with_paths_and_numbers_that_pandas_made_floating(tmp_path: Path) -> None:
    import pyarrow as pa

    save(tmp_path / "images" / "a.png")
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array(
        [
            {"bytes": None, "path": "images/a.png"},
            {"bytes": picture(1), "path": "x"},
            {"bytes": None, "path": None},
            None,
        ],
        struct,
    )
    path = write_parquet(
        tmp_path / "set.parquet",
        {"image": images, "label": pa.array([3.0, None, float("nan"), 0.0]), "target": ["7.0", None, "x", ""]}
        | {"__index_level_0__": [1, 2, 3, 4]},
    )
    source = open_source(path)
    assert [(s.label, s.target) for s in source.samples] == [("3", "7.0"), (None, None), (None, "x"), ("0", None)]
    assert source.notes == []
    assert source.samples[0].load(8).shape == source.samples[1].load(8).shape == (3, 8, 8)
    for sample in source.samples[2:]:
        with pytest.raises(CounterlensError, match=rf"^{sample.id}: no image bytes"):
            sample.load(8)
    only = pa.array([{"path": "images/a.png"}], pa.struct([("path", pa.string())]))
    source = open_source(write_parquet(tmp_path / "paths.parquet", {"image": only}))
    assert source.samples[0].load(8).shape == (3, 8, 8)
    words = pa.array(["images/a.png", "images/lost.png"]).dictionary_encode()
    source = open_source(write_parquet(tmp_path / "words.parquet", {"image": words, "label": words}))
    assert [s.label for s in source.samples] == ["images/a.png", "images/lost.png"]
    source = open_source(write_parquet(tmp_path / "others.parquet", {"image": [picture()], "labels": ["3"]}))
    assert "columns not read: 'labels'" in source.notes[0]


def test_folders_of_parquet_shards(tmp_path: Path) -> None:
    for shard in range(3):
        columns = {"image": [picture(10 * shard + i) for i in range(2)], "label": [str(shard)] * 2}
        write_parquet(tmp_path / "data" / f"train-{shard:05d}.parquet", columns, row_group_size=1)
    source = open_source(tmp_path)
    assert [(s.id, s.label) for s in source.samples] == [
        (f"data/train-{shard:05d}-{i:06d}", str(shard)) for shard in range(3) for i in range(2)
    ]
    for i in (5, 0, 3):
        expected = load_image(io.BytesIO(picture(10 * (i // 2) + i % 2)), 16)
        assert torch.equal(source.samples[i].load(16), expected)
    before = source.digest()
    broken = tmp_path / "data" / "train-00001.parquet"
    broken.write_bytes(broken.read_bytes()[:100])
    source = open_source(tmp_path)
    assert [s.id for s in source.samples][2:4] == ["data/train-00001.parquet", "data/train-00002-000000"]
    with pytest.raises(CounterlensError, match=r"train-00001\.parquet: cannot be read as Parquet"):
        source.samples[2].load(16)
    assert source.digest() != before


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
