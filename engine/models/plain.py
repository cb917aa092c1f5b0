"""`UNet2DModel` and `AutoencoderKL` in plain torch, as far as the digits pack needs them.

`import diffusers` takes three times as long as `import torch`, and opening the pack is what most commands begin with.
Names of parameters, operations and their order are those of diffusers, so that weights fit and every bit is the same
(tests/engine/models/test_plain.py). What a configuration asks for beyond this is left to diffusers: see `fits`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Fields that may differ, and the only value under which each of the others is computed here.
SIZES = (
    "sample_size", "in_channels", "out_channels", "latent_channels", "layers_per_block", "block_out_channels",
    "norm_num_groups", "norm_eps", "attention_head_dim", "num_class_embeds", "scaling_factor", "force_upcast",
)  # fmt: skip
ONLY: dict[str, Any] = {
    "act_fn": "silu", "add_attention": True, "attn_norm_num_groups": None, "center_input_sample": False,
    "class_embed_type": None, "downsample_padding": 1, "downsample_type": "conv", "dropout": 0.0,
    "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2D",
    "num_train_timesteps": None, "resnet_time_scale_shift": "default", "time_embedding_dim": None,
    "time_embedding_type": "positional", "upsample_type": "conv", "latents_mean": None, "latents_std": None,
    "mid_block_add_attention": False, "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True,
}  # fmt: skip
BLOCKS = {"AttnDownBlock2D", "AttnUpBlock2D", "DownEncoderBlock2D", "UpDecoderBlock2D"}


def fits(config: Mapping[str, Any]) -> bool:
    """Whether a whole configuration of diffusers asks for nothing but what is computed here."""
    return all(
        name.startswith("_")
        or (name in SIZES and value is not None)
        or (name in ONLY and value == ONLY[name])
        or (name in ("down_block_types", "up_block_types") and BLOCKS.issuperset(value))
        for name, value in config.items()
    )


class Fields(dict[str, Any]):
    """A configuration whose fields are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Said(NamedTuple):
    """What a network returns, named as diffusers names it."""

    sample: Tensor


class Posterior(NamedTuple):
    """The distribution of an image's latents, as far as it is used."""

    mean: Tensor

    def mode(self) -> Tensor:
        """Its most likely value."""
        return self.mean


