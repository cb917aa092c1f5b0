"""Tables of what can be chosen, which other packages add to: by `register`, or by an entry point where installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from .errors import CounterlensError, UsageError


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """What it is asked for by."""


T = TypeVar("T", bound=Named)


class Table(Mapping[str, T], Generic[T]):
    """Entries by name, in order: this package's, those of installed packages, and those that `register` added.

    Names cost no import: an installed package's module is imported when its entry is asked for.

    Args:
        group: of entry points; each names an entry of the same name.
        kind: of all entries.
        own: this package's.
    """

    def __init__(self, group: str, kind: type[T], own: Iterable[T]) -> None:
        self.group, self.kind = group, kind
        self._own = {entry.name: entry for entry in own}

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def register(self, entry: T) -> T:
        """Add an entry for this process; returns it.

        Raises:
            UsageError: it is of another kind, or its name is taken.
        """
        if not isinstance(entry, self.kind):
            raise UsageError(f"{self.group}: expected a {self.kind.__name__}, got {type(entry).__name__}")
        if entry.name in self:
            raise UsageError(f"{self.group}: {entry.name!r} is there already")
        self._own[entry.name] = entry
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._own, *self._installed)))

    def __len__(self) -> int:
        return len(self._own.keys() | self._installed.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._installed

    def __getitem__(self, name: str) -> T:
        """The entry of that name.

        Raises:
            KeyError: there is none. CounterlensError: its package cannot be imported, or two have one of that name.
        """
        point = self._installed.get(name)
        if point is None:
            return self._own[name]
        said = f"{self.group}: {name!r} of {point.dist.name if point.dist else point.value}"
        if name in self._own:
            raise CounterlensError(f"{said} has a name that is taken; uninstall it, or have it renamed")
        try:
            entry = point.load()
        except (ImportError, AttributeError) as error:
            raise CounterlensError(f"{said} cannot be imported ({error})") from error
        if not isinstance(entry, self.kind) or entry.name != name:
            raise CounterlensError(f"{said}: expected a {self.kind.__name__} of that name, got {entry!r:.80}")
        return entry
