"""What others' configurations say: fields that are respected, fields of another sampler, and what is refused by name.

A field that diffusers' own class reads when it builds a module is respected with it. What is left is what a pipeline
would have done with the module: more conditions than ours, another scale of the latents, another family of noise.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .flow import FLOW_SCHEDULERS, is_flow, read_flow
from .flow import MEANT as FLOW_MEANT
from .flow import SAMPLERS as FLOW_SAMPLERS
from .predictions import EPSILON, FLOW, flow_levels

PREDICTIONS = (EPSILON, "v_prediction", "sample")  # of models that were trained on a DDPM's noise levels

# Class, field: the only value under which our pipeline is the model's own, and what another one asks for.
NEEDED: dict[str, dict[str, tuple[Any, str]]] = {
    "UNet2DConditionModel": {
        "class_embed_type": (None, "a second condition beside the context (unCLIP)"),
        "num_class_embeds": (None, "a class beside the context"),
        "addition_embed_type": (None, "sizes or images beside the context (SDXL, whose model_index.json says so)"),
        "encoder_hid_dim_type": (None, "a context that is projected first (Kandinsky)"),
        "encoder_hid_dim": (None, "a context that is projected first (Kandinsky)"),
        "time_cond_proj_dim": (None, "the guidance scale as a condition (distilled: LCM)"),
        "dual_cross_attention": (False, "two contexts"),
        "attention_type": ("default", "boxes beside the context (GLIGEN)"),
    },
    "UNet2DModel": {"class_embed_type": (None, "conditions that are not classes")},
    "DiTTransformer2DModel": {"norm_type": ("ada_norm_zero", "another kind of conditions")},
    "AutoencoderKL": {"in_channels": (3, "images that are not RGB"), "out_channels": (3, "images that are not RGB")},
    "VQModel": {
        "in_channels": (3, "images that are not RGB"),
        "out_channels": (3, "images that are not RGB"),
        "norm_type": ("group", "a decoder that sees the codes as well"),
        "lookup_from_codebook": (False, "latents that are numbers of codes"),
    },
    "PixArtTransformer2DModel": {"attention_type": ("default", "boxes beside the context (GLIGEN)")},
    "SanaTransformer2DModel": {
        "guidance_embeds": (False, "the guidance scale as a condition (distilled: Sana-Sprint)")
    },
    "AutoencoderDC": {"in_channels": (3, "images that are not RGB")},
    "AutoencoderTiny": {"shift_factor": (0.0, "latents of another scale")},
}

# Schedulers whose models were trained on a DDPM's noise levels, which their betas decide; distilled ones as well (LCM,
# TCD), whose own steps draw fresh noise, where ours are DDIM's. Beside them there is flow matching (`flow`). All others
# (EDM, consistency, discrete) are refused: the same weights mean something else there.
SCHEDULERS = (
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip
# Fields of these schedulers that say what the model is, or under which it is another one.
MEANT = {
    "thresholding": (False, "a clean estimate that is clipped by its quantiles"),
    "use_flow_sigmas": (False, "flow matching"),
    "use_dynamic_shifting": (False, "flow matching"),
    "shift_terminal": (None, "flow matching"),
    "timestep_type": ("discrete", "noise levels instead of timesteps"),
}
# What belongs to a sampler: ours has its own (`Config.solver`, `spacing`, `steps`), as the published method says it.
# So latents are never clipped, timesteps are `official`'s i (T // S) + 1, and the last step arrives at timestep 0.
SAMPLERS = {
    "clip_sample", "clip_sample_range", "set_alpha_to_one", "steps_offset", "timestep_spacing", "sample_max_value",
    "dynamic_thresholding_ratio", "variance_type", "skip_prk_steps", "interpolation_type", "use_karras_sigmas",
    "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max", "final_sigmas_type",
    "solver_order", "solver_type", "solver_p", "algorithm_type", "lower_order_final", "euler_at_final",
    "lambda_min_clipped", "flow_shift", "time_shift_type", "predict_x0", "disable_corrector", "eta", "order",
}  # fmt: skip
SPACINGS = ("leading", "trailing", "linspace")
# Noise of a model of zero terminal SNR: like diffusers' Euler scheduler, nearly all, so that it can be divided by.
LEAST = 2.0**-24


class NoiseLevels(NamedTuple):
    """What a scheduler's configuration says of its model.

    Attributes:
        alphas_cumprod: [T] float64, of variance-preserving latents (`predictions`), whatever the model's own path.
        prediction: what the model says, one of `predictions.PREDICTIONS`.
        times: the model's own timesteps [T] float64; None where they are 0, 1, 2, ...
        distilled: it was distilled to a few steps, as far as a scheduler tells.
    """

    alphas_cumprod: Tensor
    prediction: str
    times: Tensor | None = None
    distilled: bool = False


def check_fields(path: Path, config: dict[str, Any], loader: type, taken: Collection[str] = ()) -> None:
    """Refuse fields under which a module of diffusers needs more than it is given here, and fields nobody reads.

    `taken` are those that the model's family sees to.

    Raises:
        UsageError: naming file and field.
    """
    name = loader.__name__
    for field, (only, meaning) in NEEDED.get(name, {}).items():
        if field not in taken and (value := config.get(field, only)) != only:
            raise UsageError(f"{path}: {field} is {value!r}: {meaning}, which is not supported; expected {only!r}")
    known = inspect.signature(loader.__init__).parameters  # type: ignore[misc]
    _refuse_unknown(path, config, known, name)


def _refuse_meant(path: Path, config: dict[str, Any], fields: dict[str, tuple[Any, str]]) -> None:
    for field, (only, meaning) in fields.items():
        if (value := config.get(field, only)) != only:
            raise UsageError(f"{path}: {field} is {value!r}: {meaning}, which is not supported; expected {only!r}")


def _refuse_unknown(path: Path, config: dict[str, Any], known: Any, name: str) -> None:
    for field, value in config.items():
        if not field.startswith("_") and field not in known and value:  # null, false and 0 ask for nothing
            raise UsageError(
                f"{path}: {field} is {str(value)[:60]!r}, a field that {name} does not have here; if it changes no "
                "number take it out, if it does this model cannot be opened"
            )


def check_side(path: Path, config: dict[str, Any], chosen: bool = False) -> None:
    """Refuse a denoiser whose `sample_size` does not tell the side of square latents (unless the side was chosen).

    Raises:
        UsageError: naming file and field.
    """
    size = config.get("sample_size")
    if chosen or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return
    raise UsageError(f"{path}: sample_size is {size!r}; expected the side of square latents, or give image_size")


def read_noise_levels(path: Path, config: dict[str, Any], tokens: int | None = None) -> NoiseLevels:
    """The noise levels of a scheduler's configuration, as its own class makes them.

    `tokens` are the denoiser's at the image's size, by which flow matching may shift its levels.

    Zero terminal SNR (`rescale_betas_zero_snr`) leaves a model defined that predicts velocities or clean latents; its
    last level is raised to at most 2^-24, as diffusers' Euler scheduler does.

    Raises:
        UsageError: the family is another one, a field is out of range, or noise is predicted where nothing else is
            left; the message names file and field.
    """
    import diffusers

    name = config.get("_class_name")
    if name not in (*SCHEDULERS, *FLOW_SCHEDULERS):
        raise UsageError(
            f"{path}: _class_name is {name!r}: not a scheduler of a DDPM's noise levels (DDIMScheduler and its like) "
            "nor of flow matching; models of other families are not supported"
        )
    loader = getattr(diffusers, name)
    if is_flow(config):
        flows = set(inspect.signature(loader.__init__).parameters) | SAMPLERS | FLOW_SAMPLERS
        _refuse_unknown(path, config, flows | set(MEANT) | set(FLOW_MEANT), name)
        _refuse_meant(path, config, {field: MEANT[field] for field in ("thresholding", "timestep_type")})
        sigmas, times = read_flow(path, config, tokens)
        return NoiseLevels(flow_levels(sigmas), FLOW, times)
    _refuse_meant(path, config, MEANT)
    known = set(inspect.signature(loader.__init__).parameters) | SAMPLERS | set(MEANT)
    _refuse_unknown(path, config, known, name)
    prediction = config.get("prediction_type") or "epsilon"
    for field, value, allowed in (
        ("prediction_type", prediction, PREDICTIONS),
        ("timestep_spacing", config.get("timestep_spacing") or SPACINGS[0], SPACINGS),
    ):
        if value not in allowed:
            raise UsageError(f"{path}: {field} is {value!r}; expected one of {', '.join(allowed)}")
    if config.get("timestep_spacing") == "trailing":  # chosen on purpose: no scheduler's default
        warnings.warn(
            f"{path}: timestep_spacing is trailing; the run's own spacing lays the timesteps (official unless one is "
            "given), and spacing trailing is the model's",
            stacklevel=2,
        )
    try:
        # Only what makes noise levels: the rest is another sampler's, and some of it refuses its like.
        fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        own = {k: config[k] for k in (*fields, "rescale_betas_zero_snr") if k in config and k in known}
        levels = loader(**own).alphas_cumprod.double()
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: beta_schedule {config.get('beta_schedule')!r} and its betas make no noise levels "
            f"({str(error).splitlines()[0]})"
        ) from error
    count = config.get("num_train_timesteps", len(levels))
    if levels.ndim != 1 or len(levels) != count:
        raise UsageError(f"{path}: trained_betas has {levels.numel()} values, num_train_timesteps is {count}")
    if config.get("rescale_betas_zero_snr") and levels[-1] < 2 * LEAST:  # some classes raise it themselves, some not
        levels[-1] = 0.0
    # Of a model that predicts noise nobody asks for trailing timesteps but to begin from nothing else in a few steps.
    trailing = config.get("timestep_spacing") == "trailing" and prediction == EPSILON
    distilled = name in ("LCMScheduler", "TCDScheduler") or trailing
    return NoiseLevels(_defined(path, levels, prediction), prediction, distilled=distilled)


def _defined(path: Path, levels: Tensor, prediction: str) -> Tensor:
    field = "betas (beta_start, beta_end, beta_schedule, trained_betas)"
    falling = bool((levels[1:] < levels[:-1]).all())
    if len(levels) < 2 or not falling or not 0 < float(levels[0]) < 1 or not (levels[:-1] > 0).all() or levels[-1] < 0:
        raise UsageError(f"{path}: {field} do not make alphas_cumprod fall from below 1 to 0")
    if levels[-1] > 0:
        return levels
    if prediction == "epsilon":
        raise UsageError(
            f"{path}: prediction_type is epsilon, but rescale_betas_zero_snr or the betas leave nothing but noise at "
            "the last timestep, where noise says nothing of the image; such models predict velocities"
        )
    levels = levels.clone()
    levels[-1] = min(LEAST, float(levels[-2]) / 2)
    return levels


def latent_scale(path: Path, config: Any) -> None:
    """Refuse a VAE's scale of the latents that makes no sense.

    Raises:
        UsageError: naming file and field.
    """
    scaling = config.get("scaling_factor", 1.0)
    if not isinstance(scaling, int | float) or isinstance(scaling, bool) or not 0 < scaling < float("inf"):
        raise UsageError(f"{path}: scaling_factor is {scaling!r}; expected a positive number")
    shift = config.get("shift_factor") or 0.0
    if not isinstance(shift, int | float) or isinstance(shift, bool) or not abs(shift) < float("inf"):
        raise UsageError(f"{path}: shift_factor is {shift!r}; expected a number")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise UsageError(f"{path}: latents_mean and latents_std belong together, one is missing")
    if mean is not None:
        channels = config.get("latent_channels", len(mean))
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise UsageError(f"{path}: latents_mean, latents_std: expected {channels} values each, std positive")
        if config.get("shift_factor"):
            raise UsageError(f"{path}: shift_factor and latents_mean both move the latents; expected one of them")


def whitened(
    vae_config: Any,
    z: Tensor,  # [B, C, h, w], as the encoder makes them
) -> Tensor:
    """Scaled latents: (z - shift) * scaling, or (z - mean) / std * scaling, as diffusers' pipelines have them."""
    if (mean := vae_config.get("latents_mean")) is not None:
        # Channel by channel with numbers, which every runtime takes: no tensor has to be brought to the device.
        each = enumerate(zip(mean, vae_config.get("latents_std"), strict=True))
        z = torch.cat([(z[:, c : c + 1] - m) / s for c, (m, s) in each], dim=1)
    elif shift := vae_config.get("shift_factor"):
        z = z - shift
    return z * vae_config.get("scaling_factor")


def unwhitened(
    vae_config: Any,
    z: Tensor,  # [B, C, h, w], scaled
) -> Tensor:
    """Latents as the decoder takes them, the inverse of `whitened`."""
    z = z / vae_config.get("scaling_factor")
    if (mean := vae_config.get("latents_mean")) is not None:
        each = enumerate(zip(mean, vae_config.get("latents_std"), strict=True))
        return torch.cat([z[:, c : c + 1] * s + m for c, (m, s) in each], dim=1)
    shift = vae_config.get("shift_factor")
    return z + shift if shift else z
