"""What denoisers predict, and the noise and the clean latents that it implies.

The engine's latents are variance-preserving, z = alpha z0 + sigma eps with alpha^2 + sigma^2 = 1, for every model. One
that was trained on a straight flow, x = (1 - s) z0 + s eps, is the same with z = x / r, alpha = (1 - s) / r and
sigma = s / r, where r = sqrt((1 - s)^2 + s^2) = 1 / (alpha + sigma): its DDIM step is the Euler step of the flow.

Source: Salimans and Ho (arXiv 2202.00512) for velocities, Lipman et al. (arXiv 2210.02747) for flows.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON, FLOW = "epsilon", "flow"
PREDICTIONS = (EPSILON, "v_prediction", "sample", FLOW)


def to_noise(
    prediction: str,
    out: Tensor,  # [B, C, h, w], what the model says
    z: Tensor,  # [B, C, h, w]
    alpha: Tensor,  # [B, 1, 1, 1], sqrt(abar)
    sigma: Tensor,  # [B, 1, 1, 1], sqrt(1 - abar)
) -> Tensor:
    """The noise [B, C, h, w] in `z` that an answer implies.

    A velocity is alpha eps - sigma z0, a sample z0 itself, a flow eps - z0.
    """
    if prediction == EPSILON:
        return out
    if prediction == "v_prediction":
        return alpha * out + sigma * z
    if prediction == FLOW:
        return (z + alpha * out) / (alpha + sigma)
    return (z - alpha * out) / sigma


def to_clean(
    prediction: str,
    out: Tensor,  # [B, C, h, w], what the model says
    z: Tensor,  # [B, C, h, w]
    alpha: Tensor,  # [B, 1, 1, 1]
    sigma: Tensor,  # [B, 1, 1, 1]
) -> Tensor:
    """The clean latents [B, C, h, w] that an answer implies; divided by alpha only where noise is predicted."""
    if prediction == EPSILON:
        return (z - sigma * out) / alpha
    if prediction == "v_prediction":
        return alpha * z - sigma * out
    if prediction == FLOW:
        return (z - sigma * out) / (alpha + sigma)
    return out


def flow_levels(
    sigmas: Tensor,  # [T] in [0, 1), rising
) -> Tensor:
    """alphas_cumprod [T] of a straight flow at these shares of noise."""
    return (1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2)


def flow_sigmas(
    alphas_cumprod: Tensor,  # [T]
) -> Tensor:
    """The inverse of `flow_levels`: [T]."""
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return sigma / (alpha + sigma)


def log_snr(alphas_cumprod: Tensor) -> Tensor:
    """log(alpha / sigma), by which noise levels of different models compare; infinite where there is no noise."""
    return 0.5 * (torch.log(alphas_cumprod) - torch.log(1 - alphas_cumprod))
