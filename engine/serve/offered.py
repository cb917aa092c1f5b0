"""What the page offers of an engine's server: samples, and what can be chosen."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ..blackbox.box import as_box
from ..core.core import EngineCore
from ..models.processors import card_fit
from ..packs import Pack
from ..saliency.explain import pack_adapters
from ..saliency.lax import LAX
from ..saliency.table import METHODS
from .tasks import KEPT_S
from .wire import png, to_base64

SAMPLES = 20  # of the pack


def usable_methods(engine: EngineCore, adapter: LAX | None = None) -> list[str]:
    """Saliency methods that work here, with an adapter beside the pack's."""
    pack = Pack(engine.source["pack"]) if "pack" in engine.source else None
    adapted = pack is not None and (engine.source.get("classifier", ""), "class") in pack_adapters(pack)
    adapted = adapted or adapter is not None
    called = as_box(engine.classifier) is not None
    return [
        name
        for name, method in METHODS.items()
        if (adapted or not method.adapter) and (not method.captum or find_spec("captum"))
        and not (called and method.inside)
    ]  # fmt: skip


def facts(engine: EngineCore, adapter: LAX | None = None) -> dict[str, Any]:
    """What the page offers beside what is served: what a request that says nothing gets, and methods that work here."""
    config = engine.config
    return {
        "usable_methods": usable_methods(engine, adapter), "modes": ["realistic", "audit", "official"],
        "default_mode": config.mode_name, "default_speed": config.speed, "kept_s": KEPT_S, "streams": True,
        "fit": fit_of(engine), "guides": as_box(engine.classifier) is None,
    }  # fmt: skip


def fit_of(engine: EngineCore) -> str:
    """How the page lays out pictures that are not square: as the server would, where one square image can show that."""
    fit = engine.config.fit_name
    return card_fit(engine.classifier) if fit == "auto" else "crop" if fit == "native" else fit


def samples(engine: EngineCore) -> list[dict[str, str]]:
    """Images of the pack's test split, half of them with a marker; none where another model is served."""
    if "pack" not in engine.source:
        return []
    drawn = Pack(engine.source["pack"]).samples("test", count=SAMPLES, marker="random")
    names = [
        str(label) if marker is None else f"{label} with a {marker.colour} marker"
        for label, marker in zip(drawn.labels, drawn.markers, strict=True)
    ]
    return [{"name": n, "image": to_base64(png(x))} for n, x in zip(names, drawn.images, strict=True)]
