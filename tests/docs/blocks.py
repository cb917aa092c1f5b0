"""The code blocks of README.md and of docs/, and how they are run.

A comment above a fence says what its block needs: `<!-- block: slow needs="digits" replace="20 -> 4" -->`.

    slow                in the slow tier only
    not-run="reason"    never here; it must still parse, and every name in it must exist
    requires=PROGRAM    which may be missing on a machine; the test says so and stops there
    needs="a b"         functions of `tests.docs.needs` that lay files into the working directory
    replace="a -> b"    in the code, to make it short or to name a small model; may be given often
    prelude="code"      Python that stands before it
    prints="text"       the next line of the output; `...` is anything; may be given often
    check=name          a function of `tests.docs.needs` that looks at what was written

Blocks of one page are run from the top in one working directory, Python in one namespace.
"""

from __future__ import annotations

import contextlib
import glob
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.docs import needs
from tests.engine.cli.test_cli import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!-- block:(?P<options>[^\n]*)-->\n)?^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.M | re.S)
FLAGS = {"slow"}
ONCE = {"not-run", "requires", "needs", "prelude", "check"}
OFTEN = {"replace", "prints"}
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    flags: frozenset[str] = frozenset()
    options: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def one(self, name: str) -> str | None:
        """The value of an option that is given once."""
        return self.options.get(name, [None])[0]

    @property
    def shortened(self) -> str:
        """The code as it is run here."""
        code = self.code
        for change in self.options.get("replace", []):
            old, _, new = change.partition(" -> ")
            assert old in code, f"{self}: nothing to replace: {old!r}"
            code = code.replace(old, new)
        return code

    def commands(self) -> list[list[str]]:
        """The words of each line of a bash block."""
        lines = self.shortened.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> Iterator[Block]:
    """The Python and bash blocks of a page; other fences are text, and say so."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        line = text[: found.start("code")].count("\n")
        language = found["language"]
        assert language in ("bash", "python", "text", "toml"), f"{page.name}:{line}: fence of {language or 'nothing'}"
        if language not in ("bash", "python"):
            continue
        flags, options = set(), dict[str, list[str]]()
        for word in shlex.split(found["options"] or ""):
            name, equals, value = word.partition("=")
            assert name in (ONCE | OFTEN if equals else FLAGS), f"{page.name}:{line}: {name}"
            if not equals:
                flags.add(name)
            else:
                options.setdefault(name, []).append(value)
                assert name in OFTEN or len(options[name]) == 1, f"{page.name}:{line}: {name} twice"
        yield Block(page, line, language, found["code"], frozenset(flags), options)


def execute(block: Block, namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a block in the working directory, and hold its output and files to what its page says."""
    for name in (block.one("needs") or "").split():
        getattr(needs, name)(Path.cwd())
    if (program := block.one("requires")) and shutil.which(program) is None:
        pytest.skip(f"{block}: needs {program}")
    capsys.readouterr()
    if block.language == "python":
        namespace.setdefault("__name__", "page")
        code = f"{block.one('prelude') or ''}\n{block.shortened}"
        exec(compile(code, str(block), "exec"), namespace)
        out = capsys.readouterr().out
    else:
        out = "".join(command(block, words) for words in block.commands())
    lines = iter(out.splitlines())
    for text in block.options.get("prints", []):
        pattern = ".*".join(map(re.escape, text.split("...")))
        assert re.fullmatch(pattern, next(lines, "")), f"{block}: printed {out!r}"
    if (name := block.one("check")) is not None:
        getattr(needs, name)(block, namespace)


def command(block: Block, words: list[str]) -> str:
    """Run one line of a bash block; what it printed."""
    name, *rest = words
    if name == "pip":
        check_installation(block, words)
        return ""
    rest = [found for word in rest for found in (sorted(glob.glob(word)) if "*" in word else [word])]
    if name == "counterlens":
        done = run(*rest)
        assert done.returncode == 0, f"{block}: {shlex.join(words)}\n{done.stderr}"
        return done.stdout
    assert name == "python", f"{block}: no way to run {name}"
    python = subprocess.run([sys.executable, *rest], capture_output=True, text=True)
    assert python.returncode == 0, f"{block}: {shlex.join(words)}\n{python.stderr}"
    return python.stdout


def check_installation(block: Block, words: list[str]) -> None:
    """What an installation names: our extras that exist, or packages alone."""
    assert words[:2] == ["pip", "install"], f"{block}: {words}"
    for word in words[2:]:
        for extra in re.findall(r"^\.\[(.*)\]$", word):
            assert set(extra.split(",")) <= EXTRAS, f"{block}: {word}"


def parse_only(block: Block) -> None:
    """What can be said of a block without running it: it parses, and its commands and options are there."""
    if block.language == "python":
        compile(block.code, str(block), "exec")
        return
    import typer.main

    from counterlens.engine.cli.main import app

    group = typer.main.get_command(app)
    for words in block.commands():
        if words[0] == "pip":
            check_installation(block, words)
        elif words[0] == "counterlens":
            context = typer.Context(group, info_name="counterlens")
            with contextlib.redirect_stderr(io.StringIO()):
                _, found, rest = group.resolve_command(context, words[1:])  # type: ignore[attr-defined]
                found.make_context(words[1], rest, parent=context)
        else:
            scripts = [ROOT / word for word in words if word.endswith((".sh", ".py"))]
            assert all(script.is_file() for script in scripts), f"{block}: {words}"
            assert shutil.which(words[0]), f"{block}: {words[0]}"
