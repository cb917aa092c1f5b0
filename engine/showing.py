"""How results show themselves at a prompt: in one line, not tensor by tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

LONGEST = 40  # characters of a value that is shown as it is


def one_line(result: Any) -> str:
    """A dataclass as `Name(field [2, 3], other 0.5, ...)`: tensors by shape, what is long by its length."""
    shown = (f"{f.name} {_brief(getattr(result, f.name))}" for f in dataclasses.fields(result) if f.repr)
    return f"{type(result).__name__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return str(list(value.shape))
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    text = repr(value)
    if len(text) <= LONGEST and "\n" not in text:
        return text
    return f"({len(value)})" if hasattr(value, "__len__") else type(value).__name__
