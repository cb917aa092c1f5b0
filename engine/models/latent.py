"""A class-conditional UNet over an AutoencoderKL's latents: the digits pack's model."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from ..errors import UsageError
from .backbone import Backbone


class ClassConditionalLatentDiffusion(Backbone):
    """`UNet2DModel` with class embeddings, the last one null, over the latents of an `AutoencoderKL`.

    Args:
        vae, unet: diffusers models, or any with the same calls and `config`.
        alphas_cumprod, prediction, options: see `Backbone`.
        names: one for each class, if known; the null class has none.

    Raises:
        UsageError: see `Backbone`; or the UNet has no class embeddings.
    """

    networks = {"unet": "UNet2DModel", "vae": "AutoencoderKL"}  # noqa: RUF012
    unet: Any = property(attrgetter("denoiser"))

    def __init__(
        self,
        vae: Any,
        unet: Any,
        alphas_cumprod: Tensor,
        names: Sequence[str] | None = None,
        prediction: str = "epsilon",
        **options: Any,
    ) -> None:
        embedded = unet.config.num_class_embeds
        if not embedded or (names is not None and len(names) != embedded - 1):
            given = "" if names is None else f" for {len(names)} names"
            raise UsageError(f"unet: num_class_embeds is {embedded}{given}; expected the classes and the null class")
        super().__init__(vae, unet, alphas_cumprod, classes=embedded - 1, names=names, prediction=prediction, **options)
