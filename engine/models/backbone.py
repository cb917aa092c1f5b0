"""What latent diffusion models share; a family is one file, a subclass of `Backbone`, and lines in `load.BACKBONES`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..labels import match_labels
from .conditions import Condition, floats_to
from .deep import Reusing
from .fields import check_side, latent_scale, read_noise_levels, unwhitened, whitened
from .files import dtype_of, id2label_names, pipeline_of, read_json, read_part
from .predictions import EPSILON, FLOW, PREDICTIONS, flow_sigmas, to_noise

if TYPE_CHECKING:
    from typing_extensions import Self


class Backbone:
    """A denoiser over a VAE's latents, with a condition for each label: the protocol `Diffusion` of `protocols`.

    As it is, conditions are class indices and the VAE is an `AutoencoderKL`. A family says its `networks` and runs its
    denoiser (`denoise`); where that is not enough it overrides `more`, `encode`, `decode`, `describe`, `condition` and
    `null_condition`.

    Args:
        vae, denoiser: diffusers models, or any with the same calls and `config`.
        alphas_cumprod: [T] float64, of variance-preserving latents; of a flow see `predictions.flow_levels`.
        classes: how many there are, the null class left out; it comes after them.
        names: of the classes, if known.
        prediction: what the denoiser was trained to predict, see `predictions.to_noise`.
        times: the denoiser's own timestep for each of ours [T]; the same numbers without it, of a flow T sigma.
        image_size: side in pixels; the denoiser's own without it.

    Raises:
        UsageError: the parts or the image size do not fit.
    """

    conditioning: str = "class"  # what conditions are made from: class or text
    networks: ClassVar[dict[str, str | type]]  # folder to its class, or diffusers' of that name: the denoiser, the VAE
    others: ClassVar[tuple[str, ...]] = ()  # more folders
    optional: ClassVar[tuple[str, ...]] = ()  # folders that there may be, all of them or none
    takes: ClassVar[tuple[str, ...]] = ()  # fields of the denoiser's config that it sees to and others refuse
    sized: ClassVar[bool] = False  # whether it takes other image sizes than its own
    own_side: ClassVar[int | None] = None  # latent side, where the denoiser's config does not say one
    packed: ClassVar[int] = 1  # side of the square of latents that becomes one channel vector before the denoiser
    flows: ClassVar[bool] = False  # trained by flow matching, always
    carried: ClassVar[bool] = False  # a DDPM's noise levels, but others than those that strengths were published for
    rectangular: ClassVar[bool] = False  # whether images need not be square, nor all of one size
    longest: int | None = None  # side in pixels that such an image may have

    def __init__(
        self,
        vae: Any,
        denoiser: Any,
        alphas_cumprod: Tensor,
        *,
        classes: int = 0,
        names: Sequence[str] | None = None,
        prediction: str = EPSILON,
        times: Tensor | None = None,
        image_size: int | None = None,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise UsageError(f"prediction_type: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        check_parts(vae, denoiser, self.packed)
        self.vae = vae
        self.denoiser = denoiser
        self.alphas_cumprod = alphas_cumprod
        self.prediction = prediction
        self.distilled = False  # to a few steps
        if times is None and prediction == FLOW:
            times = len(alphas_cumprod) * flow_sigmas(alphas_cumprod)
        self.times = times
        self.names = names
        self.null_class = classes
        factor = vae_factor(vae.config)
        self.image_size = image_size or self.own_size(denoiser.config, vae.config)
        check_image_size(self.image_size, factor, self.patch(denoiser.config))
        self.multiple = factor * self.patch(denoiser.config)  # of which sides in pixels are multiples
        side = self.image_size // factor
        self.latent_shape = (latent_channels(vae.config), side, side)
        self.labels: list[str] = list(names or [])
        self.classes = torch.arange(len(self.labels))  # the class of each label

    @classmethod
    def open(
        cls, folder: Path, dtype: torch.dtype, image_size: int | None = None, names: Sequence[str] | None = None
    ) -> Self:
        """The model in a folder of diffusers' layout, with weights of `dtype`; its classes' names, if it has none.

        Raises:
            UsageError: a field or the image size does not fit. CounterlensError: see `files.read_part`.
        """
        import diffusers

        index = pipeline_of(folder)
        denoiser, vae = cls.networks
        loaders = {k: getattr(diffusers, v) if isinstance(v, str) else v for k, v in cls.networks.items()}
        config = folder / denoiser / "config.json"
        configs = read_json(config), read_json(folder / vae / "config.json")
        check_side(config, configs[0], chosen=image_size is not None or cls.own_side is not None)
        path = folder / "scheduler" / "scheduler_config.json"
        side = (image_size or cls.own_size(*configs)) // vae_factor(configs[1])
        levels = read_noise_levels(path, read_json(path), tokens=(side // cls.patch(configs[0])) ** 2)
        if cls.flows and levels.prediction != FLOW:
            raise UsageError(
                f"{path}: _class_name is {read_json(path).get('_class_name')!r}: noise levels of a DDPM, and a "
                f"{cls.networks[denoiser]} was trained on a flow; take the scheduler that belongs to it"
            )
        if (told := configs[0].get("time_cond_proj_dim")) and not levels.distilled:
            raise UsageError(
                f"{config}: time_cond_proj_dim is {told!r}: the guidance scale as a condition, of a model that was "
                f"distilled (LCM), but {path} is {read_json(path).get('_class_name')!r}, of one that was not; expected "
                "its own scheduler (LCMScheduler)"
            )
        said = cls.more(folder, dtype) | {"prediction": levels.prediction}
        if levels.times is not None:
            said["times"] = levels.times
        if cls.conditioning == "class":
            said["names"] = id2label_names(index.get("id2label")) or names
        if cls.sized:
            said["image_size"] = image_size
        model = cls(
            read_vae(loaders[vae], folder / vae, dtype),
            read_part(loaders[denoiser], folder / denoiser, dtype, taken=cls.takes),
            alphas_cumprod=levels.alphas_cumprod, **said,
        )  # fmt: skip
        model.distilled = levels.distilled or cls.few_steps(folder, configs[0])
        return model

    @classmethod
    def few_steps(cls, folder: Path, denoiser: Mapping[str, Any]) -> bool:
        """Whether a folder, and its denoiser's config, say that it was distilled to a few steps; no scheduler does."""
        return False

    @classmethod
    def own_size(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Side in pixels of the images that models with these configs were trained on."""
        return int(cls.own_side or denoiser["sample_size"]) * vae_factor(vae)

    @classmethod
    def patch(cls, denoiser: Mapping[str, Any]) -> int:
        """Latent sides are multiples of this; of a transformer the side of a token."""
        return int(denoiser.get("patch_size") or 2 ** (len(denoiser.get("block_out_channels") or [1]) - 1)) * cls.packed

    @classmethod
    def more(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """More parts, by the names under which `__init__` takes them."""
        return {}

    def fingerprint(self) -> Mapping[str, Any]:
        """What decides the numbers beside code and weights, by name: all attributes, so that nothing is forgotten."""
        return vars(self)

    def describe(
        self, labels: Sequence[str], *, prompts: str | Sequence[str] | None = None, classes: Sequence[int] | None = None
    ) -> None:
        """Say what each label is to the model: one of its classes (see `match_classes`), or a prompt.

        Raises:
            UsageError: they cannot be matched, or a class is out of range.
        """
        self.classes = match_classes(labels, self.null_class, self.names, classes)
        self.labels = list(labels)

    def modules(self) -> list[nn.Module]:
        """Every network."""
        return [self.vae, self.denoiser]

    def encode(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        """Scaled latents [B, C, h, w] in the image's dtype: the encoder's mode (the official code samples instead)."""
        z = self.vae.encode((image * 2 - 1).to(dtype_of(self.vae))).latent_dist.mode()
        return whitened(self.vae.config, z.to(image.dtype))

    def decode(
        self,
        z: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Image [B, 3, H, W] in the latents' dtype, nominally in [-1, 1]."""
        return self.vae.decode(unwhitened(self.vae.config, z).to(dtype_of(self.vae))).sample.to(z.dtype)

    def denoise(
        self,
        z: Tensor,  # [B, C, h, w] in the denoiser's dtype
        timestep: Tensor,  # [B], the denoiser's own (`times`)
        condition: Any,  # as `condition` makes it, floating tensors in the denoiser's dtype
    ) -> Tensor:
        """What the denoiser says: [B, C, h, w]. Its latents are those of its own noise path (see `predictions`)."""
        return self.denoiser(z, timestep, class_labels=condition).sample

    def answer(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Condition,  # as `condition` makes them
    ) -> Tensor:
        """What the denoiser says of `z`, in its dtype: [B, C, h, w]."""
        dtype = dtype_of(self.denoiser)
        seen = z
        if self.prediction == FLOW:
            abar = self.alphas_cumprod.to(z)[timestep].reshape(-1, 1, 1, 1)
            seen = z / (abar.sqrt() + (1 - abar).sqrt())  # see `predictions`
        time = timestep if self.times is None else self.times.to(z)[timestep]
        return self.denoise(seen.to(dtype), time, floats_to(condition, dtype)).to(z.dtype)

    def answer_reusing(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Condition,  # as `condition` makes them
        deep: Tensor | None = None,  # [B, D, h', w'], of an earlier timestep
    ) -> tuple[Tensor, Tensor]:
        """`answer` with deep features that are given, or its own, and these features; see `models.deep`."""
        other = copy.copy(self)
        other.denoiser = Reusing(self.denoiser, None if deep is None else deep.to(dtype_of(self.denoiser)))
        said = other.answer(z, timestep, condition)
        return said, other.denoiser.deep.to(z.dtype)

    def predict_noise(
        self,
        z: Tensor,  # [B, C, h, w]
        timestep: Tensor,  # [B]
        condition: Condition,  # as `condition` makes them
    ) -> Tensor:
        """Noise in `z`: [B, C, h, w]."""
        out = self.answer(z, timestep, condition)
        if self.prediction == EPSILON:
            return out
        abar = self.alphas_cumprod.to(z)[timestep].reshape(-1, 1, 1, 1)
        return to_noise(self.prediction, out, z, abar.sqrt(), (1 - abar).sqrt())

    def condition(
        self,
        targets: Tensor,  # [B]
    ) -> Condition:
        """The model's class indices of the targets: [B]."""
        return self.classes.to(targets.device)[targets]

    def null_condition(self, batch: int) -> Condition:
        """The null class, `batch` times: [batch]."""
        device = next(self.denoiser.parameters()).device
        return torch.full((batch,), self.null_class, dtype=torch.long, device=device)


def read_vae(loader: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A VAE; one that says `force_upcast` stays in float32 where the rest is float16, in which it overflows.

    Raises:
        UsageError, CounterlensError: see `files.read_part`.
    """
    config = read_json(folder / "config.json")
    latent_scale(folder / "config.json", config)
    return read_part(loader, folder, vae_dtype(config, dtype))


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """What a VAE of this config is held in where the rest of its model is `dtype`."""
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast", False) else dtype


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels of each latent location, per side."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(blocks or [1]) - 1)


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of a VAE's latents."""
    return int(config["latent_channels"])


def check_parts(vae: nn.Module, denoiser: nn.Module, packed: int = 1) -> None:
    """Refuse parts that do not belong together, or whose gradient would not be the model's.

    Raises:
        UsageError: latent channels differ, a part mixes data types, or the VAE would decode in tiles.
    """
    config: Any = denoiser.config
    latent, expected = int(config.in_channels), int(vae.config.latent_channels) * packed**2  # type: ignore
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
