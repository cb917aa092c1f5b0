"""Names of labels: they may repeat (ImageNet has two cranes), so they are never keys. This is where one is resolved."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .errors import UsageError

NUMBER = re.compile(r"(\d+)(\.0+)?")  # pandas writes integers as 3.0 where others of the column are missing


def find_label(text: str | int, labels: Sequence[str], what: str = "target", more: Sequence[str] = ()) -> int:
    """Index of the label that is meant: by name, else by index.

    A number is always an index. Text is the name if a label is called so, and an index only if none is: among labels
    `7, 3, 5` the text "3" is the second label; pandas' 3.0 is an index too. A repeated name is refused;
    `distinct_names` tells its labels apart.

    Args:
        text: name or index.
        labels: names, in order of their index.
        what: for messages, what is looked for.
        more: for messages, what else would have been possible.

    Raises:
        UsageError: there is no such label, or there are several of that name; the message gives their indices.
    """
    found = _meant(text, labels)
    if len(found) > 1:
        raise UsageError(f"{what}: {len(found)} labels are named {text!r}; use {_either(found)}")
    if found:
        return found[0]
    known = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
    raise UsageError(f"{what}: {text!r} is no label; expected {', '.join([*more, 'an index or one of'])} {known}")


def is_label(text: str | int, labels: Sequence[str]) -> bool:
    """Whether this is a name or an index of a label, be it of several."""
    return bool(_meant(text, labels))


def _meant(text: str | int, labels: Sequence[str]) -> list[int]:
    if isinstance(text, str):
        if named := [i for i, label in enumerate(labels) if label == text]:
            return named
        # "crane" among `crane (5)` and `crane (9)`, and "crane (5)" where the names are as they were
        apart = [i for i, label in enumerate(labels) if text == _told_apart(label, i) or label == _told_apart(text, i)]
        if apart:
            return apart
        number = NUMBER.fullmatch(text)
        index = int(number[1]) if number else -1
    else:
        index = -1 if isinstance(text, bool) or not isinstance(text, int) else text
    return [index] if 0 <= index < len(labels) else []


def distinct_names(labels: Sequence[str]) -> list[str]:
    """The names, those that repeat with their index: `crane (134)`, `crane (517)`. No two are alike."""
    names = list(labels)
    while len(count := Counter(names)) < len(names):  # again where a label is called like another one's result
        names = [_told_apart(name, i) if count[name] > 1 else name for i, name in enumerate(names)]
    return names


def _told_apart(name: str, index: int) -> str:
    return f"{name} ({index})"


def _either(indices: Sequence[int]) -> str:
    return " or ".join([", ".join(map(str, indices[:-1])), str(indices[-1])])


def match_labels(labels: Sequence[str], names: Sequence[str], what: str) -> list[int] | None:
    """The place of each label among other names, where names tell; None where they do not.

    The same list is matched in order. Otherwise each label is found by its name, which must stand once on either side.

    Args:
        labels: to be placed.
        names: where.
        what: for messages, what the names are of.

    Raises:
        UsageError: a name stands several times.
    """
    if list(labels) == list(names):
        return list(range(len(names)))
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    if any(label not in places for label in labels):
        return None
    count = Counter(labels)
    for i, label in enumerate(labels):
        if len(places[label]) > 1:
            raise UsageError(
                f"labels: {label!r} is the name of {what} {_either(places[label])}; say which one label {i} is, with "
                "classes="
            )
        if count[label] > 1:
            same = [k for k, other in enumerate(labels) if other == label]
            raise UsageError(
                f"labels: labels {_either(same)} are both named {label!r}, which is one of the {what}, "
                f"{places[label][0]}; say which belongs to each with classes="
            )
    return [places[label][0] for label in labels]
