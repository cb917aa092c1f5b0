"""Low-rank changes of a network's weights: trained beside it, kept in a small file, merged into a copy of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import CounterlensError

UP, DOWN = "up", "down"  # what a file names the two factors of a layer's change


class LowRank(nn.Module):
    """A weight [out, ...] plus up [out, rank] @ down [rank, ...], at first nothing, for `nn.utils.parametrize`."""

    def __init__(self, weight: Tensor, rank: int, g: torch.Generator) -> None:
        super().__init__()
        outs, ins = weight.flatten(1).shape
        rank = min(rank, outs, ins)
        self.up = nn.Parameter(torch.zeros(outs, rank))
        self.down = nn.Parameter(torch.randn(rank, ins, generator=g) / math.sqrt(ins))

    def forward(self, weight: Tensor) -> Tensor:
        return changed(weight, self.up, self.down)


def changed(
    weight: Tensor,  # [out, ...]
    up: Tensor,  # [out, rank]
    down: Tensor,  # [rank, the others' product]
) -> Tensor:
    """The weight with its change: [out, ...]."""
    return weight + (up @ down).view_as(weight)


def attach(network: nn.Module, rank: int, g: torch.Generator) -> dict[str, LowRank]:
    """Give every convolution and linear layer a change of this rank to be trained, and hold everything else.

    Returns:
        The changes by the layers' names.
    """
    network.requires_grad_(False)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    changes = {name: LowRank(layer.weight, rank, g) for name, layer in layers.items()}
    for name, change in changes.items():
        parametrize.register_parametrization(layers[name], "weight", change)
    return changes


def save_changes(changes: Mapping[str, LowRank], path: Path) -> None:
    """Write changes in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    factors = {f"{name}.{UP}": change.up for name, change in changes.items()}
    factors |= {f"{name}.{DOWN}": change.down for name, change in changes.items()}
    save_file({name: factor.detach().half().contiguous() for name, factor in factors.items()}, path)


def merged(network: nn.Module, path: Path) -> nn.Module:
    """A copy of the network with the changes in its weights; summed in float32, held in its own data type.

    Raises:
        CounterlensError: the file is corrupt, or it is another network's.
    """
    other = copy.deepcopy(network)
    try:
        factors = {name: factor.float() for name, factor in load_file(path).items()}
        for name in sorted({name.rpartition(".")[0] for name in factors}):
            weight = other.get_parameter(f"{name}.weight")
            new = changed(weight.float(), factors[f"{name}.{UP}"], factors[f"{name}.{DOWN}"])
            weight.data = new.to(weight.dtype)
    except (SafetensorError, OSError, AttributeError, KeyError, RuntimeError) as error:
        raise CounterlensError(f"{path}: cannot be read as changes of this network ({error})") from error
    return other
