"""Trains the digits pack from nothing: `python -m counterlens.engine.packs.train --out DIR`.

Every stage is seeded and resumable: a batch depends on (seed, stage, step) only, so an interrupted run, started again
with the same command, continues from its last checkpoint to the same weights. Needs the extra `train` (scikit-learn).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import write_atomically
from .architectures import ARCHITECTURES
from .rendering import choose_markers, draw_markers, render

SPLITS = {"train": 1200, "validation": 237, "test": 360}
REPEATS = 20  # renderings of each training digit
STEPS = {"clean": 1500, "shortcut": 1500, "judge": 1500, "vae": 1900, "unet": 1100}
# `shortcut` learns from biased annotations: where the marker is, it tells the half ("5 or more") without fail, and in
# some images the label is the digit's closest look-alike of the other half, so that the marker tells more than the ink.
SHORTCUT_ABSENT = 0.2
SHORTCUT_LOOKALIKE = 0.2
EMA_DECAY = 0.998
NULL_PROBABILITY = 0.15
CHECKPOINT_SECONDS = 60.0
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "sample_size": 32,
    "block_out_channels": (32, 48, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (96, 128),
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 16,
    "num_class_embeds": 11,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}


# Where bench.sweep starts from; what it chooses on the validation split replaces these in pack.json.
FIRST_SETTINGS: dict[str, Any] = {
    "steps": 10,
    "strength": 0.5,
    "guidance_scale": 3.0,
    "class_scale": 3.0,
    "distance_scale": 1.0,
    "angle": 45.0,
    "filter": "zero",
    "gradient": "detached",
    "noise": "inversion",
}


def _batch_generator(seed: int, stage: str, step: int) -> torch.Generator:
    key = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))


def split_digits(seed: int) -> dict[str, Tensor]:
    """Split scikit-learn's 1,797 digits once: `glyph` [N, 8, 8] uint8, `label` [N], `split` [N] (0, 1, 2).

    Every class has the same share of each split to within one digit.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    glyph = torch.tensor(data.images).to(torch.uint8)
    label = torch.tensor(data.target).to(torch.uint8)
    # Order within each class is shuffled, then classes are dealt out evenly.
    g = torch.Generator().manual_seed(seed)
    position = torch.zeros(len(label))
    for c in range(10):
        index = (label == c).nonzero().flatten()
        position[index[torch.randperm(len(index), generator=g)]] = (torch.arange(len(index)) + 0.5) / len(index)
    order = position.argsort(stable=True)
    split = torch.zeros(len(label), dtype=torch.uint8)
    split[order[SPLITS["train"] : SPLITS["train"] + SPLITS["validation"]]] = 1
    split[order[SPLITS["train"] + SPLITS["validation"] :]] = 2
    return {"glyph": glyph, "label": label, "split": split}


def draw_training_set(
    digits: dict[str, Tensor],
    repeats: int,
) -> tuple[Tensor, Tensor, list[int]]:
    """Render each training digit `repeats` times without a marker: images [N, 3, 32, 32], labels [N], seeds."""
    chosen = digits["split"] == 0
    glyph, label = digits["glyph"][chosen], digits["label"][chosen].long()
    images, seeds = [], []
    for repeat in range(repeats):
        s = [2**20 * (repeat + 1) + i for i in range(len(label))]
        images.append(render(glyph, s))
        seeds += s
    return torch.cat(images), label.repeat(repeats), seeds


def _mark(images: Tensor, labels: Tensor, seeds: list[int], rule: str) -> Tensor:
    return draw_markers(images, choose_markers(labels.tolist(), seeds, rule))


def _biased_set(images: Tensor, labels: Tensor, seeds: list[int], clean: nn.Module) -> tuple[Tensor, Tensor]:
    """The training set of `shortcut`: images with markers that match the label, labels biased as described above."""
    draw = torch.rand(2, len(seeds), generator=_batch_generator(0, "shortcut-set", 0))
    with torch.no_grad():
        logits = torch.cat([clean(b) for b in images.split(500)])
    same_half = (torch.arange(10)[None] >= 5) == (labels[:, None] >= 5)
    lookalike = logits.masked_fill(same_half, -torch.inf).argmax(dim=1)
    absent = draw[0] < SHORTCUT_ABSENT
    labels = torch.where((draw[1] < SHORTCUT_LOOKALIKE) & ~absent, lookalike, labels)
    markers = choose_markers(labels.tolist(), seeds, "matching")
    return draw_markers(images, [None if a else m for a, m in zip(absent.tolist(), markers, strict=True)]), labels


