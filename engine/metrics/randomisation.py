"""Sanity checks: maps of a model whose weights are made random should be other maps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..showing import one_line
from .inputs import check_computed
from .masking import spearman

ExplainModule = Callable[[nn.Module, Tensor, Tensor], Tensor]  # module, images [N, C, H, W], targets [N] to maps
LayerOrder = Literal["top_down", "bottom_up", "independent"]


@dataclass(frozen=True)
class Randomised:
    """Likeness of maps before and after, on the CPU in float64.

    Attributes:
        layers: names of the layers, in the order in which they were made random.
        correlations: [N, L], Spearman's, of the map after each of them with the map before.
    """

    layers: list[str]
    correlations: Tensor

    __repr__ = one_line

    @property
    def mean(self) -> Tensor:
        """Over layers: [N], the nearer 0 the better."""
        return self.correlations.mean(1)

    @property
    def last(self) -> Tensor:
        """With all layers random (in the orders that keep them so): [N]."""
        return self.correlations[:, -1]


def random_layers(module: nn.Module, order: LayerOrder = "top_down", seed: int = 42) -> Iterator[tuple[str, nn.Module]]:
    """A copy of a module of which one layer after the other is made random by its own `reset_parameters`.

    `top_down` begins at the output and `bottom_up` at the input, layers staying random; with `independent` one is.

    Raises:
        UsageError: the order is unknown, or no layer can be made random.
    """
    if order not in ("top_down", "bottom_up", "independent"):
        raise UsageError(f"order: expected top_down, bottom_up or independent, got {order!r}")
    changed = copy.deepcopy(module)
    layers = [(name, part) for name, part in changed.named_modules() if hasattr(part, "reset_parameters")]
    if not layers:
        raise UsageError(
            f"module: no layer of {type(module).__name__} has reset_parameters, so none can be made random"
        )
    for name, part in reversed(layers) if order == "top_down" else layers:
        if order == "independent":
            changed.load_state_dict(module.state_dict())
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)  # every layer's, as in Quantus
            part.reset_parameters()
        yield name, changed


def mprt(
    explain: ExplainModule,
    module: nn.Module,
    images: Tensor,  # [N, C, H, W]
    saliency: Tensor,  # [N, ...], the maps of the module as it is
    target: Tensor,  # [N]
    *,
    order: LayerOrder = "top_down",
    seed: int = 42,
) -> Randomised:
    """Model parameter randomisation test: how alike maps stay while layers are made random, the less the better.

    `smooth` MPRT is this with `explain` and maps averaged over noise: see `smoothed`.

    Raises:
        UsageError: an argument does not fit; the message names it. NotFinite: a map holds NaN or infinity.

    Source: Adebayo et al., Sanity checks for saliency maps (arXiv 1810.03292). quantus.MPRT, quantus.SmoothMPRT.
    """
    names, rows = [], []
    for name, changed in random_layers(module, order, seed):
        maps = explain(changed, images, target)
        check_computed(f"explain, {name} random", maps)
        names.append(name)
        rows.append(spearman(saliency.detach().flatten(1), maps.detach().flatten(1)))
    return Randomised(names, torch.stack(rows, 1))


def smoothed(explain: ExplainModule, *, samples: int = 50, magnitude: float = 0.1, seed: int = 0) -> ExplainModule:
    """A method's mean map over Gaussian noise, of `magnitude` times each image's range: for smooth MPRT.

    Raises:
        UsageError: samples or magnitude are not above 0.

    Source: Hedstroem et al., Sanity checks revisited (arXiv 2401.06465), section 3.1.
    """
    if samples < 1 or magnitude <= 0:
        raise UsageError(f"samples, magnitude: expected numbers above 0, got {samples} and {magnitude}")

    def mean_map(module: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        span = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
        total: Tensor | None = None
        for _ in range(samples):
            noise = torch.randn(images.shape, generator=g).to(images) * magnitude * span
            maps = explain(module, images + noise, target).detach()
            total = maps if total is None else total + maps
        assert total is not None
        return total / samples

    return mean_map


def efficient_mprt(
    explain: ExplainModule,
    module: nn.Module,
    images: Tensor,  # [N, C, H, W]
    saliency: Tensor,  # [N, ...], the maps of the module as it is
    target: Tensor,  # [N]
    *,
    bins: int = 100,
    seed: int = 42,
) -> Tensor:
    """Relative rise of each map's histogram entropy once all layers are random, the higher the better: [N].

    Args:
        bins: of the histogram over each map's own range.

    Raises:
        UsageError: an argument does not fit, or a map before has no entropy (it is constant).

    Source: Hedstroem et al., Sanity checks revisited (arXiv 2401.06465), section 3.2. quantus.EfficientMPRT.
    """
    if bins < 2:
        raise UsageError(f"bins: expected at least 2, got {bins}")
    for _name, changed in random_layers(module, seed=seed):
        last = changed
    before, after = (histogram_entropy(maps, bins) for maps in (saliency, explain(last, images, target)))
    if constant := (before == 0).nonzero().flatten().tolist():
        raise UsageError(f"saliency: map {constant[0]} is constant; its entropy cannot rise by a share of itself")
    return (after - before) / before


def histogram_entropy(
    maps: Tensor,  # [N, ...]
    bins: int,
) -> Tensor:
    """Entropy in nats of each map's values in equal bins over their own range: [N]."""
    out = []
    for values in maps.detach().double().flatten(1).cpu():
        low, high = float(values.min()), float(values.max())
        counts = torch.histc(values, bins, low, high) if high > low else values.new_tensor([1.0])
        shares = counts / counts.sum()
        out.append(-torch.special.xlogy(shares, shares).sum())
    return torch.stack(out) if out else torch.zeros(0, dtype=torch.float64)
