"""What people see: any file's name, width, encoding and state of stdout; and how a command ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import metadata
from pathlib import Path

import pytest
import typer

from counterlens.engine.cli.main import app
from counterlens.engine.config import Config
from counterlens.engine.errors import MAX_SEED, UsageError, install_hint
from counterlens.engine.packs import Pack
from counterlens.engine.terminal import Terminal, visible
from tests.engine.cli.test_cli import Finished, one_line_error, run

QUICK = ["--steps", "4", "--strength", "0.5"]
ROOT = Path(__file__).parent.parent.parent
SAMPLES = ("samples", "--count", "2")

# A file's name, and how it is shown.
NAMES = {
    "x[/b].png": "x[/b].png",
    "[note]y.png": "[note]y.png",
    "[bold red]z[/].png": "[bold red]z[/].png",
    "[link=file:///etc]l[/link].png": "[link=file:///etc]l[/link].png",
    "[x": "[x",
    ":smile:.png": ":smile:.png",
    "back\\slash.png": "back\\slash.png",
    "esc\x1b[31mred\x1b]0;title\x07.png": "esc\\x1b[31mred\\x1b]0;title\\x07.png",
    "new\nline\r.png": "new\\nline\\r.png",
    "c1\x9b2J.png": "c1\\x9b2J.png",
    os.fsdecode(b"not-utf8-\xff\xe9.png"): "not-utf8-\\xff\\xe9.png",
    "a\u202egnp.exe": "a\\u202egnp.exe",
    "line\u2028.png": "line\\u2028.png",
    "日本語 ü😀.png": "日本語 ü😀.png",
}


@pytest.fixture(scope="module")
def digit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digit")
    assert run(*SAMPLES, "--out", folder).returncode == 0
    return sorted(folder.glob("*.png"))[0]


def shell(command: str, cwd: Path, **environment: str) -> Finished:
    """The real command in a shell, where streams are what the shell makes them."""
    program = f"{sys.executable} -c 'from counterlens.engine.cli.main import main; main()'"
    done = subprocess.run(
        ["bash", "-c", command.replace("counterlens", program)], cwd=cwd, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


@pytest.mark.parametrize(("name", "shown"), NAMES.items())
def test_names_are_shown_as_they_are(name: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    for console in (Terminal(), Terminal(stderr=True)):
        console.print(f"error: {name}: gone")
        console.table(["image", "now"], [[name, "3"], ["b", name]])
    for text in capsys.readouterr():
        lines = text.splitlines()
        assert lines[0] == f"error: {shown}: gone"
        assert sum(shown in line for line in lines) == 3
        assert len(lines) == 6
        assert "\x1b" not in text


@pytest.mark.parametrize("command", [["counterfactual", *QUICK], ["saliency", "--method", "rise"]])
def test_any_name_goes_through_a_command(command: list[str], digit: Path, tmp_path: Path) -> None:
    files = [tmp_path / name.replace("///", "/") for name in NAMES if name.endswith(".png")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(digit, file)
    broken = tmp_path / "[bold]broken\x1b[2J.png"
    broken.write_bytes(b"nothing")
    result = run(command[0], *files, broken, *command[1:], "--out", tmp_path / "out")
    one_line_error(result, 1, "[bold]broken\\x1b[2J.png")
    for name, shown in NAMES.items():
        assert not name.endswith(".png") or f"{tmp_path}/{shown.replace('///', '/')}" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252", "shift_jis"])
@pytest.mark.parametrize("name", NAMES)
def test_text_that_an_encoding_lacks_is_escaped(encoding: str, name: str) -> None:
    assert visible(name, encoding).encode(encoding).decode(encoding) == visible(name, encoding)
    assert visible("ü€", "ascii") == "\\xfc\\u20ac"


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_stdout_of_another_encoding(environment: dict[str, str], tmp_path: Path) -> None:
    result = shell("counterlens samples --count 1 --out '€ü😀'", tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert "1 images" in result.stdout


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("counterlens --version >&-", 1, "stdout: it is closed"),
        ("counterlens --version >/dev/full", 1, "stdout: cannot be written (No space left on device)"),
        ("counterlens --help >/dev/full", 1, "stdout: cannot be written (No space left on device)"),
        ("counterlens samples --count 2 --json --out s >/dev/full", 1, "stdout: cannot be written"),
        ("counterlens --version 2>&-", 0, ""),
        ("counterlens --typo 2>&-", 2, ""),
        ("counterlens --typo 2>/dev/full", 2, ""),
        ("counterlens --version <&-", 0, ""),
        ("counterlens --version >&- 2>&-", 1, ""),
    ],
)
def test_streams_that_take_nothing(command: str, code: int, said: str, tmp_path: Path) -> None:
    result = shell(command, tmp_path)
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.endswith("opening ...")]
    assert [said in line for line in lines] == ([True] if said else [])


def test_a_reader_that_goes_is_no_error_of_ours(tmp_path: Path) -> None:
    result = shell("counterlens samples --count 300 --json --out s | head -1; exit ${PIPESTATUS[0]}", tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["samples: opening ..."]
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize("after", [0.1, 0.25, 0.4])  # amid imports, where packages swallow exceptions
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_one_line(sent: signal.Signals, after: float, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "from counterlens.engine.cli.main import main; main()", "demo", "--out", "d"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),  # nohup's children would ignore it
    )  # fmt: skip
    assert child.stderr is not None
    assert child.stderr.readline() == "demo: opening ...\n"
    time.sleep(after)
    child.send_signal(sent)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + sent
    assert [line.partition(";")[0] for line in said.splitlines()] == [
        "interrupted" if sent == signal.SIGINT else "terminated"
    ]


ROWS = [["folder/a-rather-long-name-of-an-image.png", "0.845 (0.829 to 0.847)", "-0.045 (-0.319 to 0.290)"]]


@pytest.mark.parametrize("columns", ["20", "40", "80", "200", "", "0", "x"])
def test_nothing_is_cut_at_any_width(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    Terminal().table(["image", "msi", "base_score_area"], [*ROWS, ["b", "", "failed"]])
    lines = capsys.readouterr().out.splitlines()
    for cell in [*ROWS[0], "failed"]:
        assert any(cell in line for line in lines)
    if columns in ("40", "80"):
        longest = max(map(len, [ROWS[0][0], f"  base_score_area {ROWS[0][2]}"]))
        assert max(map(len, lines)) <= max(int(columns), longest)
    assert len({line.index(x) for line, x in zip(lines[:3], ("msi", "---", "0.845"), strict=True) if x in line}) <= 2


def test_profile_in_80_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run("profile", "--count", 1, "--out", tmp_path)
    header = next(line for line in result.stdout.splitlines() if line.startswith("part "))
    assert header.split() == ["part", "ms", "share", "GFLOP", "MB", "roofline", "peak", "MB"]
    assert max(map(len, result.stdout.split("latency")[0].splitlines()[1:])) <= 80


def commands(parent: typer.Typer = app, *path: str) -> list[tuple[str, ...]]:
    """Every command there is."""
    found: list[tuple[str, ...]] = []
    for c in parent.registered_commands:
        assert c.callback is not None
        found.append((*path, c.name or c.callback.__name__.replace("_", "-")))
    for group in parent.registered_groups:
        assert group.typer_instance is not None
        assert group.name is not None
        found += commands(group.typer_instance, *path, group.name)
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    files = command not in (("serve",), ("quality",), ("surrogate", "show"))  # they write none
    given = [] if command[0] in ("demo", "samples", "info", "export", "evaluate", "serve") or (command[-1] in (
        "train", "export", "evaluate", "calibrate"
    ) and command != ("surrogate", "train")) else ["file", "file"][: 1 + (command[0] == "run")]  # fmt: skip
    seeds = (-1, MAX_SEED + 1, 2**64, 99999999999999999999, "1.5")
    for seed in () if command == ("surrogate", "show") else seeds:
        result = run(*command, *given, *(["--out", "o"] if files else []), "--seed", seed)
        one_line_error(result, 2, "--seed")
        assert len(result.stderr.splitlines()) == 1
    if files or command == ("serve",):
        one_line_error(run(*command, *given, "--out", ""), 2, "out: it is empty")
        one_line_error(run(*command, *given, "--out="), 2, "out: it is empty")
    one_line_error(run(*command, ""), 2, "is empty")
    if files:
        one_line_error(run(*command, *given, "--out", "file"), 2, "out: file is not a folder")
        one_line_error(run(*command, "--ouut", "o"), 2, "--out")
    assert run(*command, "-h").stdout == run(*command, "--help").stdout != ""
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def test_mistyped_command() -> None:
    one_line_error(run("saliancy"), 2, "saliency")
    assert run().returncode == 2


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    result = run(flag)
    assert result.returncode == 0
    assert result.stdout.startswith(f"counterlens {metadata('counterlens')['Version']}, torch ")


@pytest.mark.parametrize("seed", [2**31 - 1, 2**31, 2**47, 2**63 - 1])
def test_large_seeds_are_seeds(seed: int, digit: Path, tmp_path: Path) -> None:
    assert Config(seed=seed).seed == seed
    pack = Pack("digits")
    drawn = pack.samples("test", count=2, marker="random", seed=seed)
    assert len({*drawn.seeds, *pack.samples("test", count=2, seed=seed - 1).seeds}) == 4
    for command in (["counterfactual", digit, *QUICK], ["saliency", digit, "--method", "rise"], ["samples"]):
        result = run(*command, "--seed", seed, "--out", tmp_path / str(command[0]))
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_seeds_beyond_64_bits_in_python(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        Config.make(seed=seed)


def test_json_goes_to_stdout_beside_a_progress_bar(digit: Path, tmp_path: Path) -> None:
    """With a terminal on stderr and a pipe on stdout, rich would print stdout's lines on the terminal."""
    script = f"""
import pty, subprocess, sys, os, threading
main, slave = pty.openpty()
# A terminal that nobody reads is full once a slow run has drawn its bar often enough, and then the run waits for ever.
threading.Thread(target=lambda: [os.read(main, 65536) for _ in iter(int, 1)], daemon=True).start()
command = [sys.executable, "-c", "from counterlens.engine.cli.main import main; main()"]
child = subprocess.Popen(
    [*command, "counterfactual", {str(digit)!r}, "--json", "--out", "o"], stdout=subprocess.PIPE, stderr=slave
)
print(child.stdout.read().decode())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)["image"] == str(digit), done.stderr


EXTRAS = metadata("counterlens").get_all("Provides-Extra") or []


@pytest.mark.parametrize("extra", EXTRAS)
def test_hints_name_packages(extra: str) -> None:
    hint = install_hint(extra)
    assert "counterlens" not in hint
    assert f"'.[{extra}]'" in hint
    assert len(hint.split(" (")[0].split()) > 2


def test_no_hint_names_a_package_that_is_not_ours() -> None:
    files = [p for part in ("engine", "export", "kernels", "bench", "tests") for p in (ROOT / part).rglob("*.py")]
    name = "counter" + "lens["
    assert [p for p in [*files, ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if name in p.read_text()] == []
