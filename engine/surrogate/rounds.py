"""Trains a surrogate: the user's images, images around them, then round by round what fooled the student only.

Each stage is seeded and saved when it is done; the same call goes on after the last one that was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from counterlens.export.store import tensors_digest

from ..blackbox.answers import FILE
from ..blackbox.box import Fingerprint
from ..errors import CounterlensError, UsageError
from ..files import write_atomically
from ..guidance.jobs import Job
from ..images.files import as_saved, make_folder, to_uint8
from ..metrics.inputs import Baseline, make_baseline
from ..models.protocols import SoftmaxClassifier
from ..provenance import digest, models_digest
from .around import STRENGTHS, hidden_parts, made_again
from .confirming import make
from .student import Students, new_students
from .surrogate import Surrogate
from .training import draws, fit

if TYPE_CHECKING:
    from ..blackbox.box import BlackBox
    from ..core.core import EngineCore

FEWEST = 8  # images below which there is nothing to learn from
LEAST = 40  # queries below which there is nothing to learn from
ROUNDS = 0.1  # share of the queries that the rounds have at least
ANGLES = (45.0, 90.0)  # of the filter, in turns: what is realistic, and what it would hide
SCALES = (1.0, 1.4)  # of the classifier's score, in turns
OTHER = 0.02  # added to the probabilities that targets are drawn from: every label comes up
GENERATED = 64  # images made at once
PER_HELD = 3  # queries: a held-out image, its counterfactual, and the blend between them that is nearest the decision
STATE = "training.safetensors"  # of a training that goes on


@dataclass(frozen=True)
class Plan:
    """How a surrogate is trained.

    Attributes:
        queries: asked in all, the held-out ones too.
        rounds: of counterfactuals that the student makes and the box judges.
        hidden: share of the queries that are images with a part hidden, as saliency needs them.
        members, width: of the students.
        steps: of the optimiser for each member, before the first round; further ones take `again` of them.
        own, generated, held: shares of the queries for the user's images, for what the generator makes of them, and for
            the held-out ones; the rounds have the rest, a tenth at least: where `hidden` leaves less, the first two
            give way.
        blends: of a round, queries for images between an image and its counterfactual, for each counterfactual.
        enough: share of a round's counterfactuals that the box confirms from which it is asked no further.
        seed: of everything random.
    """

    queries: int = 3000
    rounds: int = 3
    hidden: float = 0.0
    members: int = 2
    width: int = 32
    steps: int = 500
    again: float = 0.7
    own: float = 0.35
    generated: float = 0.2
    blends: float = 0.2
    held: float = 0.05
    enough: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        if self.queries < LEAST:
            raise UsageError(f"queries: expected {LEAST} or more, got {self.queries}")
        if not 0 <= self.hidden <= 0.6:
            raise UsageError(f"hidden: expected a share in [0, 0.6], got {self.hidden:g}")
        for name in ("rounds", "members", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected 1 or more, got {getattr(self, name)}")

    @property
    def shares(self) -> tuple[float, float]:
        """Of the queries, for the user's images and for those that the generator makes."""
        room = (1 - ROUNDS - self.hidden - self.held) / (self.own + self.generated)
        return self.own * min(1.0, room), self.generated * min(1.0, room)


