"""Distils a pack's decoder into a small one for guidance: `python -m counterlens.engine.packs.distill`.

Guidance needs the decoder's gradients more than its images, so the student learns both: the teacher's images, and its
vector-Jacobian products for the cotangents that guidance sends, the classifiers' own. It sees the latents that guidance
sees: clean estimates of noised training digits, at noise levels up to `STRENGTH` of the process.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..guidance.schedule import add_noise
from ..guidance.step import unit_largest
from ..models.freezing import frozen
from ..models.protocols import SoftmaxClassifier
from ..models.tiny import CONFIG, WEIGHTS, LatentResolutionDecoder, check_decoder, read_decoder, save_decoder
from . import TINY, Pack

WIDTH, BLOCKS = 48, 2
BATCH = 32
STRENGTH = 0.7
GRADIENT_WEIGHT = 0.5
LEARNING_RATE = 4e-3


def teach(
    pack: Pack,
    images: Tensor,  # [N, 3, H, W]
    count: int,
    g: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the teacher says: latents z [count, C, h, w], their images, cotangents, and these pulled back to z."""
    diffusion = pack.diffusion()
    classifiers = [pack.classifier(name) for name in pack.classifier_names() if name != "judge"]
    parts: list[tuple[Tensor, ...]] = []
    with frozen(*diffusion.modules(), *(c.module for c in classifiers)), torch.no_grad():
        while sum(len(p[0]) for p in parts) < count:
            index = torch.randint(len(images), (64,), generator=g)
            t = torch.randint(1, int(STRENGTH * len(diffusion.alphas_cumprod)), (64,), generator=g)
            abar = diffusion.alphas_cumprod[t].float()
            clean = diffusion.encode(images[index])
            z = add_noise(clean, torch.randn(clean.shape, generator=g), abar)
            # Under guidance the estimate lies between the input's class and the target's.
            other = torch.randint(len(diffusion.labels), (64,), generator=g)
            eps = diffusion.predict_noise(z, t, diffusion.condition(other))
            level = abar.reshape(-1, 1, 1, 1)
            z0 = (z - (1 - level).sqrt() * eps) / level.sqrt()
            x, pull = torch.func.vjp(diffusion.decode, z0)  # type: ignore[misc]
            v = cotangents(classifiers, x, images[index], other, g)
            parts.append((z0, x, v, pull(v)[0]))
    z0, x, v, pulled = (torch.cat(column) for column in zip(*parts, strict=True))
    return z0[:count], x[:count], v[:count], pulled[:count]


def cotangents(
    classifiers: list[SoftmaxClassifier], x: Tensor, image: Tensor, target: Tensor, g: torch.Generator
) -> Tensor:
    """What guidance pulls back: gradients of log p(target), and of the distance for a third of the samples."""
    seen = (x + 1) / 2
    pulls = [torch.func.grad(lambda y, c=c: c.log_prob(y, target).sum())(seen) for c in classifiers]
    pulls.append((seen.clamp(0, 1) - image).sign() * ((seen > 0) & (seen < 1)))
    choice = torch.randint(len(pulls), (len(x),), generator=g)
    return unit_largest(torch.stack(pulls)[choice, torch.arange(len(x))])


def distill(pack: Pack, out: Path, steps: int, count: int, seed: int, progress: Progress) -> dict[str, float]:
    """Train the student and write it to `out`; returns its errors on validation digits."""
    g = torch.Generator().manual_seed(seed)
    train, held_out = (pack.samples(split, marker="random") for split in ("train", "validation"))
    lesson = teach(pack, train.images, count, g)
    z, x, v, pulled = lesson
    torch.manual_seed(seed)
    factor = x.shape[-1] // z.shape[-1]
    student = LatentResolutionDecoder(z.shape[1], WIDTH, BLOCKS, factor)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
    task = progress.add_task("distilling", total=steps, loss=float("nan"))
    for _ in range(steps):
        index = torch.randint(len(z), (BATCH,), generator=g)
        latents = z[index].requires_grad_()
        output = student(latents)
        mine = torch.autograd.grad((output * v[index]).sum(), latents, create_graph=True)[0]
        cosine = torch.cosine_similarity(mine.flatten(1), pulled[index].flatten(1)).mean()
        loss = (output - x[index]).square().mean() * 10 + GRADIENT_WEIGHT * (1 - cosine)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(task, advance=1, loss=loss.item())
    scaling_factor = float(pack.diffusion().vae.config.scaling_factor)
    config = {
        "latent_channels": z.shape[1], "width": WIDTH, "blocks": BLOCKS, "factor": factor,
        "scaling_factor": scaling_factor,
    }  # fmt: skip
    save_decoder(student, out, config)
    decoder = read_decoder(out, config)
    check_decoder(decoder, pack.diffusion())
    z, x, v, pulled = teach(pack, held_out.images, 256, g)
    output, pull = torch.func.vjp(decoder.decode, z)  # type: ignore[misc]
    cosine = torch.cosine_similarity(pull(v)[0].flatten(1), pulled.flatten(1))
    psnr = 10 * torch.log10(4 / (output - x).square().mean(dim=(1, 2, 3)))
    return {"gradient_cosine": cosine.mean().item(), "psnr_db": psnr.mean().item()}


def main(
    pack: Annotated[str, typer.Option(help="Pack or folder, which is changed.")] = "digits",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 600,
    count: Annotated[int, typer.Option(help="Latents that the teacher decodes.", min=128)] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
) -> None:
    """Distil the decoder (some minutes on a CPU), put it into the pack and list it in pack.json.

    Example: python -m counterlens.engine.packs.distill --pack digits
    """
    opened = Pack(pack)
    folder = opened.folder / TINY
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        errors = distill(opened, folder, steps, count, seed, progress)
    manifest = json.loads((opened.folder / "pack.json").read_text())
    for name in (CONFIG, WEIGHTS):
        manifest["files"][f"{TINY}/{name}"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest["distillation"] = {"seed": seed, "steps": steps, "latents": count}
    manifest["distillation"] |= {name: round(value, 4) for name, value in errors.items()}
    (opened.folder / "pack.json").write_text(json.dumps(manifest, indent=2) + "\n")
    size = (folder / WEIGHTS).stat().st_size
    typer.echo(f"{folder}: {size / 1000:.0f} kB, " + ", ".join(f"{k} {v:.4f}" for k, v in errors.items()))


if __name__ == "__main__":
    typer.run(main)
