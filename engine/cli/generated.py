"""Options of a command, made of the fields of pydantic models: what is declared there is not said again.

A command takes a model as a parameter, and `with_options` makes one option of each of its fields:

    @app.command()
    @with_options
    def show(config: Config, opened: Annotated[EngineOptions, only("pack", "device")], out: OutOption = ...) -> None:

The field's name is the option's (guidance_end: --guidance-end), its description the help text, its default the default,
where None means that it was not given. Its type, choices and range are checked as the command line is read: what does
not fit ends with exit code 2 and one line that names the option. The model's title is the panel in --help.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError

from ..config import declared


@dataclass(frozen=True)
class Choice:
    """Which fields of a model are options of a command."""

    names: tuple[str, ...]
    wanted: bool
    prefix: str = ""
    plain: tuple[str, ...] = ()

    def option(self, field: str) -> str:
        """What a field is called on the command line."""
        return field if field in self.plain else self.prefix + field


def only(*names: str) -> Choice:
    """Of a model's fields these alone, for `Annotated[Model, only(...)]`."""
    return Choice(names, True)


def without(*names: str) -> Choice:
    """All fields of a model but these, for `Annotated[Model, without(...)]`."""
    return Choice(names, False)


def prefixed(prefix: str, *plain: str) -> Choice:
    """All fields of a model, their options begin with a prefix but for those that are named."""
    return Choice((), False, prefix, plain)


def with_options(command: Callable[..., None], about: str | None = None, /, **fixed: Any) -> Callable[..., None]:
    """The command with an option for each field of the models among its parameters; it is called with the models.

    A dataclass among them stands for the options that its fields are, for several commands to share.

    Args:
        command: does the work.
        about: its help; its docstring without it.
        fixed: parameters, and options of a group, that are given here, so that a person cannot give them.

    Raises:
        TypeError: two models bring the same option, or `only` or `without` names no field.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    models: dict[str, tuple[type[BaseModel], dict[str, str]]] = {}
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if name in fixed:
            continue
        model, chosen = _model_of(hints[name])
        if model is not None:
            models[name] = model, chosen
            made = [_option(model, field, option) for field, option in chosen.items()]
        elif is_dataclass(hints[name]):
            of_group = inspect.signature(hints[name], eval_str=True).parameters.values()
            made = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in of_group]
            groups[name] = hints[name], [p.name for p in made]
        else:
            made = [parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)]
        if twice := parameters.keys() & {p.name for p in made}:
            raise TypeError(f"{command.__name__}: {sorted(twice)} are declared twice; leave them out of one")
        parameters |= {p.name: p for p in made}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        given |= fixed
        for name, (group, held) in groups.items():
            given[name] = group(**{field: given.pop(field) for field in held})
        for name, (model, chosen) in models.items():
            values = {field: given.pop(option) for field, option in chosen.items()}
            defaults = {field: model.model_fields[field].default for field in chosen}
            given[name] = model(**{field: value for field, value in values.items() if value != defaults[field]})
        command(**given)

    shown = [p for p in parameters.values() if p.name not in fixed]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    run.__doc__ = about or command.__doc__
    return run


def _model_of(hint: Any) -> tuple[type[BaseModel] | None, dict[str, str]]:
    """The model that a parameter is annotated with, and its fields that are options, with the options' names."""
    if get_origin(hint) in (Union, UnionType):  # a model or None, which another command gives
        hint = next(part for part in get_args(hint) if part is not NoneType)
    model, *more = get_args(hint) if get_origin(hint) is Annotated else [hint]
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return None, {}
    choice = next((m for m in more if isinstance(m, Choice)), without())
    if unknown := set(choice.names) - model.model_fields.keys():
        raise TypeError(f"{model.__name__} has no {sorted(unknown)}")
    return model, {n: choice.option(n) for n in declared(model) if (n in choice.names) == choice.wanted}


def _option(model: type[BaseModel], name: str, option: str) -> inspect.Parameter:
    """A field as a parameter that typer reads."""
    field = model.model_fields[name]
    panel = model.model_config.get("title")
    kind = _kind(field.annotation)
    if kind is bool:
        flag = [] if field.default is None else [f"--{option.replace('_', '-')}"]  # else --no-NAME can be said, too
        said = typer.Option(*flag, help=field.description, rich_help_panel=panel)
        annotation: Any = Annotated[bool | None, said]
    else:
        annotation = Annotated[
            str | None,
            typer.Option(
                help=field.description, rich_help_panel=panel, parser=_parser(model, name),
                metavar=f"<{'path' if kind is Path else kind.__name__}>",
            ),
        ]  # fmt: skip
    default = field.get_default(call_default_factory=True)
    return inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(annotation: Any) -> type:
    """What a person types: bool, int, float, str or Path; choices are str."""
    if type(None) in get_args(annotation):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    return annotation if isinstance(annotation, type) and issubclass(annotation, bool | int | float | Path) else str


def _parser(model: type[BaseModel], name: str) -> Callable[[Any], Any]:
    """Reads a field's value as the model would; a value that is typed or the default."""

    @functools.cache
    def adapter() -> TypeAdapter[Any]:
        field = model.model_fields[name]
        annotation: Any = Annotated[field.annotation, field]
        return TypeAdapter(annotation)

    def parse(value: Any) -> Any:
        try:
            return adapter().validate_python(value)
        except ValidationError as error:
            raise typer.BadParameter(f"{error.errors()[0]['msg']}, got {value!r}") from None

    return parse
