"""Adapters that a pack brings."""

from __future__ import annotations

from ..errors import UsageError
from ..metrics.quantities import LogOdds, Quantity, make_quantity
from ..models.files import read_json
from ..models.protocols import Classifier
from ..packs import Pack
from .lax import DESCRIPTION, LAX, open_adapter

FOLDER = "adapters"


def pack_adapter(pack: Pack, name: str, classifier: Classifier, quantity: str | LogOdds | Quantity = "class") -> LAX:
    """The pack's adapter for one of its classifiers and a quantity.

    Raises:
        UsageError: the pack has none; the message says what it has. CounterlensError: it does not fit the weights.
    """
    wanted = make_quantity(classifier, quantity).name
    there = []
    for path in sorted((pack.folder / FOLDER).glob(f"*/{DESCRIPTION}")):
        description = read_json(path)
        own = description.get("training", {}).get("classifier")
        if (own, description.get("quantity")) == (name, wanted):
            return open_adapter(path.parent, classifier)
        there.append(f"{own} ({description.get('quantity')})")
    raise UsageError(
        f"adapter: pack {pack.name!r} has none for {name!r} and quantity {wanted!r}, only "
        f"{', '.join(there) or 'none'}; counterlens adapter train makes one"
    )
