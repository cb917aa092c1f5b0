"""Memory of a guided step: measured, saved by activation checkpointing, and kept under a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..config import Settings
from ..errors import UsageError
from ..models.freezing import frozen
from ..models.holding import Shared, switched
from ..models.protocols import Classifier, Decoder, Diffusion
from .pullback import PullbackMode
from .step import GuidedStep


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors made inside that were alive at once: `peak`; the same on every device.

    Scratch space inside an operation is not seen, nor what an allocator keeps for later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.now = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # In-place operations and views return storages that were there before.
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def checkpointed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have diffusers' blocks recompute their activations in the backward pass, and leave them as they were.

    Needs the `autograd` pullback. Only in this thread, and where a gradient is asked for: other passes run as always.
    """
    blocks = [m for module in modules for m in module.modules() if hasattr(m, "gradient_checkpointing")]
    with _choosing(blocks), switched(_recomputing, True):
        yield


def _choose(block: Any) -> Callable[[], None]:
    enabled, function = block.gradient_checkpointing, block.__dict__.get("_gradient_checkpointing_func")
    block.gradient_checkpointing, block._gradient_checkpointing_func = True, _run_block

    def undo() -> None:
        block.gradient_checkpointing, block._gradient_checkpointing_func = enabled, function
        if function is None:
            del block._gradient_checkpointing_func

    return undo


def _run_block(run: Callable[..., Any], *args: Any) -> Any:
    if not _recomputing.get():
        return run(*args)
    # The recomputation may run in a thread of autograd's, and has to do what was done here.
    return checkpoint(partial(copy_context().run, run), *args, use_reentrant=False)


_choosing = Shared(_choose)
_recomputing = ContextVar("recomputing", default=False)  # another thread may run the same blocks without


def step_bytes(
    diffusion: Diffusion,
    classifier: Classifier,
    batch: int,
    settings: Settings,
    pullback: PullbackMode = "functional",
    decoder: Decoder | None = None,
    sides: tuple[int, int] | None = None,
) -> int:
    """Peak bytes of one guided step's tensors, the weights left out; runs the step once, on noise.

    `decoder` is the tiny one, where the settings ask for it; `sides` are height and width, the model's own without it.
    """
    device = next(diffusion.modules()[0].parameters()).device
    channels, side, _ = diffusion.latent_shape
    height, width = sides or (diffusion.image_size, diffusion.image_size)
    factor = diffusion.image_size // side
    z = torch.zeros(batch, channels, height // factor, width // factor, device=device)
    image = z if settings.distance == "latent" else torch.full((batch, 3, height, width), 0.5, device=device)
    target = torch.zeros(batch, dtype=torch.long, device=device)
    timestep = torch.full((batch,), 101, device=device)
    condition = diffusion.condition(target)
    step = GuidedStep(diffusion, classifier, settings.graph, decoder=decoder, mode=pullback)
    own = [] if decoder is None else [decoder.module]
    with frozen(*diffusion.modules(), classifier.module, *own), torch.no_grad(), PeakMemory() as memory:
        step(
            z, timestep, timestep - 100, condition, image, target, guidance_scale=settings.guidance_scale,
            class_scale=settings.class_scale, distance_scale=settings.distance_scale, angle_deg=settings.angle,
        )  # fmt: skip
    return memory.peak


def weight_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))


def largest_batch(
    diffusion: Diffusion,
    classifier: Classifier,
    settings: Settings,
    budget: float,
    slots: Sequence[int],
    pullback: PullbackMode = "functional",
    decoder: Decoder | None = None,
    sides: tuple[int, int] | None = None,
) -> int:
    """The largest of `slots` whose guided step, weights included, fits into `budget` bytes.

    Two steps are measured, with one sample and with two; memory grows in proportion from there.

    Raises:
        UsageError: one sample does not fit; the message says how much it needs.
    """
    fixed = weight_bytes([*diffusion.modules(), classifier.module, *([] if decoder is None else [decoder.module])])
    one = step_bytes(diffusion, classifier, 1, settings, pullback, decoder, sides)
    two = step_bytes(diffusion, classifier, 2, settings, pullback, decoder, sides) if budget >= fixed + one else one
    fitting = [s for s in slots if fixed + one + (s - 1) * (two - one) <= budget]
    if not fitting:
        raise UsageError(
            f"memory_budget: one sample needs {(fixed + one) / 1e9:.2f} GB, {fixed / 1e9:.2f} of it weights, and not "
            f"{budget / 1e9:.2f} GB; checkpointing, a half-precision dtype or a smaller image_size need less"
        )
    return max(fitting)