@dataclass
class Trainer:
    """The state of a training between its stages."""

    engine: EngineCore
    box: BlackBox
    own: Tensor  # [N, 3, H, W] in [0, 1], the user's images
    plan: Plan
    students: Students
    hidden: Baseline
    images: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    queries: dict[str, int] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    agreement: dict[str, Any] = field(default_factory=dict)

    def ask(self, kind: str, images: Tensor, *, keep: bool = True) -> Tensor:
        """The box's answers [N, labels] to images [N, 3, H, W] in [0, 1], as 8 bits; remembered to learn from.

        What it does not answer is left out.
        """
        saved = to_uint8(images)
        said = torch.from_numpy(self.box.answer(saved.permute(0, 2, 3, 1).contiguous().numpy())).float()
        self.queries[kind] = self.queries.get(kind, 0) + len(images)
        if keep:
            good = said.isfinite().all(dim=1)
            if not good.any() and (len(images) >= FEWEST or not self.images):
                raise CounterlensError(
                    f"classifier: {self.box.name} answered none of {len(images)} images: {self.box.why()}"
                )
            self.images.append(saved[good])
            self.answers.append(said[good])
        return said

    def stages(self) -> list[tuple[str, Callable[[torch.Generator], None]]]:
        """What is done, in order, by name."""
        first = [("own", self._own), ("generated", self._generated)]
        if self.plan.hidden:
            first.append(("hidden", self._hidden))
        rounds = [(f"round {r + 1}", self._round) for r in range(self.plan.rounds)]
        return [*first, ("first fit", self._fit), *rounds, ("held", self._held)]

    def run(self, done: int = 0, on_stage: Callable[[int, str], None] = lambda *_: None) -> None:
        """Go through the stages from number `done` on; told each that is finished."""
        for number, (name, stage) in enumerate(self.stages()):
            if number >= done:
                stage(draws(self.plan.seed, name))
                on_stage(number + 1, name)

    def keep(self, path: Path, key: str, done: int) -> None:
        """Write the state after `done` stages."""
        held = {f"students.{name}": value.contiguous() for name, value in self.students.state_dict().items()}
        for n, (images, answers) in enumerate(zip(self.images, self.answers, strict=True)):
            held |= {f"images.{n}": images, f"answers.{n}": answers}
        said = {
            "key": key, "done": done, "queries": self.queries, "rounds": self.records, "agreement": self.agreement,
            "box": self.box.fingerprint().record(),
        }  # fmt: skip
        write_atomically(path, save(held, metadata={"state": json.dumps(said)}))

    def resume(self, path: Path, key: str) -> int:
        """Read the state of an earlier session, if there is one; how many stages are done.

        Raises:
            UsageError: another training is there. CounterlensError: it cannot be read, or the box changed since.
        """
        if not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as file:
                said = json.loads(file.metadata()["state"])
                names = list(file.keys())
                held = {name: file.get_tensor(name) for name in names}
            known, done, before = said["key"], int(said["done"]), Fingerprint.of(said["box"])
            self.queries, self.records, self.agreement = said["queries"], said["rounds"], said["agreement"]
            weights = {k.removeprefix("students."): v for k, v in held.items() if k.startswith("students.")}
            count = sum(name.startswith("images.") for name in held)
            self.images, self.answers = ([held[f"{what}.{n}"] for n in range(count)] for what in ("images", "answers"))
            if known == key:
                self.students.load_state_dict(weights)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise CounterlensError(f"{path}: {str(error).splitlines()[0]}; remove it to begin again") from error
        if known != key:
            raise UsageError(
                f"out: {path.parent} holds a training of another box, other images or another plan that was stopped; "
                f"choose another folder, or remove {path.name}"
            )
        if change := before.change(self.box.fingerprint()):
            raise CounterlensError(
                f"{path}: {self.box.name} is not what it was when this training was stopped: {change}; choose another "
                "folder, or remove this file to begin again"
            )
        return done

    def _count(self, share: float) -> int:
        return max(2, int(self.plan.queries * share))

    @property
    def _left(self) -> int:
        """Queries that the rounds may still take."""
        return self.plan.queries - sum(self.queries.values()) - PER_HELD * len(self._split[1])

    @property
    def _split(self) -> tuple[Tensor, Tensor]:
        """Places of the images that are trained on, and of those that are held out."""
        order = torch.randperm(len(self.own), generator=draws(self.plan.seed, "split"))
        held = min(self._count(self.plan.held) // PER_HELD, len(order) // 4)
        return order[held:][: self._count(self.plan.shares[0])], order[:held]

    def _own(self, g: torch.Generator) -> None:
        self.ask("own", self.own[self._split[0]])

    def _drawn(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images [count, 3, H, W] of the user's, and a target for each: half the runner-up, half any other label."""
        places = torch.randint(len(self.answers[0]), (count,), generator=g)
        p = self.answers[0][places]
        others = (p + OTHER).scatter(1, p.argmax(1, keepdim=True), 0.0)
        any_other = torch.multinomial(others, 1, generator=g)[:, 0]
        runner_up = p.topk(2, dim=1).indices[:, 1]
        if self.box.hard:  # it has no second choice: the students' own
            seen = self._said(self.images[0][places].float() / 255)
            runner_up = seen.scatter(1, p.argmax(1, keepdim=True), -1.0).argmax(1)
        picked = torch.rand(count, generator=g) < 0.5
        return self.images[0][places].float() / 255, torch.where(picked, runner_up, any_other)

    @torch.no_grad()
    def _said(self, images: Tensor) -> Tensor:
        return torch.cat([self.students(some).softmax(1) for some in images.split(GENERATED)])

    def _generated(self, g: torch.Generator) -> None:
        images, targets = self._drawn(self._count(self.plan.shares[1]), g)
        seeds = torch.randint(2**40, (len(images),), generator=g).tolist()
        made = []
        for n, start in enumerate(range(0, len(images), GENERATED)):
            rows = slice(start, start + GENERATED)
            strength = STRENGTHS[n % len(STRENGTHS)]
            made.append(made_again(self.engine.diffusion, images[rows], targets[rows], seeds[rows], strength))
        self.ask("generated", torch.cat(made))

    def _hidden(self, g: torch.Generator) -> None:
        images, _ = self._drawn(self._count(self.plan.hidden), g)
        seeds = torch.randint(2**40, (len(images),), generator=g).tolist()
        what = make_baseline(self.hidden, images, seeds)
        what = torch.full((1,), what) if not isinstance(what, Tensor) else what
        self.ask("hidden", hidden_parts(images, what if what.ndim == 4 else what.reshape(1, -1, 1, 1), seeds))

    def _fit(self, g: torch.Generator, share: float = 1.0) -> None:
        steps = max(1, int(self.plan.steps * share))
        seed = int(torch.randint(2**40, (), generator=g))
        fit(self.students, torch.cat(self.images), torch.cat(self.answers), hard=self.box.hard, steps=steps, seed=seed)

    def counterfactuals(self, images: Tensor, targets: Tensor, g: torch.Generator, *, varied: bool = True) -> Tensor:
        """What the students lead to, as saved: [N, 3, H, W]; an image of which nothing came of stays as it is."""
        config, jobs = self.engine.config, []
        base = self.engine.settings(config)
        for n, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
            settings = base
            if varied:
                angle = ANGLES[n % 2] if base.filter == "zero" else base.angle
                scale = base.class_scale * SCALES[n // 2 % 2]
                settings = base.model_copy(update={"angle": angle, "class_scale": scale})
            seed = int(torch.randint(2**40, (), generator=g))
            jobs.append(Job(image, target, seed, settings))
        made = make(self.engine, config, jobs)
        after = [job.image if o.image is None else o.image for job, o in zip(jobs, made, strict=True)]
        return as_saved(torch.stack(after))

    def _round(self, g: torch.Generator) -> None:
        if self.records and self.records[-1]["confirmed"] >= self.plan.enough:
            return  # the box agrees; the rest is not asked
        each = self._left / (self.plan.rounds - len(self.records)) / (1 + self.plan.blends)
        count = min(self._left, max(2, int(each)))
        if count < 1:
            return
        images, targets = self._drawn(count, g)
        made = self.counterfactuals(images, targets, g)
        said = self.ask("counterfactuals", made)
        confirmed = answered(said, targets).float().mean().item()
        led = (self._said(made).argmax(1) == targets).float().mean().item()
        rows = torch.randint(count, (int(count * self.plan.blends),), generator=g)
        shares = torch.rand(len(rows), generator=g)[:, None, None, None]
        if len(rows):
            self.ask("blends", torch.lerp(images[rows], made[rows], shares))
        self._fit(g, self.plan.again)
        self.records.append({"asked": count, "student_flips": round(led, 4), "confirmed": round(confirmed, 4)})

    def _held(self, g: torch.Generator) -> None:
        """Agreement on images that training never saw: themselves, their counterfactuals, and half of the way there."""
        images = self.own[self._split[1]]
        if not len(images):
            return
        before = self.ask("held", images, keep=False)
        images, before = (x[before.isfinite().all(1)] for x in (images, before))
        if not len(images):
            return  # it answers none of them
        seen = self._said(images)
        targets = seen.scatter(1, before.argmax(1, keepdim=True), -1.0).argmax(1)
        if not self.box.hard:
            targets = before.topk(2, dim=1).indices[:, 1]
        made = self.counterfactuals(images, targets, g, varied=False)
        after = self.ask("held", made, keep=False)
        near = self._nearest(images, made)
        between = self.ask("held", near, keep=False)

        def agree(said: Tensor, x: Tensor) -> float:
            return round(answered(said, self._said(x).argmax(1)).float().mean().item(), 4)

        rise = after.clamp(min=1e-6).log() - before.clamp(min=1e-6).log()
        self.agreement = {
            "pairs": len(images),
            "images": agree(before, images),
            "near_the_decision": agree(between, near),
            "counterfactuals": agree(after, made),
            "confirmed": round(answered(after, targets).float().mean().item(), 4),
            "towards_the_target": round((rise.gather(1, targets[:, None]) > 0).float().mean().item(), 4),
        }

    def _nearest(self, images: Tensor, made: Tensor) -> Tensor:
        """Of blends of an image and its counterfactual, the one at which the students are least decided."""
        shares = torch.linspace(0, 1, 9)[1:-1]
        ways = torch.stack([torch.lerp(images, made, s) for s in shares.tolist()], 1)  # [N, 7, 3, H, W]
        first_two = self._said(ways.flatten(0, 1)).topk(2, dim=1).values
        gap = (first_two[:, 0] - first_two[:, 1]).reshape(len(images), -1)
        return ways[torch.arange(len(images)), gap.argmin(1)]


def answered(
    said: Tensor,  # [N, labels], NaN where there is no answer
    labels: Tensor,  # [N]
) -> Tensor:
    """Where the answer is this label; no answer is none: [N] bool."""
    return said.isfinite().all(1) & (said.argmax(1) == labels)


def untrained(box: BlackBox, image_size: int, plan: Plan) -> SoftmaxClassifier:
    """The students of a plan as a classifier, before anything was asked.

    Raises:
        UsageError: the box's labels do not exclude each other.
    """
    if box.link != "softmax":
        raise UsageError(f"classifier: the labels of {box.name} are independent; a surrogate needs labels that exclude")
    return SoftmaxClassifier(new_students(len(box.labels), image_size, plan.members, plan.width, plan.seed), box.labels)


def train_surrogate(
    engine: EngineCore,
    box: BlackBox,
    images: Tensor,  # [N, 3, H, W] in [0, 1]
    plan: Plan | None = None,
    *,
    out: str | Path | None = None,
    hidden: Baseline = "blur",
    on_stage: Callable[[int, int, str, Trainer], None] = lambda *_: None,
) -> Surrogate:
    """Train a student of a box around the user's images.

    Args:
        engine: whose classifier is an untrained `new_students` for this plan; its config makes the counterfactuals.
        box: asked, counted and cached.
        images: the user's; no labels are needed.
        plan: every number.
        out: folder; each answer and each finished stage is kept there, and the same call goes on after it.
        hidden: what hides pixels, see `metrics.inputs.make_baseline`.
        on_stage: told (stage, stages, its name, the state) after each.

    Raises:
        UsageError: the folder holds another training, or images do not fit. BudgetSpent: the box may not be asked so
            often; what it answered is kept. CounterlensError: it answers no more.
    """
    plan = plan or Plan()
    engine.check_images(images)
    if len(images) < FEWEST:
        raise UsageError(f"images: expected {FEWEST} or more to learn from, got {len(images)}")
    students = engine.classifier.module
    assert isinstance(students, Students)
    trainer = Trainer(engine, box, images, plan, students, hidden)
    folder = None if out is None else make_folder(Path(out))
    key = digest({
        "plan": asdict(plan), "images": tensors_digest(to_uint8(images)), "box": box.fingerprint().box,
        "generator": models_digest(engine.diffusion.modules(), engine.labels),
        "settings": engine.settings(engine.config).model_dump(),
    })  # fmt: skip
    done = 0 if folder is None else trainer.resume(folder / STATE, key)
    if folder is not None:
        box.keep(folder / FILE)
    total = len(trainer.stages())

    def finished(number: int, name: str) -> None:
        if folder is not None:
            trainer.keep(folder / STATE, key, number)
        on_stage(number, total, name, trainer)

    trainer.run(done, finished)
    surrogate = Surrogate(
        students, list(box.labels), images.shape[2], bool(box.hard), box.fingerprint().record(),
        torch.cat(trainer.images), torch.cat(trainer.answers),
        {"plan": asdict(plan), "key": key, "images": len(images), "queries": trainer.queries,
         "rounds": trainer.records, "agreement": trainer.agreement},
    )  # fmt: skip
    if folder is not None:
        surrogate.save(folder)
        (folder / STATE).unlink(missing_ok=True)
    return surrogate
