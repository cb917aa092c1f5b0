"""GuidedStep: one denoising step under a classifier's gradient, cleaned by the consensus filter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from counterlens.kernels.guided_update import guided_update

from ..config import StepOptions
from ..models.conditions import Condition, cat
from ..models.predictions import EPSILON, to_clean, to_noise
from ..models.protocols import Classifier, Decoder, Diffusion
from .pullback import Pull, PullbackMode, pullback
from .spans import span

Scale = float | Tensor  # a number or [B]
EXACT = StepOptions()
# What a step can take from an earlier one (`StepOptions.reuses`), and the tensors [B, ...] that this is.
CARRIED = {"features": ("deep_null", "deep_target"), "gradients": ("gradient_class", "gradient_image")}


def carried_names(kinds: Iterable[str]) -> tuple[str, ...]:
    """Names of the tensors that these kinds are, in order."""
    wanted = set(kinds)
    return tuple(name for kind, names in CARRIED.items() if kind in wanted for name in names)


def unit_largest(v: Tensor) -> Tensor:
    """Divide each sample by its largest magnitude; a zero sample stays zero.

    Once the target is certain, gradients of log p shrink below what half precision can hold, and their squares below
    what single precision can; the direction, all that guidance uses, is still there.
    """
    largest = v.abs().amax(dim=(1, 2, 3), keepdim=True)
    return v / torch.where(largest == 0, 1.0, largest)


def of_first_half(pull: Pull) -> Pull:
    """The pullback of a function whose values are the first half of a batch that `pull` goes through."""
    return lambda g: pull(torch.cat([g, torch.zeros_like(g)]))


class GuidedStep:
    """One guided denoising step (z_t -> z_prev) over a diffusion model and a classifier.

    Pullbacks are chained: UNet, decoder, then classifier and distance side by side, so that one linearisation of UNet
    and decoder serves both cotangents. The conditional half of the noise prediction is never differentiated.

    Args:
        diffusion, classifier: see `engine.models.protocols`; frozen by the caller (`models.freezing.frozen`).
        options: what decides the graph. `filter`: of the consensus filter. `gradient`: `exact`, or `detached`: the
            UNet's Jacobian is left out, and both noise predictions are one batch. `distance`: `image`, sum of
            |clamp(x0) - image| over pixels; or `latent`, sum of |z0 - z_image| over latents, which needs no second pull
            through the decoder. `guidance_every` above 1: also return what was added to the unconditional noise, for
            steps that reuse it.
        chunk: of the consensus filter.
        reused: which of what `options.reuses` this step takes from an earlier one instead of computing it: `features`,
            the deep ones of the UNet (see `models.deep`), of both its conditions; `gradients`, of class and distance
            before the filter, which still compares them with this step's own noise predictions.
        decoder: decodes for the gradients in place of the diffusion model's own (see `models.tiny`); with
            `guidance_decoder` tiny, and only with it.
        together: of exact gradients, batches up to this size have both noise predictions in one pass. It runs as many
            kernels for two as for one, but the pullback goes through both: for devices that wait for launches.
        with_directions: also return the two directions that the filter compares: the classifier's score, minus
            sqrt(1 - abar) times its gradient and up to a factor for each sample, and the generator's, eps_c - eps_u.
        mode: of the pullback, `functional` or `autograd`.
        backend: of the kernels.

    Source: LDCE (arXiv 2310.06668), section 3 and algorithm 1; no classifier-free term is added, as in its code.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        classifier: Classifier,
        options: StepOptions = EXACT,
        *,
        chunk: int = 1,
        reused: Sequence[str] = (),
        decoder: Decoder | None = None,
        together: int = 0,
        with_directions: bool = False,
        mode: PullbackMode = "functional",
        backend: str = "auto",
    ) -> None:
        if (decoder is not None) != (options.guidance_decoder == "tiny"):
            raise ValueError(f"decoder: guidance_decoder is {options.guidance_decoder}, got {decoder}")
        if not set(reused) <= set(options.reuses):
            raise ValueError(f"reused: expected some of {options.reuses}, which the options reuse, got {reused}")
        self.reused = tuple(reused)
        self.diffusion = diffusion
        self.classifier = classifier
        self.options = options
        self.chunk = chunk
        self.decoder = decoder
        self.together = together
        self.with_directions = with_directions
        self.mode = mode
        self.backend = backend

    def __call__(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        timestep_prev: Tensor,  # [B]
        condition: Condition,  # of the targets, as the diffusion model makes it
        image: Tensor,  # [B, 3, H, W] in [0, 1]; with distance `latent` its latents [B, C, h, w]
        target: Tensor,  # [B] label indices of the classifier
        *,
        guidance_scale: Scale,
        class_scale: Scale,
        distance_scale: Scale,
        angle_deg: Scale,
        carried: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Take one step; every scale and the angle is a number or [B], `carried` are the tensors of what is `reused`.

        Returns:
            z_prev [B, C, h, w]; z0 [B, C, h, w], the clean latents that the guided noise implies; kept_fraction [B],
            the share of locations that the filter kept; with `options.with_guidance` also the guidance [B, C, h, w];
            the tensors of what the options reuse and this step computed, see `CARRIED`; and with `with_directions`
            score and reference [B, C, h, w] each.
        """
        given = dict(zip(carried_names(self.reused), carried, strict=True))
        diffusion = self.diffusion
        alphas_cumprod = diffusion.alphas_cumprod.to(z)
        abar, abar_prev = alphas_cumprod[timestep], alphas_cumprod[timestep_prev]
        alpha, sigma = abar.sqrt().reshape(-1, 1, 1, 1), (1 - abar).sqrt().reshape(-1, 1, 1, 1)
        null = diffusion.null_condition(z.shape[0])
        decode = self.decoder.decode if self.decoder is not None else diffusion.decode
        # What the denoiser itself says is differentiated: of another answer than noise, the clean estimate is made
        # without dividing by alpha, which is nothing where nearly all is noise.
        prediction = getattr(diffusion, "prediction", EPSILON)
        answer = diffusion.predict_noise if prediction == EPSILON else diffusion.answer  # type: ignore[attr-defined]

        features, deep = "features" in self.options.reuses, [given[n] for n in CARRIED["features"] if n in given]

        def ask(z: Tensor, timestep: Tensor, condition: Condition, *deep: Tensor) -> tuple[Tensor, Tensor]:
            if features:
                return diffusion.answer_reusing(z, timestep, condition, *deep)  # type: ignore[attr-defined]
            said = answer(z, timestep, condition)
            return said, said  # nobody asks for the second

        def to_image(z0: Tensor) -> Tensor:
            return (decode(z0) + 1) / 2

        def log_prob(x0: Tensor) -> Tensor:
            return self.classifier.log_prob(x0, target)

        def difference(x0: Tensor) -> Tensor:
            return (x0.clamp(0, 1) - image).abs().sum(dim=(1, 2, 3))

        exact = self.options.gradient == "exact" and "gradients" not in self.reused

        def ask_both(z: Tensor) -> tuple[Tensor, Tensor]:
            """Both answers in one batch, and deep features; for autograd only the unconditional ones depend on z."""
            both, times = cat(null, condition), torch.cat([timestep, timestep])
            return ask(torch.cat([z, z.detach()]), times, both, *([torch.cat(deep)] if deep else []))

        if exact and len(z) <= self.together:
            with span("UNet, both"):
                said, pull_both, held = pullback(ask_both, z, self.mode, aside=True)
            (said_u, said_c), (deep_u, deep_c) = said.chunk(2), held.chunk(2)
            pull_unet = of_first_half(pull_both)
        elif exact:
            with span("UNet, conditional"):
                said_c, deep_c = ask(z, timestep, condition, *deep[1:])
            with span("UNet, unconditional"):
                said_u, pull_unet, deep_u = pullback(
                    lambda z: ask(z, timestep, null, *deep[:1]), z, self.mode, aside=True
                )
        else:
            with span("UNet, both"):
                said, held = ask_both(z)
                (said_u, said_c), (deep_u, deep_c) = said.chunk(2), held.chunk(2)
        eps_u, eps_c = (to_noise(prediction, said, z, alpha, sigma) for said in (said_u, said_c))
        z0_hat = to_clean(prediction, said_u, z, alpha, sigma)
        if "gradients" not in self.reused:
            with span("decoder"):
                x0, pull_decoder = pullback(to_image, z0_hat, self.mode)

        def through_decoder(objective: Callable[[Tensor], Tensor]) -> Tensor:
            with span("classifier and distance"):
                values, pull_objective = pullback(objective, x0, self.mode)  # [B]
            # R and the filter are free of scale, so every cotangent may be brought back to a safe range.
            with span("classifier and distance, VJP"):
                g = unit_largest(pull_objective(torch.ones_like(values)))
            with span("decoder, VJP"):
                return unit_largest(pull_decoder(g))

        def to_z(g: Tensor) -> Tensor:
            if exact:
                with span("UNet, VJP"):  # the clean estimate is linear in the answer and in z, so is its pullback
                    return to_clean(prediction, pull_unet(g), g, alpha, sigma)
            return g / alpha  # [B, C, h, w]

        if "gradients" in self.reused:
            towards_class, from_image = (given[name] for name in CARRIED["gradients"])
        else:
            towards_class = to_z(through_decoder(log_prob))
            latent = self.options.distance == "latent"
            from_image = to_z((z0_hat - image).sign() if latent else through_decoder(difference))
        with span("filter and update"):
            z_prev, z0, kept_fraction = guided_update(
                z, eps_u, eps_c, towards_class, from_image, abar, abar_prev,
                guidance_scale=guidance_scale, class_scale=class_scale, distance_scale=distance_scale,
                angle_deg=angle_deg, mode=self.options.filter, chunk=self.chunk, backend=self.backend,
            )  # fmt: skip
        out: tuple[Tensor, ...] = (z_prev, z0, kept_fraction)
        if self.options.with_guidance:
            out += ((z - alpha * z0) / sigma - eps_u,)
        if features and "features" not in self.reused:
            out += (deep_u, deep_c)
        if "gradients" in self.options.reuses and "gradients" not in self.reused:
            out += (towards_class, from_image)
        if self.with_directions:
            out += (-sigma * towards_class, eps_c - eps_u)
        return out
