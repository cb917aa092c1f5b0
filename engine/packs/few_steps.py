"""Distils a pack's guided runs into few steps: `python -m counterlens.engine.packs.few_steps`.

The teacher is the pack's own diffusion model in `TEACHER` steps, its gradients through the full decoder; the student
is the same UNet with a low-rank change of its weights, in the steps of speed `turbo`. From the same inverted latents it
takes its own guided run, and what is asked of the end goes back through all of it: latents near the teacher's, the
target ahead of every other label by about as much as in the teacher's images (without it the mean of what the teacher
might do is learnt, which flips nothing), and a small change. What guidance adds at a step is held constant but for its
length, that of the student's own eps_c - eps_u. The diffusion model itself stays as it is.

The classifier is `clean`, in both modes, on drawings of training digits; `shortcut`, which would teach to draw markers,
and the judge are never asked.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..config import SPEEDS, Settings
from ..guidance.sampler import invert, sample
from ..guidance.schedule import ddim, schedule_of
from ..guidance.step import GuidedStep
from ..models.conditions import cat
from ..models.freezing import frozen
from ..models.latent import ClassConditionalLatentDiffusion
from ..models.low_rank import attach, save_changes
from ..models.protocols import Diffusion, SoftmaxClassifier, probabilities
from . import FEW_STEPS, Pack

TEACHER: dict[str, Any] = {
    "steps": 8, "spacing": "trailing", "solver": "dpm++", "noise": "inversion", "gradient": "detached",
}  # fmt: skip
CLASSIFIER = "clean"
MODES = {"realistic": 0.75, "audit": 0.25}  # shares of the lessons
RANK = 12
BATCH = 16
LEARNING_RATE = 1e-4
MARGIN, MARGIN_WEIGHT = 6.0, 0.1  # logits; the teacher's median is 6.8
CHANGE_WEIGHT = 1.0  # of the mean absolute change


class Lessons(NamedTuple):
    """Runs of the teacher, N of them.

    Attributes:
        image: [N, 3, H, W] in [0, 1].
        target: [N] labels.
        angle: [N] limits of the filter in degrees.
        start: [N, C, h, w], the inverted latents from which the student runs.
        end: [N, C, h, w], where the teacher ended.
    """

    image: Tensor
    target: Tensor
    angle: Tensor
    start: Tensor
    end: Tensor


class Said:
    """A diffusion model whose noise was predicted already, so that the guided step does not predict it again."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.alphas_cumprod, self.null_condition = diffusion.alphas_cumprod, diffusion.null_condition
        self.noise = torch.empty(0)

    def predict_noise(self, z: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Both predictions [2B, C, h, w]."""
        return self.noise


def student_settings(pack: Pack) -> Settings:
    """The numbers of the student's runs."""
    return Settings(**pack.manifest["settings"]["realistic"] | SPEEDS["turbo"] | {"guidance_decoder": "tiny"})


def teach(pack: Pack, count: int, g: torch.Generator, progress: Progress) -> Lessons:
    """What the teacher makes of drawings of training digits, towards the runner-up or any other label."""
    diffusion, classifier = pack.diffusion(), pack.classifier(CLASSIFIER)
    task = progress.add_task("teaching", total=count, loss=math.nan)
    schedule = schedule_of(student_settings(pack), diffusion.alphas_cumprod)
    parts: list[Lessons] = []
    for mode, share in MODES.items():
        n = round(count * share)
        settings = Settings(**pack.manifest["settings"][mode] | SPEEDS["exact"] | TEACHER)
        drawn = pack.samples("train", marker="random", seed=10 + len(parts)).images
        images = drawn[torch.randint(len(drawn), (n,), generator=g)]
        with torch.no_grad():
            p = torch.cat([probabilities(classifier, x) for x in images.split(128)])
            start = torch.cat([invert(diffusion, diffusion.encode(x), schedule) for x in images.split(64)])
        first, second = p.topk(2, dim=1).indices.unbind(1)
        other = torch.rand(p.shape, generator=g).scatter(1, torch.stack([first, second], 1), -1).argmax(1)
        target = torch.where(torch.rand(n, generator=g) < 0.5, second, other)
        end = torch.zeros_like(start)
        with frozen(*diffusion.modules(), classifier.module):
            for rows in torch.arange(n).split(BATCH):
                seeds = [0] * len(rows)  # of noise, which no inversion draws
                end[rows] = sample(diffusion, classifier, images[rows], target[rows], seeds, settings).z
                progress.update(task, advance=len(rows))
        parts.append(Lessons(images, target, torch.full((n,), settings.angle), start, end))
    return Lessons(*(torch.cat(column) for column in zip(*parts, strict=True)))


def run(student: ClassConditionalLatentDiffusion, step: GuidedStep, lesson: Lessons, settings: Settings) -> Tensor:
    """The student's guided runs of lessons: the last latents [B, C, h, w], with a gradient to its weights.

    Args:
        step: over `Said`, also returning the guidance.
    """
    said = step.diffusion
    assert isinstance(said, Said)
    batch, z = len(lesson.image), lesson.start
    schedule, levels = schedule_of(settings, student.alphas_cumprod), student.alphas_cumprod.float()
    condition = student.condition(lesson.target)
    conditions = cat(student.null_condition(batch), condition)
    for t, t_prev in zip(schedule.timesteps, schedule.timesteps_prev, strict=True):
        now, then = torch.full((batch,), t), torch.full((batch,), t_prev)
        both = student.predict_noise(torch.cat([z, z]), now.repeat(2), conditions)
        eps_u, eps_c = both.chunk(2)
        said.noise = both.detach()
        with torch.no_grad():
            guidance = step(
                z.detach(), now, then, condition, lesson.image, lesson.target, guidance_scale=settings.guidance_scale,
                class_scale=settings.class_scale, distance_scale=settings.distance_scale, angle_deg=lesson.angle,
            )[3]  # fmt: skip
        length = (eps_c - eps_u).flatten(1).norm(dim=1)
        eps = eps_u + guidance * (length / length.detach())[:, None, None, None]
        z, _ = ddim(z, eps, levels[now], levels[then])
    return z


def what_is_asked(
    classifier: SoftmaxClassifier, student: ClassConditionalLatentDiffusion, z: Tensor, lesson: Lessons
) -> Tensor:
    """The loss of the ends z [B, C, h, w] of the student's runs."""
    image = (student.decode(z) + 1) / 2
    logits, target = classifier.logits(image), lesson.target[:, None]
    ahead = logits.gather(1, target)[:, 0] - logits.scatter(1, target, -torch.inf).amax(dim=1)
    change = (image.clamp(0, 1) - lesson.image).abs().mean()
    return (z - lesson.end).square().mean() + MARGIN_WEIGHT * (MARGIN - ahead).relu().mean() + CHANGE_WEIGHT * change


def distil(pack: Pack, steps: int, count: int, seed: int, progress: Progress) -> float:
    """Train the student and write its changes into the pack; returns its last losses' mean."""
    g = torch.Generator().manual_seed(seed)
    lessons, settings = teach(pack, count, g, progress), student_settings(pack)
    student, classifier = pack.diffusion(), pack.classifier(CLASSIFIER)
    changes = attach(student.denoiser, RANK, g)
    options = settings.graph.model_copy(update={"guidance_every": 2})  # returns what it added
    step = GuidedStep(Said(student), classifier, options, decoder=pack.guidance_decoder())  # type: ignore[arg-type]
    weights = [weight for change in changes.values() for weight in change.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
    task = progress.add_task("distilling", total=steps, loss=math.nan)
    order, losses = torch.zeros(0, dtype=torch.long), []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(lessons.end), generator=g)])
        rows, order = order[:BATCH], order[BATCH:]
        some = Lessons(*(column[rows] for column in lessons))
        loss = what_is_asked(classifier, student, run(student, step, some, settings), some)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.update(task, advance=1, loss=loss.item())
    save_changes(changes, pack.folder / FEW_STEPS)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main(
    pack: Annotated[str, typer.Option(help="Pack or folder, which is changed.")] = "digits",
    steps: Annotated[int, typer.Option(help="Training steps.", min=2)] = 300,
    count: Annotated[int, typer.Option(help="Runs of the teacher.", min=16)] = 1024,
    seed: Annotated[int, typer.Option(help="Of lessons, weights and batches.")] = 0,
) -> None:
    """Distil guided runs into few steps (a quarter of an hour on a CPU), and list the change in the pack's pack.json.

    Example: OMP_NUM_THREADS=1 python -m counterlens.engine.packs.few_steps --pack digits
    """
    opened = Pack(pack)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        loss = distil(opened, steps, count, seed, progress)
    path = opened.folder / FEW_STEPS
    manifest = json.loads((opened.folder / "pack.json").read_text())
    manifest["files"][FEW_STEPS] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["few_steps"] = {"seed": seed, "steps": steps, "lessons": count, "rank": RANK, "loss": round(loss, 4)}
    (opened.folder / "pack.json").write_text(json.dumps(manifest, indent=2) + "\n")
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB, mean loss at the end {loss:.4f}")


if __name__ == "__main__":
    typer.run(main)
