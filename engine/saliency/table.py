"""The saliency methods: one line each. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from ..errors import UsageError
from ..tables import Table

HERE = f"{__package__}.methods:"


@dataclass(frozen=True)
class Method:
    """A saliency method.

    Attributes:
        name: in commands and results.
        function: from a `methods.Question` and images [B, 3, H, W] to a map [B, H, W]; itself, or `module:name`, which
            is imported when the method runs.
        about: one line for people.
        gradients: whether it differentiates the classifier.
        adapter: whether it needs a trained adapter (`Question.adapter`).
        captum: whether it needs captum.
        layer: whether it reads one of the classifier's layers (`Question.layer`).
        logits: whether its maps are logits: a sigmoid brings them to [0, 1], and not their own range.
    """

    name: str
    function: str | Callable[..., Any]
    about: str
    gradients: bool = False
    adapter: bool = False
    captum: bool = False
    layer: bool = False
    logits: bool = False

    @property
    def inside(self) -> bool:
        """Whether it looks inside a classifier, which nobody can who can only call it."""
        return self.gradients or self.adapter or self.layer

    def load(self) -> Callable[..., Any]:
        """The function."""
        return resolve_name(self.function) if isinstance(self.function, str) else self.function


METHODS = Table(
    "counterlens.methods",
    Method,
    [
        Method("lax", HERE + "lax", "a trained adapter's map, in one pass", adapter=True, logits=True),
        Method("gradxinput", HERE + "gradient_x_input", "gradient times input", gradients=True, captum=True),
        Method("ig", HERE + "integrated_gradients", "integrated gradients", gradients=True, captum=True),
        Method("smoothgrad", HERE + "smoothgrad", "mean gradient of noisy copies", gradients=True, captum=True),
        Method("gradcam", HERE + "grad_cam", "weighted feature maps of a layer", gradients=True, layer=True),
        Method("occlusion", HERE + "occlusion", "effect of a sliding window", captum=True),
        Method("ablation", HERE + "feature_ablation", "effect of each cell of a grid", captum=True),
        Method("rise", HERE + "rise", "mean over random masks"),
    ],
)


def check_methods(names: Sequence[str]) -> list[str]:
    """Names of methods, none twice.

    Raises:
        UsageError: a method is not in `METHODS`.
    """
    for name in names:
        if name not in METHODS:
            raise UsageError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return list(dict.fromkeys(names))
