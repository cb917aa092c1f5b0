"""Adapters that a pack brings."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..metrics.quantities import LogOdds, Quantity, make_quantity
from ..models.files import read_json
from ..models.protocols import Classifier
from ..packs import Pack
from .lax import DESCRIPTION, LAX, open_adapter

FOLDER = "adapters"


def pack_adapters(pack: Pack) -> dict[tuple[str, str], Path]:
    """Folders of the pack's adapters, by classifier and quantity."""
    found = {}
    for path in sorted((pack.folder / FOLDER).glob(f"*/{DESCRIPTION}")):
        description = read_json(path)
        named = (description.get("training", {}).get("classifier"), description.get("quantity"))
        found[str(named[0]), str(named[1])] = path.parent
    return found


def pack_adapter(pack: Pack, name: str, classifier: Classifier, quantity: str | LogOdds | Quantity = "class") -> LAX:
    """The pack's adapter for one of its classifiers and a quantity.

    Raises:
        UsageError: the pack has none; the message says what it has. CounterlensError: it does not fit the weights.
    """
    wanted = make_quantity(classifier, quantity).name
    there = pack_adapters(pack)
    if (name, wanted) in there:
        return open_adapter(there[name, wanted], classifier)
    others = ", ".join(f"{own} ({explained})" for own, explained in there) or "none"
    raise UsageError(
        f"adapter: pack {pack.name!r} has none for {name!r} and quantity {wanted!r}, only {others}; "
        "counterlens adapter train makes one"
    )
