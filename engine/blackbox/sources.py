"""Where answers come from. A source takes images and gives what the thing says, unread.

A source fails by `reading.Unanswered` where asking again may help, by `reading.Refused` where it does not, and by
`reading.Unusable` where no image will be answered any more.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .kinds import KINDS, OF_SOME, Kind, may_convert
from .options import BoxOptions, Output
from .reading import Refused

if TYPE_CHECKING:
    from ..models.preprocessing import Preprocessing  # which needs torch


class Source(Protocol):
    """Something that answers.

    Attributes:
        name: as people know it, without secrets.
        labels: of its answers, in their order. output: what these are, see `BoxOptions`.
        batch: images in one request. concurrency: requests at once.
        remote: whether a request that failed is worth making again.
        preprocessing: what stands before it here, which tells how pictures that are not square are fitted; mostly None.
    """

    name: str
    labels: list[str]
    output: Output
    batch: int
    concurrency: int
    remote: bool
    preprocessing: Preprocessing | None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, as JSON values."""
        ...

    def ask(
        self,
        images: NDArray[np.uint8],  # [n, H, W, 3], a copy
    ) -> Any:
        """What it says of each image: see `reading.plain` and `reading.read`."""
        ...

    def hide(self, text: str) -> str:
        """A text without secrets that it may repeat."""
        ...


@dataclass
class Function:
    """A function in this process."""

    function: Callable[[NDArray[np.uint8]], Any]
    name: str
    labels: list[str]
    output: Output
    batch: int
    concurrency: int
    remote: bool = False
    preprocessing: Preprocessing | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Its name; that it is another one now, the probes tell."""
        return {"python": self.name}

    def ask(self, images: NDArray[np.uint8]) -> Any:
        """Call it."""
        try:
            return self.function(images)
        except (Exception, SystemExit) as error:  # theirs: vendors' clients have exceptions of their own
            raise Refused(f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    def hide(self, text: str) -> str:
        """As it is."""
        return text


def of_function(
    function: Callable[..., Any], labels: Sequence[str], options: BoxOptions, name: str | None = None
) -> Function:
    """A source of a function."""
    said = name or f"python:{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', 'function')}"
    return Function(function, said, list(labels), options.output, options.batch or 64, options.concurrency or 1)


def open_function(name: str, labels: Sequence[str], size: int, options: BoxOptions) -> Function:
    """A source of `python:package.module:function`, also of a module in the working directory.

    Raises:
        UsageError: there is none.
    """
    module, _, attribute = name.removeprefix("python:").partition(":")
    if not module or not attribute:
        raise UsageError(f"classifier: expected python:package.module:function, got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` finds modules
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # theirs
        raise UsageError(f"classifier: {name} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise UsageError(f"classifier: {name} is a {type(found).__name__}, not a function of images")
    return of_function(found, labels, options, name)


def open_source(
    name: Any, labels: Sequence[str], size: int, options: BoxOptions, preprocessing: Mapping[str, Any] | None = None
) -> Source:
    """The source that a name means, or that a function is.

    Raises:
        UsageError: there is no such thing, or an option has no use for it. CounterlensError: it cannot be opened.
    """
    kind, own = check_kind(name, options), may_convert(name)  # an ONNX file may bring its labels
    if preprocessing is not None and not own:
        raise UsageError("preprocessing: of an ONNX file; any other black box brings its own")
    if len(labels) < 2 and not own:
        raise UsageError(
            f"labels: a black box needs the names of two or more, in the order of its answers, got {len(labels)}"
        )
    if _is_function(name):
        return of_function(name, labels, options)
    source: Source = kind.load()(str(name), labels, size, options, *([preprocessing] if own else []))
    return source


def check_kind(name: Any, options: BoxOptions) -> Kind:
    """The kind of box that a name or a function is.

    Raises:
        UsageError: there is no such kind, or an option has no use for it.
    """
    text, of_python = str(name), _is_function(name)
    kind = KINDS["python"] if of_python else next((k for k in KINDS.values() if k.matches(text)), None)
    if kind is None:
        raise UsageError(f"classifier: {text!r} is no ONNX file, python:module:function or address")
    if unused := [n for n in OF_SOME if n in options.model_fields_set and n not in kind.uses]:
        raise UsageError(f"classifier_{unused[0]}: has no use for {'a function' if of_python else text!r}")
    return kind


def _is_function(name: Any) -> bool:
    return callable(name) and not isinstance(name, Path)
