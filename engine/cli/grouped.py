"""Commands whose options are declared in groups: a dataclass that several commands share is written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any


def grouped(run: Callable[..., None], about: str | None = None, **fixed: Any) -> Callable[..., None]:
    """A function as typer reads commands: each parameter that is a dataclass stands for the options that it holds.

    Args:
        run: does the work.
        about: help of the command; `run`'s docstring without it.
        fixed: parameters that this command gives, so that they are no options of it.
    """
    own = signature(run, eval_str=True).parameters
    groups: dict[str, Any] = {p.name: p.annotation for p in own.values() if is_dataclass(p.annotation)}
    held = {name: signature(group, eval_str=True).parameters for name, group in groups.items()}

    @wraps(run)
    def command(**given: Any) -> None:
        given |= fixed
        options = {name: groups[name](**{key: given.pop(key) for key in held[name]}) for name in groups}
        run(**given, **options)

    flat = [p for name, parameter in own.items() for p in (held[name].values() if name in held else [parameter])]
    shown = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in flat if p.name not in fixed]
    command.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in shown}
    command.__doc__ = about or run.__doc__
    return command
