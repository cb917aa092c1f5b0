"""Output folders tell the truth: one run each, every file says what made it, nothing foreign is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from counterlens.engine import Config, Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.outputs import LONGEST, append_line, open_run, output_names, safe_name
from tests.engine.cli.test_cli import QUICK, one_line_error, run

FACTS = {
    "command", "classifier", "mode", "settings", "run_seed", "versions", "weights", "runtime", "threads", "cpu",
    "schema_version",
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert run("samples", "--count", 3, "--marker", "matching", "--out", folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def made(digits: Path, tmp_path_factory) -> Path:
    """A finished run; tests copy it."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert run("counterfactual", digits, "--out", out, *QUICK).returncode == 0
    return out


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (".lock", "run.json")}


def test_every_line_picture_and_run_json_say_what_made_them(made: Path, digits: Path) -> None:
    assert len(lines(made)) == 3
    for line in lines(made):
        assert set(line) >= FACTS
        assert line["classifier"] == "clean"
        assert line["settings"]["steps"] == 4
        assert line["command"] == "counterlens counterfactual"
        kept = json.loads(Image.open(line["path"]).text["counterlens"])
        assert kept == {k: v for k, v in line.items() if k not in ("seconds", "path", "label")}
    described = json.loads((made / "run.json").read_text())
    assert set(described) >= FACTS - {"run_seed"} | {"seed"}
    assert set(described["files"]) == {p.name for p in made.iterdir()} - {"run.json", ".lock"}
    assert json.loads((digits / "run.json").read_text())["marker"] == "matching"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--classifier", "shortcut"], ["classifier", '"clean"', '"shortcut"', "weights"]),
        (["--mode", "audit"], ["mode", '"realistic"', '"audit"']),
        (["--target", "7"], ["target", '"runner-up"', '"7"']),
        (["--seed", "5"], ["seed", "0", "5"]),
        (["--angle", "30"], ["settings.angle", "30"]),
        (["--budget", "100"], ["budget_s", "null", "100"]),
        (["--resume", "--angle", "30"], ["settings.angle", "30"]),
        (["--runtime", "eager"], ["runtime_option", '"auto"', '"eager"']),
    ],
)
def test_another_run_is_refused_and_changes_nothing(
    made: Path, digits: Path, tmp_path: Path, change: list[str], words: list[str]
) -> None:
    out = tmp_path / "o"
    shutil.copytree(made, out)
    before = contents(out)
    result = run("counterfactual", digits, "--out", out, *QUICK, *change)
    one_line_error(result, 2, "--overwrite", *words)
    assert contents(out) == before


def test_the_same_again_skips_what_is_done(made: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    shutil.copytree(made, out)
    before = contents(out)
    result = run("counterfactual", digits, "--out", out, *QUICK, "--json")
    assert result.returncode == 0, result.stderr
    assert "3 of 3 are done already" in result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == lines(out)
    assert contents(out) == before


def test_a_stopped_run_goes_on(made: Path, digits: Path, tmp_path: Path) -> None:
    """A picture is gone, the last line was cut in the middle: those are made again, and no line is there twice."""
    out = tmp_path / "o"
    shutil.copytree(made, out)
    first, second, third = lines(out)
    text = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(text[:2]) + text[2][:50])
    pictures = {p.name for p in out.glob("*.png")}
    (out / Path(second["path"]).name).unlink()
    result = run("counterfactual", digits, "--out", out, *QUICK)
    assert result.returncode == 0, result.stderr
    assert "1 of 3 are done already" in result.stderr
    again = sorted(lines(out), key=lambda line: line["name"])
    assert [line["name"] for line in again] == [line["name"] for line in (first, second, third)]
    for line, before in zip(again, (first, second, third), strict=True):
        assert line.keys() == before.keys()
        assert line["l1"] == pytest.approx(before["l1"], abs=1e-4)  # a smaller batch is another shape
        assert all(line[k] == before[k] for k in ("image", "input_sha256", "target", "seed", "settings", "weights"))
    assert {p.name for p in out.glob("*.png")} == pictures


