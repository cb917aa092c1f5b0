"""Runs samples through guided schedules over a fixed number of slots: step-level continuous batching."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..config import Settings, StepOptions
from ..errors import UsageError
from ..models.conditions import Condition, tensors
from ..models.protocols import Classifier, Decoder, Diffusion
from .jobs import Job, Outcome, Sample, check_graph, guided_steps, reused_kinds, seeded_noise
from .pullback import PullbackMode
from .region import guidance_of, hold, narrow
from .schedule import Schedule, add_noise, ddim, schedule_of
from .solvers import COLUMNS, advance, coefficients, no_history
from .spans import span
from .step import GuidedStep, carried_names

StepFunction = Callable[..., tuple[Tensor, ...]]
# Told, after a guided step, the ids of the n jobs that took it, and score and reference [n, C, h, w] of each.
Observer = Callable[[list[int], Tensor, Tensor], None]
IDLE_SCALES = (0.0, 0.0, 0.0, 45.0)  # of an empty slot: what every filter takes
PATIENCE = 2  # ticks that a finished sample of a live sampler waits for others to be decoded with


def invert(
    diffusion: Diffusion,
    z: Tensor,  # [B, C, h, w]
    schedule: Schedule,
) -> Tensor:
    """DDIM inversion, unconditional: the noised latents from which the unguided schedule leads back to `z`.

    Ends at the first timestep of the schedule, so that the first step starts from its own noise level. Costs one
    unconditional noise prediction for each step.
    """
    alphas_cumprod = diffusion.alphas_cumprod.to(z)
    batch = z.shape[0]
    null = diffusion.null_condition(batch)
    for t, t_prev in zip(reversed(schedule.timesteps), reversed(schedule.timesteps_prev), strict=True):
        timestep = torch.full((batch,), t, dtype=torch.long, device=z.device)
        eps = diffusion.predict_noise(z, timestep, null)
        z, _ = ddim(z, eps, alphas_cumprod[t_prev].expand(batch), alphas_cumprod[t].expand(batch))
    return z


def renew(
    z: Tensor,  # [C, h, w], noised
    latents: Tensor,  # [C, h, w]
    noise: Tensor,  # [C, h, w]
    share: float,
    abar: Tensor,  # [], of z
) -> Tensor:
    """Latents whose noise is sqrt(1 - share^2) of that in `z` and `share` of another: as large, and another start."""
    centre = abar.sqrt() * latents
    return centre + math.sqrt(1 - share**2) * (z - centre) + share * (1 - abar).sqrt() * noise


class Sampler:
    """Guided sampling over a fixed number of slots.

    Every slot has its own sample, timestep, target, scales, solver and history. A sample that is finished leaves and
    the next one takes its place before the following step, so the step always sees the same shape; an empty slot holds
    zeros. No sample's numbers depend on its slot or neighbours. Three stages, each in batches of the same fixed shape:
    encoding, DDIM inversion (in slots of its own) and guided steps; then decoding. A stage runs only when the next one
    has room, so memory does not grow with the number of jobs.

    A batch wants all slots busy: newcomers are prepared to the end before the next step, and finished samples wait for
    a full batch to be decoded. Whoever waits for one answer wants neither: while a sampler is `live`, a tick holds at
    most one pass of each stage, so that a newcomer's inversion delays nobody, and a finished sample waits `patience`
    ticks at most. Up to a batch is prepared ahead, so that a slot that gets free is taken at once. Budgets count from
    the moment that a job is submitted. The numbers are the same.

    To be used from one thread, models frozen (`models.freezing.frozen`).

    Args:
        diffusion: see `engine.models.protocols`.
        slots: how many samples are guided at once.
        step: a GuidedStep, or one that was compiled for this batch size.
        graph: the settings' `graph` that `step` was made for.
        predict_noise, encode, decode: in place of the diffusion model's own (compiled, for example); `decode=None`
            leaves outcomes without images.
        guided_noise: the noise prediction of the denoiser that `step` has, where it is another.
        observe: told what the filter compared, see `Observer`; needs a `step` with directions.
        reusing: the step that takes these kinds from an earlier one (`GuidedStep.reused`), of a `graph` that does so.
        clock: seconds, for budgets.

    Attributes:
        live: for callers that wait for single samples, see above; False at first.
        patience: ticks that a finished sample waits while `live`, `PATIENCE` at first.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        slots: int,
        step: StepFunction,
        graph: StepOptions,
        *,
        predict_noise: Callable[[Tensor, Tensor, Condition], Tensor] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        guided_noise: Callable[[Tensor, Tensor, Condition], Tensor] | None = None,
        observe: Observer | None = None,
        reusing: Callable[[tuple[str, ...]], StepFunction] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.diffusion = diffusion
        self.slots = slots
        self.step = step
        self.graph = graph
        self.predict_noise = predict_noise or diffusion.predict_noise
        self.guided_noise = guided_noise or self.predict_noise
        self.encode = encode or diffusion.encode
        self.decode = decode
        self.observe = observe
        self.reusing = reusing
        self.clock = clock
        self.live = False
        self.patience = PATIENCE
        self.ticks = 0  # guided or unguided steps of the slots so far
        self.stepped: list[tuple[int, int]] = []  # (slot, id) of the last tick
        self.z0 = torch.empty(0)  # [slots, C, h, w], clean estimates of the last tick
        self._next_id = 0
        self._last_tick_s = 0.0
        self._waiting: deque[Sample] = deque()
        self._encoded: deque[Sample] = deque()
        self._inverting: list[Sample | None] = [None] * slots
        self._ready: list[Sample] = []
        self._running: list[Sample | None] = [None] * slots
        self._done: list[Sample] = []
        self._failed: list[Outcome] = []
        self._null = diffusion.null_condition(slots)
        self._device = tensors(self._null)[0].device
        self._target = torch.zeros(slots, dtype=torch.long, device=self._device)
        self._scales = torch.tensor([IDLE_SCALES] * slots, dtype=torch.float64, device=self._device)
        self._condition = diffusion.condition(self._target)
        self._z = torch.empty(0)
        self._carried: dict[str, Tensor] = {}  # [slots, ...] each, of the last step that computed it

    @property
    def busy(self) -> bool:
        """Whether any job is not finished."""
        queues = (self._waiting, self._encoded, self._ready, self._done, self._failed)
        return any(queues) or any(self._inverting) or any(self._running)

    @property
    def progress(self) -> dict[int, tuple[int, int]]:
        """Of the jobs in the slots, and those that wait to be decoded: steps taken, and of how many."""
        held = (sample for sample in (*self._running, *self._done) if sample is not None)
        return {sample.id: (len(sample.kept), len(sample.schedule)) for sample in held}

    def submit(self, job: Job) -> int:
        """Add a job to the queue and return its id.

        Raises:
            UsageError: its settings need another step than the sampler's, or its schedule does not fit.
        """
        settings = job.settings
        check_graph(settings, self.graph)
        if job.budget_s is not None and not job.budget_s > 0:
            raise UsageError(f"budget_s: expected seconds above 0, got {job.budget_s}")
        if settings.reuse_features > 1 and isinstance(job.region, str):
            raise UsageError("region: auto looks at guidance of whole UNets; give a mask or leave reuse_features out")
        alphas_cumprod = self.diffusion.alphas_cumprod
        schedule = schedule_of(settings, alphas_cumprod)
        table = coefficients(schedule, alphas_cumprod, settings.solver)
        guided = guided_steps(settings, len(schedule))
        sample = Sample(self._next_id, job, schedule, table, guided, reused_kinds(settings, guided))
        sample.started = self.clock()
        self._next_id += 1
        self._waiting.append(sample)
        return sample.id

    def cancel(self, id: int) -> bool:
        """Drop a job wherever it is, free its slot and leave the others as they are; False if it is not here any more.

        There is no outcome for it.
        """
        queues: tuple[list[Sample] | deque[Sample], ...] = (self._waiting, self._encoded, self._ready, self._done)
        for queue in queues:
            for sample in queue:
                if sample.id == id:
                    queue.remove(sample)
                    return True
        for slots in (self._inverting, self._running):
            for i, held in enumerate(slots):
                if held is not None and held.id == id:
                    slots[i] = None
                    return True
        return False

    @torch.no_grad()
    def tick(self) -> list[Outcome]:
        """Fill the slots, take one step of all of them, and return what was finished."""
        self.stepped = []
        if self.live and len(self._ready) < self.slots and self._more_to_prepare:
            self._prepare()
        while self._has_place and (self._ready or (self._more_to_prepare and not self.live)):
            if (sample := self._next_ready()) is not None:
                self._place(sample)
            else:
                self._prepare()
        if any(self._running):
            with span("step"):
                self._step()
        return self._finish()

    @property
    def _has_place(self) -> bool:
        """Whether a newcomer may begin. What samples reuse decides which step they take, and a batch whose samples take
        different ones takes them all, so newcomers begin where those beside them compute everything.
        """
        begun = (sample for sample in self._running if sample is not None)
        return None in self._running and not any(sample.reused[len(sample.kept)] for sample in begun)

    @property
    def _more_to_prepare(self) -> bool:
        return bool(self._waiting or self._encoded or any(self._inverting))

    def _next_ready(self) -> Sample | None:
        """The oldest job, if it is ready: nobody is overtaken, and the others are prepared in the same batches.

        A live sampler takes the oldest that is ready: whoever needs no inversion does not wait for one.
        """
        preparing = [sample.id for sample in (*self._encoded, *self._inverting) if sample is not None]
        oldest = min(self._ready, key=lambda sample: sample.id, default=None)
        if oldest is None or (not self.live and min(preparing, default=oldest.id) < oldest.id):
            return None
        self._ready.remove(oldest)
        return oldest

    # Preparing: encode, then noise or inversion

    def _prepare(self) -> None:
        if self._waiting and not self._encoded and None in self._inverting:
            with span("encode"):
                self._encode()
        for i, held in enumerate(self._inverting):
            if held is None and self._encoded:
                self._inverting[i] = self._encoded.popleft()
        if any(self._inverting):
            with span("inversion"):
                self._invert()

    def _encode(self) -> None:
        samples = [self._waiting.popleft() for _ in range(min(self.slots, len(self._waiting)))]
        started = self.clock()
        for sample in samples:
            sample.started = sample.started if self.live else started
        images = torch.zeros(self.slots, *samples[0].job.image.shape, dtype=samples[0].job.image.dtype)
        for row, sample in enumerate(samples):
            images[row] = sample.job.image
        z = self.encode(images.to(self._device))
        if not self._z.numel():
            self._z = torch.zeros_like(z)
            self._inverted = torch.zeros_like(z)
            self._reused = torch.zeros_like(z)
            self._history = no_history(z)
            latent = samples[0].job.settings.distance == "latent"
            self._reference = torch.zeros_like(z) if latent else torch.zeros_like(images, device=z.device)
        alphas_cumprod = self.diffusion.alphas_cumprod.to(z)
        finite = z.isfinite().flatten(1).all(dim=1).tolist()
        for row, sample in enumerate(samples):
            sample.latents = sample.z = z[row].clone()
            if not finite[row]:
                self._fail(sample, "the encoder returned NaN or infinite values")
                continue
            sample.region = hold(sample.job.region, sample.latents, sample.guided)
            if sample.job.settings.noise == "inversion":
                self._encoded.append(sample)
            else:
                one = sample.z[None]
                noise = seeded_noise(tuple(sample.z.shape), [sample.job.seed], one)  # type: ignore[arg-type]
                if sample.region is not None:
                    sample.region.noise = noise[0]
                sample.z = add_noise(one, noise, alphas_cumprod[sample.schedule.start].expand(1))[0]
                self._ready.append(sample)
        self._share(samples, started)

    def _invert(self) -> None:
        """One step of DDIM inversion of every sample that is being inverted; see `invert`."""
        started = self.clock()
        timestep, level, level_next = [1] * self.slots, [0] * self.slots, [0] * self.slots
        held = [(i, sample) for i, sample in enumerate(self._inverting) if sample is not None]
        for i, sample in held:
            if sample.inverted == 0:
                self._inverted[i] = sample.z
            step = len(sample.schedule) - 1 - sample.inverted
            timestep[i] = level_next[i] = sample.schedule.timesteps[step]
            level[i] = sample.schedule.timesteps_prev[step]
            if sample.region is not None:
                sample.region.trajectory[step] = self._inverted[i].clone()
        z, device = self._inverted, self._z.device
        alphas_cumprod = self.diffusion.alphas_cumprod.to(z)
        eps = self.predict_noise(z, torch.tensor(timestep, device=device), self._null)
        z, _ = ddim(z, eps, alphas_cumprod[level], alphas_cumprod[level_next])
        finite = z.isfinite().flatten(1).all(dim=1).tolist()
        self._share([sample for _, sample in held], started)
        keep = [False] * self.slots
        for i, sample in held:
            sample.inverted += 1
            if finite[i] and sample.inverted < len(sample.schedule) and not self._expired(sample):
                keep[i] = True
                continue
            self._inverting[i] = None
            if not finite[i]:
                self._fail(sample, f"the model returned NaN or infinite values at inversion step {sample.inverted}")
            elif self._expired(sample):
                self._fail(sample, f"budget_s: {sample.job.budget_s:g} s ended before the first guided step")
            else:
                sample.z = z[i].clone()
                if sample.job.renewed:
                    self._renew(sample)
                self._ready.append(sample)
        self._inverted = torch.where(torch.tensor(keep, device=device)[:, None, None, None], z, 0.0)

    def _renew(self, sample: Sample) -> None:
        seed, share = sample.job.seed, sample.job.renewed
        noise = seeded_noise(tuple(sample.z.shape), [seed], sample.z)[0]  # type: ignore[arg-type]
        abar = self.diffusion.alphas_cumprod.to(sample.z)[sample.schedule.start]
        fresh = renew(sample.z, sample.latents, noise, share, abar)
        sample.z = fresh if sample.region is None else sample.region.inside(fresh, sample.z)

    # Guided steps

    def _place(self, sample: Sample) -> None:
        slot = self._running.index(None)
        self._running[slot] = sample
        settings = sample.job.settings
        self._z[slot] = sample.z
        self._reference[slot] = sample.latents if settings.distance == "latent" else sample.job.image.to(self._z)
        self._target[slot] = sample.job.target
        scales = (settings.guidance_scale, settings.class_scale, settings.distance_scale, settings.angle)
        self._scales[slot] = torch.tensor(scales, dtype=torch.float64)
        for tensor in (*self._history, self._reused):
            tensor[slot] = 0
        self._condition = self.diffusion.condition(self._target)
        sample.z = torch.empty(0)

    def _step(self) -> None:
        started = self.clock()
        z, device = self._z, self._z.device
        timestep, timestep_prev = [1] * self.slots, [0] * self.slots
        guided, inside, multistep = [False] * self.slots, [False] * self.slots, [False] * self.slots
        table = torch.zeros(self.slots, COLUMNS, dtype=torch.float64)
        held = [(i, sample) for i, sample in enumerate(self._running) if sample is not None]
        for i, sample in held:
            taken = len(sample.kept)
            timestep[i], timestep_prev[i] = sample.schedule.timesteps[taken], sample.schedule.timesteps_prev[taken]
            guided[i] = sample.guided[taken]
            inside[i] = taken / len(sample.schedule) < sample.job.settings.guidance_end
            multistep[i] = sample.job.settings.solver != "ddim"
            table[i] = sample.table[taken]
        t, t_prev = torch.tensor(timestep, device=device), torch.tensor(timestep_prev, device=device)
        kept = torch.full((self.slots,), torch.nan, device=device)
        z_next, z0 = z, z
        if any(guided):
            with span("guided step"):
                z_next, z0, kept = self._guided_step(z, t, t_prev, guided)
        if unguided := [i for i, _ in held if not guided[i]]:
            levels = self.diffusion.alphas_cumprod.to(z)
            with span("unguided step"):
                eps = self.predict_noise(z, t, self._null)
            eps = eps + torch.where(_per_slot(inside, device), self._reused, 0.0)
            plain_next, plain_z0 = ddim(z, eps, levels[t], levels[t_prev])
            choose = _per_slot([i in unguided for i in range(self.slots)], device)
            z_next, z0 = torch.where(choose, plain_next, z_next), torch.where(choose, plain_z0, z0)
            kept = torch.where(choose[:, 0, 0, 0], torch.nan, kept)
        if any(multistep):
            solved, self._history = advance(table.to(device), z, z0, self._history)
            z_next = torch.where(_per_slot(multistep, device), solved, z_next)
        if any(sample.region for _, sample in held):
            z_next, z0 = self._keep_to_regions(z, z_next, z0, t, t_prev, guided)
        finite = z_next.isfinite().flatten(1).all(dim=1).tolist()
        levels_prev = self.diffusion.alphas_cumprod.to(z)[t_prev]
        shares = kept.tolist()
        self._share([sample for _, sample in held], started)
        self._last_tick_s = self.clock() - started
        self.ticks += 1
        self.stepped, self.z0 = [(i, sample.id) for i, sample in held], z0
        for i, sample in held:
            if not finite[i]:
                where = f"step {len(sample.kept) + 1} of {len(sample.schedule)}"
                self._fail(sample, f"the model returned NaN or infinite values at {where}")
                self._running[i] = None
                continue
            sample.kept.append(shares[i])
            whole = len(sample.kept) == len(sample.schedule)
            if whole or self._expired(sample):
                sample.complete = whole
                sample.z = (z_next if whole else z0)[i].clone()
                if sample.region is not None and not whole:
                    sample.region.decide(sample.job.image.shape[-2:])
                    _, sample.z = sample.region.put_back(sample.z, sample.z, len(sample.kept) - 1, levels_prev[i])
                sample.finished = self.ticks
                self._done.append(sample)
                self._running[i] = None
        self._z = torch.where(_per_slot([s is not None for s in self._running], device), z_next, 0.0)

    def _guided_step(self, z: Tensor, t: Tensor, t_prev: Tensor, guided: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        kinds: dict[tuple[str, ...], list[bool]] = {}
        for i, sample in enumerate(self._running):
            if sample is not None and guided[i]:
                kinds.setdefault(sample.reused[len(sample.kept)], [False] * self.slots)[i] = True
        made: tuple[Tensor, Tensor, Tensor] | None = None
        for reused in sorted(kinds):
            out = self._step_of_kind(reused, z, t, t_prev, kinds[reused])
            if made is not None:
                choose = _per_slot(kinds[reused], z.device)
                kept = torch.where(choose[:, 0, 0, 0], out[2], made[2])
                out = torch.where(choose, out[0], made[0]), torch.where(choose, out[1], made[1]), kept
            made = out
        assert made is not None
        return made

    def _step_of_kind(
        self, reused: tuple[str, ...], z: Tensor, t: Tensor, t_prev: Tensor, rows: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The guided step that reuses this, of all slots; `rows` are those that take it."""
        step, given = self.step, {}
        if reused:
            assert self.reusing is not None
            step, given = self.reusing(reused), {"carried": [self._carried[name] for name in carried_names(reused)]}
        guidance_scale, class_scale, distance_scale, angle = self._scales.unbind(1)
        z_next, z0, kept, *more = step(
            z, t, t_prev, self._condition, self._reference, self._target, guidance_scale=guidance_scale,
            class_scale=class_scale, distance_scale=distance_scale, angle_deg=angle, **given,
        )  # fmt: skip
        if self.observe is not None:
            *more, score, reference = more
            seen = [i for i, asked in enumerate(rows) if asked]
            self.observe([sample.id for i in seen if (sample := self._running[i])], score[seen], reference[seen])
        if self.graph.with_guidance:  # for the steps that reuse it
            self._reused = torch.where(_per_slot(rows, z.device), more.pop(0), self._reused)
        made = carried_names(kind for kind in self.graph.reuses if kind not in reused)
        for name, tensor in zip(made, more, strict=True):
            held = self._carried.get(name, tensor)
            self._carried[name] = torch.where(_per_slot(rows, z.device), tensor, held)
        return z_next, z0, kept

    def _keep_to_regions(
        self, z: Tensor, z_next: Tensor, z0: Tensor, t: Tensor, t_prev: Tensor, guided: list[bool]
    ) -> tuple[Tensor, Tensor]:  # z_next and z0, put back outside
        levels = self.diffusion.alphas_cumprod.to(z)
        held = [(i, s, s.region) for i, s in enumerate(self._running) if s and s.region]
        if looking := [(s, region, i) for i, s, region in held if region.mask is None and guided[i]]:
            added = guidance_of(z, z0, self.guided_noise(z, t, self._null), levels[t])
            for s, region, i in looking:
                region.look(added[i], s.job.image.shape[-2:])
        z_next, z0 = z_next.clone(), z0.clone()  # of samples without a region nothing changes
        for i, sample, region in held:
            z_next[i], z0[i] = region.put_back(z_next[i], z0[i], len(sample.kept), levels[t_prev[i]])
        return z_next, z0

    # Leaving

    def _expired(self, sample: Sample) -> bool:
        """Whether another step would end after the sample's budget."""
        budget = sample.job.budget_s
        return budget is not None and self.clock() + self._last_tick_s - sample.started > budget

    def _fail(self, sample: Sample, error: str) -> None:
        self._failed.append(sample.outcome(error))

    def _share(self, samples: Sequence[Sample], started: float) -> None:
        elapsed = (self.clock() - started) / len(samples)
        for sample in samples:
            sample.seconds += elapsed

    def _finish(self) -> list[Outcome]:
        """Outcomes of failed samples, and of finished ones once a batch of them is there or nobody else is coming."""
        out, self._failed = self._failed, []
        if self.live:
            waited = bool(self._done) and self.ticks - self._done[0].finished >= self.patience
            due = waited or (bool(self._done) and not any(self._running))
        else:
            due = not (self._ready or self._more_to_prepare)
        due = due or not all(sample.complete for sample in self._done)
        while len(self._done) >= self.slots or (due and self._done):
            samples, self._done = self._done[: self.slots], self._done[self.slots :]
            with span("decode"):
                out += self._decoded(samples)
        return out

    def _decoded(self, samples: list[Sample]) -> list[Outcome]:
        started = self.clock()
        z = torch.zeros_like(self._z)
        for row, sample in enumerate(samples):
            z[row] = sample.z
        if self.decode is None:
            images, finite = None, [True] * len(samples)
        else:
            images = (self.decode(z) + 1) / 2
            narrow({i: s.region for i, s in enumerate(samples) if s.region is not None}, images, self.decode)
            finite = images.isfinite().flatten(1).all(dim=1).tolist()
        self._share(samples, started)
        out = []
        for row, sample in enumerate(samples):
            steps = len(sample.schedule)
            error = None if finite[row] else f"the model returned NaN or infinite values at step {steps} of {steps}"
            outcome = sample.outcome(error)
            if error is None:
                outcome.z, outcome.image = sample.z, None if images is None else images[row].clone()
                outcome.region = None if sample.region is None else sample.region.mask
            out.append(outcome)
        return out


def _per_slot(values: list[bool], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None, None]


@dataclass
class Run:
    """What comes out of `sample`: latents [B, C, h, w], kept [B, steps], and which samples stayed finite [B]."""

    z: Tensor
    kept_fraction: Tensor
    finite: Tensor


def sample(
    diffusion: Diffusion,
    classifier: Classifier,
    image: Tensor,  # [B, 3, H, W] in [0, 1]
    target: Tensor,  # [B]
    seeds: list[int],
    settings: Settings,
    *,
    pullback: PullbackMode = "functional",
    backend: str = "auto",
    decoder: Decoder | None = None,
    guided: Diffusion | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Run:
    """Encode, noise and denoise one batch in eager; `on_step` gets step (from 1), total and z0 [B, C, h, w].

    Guided steps are those of the diffusion model `guided`, where it is given.
    """
    model = guided or diffusion
    step = partial(GuidedStep, model, classifier, settings.graph, decoder=decoder, mode=pullback, backend=backend)
    sampler = Sampler(diffusion, len(image), step(), settings.graph, reusing=lambda kinds: step(reused=kinds))
    for i in range(len(image)):
        sampler.submit(Job(image[i], int(target[i]), seeds[i], settings))
    steps = len(schedule_of(settings, diffusion.alphas_cumprod))
    outcomes: list[Outcome] = []
    while sampler.busy:
        outcomes += sampler.tick()
        if on_step is not None and sampler.stepped:
            on_step(sampler.ticks, steps, sampler.z0)
    z = torch.zeros(len(image), *diffusion.latent_shape, dtype=image.dtype, device=image.device)
    kept = torch.full((len(image), steps), torch.nan)
    finite = torch.zeros(len(image), dtype=torch.bool)
    for outcome in outcomes:
        kept[outcome.id, : len(outcome.kept)] = torch.tensor(outcome.kept)
        if outcome.z is not None:
            z[outcome.id], finite[outcome.id] = outcome.z, True
    return Run(z, kept, finite)
