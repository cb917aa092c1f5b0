"""Reading named features of a frozen module while it runs, without changing what it computes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError

LEVELS = 5  # how many resolutions `choose_taps` takes at most


def as_map(output: Any, name: str) -> Tensor:
    """A module's output as feature maps [B, C, h, w].

    A convolution's [B, C, h, w] as it is; tokens [B, T, D] as a square grid, the tokens in front of it (class token,
    registers) left out; of a tuple or a mapping the first value.

    Raises:
        UsageError: it is neither; the message names the tap.
    """
    if isinstance(output, dict):
        output = next(iter(output.values()), None)
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    if isinstance(output, Tensor) and output.ndim == 3:
        side = math.isqrt(output.shape[1])
        grid = output[:, output.shape[1] - side * side :]
        return grid.transpose(1, 2).reshape(len(output), output.shape[2], side, side)
    got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise UsageError(f"tap: {name!r} gives {got}; expected maps [B, C, h, w] or tokens [B, T, D]")


def find_modules(module: nn.Module, taps: Sequence[str]) -> list[nn.Module]:
    """The submodules of these names.

    Raises:
        UsageError: there is none of a name; the message lists the nearest.
    """
    known = {name: part for name, part in module.named_modules() if name}
    for tap in taps:
        if tap not in known:
            near = difflib.get_close_matches(tap, known, n=5, cutoff=0.3) or list(known)[:5]
            raise UsageError(f"tap: the model has no {tap!r}; nearest: {', '.join(near) or 'none, it has no parts'}")
    return [known[tap] for tap in taps]


@contextmanager
def tapped(module: nn.Module, taps: Sequence[str]) -> Iterator[list[Tensor]]:
    """Hold the taps' features [B, C, h, w] of the last forward pass, in the order of `taps`; hooks go on leaving.

    Raises:
        UsageError: there is no such tap, or its output is no map.
    """
    parts = find_modules(module, taps)
    features: list[Tensor] = [torch.empty(0)] * len(parts)
    handles = []

    def keep(index: int, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            features[index] = as_map(output, name)

        return hook

    try:
        for i, (part, name) in enumerate(zip(parts, taps, strict=True)):
            handles.append(part.register_forward_hook(keep(i, name)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def choose_taps(classifier: Any, image: Tensor) -> list[str]:
    """Names worth tapping: of every resolution that the model passes through, the last module's, finest first.

    From half the image's resolution on, where there is one; then also the last maps at the image's own, of which the
    head takes little. Where all have one resolution (a vision transformer), three of them, spread over the depth.

    Args:
        classifier: see `engine.models.protocols.Classifier`.
        image: [1, 3, H, W] in [0, 1]; its values do not matter.
    """
    finished: dict[str, tuple[int, int]] = {}
    whole: list[str] = []
    handles = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(first, Tensor) or first.ndim not in (3, 4):
                return
            channels, h, w = as_map(first, name).shape[1:]
            if (h, w) == image.shape[2:] and channels > image.shape[1]:  # more than the image in other numbers
                whole[:] = [name]
            if 2 <= h <= image.shape[2] and 2 <= w <= image.shape[3]:
                finished.pop(name, None)
                finished[name] = (h, w)

        return hook

    try:
        for name, part in classifier.module.named_modules():
            if name and any(True for _ in part.parameters()) | (not any(True for _ in part.children())):
                handles.append(part.register_forward_hook(note(name)))
        classifier.logits(image)
    finally:
        for handle in handles:
            handle.remove()
    half = {name: size for name, size in finished.items() if 2 * size[0] <= image.shape[2]}
    finished, whole = (half, whole) if half else (finished, [])
    last = {size: name for name, size in finished.items()}
    if len(last) == 1 and len(finished) > 3:
        names = list(finished)
        return whole + [names[len(names) * i // 3 - 1] for i in (1, 2, 3)]
    return whole + [last[size] for size in sorted(last, reverse=True)][-LEVELS:]