def test_more_images_need_resume_and_get_names_of_their_own(made: Path, digits: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "o", tmp_path / "other"
    shutil.copytree(made, out)
    other.mkdir()
    twin = other / lines(out)[0]["image"].split("/")[-1]
    shutil.copy(sorted(digits.glob("*.png"))[2], twin)
    before = contents(out)
    one_line_error(run("counterfactual", twin, "--out", out, *QUICK), 2, "--resume adds", "1 of these 1")
    assert run("counterfactual", twin, "--out", out, *QUICK, "--resume").returncode == 0
    after = contents(out)
    assert {k: after[k] for k in before if k.endswith(".png")} == {k: v for k, v in before.items() if ".png" in k}
    assert [line["name"] for line in lines(out)][-1] == f"{twin.stem}-2"
    assert len({line["path"] for line in lines(out)}) == 4


def test_an_image_that_changed_is_not_taken_for_the_old_one(digits: Path, tmp_path: Path) -> None:
    image, out = tmp_path / "a.png", tmp_path / "o"
    files = sorted(digits.glob("*.png"))
    shutil.copy(files[0], image)
    assert run("counterfactual", image, "--out", out, *QUICK).returncode == 0
    shutil.copy(files[1], image)
    one_line_error(run("counterfactual", image, "--out", out, *QUICK), 2, "a.png", "has changed")
    assert run("counterfactual", image, "--out", out, *QUICK, "--overwrite").returncode == 0
    assert len(lines(out)) == 1


def test_overwrite_removes_the_runs_files_and_no_others(made: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    shutil.copytree(made, out)
    (out / "notes.txt").write_text("mine")
    (out / "foreign.png").write_bytes(b"mine too")
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    described = json.loads((out / "run.json").read_text())
    described["files"] += ["../outside.txt", str(outside)]
    (out / "run.json").write_text(json.dumps(described))
    file = sorted(digits.glob("*.png"))[0]
    assert run("counterfactual", file, "--out", out, *QUICK, "--mode", "audit", "--overwrite").returncode == 0
    assert outside.read_text() == "mine"
    assert {p.name for p in out.iterdir()} - {".lock"} == {
        "notes.txt", "foreign.png", "run.json", "results.jsonl", file.name,
    }  # fmt: skip
    assert [line["mode"] for line in lines(out)] == ["audit"]


@pytest.mark.parametrize("foreign", ["{stem}.png", "results.jsonl"])
def test_foreign_files_are_never_overwritten(digits: Path, tmp_path: Path, foreign: str) -> None:
    file = sorted(digits.glob("*.png"))[0]
    path = tmp_path / foreign.format(stem=file.stem)
    path.write_bytes(b"mine")
    for more in ([], ["--overwrite"], ["--resume"]):
        one_line_error(run("counterfactual", file, "--out", tmp_path, *QUICK, *more), 2, path.name, "overwritten")
    assert path.read_bytes() == b"mine"
    assert not (tmp_path / "run.json").exists()


def test_inputs_are_never_removed(made: Path, tmp_path: Path) -> None:
    """The run that is overwritten may have made what the next one reads."""
    out = tmp_path / "o"
    shutil.copytree(made, out)
    picture = next(out.glob("*.png"))
    before = contents(out)
    one_line_error(run("counterfactual", picture, "--out", out, *QUICK, "--overwrite"), 2, "input", picture.name)
    one_line_error(run("evaluate", "--images", out, "--methods", "rise", "--out", out, "--overwrite"), 2, "input")
    assert contents(out) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"format": "counterlens-run"}'])
def test_a_run_json_that_says_nothing_is_refused(digits: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    one_line_error(run("counterfactual", digits, "--out", tmp_path, *QUICK), 2, "run.json", "another folder")
    assert (tmp_path / "run.json").read_text() == text


def test_a_run_that_failed_before_its_first_file_leaves_the_folder_free(digits: Path, tmp_path: Path) -> None:
    one_line_error(run("counterfactual", digits, "--out", tmp_path, "--steps", "1000"), 2, "steps")
    assert run("counterfactual", digits, "--out", tmp_path, *QUICK).returncode == 0


COMMANDS = {
    "samples": (["--count", 2], ["--count", 3], "labels.csv"),
    "demo": (["--count", 1], ["--count", 2], "counterfactuals.png"),
    "profile": (["--steps", 4, "--count", 1], ["--steps", 4, "--count", 2], "profile.json"),
    "metrics calibrate": (["--count", 4, "--steps", 2], ["--count", 4, "--steps", 3], "calibration.json"),
    "evaluate": (["--methods", "rise", "--count", 2], ["--methods", "rise", "--count", 3], "summary.json"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_one_rule_for_every_command(tmp_path: Path, command: str) -> None:
    """The same again is the same run; another is refused, replaced with --overwrite, and says so in run.json."""
    same, other, file = COMMANDS[command]
    call = [*command.split(), "--out", tmp_path]
    for arguments in (same, same):
        result = run(*call, *arguments)
        assert result.returncode == 0, result.stderr
    before = (tmp_path / file).read_bytes()
    changed = str(other[-1])
    one_line_error(run(*call, *other), 2, "--overwrite", f"is {changed}")
    assert (tmp_path / file).read_bytes() == before
    assert run(*call, *other, "--overwrite").returncode == 0
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["command"] == f"counterlens {command}"
    assert {"versions", "threads", "schema_version", "seed"} <= set(described)
    assert {p.name for p in tmp_path.iterdir()} == {*described["files"], "run.json", ".lock"}
    one_line_error(run("saliency", "nothing.png", "--out", tmp_path), 2, f"counterlens {command}")


def test_saliency_follows_the_same_rule(digits: Path, tmp_path: Path) -> None:
    file = sorted(digits.glob("*.png"))[0]
    call = ["saliency", file, "--method", "rise", "--out", tmp_path]
    assert run(*call).returncode == 0
    (line,) = lines(tmp_path)
    assert {"command", "classifier", "method", "versions", "weights", "threads", "run_seed"} <= set(line)
    assert json.loads(Image.open(line["path"]).text["counterlens"])["method"] == "rise"
    assert "1 of 1 are done already" in run(*call).stderr
    one_line_error(run(*call, "--alpha-min", 0.4), 2, "alpha_min was 0.5, is 0.4")
    one_line_error(run("counterfactual", file, "--out", tmp_path), 2, "overwrit")
    assert len(lines(tmp_path)) == 1


# Names


@pytest.mark.parametrize(
    "text",
    [
        "..",
        ".",
        "",
        "a/b",
        "../../etc/passwd",
        "a\nb",
        "a\0b",
        "-rf",
        ".hidden",
        "\udcff",
        "m" * 300,
        "日" * 120,
        "\x1b[2J",
    ],
)
def test_names_are_safe(tmp_path: Path, text: str) -> None:
    name = safe_name(text)
    assert len(name.encode()) <= LONGEST
    assert name[0] not in ".-"
    assert not set("/\\\n\0\x1b") & set(name)
    (tmp_path / f"{name}.safetensors").touch()
    assert [p.parent for p in tmp_path.iterdir()] == [tmp_path]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["x", "x", "x-2", "y", "x"], ["x", "x-2", "x-2-2", "y", "x-3"]),
        (["A", "a"], ["A", "a-2"]),
        (["é", "e\u0301"], ["é", "e\u0301-2"]),
        (["-a", "_a"], ["_a", "_a-2"]),
        (["straße", "STRASSE"], ["straße", "STRASSE-2"]),
    ],
)
def test_no_two_outputs_share_a_name(wanted: list[str], names: list[str]) -> None:
    assert output_names(wanted) == names


def test_long_names_that_begin_alike_stay_apart() -> None:
    a, b = output_names(["m" * 240 + "a", "m" * 240 + "b"])
    assert a != b


def test_one_failing_write_fails_that_image(digits: Path, tmp_path: Path, monkeypatch) -> None:
    from counterlens.engine.images import files as images

    files, out = sorted(digits.glob("*.png")), tmp_path / "o"
    real = images.write_atomically

    def full(path: Path, data: Any, **options: Any) -> None:
        if path.stem == files[1].stem:
            raise CounterlensError(f"{path}: cannot be written (No space left on device)")
        real(path, data, **options)

    monkeypatch.setattr(images, "write_atomically", full)
    result = run("counterfactual", *files, "--out", out, *QUICK)
    one_line_error(result, 1, files[1].name, "No space left")
    assert ["error" in line for line in lines(out)] == [False, True, False]
    monkeypatch.undo()
    assert run("counterfactual", *files, "--out", out, *QUICK).returncode == 0
    assert sorted((line["name"], "path" in line) for line in lines(out)) == [(f.stem, True) for f in files]


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "results.jsonl"
    append_line(path, {"a": 1})
    import resource

    size = path.stat().st_size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, old[1]))
    try:
        with pytest.raises(CounterlensError, match=r"results\.jsonl: cannot be written"):
            append_line(path, {"b": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == '{"a": 1}\n'


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with open_run(tmp_path, {"command": "a"}, files=["x"]), pytest.raises(CounterlensError, match="in use"):
        open_run(tmp_path, {"command": "a"}, files=["x"]).__enter__()


# Python


def test_save_follows_the_same_rule(tmp_path: Path) -> None:
    engine = Engine.from_pack("digits", "clean", Config(steps=4, strength=0.5))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = engine.counterfactual(images)
    before = os.umask(0o027)
    try:
        paths = result.save(tmp_path, ["A", "a"])
    finally:
        os.umask(before)
    assert [p.name for p in paths] == ["A.png", "a-2.png"]
    assert {p.stat().st_mode & 0o777 for p in tmp_path.glob("*.*n*")} == {0o640}
    assert all(set(line) >= FACTS | {"seed"} for line in lines(tmp_path))
    assert json.loads(Image.open(paths[0]).text["counterlens"])["weights"] == lines(tmp_path)[0]["weights"]
    assert result.save(tmp_path, ["A", "a"]) == paths
    assert len(lines(tmp_path)) == 2
    other = engine.counterfactual(1 - images)
    with pytest.raises(UsageError, match="resume=True adds them"):
        other.save(tmp_path, ["A", "a"])
    with pytest.raises(UsageError, match=r"settings\.steps was 4, is 5"):
        engine.counterfactual(images, config=Config(steps=5, strength=0.5)).save(tmp_path, ["A", "a"])
    assert [p.name for p in other.save(tmp_path, ["A", "b"], resume=True)] == ["A-3.png", "b.png"]
    assert len(lines(tmp_path)) == 4
    assert len(other.save(tmp_path, overwrite=True)) == 2
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["0000.png", "0001.png"]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (9, r"run\.json was written by a newer counterlens \(schema 9; this one knows 1\): update"),
        (0, r"run\.json is of version 0, this is version 1; choose another folder"),
    ],
)
def test_a_run_of_another_schema_is_refused_and_left_as_it_is(schema: int, words: str, tmp_path: Path) -> None:
    with open_run(tmp_path, {"command": "a"}, files=["x"]) as run:
        (run.folder / "x").touch()
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["schema_version"] == 1
    (tmp_path / "run.json").write_text(json.dumps(described | {"schema_version": schema}))
    before = contents(tmp_path)
    for more in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match=words), open_run(tmp_path, {"command": "a"}, files=["x"], **more):
            pass
    assert contents(tmp_path) == before