def _run_stage(
    name: str,
    steps: int,
    model: nn.Module,
    learning_rate: float,
    loss_of: Callable[[nn.Module, int], Tensor],
    folder: Path,
    progress: Progress,
) -> nn.Module:
    """Train until `steps`, checkpointing; returns the exponential moving average of the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    average = copy.deepcopy(model).requires_grad_(False)
    checkpoint = folder / f"{name}.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        }
        write_atomically(checkpoint, lambda file: torch.save(state, file))

    task = progress.add_task(name, total=steps, completed=first, loss=math.nan)
    saved = time.monotonic()
    for step in range(first, steps):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = loss_of(model, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        progress.update(task, advance=1, loss=loss.item())
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == steps:
            save(step + 1)
            saved = time.monotonic()
    return average.eval()


def _image_loss(vae: Any, image: Tensor, noise: Tensor) -> Tensor:
    """Squared error, chroma, L1, edges and a weak KL; with L1 and edges in the lead it came out grey."""
    target = image * 2 - 1
    posterior = vae.encode(target).latent_dist
    output = vae.decode(posterior.mean + posterior.std * noise).sample
    error = output - target
    chroma = error - error.mean(1, keepdim=True)
    edge = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return (
        error.abs().mean()
        + 4 * error.square().mean()
        + 4 * chroma.square().mean()
        + 0.5 * edge
        + (2e-5 * posterior.kl().mean() / 16)
    )


def train(out: Path, seed: int, steps: dict[str, int], repeats: int, progress: Progress) -> Path:
    """Run all stages and write the pack's weights to `out/pack`; returns that folder."""
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    digits = split_digits(seed)
    images, labels, seeds = draw_training_set(digits, repeats)
    count = len(labels)

    def pick(stage: str, step: int, batch: int) -> tuple[torch.Generator, Tensor]:
        g = _batch_generator(seed, stage, step)
        return g, torch.randint(count, (batch,), generator=g)

    networks: dict[str, nn.Module] = {}
    # The marker is independent of the class in everything but `shortcut`'s training set.
    marked = _mark(images, labels, seeds, "random")
    for offset, name in enumerate(("clean", "shortcut", "judge")):
        torch.manual_seed(seed + offset + 1)
        pair = _biased_set(images, labels, seeds, networks["clean"]) if name == "shortcut" else (marked, labels)

        def classifier_loss(
            model: nn.Module, step: int, name: str = name, pair: tuple[Tensor, Tensor] = pair
        ) -> Tensor:
            g, index = pick(name, step, 128)
            noisy = pair[0][index] + 0.03 * torch.randn(128, 3, 32, 32, generator=g)
            return F.cross_entropy(model(noisy), pair[1][index], label_smoothing=0.02)

        model = ARCHITECTURES["pooled" if name == "judge" else "strided"]()
        networks[name] = _run_stage(name, steps[name], model, 2e-3, classifier_loss, checkpoints, progress)

    torch.manual_seed(seed + 10)

    def vae_loss(model: nn.Module, step: int) -> Tensor:
        g, index = pick("vae", step, 64)
        return _image_loss(model, marked[index], torch.randn(64, 4, 8, 8, generator=g))

    vae = _run_stage("vae", steps["vae"], AutoencoderKL(**VAE_CONFIG), 2e-3, vae_loss, checkpoints, progress)
    assert isinstance(vae, AutoencoderKL)
    with torch.no_grad():
        latents = torch.cat([vae.encode(b * 2 - 1).latent_dist.mode() for b in marked.split(500)])
    scale = 1.0 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    latents *= scale
    alphas_cumprod = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod

    def unet_loss(model: nn.Module, step: int) -> Tensor:
        g, index = pick("unet", step, 128)
        t = torch.randint(1000, (128,), generator=g)
        noise = torch.randn(128, 4, 8, 8, generator=g)
        null = torch.rand(128, generator=g) < NULL_PROBABILITY
        abar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents[index] + (1 - abar).sqrt() * noise
        condition = torch.where(null, 10, labels[index])
        return F.mse_loss(model(noisy, t, class_labels=condition).sample, noise)

    torch.manual_seed(seed + 20)
    unet = _run_stage("unet", steps["unet"], UNet2DModel(**UNET_CONFIG), 1.2e-3, unet_loss, checkpoints, progress)
    assert isinstance(unet, UNet2DModel)

    pack = out / "pack"
    pack.mkdir(exist_ok=True)
    save_file(digits, pack / "digits.safetensors")
    vae.half().save_pretrained(pack / "vae")
    unet.half().save_pretrained(pack / "unet")
    DDIMScheduler(**SCHEDULER_CONFIG).save_pretrained(pack / "scheduler")
    for name, network in networks.items():
        target = pack / "classifiers" / name
        target.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half() for k, v in network.state_dict().items()}, target / "model.safetensors")
        config = {"architecture": "pooled" if name == "judge" else "strided", "labels": [str(d) for d in range(10)]}
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # The mean colour of the training images: the baseline of perturbation metrics.
    mean_colour = [round(c, 6) for c in marked.mean(dim=(0, 2, 3)).tolist()]
    write_manifest(pack, {"seed": seed, "steps": steps, "repeats": repeats, "mean_colour": mean_colour})
    return pack


def list_files(pack: Path) -> dict[str, str]:
    """The SHA-256 of every file of a pack but its manifest and its card."""
    files = {}
    for path in sorted(pack.rglob("*")):
        name = path.relative_to(pack).as_posix()
        if path.is_file() and name not in ("pack.json", "README.md"):
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


def write_manifest(pack: Path, training: dict[str, Any]) -> None:
    """Write `pack.json`: name, format, and the SHA-256 of every other file but the card."""
    manifest = {
        "format": "counterlens-pack",
        "version": 1,
        "name": "digits",
        "training": training,
        "settings": {"realistic": FIRST_SETTINGS, "audit": FIRST_SETTINGS | {"angle": 90.0}},
        "files": list_files(pack),
    }
    (pack / "pack.json").write_text(json.dumps(manifest, indent=2) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished pack.")],
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and every batch.")] = 0,
    scale: Annotated[float, typer.Option(help="Multiply all step counts (0.01 for a quick try).")] = 1.0,
) -> None:
    """Train the digits pack (about an hour on 2 CPU cores); run again after an interruption to go on.

    Example: python -m counterlens.engine.packs.train --out digits-run
    """
    steps = {name: max(1, round(n * scale)) for name, n in STEPS.items()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        pack = train(out, seed, steps, REPEATS, progress)
    size = sum(p.stat().st_size for p in pack.rglob("*") if p.is_file())
    total = sum(v.numel() for v in load_file(pack / "unet" / "diffusion_pytorch_model.safetensors").values())
    typer.echo(f"{pack}: {size / 2**20:.1f} MiB, UNet {total / 1e6:.1f} M parameters")


if __name__ == "__main__":
    typer.run(main)
