"""Every command reads images by the same reader: what one takes all take; what cannot be read costs its row only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from counterlens.engine.audit.results import Results
from tests.engine.cli.test_cli import QUICK, Finished, digits, one_line_error, run  # noqa: F401  (a fixture)

COMMANDS = {
    "counterfactual": ["counterfactual", *QUICK],
    "saliency": ["saliency", "--method", "gradxinput"],
    "adapter explain": ["adapter", "explain"],
    "evaluate": ["evaluate", "--methods", "gradxinput"],
    "profile": ["profile", "--steps", "4", "--runtime", "eager"],
    "audit": ["audit", "--speed", "fast", "--runtime", "eager", "--no-insight", "--shortcuts", "0", "--no-report"],
}


def over(command: str, source: Path, out: Path) -> Finished:
    option = ["--images"] if command == "evaluate" else []
    return run(*COMMANDS[command], *option, source, "--out", out)


@pytest.fixture(scope="module")
def hard(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("hard") / "in"
    (folder / "3").mkdir(parents=True)
    first, second, *_ = sorted(digits.glob("*.png"))
    (folder / "good.png").write_bytes(first.read_bytes())
    Image.open(second).save(folder / "3" / "good too.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x1a\1\2\0\1\0\0\0x\0\0\0")
    (folder / "cut.png").write_bytes(first.read_bytes()[:90])
    (folder / "IMG_1.CR3").write_bytes(first.read_bytes())
    os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hard_folder(command: str, hard: Path, tmp_path: Path) -> None:
    result = over(command, hard, tmp_path / "out")
    one_line_error(result, 1, "cut.png", "2 of 4" if command != "audit" else "pipe.png")
    said = result.stderr.replace("\n", "")
    for words in ("1 file left out, not read by the ending: IMG_1.CR3", "loop is a link to", "named pipe"):
        assert words in said


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_that_samples_writes(command: str, digits: Path, tmp_path: Path) -> None:  # noqa: F811
    source = digits / "labels.csv"
    result = run(*COMMANDS[command], source, "--slice", "marker", "--out", tmp_path) if command == "audit" else over(
        command, source, tmp_path
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert command == "audit" or "columns not read: 'marker'" in result.stderr.replace("\n", "")


def test_a_manifest_of_any_ending_with_numbers_that_pandas_made(digits: Path, tmp_path: Path) -> None:  # noqa: F811
    first, second, *_ = sorted(digits.glob("*.png"))
    manifest = tmp_path / "list.txt"
    manifest.write_bytes(f"\ufeffimage;target\r\n{first};7.0\r\n{second};7.0\r\n".encode())
    result = run("counterfactual", "--manifest", manifest, "--out", tmp_path / "out", "--json", *QUICK)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('"target": "7"') == 2
    (tmp_path / "m.csv").write_text(f"image,label,target\n{first},0.0,7.0\n{second},,\n")
    result = over("audit", tmp_path / "m.csv", tmp_path / "audit")
    assert result.returncode == 0, result.stderr
    rows = list(Results.open(tmp_path / "audit").rows())
    assert [r["label"] for r in rows] == ["0", None]
    assert rows[0]["target"] == "7"
    said = over("saliency", tmp_path / "m.csv", tmp_path / "maps").stderr
    assert "note: targets of tables are not used here" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line_error(run("counterfactual", empty, first, "--out", tmp_path / "out"), 2, "empty holds no image")
