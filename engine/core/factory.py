"""Makes an engine again, in this process or another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .core import EngineCore


@dataclass(frozen=True)
class EngineFactory:
    """Called, makes an engine equal to one that there is; it can be pickled where its parts can.

    Attributes:
        parts: arguments of `EngineCore`, without anything compiled or open.
        names: of the models, as results say them.
        slots: of the engine.
    """

    parts: dict[str, Any]
    names: dict[str, str]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, engine: EngineCore) -> EngineFactory:
        """The factory of this engine's equals."""
        labels, neighbours = engine.labels, engine.targets.neighbours
        parts = {
            name: getattr(engine, name)
            for name in ("diffusion", "classifier", "config", "pack_settings", "speeds", "backend", "runtime", "source",
                         "checkpointing", "attention", "guidance_decoder", "distilled")
        }  # fmt: skip
        parts["store"] = engine.store.folder
        parts["neighbours"] = {labels[k]: [labels[n] for n in v] for k, v in neighbours.items()}
        return cls(parts, engine.names, engine.slots)

    def __call__(self) -> EngineCore:
        engine = EngineCore(**self.parts)
        engine.names, engine.slots = self.names, self.slots
        return engine
