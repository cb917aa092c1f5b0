"""Images around the user's own, which the box is asked about: made again by the generator, blended, partly hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..guidance.jobs import seeded_noise
from ..guidance.schedule import add_noise, ddim, make_schedule
from ..models.protocols import Diffusion

STRENGTHS = (0.3, 0.5, 0.7)
WEIGHT = 2.0  # of the classifier-free term: enough to arrive, too little to leave the data
STEPS = 6  # of each, whatever the strength
CELLS = (4, 8)  # of a mask's coarse noise


@torch.no_grad()
def made_again(
    diffusion: Diffusion,
    images: Tensor,  # [B, 3, H, W] in [0, 1]
    targets: Tensor,  # [B]
    seeds: Sequence[int],
    strength: float,
) -> Tensor:
    """Image to image towards a label, by the generator alone: [B, 3, H, W] in [0, 1]."""
    levels = diffusion.alphas_cumprod
    schedule = make_schedule(len(levels), STEPS, strength, "trailing")
    device = next(p for m in diffusion.modules() for p in m.parameters()).device
    z = diffusion.encode(images.to(device))
    batch = len(images)
    z = add_noise(z, seeded_noise(diffusion.latent_shape, list(seeds), z), levels[schedule.start].to(z).expand(batch))
    null, condition = diffusion.null_condition(batch), diffusion.condition(targets.to(device))
    for t, before in zip(schedule.timesteps, schedule.timesteps_prev, strict=True):
        timestep = torch.full((batch,), t, device=z.device)
        eps_u = diffusion.predict_noise(z, timestep, null)
        eps = eps_u + WEIGHT * (diffusion.predict_noise(z, timestep, condition) - eps_u)
        z, _ = ddim(z, eps, levels[t].to(z).expand(batch), levels[before].to(z).expand(batch))
    return ((diffusion.decode(z) + 1) / 2).clamp(0, 1).cpu()


def hidden_parts(
    images: Tensor,  # [B, 3, H, W] in [0, 1]
    hidden: Tensor,  # [B, 3, H, W] or what broadcasts to it
    seeds: Sequence[int],
) -> Tensor:
    """Images of which a random part, of random area and coarseness, gives way to what hides it: [B, 3, H, W]."""
    out = torch.empty_like(images)
    hidden = hidden.expand_as(images)
    for i, seed in enumerate(seeds):
        g = torch.Generator().manual_seed(seed)
        cells = CELLS[int(torch.randint(len(CELLS), (), generator=g))]
        coarse = torch.rand(1, 1, cells, cells, generator=g)
        field = F.interpolate(coarse, images.shape[2:], mode="bicubic", align_corners=False)[0, 0]
        share = 0.05 + 0.9 * torch.rand((), generator=g)
        kept = (field >= field.flatten().quantile(1 - share)).to(images)
        out[i] = kept * images[i] + (1 - kept) * hidden[i]
    return out