class Encoded(NamedTuple):
    """What an encoder returns, named as diffusers names it."""

    latent_dist: Posterior


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut; between them the time's embedding is added."""

    def __init__(self, before: int, after: int, groups: int, eps: float, time: int | None = None) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before, eps), nn.Conv2d(before, after, 3, padding=1)
        self.time_emb_proj = None if time is None else nn.Linear(time, after)
        self.norm2, self.conv2 = nn.GroupNorm(groups, after, eps), nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = None if before == after else nn.Conv2d(before, after, 1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._run, x, time)  # type: ignore[operator]
        return self._run(x, time)

    def _run(self, x: Tensor, time: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class SelfAttention(nn.Module):
    """Every location attends to every other."""

    def __init__(self, channels: int, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = channels // width
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.group_norm(x.view(batch, channels, height * width)).transpose(1, 2)
        q, k, v = (
            to(tokens).view(batch, -1, self.heads, channels // self.heads).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, channels)
        return self.to_out[0](out).transpose(-1, -2).reshape(batch, channels, height, width) + x


class Downsample(nn.Module):
    """Half the size; a VAE pads only below and to the right."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv, self.padding = nn.Conv2d(channels, channels, 3, stride=2, padding=padding), padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous() if len(x) >= 64 else x  # as diffusers does
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one size: residual blocks, attention behind each in a UNet, and the way to the next size."""

    def __init__(
        self, resnets: list[ResnetBlock], attentions: list[SelfAttention], sampler: Downsample | Upsample | None = None
    ) -> None:
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if sampler is not None:
            name = "downsamplers" if isinstance(sampler, Downsample) else "upsamplers"
            self.add_module(name, nn.ModuleList([sampler]))

    def forward(self, x: Tensor) -> Tensor:  # a VAE's: a UNet runs the parts itself
        for part in (part for parts in self.children() for part in parts):  # type: ignore[attr-defined]
            x = part(x)
        return x


class UNet(nn.Module):
    """A class-conditional `UNet2DModel` with attention on every level."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = Fields(config)
        c = self.config
        widths, layers, groups, eps = c.block_out_channels, c.layers_per_block, c.norm_num_groups, c.norm_eps
        time = 4 * widths[0]

        def resnet(before: int, after: int) -> ResnetBlock:
            return ResnetBlock(before, after, groups, eps, time)

        def attend(width: int) -> SelfAttention:
            return SelfAttention(width, c.attention_head_dim, groups, eps)

        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1, self.time_embedding.linear_2 = nn.Linear(widths[0], time), nn.Linear(time, time)
        self.class_embedding = nn.Embedding(c.num_class_embeds, time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        held, before = [widths[0]], widths[0]  # channels of what goes across
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            resnets = [resnet(before if j == 0 else width, width) for j in range(layers)]
            sampler = None if last else Downsample(width, padding=1)
            self.down_blocks.append(Level(resnets, [attend(width) for _ in resnets], sampler))
            held += [width] * (layers + (not last))
            before = width
        self.mid_block = Level([resnet(before, before), resnet(before, before)], [attend(before)])
        for i, width in enumerate(reversed(widths)):
            resnets = [resnet((before if j == 0 else width) + held.pop(), width) for j in range(layers + 1)]
            sampler_up = None if i == len(widths) - 1 else Upsample(width)
            self.up_blocks.append(Level(resnets, [attend(width) for _ in resnets], sampler_up))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, before, eps)
        self.conv_out = nn.Conv2d(before, c.out_channels, 3, padding=1)

    def forward(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B] or []
        class_labels: Tensor,  # [B]
    ) -> Said:
        time = self.embed(z, timestep, class_labels)
        x = self.conv_in(z)
        held: tuple[Tensor, ...] = (x,)
        for level in self.down_blocks:
            x, made = self.down(level, x, time)
            held += made
        x = self.middle(x, time)
        for level in self.up_blocks:
            count = len(level.resnets)  # type: ignore[arg-type]
            x, held = self.up(level, x, time, held[-count:]), held[:-count]
        return Said(self.end(x))

    def embed(self, z: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """What every block is told of timestep and class: [B, 4 widths[0]]."""
        embedded = sinusoids(timestep.expand(len(z)), self.config.block_out_channels[0]).to(z.dtype)
        linears = self.time_embedding
        time: Tensor = linears.linear_2(F.silu(linears.linear_1(embedded)))  # type: ignore[operator]
        return time + self.class_embedding(class_labels)

    def down(self, level: Any, x: Tensor, time: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A level on the way down: what goes on, and all that goes across."""
        held = []
        for resnet, attention in zip(level.resnets, level.attentions, strict=True):
            x = attention(resnet(x, time))
            held.append(x)
        for sampler in getattr(level, "downsamplers", ()):
            x = sampler(x)
            held.append(x)
        return x, tuple(held)

    def middle(self, x: Tensor, time: Tensor) -> Tensor:
        """The lowest level."""
        first, second = self.mid_block.resnets
        out: Tensor = second(self.mid_block.attentions[0](first(x, time)), time)
        return out

    def up(self, level: Any, x: Tensor, time: Tensor, held: Sequence[Tensor]) -> Tensor:
        """A level on the way up, with what came across for it, the last first."""
        for resnet, attention, across in zip(level.resnets, level.attentions, reversed(held), strict=True):
            x = attention(resnet(torch.cat([x, across], dim=1), time))
        for sampler in getattr(level, "upsamplers", ()):
            x = sampler(x)
        return x

    def end(self, x: Tensor) -> Tensor:
        """From the last level to the answer."""
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


def sinusoids(
    timestep: Tensor,  # [B]
    width: int,
) -> Tensor:
    """Cosines, then sines, of a timestep at `width` / 2 frequencies: [B, width] float32."""
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = timestep[:, None].float() * torch.exp(exponent)[None]
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class Coder(nn.Module):
    """The encoder of an `AutoencoderKL` (`downwards`) or its decoder."""

    def __init__(self, before: int, after: int, widths: list[int], layers: int, groups: int, downwards: bool) -> None:
        super().__init__()

        def resnet(before: int, after: int) -> ResnetBlock:
            return ResnetBlock(before, after, groups, 1e-6)

        self.conv_in = nn.Conv2d(before, widths[0], 3, padding=1)
        self.downwards = downwards
        levels = []
        for i, (previous, width) in enumerate(pairwise([widths[0], *widths])):
            resnets = [resnet(previous if j == 0 else width, width) for j in range(layers)]
            last = i == len(widths) - 1
            levels.append(Level(resnets, [], None if last else Downsample(width, 0) if downwards else Upsample(width)))
        deep = widths[-1] if downwards else widths[0]
        if downwards:
            self.down_blocks = nn.ModuleList(levels)
        else:
            self.up_blocks = nn.ModuleList(levels)
        self.mid_block = Level([resnet(deep, deep), resnet(deep, deep)], [])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        levels = [*self.down_blocks, self.mid_block] if self.downwards else [self.mid_block, *self.up_blocks]
        for level in levels:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """An `AutoencoderKL` without attention; images are in [-1, 1]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = Fields(config)
        c = self.config
        widths, latent, layers, groups = c.block_out_channels, c.latent_channels, c.layers_per_block, c.norm_num_groups
        self.encoder = Coder(c.in_channels, 2 * latent, widths, layers, groups, downwards=True)
        self.decoder = Coder(latent, c.out_channels, widths[::-1], layers + 1, groups, downwards=False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    def encode(
        self,
        image: Tensor,  # [B, 3, H, W]
    ) -> Encoded:
        """The distribution of its latents [B, C, h, w], not scaled."""
        return Encoded(Posterior(self.quant_conv(self.encoder(image)).chunk(2, dim=1)[0]))

    def decode(
        self,
        z: Tensor,  # [B, C, h, w], not scaled
    ) -> Said:
        """The image [B, 3, H, W]."""
        return Said(self.decoder(self.post_quant_conv(z)))


def scaled_linear(config: Mapping[str, Any]) -> Tensor:
    """alphas_cumprod [T] float64 of a scheduler whose betas are the squares of a line, as diffusers computes them."""
    roots = (config["beta_start"] ** 0.5, config["beta_end"] ** 0.5)
    betas = torch.linspace(*roots, config["num_train_timesteps"], dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0).double()
