"""Noise levels of flow matching: what its schedulers' configurations say of the shares of noise that a model was made
for, `shift` and the shift by image size included.

Timestep i of T is noised by sigma_i, the shifted i / T, from 0 (nothing) up to just below 1 (noise alone, which says
nothing of the image and is never a step of ours). A denoiser's own timestep is T sigma_i.

Source: Esser et al. (arXiv 2403.03206), section 5.3.2, for the shift; FLUX.1's reference code for the one by size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

# The classes, and those of DDPM's families that take `use_flow_sigmas`.
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# Fields under which the path is another one. `shift_terminal` stretches a run's levels by where its last step begins.
MEANT = {
    "shift_terminal": (None, "levels that depend on the number of steps"),
    "invert_sigmas": (False, "noise that falls as time rises"),
}
# Fields of a sampler: ours lays its own timesteps.
SAMPLERS = {
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling", "num_train_timesteps",
    "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
    "time_shift_type",
}  # fmt: skip


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a scheduler's configuration is of flow matching."""
    name = config.get("_class_name")
    return name in FLOW_SCHEDULERS or bool(config.get("use_flow_sigmas"))


def read_flow(path: Path, config: dict[str, Any], tokens: int | None) -> tuple[Tensor, Tensor]:
    """Shares of noise [T], rising from 0, and the denoiser's own timesteps [T], float64 both.

    Args:
        path: of the configuration, for messages.
        config: of a class in `FLOW_SCHEDULERS`, or of one with `use_flow_sigmas`; fields nobody knows were refused.
        tokens: of the model at the image's size, for `use_dynamic_shifting`.

    Raises:
        UsageError: a field is out of range, or asks for what is not done here; the message names file and field.
    """
    for field, (only, meaning) in MEANT.items():
        if (value := config.get(field, only)) != only:
            raise UsageError(f"{path}: {field} is {value!r}: {meaning}, which is not supported; expected {only!r}")
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise UsageError(f"{path}: num_train_timesteps is {count!r}; expected a whole number of at least 2")
    t = torch.arange(count, dtype=torch.float64) / count
    if config.get("use_flow_sigmas"):  # of DPM-Solver and its like, which tell the model whole timesteps
        if (said := config.get("prediction_type")) != "flow_prediction":
            raise UsageError(f"{path}: prediction_type is {said!r} with use_flow_sigmas; expected flow_prediction")
        if config.get("use_dynamic_shifting"):
            raise UsageError(
                f"{path}: use_dynamic_shifting is true with use_flow_sigmas: another shift for each size of image, "
                "which is not supported; expected false"
            )
        sigmas = shifted(t, _positive(path, config, "flow_shift", 1.0))
        return sigmas, (count * sigmas + 1e-6).floor()
    if not config.get("use_dynamic_shifting"):
        sigmas = shifted(t, _positive(path, config, "shift", 1.0))
        return sigmas, count * sigmas
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise UsageError(f"{path}: time_shift_type is {kind!r}; expected exponential or linear")
    if tokens is None:
        raise UsageError(f"{path}: use_dynamic_shifting is true, and this family's tokens are not known")
    low, high = (_positive(path, config, f"{n}_image_seq_len", d) for n, d in (("base", 256), ("max", 4096)))
    least, most = (_positive(path, config, f"{n}_shift", d) for n, d in (("base", 0.5), ("max", 1.15)))
    if low >= high:
        raise UsageError(f"{path}: base_image_seq_len is {low:g}; expected less than max_image_seq_len, {high:g}")
    mu = least + (most - least) * (tokens - low) / (high - low)
    if kind == "linear" and mu <= 0:
        raise UsageError(f"{path}: base_shift and max_shift give {mu:g} for {tokens} tokens; expected above 0")
    sigmas = shifted(t, math.exp(mu) if kind == "exponential" else mu)
    return sigmas, count * sigmas


def shifted(
    t: Tensor,  # in [0, 1]
    shift: float,
) -> Tensor:
    """More noise at the same time for larger images: shift t / (1 + (shift - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def _positive(path: Path, config: dict[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UsageError(f"{path}: {field} is {value!r}; expected a positive number")
    return float(value)
