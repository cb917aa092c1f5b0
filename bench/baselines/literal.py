"""The official LDCE loop's work, written from the paper's formulas in plain torch, as literally as can be.

A doubled UNet batch with gradients through both halves, two separate backward passes, no kernels, no shared
linearisation: the baseline for speed, and the independent check of our guided step's numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from counterlens.engine.models.conditions import cat
from counterlens.engine.models.protocols import Classifier, Diffusion


def filter_angles(
    score: Tensor,  # [B, C, H, W]
    reference: Tensor,  # [B, C, H, W]
    mode: str,
    chunk: int = 1,
) -> Tensor:
    """Angle in radians of each chunk (of each sample for `global`): [B, H/chunk, W/chunk] or [B]."""
    if mode == "global":
        s, r = score.flatten(1), reference.flatten(1)
    else:
        s, r = _patches(score, chunk), _patches(reference, chunk)
    cosine = torch.nn.functional.cosine_similarity(s, r, dim=-1 if mode == "global" else 1, eps=0.0)
    return torch.acos(cosine.clamp(-1, 1))


def _patches(x: Tensor, chunk: int) -> Tensor:
    b, c, h, w = x.shape
    p = torch.nn.functional.unfold(x, chunk, stride=chunk)  # [B, C*chunk*chunk, L]
    return p.reshape(b, c * chunk * chunk, h // chunk, w // chunk)


def _turn(s: Tensor, r: Tensor, limit: float, dim: int) -> Tensor:
    length = s.norm(dim=dim, keepdim=True)
    unit = s / length
    normal = r - (r * unit).sum(dim, keepdim=True) * unit
    return s + length * math.tan(limit) * normal / normal.norm(dim=dim, keepdim=True)


def consensus(score: Tensor, reference: Tensor, angle_deg: float, mode: str, chunk: int) -> Tensor:
    """The filter of section 3.2, with acos and division as they are written there."""
    if mode == "off":
        return score
    limit = math.radians(angle_deg)
    beyond = filter_angles(score, reference, mode, chunk) > limit
    if mode == "global":
        s = score.flatten(1) / score.flatten(1).norm(dim=1, keepdim=True)
        turned = _turn(s, reference.flatten(1), limit, 1)
        return torch.where(beyond[:, None], turned, s).reshape(score.shape)
    s, r = _patches(score, chunk), _patches(reference, chunk)
    new = torch.zeros_like(s) if mode == "zero" else _turn(s, r, limit, 1)
    out = torch.where(beyond[:, None], new, s).flatten(2)
    return torch.nn.functional.fold(out, score.shape[2:], chunk, stride=chunk)


def literal_step(
    diffusion: Diffusion,
    classifier: Classifier,
    z: Tensor,  # [B, C, h, w]
    t: int,
    t_prev: int,
    image: Tensor,  # [B, 3, H, W] in [0, 1]
    target: Tensor,  # [B]
    *,
    guidance_scale: float,
    class_scale: float,
    distance_scale: float,
    angle_deg: float,
    mode: str = "zero",
    chunk: int = 1,
    detached: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: (z_prev, score, reference), the last two for finding samples near the angle limit."""
    abar, abar_prev = diffusion.alphas_cumprod[t].item(), diffusion.alphas_cumprod[t_prev].item()
    batch = z.shape[0]
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        conditions = cat(diffusion.null_condition(batch), diffusion.condition(target))
        timesteps = torch.full((2 * batch,), t, dtype=torch.long, device=z.device)
        eps_u, eps_c = diffusion.predict_noise(torch.cat([z, z]), timesteps, conditions).chunk(2)
        seen = eps_u.detach() if detached else eps_u
        x0 = (diffusion.decode((z - math.sqrt(1 - abar) * seen) / math.sqrt(abar)) + 1) / 2
        logits = classifier.logits(x0)
        if classifier.link == "sigmoid":
            log_p = torch.log(torch.sigmoid(logits[torch.arange(batch), target])).sum()
        else:
            log_p = torch.log_softmax(logits, dim=1)[torch.arange(batch), target].sum()
        distance = (x0.clamp(0, 1) - image).abs().sum()
        grad_class = torch.autograd.grad(log_p, z, retain_graph=True)[0]
        grad_distance = torch.autograd.grad(distance, z)[0]
    z, eps_u, eps_c = z.detach(), eps_u.detach(), eps_c.detach()
    reference = eps_c - eps_u
    score = -math.sqrt(1 - abar) * grad_class

    def to_reference_norm(v: Tensor) -> Tensor:
        ratio = reference.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
        ratio = torch.where(v.flatten(1).norm(dim=1) == 0, 0.0, ratio)
        return v * ratio[:, None, None, None]

    push = class_scale * to_reference_norm(consensus(score, reference, angle_deg, mode, chunk))
    closer = distance_scale * to_reference_norm(math.sqrt(1 - abar) * grad_distance)
    eps = eps_u + guidance_scale * (push + closer)
    z0 = (z - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    return math.sqrt(abar_prev) * z0 + math.sqrt(1 - abar_prev) * eps, score, reference


def literal_loop(
    diffusion: Diffusion,
    classifier: Classifier,
    image: Tensor,  # [B, 3, H, W] in [0, 1]
    target: Tensor,  # [B]
    noise: Tensor,  # [B, C, h, w]
    *,
    steps: int,
    strength: float,
    guidance_scale: float,
    class_scale: float,
    distance_scale: float,
    angle_deg: float,
    mode: str = "zero",
) -> Tensor:
    """The whole loop from noise to final latents [B, C, h, w]; the timesteps as the official code lays them."""
    total = len(diffusion.alphas_cumprod)
    tau = list(range(1, total + 1, total // steps))[:steps]
    k = int(strength * steps + 1e-9)
    start = diffusion.alphas_cumprod[tau[min(k, steps - 1)]].item()
    with torch.no_grad():
        z = math.sqrt(start) * diffusion.encode(image) + math.sqrt(1 - start) * noise
    for i in reversed(range(k)):
        z, _, _ = literal_step(
            diffusion, classifier, z, tau[i], tau[i - 1] if i > 0 else 0, image, target,
            guidance_scale=guidance_scale, class_scale=class_scale, distance_scale=distance_scale,
            angle_deg=angle_deg, mode=mode,
        )  # fmt: skip
    return z
