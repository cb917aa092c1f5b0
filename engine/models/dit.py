"""DiT: a class-conditional diffusion transformer over an AutoencoderKL's latents."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from .backbone import Backbone


class DiffusionTransformer(Backbone):
    """A `DiTTransformer2DModel`; of its output the noise is used, the learned variance left out.

    Args and errors: see `Backbone`.

    Source: Peebles and Xie, arXiv 2212.09748.
    """

    networks = {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}  # noqa: RUF012
    transformer: Any = property(attrgetter("denoiser"))

    def __init__(
        self,
        vae: Any,
        transformer: Any,
        alphas_cumprod: Tensor,
        names: Sequence[str] | None = None,
        prediction: str = "epsilon",
        **options: Any,
    ) -> None:
        classes = int(transformer.config.num_embeds_ada_norm)
        super().__init__(
            vae, transformer, alphas_cumprod, classes=classes, names=names, prediction=prediction, **options
        )

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Tensor,  # [B] class indices
    ) -> Tensor:
        """The noise in `z`, or what the transformer was trained to predict: [B, C, h, w]."""
        return super().denoise(z, timestep, condition)[:, : z.shape[1]]
