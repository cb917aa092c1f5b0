"""Reading named feature maps of a frozen module while it runs, without changing what it computes.

A tap is written as text: a module's name, then what its output needs to be read as a map [B, C, h, w]:

    features.4                  its output is [B, C, h, w], and it runs once in a pass
    relu#2                      the second time that it runs
    block[1]                    the second tensor of a tuple, mapping or dataclass
    stages.1@BHWC               channels last
    layer.3@B(1+14x14)C         tokens in rows of a grid of 14 x 14, one in front of them (class token, registers)

Whether an output is a map is asked of the model: tiles of an image are changed one after the other, and the output's
axes must show the change where it was made. Position biases, poolers and attention weights do not.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from ..errors import UsageError
from ..models.freezing import frozen

LEVELS = 5  # how many resolutions `choose_taps` takes at most
TILES = 3  # an image is so many high and wide when it is changed tile by tile
FOLLOWS = 0.3  # least correlation between where an output changes and where the image did
FRONT = 16  # most tokens in front of a grid, and no more than it has
FULL = ("BCHW", "BHWC", "BCWH", "BWHC")
GRIDS = ("B{}C", "BC{}", "{}BC")
TAP = re.compile(r"(?P<name>[^#\[@]+)(?:#(?P<call>\d+))?(?:\[(?P<leaf>\d+)\])?(?:@(?P<layout>.+))?")
GRID = re.compile(r"\((?:(?P<front>\d+)\+)?(?P<h>\d+)x(?P<w>\d+)\)")


class NoMaps(UsageError):
    """A model has no feature map of the kind that is needed."""


@dataclass(frozen=True)
class Layout:
    """Which axis is which: `axes` of B, C, H and W, or of B, C and N, a grid `size` of tokens after `front` others."""

    axes: str
    front: int = 0
    size: tuple[int, int] = (0, 0)

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From BHWC, B(1+14x14)C and the like.

        Raises:
            UsageError: it is none.
        """
        if text in FULL:
            return cls(text)
        if (found := GRID.search(text)) and GRID.sub("{}", text) in GRIDS:
            size = int(found["h"]), int(found["w"])
            return cls(GRID.sub("N", text), int(found["front"] or 0), size)
        raise UsageError(f"tap: layout {text!r}; expected {', '.join(FULL)}, or a grid of tokens such as B(1+14x14)C")

    def __str__(self) -> str:
        h, w = self.size
        return self.axes.replace("N", f"({f'{self.front}+' if self.front else ''}{h}x{w})")

    def read(self, output: Tensor) -> Tensor:
        """An output as a map [B, C, h, w].

        Raises:
            ValueError: it has other axes, or too few tokens.
        """
        if output.ndim != len(self.axes):
            raise ValueError(f"{len(self.axes)} axes")
        if "N" not in self.axes:
            return output.permute([self.axes.index(axis) for axis in "BCHW"])
        tokens = output.permute([self.axes.index(axis) for axis in "BNC"])
        h, w = self.size
        if tokens.shape[1] < self.front + h * w:
            raise ValueError(f"{self.front + h * w} tokens")
        grid = tokens[:, self.front : self.front + h * w]
        return grid.transpose(1, 2).reshape(len(grid), grid.shape[2], h, w)


@dataclass(frozen=True)
class Tap:
    """A module's output in one pass: see the top of this file.

    Attributes:
        name: of the module. call: which of its calls, from 1; None: it runs once.
        leaf: which of its tensors, from 0. layout: None where it goes without saying, see `plain`.
    """

    name: str
    call: int | None = None
    leaf: int = 0
    layout: Layout | None = None

    @classmethod
    def parse(cls, text: str) -> Tap:
        """From text.

        Raises:
            UsageError: it is no tap.
        """
        found = TAP.fullmatch(text)
        if found is None or found["call"] == "0":
            raise UsageError(f"tap: {text!r}; expected the name of a module, as in layer.3#2[0]@BHWC")
        call = int(found["call"]) if found["call"] else None
        return cls(
            found["name"], call, int(found["leaf"] or 0), Layout.parse(found["layout"]) if found["layout"] else None
        )

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call else ""
        leaf = f"[{self.leaf}]" if self.leaf else ""
        layout = f"@{self.layout}" if self.layout and self.layout.axes != "BCHW" else ""
        return f"{self.name}{call}{leaf}{layout}"

    def tensor(self, output: Any) -> Tensor:
        """Its tensor of a module's output.

        Raises:
            UsageError: there is none; the message names the tap.
        """
        tensors = leaves(output)
        if self.leaf >= len(tensors):
            raise UsageError(f"tap: {str(self)!r} gives {len(tensors)} tensors ({type(output).__name__})")
        return tensors[self.leaf]

    def read(self, output: Tensor) -> Tensor:
        """Its tensor as a map [B, C, h, w].

        Raises:
            UsageError: it is none; the message names the tap.
        """
        layout = self.layout or plain(output)
        try:
            if layout is not None:
                return layout.read(output)
        except ValueError as error:
            raise UsageError(f"tap: {str(self)!r} gives {list(output.shape)}; expected {layout}: {error}") from error
        raise UsageError(
            f"tap: {str(self)!r} gives {list(output.shape)}; expected maps [B, C, h, w] or tokens [B, N, C]"
        )


