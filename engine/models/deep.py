"""Deep features of a UNet: what its last level is given from below, which neighbouring timesteps nearly share.

A UNet's last level sees the latents themselves through the skip connections of its first one; all between, where most
of the weights are, works at lower resolutions and changes slowly along a run. So a step may take these features from
an earlier step and run the outermost level alone.

Source: the idea is DeepCache's (Ma et al., arXiv 2312.00858), the cut here is at whole levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .plain import UNet

if TYPE_CHECKING:
    from .protocols import Diffusion

LEVELS = {
    "UNet2DModel": ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    "UNet2DConditionModel": ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
}


class Halves(NamedTuple):
    """A UNet in pieces, everything but latents given.

    Attributes:
        begin: from the latents to the first hidden state.
        down, up: for each level from its hidden state, `up` with its skips, to (hidden state, skips made).
        middle: of the lowest level.
        end: from the last hidden state to what the UNet says.
        wanted: how many skips each `up` takes.
    """

    begin: Callable[[Tensor], Tensor]
    down: list[Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]]
    middle: Callable[[Tensor], Tensor]
    up: list[Callable[[Tensor, tuple[Tensor, ...]], Tensor]]
    end: Callable[[Tensor], Tensor]
    wanted: list[int]


def no_deep_features(diffusion: Diffusion) -> str | None:
    """Why a diffusion model has no deep features to reuse; None if it has."""
    if not hasattr(diffusion, "answer_reusing"):
        return f"{type(diffusion).__name__} has no answer_reusing, which says deep features and takes them"
    denoiser = getattr(diffusion, "denoiser", None)
    kind = type(denoiser).__name__
    if denoiser is None:  # another package's model, which sees to it itself
        return None
    if isinstance(denoiser, UNet):
        return None if len(denoiser.down_blocks) > 1 else "this UNet has one level, nothing is deep in it"
    if kind not in LEVELS:
        return f"deep features are those of a UNet's lower levels, and this model's denoiser is a {kind}"
    config = denoiser.config
    levels = [*config.down_block_types, *config.up_block_types]
    if strange := sorted({level for level in levels if level not in LEVELS[kind]}):
        return f"this UNet has levels of {strange[0]}, which cannot be run apart"
    if len(config.down_block_types) < 2:
        return "this UNet has one level, nothing is deep in it"
    if config.center_input_sample or getattr(config, "time_embedding_type", "positional") != "positional":
        return "this UNet does more with latents or timesteps than its levels say"
    return None


class Reusing:
    """A UNet that is called like itself, takes `deep` features [B, D, h', w'] in place of its lower levels, and keeps
    them.

    Without `deep` all levels run and `deep` is theirs afterwards; the answer is the UNet's own, bit by bit.
    """

    def __init__(self, unet: Any, deep: Tensor | None = None) -> None:
        self.unet, self.deep, self.config = unet, deep, unet.config

    def parameters(self) -> Any:
        """The UNet's own."""
        return self.unet.parameters()

    def __call__(self, z: Tensor, timestep: Tensor, **given: Any) -> Any:
        halves = _halves(self.unet, z, timestep, **given)
        x = halves.begin(z)
        skips: tuple[Tensor, ...] = (x,)
        for down in halves.down if self.deep is None else halves.down[:1]:
            x, made = down(x)
            skips += made
        if self.deep is None:
            x = halves.middle(x)
            for up, count in zip(halves.up[:-1], halves.wanted[:-1], strict=True):
                x, skips = up(x, skips[-count:]), skips[:-count]
            self.deep = x
        return _Said(halves.end(halves.up[-1](self.deep, skips[: halves.wanted[-1]])))


class _Said(NamedTuple):
    sample: Tensor


def _halves(unet: Any, z: Tensor, timestep: Tensor, **given: Any) -> Halves:
    if isinstance(unet, UNet):
        time = unet.embed(z, timestep, given["class_labels"])
        return Halves(
            unet.conv_in,
            [lambda x, level=level: unet.down(level, x, time) for level in unet.down_blocks],  # type: ignore[misc]
            lambda x: unet.middle(x, time),
            [lambda x, skips, level=level: unet.up(level, x, time, skips) for level in unet.up_blocks],  # type: ignore[misc]
            unet.end,
            [len(level.resnets) for level in unet.up_blocks],  # type: ignore[arg-type]
        )
    if type(unet).__name__ == "UNet2DModel":
        time, context = _class_time(unet, z, timestep, given["class_labels"]), None
    else:
        time, context = _context_time(unet, z, timestep, **given)

    def more(level: Any) -> dict[str, Any]:
        return {"encoder_hidden_states": context} if getattr(level, "has_cross_attention", False) else {}

    def end(x: Tensor) -> Tensor:
        if unet.conv_norm_out:
            x = unet.conv_act(unet.conv_norm_out(x))
        out: Tensor = unet.conv_out(x)
        return out

    return Halves(
        unet.conv_in,
        [lambda x, level=level: level(x, time, **more(level)) for level in unet.down_blocks],  # type: ignore[misc]
        lambda x: x if unet.mid_block is None else unet.mid_block(x, time, **more(unet.mid_block)),
        [lambda x, skips, level=level: level(x, skips, time, **more(level)) for level in unet.up_blocks],  # type: ignore[misc]
        end,
        [len(level.resnets) for level in unet.up_blocks],
    )


def _class_time(unet: Any, z: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    times = timestep * torch.ones(len(z), dtype=timestep.dtype, device=timestep.device)
    embedded: Tensor = unet.time_embedding(unet.time_proj(times).to(dtype=unet.dtype))
    if unet.class_embedding is None:
        return embedded
    if unet.config.class_embed_type == "timestep":
        labels = unet.time_proj(labels)
    return embedded + unet.class_embedding(labels).to(dtype=unet.dtype)


def _context_time(
    unet: Any,
    z: Tensor,
    timestep: Tensor,
    *,
    encoder_hidden_states: Tensor,
    timestep_cond: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    time = unet.time_embedding(unet.get_time_embed(sample=z, timestep=timestep), timestep_cond)
    added = unet.get_aug_embed(
        emb=time, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
    )
    time = time if added is None else time + added
    time = time if unet.time_embed_act is None else unet.time_embed_act(time)
    context = unet.process_encoder_hidden_states(
        encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
    )
    return time, context
