"""What latent diffusion models share, and the digits pack's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor, nn

from ..errors import UsageError
from ..labels import match_labels
from .fields import to_noise, unwhitened, whitened


def dtype_of(module: nn.Module) -> torch.dtype:
    """The data type of a module's parameters."""
    return next(module.parameters()).dtype


def encode_kl(
    vae: AutoencoderKL,
    image: Tensor,  # [B, 3, H, W] in [0, 1]
) -> Tensor:
    """Scaled latents [B, C, h, w] in the image's dtype: the encoder's mode (the official code samples instead)."""
    z = vae.encode((image * 2 - 1).to(dtype_of(vae))).latent_dist.mode()
    return whitened(vae.config, z.to(image.dtype))


def decode_kl(
    vae: AutoencoderKL,
    z: Tensor,  # [B, C, h, w]
) -> Tensor:
    """Image [B, 3, H, W] in the latents' dtype, nominally in [-1, 1]."""
    return vae.decode(unwhitened(vae.config, z).to(dtype_of(vae))).sample.to(z.dtype)


def check_parts(vae: nn.Module, denoiser: nn.Module) -> None:
    """Refuse parts that do not belong together, or whose gradient would not be the model's.

    Raises:
        UsageError: latent channels differ, a part mixes data types, or the VAE would decode in tiles.
    """
    config: Any = denoiser.config
    latent, expected = int(config.in_channels), vae.config.latent_channels  # type: ignore[union-attr]
    if latent != expected:
        more = {5: "depth", 7: "upscaling", 8: "editing", 9: "inpainting"}.get(latent) if expected == 4 else None
        raise UsageError(
            f"latent channels: the denoiser takes {latent}, the VAE makes {expected} (in_channels); "
            + (f"a model for {more} takes an image beside them" if more else "they do not belong together")
        )
    made = int(config.out_channels or latent)  # of a DiT the second half is the variance
    if made != latent and not (hasattr(config, "patch_size") and made == 2 * latent):
        raise UsageError(f"latent channels: the denoiser makes {made} (out_channels) of {latent}; expected as many")
    for name, module in (("VAE", vae), ("denoiser", denoiser)):
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()})
        if len(dtypes) != 1:
            raise UsageError(f"dtype: the {name}'s weights mix {' and '.join(dtypes)}; convert them to one")
    if getattr(vae, "use_tiling", False):
        raise UsageError(
            "tiling: the VAE blends overlapping tiles, which changes the gradient; call vae.disable_tiling()"
        )


def check_image_size(image_size: int, factor: int, least: int) -> None:
    """Refuse image sizes that the VAE cannot take.

    Args:
        image_size: side in pixels.
        factor: pixels for each latent location.
        least: latent sizes are multiples of this (the UNet halves them so often).

    Raises:
        UsageError: naming the sizes next to it that fit.
    """
    step = factor * least
    if image_size < step or image_size % step:
        below, above = image_size // step * step, (image_size // step + 1) * step
        near = f"{below} or {above}" if below else str(above)
        raise UsageError(
            f"image_size: {image_size} is no multiple of {step}, as this model's VAE and UNet need; use {near}"
        )


def match_classes(
    labels: Sequence[str],
    classes: int,
    names: Sequence[str] | None,
    indices: Sequence[int] | None,
) -> Tensor:
    """The model's class for each label of the classifier: [labels].

    Without `indices`, labels are found among the class names (see `labels.match_labels`); where there are as many
    labels as classes and not all are found, they are taken to be in the same order, which no name may contradict.

    Args:
        labels: of the classifier.
        classes: how many the model knows, the null class left out.
        names: of the model's classes, if it has any.
        indices: the class of each label, as given by the user.

    Raises:
        UsageError: an index is out of range, or labels cannot be matched.
    """
    if indices is not None:
        if len(indices) != len(labels):
            raise UsageError(f"classes: expected {len(labels)}, one per label, got {len(indices)}")
        for index in indices:
            if not 0 <= index < classes:
                raise UsageError(f"classes: {index} is out of range, this model knows 0 to {classes - 1}")
        return torch.tensor(list(indices), dtype=torch.long)
    known = list(names or [])
    if (found := match_labels(labels, known, "classes")) is not None:
        return torch.tensor(found, dtype=torch.long)
    unknown = next(label for label in labels if label not in known)
    if len(labels) == classes:
        for i, label in enumerate(labels):
            if known.count(label) == 1 and known.index(label) != i:
                raise UsageError(
                    f"labels: {label!r} is label {i} and class {known.index(label)} of the diffusion model, and "
                    f"{unknown!r} is the name of none: the order is another one; say which class belongs to each label "
                    "with classes="
                )
        return torch.arange(classes)
    raise UsageError(
        f"labels: the classifier has {len(labels)}, the diffusion model {classes} classes, and {unknown!r} is not the "
        "name of one; say which class belongs to each label with classes="
    )


class ClassConditionalLatentDiffusion:
    """`UNet2DModel` with class embeddings, the last one null, over the latents of an `AutoencoderKL`.

    Args:
        vae, unet: diffusers models; `vae.config.scaling_factor` is applied here.
        alphas_cumprod: [T] float64.
        labels: one name for each class; the null class has none.
        prediction: what the UNet was trained to predict, see `fields.to_noise`.
    """

    conditioning = "class"

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DModel,
        alphas_cumprod: Tensor,
        labels: Sequence[str],
        prediction: str = "epsilon",
    ) -> None:
        self.prediction = prediction
        self.vae = vae
        self.unet = unet
        self.alphas_cumprod = alphas_cumprod
        self.names = self.labels = list(labels)
        self.null_class = len(self.names)
        self.classes = torch.arange(self.null_class)  # the class of each label
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.image_size = int(vae.config.sample_size)

    def describe(self, labels: Sequence[str], classes: Sequence[int] | None = None) -> None:
        """Say which of the model's classes each label is (see `match_classes`).

        Raises:
            UsageError: they cannot be matched, or a class is out of range.
        """
        self.classes = match_classes(labels, self.null_class, self.names, classes)
        self.labels = list(labels)

    def modules(self) -> list[nn.Module]:
        """The VAE and the UNet."""
        return [self.vae, self.unet]

    def encode(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """Scaled latents [B, C, h, w]: the encoder's mode (the official code samples instead)."""
        return encode_kl(self.vae, image)

    def decode(
        self,
        z: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Image [B, 3, H, W], nominally in [-1, 1]."""
        return decode_kl(self.vae, z)

    def predict_noise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Tensor,  # [B] class indices
    ) -> Tensor:
        """Noise in `z`: [B, C, h, w]."""
        out = self.unet(z, timestep, class_labels=condition).sample
        return to_noise(self.prediction, out, z, self.alphas_cumprod, timestep)

    def condition(
        self,
        targets: Tensor,  # [B]
    ) -> Tensor:
        """The model's class indices of the targets: [B]."""
        return self.classes.to(targets.device)[targets]

    def null_condition(self, batch: int) -> Tensor:
        """The null class, `batch` times."""
        return torch.full((batch,), self.null_class, dtype=torch.long, device=next(self.unet.parameters()).device)
