"""Batch and instance norms, whose gradient torch gets wrong on a CPU, made right wherever something is differentiated.

torch 2.13's backward of a batch norm on a CPU (and of an instance norm, which is one) walks input and gradient in one
order of memory. A size of 1 lets the two seem to agree when they do not, and the gradient comes out as noise: for a
single image, as soon as the norm's output becomes tokens (`flatten(2).transpose(1, 2)`: LeViT, CvT, convolutional
stems) or its input is channels-last; for maps of one row or column at any batch; and for an instance norm at any batch,
because it folds the batch away. No other operator does this, of those that tests/engine/models/test_norms.py probes.

So input and gradient are brought into plain order there: a view there and back, free for a plain tensor, whose
derivative is a `reshape`, which copies any other. Graphs that `export.trace` makes hold no backward operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

BATCH_NORMS = (torch.nn.functional.batch_norm, torch.batch_norm)
INSTANCE_NORMS = (torch.nn.functional.instance_norm, torch.instance_norm)


class PlainNorms(TorchFunctionMode):
    """While it is active, norms that are called as functions are made right: about a microsecond for each call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in BATCH_NORMS and func not in INSTANCE_NORMS:
            return func(*args, **(kwargs or {}))
        folded = func in INSTANCE_NORMS
        given = dict(kwargs or {})
        x = args[0] if args else given.pop("input")
        return _plain(func(_plain(x, folded), *args[1:], **given), folded)


def make_plain(module: nn.Module) -> list[RemovableHandle]:
    """Make a module right if it is such a norm, until the hooks are removed."""
    if not isinstance(module, _BatchNorm | _InstanceNorm):
        return []
    folds = isinstance(module, _InstanceNorm)
    return [
        module.register_forward_pre_hook(lambda _, args: tuple(_plain(a, folds) for a in args)),
        module.register_forward_hook(lambda _, __, out: _plain(out, folds), prepend=True),
    ]


def _plain(x: Any, folded: bool) -> Any:
    if isinstance(x, Tensor) and (folded or (x.ndim > 2 and 1 in (x.shape[0], *x.shape[2:]))):
        return x.reshape(-1).reshape(x.shape)
    return x
