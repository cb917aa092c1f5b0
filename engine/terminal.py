"""Text for people: names as they are and whole, whatever a terminal's width and encoding, or a pipe's other end, allow.

Nothing here reads markup: what is printed may hold a file's name or a label, which others chose.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GAP = "  "  # between columns, and between the fields of a row that does not fit
# Marks that turn the reading direction of the text after them: a name could pass for another.
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class StreamError(Exception):
    """Stdout takes no text; no `CounterlensError`, so that nothing records it as the failure of an image.

    Attributes:
        quiet: whoever read it has gone, as `head` does: there is nothing to say.
    """

    exit_code = 1

    def __init__(self, message: str, quiet: bool = False) -> None:
        super().__init__(message)
        self.quiet = quiet


class Terminated(BaseException):
    """SIGTERM: what is open is closed and cleaned up on the way out (exit code 143)."""


def visible(text: str, encoding: str = "utf-8") -> str:
    """The text on one line: control characters, bytes that are no text and what `encoding` lacks as `\\x1b`."""
    if not (text.isascii() and text.isprintable()):
        text = "".join(_visible(c) for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cs":  # a byte of a file's name that is no UTF-8, as Python keeps it
        code = ord(character)
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
    if kind in ("Cc", "Zl", "Zp") or character in BIDIRECTIONAL:
        return character.encode("unicode_escape").decode("ascii")
    return character


class Terminal(Console):
    """A console of stdout or stderr that prints each text on one line, as `visible` shows it, and cuts nothing."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
        if self.width < 1:  # of COLUMNS=0
            self.width = 80

    @property
    def encoding(self) -> str:
        """Of the stream as it is now; rich asks the one that it was given."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def render_str(self, text: str, **options: Any) -> Text:
        """What every text that is printed passes through, cells of tables too."""
        return super().render_str(visible(text, self.encoding), **options)

    @property
    def room(self) -> int | None:
        """Characters in a line: COLUMNS, or the terminal's; None where the text goes to a file or a pipe."""
        columns = os.environ.get("COLUMNS", "")
        if columns.isdecimal() and int(columns) > 0:
            return int(columns)
        return self.width if self.is_terminal else None

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """Print rows of texts below their columns' names; where that is too wide, each row as a block of its own.

        No cell is cut or broken. In a block, the first cell stands alone, the others follow their columns' names.
        """
        if title is not None:
            self.print(title, style="bold")
        cells = [[visible(cell, self.encoding) for cell in row] for row in (columns, *rows)]
        widths = [max(cell_len(row[i]) for row in cells) for i in range(len(columns))]
        if self.room is None or sum(widths) + len(GAP) * (len(widths) - 1) <= self.room:
            rule = ["-" * width for width in widths]
            for row in (cells[0], rule, *cells[1:]):
                line = GAP.join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
                self.print(line.rstrip())
            self.print()
            return
        for row in cells[1:]:
            self.print(row[0], style="bold")
            line = ""
            for name, cell in zip(cells[0][1:], row[1:], strict=True):
                if not cell:
                    continue
                field = f"{GAP}{name} {cell}"
                if line and cell_len(line + field) > self.room:
                    self.print(line)
                    line = ""
                line += field
            self.print(line)
        self.print()


class _Stdout(io.TextIOWrapper):
    """Stdout whose own errors are told from those of the files that are written beside it."""

    def write(self, text: str) -> int:
        with _blamed():
            return super().write(text)

    def flush(self) -> None:
        with _blamed():
            super().flush()


class _Stderr(io.TextIOWrapper):
    """Stderr, where there is nowhere left to say that it takes no text."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            _to_nowhere(2)


@contextmanager
def _blamed() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        _to_nowhere(1)
        raise StreamError("stdout: nobody reads it any more", quiet=True) from error
    except OSError as error:
        _to_nowhere(1)
        raise StreamError(f"stdout: cannot be written ({error.strerror or error})") from error


def _to_nowhere(descriptor: int) -> None:
    """What is still buffered for a stream that failed would fail again when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Make stdout and stderr safe for any text: characters that their encoding lacks are escaped, errors are their own.

    Raises:
        StreamError: stdout is closed, or what was written could not be.
    """
    before = sys.stdout, sys.stderr
    closed = sys.stdout is None
    if None in (sys.stdin, *before):
        # Else the next file that is opened takes the stream's number, and what others print there is written into it.
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115
    sys.stdout, sys.stderr = wrapped = _wrapped(sys.stdout, _Stdout), _wrapped(sys.stderr, _Stderr)
    try:
        if closed:
            raise StreamError("stdout: it is closed; to throw the text away, say >/dev/null")
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before
        for stream in wrapped:
            if isinstance(stream, _Stdout | _Stderr):
                stream.detach()  # else the stream below is closed with it


def _wrapped(stream: TextIO, wrapper: type[io.TextIOWrapper]) -> TextIO:
    if stream is not sys.__stdout__ and stream is not sys.__stderr__:
        return stream  # a test's or a caller's own
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    return wrapper(
        stream.buffer, encoding=stream.encoding, errors=errors, line_buffering=stream.line_buffering
    )  # fmt: skip


@contextmanager
def stopping() -> Iterator[None]:
    """Turn the first SIGINT into KeyboardInterrupt, the first SIGTERM into `Terminated`; a second one ends at once.

    Packages swallow whatever is raised while they are imported, so what comes then is raised a moment later.
    """
    waiting = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if _importing(frame):
            if not waiting:
                waiting = True
                threading.Thread(target=again, args=(number,), daemon=True).start()
            return
        signal.signal(number, SIGNALS[number])
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def again(number: int) -> None:
        nonlocal waiting
        time.sleep(0.05)
        waiting = False
        os.kill(os.getpid(), number)

    # What is ignored, as in a shell's background, stays so.
    mine = [number for number, usual in SIGNALS.items() if signal.getsignal(number) is usual]
    for number in mine:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, SIGNALS[number])


SIGNALS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