def plain(output: Tensor) -> Layout | None:
    """How a tap without a layout is read: [B, C, h, w], or tokens [B, N, C] whose last ones are the largest square."""
    if output.ndim == 4:
        return Layout("BCHW")
    if output.ndim != 3 or not output.shape[1]:
        return None
    side = math.isqrt(output.shape[1])
    return Layout("BNC", output.shape[1] - side * side, (side, side))


def leaves(output: Any) -> list[Tensor]:
    """Every tensor of a module's output, in order; those in tuples, mappings and dataclasses too."""
    if isinstance(output, Tensor):
        return [output]
    inside: list[Any] = []
    if isinstance(output, Mapping):
        inside = list(output.values())
    elif isinstance(output, tuple | list):
        inside = list(output)
    elif dataclasses.is_dataclass(output):
        inside = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [tensor for part in inside for tensor in leaves(part)]


def find_modules(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The submodules of these names.

    Raises:
        UsageError: there is none of a name; the message lists the nearest.
    """
    known = {name: part for name, part in module.named_modules(remove_duplicate=False) if name}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or list(known)[:5]
            raise UsageError(f"tap: the model has no {name!r}; nearest: {', '.join(near) or 'none, it has no parts'}")
    return [known[name] for name in names]


@contextmanager
def watched(module: nn.Module, parts: Mapping[str, nn.Module], see: Callable[[str, int, Any], None]) -> Iterator[None]:
    """Tell `see` name, number of the call (from 1) and output whenever this thread has run one of the parts.

    Once the whole module has run, calls of a part on its own are none of its pass. Hooks go on leaving.
    """
    here = get_ident()  # another thread may run the same module
    calls: Counter[str] = Counter()
    running, passes = 0, 0
    handles: list[RemovableHandle] = []

    def begin(_: nn.Module, __: Any) -> None:
        nonlocal running
        running += get_ident() == here

    def end(_: nn.Module, __: Any, ___: Any) -> None:
        nonlocal running, passes
        if get_ident() == here:
            running, passes = running - 1, passes + 1

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if get_ident() == here and (running or not passes):
                calls[name] += 1
                see(name, calls[name], output)

        return hook

    try:
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        for name, part in parts.items():
            handles.append(part.register_forward_hook(watch(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _twice(name: str, calls: int) -> UsageError:
    numbered = ", ".join(f"{name}#{i}" for i in range(1, calls + 1))
    return UsageError(f"tap: {name!r} runs more than once in a pass; say which: {numbered}")


@contextmanager
def tapped(module: nn.Module, taps: Sequence[str]) -> Iterator[list[Tensor]]:
    """Hold the taps' features [B, C, h, w] of the forward pass inside, in the order of `taps`.

    They are copies: what follows a module may change its output in place.

    Raises:
        UsageError: there is no such tap, its output is no map, or it runs more than once and its text does not say
            which call is meant.
    """
    wanted = [Tap.parse(text) for text in taps]
    parts = dict(zip([t.name for t in wanted], find_modules(module, [t.name for t in wanted]), strict=True))
    features: list[Tensor] = [torch.empty(0)] * len(wanted)

    def see(name: str, call: int, output: Any) -> None:
        for i, tap in enumerate(wanted):
            if tap.name == name and tap.call is None and call > 1:
                raise _twice(name, call)
            if tap.name == name and tap.call in (None, call):
                features[i] = tap.read(tap.tensor(output)).clone()

    with watched(module, parts, see):
        yield features


# Which outputs are maps


@dataclass(frozen=True)
class Found:
    """An output that follows the image: its tap, its size in places, its channels."""

    tap: Tap
    size: tuple[int, int]
    channels: int


class _Probe:
    """An image whose tiles were changed one after the other: `images` [1 + K, 3, H, W], the first as it was."""

    def __init__(self, image: Tensor) -> None:
        h, w = image.shape[2:]
        g = torch.Generator().manual_seed(0)
        before, after = (torch.rand(1, 3, h, w, generator=g).to(image) for _ in range(2))
        rows, columns = (torch.arange(s, device=image.device) * TILES // s for s in (h, w))
        tile = rows[:, None] * TILES + columns[None, :]
        self.changed = (tile == torch.arange(TILES**2, device=image.device)[:, None, None]).float()  # [K, H, W]
        mixed = torch.where(self.changed[:, None] > 0, after, before)
        self.images = torch.cat([before, mixed])

    def layout(self, output: Tensor) -> tuple[Layout, float] | None:
        """The layout under which an output follows the image best, and how well; None where it cannot be a map."""
        if not output.is_floating_point() or output.ndim not in (3, 4) or min(output.shape) < 1:
            return None
        scored: list[tuple[float, Layout]] = []
        if output.ndim == 4 and len(output) == len(self.images):
            for layout in map(Layout, FULL):
                scored.append((self._score(self._change(layout.read(output))), layout))
        elif output.ndim == 3:
            for text in GRIDS:
                axes = text.replace("{}", "N")
                if output.shape[axes.index("B")] != len(self.images):
                    continue
                change = self._change(output.permute([axes.index(a) for a in "BCN"]))  # [K, N]
                for front, h, w in grids(change.shape[1]):
                    if front and axes == "BCN":  # what is flattened is a whole map
                        continue
                    grid = change[:, front : front + h * w].unflatten(1, (h, w))
                    scored.append((self._score(grid), Layout(axes, front, (h, w))))
        if output.ndim == 3 and {"BNC", "BCN"} <= {layout.axes for score, layout in scored if score >= FOLLOWS}:
            return None  # both of two axes are places: attention from each to each
        best = max(scored, key=lambda pair: pair[0], default=None)
        return None if best is None else (best[1], best[0])

    def _change(self, output: Tensor) -> Tensor:
        """How much each tile changes an output [1 + K, C, ...] at each place: [K, ...]."""
        value = output.detach().float()
        return (value[1:] - value[:1]).abs().sum(1)

    def _score(
        self,
        change: Tensor,  # [K, h, w]
    ) -> float:
        """Correlation, over places and tiles, of how much a place changes and how much of it a tile covers."""
        h, w = change.shape[1:]
        if min(h, w) < 2 or not bool(change.isfinite().all()):
            return -1.0
        mean = change.mean(0)
        relative = change / (mean + 1e-3 * mean.amax() + 1e-30)
        relative = relative - relative.mean(0)
        covered = F.adaptive_avg_pool2d(self.changed[:, None], (h, w))[:, 0]
        covered = covered - covered.mean(0)
        norm = relative.norm() * covered.norm()
        return float((relative * covered).sum() / norm) if norm > 0 else -1.0


def grids(tokens: int) -> Iterator[tuple[int, int, int]]:
    """(tokens in front, rows, columns) that N may be: squares, or all of it and at most twice as long as wide."""
    for side in range(2, math.isqrt(tokens) + 1):
        if tokens - side * side <= min(FRONT, side * side):
            yield tokens - side * side, side, side
    for rows in range(2, tokens // 2 + 1):
        columns, rest = divmod(tokens, rows)
        if not rest and rows != columns and max(rows, columns) <= 2 * min(rows, columns):
            yield 0, rows, columns


@torch.no_grad()
def find_maps(classifier: Any, image: Tensor, names: Sequence[str] | None = None) -> tuple[list[Found], dict[str, Any]]:
    """Every output of these modules that is a map, in the order in which they finish, and what each module gave.

    Args:
        classifier: see `engine.models.protocols.Classifier`; left as it was.
        image: [1, 3, H, W] in [0, 1]; its values do not matter.
        names: of modules; without them all that hold parameters or no others.

    Returns:
        The maps; and by name how often a module ran and the shape of what it gave last.
    """
    module, probe = classifier.module, _Probe(image)
    if names is None:
        parts = {
            name: part for name, part in module.named_modules()
            if name and (any(True for _ in part.parameters()) or not any(True for _ in part.children()))
        }  # fmt: skip
    else:
        parts = dict(zip(names, find_modules(module, names), strict=True))
    found: list[Found] = []
    gave: dict[str, Any] = {}

    def see(name: str, call: int, output: Any) -> None:
        tensors = leaves(output)
        gave[name] = call, [[("B" if d == len(probe.images) else d) for d in t.shape] for t in tensors]
        for leaf, tensor in enumerate(tensors):
            best = probe.layout(tensor)
            if best is not None and best[1] >= FOLLOWS:
                tap = Tap(name, call, leaf, best[0])
                maps = tap.read(tensor)
                found.append(Found(tap, (maps.shape[2], maps.shape[3]), maps.shape[1]))
                break

    with frozen(module), watched(module, parts, see):
        classifier.logits(probe.images)
    once = {name for name, (calls, _) in gave.items() if calls == 1}
    return [
        dataclasses.replace(f, tap=dataclasses.replace(f.tap, call=None)) if f.tap.name in once else f for f in found
    ], gave


def resolve_taps(classifier: Any, image: Tensor, taps: Sequence[str]) -> list[str]:
    """Taps with the layout that each was found to have; one whose text brings a layout is taken at its word.

    Raises:
        UsageError: there is no such module, it does not run or runs more than once, or its output is no map.
    """
    wanted = [Tap.parse(text) for text in taps]
    open_ones = list(dict.fromkeys(t.name for t in wanted if t.layout is None))
    find_modules(classifier.module, [t.name for t in wanted])
    maps, gave = find_maps(classifier, image, open_ones) if open_ones else ([], {})
    out = []
    for tap in wanted:
        if tap.layout is not None:
            out.append(str(tap))
            continue
        calls, shapes = gave.get(tap.name, (0, []))
        if not calls:
            raise UsageError(f"tap: {tap.name!r} does not run in a pass")
        if calls > 1 and tap.call is None:
            raise _twice(tap.name, calls)
        call = None if calls == 1 else tap.call
        fitting = [f for f in maps if f.tap.name == tap.name and f.tap.call == call and tap.leaf in (0, f.tap.leaf)]
        if not fitting:
            given = " and ".join(str(shape).replace("'", "") for shape in shapes) or "no tensor"
            raise UsageError(
                f"tap: {str(tap)!r} gives {given}; no two axes of it follow the image (where they do all the same, say "
                f"how it is read: {tap.name}@BCHW)"
            )
        out.append(str(fitting[0].tap))
    return out


def choose_taps(classifier: Any, image: Tensor) -> list[str]:
    """Names worth tapping: of every resolution that the model passes through, the last map, finest first.

    From half the image's resolution on, where there is one; then also the last maps at the image's own, of which the
    head takes little. Where all have one resolution (a vision transformer), three of them, spread over the depth.

    Args:
        classifier: see `engine.models.protocols.Classifier`.
        image: [1, 3, H, W] in [0, 1]; its values do not matter.
    """
    return [str(tap) for tap in _chosen(find_maps(classifier, image)[0], image)]


def _chosen(maps: Sequence[Found], image: Tensor) -> list[Tap]:
    h, w = image.shape[2:]
    # More than the image in other numbers.
    whole = [f.tap for f in maps if f.size == (h, w) and f.channels > image.shape[1]][-1:]
    finished = [f for f in maps if f.size[0] <= h and f.size[1] <= w]
    half = [f for f in finished if 2 * f.size[0] <= h]
    finished, whole = (half, whole) if half else (finished, [])
    last = {f.size: f.tap for f in finished}
    if len(last) == 1 and len(finished) > 3:
        return whole + [finished[len(finished) * i // 3 - 1].tap for i in (1, 2, 3)]
    return whole + [last[size] for size in sorted(last, reverse=True)][-LEVELS:]


# Gradients at a tap


@contextmanager
def tapped_edges(module: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[Tap, tuple[Tensor, GradientEdge]]]:
    """Hold a copy of each tap's tensor as the module gave it, and where its gradient is, for the pass inside."""
    parts = dict(zip([t.name for t in taps], find_modules(module, [t.name for t in taps]), strict=True))
    held: dict[Tap, tuple[Tensor, GradientEdge]] = {}

    def see(name: str, call: int, output: Any) -> None:
        for tap in taps:
            if tap.name == name and tap.call in (None, call):
                tensor = tap.tensor(output)
                if tensor.requires_grad:  # the edge of now: of the values before anything changes them in place
                    held[tap] = tensor.detach().clone(), get_gradient_edge(tensor)

    with watched(module, parts, see):
        yield held


def choose_layer(classifier: Any, image: Tensor, layer: str | None = None) -> str:
    """The tap that Grad-CAM looks at: `layer`, or the last maps through which the answer goes.

    After a transformer's last attention, that is its class token alone; the grid before it is taken.

    Raises:
        UsageError: the layer is no map. NoMaps: there is none.
    """
    if layer is not None:
        return resolve_taps(classifier, image, [layer])[0]
    maps = find_maps(classifier, image)[0]
    taps = [f.tap for f in maps]
    order = [*_chosen(maps, image)[-1:], *reversed(taps)]
    with frozen(classifier.module), tapped_edges(classifier.module, taps) as held, torch.enable_grad():
        logits = classifier.logits(_Probe(image).images[:1].requires_grad_())
        weights = torch.arange(1, logits.shape[1] + 1, device=logits.device).to(logits.dtype).cos()
        there = [tap for tap in dict.fromkeys(order) if tap in held]
        for tap in there:
            (gradient,) = torch.autograd.grad(
                (logits * weights).sum(), [held[tap][1]], retain_graph=True, allow_unused=True
            )
            if gradient is not None and bool(tap.read(gradient).any()):
                return str(tap)
    raise NoMaps(
        "layer: the classifier has no feature maps through which its answer goes; Grad-CAM has nothing to show"
    )
