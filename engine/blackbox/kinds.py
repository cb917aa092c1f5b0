"""The kinds of black boxes: one line each. Imports no numpy, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of box.

    Attributes:
        matches: whether a name is of this kind.
        opens: `module:name` of what makes a `sources.Source` of name, labels, image size and options.
        uses: the options that only some kinds take.
    """

    matches: Callable[[str], bool]
    opens: str
    uses: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """What makes the source."""
        return resolve_name(f"{__package__}.{self.opens}")


KINDS = {
    "python": Kind(lambda name: name.startswith("python:"), "sources:open_function"),
    "endpoint": Kind(
        lambda name: name.lower().startswith(("http://", "https://")), "http:Endpoint",
        ("template", "header", "mean", "std", "timeout", "retries", "insecure", "binary"),
    ),
    "onnx": Kind(lambda name: name.lower().endswith(".onnx"), "onnx:OnnxBox", ("mean", "std", "convert", "scores")),
}  # fmt: skip
OF_SOME = tuple(dict.fromkeys(use for kind in KINDS.values() for use in kind.uses))


def may_convert(name: Any) -> bool:
    """Whether this names a file that may be differentiated: see `opening.open_called`."""
    return KINDS["onnx"].matches(str(name))


def is_box(name: Any) -> bool:
    """Whether this names a classifier that can only be called."""
    return any(kind.matches(str(name)) for kind in KINDS.values())
