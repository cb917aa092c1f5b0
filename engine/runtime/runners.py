"""Everything of an engine that runs under a runtime: the guided step by graph, and the parts beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from counterlens.export.store import Store, weights_digest

from ..config import Settings, StepOptions
from ..errors import UsageError
from ..guidance.jobs import reused_kinds
from ..guidance.pullback import PullbackMode
from ..models.conditions import Condition, tensors
from ..models.protocols import Classifier, Diffusion
from ..models.tiny import TinyDecoder
from ..provenance import WeightHashes
from .choice import Choice, StepRunner
from .registry import AUTO, EAGER
from .spec import STEP, Spec, flat

REAL_IMAGES = 4  # are enough to hold an artefact to eager on
# What the sampler calls beside the step, and the part of the models that it is.
PARTS = {"predict_noise": "unet", "encode": "vae-encoder", "decode": "vae-decoder"}


class Runners:
    """The runners of one engine's models: one for each graph of the guided step, one for each part beside it.

    Args:
        diffusion, classifier: see `engine.models.protocols`.
        tiny: what guidance differentiates through where settings ask for the tiny decoder.
        distilled: the same diffusion model with a denoiser for few guided steps, where settings ask for it.
        runtime, store, backend, pullback: see `choice.StepRunner`.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        classifier: Classifier,
        tiny: TinyDecoder | None,
        distilled: Diffusion | None = None,
        *,
        runtime: str,
        store: Store,
        backend: str,
        pullback: PullbackMode,
    ) -> None:
        self.diffusion, self.classifier, self.tiny, self.distilled = diffusion, classifier, tiny, distilled
        self.runtime, self.store, self.backend = runtime, store, backend
        self.pullback: PullbackMode = pullback
        # A few real images [N, 3, H, W], if there are any yet, on which what is compiled is held to eager.
        self.real_images: Tensor | None = None
        self._steps: dict[tuple[StepOptions, tuple[str, ...]], StepRunner] = {}
        self._parts: dict[str, StepRunner] = {}
        self._pins: Mapping[str, Mapping[str, str]] = {}
        self._weights_hashes: dict[tuple[bool, int], str] = {}
        self.hashes = WeightHashes()

    def guided(self, settings: Settings) -> Diffusion:
        """The diffusion model whose denoiser takes the guided steps of these settings; all else is `diffusion`'s.

        Raises:
            UsageError: there is no distilled one.
        """
        if settings.denoiser == "own":
            return self.diffusion
        if self.distilled is None:
            raise UsageError(
                "denoiser: this engine has no distilled one, which speed turbo needs; take speed fast, or give "
                "Engine(distilled=...) the same model with a denoiser for few steps"
            )
        return self.distilled

    def decoder(self, settings: Settings) -> TinyDecoder | None:
        """What guidance differentiates through in place of the full decoder, where the settings ask for it."""
        return self.tiny if settings.guidance_decoder == "tiny" else None

    def spec(self, settings: Settings, **fields: Any) -> Spec:
        """What is compiled for these settings; fields are those of `Spec` that the settings leave open."""
        if fields.get("what", STEP) != STEP:  # a part is the same under all settings
            weights = self._weights(self.diffusion)
            return Spec(self.diffusion, self.classifier, weights=weights, images=self.real_images, **fields)
        decoder, model = self.decoder(settings), self.guided(settings)
        return Spec(
            model,
            self.classifier,
            options=settings.graph,
            decoder=decoder,
            weights=self._weights(model, *([] if decoder is None else [decoder.module])),
            images=self.real_images,
            **fields,
        )

    def _weights(self, model: Diffusion, *more: nn.Module) -> str | None:
        """Hash of all weights, made once; None while there is no store, which is all that asks for it."""
        key = model is self.distilled, len(more)
        if key not in self._weights_hashes and self.store.folder.exists():
            modules = [*model.modules(), self.classifier.module, *more]
            self._weights_hashes[key] = weights_digest(modules, self.hashes)
        return self._weights_hashes.get(key)

    def step(self, settings: Settings, reused: tuple[str, ...] = ()) -> StepRunner:
        """The runner of the guided step of these settings that reuses this, see `GuidedStep.reused`."""
        key = settings.graph, reused
        if key not in self._steps:
            spec, pins = self.spec(settings, reused=reused), self._pins.get(step_name(reused))
            self._steps[key] = StepRunner(spec, self.runtime, self.store, self.backend, self.pullback, pins=pins)
        return self._steps[key]

    def kinds(self, settings: Settings) -> list[tuple[str, ...]]:
        """What the steps of a run with these settings reuse, beside those that compute everything."""
        cycle = math.lcm(settings.reuse_features, settings.reuse_gradients)
        return sorted({kind for kind in reused_kinds(settings, [True] * cycle) if kind})

    def steps(self, settings: Settings) -> dict[str, StepRunner]:
        """The runners of all guided steps of a run with these settings."""
        return {step_name(kind): self.step(settings, kind) for kind in ((), *self.kinds(settings))}

    def parts(self, settings: Settings) -> dict[str, StepRunner]:
        """One runner for each part of the models that runs beside the steps; none where everything is eager."""
        if self.runtime == EAGER:
            return {}
        if not self._parts:
            for what in PARTS.values():
                spec = self.spec(settings, what=what)
                self._parts[what] = StepRunner(spec, self.runtime, self.store, pins=self._pins.get(what))
        return self._parts

    def functions(self, settings: Settings, slots: int) -> dict[str, Callable[..., Tensor]]:
        """Encoder, decoder and UNet for encoding, inversion and decoding: compiled ones where the store has them."""
        runners = self.parts(settings)
        own: dict[str, Callable[..., Tensor]] = {
            "predict_noise": self.diffusion.predict_noise,
            "encode": self.diffusion.encode,
            "decode": self.diffusion.decode,
        }
        if runners:
            parts = {name: runners[what].part(slots) for name, what in PARTS.items()}
            run = parts["predict_noise"]

            def predict_noise(z: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
                return run(z, timestep, *tensors(condition))

            return parts | {"predict_noise": predict_noise}
        return own

    def taken(self, settings: Settings, slots: Iterable[int]) -> dict[str, dict[str, str]]:
        """What runs the guided step and each part beside it, by slot count: `{"guided-step": {"1": "eager", ...}}`."""
        runners = self.steps(settings) | self.parts(settings)
        return {what: {str(n): r.taken(n) for n in slots} for what, r in runners.items()}

    def parities(self, settings: Settings) -> dict[str, dict[str, Any]]:
        """How far the compiled steps that are there were from eager when they were built, by runtime."""
        found = self.step(settings).found() if self.runtime != EAGER else {}
        return {name: artefact.report["parity"] for name, artefact in found.items()}

    @contextmanager
    def pinned(
        self,
        runtimes: Mapping[str, Mapping[str, str]],
        settings: Settings,
        slots: Iterable[int],
        say: Callable[[str], None],
        *,
        fresh: bool,
    ) -> Iterator[None]:
        """Let `auto` take what `runtimes` of an earlier session says, whatever was built or measured since.

        What cannot be had here any more is eager, which `say` is told. `fresh` opens everything compiled anew.
        """
        before = self._steps, self._parts
        if fresh:
            self._steps, self._parts = {}, {}
        now = self.taken(settings, slots)
        runners = self.steps(settings) | self.parts(settings)
        pins: dict[str, dict[str, str]] = {}
        for what, runner in runners.items() if self.runtime == AUTO else ():
            wanted = runtimes.get(what, dict.fromkeys(now[what], "eager"))
            here = {"eager", *runner.ready()}
            pins[what] = {n: name if name in here else "eager" for n, name in wanted.items()}
            for name in sorted({*wanted.values()} - here):
                say(f"runtime: {name} ran {what} when this began and is not here, so eager does (counterlens export)")
        if pins and now != pins:
            say(f"runtime: {', '.join(dict.fromkeys(pins[STEP].values()))}, as this began")
        self._pins = pins
        for what, runner in runners.items():
            runner.pins = pins.get(what, {})
        try:
            yield
        finally:
            self._pins = {}
            for runner in runners.values():
                runner.pins = {}
            self._steps, self._parts = before

    def prepare(self, settings: Settings, slots: int, measure: bool | None) -> Choice:
        """Open or build what a slot count needs and run it once; `measure`: see `EngineCore.warmup`."""
        steps = self.steps(settings)
        for r in (*steps.values(), *self.parts(settings).values()):
            missing = self.runtime == AUTO and str(slots) not in r.measurements() and r.ready()
            if missing if measure is None else measure:
                r.measure(slots)
        self.functions(settings, slots)
        with torch.no_grad():
            for runner in steps.values():
                flat(runner.step(slots))(*runner.spec.example(slots))
        return steps[STEP].choose(slots)


def step_name(reused: tuple[str, ...]) -> str:
    """What a guided step is called that reuses this."""
    return "-".join((STEP, *(["reusing"] if reused else []), *reused))
